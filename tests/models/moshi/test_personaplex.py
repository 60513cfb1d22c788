"""PersonaPlex's files: depth steps for the user's voice as well, of which Moshi's own are loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("moshi.models", reason="Kyutai's `moshi` package, the oracle, is not installed")
from moshi.utils.compile import no_compile

from tests.models.moshi.test_kyutai import TINY_LM, TINY_MIMI, Checkpoint, assert_logits_are_equal, make_checkpoint
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration, IdleCodes, MoshiPrompt
from transformers_moshi_flax.models.mimi.kyutai_flax_mimi import KYUTAI_MIMI, mimi_config_from_kyutai
from transformers_moshi_flax.models.moshi.kyutai_config_flax_moshi import (
    KYUTAI_MOSHI,
    made_whole,
    moshi_config_from_kyutai,
)

Moshi = FlaxMoshiForConditionalGeneration
LM = {**TINY_LM, "n_q": 6, "dep_q": 6, "depformer_context": 6, "context": 300}
MIMI = {**TINY_MIMI, "quantizer": {**TINY_MIMI["quantizer"], "n_q": 6}}
OWN = 3


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """The oracle without its compiler, and without gradients."""
    with no_compile(), torch.no_grad():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    made = make_checkpoint(tmp_path_factory.mktemp("personaplex") / "source", LM, MIMI, seed=5)
    path = made.directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "personaplex"}))
    return made


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Moshi:
    return Moshi.from_kyutai(checkpoint.directory)


def test_logits_are_equal(checkpoint: Checkpoint, model: Moshi) -> None:
    """Of text and of Moshi's own codebooks."""

    class OwnSteps:
        """The oracle as a model of half as many steps."""

        n_q, dep_q, card, text_card, delays = 6, OWN, LM["card"], LM["text_card"], LM["delays"]

        def __call__(self, codes: Any) -> Any:
            return checkpoint.lm(codes)

    assert model.config.num_codebooks == model.config.depth_decoder_config.num_codebooks == OWN
    assert_logits_are_equal(OwnSteps(), model)


def test_nothing_is_missing_or_left(checkpoint: Checkpoint) -> None:
    _, found = Moshi.from_kyutai(checkpoint.directory, output_loading_info=True)
    assert not found["missing_keys"] and not found["mismatched_keys"]
    assert not [key for key in found["unexpected_keys"] if not key.startswith("quantizer")]


def test_a_dialogue_after_a_prompt_is_that_of_the_oracle(checkpoint: Checkpoint, model: Moshi) -> None:
    """With all that was said forced, each token is the oracle's most likely one."""
    frames, steps, rng = 9, 40, np.random.default_rng(1)
    prompt = MoshiPrompt(rng.integers(0, 50, frames), *rng.integers(0, 32, (2, OWN, frames)))
    user = rng.integers(0, 32, (1, OWN, steps))
    stream = model.streaming(1, do_sample=False, depth_decoder_do_sample=False, return_audio_waveforms=False)
    state, actual = stream.init(prompt=prompt), []
    for k in range(steps):
        state, frame = stream.step(state, user_audio_codes=user[..., k])
        actual.append(np.concatenate([np.asarray(frame.text_ids)[:, None], frame.audio_codes], axis=1)[0])
    actual = np.stack(actual, -1)
    assert len(np.unique(actual[1])) > 5
    text = np.concatenate([prompt.text_ids, actual[0]])[None, None]
    own = np.concatenate([prompt.moshi_codes, actual[1:]], -1)[None]
    heard = np.concatenate([prompt.user_codes, user[0]], -1)[None]
    theirs = checkpoint.lm(torch.tensor(np.concatenate([text, own, heard], axis=1).astype(np.int64)))
    np.testing.assert_array_equal(theirs.text_logits[0, 0, frames:].argmax(-1), actual[0])
    for row in range(OWN):
        np.testing.assert_array_equal(theirs.logits[0, row, frames:-1].argmax(-1), actual[1 + row, :-1])


def test_a_config_of_nothing_is_moshikos() -> None:
    values, others = made_whole({"model_type": "personaplex"})
    assert others == 8 and values == {**KYUTAI_MOSHI, "model_type": "moshi"}
    mimi = mimi_config_from_kyutai(KYUTAI_MIMI)
    config = moshi_config_from_kyutai({"model_type": "personaplex"}, mimi)
    assert config.num_codebooks == 8 and config.sliding_window == 3000
    again = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    idle = IdleCodes.of(SimpleNamespace(config=again))
    assert idle.moshi.shape == idle.user.shape == (8,) and idle.user[0] == 430
    assert not hasattr(moshi_config_from_kyutai(KYUTAI_MOSHI, mimi), "idle_codes")
