"""One function says how many samples a frame has: strides and rate of the codec, for everybody who counts frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.configs import tiny_moshi_config
from tests.random_model import RANDOM_MODEL
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration, MoshiProcessor
from transformers_moshi_flax.cli.generate import Speaker
from transformers_moshi_flax.models.mimi.topology import samples_per_frame

HOP = 8


def test_everybody_counts_the_same_samples(tmp_path: Path) -> None:
    """Of a codec whose ``frame_rate`` makes frames of four steps; ``frame_size`` of its class counts two always."""
    config = tiny_moshi_config(audio_encoder_config={"frame_rate": 24_000 / (4 * HOP)})
    size = samples_per_frame(config.audio_encoder_config)
    assert (size, config.audio_encoder_config.frame_size) == (4 * HOP, 2 * HOP)
    model = FlaxMoshiForConditionalGeneration(config)
    assert model.streaming().frame_size == size
    assert Speaker("", model, None).frame_size == size

    AutoTokenizer.from_pretrained(RANDOM_MODEL).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_bytes((RANDOM_MODEL / "preprocessor_config.json").read_bytes())
    config.save_pretrained(tmp_path)
    processor = MoshiProcessor.from_pretrained(tmp_path)
    assert processor.frame_size == size

    inputs = processor(user_audio=np.zeros(3 * size, np.float32), sampling_rate=24_000)
    assert inputs["input_ids"].shape == (1, 3)
    assert model(**inputs).logits.shape[1] == 3
    outputs = model.generate(**inputs, max_new_tokens=2, return_audio_codes=True)
    frames = 3 + 2 - 1
    assert outputs.audio_codes.shape[-1] == frames == int(outputs.audio_lengths[0])
    assert outputs.audio_sequences.shape[-1] == frames * size
    assert processor.decode_audio(outputs)[0].size == frames * size
    with pytest.raises(ValueError, match=f"a frame is {size} samples"):
        model.generate(**{**inputs, "moshi_input_values": inputs["moshi_input_values"][..., size:]}, max_new_tokens=2)
