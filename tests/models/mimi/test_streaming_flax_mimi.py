"""Mimi frame by frame: what a stream gives is what the whole at once gives, whatever the chunks and the neighbours."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import MimiModel

from tests.buffers import aligned, late
from tests.configs import tiny_mimi_config
from tests.torch_oracle import Pair, assert_close, make_pair, oracle_precision, upstreams_name
from transformers_moshi_flax import FlaxMimiDecoderModel, FlaxMimiEncoderModel, FlaxMimiModel
from transformers_moshi_flax.models.mimi import modeling_flax_mimi
from transformers_moshi_flax.models.mimi.quantizer_flax_mimi import norms_for_frames, prepared_for_frames
from transformers_moshi_flax.models.mimi.streaming_flax_mimi import (
    FlaxMimiDecoderState,
    FlaxMimiEncoderState,
)
from transformers_moshi_flax.models.mimi.topology import samples_per_frame

FRAME = 16  # samples, of the tiny configuration


def sound(batch: int, frames: int, config: Any, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    """Noise, loud enough that the codes are not decided by the biases."""
    shape = (batch, config.audio_channels, frames * samples_per_frame(config))
    return (20 * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def random_codes(batch: int, frames: int, config: Any, seed: int = 0) -> np.ndarray:
    shape = (batch, config.num_quantizers, frames)
    return np.random.default_rng(seed).integers(0, config.codebook_size, shape).astype(np.int32)


def cut(x: np.ndarray, chunks: Sequence[int], frame: int = 1) -> list[np.ndarray]:
    ends = np.cumsum(chunks)
    assert ends[-1] * frame == x.shape[-1]
    return np.split(x, ends[:-1] * frame, axis=-1)


def stream_encode(model: FlaxMimiModel, x: np.ndarray, chunks: Sequence[int], **kwargs: Any) -> np.ndarray:
    state, codes = model.init_encoder_state(x.shape[0]), []
    for chunk in cut(x, chunks, samples_per_frame(model.config)):
        state, new = model.encode_step(state, chunk, **kwargs)
        codes.append(np.asarray(new))
    return np.concatenate(codes, axis=-1)


def stream_decode(model: FlaxMimiModel, codes: np.ndarray, chunks: Sequence[int]) -> np.ndarray:
    state, audio = model.init_decoder_state(codes.shape[0]), []
    for chunk in cut(codes, chunks):
        state, new = model.decode_step(state, chunk)
        audio.append(np.asarray(new))
    return np.concatenate(audio, axis=-1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    config = tiny_mimi_config(sliding_window=5)
    return make_pair(MimiModel, FlaxMimiModel, config, tmp_path_factory.mktemp("mimi"))


@pytest.fixture(scope="module")
def model(pair: Pair) -> FlaxMimiModel:
    return pair.ours


# ------------------------------------------------------------------------------------------------- equal to the whole


def drawn(seed: int) -> tuple[dict[str, Any], int, list[int]]:
    """A configuration that can be streamed, a batch size, and chunks of one to three frames over two windows."""
    draw = random.Random(seed)
    ratios = draw.choice([[4, 2], [3, 2], [5], [2, 3, 2]])
    steps = draw.choice([1, 2, 2, 4])
    hidden = 32
    overrides = {
        "num_filters": draw.choice([2, 4]),
        "upsampling_ratios": ratios,
        "frame_rate": 24_000 / (np.prod(ratios).item() * steps),
        "num_residual_layers": draw.choice([1, 2, 3]),
        "dilation_growth_rate": draw.choice([2, 3]),
        "kernel_size": draw.choice([7, 4, 1]),
        "last_kernel_size": draw.choice([3, 1]),
        "residual_kernel_size": draw.choice([3, 2]),
        "use_conv_shortcut": draw.random() < 0.5,
        "pad_mode": draw.choice(["constant", "replicate"]),
        "upsample_groups": draw.choice([hidden, 8, 1]),
        "num_hidden_layers": draw.choice([1, 2]),
        "num_key_value_heads": draw.choice([1, 2, 4]),
        "sliding_window": draw.choice([1, 3, 6, 7]),
        "attention_bias": draw.random() < 0.3,
        "audio_channels": draw.choice([1, 2]),
        "num_quantizers": 4,
    }
    frames = max(2 * overrides["sliding_window"] // steps + 3, 6)
    chunks: list[int] = []
    while sum(chunks) < frames:
        chunks.append(draw.choice([1, 1, 1, 3]))
    return overrides, draw.choice([1, 2]), chunks


@pytest.mark.parametrize("seed, dtype", [(seed, "float64") for seed in range(4)] + [(10, "float32")])
def test_drawn_configuration_in_drawn_chunks(seed: int, dtype: str, tmp_path: Path):
    overrides, batch, chunks = drawn(seed)
    with jax.enable_x64(dtype == "float64"):
        model = make_pair(MimiModel, FlaxMimiModel, tiny_mimi_config(**overrides), tmp_path, dtype, seed).ours
        x = sound(batch, sum(chunks), model.config, seed, dtype)
        codes = np.asarray(model.encode(x).audio_codes)
        assert len(np.unique(codes)) > 6
        np.testing.assert_array_equal(stream_encode(model, x, chunks), codes)
        codes = random_codes(batch, sum(chunks), model.config, seed)
        tolerance = {"float64": 1e-10, "float32": 1e-5}[dtype]
        assert_close(stream_decode(model, codes, chunks), model.decode(codes).audio_values, tolerance)


def test_fewer_quantizers(model: FlaxMimiModel):
    x = sound(1, 3, model.config)
    expected = model.encode(x, num_quantizers=2).audio_codes
    np.testing.assert_array_equal(stream_encode(model, x, [1, 1, 1], num_quantizers=2), expected)
    audio = model.decode(expected).audio_values
    assert_close(stream_decode(model, np.asarray(expected), [1, 1, 1]), audio, 1e-5)


def test_bfloat16(pair: Pair):
    model = FlaxMimiModel.from_pretrained(pair.directory, dtype=jnp.bfloat16)
    state, codes = model.encode_step(model.init_encoder_state(1), sound(1, 2, model.config))
    assert {leaf.dtype for leaf in (*state.histories, *state.cache.keys)} == {jnp.dtype(jnp.bfloat16)}
    _, audio = model.decode_step(model.init_decoder_state(1), codes)
    assert audio.dtype == jnp.bfloat16 and np.isfinite(audio.astype(np.float32)).all()


def test_prepared_for_frames(model: FlaxMimiModel) -> None:
    """The norms of the entries are taken from the prepared parameters, and equal those that a frame computes."""
    number = model.config.num_quantizers - 1
    x, chunks = sound(2, 6, model.config), [1] * 6
    prepared = prepared_for_frames(model.params, model.config, number, model.dtype)
    codes = stream_encode(model, x, chunks, num_quantizers=number)
    np.testing.assert_array_equal(stream_encode(model, x, chunks, num_quantizers=number, params=prepared), codes)
    assert not (codes[:, 0] == 3).all()
    codebook = prepared["quantizer"]["semantic_residual_vector_quantizer"]["layers"]["0"]["codebook"]
    codebook["squares"] = codebook["squares"].at[3].set(-1e9)
    assert (stream_encode(model, x, chunks, num_quantizers=number, params=prepared)[:, 0] == 3).all()


def test_norms_are_kept_until_the_tables_change(model: FlaxMimiModel, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []

    def counted(codebooks: Any, dtype: Any) -> Any:
        computed.append(len(codebooks))
        return norms_for_frames(codebooks, dtype)

    monkeypatch.setattr(modeling_flax_mimi, "norms_for_frames", counted)
    monkeypatch.setattr(model, "_norms", ({}, {}), raising=False)
    x, chunks, number = sound(2, 3, model.config), [1, 1, 1], model.config.num_quantizers
    codes = np.asarray(model.encode(x).audio_codes)

    inside = jax.jit(lambda state, x: model.encode_step(state, x)[1])
    np.testing.assert_array_equal(inside(model.init_encoder_state(2), x), codes)
    computed.clear()  # what belongs to that program is not kept
    np.testing.assert_array_equal(stream_encode(model, x, chunks), codes)
    assert computed == [number]

    other = jax.tree.map(lambda leaf: leaf, model.params)  # the same arrays in dictionaries of their own
    np.testing.assert_array_equal(stream_encode(model, x, chunks, params=other), codes)
    assert computed == [number]
    codebook = other["quantizer"]["semantic_residual_vector_quantizer"]["layers"]["0"]["codebook"]
    codebook["embed_sum"] = codebook["embed_sum"][::-1]
    codebook["cluster_usage"] = codebook["cluster_usage"][::-1]
    reversed_codes = stream_encode(model, x, chunks, params=other)
    assert computed == [number, number]
    np.testing.assert_array_equal(reversed_codes[:, 0], model.config.codebook_size - 1 - codes[:, 0])


# --------------------------------------------------------------------------------------------------------------- rows


class Encoding:
    """What the tests of rows ask of the encoder: a step, the whole at once, and inputs by frame."""

    state = staticmethod(lambda model, batch: model.init_encoder_state(batch))
    step = staticmethod(lambda model, state, chunk, active: model.encode_step(state, chunk, active))
    whole = staticmethod(lambda model, x: model.encode(x).audio_codes)
    frame = FRAME

    @staticmethod
    def inputs(model: FlaxMimiModel, batch: int, frames: int) -> np.ndarray:
        return sound(batch, frames, model.config)


class Decoding:
    """As :class:`Encoding`, of the decoder."""

    state = staticmethod(lambda model, batch: model.init_decoder_state(batch))
    step = staticmethod(lambda model, state, chunk, active: model.decode_step(state, chunk, active))
    whole = staticmethod(lambda model, codes: model.decode(codes).audio_values)
    frame = 1

    @staticmethod
    def inputs(model: FlaxMimiModel, batch: int, frames: int) -> np.ndarray:
        return random_codes(batch, frames, model.config)


def remembered(state: Any, row: int) -> list[np.ndarray]:
    """What a row will look back on: of the ring, the slots that its next frame does not overwrite."""
    cache, batch = state.cache, state.batch_size
    ahead = (np.arange(cache.slots) - int(cache.slot[row])) % cache.slots
    slots = np.flatnonzero((ahead >= 2) & (ahead >= cache.slots - int(cache.filled[row])))
    rings = [np.asarray(ring).reshape(batch, -1, *ring.shape[1:])[row][:, slots] for ring in cache.keys + cache.values]
    counters = [np.asarray(leaf)[row] for leaf in (cache.position, cache.slot, cache.filled)]
    return [*(np.asarray(history)[row] for history in state.histories), *rings, *counters]


@pytest.mark.parametrize("pad_mode", ["constant", "replicate"])
@pytest.mark.parametrize("half", [Encoding, Decoding])
def test_rows_rest_and_begin_anew_on_their_own(half: Any, pad_mode: str, tmp_path: Path):
    """Three rows of different ages: each gives what it gives alone, and a row that rests changes nothing."""
    config = tiny_mimi_config(sliding_window=5, pad_mode=pad_mode, num_residual_layers=2)
    model = make_pair(MimiModel, FlaxMimiModel, config, tmp_path).ours
    draw, frames = random.Random(1), 16
    inputs = half.inputs(model, 3, frames)
    state = half.state(model, 3)
    heard: list[list[int]] = [[], [], []]
    given: list[list[np.ndarray]] = [[], [], []]
    for number in range(frames):
        if number in (6, 9):
            # what the row has given since its beginning is compared, and forgotten
            row = number % 3 if number == 6 else 1
            compare(half, model, inputs, heard, given, row)
            state = state.reset(np.arange(3) == row)
        active = np.array([True, draw.random() < 0.6, number >= 3])
        chunk = inputs[..., number * half.frame : (number + 1) * half.frame].copy()
        if half is Encoding:
            chunk[~active] = np.nan
        else:
            chunk[~active] = -5
        before = [remembered(state, row) for row in range(3)]
        state, output = half.step(model, state, chunk, active)
        for row in range(3):
            if active[row]:
                heard[row].append(number)
                given[row].append(np.asarray(output)[row])
            else:
                for old, new in zip(before[row], remembered(state, row)):
                    np.testing.assert_array_equal(old, new)
    assert len(heard[0]) > 8 and len(heard[1]) > 2
    for row in range(3):
        compare(half, model, inputs, heard, given, row)


def compare(
    half: Any,
    model: FlaxMimiModel,
    inputs: np.ndarray,
    heard: list[list[int]],
    given: list[list[np.ndarray]],
    row: int,
) -> None:
    """The row against the whole at once of the frames that it heard; both lists are emptied."""
    frames = np.split(inputs[row : row + 1], inputs.shape[-1] // half.frame, axis=-1)
    # causal: padding at the end keeps the shape, and so the program, the same
    sequence = [frames[number] for number in heard[row]] + [frames[0]] * (len(frames) - len(heard[row]))
    ours = np.concatenate(given[row], axis=-1)
    alone = np.asarray(half.whole(model, np.concatenate(sequence, axis=-1)))[0][..., : ours.shape[-1]]
    if half is Encoding:
        np.testing.assert_array_equal(ours, alone)
    else:
        assert_close(ours, alone, 1e-5)
    heard[row].clear()
    given[row].clear()


def test_callers_may_write_their_next_frame_at_once(model: FlaxMimiModel):
    audio, codes = sound(2, 1, model.config), random_codes(2, 1, model.config)
    for start, step, given in (
        (model.init_encoder_state, model.encode_step, audio),
        (model.init_decoder_state, model.decode_step, codes),
    ):
        active = np.array([True, False])
        expected = jax.tree.map(np.asarray, step(start(2), given, active=active))
        mine, still = aligned(given), aligned(active)
        results = step(late(start(2)), mine, active=still)
        mine[...], still[...] = 1, True
        jax.tree.map(np.testing.assert_array_equal, results, expected)


def test_reset_touches_no_other_row(model: FlaxMimiModel):
    state, _ = model.encode_step(model.init_encoder_state(2), sound(2, 1, model.config))
    kept = remembered(state, 1)
    state = state.reset(np.array([True, False]))
    assert int(state.cache.filled[0]) == 0 and not any(np.any(history[0]) for history in state.histories)
    for before, after in zip(kept, remembered(state, 1)):
        np.testing.assert_array_equal(before, after)


# ----------------------------------------------------------------------------------------------- upstream's arguments


def test_upstreams_arguments(pair: Pair):
    """Chunks through ``encode`` and ``decode`` equal the whole; upstream's own streaming encode does, too."""
    model, chunks = pair.ours, [3, 1, 3, 1]
    x = sound(2, sum(chunks), model.config)
    expected = model.encode(x)
    audio = model.decode(expected.audio_codes)
    assert "padding_cache" not in expected and "decoder_cache" not in audio
    caches: dict[str, Any] = {"use_streaming": True}
    theirs: dict[str, Any] = {"use_streaming": True}
    past: dict[str, Any] = {"use_cache": True}
    codes, upstreams, sounds = [], [], []
    for chunk in cut(x, chunks, FRAME):
        outputs = model.encode(chunk, **caches)
        caches = {name: outputs[name] for name in ("encoder_cache", "padding_cache")}
        codes.append(outputs.audio_codes)
        with oracle_precision("float32"):
            outputs = pair.theirs.encode(torch.tensor(chunk), **theirs)
        theirs = {name: outputs[name] for name in (upstreams_name("encoder_cache"), "padding_cache")}
        upstreams.append(outputs.audio_codes)
        decoded = model.decode(codes[-1], **past)
        past = {"decoder_cache": decoded.decoder_cache}
        sounds.append(decoded.audio_values)
    np.testing.assert_array_equal(np.concatenate(codes, -1), expected.audio_codes)
    np.testing.assert_array_equal(np.concatenate(upstreams, -1), expected.audio_codes)
    assert_close(np.concatenate(sounds, -1), audio.audio_values, 1e-5)
    again = model.encode(chunk, use_streaming=True, return_dict=False)
    assert [type(value).__name__ for value in again[1:]] == ["RingCache", "tuple"]


