"""The trained model that ships: what it answers, and that upstream and Kyutai's package say the same with it."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import MoshiForConditionalGeneration

from tests.torch_oracle import assert_close, numpy
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration, MoshiProcessor
from transformers_moshi_flax.cli.audio import read_audio
from transformers_moshi_flax.cli.checkpoints import ASSETS, EMBEDDED_MODEL, EMBEDDED_QUESTION, Dtype
from transformers_moshi_flax.cli.generate import Speaker
from transformers_moshi_flax.cli.transcript import PAD

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.converse.card import card_of
from examples.converse.dialogues import in_a_room
from examples.converse.evaluate import Asked, drawn_exchanges, live, texts_of, turn_counts, utterances
from examples.converse.sentences import exchanges
from examples.converse.voices import SAMPLING_RATE, Voice

FRAME = 1920
KNOWN_VOICE = Voice("espeak:en-us+m3")
"""One of training, which PyPI has."""

ASKED = 24


@pytest.fixture(scope="module")
def model() -> FlaxMoshiForConditionalGeneration:
    return FlaxMoshiForConditionalGeneration.from_pretrained(EMBEDDED_MODEL, dtype=jnp.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return MoshiProcessor.from_pretrained(EMBEDDED_MODEL).tokenizer


@pytest.fixture(scope="module")
def question() -> np.ndarray:
    """Whole frames, and silence for an answer."""
    samples = read_audio(EMBEDDED_QUESTION, SAMPLING_RATE)
    return np.pad(samples, (0, 60 * FRAME - len(samples)))


@pytest.fixture
def eager() -> Iterator[None]:
    """Kyutai's package without its compiler, and without gradients."""
    from moshi.utils.compile import no_compile

    with no_compile(), torch.no_grad():
        yield


def in_front_of(samples: np.ndarray, seconds: float) -> np.ndarray:
    """``seconds`` of a room in which somebody says ``samples`` after a second."""
    heard = np.zeros(round(seconds * SAMPLING_RATE), np.float32)
    heard[SAMPLING_RATE : SAMPLING_RATE + len(samples)] = samples
    return in_a_room(heard, np.random.default_rng(3))


def test_it_is_small_and_in_the_layout_of_pytorch() -> None:
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_500_000
    with safe_open(EMBEDDED_MODEL / "model.safetensors", framework="numpy") as file:
        assert file.metadata()["format"] == "pt"
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}
    assert kinds == {"BF16"}


def test_the_command_line_computes_in_float32() -> None:
    """As it has learned to; it is stored in bfloat16 to be small."""
    loaded = Speaker.load(str(EMBEDDED_MODEL), None).model
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.params)} == {"float32"} and loaded.dtype == jnp.float32
    narrow = Speaker.load(str(EMBEDDED_MODEL), Dtype.bfloat16).model
    assert narrow.dtype == jnp.bfloat16


def test_the_card_has_the_figures_that_were_measured(model: FlaxMoshiForConditionalGeneration) -> None:
    figures = json.loads((EMBEDDED_MODEL / "figures.json").read_text("utf-8"))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    card = card_of(figures, parameters)
    shipped = (EMBEDDED_MODEL / "README.md").read_text("utf-8")
    # but for the versions that it was made with
    assert shipped.splitlines()[:-1] == card.splitlines()[:-1]


@pytest.mark.parametrize(("held_out", "at_least"), [(False, 15), (True, 3)])
def test_it_answers_questions(model: Any, tokenizer: Any, held_out: bool, at_least: int) -> None:
    """Some 20 of training and 7 to 10 of others, as espeak-ng's sound differs from run to run."""
    everything = [each for each in exchanges() if each.held_out == held_out]
    chosen = list(itertools.islice(drawn_exchanges(np.random.default_rng(5), everything), ASKED))
    users = np.stack([in_front_of(KNOWN_VOICE(each.question).audio, 9.0) for each in chosen])
    ids, sounds = live(model, users)
    said = [" ".join(word for word, _ in row) for row in texts_of(ids, tokenizer, 12.5)]
    right = [text == each.answer for text, each in zip(said, chosen)]
    assert sum(right) >= at_least, [(each.question, text) for text, each in zip(said, chosen)]
    # speech comes with the words, and none without
    assert all(bool(text) == bool(utterances(sound)) for text, sound in zip(said, sounds))


