"""Words that a recognizer hears, and how they are counted."""

from __future__ import annotations

import numpy as np
import pytest

from transformers_moshi_flax.training.codec.evaluation import stoi
from transformers_moshi_flax.training.codec.recognition import Recognizer, edit_distance, word_accuracy

GRAMMAR = "#JSGF V1.0; grammar sums; public <sum> = what is <number> plus <number>; <number> = one | two | three;"


def test_word_accuracy() -> None:
    assert word_accuracy(["What is two plus three?"], ["what is two plus three"]) == 1
    assert word_accuracy(["what is two plus three"], ["what two plus three four"]) == pytest.approx(0.6)
    assert word_accuracy(["one", "two three four"], ["", "two three four"]) == pytest.approx(0.75)
    assert edit_distance("abc", "xbcd") == 2 and edit_distance("", "ab") == edit_distance("ab", "") == 2
    with pytest.raises(ValueError, match="`texts` hold no words"):
        word_accuracy(["..."], ["word"])
    with pytest.raises(ValueError, match="`texts` are 1, but `heard` are 2"):
        word_accuracy(["one"], ["one", "two"])


def test_a_grammar_hears_one_of_its_sentences() -> None:
    recognizer = Recognizer(GRAMMAR)
    silence = np.zeros(24_000, np.float32)
    noise = (0.1 * np.random.default_rng(0).standard_normal(24_000)).astype(np.float32)
    heard = {recognizer(silence, 24_000), recognizer(noise, 24_000)}
    assert all(text == "" or text.startswith("what") for text in heard)
    assert recognizer(noise, 24_000) == recognizer(noise, 24_000)


def test_bad_grammars() -> None:
    with pytest.raises(ValueError, match="has words that the dictionary lacks: xqzv"):
        Recognizer("#JSGF V1.0; grammar g; public <s> = xqzv;")


def test_stoi_of_clean_and_of_noisy_speech() -> None:
    rng = np.random.default_rng(0)
    time = np.arange(48_000) / 24_000
    # bands that come and go, as those of speech do
    speech = sum(np.sin(2 * np.pi * f * time) * (rng.random(20).repeat(2400) > 0.4) for f in (300, 700, 1500, 2600))
    speech = (0.2 * speech).astype(np.float32)
    noisy = (speech + rng.standard_normal(48_000)).astype(np.float32)
    assert stoi(speech, speech, 24_000)["stoi"] > 0.99 > 0.8 > stoi(speech, noisy, 24_000)["stoi"]
    assert stoi(np.zeros(48_000, np.float32), noisy, 24_000) == stoi(speech[:2400], noisy[:2400], 24_000) == {}
