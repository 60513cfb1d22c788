"""The model card of the converser: what it is, what it was trained on, what was measured, what it can't do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

LIBRARIES = ("jax", "flax", "optax", "numpy", "transformers", "pocketsphinx")

_TEXT = """\
---
library_name: transformers-moshi-flax
license: apache-2.0
language: en
tags: [moshi, mimi, speech-to-speech, full-duplex]
---

# moshi-converse

**A small demo model, trained on synthetic voices alone.** A whole Moshi of {parameters} parameters, with a Mimi and a
tokenizer of its own, which was trained from nothing, by the stages of `make embedded` of transformers-moshi-flax. It
hears and speaks English at 24 kHz, 12.5 frames a second, and was taught a few hundred things: sums and differences to
twenty, what comes after a day, a month, a letter or a number, opposites, colours of things, how short words are
spelled, a few facts, greetings; to repeat two words, to say an answer again, to be silent when told to, and to say
of some other questions that it doesn't know. It speaks word by word. How well it has learned them, and how much of its
speech is understood, the figures say.

It knows nothing of people's voices, of noise, or of any other sentence, and is of no use but to show and to test what
the package does. The weights are in the layout of PyTorch and in bfloat16; `transformers` loads them as well.

## Data

Dialogues by a grammar, spoken on the spot: Moshi by flite's voice `slt`; users by `rms` and `kal16` of flite, `slt` at
other rates and pitches, and eight voices of espeak-ng; flite's `awb` was never heard in training. flite and its voices
are Carnegie Mellon's, free to use and distribute; espeak-ng is under GPL-3, which does not extend to what it speaks.
No recording of theirs is in the weights. The weights are under Apache-2.0, as the package.

## Figures

Sentences that never occur in training, asked live, 80 ms at a time (`python -m examples.converse.evaluate`); in
brackets, 95 % intervals (Wilson).

| | known voices | held-out voice |
|---|---|---|
{questions}

The recognizer is pocketsphinx, with a grammar of all answers (noise reaches a few percent with it), or with none.

| in dialogues of ten minutes | |
|---|---|
{dialogues}

Right answers by topic, known voices: {topics}.

Made with {versions}.
"""


def card_of(figures: Mapping[str, Any], parameters: int) -> str:
    """The text of ``README.md``.

    Args:
        figures: from ``evaluate``.
        parameters: how many the model has.
    """
    sides = [figures["known_voices"], figures["held_out_voice"]]
    questions = [
        _row("answer exactly right", [_share(side["right"]) for side in sides]),
        _row("begins 0.2 to 1.2 s after the question", [_share(side["begins_in_time"]) for side in sides]),
        _row("speaks before the question ends", [_share(side["speaks_before_the_end"]) for side in sides]),
    ]
    for kind, name in (("grammar", "with the grammar"), ("free", "without")):
        for who, whose in (("moshi", "Moshi"), ("codec", "the codec alone"), ("voice", "the voice it learned")):
            values = [_percent(side["speech"].get(f"{who}_{kind}", math.nan)) for side in sides]
            questions.append(_row(f"word accuracy {name}: {whose}", values))
    talks = figures["dialogues"]
    dialogues = [] if talks is None else [_row(*line) for line in _dialogue_lines(talks)]
    topics = ", ".join(
        f"{topic} {_percent(each['share'])}" for topic, each in figures["known_voices"]["right_by_topic"].items()
    )
    return _TEXT.format(
        parameters=f"{parameters / 1e6:.1f} million",
        questions="\n".join(questions),
        dialogues="\n".join(dialogues),
        topics=topics,
        versions=", ".join(f"{name} {version(name)}" for name in LIBRARIES),
    )


def _dialogue_lines(talks: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    shares = {
        "right": "answer exactly right",
        "right_in_the_first_minute": "in the first minute",
        "right_in_the_last_minute": "in the last minute",
        "begins_in_time": "begins 0.2 to 1.2 s after the question",
        "stops_in_time": 'silent within 0.6 s after "stop"',
        "quiet_in_a_minute_of_silence": "at most one utterance in a minute of silence",
    }
    lines = [(words, [_share(talks[name])]) for name, words in shares.items()]
    return [
        *lines,
        ("frames in which it speaks while the user does", [_percent(talks["speaks_while_the_user_speaks"])]),
    ]


def _row(name: str, values: Sequence[str]) -> str:
    return f"| {' | '.join([name, *values])} |"


def _share(found: Mapping[str, float]) -> str:
    if not found["of"]:
        return "none counted"
    return f"{_percent(found['share'])} [{_percent(found['low'])}, {_percent(found['high'])}] of {found['of']}"


def _percent(share: float) -> str:
    return "not measured" if math.isnan(share) else f"{100 * share:.1f} %"