def test_halves_take_upstreams_arguments(pair: Pair):
    encoder, decoder = (cls.from_pretrained(pair.directory) for cls in (FlaxMimiEncoderModel, FlaxMimiDecoderModel))
    x = sound(1, 4, encoder.config)
    whole = np.asarray(encoder(x).latents)
    first = encoder(x[..., :FRAME], use_streaming=True)
    second = encoder(x[..., FRAME:], cache=first.cache, padding_cache=first.padding_cache)
    assert_close(np.concatenate([first.latents, second.latents], -1), whole, 1e-5)
    expected = decoder(whole).audio_values
    first = decoder(whole[..., :1], use_cache=True)
    second = decoder(whole[..., 1:], cache=first.decoder_cache)
    assert_close(np.concatenate([first.audio_values, second.audio_values], -1), expected, 1e-5)


def test_configuration_asks_for_streaming(pair: Pair, tmp_path: Path):
    config = tiny_mimi_config(sliding_window=5, use_streaming=True, use_cache=True)
    model = FlaxMimiModel.from_pretrained(pair.directory, config=config)
    outputs = model.encode(sound(1, 1, config))
    assert outputs.padding_cache and model.decode(outputs.audio_codes).decoder_cache
    assert "padding_cache" not in model.encode(sound(1, 1, config), use_streaming=False)


