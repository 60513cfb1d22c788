"""A skill more for the Moshi that ships, by an adapter: it is to count, and to keep what it knew. ::

    python -m examples.converse.skill make outputs/skill
    moshi-flax train examples/converse/skill.yaml
    python -m examples.converse.skill evaluate outputs/skill

``make`` speaks what there is to learn from, half of it old, and puts dialogues together of it; ``evaluate`` asks both
live, of the model as it is and with the adapter, side by side in one batch. How far that came is in
``docs/notes/converse.md``: 600 steps are too few.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from transformers_moshi_flax import FlaxMoshiForConditionalGeneration, MoshiProcessor
from transformers_moshi_flax.cli.checkpoints import EMBEDDED_MODEL

from .assembling import Assembler, word_encoder, write_dataset
from .evaluate import drawn_exchanges, live, share, spoken_questions, texts_of
from .pieces import read_pieces, write_pieces
from .sentences import NUMBERS, SHARES, Exchange, exchanges, is_held_out

TOPIC = "counting"
COUNTING_SHARES = {**{topic: 0.5 * share for topic, share in SHARES.items()}, TOPIC: 0.5}
LONGEST = 6
"""Numbers of an answer."""

SEED = 60
SENTENCES, DIALOGUES = 3000, 4000
QUESTIONS = 64
"""Of the evaluation, of either kind."""


def counting() -> list[Exchange]:
    """All that is new: to count from a number to a larger one; a tenth of the pairs is held out."""
    found = []
    for first, last in itertools.combinations(range(len(NUMBERS)), 2):
        if last - first < LONGEST:
            names = NUMBERS[first], NUMBERS[last]
            answer = " ".join(NUMBERS[first : last + 1])
            for phrase in ("count from {} to {}", "please count from {} to {}", "can you count from {} to {}"):
                found.append(Exchange(phrase.format(*names), answer, TOPIC, is_held_out(f"{TOPIC} {' '.join(names)}")))
    return found


def make(folder: Path, sentences: int = SENTENCES, dialogues: int = DIALOGUES) -> None:
    """Write ``folder/pieces`` and, put together of them, ``folder/dialogues``."""
    everything = [*exchanges(), *counting()]
    model = FlaxMoshiForConditionalGeneration.from_pretrained(EMBEDDED_MODEL, dtype=jnp.float32)
    model.audio_encoder.save_pretrained(folder / "codec")
    write_pieces(folder / "codec", folder / "pieces", sentences, SEED, everything, COUNTING_SHARES)
    pieces = read_pieces(folder / "pieces")
    assembler = Assembler(pieces, word_encoder(EMBEDDED_MODEL), everything, COUNTING_SHARES)
    write_dataset(folder / "dialogues", assembler.dialogue, dialogues, (SEED, 1))


def answers(
    model: FlaxMoshiForConditionalGeneration, users: Float32[np.ndarray, "rows samples"], params: Any
) -> list[str]:
    """What each row says."""
    tokenizer = MoshiProcessor.from_pretrained(EMBEDDED_MODEL).tokenizer
    ids, _ = live(model, users, params)
    rows = texts_of(ids, tokenizer, model.config.audio_encoder_config.frame_rate)
    return [" ".join(word for word, _ in row) for row in rows]


def evaluate(folder: Path, questions: int = QUESTIONS) -> dict[str, Any]:
    """How many of the new questions are answered, and how many of the old ones as before.

    Old ones are those of training, as what the model knows is to be kept. Every question is asked twice in one batch,
    of a row with the adapter and of one without.
    """
    model = FlaxMoshiForConditionalGeneration.from_pretrained(EMBEDDED_MODEL, dtype=jnp.float32)
    model.load_adapter(folder / "run" / "export")
    adapter = model.active_adapters()
    model.disable_adapters()
    new = [each for each in counting() if each.held_out]
    old = [each for each in exchanges() if not each.held_out]
    found: dict[str, Any] = {}
    for name, everything, shares in (("new", new, {TOPIC: 1.0}), ("old", old, SHARES)):
        drawn = drawn_exchanges(np.random.default_rng(SEED), everything, shares)
        asked, users = spoken_questions(drawn, questions, SEED, held_out_voice=False)
        names = [*adapter * questions, *[None] * questions]
        said = answers(model, np.concatenate([users, users]), model.adapted_params(adapter_names=names))
        found[name] = figures_of([each.exchange.answer for each in asked], said[:questions], said[questions:])
    return found


def figures_of(right: Sequence[str], adapted: Sequence[str], before: Sequence[str]) -> dict[str, Any]:
    known = [index for index, (answer, text) in enumerate(zip(right, before)) if answer == text]
    return {
        "right": share(sum(a == b for a, b in zip(right, adapted)), len(right)),
        "right_without": share(len(known), len(right)),
        "kept": share(sum(adapted[index] == right[index] for index in known), len(known)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "evaluate"))
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    if given.what == "make":
        make(given.folder)
    else:
        print(json.dumps(evaluate(given.folder), indent=1))


if __name__ == "__main__":
    main()
