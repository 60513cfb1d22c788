"""Mimi against upstream's, whole and in halves, and what upstream does not do: padded batches."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file
from transformers import MimiModel
from transformers.models.mimi import modeling_mimi

from tests.configs import drawn_rope, tiny_mimi_config
from tests.models.mimi.with_upstreams_weights import audio
from tests.torch_oracle import (
    Pair,
    assert_close,
    double_oracle,
    make_pair,
    numpy,
    oracle_precision,
)
from transformers_moshi_flax import FlaxMimiDecoderModel, FlaxMimiEncoderModel, FlaxMimiModel
from transformers_moshi_flax.checkpoints.rules import read_params
from transformers_moshi_flax.models.mimi.checkpoint_flax_mimi import mimi_rules


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(MimiModel, FlaxMimiModel, tiny_mimi_config(), tmp_path_factory.mktemp("mimi"))


def drawn(seed: int) -> tuple[dict, int, int]:
    """A configuration, a batch size and an audio length."""
    draw = random.Random(seed)
    causal = draw.random() < 0.75
    heads = draw.choice([2, 4])
    quantizers = draw.randint(2, 5)
    inner = draw.choice([12, 32])
    overrides = {
        "num_filters": draw.choice([2, 3, 4]),
        "upsampling_ratios": draw.choice([[4, 2], [3, 2], [5], [2, 3, 2]]),
        "num_residual_layers": draw.choice([1, 1, 2]),
        "kernel_size": draw.choice([7, 5]),
        "last_kernel_size": draw.choice([3, 1]),
        "compress": draw.choice([1, 2]),
        "use_conv_shortcut": draw.random() < 0.5,
        "use_causal_conv": causal,
        "trim_right_ratio": draw.choice([1.0, 0.5]) if causal else 1.0,
        "pad_mode": draw.choice(["constant", "replicate", "reflect"]),
        "upsample_groups": draw.choice([32, 8, 1]),
        "num_hidden_layers": draw.choice([1, 2]),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([1, 2, heads]),
        "sliding_window": draw.choice([2, 7, 100]),
        "attention_bias": draw.random() < 0.3,
        "hidden_act": draw.choice(["gelu", "silu"]),
        "num_quantizers": quantizers,
        "num_semantic_quantizers": draw.randint(1, quantizers - 1),
        "codebook_size": draw.choice([16, 32]),
        "codebook_dim": inner,
        "vector_quantization_hidden_dimension": inner,
        "audio_channels": draw.choice([1, 1, 2]),
        "rope_parameters": drawn_rope(seed, 10000.0),
    }
    return overrides, draw.choice([1, 2, 3]), draw.choice([1, 17, 64, 203, 301])


@pytest.mark.parametrize(
    "seed, dtype", [(seed, "float64") for seed in range(26)] + [(seed, "float32") for seed in range(26, 34)]
)
def test_drawn_configuration(seed: int, dtype: str, tmp_path: Path):
    overrides, batch, samples = drawn(seed)
    with jax.enable_x64(dtype == "float64"):
        pair = make_pair(MimiModel, FlaxMimiModel, tiny_mimi_config(**overrides), tmp_path, dtype, seed)
        x = audio(batch, samples, seed, overrides["audio_channels"], dtype)
        with oracle_precision(dtype):
            flags = {"output_hidden_states": True, "output_attentions": True}
            latents = pair.theirs.encoder(torch.tensor(x), **flags)
            codes = pair.theirs.encode(torch.tensor(x)).audio_codes
            decoded = pair.theirs.decode(codes, **flags)

        half = FlaxMimiEncoderModel(pair.ours.config.encoder_config, dtype=jnp.dtype(dtype), _do_init=False)

        @jax.jit
        def forward(params, x, codes):
            parts = {name: params[name] for name in half.params_shape_tree}
            outputs = half(x, params=parts, **flags)
            own_codes = pair.ours.module.apply(
                {"params": params}, outputs.latents, method=lambda mimi, z: mimi.quantizer.encode(z.swapaxes(1, 2))
            )
            return outputs, own_codes, pair.ours.decode(codes, params=params, **flags)

        our_latents, our_codes, our_decoded = forward(pair.ours.params, x, numpy(codes))
        for ours, theirs, values in ((our_latents, latents, "latents"), (our_decoded, decoded, "audio_values")):
            for name in (values, "hidden_states", "attentions"):
                assert_close(ours[name], theirs[name], pair.tol, name)
        np.testing.assert_array_equal(our_codes, codes)
        assert our_codes.dtype == jnp.int32
        assert len(np.unique(codes)) > 1


def test_forward_is_upstreams_and_cuts_to_the_input(pair: Pair):
    x = audio(2, 203, dtype="float32")
    expected, outputs = pair.upstream(torch.tensor(x)), pair.ours(x)
    assert outputs.audio_values.shape == x.shape
    np.testing.assert_array_equal(outputs.audio_codes, expected.audio_codes)
    assert_close(outputs.audio_values, expected.audio_values, pair.tol)
    given = pair.ours(audio_codes=outputs.audio_codes)
    assert given.audio_values.shape[-1] == 208
    np.testing.assert_allclose(given.audio_values[..., :203], outputs.audio_values, atol=1e-5)
    assert isinstance(pair.ours(x, return_dict=False), tuple)


@pytest.mark.parametrize("number", [1, 3, 6])
def test_fewer_quantizers(pair: Pair, number: int):
    x = audio(1, 120, dtype="float32")
    with torch.no_grad():
        codes = pair.theirs.encode(torch.tensor(x), num_quantizers=number).audio_codes
        decoded = pair.theirs.decode(codes).audio_values
    np.testing.assert_array_equal(pair.ours.encode(x, num_quantizers=number).audio_codes, codes)
    assert_close(pair.ours.decode(numpy(codes)).audio_values, decoded, pair.tol)


def test_equal_frame_rates_need_no_resampling():
    config = tiny_mimi_config(frame_rate=3000)
    model = FlaxMimiModel(config)
    assert not {"upsample", "downsample"} & set(model.params)
    codes = model.encode(audio(1, 24, dtype="float32")).audio_codes
    assert codes.shape == (1, 6, 3) and model.get_encoded_length(24) == 3
    assert model.decode(codes).audio_values.shape == (1, 1, 24)


# ------------------------------------------------------------------------------------------------------ halves, files


def test_names_are_upstreams_with_all_layers_of_the_released_model(tmp_path: Path):
    config = tiny_mimi_config(
        num_filters=4, upsampling_ratios=[8, 6, 5, 4], num_hidden_layers=8, num_quantizers=32, upsample_groups=32
    )
    MimiModel(config).save_pretrained(tmp_path)
    _, params = FlaxMimiModel.from_pretrained(tmp_path, _do_init=False)
    assert len(flatten_dict(params)) == len(load_file(tmp_path / "model.safetensors"))


def test_upstream_to_ours_to_upstream_is_bit_equal(pair: Pair, tmp_path: Path):
    pair.ours.save_pretrained(tmp_path, to_pt=True)
    before, after = load_file(pair.directory / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor, after[name], err_msg=name)
    _, info = MimiModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


@pytest.mark.parametrize("saved", ["whole", "half"])
def test_halves_from_upstreams_files(pair: Pair, saved: str, tmp_path: Path):
    x = audio(2, 90, dtype="float32")
    with torch.no_grad():
        latents = pair.theirs.encoder(torch.tensor(x)).latents
        decoded = pair.theirs.decoder(latents).audio_values
    for name in ("encoder", "decoder"):
        if saved == "half":
            getattr(pair.theirs, name).save_pretrained(tmp_path / name)
    places = [pair.directory] * 2 if saved == "whole" else [tmp_path / "encoder", tmp_path / "decoder"]
    encoder, decoder = FlaxMimiEncoderModel.from_pretrained(places[0]), FlaxMimiDecoderModel.from_pretrained(places[1])
    assert_close(encoder(x).latents, latents, pair.tol)
    assert_close(decoder(numpy(latents)).audio_values, decoded, pair.tol)
    decoder.save_pretrained(tmp_path / "back", to_pt=True)
    again = modeling_mimi.MimiDecoderModel.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        assert_close(numpy(again(latents).audio_values), decoded, pair.tol)


@pytest.mark.parametrize("dropped, call", [("encoder", "encode"), ("decoder", "decode")])
def test_dropped_half(dropped: str, call: str, tmp_path: Path):
    config = tiny_mimi_config(**{f"{dropped}_config": None})
    pair = make_pair(MimiModel, FlaxMimiModel, config, tmp_path)
    assert not {dropped, f"{dropped}_transformer"} & set(pair.ours.params)
    x, codes = audio(1, 50, dtype="float32"), np.arange(24, dtype=np.int32).reshape(1, 6, 4)
    inputs = {"encode": x, "decode": codes}
    with pytest.raises(ValueError, match=f"{dropped}_config=None"):
        getattr(pair.ours, call)(inputs[call])
    other = {"encode": "decode", "decode": "encode"}[call]
    with torch.no_grad():
        expected = getattr(pair.theirs, other)(torch.tensor(inputs[other]))[0]
    assert_close(getattr(pair.ours, other)(inputs[other])[0], expected, pair.tol)
    assert flatten_dict(FlaxMimiModel(config).params).keys() == flatten_dict(pair.ours.params).keys()


# ----------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_torchs(checkpointing: bool, tmp_path: Path, x64: None):
    config = tiny_mimi_config(use_conv_shortcut=True, upsampling_ratios=[3, 2])
    pair = make_pair(MimiModel, FlaxMimiModel, config, tmp_path, "float64")
    x, latents = audio(2, 50), audio(2, 5, channels=32)
    for half, cls, value in (("encoder", FlaxMimiEncoderModel, x), ("decoder", FlaxMimiDecoderModel, latents)):
        model = cls.from_pretrained(tmp_path, dtype=jnp.float64, gradient_checkpointing=checkpointing)
        theirs = getattr(pair.theirs, half)
        with double_oracle():
            theirs.train()(torch.tensor(value))[0].square().mean().backward()
        loss = jax.jit(jax.grad(lambda params: jnp.square(model(value, params=params)[0]).mean()))  # noqa: B023
        gradients = flatten_dict(loss(model.params), sep="/")
        expected = {name: numpy(weight.grad) for name, weight in theirs.named_parameters()}
        # in memory the SEANet half is called encoder_seanet / decoder_seanet
        expected = {name.replace("_seanet", ""): value for name, value in expected.items()}
        state, missing, unexpected, _ = read_params(model.params_shape_tree, mimi_rules(), expected)
        assert not missing and not unexpected
        for name, gradient in flatten_dict(state, sep="/").items():
            assert_close(gradients[name], gradient, 1e-8, name)


def test_no_gradient_into_codebooks(pair: Pair):
    codes = np.arange(24, dtype=np.int32).reshape(1, 6, 4)
    gradients = jax.grad(lambda params: jnp.square(pair.ours.decode(codes, params=params)[0]).mean())(pair.ours.params)
    for path, gradient in flatten_dict(gradients, sep="/").items():
        if path.startswith("quantizer") and "codebook" in path:
            assert not np.any(gradient), path
    projection = gradients["quantizer"]["acoustic_residual_vector_quantizer"]["output_proj"]["kernel"]
    assert np.any(projection)


# --------------------------------------------------------------------------------------- padding, causality, compiling


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"pad_mode": "replicate"},
        {"pad_mode": "reflect", "num_residual_layers": 2},
        {"use_causal_conv": False},
        {"use_causal_conv": False, "pad_mode": "reflect", "upsampling_ratios": [3, 5]},
        {"trim_right_ratio": 0.5},
    ],
)
def test_padded_row_is_as_if_alone(overrides: dict, tmp_path: Path, x64: None):
    pair = make_pair(MimiModel, FlaxMimiModel, tiny_mimi_config(**overrides), tmp_path, "float64")
    model, lengths = pair.ours, [150, 97, 33, 3]
    x = audio(4, 150)
    x[1, :, 97:] = 50.0  # what lies under the padding must not matter
    mask = np.arange(150) < np.array(lengths)[:, None]
    encoder = FlaxMimiEncoderModel.from_pretrained(tmp_path, dtype=jnp.float64)

    @jax.jit
    def forward(x, mask):
        return encoder(x, mask).latents, model.encode(x, mask).audio_codes, model(x, mask[:, None])

    latents, codes, whole = forward(x, mask)
    np.testing.assert_array_equal(whole.audio_codes, codes)
    counts = model.get_audio_codes_mask(mask)
    assert counts.shape == codes.shape[::2]
    for row, length in enumerate(lengths):
        alone = torch.tensor(x[row : row + 1, :, :length])
        with oracle_precision("float64"):
            expected, expected_latents = pair.theirs(alone), pair.theirs.encoder(alone).latents
        frames = expected.audio_codes.shape[-1]
        assert counts[row].sum() == frames == model.get_encoded_length(length)
        assert_close(latents[row : row + 1, :, :frames], expected_latents, 1e-10, f"row {row}")
        np.testing.assert_array_equal(codes[row, :, :frames], expected.audio_codes[0])
        assert_close(whole.audio_values[row : row + 1, :, :length], expected.audio_values, 1e-10, f"row {row}")


def test_mask_of_ones_changes_nothing_and_cuts(pair: Pair):
    x = audio(1, 60, dtype="float32")
    np.testing.assert_array_equal(pair.ours.encode(x, np.ones((1, 60))).audio_codes, pair.ours.encode(x).audio_codes)
    codes = np.arange(24, dtype=np.int32).reshape(1, 6, 4)
    with torch.no_grad():
        expected = pair.theirs.decode(torch.tensor(codes), torch.ones(1, 50)).audio_values
    assert_close(pair.ours.decode(codes, np.ones((1, 50), bool)).audio_values, expected, pair.tol)


def test_causal(pair: Pair):
    """Changed samples leave the frames before them as they were, bit by bit."""
    x = audio(1, 160, dtype="float32")
    changed = x.copy()
    changed[..., 80:] = audio(1, 80, seed=1, dtype="float32")
    before, after = (np.asarray(pair.ours.encode(value).audio_codes) for value in (x, changed))
    np.testing.assert_array_equal(before[..., :5], after[..., :5])
    assert (before[..., 5:] != after[..., 5:]).any()
    sound, other = (np.asarray(pair.ours.decode(value).audio_values) for value in (before, after))
    np.testing.assert_allclose(sound[..., :80], other[..., :80], atol=1e-5)
    assert np.abs(sound[..., 80:] - other[..., 80:]).max() > 0.01


def test_compiled_is_eager_and_vmaps_over_params(pair: Pair):
    x, mask = audio(2, 100, dtype="float32"), np.arange(100) < np.array([[100], [61]])
    eager = pair.ours.module.apply({"params": pair.ours.params}, jnp.asarray(x), jnp.asarray(mask))
    compiled = jax.jit(pair.ours.__call__)(x, mask)
    np.testing.assert_array_equal(eager.audio_codes, compiled.audio_codes)
    assert_close(compiled.audio_values, eager.audio_values, pair.tol)
    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), pair.ours.params)
    codes = jax.vmap(lambda params: pair.ours.encode(x, params=params).audio_codes)(twice)
    np.testing.assert_array_equal(codes[1], pair.ours.encode(x).audio_codes)


def test_bfloat16_runs_in_bfloat16(pair: Pair):
    model = FlaxMimiModel.from_pretrained(pair.directory, dtype=jnp.bfloat16)
    outputs = model(audio(1, 64, dtype="float32"))
    assert outputs.audio_values.dtype == jnp.bfloat16 and np.isfinite(outputs.audio_values.astype(np.float32)).all()


def test_dropout_only_in_training(tmp_path: Path):
    model = FlaxMimiModel(tiny_mimi_config(attention_dropout=0.5, layer_scale_initial_scale=1.0))
    codes = np.zeros((1, 6, 9), np.int32)
    params = jax.tree.map(lambda leaf: leaf + 0.1, model.params)
    still = model.decode(codes, params=params).audio_values
    dropped = model.decode(codes, params=params, train=True, dropout_rng=jax.random.key(0)).audio_values
    np.testing.assert_array_equal(still, model.decode(codes, params=params).audio_values)
    assert np.abs(still - dropped).max() > 1e-4
    with pytest.raises(ValueError, match="dropout_rng"):
        model.decode(codes, train=True)


def test_codes_mask_is_upstreams(pair: Pair):
    mask = np.arange(100) < np.array([[100], [1], [16], [17]])
    for side in ("right", "left"):
        expected = pair.theirs.get_audio_codes_mask(torch.tensor(mask), side)
        np.testing.assert_array_equal(pair.ours.get_audio_codes_mask(mask, side), expected)
    for length in (1, 15, 16, 17, 1000):
        assert pair.ours.get_encoded_length(length) == pair.theirs.get_encoded_length(length)


# ----------------------------------------------------------------------------------------------------------- bad input

SOUND = audio(1, 40, dtype="float32")
CODES = np.zeros((1, 6, 3), np.int32)


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda m: m.encode(SOUND[0]), r"`input_values` must have the shape \(batch, 1, samples\)"),
        (
            lambda m: m.encode(SOUND.repeat(2, 1)),
            r"`input_values` must have.*\(1, 2, 40\)",
        ),
        (lambda m: m.encode(SOUND[..., :0]), "`input_values` is empty"),
        (lambda m: m.encode(SOUND * np.nan), "`input_values` has samples that are NaN or infinite"),
        (lambda m: m.encode((SOUND * 9).astype(np.int32)), "`input_values` must be floats.*int32"),
        (lambda m: m.encode(SOUND, num_quantizers=7), "`num_quantizers` is 7.*choose from 1 to 6"),
        (lambda m: m.encode(SOUND, num_quantizers=0), "`num_quantizers` is 0"),
        (lambda m: m.encode(SOUND, np.ones((1, 39))), r"`padding_mask` must have the shape \(1, 40\)"),
        (lambda m: m.encode(SOUND, np.arange(40)[None] > 3), "`padding_mask` has padding before audio"),
        (lambda m: m.encode(SOUND, np.full((1, 40), 2)), "`padding_mask` must hold only 0"),
        (lambda m: m.decode(CODES[0]), "`audio_codes` must have the shape"),
        (lambda m: m.decode(CODES + 32), r"`audio_codes` has the id 32.*\[0, 32\)"),
        (lambda m: m.decode(CODES - 1), "`audio_codes` has the id -1"),
        (lambda m: m.decode(CODES.astype(np.float32)), "`audio_codes` must hold integer ids"),
        (lambda m: m.decode(CODES.repeat(2, 1)), r"`audio_codes` must have the shape .*1 to 6 codebooks.*12"),
        (lambda m: m.decode(CODES[..., :0]), "`audio_codes` is empty"),
        (lambda m: m(), "give one of them"),
        (lambda m: m(SOUND, num_quantizers=2, audio_codes=CODES), "leave one out"),
        (lambda m: m.get_audio_codes_mask(np.ones((1, 4)), "middle"), "`padding_side` is 'middle'"),
        (lambda m: m.get_audio_codes_mask(np.ones(4)), "`padding_mask` must have the shape"),
    ],
)
def test_bad_input(pair: Pair, call: Any, match: str):
    with pytest.raises(ValueError, match=match):
        call(pair.ours)


def test_bad_latents(pair: Pair):
    model = FlaxMimiDecoderModel.from_pretrained(pair.directory)
    with pytest.raises(ValueError, match=r"`latents` must have the shape \(batch, 32, frames\)"):
        model(np.zeros((1, 31, 4), np.float32))
    with pytest.raises(ValueError, match=r"`latents` is empty, .*: give at least one frame"):
        model(np.zeros((1, 32, 0), np.float32))


@pytest.mark.parametrize(
    "overrides, match",
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, "rope_type='dynamic'"),
        ({"hidden_act": "swoosh"}, "`hidden_act` is 'swoosh'"),
        ({"pad_mode": "circular"}, "`pad_mode` is 'circular'"),
        ({"use_causal_conv": False, "trim_right_ratio": 0.5}, "`trim_right_ratio` is 0.5"),
        ({"num_attention_heads": 5}, "`hidden_size` 32 must be a multiple"),
        ({"num_key_value_heads": 3}, "`num_attention_heads` 4 must be a multiple"),
    ],
)
def test_bad_configuration(overrides: dict, match: str):
    with pytest.raises(ValueError, match=match):
        FlaxMimiModel(tiny_mimi_config(**overrides))