def test_configured_streams_yield_to_masks():
    """No stream has a mask, hidden states or attentions: the whole is coded, whatever the configuration says."""
    model = FlaxMimiModel(tiny_mimi_config(use_streaming=True, use_cache=True))
    x = sound(1, 3, model.config)[..., :-5]
    mask = np.ones((1, x.shape[-1]), int)
    codes = model.encode(x, mask).audio_codes
    np.testing.assert_array_equal(codes, model.encode(x, use_streaming=False).audio_codes)
    out = model.decode(codes, padding_mask=mask)
    assert list(out) == ["audio_values"] and out[0].shape == x.shape
    whole = model(x, mask, output_hidden_states=True, output_attentions=True)
    np.testing.assert_array_equal(whole.audio_codes, codes)
    assert_close(whole.audio_values, out.audio_values, 1e-6)
    states = model.encode(x, output_hidden_states=True).hidden_states
    assert len(whole.encoder_hidden_states) == len(states) == len(whole.decoder_hidden_states)
    assert_close(whole.encoder_hidden_states[-1], states[-1], 1e-6)
    assert len(whole.encoder_attentions) == len(whole.decoder_attentions) == model.config.num_hidden_layers
    again = model(audio_codes=codes, output_hidden_states=True)
    assert list(again) == ["audio_codes", "audio_values", "decoder_hidden_states"]


