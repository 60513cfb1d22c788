"""Where upstream is wrong and we are not: every test shows upstream's behaviour and ours."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch
from transformers import GenerationConfig, MoshiForConditionalGeneration

from tests.configs import tiny_moshi_config
from tests.models.moshi.drawn import draw_inputs
from tests.torch_oracle import Pair, make_pair, numpy
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    config, directory = tiny_moshi_config(sliding_window=3), tmp_path_factory.mktemp("differences")
    return make_pair(MoshiForConditionalGeneration, FlaxMoshiForConditionalGeneration, config, directory)


@pytest.fixture(scope="module")
def inputs(pair: Pair) -> dict[str, np.ndarray]:
    return draw_inputs(pair.theirs.config, 2, masked=False).as_dict()


def labels(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Labels that are no special ids."""
    return {"text_labels": inputs["input_ids"] % 60, "audio_labels": inputs["moshi_audio_codes"] % 32}


def upstream(pair: Pair, inputs: dict[str, np.ndarray], **options: Any) -> Any:
    return pair.upstream(**{name: torch.from_numpy(value).long() for name, value in inputs.items()}, **options)


def test_hidden_state_is_paired_with_the_next_frame(pair: Pair, inputs: dict[str, np.ndarray]) -> None:
    """The codes of frame 0 are nobody's target here; upstream predicts them from the frame that holds them."""
    targets = labels(inputs)
    changed = {**targets, "audio_labels": targets["audio_labels"].copy()}
    changed["audio_labels"][:, 0, 0] = (changed["audio_labels"][:, 0, 0] + 1) % 32
    ours = [pair.ours(**inputs, **target).depth_loss for target in (targets, changed)]
    theirs = [upstream(pair, {**inputs, **target}).depth_loss for target in (targets, changed)]
    assert ours[0] == ours[1]
    assert theirs[0] != theirs[1]


def test_depth_decoder_is_causal_without_a_mask(pair: Pair) -> None:
    context = np.random.default_rng(0).standard_normal((1, 1, 64)).astype(np.float32)
    first, second = np.array([[5, 1, 2, 3]], np.int32), np.array([[5, 1, 2, 4]], np.int32)
    decoder = pair.ours.get_depth_decoder()
    ours = [decoder(input_ids=ids, last_hidden_state=context).logits[:, :3] for ids in (first, second)]
    np.testing.assert_array_equal(ours[0], ours[1])
    with torch.no_grad():
        theirs = [
            pair.theirs.depth_decoder(torch.from_numpy(ids).long(), torch.from_numpy(context)).logits[:, :3]
            for ids in (first, second)
        ]
    assert not torch.equal(*theirs)


def test_mask_together_with_labels(pair: Pair, inputs: dict[str, np.ndarray]) -> None:
    mask = np.ones_like(inputs["input_ids"])
    mask[:, 0] = 0
    arguments = {**inputs, **labels(inputs), "attention_mask": mask}
    assert np.isfinite(pair.ours(**arguments).loss)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        upstream(pair, arguments)


@pytest.mark.parametrize("name", ["text_labels", "audio_labels"])
def test_ignored_labels(pair: Pair, inputs: dict[str, np.ndarray], name: str) -> None:
    targets = labels(inputs)
    targets[name] = targets[name].copy()
    targets[name][..., 2] = -100
    assert np.isfinite(pair.ours(**inputs, **targets).loss)
    with pytest.raises(IndexError):
        upstream(pair, {**inputs, **targets})


def test_outputs_are_what_their_names_say(pair: Pair, inputs: dict[str, np.ndarray]) -> None:
    arguments = {**inputs, **labels(inputs)}
    batch, frames = inputs["input_ids"].shape
    ours = pair.ours(**arguments, output_hidden_states=True, output_attentions=True)
    theirs = upstream(pair, arguments, output_hidden_states=True, output_attentions=True)
    np.testing.assert_allclose(ours.loss, ours.text_loss + ours.depth_loss, rtol=1e-6)
    assert ours.last_hidden_state.shape == (batch, frames, 64)
    assert theirs.last_hidden_state.shape == (batch * frames, 1, 64)
    assert ours.depth_hidden_states[0].shape[-1] == 32
    assert theirs.depth_hidden_states[0].shape[-1] == 64
    assert ours.depth_attentions[0].shape[-1] == 4
    assert theirs.depth_attentions[0].shape[-1] == frames