def test_it_is_silent_when_nobody_speaks_and_when_it_is_told_to_be(model: Any, tokenizer: Any) -> None:
    exchange = next(each for each in exchanges() if each.question == "which day comes after tuesday")
    asked, stop = KNOWN_VOICE(exchange.question).audio, KNOWN_VOICE("stop").audio
    end = 1 + len(asked) / SAMPLING_RATE
    stopped = in_front_of(asked, 15.0)
    at = round((end + 1.3) * SAMPLING_RATE)
    stopped[at : at + len(stop)] += stop
    told = Asked(None, at / SAMPLING_RATE, (at + len(stop)) / SAMPLING_RATE)
    ids, sounds = live(model, np.stack([in_front_of(np.zeros(0, np.float32), 15.0), stopped]))
    silent, cut = texts_of(ids, tokenizer, 12.5)
    assert not silent and not utterances(sounds[0])
    assert 0 < len(cut) < len(exchange.answer.split())
    counts = turn_counts([Asked(exchange, 1, end), told], cut, sounds[1], 0.25)
    assert counts["stopped"] == counts["stops"] == 1


def test_upstream_generates_the_same(model: Any, tokenizer: Any, question: np.ndarray) -> None:
    """The answer at the end of a question: text, codes, and the sound of them."""
    theirs = MoshiForConditionalGeneration.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    frames = 28
    user = question[None, None, : frames * FRAME]
    inputs = {
        "input_ids": np.full((1, frames), PAD, np.int64),
        "user_input_values": user,
        "moshi_input_values": np.zeros_like(user),
    }
    options: dict[str, Any] = {"max_new_tokens": 50, "return_audio_codes": True}
    expected = theirs.generate(**{name: torch.from_numpy(value) for name, value in inputs.items()}, **options)
    actual = model.generate(**{**inputs, "input_ids": inputs["input_ids"].astype(np.int32)}, **options)
    np.testing.assert_array_equal(numpy(actual.sequences), numpy(expected.sequences))
    np.testing.assert_array_equal(numpy(actual.audio_codes), numpy(expected.audio_codes))
    assert_close(actual.audio_sequences, expected.audio_sequences, 1e-4, "waveform")
    assert len(np.unique(numpy(actual.audio_codes))) > 30, "it says nothing that could differ"


def test_it_answers_without_jax(model: Any, tokenizer: Any, question: np.ndarray, tmp_path: Path) -> None:
    """Exported, on onnxruntime: text, codes and sound of its answer are those of JAX."""
    pytest.importorskip("onnxruntime")
    from transformers_moshi_flax.export import export_onnx
    from transformers_moshi_flax.export.verifying import compare
    from transformers_moshi_flax.runtime import OnnxMoshi

    export_onnx(model, tmp_path / "export", EMBEDDED_MODEL)
    exported = OnnxMoshi(tmp_path / "export", threads=1)
    agreement = compare(model, exported, question)
    assert agreement.agrees and agreement.text_logits < 1e-5 and agreement.audio < 1e-5, agreement
    _, text_ids = exported.converse(question)
    said = exported.text(text_ids)
    assert len(said.split()) > 3 and said == " ".join(word for word, _ in texts_of(text_ids[None], tokenizer, 12.5)[0])


def test_kyutais_package_speaks_the_same_dialogue(
    model: Any, question: np.ndarray, tmp_path: Path, eager: None
) -> None:
    """Their own files, written by us: codes of the question, then a greedy dialogue frame by frame, and its sound."""
    loaders = pytest.importorskip("moshi.models.loaders", reason="Kyutai's `moshi` package is not installed")
    from moshi.models import LMGen

    model.save_kyutai(tmp_path, tokenizer=EMBEDDED_MODEL / "tokenizer.model")
    info = loaders.CheckpointInfo.from_hf_repo(
        "none",
        config_path=tmp_path / "config.json",
        moshi_weights=tmp_path / "model.safetensors",
        mimi_weights=next(tmp_path.glob("tokenizer-*.safetensors")),
        mimi_config_path=tmp_path / "mimi_config.json",
        tokenizer=tmp_path / "tokenizer.model",
    )
    mimi, lm = info.get_mimi(), info.get_moshi(dtype=torch.float32)
    codes = mimi.encode(torch.from_numpy(question)[None, None])
    stream = model.streaming(1, return_audio_waveforms=False)
    np.testing.assert_array_equal(model.audio_encoder.encode(question[None, None]).audio_codes, codes)

    generator, expected = LMGen(lm, use_sampling=False), []
    with generator.streaming(1):
        for frame in [torch.zeros_like(codes[..., :1]), *codes.split(1, dim=-1)]:
            tokens = generator.step(frame)
            if tokens is not None:
                expected.append(tokens[..., 0].numpy())
    state, actual = stream.init(), []
    for frame in np.moveaxis(codes.numpy(), -1, 0):
        state, made = stream.step(state, user_audio_codes=frame)
        if made.valid.all():
            actual.append(np.concatenate([np.asarray(made.text_ids)[:, None], made.audio_codes], axis=1))
    np.testing.assert_array_equal(np.stack(actual), np.stack(expected))
    heard = np.stack(actual)[:, :, 1:].transpose(1, 2, 0)
    assert_close(
        model.audio_encoder.decode(heard).audio_values, mimi.decode(torch.from_numpy(heard).long()), 1e-4, "sound"
    )