def test_upstreams_chunked_decode_is_wrong(pair: Pair):
    """Why the row in the differences: its convolutions forget, so the chunks do not join."""
    codes = random_codes(1, 6, pair.ours.config)
    with oracle_precision("float32"):
        whole = pair.theirs.decode(torch.tensor(codes)).audio_values
        first = pair.theirs.decode(torch.tensor(codes[..., :3]), use_cache=True)
        name = upstreams_name("decoder_cache")
        second = pair.theirs.decode(torch.tensor(codes[..., 3:]), **{name: first[name]})
    theirs = torch.cat([first.audio_values, second.audio_values], -1)
    assert (theirs - whole).abs().max() > 0.1 * whole.abs().max()
    assert_close(stream_decode(pair.ours, codes, [3, 3]), whole, 1e-5)


def test_upstreams_chunks_of_other_lengths_lose_samples(pair: Pair):
    """Three chunks of six frames in all give upstream five frames, most of them wrong."""
    x = sound(1, 6, pair.ours.config)
    caches: dict[str, Any] = {}
    codes = []
    with oracle_precision("float32"):
        whole = pair.theirs.encode(torch.tensor(x)).audio_codes
        for chunk in np.split(x, [24, 64], axis=-1):
            outputs = pair.theirs.encode(torch.tensor(chunk), use_streaming=True, **caches)
            caches = {name: outputs[name] for name in (upstreams_name("encoder_cache"), "padding_cache")}
            codes.append(outputs.audio_codes)
    theirs = torch.cat(codes, -1)
    assert theirs.shape[-1] == 5 and (theirs[..., 1:] != whole[..., 1:5]).float().mean() > 0.5
    state = pair.ours.init_encoder_state(1)
    with pytest.raises(ValueError, match="`input_values` has 24 samples"):
        pair.ours.encode_step(state, x[..., :24])
    np.testing.assert_array_equal(pair.ours.encode_step(state, x)[1], whole)


