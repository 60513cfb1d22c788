"""Texts and recordings become inputs that the model takes as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import (
    AutoTokenizer,
    EncodecFeatureExtractor,
    PreTrainedTokenizerBase,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from tests.configs import tiny_speech_language_config, tiny_voxtral_config
from tests.random_model import RANDOM_MODEL
from transformers_moshi_flax import FlaxSpeechLanguageModel, SpeechLanguageProcessor
from transformers_moshi_flax.generation.utils import FlaxGreedySearchOutput

EXTRACTORS = {
    "whisper": lambda: WhisperFeatureExtractor(feature_size=10),
    "voxtral": lambda: WhisperFeatureExtractor(feature_size=6),
    "wav2vec2": lambda: Wav2Vec2FeatureExtractor(return_attention_mask=True),
    "hubert": lambda: Wav2Vec2FeatureExtractor(return_attention_mask=False),
    "mimi": lambda: EncodecFeatureExtractor(sampling_rate=24_000),
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(RANDOM_MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<audio>"]})
    return tokenizer


def processor_of(kind: str, tokenizer: Any, **overrides: Any) -> tuple[Any, SpeechLanguageProcessor]:
    token = tokenizer.convert_tokens_to_ids("<audio>")
    if kind == "voxtral":
        config = tiny_voxtral_config()
        config.audio_token_id = token
    else:
        config = tiny_speech_language_config(kind, audio_token_id=token, **overrides)
    return config, SpeechLanguageProcessor.for_model(config, EXTRACTORS[kind](), tokenizer)


def noise(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [0.3 * rng.normal(size=length).astype(np.float32) for length in lengths]


# the tokens of 400, 150 and 90 samples, and of the longest one's windows
COUNTS = {"whisper": [1, 1, 1], "wav2vec2": [10, 4, 2], "hubert": [10, 4, 2], "mimi": [13, 5, 3], "voxtral": [4, 4, 4]}


@pytest.mark.parametrize("kind", COUNTS)
def test_a_recording_has_as_many_tokens_as_the_model_hears(kind: str, tokenizer: Any):
    config, processor = processor_of(kind, tokenizer)
    texts = ["a <audio> and <audio> you", "<audio>you"]
    inputs = processor(texts, noise(400, 150, 90), processor.sampling_rate)
    counts = COUNTS[kind]
    is_audio = inputs["input_ids"] == config.audio_token_id
    np.testing.assert_array_equal(is_audio.sum(axis=1), [counts[0] + counts[1], counts[2]])
    assert inputs["attention_mask"][0].all() and not inputs["attention_mask"][1, 0]
    assert inputs["input_ids"].dtype == np.int32 and list(inputs)[2] == processor.model_input_names[2]
    assert ("audio_attention_mask" in inputs) == (kind != "voxtral")
    # the model finds nothing wrong with them
    model = FlaxSpeechLanguageModel(config, _do_init=False)
    audio = inputs["input_values" if "input_values" in inputs else "input_features"]
    np.testing.assert_array_equal(model._checked_counts(audio, inputs.get("audio_attention_mask")), counts)


def test_windows_of_a_long_recording(tokenizer: Any):
    """Of 11 frames, of which two more begin a token; what is left over makes one."""
    config, processor = processor_of("whisper", tokenizer)
    with pytest.raises(ValueError, match=r"`audio\[0\]` has 0.50625 s, but the encoder hears 0.22 s at once.*chunk"):
        processor("<audio>", noise(8100), 16_000)
    inputs = processor("<audio>", noise(8100)[0], 16_000, chunk_audio=True)
    assert inputs["input_features"].shape == (3, 10, 22)
    np.testing.assert_array_equal(inputs["audio_attention_mask"].sum(axis=1), [22, 22, 7])
    assert (inputs["input_ids"] == config.audio_token_id).sum() == 6 + 6 + 2
    _, whole = processor_of("voxtral", tokenizer)
    assert whole.num_audio_tokens(16 * 320 + 1) == 8


def test_texts_alone_and_back(tokenizer: Any):
    _, processor = processor_of("mimi", tokenizer)
    inputs = processor(["you", "you and you"], padding_side="right")
    assert list(inputs) == ["input_ids", "attention_mask"] and not inputs["attention_mask"][0, -1]
    ids = np.append(tokenizer.encode("you", add_special_tokens=False), processor.audio_token_id)[None]
    assert processor.batch_decode(ids) == processor.batch_decode(FlaxGreedySearchOutput(sequences=ids)) == ["you"]


@pytest.mark.parametrize("kind", ["whisper", "mimi", "voxtral"])
def test_save_and_load(kind: str, tokenizer: Any, tmp_path: Path):
    _, processor = processor_of(kind, tokenizer)
    processor.save_pretrained(tmp_path)
    again = SpeechLanguageProcessor.from_pretrained(tmp_path)
    for name in (*processor.options, "audio_token_id", "sampling_rate"):
        assert getattr(again, name) == getattr(processor, name), name
    arguments = ("you <audio>", noise(300), processor.sampling_rate)
    for name, array in processor(*arguments).items():
        np.testing.assert_array_equal(again(*arguments)[name], array)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sampling_rate": None}, "`sampling_rate` is missing: pass that of the audio; it must be 24000"),
        ({"sampling_rate": 16_000}, "`sampling_rate` is 16000, but the encoder hears 24000: resample"),
        ({"text": "you"}, "`text` has 0 '<audio>', but `audio` has 1 recordings"),
        ({"audio": None}, "`text` has 1 '<audio>', but `audio` has 0 recordings"),
        ({"audio": [np.zeros((2, 400), np.float32)]}, r"`audio\[0\]` must have the shape \(samples,\).*mix channels"),
        ({"audio": [np.full(400, np.nan, np.float32)]}, r"`audio\[0\]` has samples that are NaN"),
        ({"chunk_audio": True}, "`chunk_audio` has no effect on an encoder that hears any length"),
        ({"padding_side": "middle"}, '`padding_side` must be "left" or "right"'),
        ({"return_tensors": "pt"}, '`return_tensors` must be "np"'),
    ],
)
def test_calls_that_are_refused(arguments: dict[str, Any], message: str, tokenizer: Any):
    _, processor = processor_of("mimi", tokenizer)
    with pytest.raises(ValueError, match=message):
        processor(**{"text": "<audio>", "audio": noise(400), "sampling_rate": 24_000, **arguments})


def test_parts_that_are_refused(tokenizer: Any):
    config, processor = processor_of("wav2vec2", tokenizer)
    with pytest.raises(ValueError, match=r"`audio\[0\]` has 10 samples, too few for a token"):
        processor("<audio>", noise(10), 16_000)
    other = tiny_speech_language_config("wav2vec2", audio_token_id=5)
    for model, kind, pieces, message in (
        (
            config,
            "wav2vec2",
            AutoTokenizer.from_pretrained(RANDOM_MODEL),
            "`tokenizer` has no token.*add it",
        ),
        (config, "mimi", tokenizer, "sampling_rate=24000, but the encoder .* hears 16000"),
        (config, "whisper", tokenizer, "feature_size=10, but the encoder .* takes 1"),
        (other, "wav2vec2", tokenizer, "`audio_token_id` of the model is 5: join the model with that"),
    ):
        with pytest.raises(ValueError, match=message):
            SpeechLanguageProcessor.for_model(model, EXTRACTORS[kind](), pieces)
    for options, message in (
        ({"convolutions": [[1]]}, "`convolutions` must be pairs"),
        ({"max_samples": 0}, "`max_samples` must be a whole number"),
        ({"whole_windows": True}, "`whole_windows` is True, but `max_samples` is None"),
    ):
        with pytest.raises(ValueError, match=message):
            SpeechLanguageProcessor(EXTRACTORS["wav2vec2"](), tokenizer, **options)
