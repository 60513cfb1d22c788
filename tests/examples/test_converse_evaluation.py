"""What is counted of a converser: shares, utterances, and turns of a dialogue that is laid out by hand."""

from __future__ import annotations

import ctypes.util
import json
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.converse.embedded import Size, make_embedded
from examples.converse.evaluate import SAMPLING_RATE, Asked, held_out_questions, share, turn_counts, utterances
from examples.converse.moshi import moshi_config, write_tokenizer
from examples.converse.sentences import Exchange, exchanges
from examples.converse.voices import Spoken, Voice

from transformers_moshi_flax import FlaxMoshiForConditionalGeneration, MoshiProcessor
from transformers_moshi_flax.models.moshi.kyutai_tokenizer_moshi import sentencepiece_tokenizer

SUM = Exchange("what is one plus one", "one plus one is two", "sum", True)


def sound(seconds: float, *spans: tuple[float, float]) -> np.ndarray:
    audio = np.zeros(round(seconds * SAMPLING_RATE), np.float32)
    for begin, end in spans:
        audio[round(begin * SAMPLING_RATE) : round(end * SAMPLING_RATE)] = 0.1
    return audio


def words(begin: float, text: str = SUM.answer) -> list[tuple[str, float]]:
    return [(word, begin + 0.2 * place) for place, word in enumerate(text.split())]


def test_shares_have_wilsons_interval() -> None:
    found = share(95, 100)
    assert found["share"] == 0.95
    # of the table in Newcombe (1998) for other numbers, by the formula: 0.888 to 0.978
    assert found["low"] == pytest.approx(0.8882, abs=1e-4) and found["high"] == pytest.approx(0.9785, abs=1e-4)
    assert share(0, 0)["of"] == 0


def test_a_few_questions_are_of_several_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    spoken: list[str] = []

    def speak(voice: Voice, text: str) -> Spoken:
        spoken.append(text)
        return Spoken(sound(0.5), [])

    monkeypatch.setattr("examples.converse.evaluate.speak", speak)
    asked, rows = held_out_questions(24, 7, False)
    assert [each.exchange.question for each in asked] == spoken
    everything = Counter(each.topic for each in exchanges() if each.held_out)
    for topic, number in Counter(each.exchange.topic for each in asked).items():
        questions = {each.exchange.question for each in asked if each.exchange.topic == topic}
        assert len(questions) == min(number, everything[topic])
    assert len({each.exchange.topic for each in asked}) > 2 and all(each.exchange.held_out for each in asked)
    assert rows.shape == (24, round(7.5 * SAMPLING_RATE))
    again, _ = held_out_questions(24, 7, False)
    assert asked == again


def test_short_silences_do_not_end_an_utterance() -> None:
    assert utterances(sound(5, (1.0, 1.5), (1.7, 2.0), (3.0, 3.5))) == [(1.0, 2.0), (3.0, 3.5)]
    assert utterances(sound(1)) == []


def test_turns_of_a_dialogue() -> None:
    asked = [Asked(SUM, 1, 2), Asked(SUM, 6, 7), Asked(None, 8.5, 9), Asked(SUM, 12, 13)]
    said = [*words(2.5), *words(7.5)[:3], *words(15, "one plus one is three")]
    moshi = sound(120, (2.5, 4), (7.5, 9.0), (12.5, 12.9), (15, 16))
    counts = turn_counts(asked, said, moshi, 2)
    assert counts["asked"] == 3 and counts["in_time"] == 2  # the last answer comes two seconds later
    assert counts["stops"] == counts["stopped"] == 1
    # the one that was cut off is not held to be right or wrong
    assert counts["answered"] == 2 and counts["right"] == 1
    assert counts["answered_in_the_first_minute"] == 2 and counts["answered_in_the_last_minute"] == 0
    assert counts["rests"] == counts["quiet"] == 1
    assert counts["overlapping"] == 20  # 12.5 to 12.9 s, in blocks of 20 ms
    late = turn_counts(asked, said, sound(120, (7.5, 9.5)), 2)
    assert late["stops"] == 1 and late["stopped"] == 0
    talks = turn_counts(asked, said, sound(120, *((15 + second, 15.5 + second) for second in range(60))), 2)
    assert talks["rests"] == 1 and talks["quiet"] == 0


def test_every_word_is_a_piece(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.model")
    tokenizer = sentencepiece_tokenizer(tmp_path / "tokenizer.model")
    for each in exchanges():
        ids = tokenizer.encode(each.answer, add_special_tokens=False)
        assert len(ids) == len(each.answer.split()) and tokenizer.decode(ids) == each.answer
    # and others can be said
    assert tokenizer.decode(tokenizer.encode("zebra Zürich 7", add_special_tokens=False)) == "zebra Zürich 7"
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 1, 3)


def test_the_model_is_small() -> None:
    from transformers import MimiConfig

    codec = MimiConfig.from_pretrained(Path(__file__).resolve().parents[2] / "examples" / "converse" / "codec")
    config = moshi_config(600, codec)
    model = FlaxMoshiForConditionalGeneration(config, _do_init=False)
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(model.params_shape_tree))
    assert 3e6 < count < 6e6  # 12 MB in bfloat16


@pytest.mark.slow
@pytest.mark.skipif(ctypes.util.find_library("flite") is None, reason="flite is not installed")
def test_the_whole_way_in_small(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Every stage, with a few steps each; what lacks a stage goes on from there."""
    codec = ("run.steps=2", "optimizer.warmup_steps=1", "run.samples=1", "run.evaluate_every=2", "data.batch_size=2")
    codec += ("data.evaluation_crops=2",)
    moshi = ("run.steps=2", "optimizer.warmup_steps=1", "data.batch_size=2", "run.samples=0")
    size = Size(
        dialogues=1,
        utterances=6,
        held_out=2,
        sentences=40,
        assembled=4,
        listening=4,
        answering=4,
        questions=1,
        minutes=0.4,
        long_dialogues=1,
        rows=1,
        settings=(
            ("codec-autoencoder", codec),
            ("codec-codebooks", (*codec, "quantizer.kmeans_batches=30")),
            ("codec-decoder", codec),
            ("moshi-listening", moshi),
            *((f"moshi-{name}", moshi) for name in ("repeating", "mixed", "answering")),
            ("moshi", moshi),
        ),
    )
    folder, assets = tmp_path / "made", tmp_path / "assets"
    make_embedded(folder, assets, size)
    assert sum(path.stat().st_size for path in assets.iterdir()) < 12_500_000
    figures = json.loads((assets / "figures.json").read_text())
    assert figures["known_voices"]["right"]["of"] == 1 and figures["dialogues"]["begins_in_time"]["of"] > 0
    model = FlaxMoshiForConditionalGeneration.from_pretrained(assets)
    processor = MoshiProcessor.from_pretrained(assets)
    assert processor.tokenizer.tokenize("one plus two") == ["▁one", "▁plus", "▁two"]
    codebooks = model.params["audio_encoder"]["quantizer"]["acoustic_residual_vector_quantizer"]["layers"]
    assert all(np.asarray(layer["codebook"]["initialized"]).all() for layer in codebooks.values())
    capfd.readouterr()

    (assets / "figures.json").unlink()
    make_embedded(folder, assets, size)
    told = capfd.readouterr().out
    assert told.count("done") == 14 and told.count("begins") == 1 and "assets: begins" in told