def test_upstreams_streaming_encode_with_shortcuts(tmp_path: Path):
    """It crashes there; here it equals upstream's whole."""
    pair = make_pair(MimiModel, FlaxMimiModel, tiny_mimi_config(use_conv_shortcut=True), tmp_path)
    x = sound(1, 2, pair.ours.config)
    with oracle_precision("float32"):
        with pytest.raises(TypeError):
            pair.theirs.encode(torch.tensor(x), use_streaming=True)
        expected = pair.theirs.encode(torch.tensor(x)).audio_codes
    np.testing.assert_array_equal(stream_encode(pair.ours, x, [1, 1]), expected)


# ----------------------------------------------------------------------------------------------------------- compiled


def test_compiled_once(model: FlaxMimiModel, count_compilations: Callable[[], int]):
    """After the first frames nothing compiles, whatever rows are active, reset or of another age."""
    x = sound(2, 1, model.config)

    def frames(state: Any, other: Any, active: Any) -> tuple[Any, Any]:
        state, codes = model.encode_step(state, x, active)
        other, _ = model.decode_step(other, codes, active)
        return state.reset(np.array([True, False])), other.reset(np.array([False, True]))

    states = frames(model.init_encoder_state(2), model.init_decoder_state(2), None)
    count_compilations()
    for active in (None, np.array([True, False]), np.zeros(2, bool)):
        states = frames(*states, active)
    assert count_compilations() == 0


