"""``audio_encoder_*`` arguments of the whole model reach Mimi (upstream cuts their names to one letter)."""

from __future__ import annotations

import jax
import numpy as np

from tests.configs import tiny_moshi_config
from transformers_moshi_flax import FlaxMimiModel, FlaxMoshiForConditionalGeneration

FRAMES = 5


def test_audio_encoder_padding_mask_reaches_mimi() -> None:
    config = tiny_moshi_config()
    model = FlaxMoshiForConditionalGeneration(config)
    params = model.params
    mimi = FlaxMimiModel(config.audio_encoder_config, _do_init=False)
    # a new Mimi has codebooks of zeros, which give the same code whatever is masked
    rng = np.random.default_rng(0)
    params["audio_encoder"]["quantizer"] = jax.tree.map(
        lambda leaf: leaf + rng.standard_normal(leaf.shape).astype(np.float32) ** 2,
        params["audio_encoder"]["quantizer"],
    )
    samples = FRAMES * config.audio_encoder_config.frame_size
    audio = rng.uniform(-1, 1, (2, 1, samples)).astype(np.float32)
    mask = np.ones((2, samples), np.int32)
    mask[1, samples // 2 :] = 0
    ids = rng.integers(0, config.vocab_size, (2, FRAMES))

    codes = mimi.encode(
        audio, padding_mask=mask, num_quantizers=config.num_codebooks, params=params["audio_encoder"]
    ).audio_codes
    expected = model(input_ids=ids, user_audio_codes=codes, moshi_audio_codes=codes, params=params).logits
    waveforms = {"input_ids": ids, "user_input_values": audio, "moshi_input_values": audio, "params": params}
    masked = model(**waveforms, audio_encoder_padding_mask=mask).logits
    unmasked = model(**waveforms).logits
    np.testing.assert_allclose(masked, expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))
    assert not np.allclose(masked[1], unmasked[1], rtol=0, atol=1e-3)
