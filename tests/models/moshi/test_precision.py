"""No dtype is promoted by accident: the models run under JAX's strict promotion."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.configs import tiny_moshi_config
from transformers_moshi_flax import FlaxMoshiForCausalLM, FlaxMoshiForConditionalGeneration


def test_forward_losses_and_generation_are_strict() -> None:
    model = FlaxMoshiForConditionalGeneration(tiny_moshi_config())
    ids = np.arange(10).reshape(2, 5)
    codes = np.broadcast_to(ids[:, None], (2, 4, 5))
    inputs = {"input_ids": ids, "user_audio_codes": codes, "moshi_audio_codes": codes}
    with jax.numpy_dtype_promotion("strict"):
        outputs = model(**inputs, text_labels=ids, audio_labels=codes)
        sampled = model.generate(
            **inputs, max_new_tokens=3, do_sample=True, top_p=0.9, depth_decoder_do_sample=True, eos_token_id=7
        )
    assert np.isfinite(outputs.loss) and np.isfinite(sampled.audio_sequences).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_backbone_is_strict(dtype: jnp.dtype) -> None:
    model = FlaxMoshiForCausalLM(tiny_moshi_config(), dtype=dtype)
    ids = np.arange(10).reshape(2, 5)
    with jax.numpy_dtype_promotion("strict"):
        outputs = model(ids, labels=ids)
        model.generate(ids, max_new_tokens=3, do_sample=True)
    assert outputs.logits.dtype == dtype and outputs.loss.dtype == jnp.float32