@pytest.mark.parametrize("method", ["encode_step", "decode_step"])
def test_rings_are_updated_in_place(method: str, model: FlaxMimiModel):
    key: tuple[Any, ...] = (method, True)
    if method == "encode_step":
        state, inputs, key = model.init_encoder_state(1), jnp.zeros((1, 1, FRAME)), (*key, ("num_quantizers", None))
    else:
        state, inputs = model.init_decoder_state(1), jnp.zeros((1, 6, 1), jnp.int32)
    getattr(model, method)(jax.tree.map(jnp.copy, state), inputs)
    program = model._programs[key]
    compiled = program.lower(model.params, state, inputs, np.ones(1, dtype=bool)).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    shape = ",".join(map(str, state.cache.keys[0].shape))
    writes = re.findall(rf"f32\[{shape}\]\S* (?:fusion|dynamic-update-slice)\(", compiled.as_text())
    copies = re.findall(rf"f32\[{shape}\]\S* (?:copy|transpose)\(", compiled.as_text())
    assert writes and not copies


def test_lowers_for_tpu(model: FlaxMimiModel):
    def step(params: Any, state: Any, x: jax.Array) -> Any:
        return model.encode_step(state, x, params=params)

    state = jax.eval_shape(lambda: model.init_encoder_state(2))
    x = jax.ShapeDtypeStruct((2, 1, 2 * FRAME), jnp.float32)
    assert (
        "stablehlo.while"
        in jax.export.export(jax.jit(step), platforms=["tpu"])(
            jax.eval_shape(lambda: model.params), state, x
        ).mlir_module()
    )


