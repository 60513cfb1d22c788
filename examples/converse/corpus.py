"""The corpus: dialogues for Moshi and single sentences for its codec, made on the spot. ::

    python -m examples.converse.corpus DIRECTORY --dialogues 100 --utterances 4000

- ``dialogues/train``, ``dialogues/held-out`` (sentences that never occur in training, known voices) and
  ``dialogues/held-out-voice`` (the same in a voice that never occurs), each with ``all.jsonl`` for ``moshi-flax
  prepare``;
- ``utterances/train`` and ``utterances/held-out``, and ``monologues``, Moshi's side of dialogues, which the decoder is
  to speak, each with ``all.jsonl`` for ``moshi-flax train-codec``.

The same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .dialogues import write_dialogues, write_monologues, write_utterances
from .sentences import exchanges

SEED = 20


def make_corpus(directory: Path, dialogues: int, utterances: int, held_out: int) -> None:
    """Write all parts; ``held_out`` dialogues, and as many sentences, are held out."""
    everything = exchanges()
    known = [each for each in everything if not each.held_out]
    others = [each for each in everything if each.held_out]
    write_utterances(directory / "utterances" / "train", known, utterances, SEED)
    write_monologues(directory / "monologues", known, -(-utterances // 4), SEED + 5)
    write_utterances(directory / "utterances" / "held-out", others, held_out, SEED + 1)
    write_dialogues(directory / "dialogues" / "train", known, dialogues, SEED + 2)
    write_dialogues(directory / "dialogues" / "held-out", others, held_out, SEED + 3)
    write_dialogues(directory / "dialogues" / "held-out-voice", others, held_out, SEED + 4, held_out_voice=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dialogues", type=int, default=100)
    parser.add_argument("--utterances", type=int, default=4000)
    parser.add_argument("--held-out", type=int, default=100)
    given = parser.parse_args()
    make_corpus(given.directory, given.dialogues, given.utterances, given.held_out)


if __name__ == "__main__":
    main()