def test_maximal_length_counts_the_prompt(pair: Pair, inputs: dict[str, np.ndarray]) -> None:
    frames = inputs["input_ids"].shape[1]
    options = {"max_length": frames + 4, "do_sample": False, "concat_unconditional_inputs": False}
    prompt = {**inputs, "moshi_audio_codes": inputs["moshi_audio_codes"] % 32}  # start codes belong at the beginning
    assert pair.ours.generate(**prompt, **options).sequences.shape[1] == frames + 4


def test_window_holds_without_a_cache(pair: Pair, inputs: dict[str, np.ndarray]) -> None:
    """One layer sees a window of 3; two layers reach back 4 frames, so frame 0 cannot change frame 5."""
    changed = {**inputs, "input_ids": inputs["input_ids"].copy()}
    changed["input_ids"][:, 0] = (changed["input_ids"][:, 0] + 1) % 60
    ours = [numpy(pair.ours(**arguments).logits)[:, 5:] for arguments in (inputs, changed)]
    theirs = [upstream(pair, arguments).logits[:, 5:] for arguments in (inputs, changed)]
    assert ours[0].shape[1] > 0
    np.testing.assert_array_equal(ours[0], ours[1])
    assert not torch.equal(*theirs)


def test_start_token_as_padding_masks_nothing(pair: Pair) -> None:
    """The published generation configuration pads with the start token, and upstream then masks the start frame."""
    options = {"max_new_tokens": 6, "do_sample": False, "return_audio_codes": True}
    plain = pair.ours.generate(**options)
    padded = pair.ours.generate(**options, pad_token_id=60)
    np.testing.assert_array_equal(plain.sequences, padded.sequences)
    np.testing.assert_array_equal(plain.audio_codes, padded.audio_codes)


def test_temp_is_read_as_temperature(pair: Pair) -> None:
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "return_audio_codes": True,
        "depth_decoder_do_sample": True,
        "prng_key": jax.random.key(0),
    }

    def codes(fields: dict[str, float]) -> np.ndarray:
        config = GenerationConfig()
        config.depth_decoder_config = fields
        return np.asarray(pair.ours.generate(**options, generation_config=config).audio_codes)

    as_temp, as_temperature, without = codes({"temp": 5.0}), codes({"temperature": 5.0}), codes({"top_k": 50})
    np.testing.assert_array_equal(as_temp, as_temperature)
    assert (as_temp != without).any()


def test_one_codebook(tmp_path: Any) -> None:
    single = make_pair(
        MoshiForConditionalGeneration, FlaxMoshiForConditionalGeneration, tiny_moshi_config(num_codebooks=1), tmp_path
    )
    assert single.ours.generate(max_new_tokens=3, return_audio_codes=True).audio_codes.shape == (1, 1, 2)
    with pytest.raises(TypeError):
        single.theirs.generate(max_new_tokens=3)


def test_generate_leaves_no_state(pair: Pair) -> None:
    """Only compiled programs stay on the model; a call between two others changes neither."""
    options = {"max_new_tokens": 5, "do_sample": False}
    first = pair.ours.generate(**options).sequences
    before = {name: id(value) for name, value in vars(pair.ours).items()}
    pair.ours.generate(**options, pad_token_id=3)
    np.testing.assert_array_equal(first, pair.ours.generate(**options).sequences)
    assert {name: id(value) for name, value in vars(pair.ours).items()} == before
    pair.theirs.generate(max_new_tokens=5, do_sample=False)
    assert "generated_audio_codes" in vars(pair.theirs)


def test_live_user_stream(pair: Pair, inputs: dict[str, np.ndarray]) -> None:
    """User codes beyond the prompt are heard while Moshi speaks: later ones change later frames only."""
    options = {"max_new_tokens": 10, "do_sample": False, "return_audio_codes": True}
    rng = np.random.default_rng(0)
    batch, codebooks, frames = inputs["user_audio_codes"].shape
    prompt = {**inputs, "moshi_audio_codes": inputs["moshi_audio_codes"] % 32}
    heard = rng.integers(0, 32, (batch, codebooks, frames + 8)).astype(np.int32)
    other = heard.copy()
    other[:, :, frames + 3 :] = (other[:, :, frames + 3 :] + 7) % 32
    first, second = (
        pair.ours.generate(**{**prompt, "user_audio_codes": codes}, **options) for codes in (heard, other)
    )
    # With the start frame, user frame f + 3 is input f + 4, which chooses text f + 5.
    same = frames + 5
    np.testing.assert_array_equal(first.sequences[:, :same], second.sequences[:, :same])
    assert (np.asarray(first.audio_codes) != np.asarray(second.audio_codes)).any()