# ------------------------------------------------------------------------------------------------------------- faults

SOUND = np.zeros((2, 1, FRAME), np.float32)
CODES = np.zeros((2, 6, 1), np.int32)


def other_window(model: FlaxMimiModel) -> FlaxMimiEncoderState:
    return FlaxMimiEncoderState.create(tiny_mimi_config(sliding_window=9), 2)


@pytest.mark.parametrize(
    "method, inputs, kwargs, match",
    [
        ("encode", SOUND[..., :15], {}, "`input_values` has 15 samples.*whole frames of 16"),
        ("encode", SOUND[0], {}, r"`input_values` must have the shape \(batch, 1, samples\)"),
        ("encode", SOUND[..., :0], {}, "`input_values` is empty"),
        ("encode", SOUND[:1], {}, "`input_values` has 1 rows, but the state has 2"),
        (
            "encode",
            SOUND.repeat(2, 1),
            {},
            r"`input_values` must have.*\(2, 2, 16\)",
        ),
        ("encode", SOUND.astype(np.int16), {}, "`input_values` must be floats.*int16"),
        ("encode", SOUND * np.nan, {}, "`input_values` has samples that are NaN"),
        (
            "encode",
            SOUND + np.inf,
            {"active": np.array([False, True])},
            "`input_values` has samples that are NaN",
        ),
        ("encode", SOUND, {"num_quantizers": 7}, "`num_quantizers` is 7"),
        ("encode", SOUND, {"active": np.array([True])}, r"`active` must be one bool per row, of the shape \(2,\)"),
        ("encode", SOUND, {"active": np.array([1, 0])}, "`active` .* dtype int64"),
        ("decode", CODES[0], {}, "`audio_codes` must have the shape"),
        ("decode", CODES + 32, {}, "`audio_codes` has the id 32"),
        ("decode", CODES - 1, {"active": np.array([False, True])}, "`audio_codes` has the id -1"),
        ("decode", CODES.astype(np.float32), {}, "`audio_codes` must hold integer ids"),
        ("decode", CODES.repeat(2, 1), {}, r"`audio_codes` must have the shape .*1 to 6 codebooks.*12"),
        ("decode", CODES[..., :0], {}, "`audio_codes` is empty"),
        ("decode", CODES.repeat(2, 0), {}, "`audio_codes` has 4 rows"),
    ],
)
def test_faults_leave_the_state_alive(model: FlaxMimiModel, method: str, inputs: Any, kwargs: dict, match: str):
    state = getattr(model, f"init_{method}r_state")(2)
    with pytest.raises(ValueError, match=match):
        getattr(model, f"{method}_step")(state, inputs, **kwargs)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda m: m.encode_step(m.init_decoder_state(2), SOUND), "`state` must be a FlaxMimiEncoderState"),
        (lambda m: m.encode_step(other_window(m), SOUND), r"`state` has a leaf float32\[4, 10, 8\].*\[4, 6, 8\]"),
        (lambda m: m.decode_step(FlaxMimiDecoderState.create(m.config, 2, jnp.bfloat16), CODES), "bfloat16.*dtype"),
        (lambda m: m.encode_step(m.init_encoder_state(2).replace(histories=()), SOUND), "`state` has 7 arrays"),
        (lambda m: m.init_encoder_state(0), "`batch_size` must be a whole number of at least 1, but is 0"),
        (lambda m: m.init_encoder_state(2).reset(np.array([0, 1])), "`rows` must be one bool per row"),
        (lambda m: m.encode(SOUND[..., :9], use_streaming=True), "`input_values` has 9 samples"),
        (lambda m: m.encode(SOUND, np.arange(FRAME)[None].repeat(2, 0) < 9, use_streaming=True), "`padding_mask` can"),
        (lambda m: m.encode(SOUND, np.ones((2, 7)), use_streaming=True), "`padding_mask` must have the shape .*7"),
        (lambda m: m.encode(SOUND, np.ones((1, FRAME)), use_streaming=True), "`padding_mask` must have the shape"),
        (lambda m: m.decode(CODES, np.ones((2, 7)), use_cache=True), r"`padding_mask` must have the shape \(2, 16\)"),
        (lambda m: m.encode(SOUND, use_streaming=True, output_attentions=True), "`output_attentions` cannot"),
        (lambda m: m.encode(SOUND, padding_cache=()), "`padding_cache` is given without `encoder_cache`"),
        (
            lambda m: m.encode(SOUND, encoder_cache=m.init_encoder_state(2).cache, use_streaming=False),
            "`use_streaming` is False",
        ),
        (lambda m: m.decode(CODES, decoder_cache=m.init_encoder_state(2)), "`decoder_cache` must"),
        (lambda m: m.decode(CODES[:1], decoder_cache=m.init_decoder_state(2)), "`audio_codes` has 1 rows"),
        (lambda m: m.decode(CODES, use_cache=True, train=True), "`train` cannot be combined"),
    ],
)
def test_faults(model: FlaxMimiModel, call: Callable[[FlaxMimiModel], Any], match: str):
    with pytest.raises(ValueError, match=match):
        call(model)


