"""Queries: what they turn into, and what is refused by its name."""

from __future__ import annotations

import numpy as np
import pytest

from tests.serving.fake_stream import FakeStream
from transformers_moshi_flax.serving.wishes import Wishes

STREAM = FakeStream()


def test_nothing_asked_for_is_the_stream_s():
    one, other = (Wishes.read({}, STREAM) for _ in range(2))
    assert one.format == "opus" and one.numbers == {} and one.max_steps is None
    assert one.key.dtype == np.uint32 and not np.array_equal(one.key, other.key)


def test_all_that_there_is():
    query = {
        "format": "pcm16",
        "text_temperature": "0.5",
        "text_topk": "10",
        "audio_temperature": "0",
        "audio_topk": "20",
        "text_seed": "7",
        "max_steps": "100",
        "repetition_penalty": "1.0",
        "repetition_penalty_context": "64",
        "pad_mult": "0",
    }
    wishes = Wishes.read(query, STREAM)
    assert wishes.format == "pcm16" and wishes.max_steps == 100 and wishes.key.tolist() == [0, 7]
    # a temperature of 0 takes the most likely
    assert wishes.numbers == {
        "temperature": 0.5,
        "top_k": 10,
        "depth_decoder_temperature": 1.0,
        "depth_decoder_top_k": 1,
    }


@pytest.mark.parametrize(
    "name, value, word",
    [
        ("temperature", "1", "not known here"),
        ("format", "mp3", "opus, pcm16"),
        ("text_temperature", "warm", "no finite number"),
        ("text_temperature", "nan", "no finite number"),
        ("text_temperature", "-1", "must be"),
        ("audio_topk", "0", "no integer"),
        ("audio_topk", "2.5", "no integer"),
        ("audio_topk", "٣", "no integer"),
        ("text_topk", "5000", "must be"),
        ("text_seed", "-1", "no integer"),
        ("audio_seed", "4294967296", "no integer"),
        ("audio_seed", "9" * 10_000, "no integer"),
        ("max_steps", "0", "no integer"),
        ("repetition_penalty", "1.1", "endless dialogue"),
        ("pad_mult", "0.5", "endless dialogue"),
    ],
)
def test_what_cannot_be_is_named(name: str, value: str, word: str):
    with pytest.raises(ValueError, match=word) as refused:
        Wishes.read({name: value}, STREAM)
    assert f"`{name}`" in str(refused.value)
