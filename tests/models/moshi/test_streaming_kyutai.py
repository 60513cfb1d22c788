"""The stream against Kyutai's ``LMGen.step``, token for token, on random weights in Kyutai's own files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("moshi.models", reason="Kyutai's `moshi` package, the oracle, is not installed")
from moshi.models import LMGen
from moshi.utils.compile import no_compile

from tests.models.moshi.test_kyutai import OTHER_LM, OTHER_MIMI, TINY_LM, TINY_MIMI, make_checkpoint
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration

STEPS = 200
# one codebook beside the semantic one more, many heads, a context that the dialogue does not reach
THIRD_LM = {**TINY_LM, "n_q": 8, "dep_q": 4, "delays": [0, 0, 1, 1, 1, 0, 1, 1, 1], "context": 300, "num_heads": 2}
CONFIGS = {"tiny": (TINY_LM, TINY_MIMI), "other": (OTHER_LM, OTHER_MIMI), "third": (THIRD_LM, TINY_MIMI)}


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """The oracle without its compiler, and without gradients."""
    with no_compile(), torch.no_grad():
        yield


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_equal(tmp_path: Path, name: str) -> None:
    """With a first frame for the oracle to ignore, and with the first frame ignored as there."""
    lm_kwargs, mimi_kwargs = CONFIGS[name]
    checkpoint = make_checkpoint(tmp_path / "source", lm_kwargs, mimi_kwargs, seed=11)
    ours = FlaxMoshiForConditionalGeneration.from_kyutai(checkpoint.directory)
    codebooks = lm_kwargs["dep_q"]
    user = np.random.default_rng(0).integers(0, lm_kwargs["card"], (2, codebooks, STEPS))
    nothing = np.zeros((2, codebooks, 1), dtype=user.dtype)
    greedy: dict[str, Any] = {"do_sample": False, "depth_decoder_do_sample": False}
    beginnings = [(False, np.concatenate([nothing, user], axis=-1))]
    if name == "tiny":
        beginnings.append((True, user))
    for ignored, heard_by_kyutai in beginnings:
        generator = LMGen(checkpoint.lm, use_sampling=False)
        expected = []
        with generator.streaming(2):
            for k in range(heard_by_kyutai.shape[-1]):
                tokens = generator.step(torch.from_numpy(heard_by_kyutai[:, :, k : k + 1]))
                assert (tokens is None) == (k == 0)
                if tokens is not None:
                    expected.append(tokens[..., 0].numpy())
        stream = ours.streaming(2, ignore_first_user_frame=ignored, return_audio_waveforms=False, **greedy)
        state, actual = stream.init(), []
        for k in range(STEPS):
            state, frame = stream.step(state, user_audio_codes=user[..., k])
            assert np.asarray(frame.valid).all() == (k > 0 or not ignored)
            if frame.valid.all():
                actual.append(np.concatenate([np.asarray(frame.text_ids)[:, None], frame.audio_codes], axis=1))
        np.testing.assert_array_equal(np.stack(actual), np.stack(expected))
        assert len(np.unique(np.stack(actual)[:, :, 1])) > 5, "the dialogue says nothing that could differ"
