"""Two runs of a dialogue, compared."""

from __future__ import annotations

import dataclasses

import numpy as np

from transformers_moshi_flax.export.verifying import _Run, agreement


def run() -> _Run:
    random = np.random.default_rng(0)
    return _Run(
        text_ids=random.integers(0, 9, (5, 1)),
        audio_codes=random.integers(0, 9, (5, 1, 3)),
        text_logits=random.standard_normal((5, 1, 9)).astype(np.float32),
        audio=random.standard_normal((5, 1, 1, 4)).astype(np.float32),
        times=np.arange(5.0),
    )


def test_the_same() -> None:
    found = agreement(run(), run(), "none")
    assert found.agrees and found.same_frames == found.frames == 5 and found.snr == float("inf")
    assert (found.text_ids, found.audio_codes, found.text_logits, found.audio) == (1, 1, 0, 0)


def test_another_token_and_what_follows_it() -> None:
    other = run()
    other.audio_codes[3, 0, 1] += 1
    other.audio[3:] += 1
    found = agreement(run(), other, "none")
    assert not found.agrees and found.same_frames == 3 and found.audio == 0
    assert agreement(run(), other, "int8").agrees
    assert found.audio_codes == 14 / 15 and found.text_ids == 1 and found.snr < 10


def test_audio_that_is_too_far_off() -> None:
    other = run()
    other.audio[0] += 0.01
    found = agreement(run(), other, "none")
    assert not found.agrees and found.same_frames == 5 and 1e-3 < found.audio < 1e-2
    assert dataclasses.asdict(found)["tolerance"] == 1e-4