def swapped(model: FlaxMimiModel) -> Any:
    first = model.encode(SOUND, use_streaming=True)
    return model.encode(SOUND, encoder_cache=first.padding_cache, padding_cache=first.encoder_cache)


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda m: m.init_encoder_state("a"), "`batch_size` must be a whole number of at least 1, but is 'a'"),
        (lambda m: m.init_decoder_state(2.0), "`batch_size` must be a whole number of at least 1, but is 2.0"),
        (lambda m: m.encode(SOUND, use_streaming="no"), "`use_streaming` must be True, False, or None .* is 'no'"),
        (lambda m: m.decode(CODES, use_cache=0), "`use_cache` must be True, False, or None .* is 0"),
        (swapped, "`encoder_cache` must be a RingCache, but is of the type tuple: pass on"),
        (
            lambda m: m.encode(SOUND, encoder_cache=m.init_encoder_state(2).cache, padding_cache=3),
            "`padding_cache` must be a tuple, but is of the type int: pass on",
        ),
    ],
)
def test_wrong_types(model: FlaxMimiModel, call: Callable[[FlaxMimiModel], Any], match: str, unchecked_types: None):
    with pytest.raises(ValueError, match=match):
        call(model)


def test_consumed_state_is_named(model: FlaxMimiModel):
    state = model.init_decoder_state(2)
    model.decode_step(state, CODES)
    with pytest.raises(ValueError, match="`state` was consumed"):
        model.decode_step(state, CODES)


@pytest.mark.parametrize(
    "overrides, match",
    [
        ({"use_causal_conv": False}, "`use_causal_conv` is False"),
        ({"trim_right_ratio": 0.5}, "`trim_right_ratio` is 0.5"),
        ({"pad_mode": "reflect"}, "`pad_mode` is 'reflect'"),
        ({"frame_rate": 1400}, "`frame_rate` 1400 .* frames of 17.1429 samples, but the strides .* make 16"),
    ],
)
def test_configurations_that_cannot_be_streamed(overrides: dict, match: str):
    for state in (FlaxMimiEncoderState, FlaxMimiDecoderState):
        with pytest.raises(ValueError, match=match):
            state.create(tiny_mimi_config(**overrides), 1)


@pytest.mark.parametrize("half, method", [("encoder", "encode"), ("decoder", "decode")])
def test_dropped_half(half: str, method: str):
    model = FlaxMimiModel(tiny_mimi_config(**{f"{half}_config": None}))
    with pytest.raises(ValueError, match=f"{half}_config=None"):
        getattr(model, f"init_{half}_state")(1)
    flag = {"encode": {"use_streaming": True}, "decode": {"use_cache": True}}[method]
    with pytest.raises(ValueError, match=f"{half}_config=None"):
        getattr(model, method)({"encode": SOUND, "decode": CODES}[method], **flag)
