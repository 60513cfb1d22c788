"""The recordings that ship with the package: a user who asks three questions, and a single question. ::

    python -m examples.converse.questions DIRECTORY

The sentences are held out of training. What is said, with times, is written beside them as ``moshi-flax prepare``
reads it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from transformers_moshi_flax.checkpoints.writing import atomic_file, write_text

from .dialogues import MOSHI_VOICE, USER, Dialogue, in_a_room
from .sentences import exchanges
from .voices import SAMPLING_RATE, Voice

VOICE = Voice("flite:rms")
QUESTIONS = ("what is three plus six", "which day comes after tuesday", "tell me the colour of a tomato")
"""Of those that the model that ships answers right."""

BEFORE, THINKING, PAUSE = 0.5, 0.5, 1.5
"""Seconds before the first question, until Moshi answers, and after its answer."""

SEED = 40


def write_recording(path: Path, questions: Sequence[str], pauses: bool) -> None:
    """Write ``path`` and the JSON beside it; with ``pauses`` there is time for an answer to each question."""
    answers = {each.question: each.answer for each in exchanges()}
    dialogue, now = Dialogue(), BEFORE
    for question in questions:
        now = dialogue.say(USER, VOICE(question), now)
        if pauses:
            now += THINKING + len(MOSHI_VOICE(answers[question]).audio) / SAMPLING_RATE + PAUSE
    heard = in_a_room(dialogue.recording(now)[:, 1], np.random.default_rng(SEED))
    with atomic_file(path) as temporary:
        soundfile.write(temporary, heard, SAMPLING_RATE, subtype="PCM_16", format="FLAC")
    write_text(path.with_suffix(".json"), json.dumps({"alignments": dialogue.words}) + "\n")


def write_questions(folder: Path) -> None:
    """Write both recordings."""
    write_recording(folder / "user.flac", QUESTIONS, True)
    write_recording(folder / "question.flac", QUESTIONS[:1], False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    given = parser.parse_args()
    given.directory.mkdir(parents=True, exist_ok=True)
    write_questions(given.directory)


if __name__ == "__main__":
    main()
