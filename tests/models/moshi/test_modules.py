"""Every block and every whole model against upstream's, in float32 and float64, over drawn configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import DynamicCache, MoshiForCausalLM, MoshiForConditionalGeneration, MoshiModel
from transformers.models.moshi import modeling_moshi
from transformers.models.moshi.modeling_moshi import MoshiDepthDecoder

from tests.configs import tiny_moshi_config
from tests.models.moshi.drawn import draw_config, draw_inputs
from tests.torch_oracle import (
    TOLERANCE,
    Pair,
    assert_close,
    block_params,
    load_ours,
    make_pair,
    numpy,
    oracle_precision,
    randomize,
    save_upstream,
    single_codebook_works,
    to_double,
    upstreams_name,
)
from transformers_moshi_flax import (
    FlaxMoshiDepthDecoder,
    FlaxMoshiForCausalLM,
    FlaxMoshiForConditionalGeneration,
    FlaxMoshiModel,
)
from transformers_moshi_flax.models.moshi import layers_flax_moshi
from transformers_moshi_flax.nn.norm import RMSNorm

DTYPES = ["float32", "float64"]


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> Iterator[str]:
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture(autouse=True, scope="module")
def one_codebook_oracle() -> Iterator[None]:
    with single_codebook_works():
        yield


def draw_block(block: torch.nn.Module, dtype: str, seed: int = 0) -> torch.nn.Module:
    """The block with drawn weights, in ``dtype``."""
    randomize(block, seed)
    return to_double(block) if dtype == "float64" else block


def draw_array(dtype: str, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def check_block(dtype: str, ours: Any, theirs: torch.nn.Module, x: np.ndarray, *args: Any) -> None:
    """Both blocks on ``x`` and the index arguments ``args``."""
    torch_args = [torch.from_numpy(arg) if isinstance(arg, np.ndarray) else arg for arg in args]
    with oracle_precision(dtype):
        expected = theirs(torch.from_numpy(x), *torch_args)
    params = {"params": block_params(theirs)}
    assert_close(ours.apply(params, jnp.asarray(x), *args), expected, TOLERANCE[dtype], type(theirs).__name__)


class TestBlocks:
    @pytest.mark.parametrize("eps", [1e-8, 1e-2])
    def test_rms_norm(self, dtype: str, eps: float) -> None:
        theirs = draw_block(modeling_moshi.MoshiRMSNorm(10, eps=eps), dtype)
        ours = RMSNorm(eps=eps, dtype=jnp.dtype(dtype))
        check_block(dtype, ours, theirs, 0.1 * draw_array(dtype, 2, 3, 10))

    def test_rms_norm_of_bfloat16_is_computed_in_float32(self) -> None:
        theirs = draw_block(modeling_moshi.MoshiRMSNorm(64, eps=1e-8), "float32").bfloat16()
        x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
        params = {"scale": jnp.asarray(numpy(theirs.weight.float()), jnp.bfloat16)}
        ours = RMSNorm(eps=1e-8, dtype=jnp.bfloat16)
        out = ours.apply({"params": params}, jnp.asarray(x.float().numpy(), jnp.bfloat16))
        assert out.dtype == jnp.bfloat16
        # One rounding to bfloat16 at the end, the same on both sides; two float32 sums may straddle it once.
        differing = np.asarray(out.astype(jnp.float32)) != numpy(theirs(x).float())
        assert differing.mean() < 0.01

    @pytest.mark.parametrize("index", [None, [2], [3, 0, 2], [1, 1]], ids=str)
    def test_flexible_linear(self, dtype: str, index: list[int] | None) -> None:
        theirs = draw_block(modeling_moshi.MoshiFlexibleLinear(6, 5, 4), dtype)
        ours = layers_flax_moshi.FlaxMoshiFlexibleLinear(6, 5, 4, dtype=jnp.dtype(dtype))
        x = draw_array(dtype, 2, 4 if index is None else len(index), 6)
        check_block(dtype, ours, theirs, x, None if index is None else np.array(index))

    def test_flexible_linear_with_one_index_for_all_positions(self, dtype: str) -> None:
        theirs = draw_block(modeling_moshi.MoshiFlexibleLinear(6, 5, 4), dtype)
        ours = layers_flax_moshi.FlaxMoshiFlexibleLinear(6, 5, 4, dtype=jnp.dtype(dtype))
        x = draw_array(dtype, 2, 3, 6)
        with oracle_precision(dtype):
            expected = theirs(torch.from_numpy(x), torch.tensor([2, 2, 2]))
        actual = ours.apply({"params": block_params(theirs)}, jnp.asarray(x), 2)
        assert_close(actual, expected, TOLERANCE[dtype])

    @pytest.mark.parametrize("flexible", [False, True])
    def test_linear(self, dtype: str, flexible: bool) -> None:
        theirs = draw_block(modeling_moshi.MoshiLinear(6, 5, 4, use_flexible_linear=flexible), dtype)
        ours = layers_flax_moshi.FlaxMoshiLinear(6, 5, 4, use_flexible_linear=flexible, dtype=jnp.dtype(dtype))
        check_block(dtype, ours, theirs, draw_array(dtype, 2, 3, 6), np.array([0, 3, 1]))

    @pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "gelu_pytorch_tanh"])
    @pytest.mark.parametrize("flexible", [False, True])
    def test_gating_mlp(self, dtype: str, flexible: bool, activation: str) -> None:
        config = tiny_moshi_config(hidden_act=activation)
        theirs = draw_block(modeling_moshi.MoshiGatingMLP(config, flexible), dtype)
        ours = layers_flax_moshi.FlaxMoshiGatingMLP(config, flexible, dtype=jnp.dtype(dtype))
        index = (np.array([2, 0, 3]),) if flexible else ()
        check_block(dtype, ours, theirs, draw_array(dtype, 2, 3, config.hidden_size), *index)

    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    @pytest.mark.parametrize("flexible", [False, True])
    def test_attention(self, dtype: str, flexible: bool, kv_heads: int) -> None:
        config = tiny_moshi_config(num_key_value_heads=kv_heads, head_dim=10)
        config._attn_implementation = "eager"
        theirs = draw_block(modeling_moshi.MoshiAttention(config, 0, flexible, use_rope=not flexible), dtype)
        ours = layers_flax_moshi.FlaxMoshiAttention(config, flexible, not flexible, dtype=jnp.dtype(dtype))
        self.check_attending(dtype, ours, theirs, config, flexible, lambda outputs: outputs[:2])

    @pytest.mark.parametrize("kv_heads", [1, 4])
    @pytest.mark.parametrize("flexible", [False, True])
    def test_decoder_layer(self, dtype: str, flexible: bool, kv_heads: int) -> None:
        config = tiny_moshi_config(num_key_value_heads=kv_heads)
        config._attn_implementation = "eager"
        theirs = draw_block(modeling_moshi.MoshiDecoderLayer(config, 0, flexible, use_rope=not flexible), dtype)
        ours = layers_flax_moshi.FlaxMoshiDecoderLayer(config, flexible, not flexible, dtype=jnp.dtype(dtype))
        self.check_attending(dtype, ours, theirs, config, flexible, lambda outputs: outputs[0])

    def check_attending(
        self,
        dtype: str,
        ours: Any,
        theirs: torch.nn.Module,
        config: Any,
        flexible: bool,
        compared: Callable[[Any], Any],
    ) -> None:
        """Attention or a layer under a mask that is neither causal nor the same for all rows."""
        x = draw_array(dtype, 2, 4, config.hidden_size)
        allowed = np.random.default_rng(2).random((2, 4, 4)) < 0.6
        allowed |= np.eye(4, dtype=bool)
        positions = np.array([[0, 1, 2, 3], [3, 5, 6, 9]], np.int32)
        index = np.array([2, 0, 3, 3]) if flexible else None
        bias = np.where(allowed, 0, np.finfo(dtype).min).astype(dtype)[:, None]
        with oracle_precision(dtype):
            expected = theirs(
                torch.from_numpy(x),
                attention_mask=torch.from_numpy(bias),
                position_ids=torch.from_numpy(positions).long(),
                codebook_idx=None if index is None else torch.from_numpy(index),
            )
        actual = ours.apply(
            {"params": block_params(theirs)},
            jnp.asarray(x),
            jnp.asarray(allowed),
            jnp.asarray(positions),
            codebook_idx=index,
        )
        assert_close(compared(actual), expected, TOLERANCE[dtype], type(theirs).__name__)


@pytest.fixture(scope="module", params=range(25))
def drawn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Any, Any, Any]:
    """(seed, configuration, upstream's model, directory with its files)."""
    config = draw_config(request.param)
    theirs = MoshiForConditionalGeneration._from_config(config, attn_implementation="eager")
    randomize(theirs, request.param)
    return request.param, config, theirs, save_upstream(theirs, tmp_path_factory.mktemp("drawn"))


def step_with_cache(model: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> Any:
    """Upstream one frame at a time, which is where it keeps to its sliding window; outputs joined over the frames."""
    cache, steps = {upstreams_name("cache"): DynamicCache(config=model.config)}, []
    for frame in range(inputs["input_ids"].shape[-1]):
        step = {name: value[..., frame : frame + 1] for name, value in inputs.items()}
        steps.append(model(**step, **cache, use_cache=True, output_hidden_states=True))
    logits = torch.cat([step.logits for step in steps], dim=1)
    hidden = [torch.cat(layers, dim=1) for layers in zip(*[step.hidden_states for step in steps])]
    last = torch.cat([step.last_hidden_state for step in steps], dim=1)
    return {"logits": logits, "hidden_states": hidden, "last_hidden_state": last}


def at_valid(values: Any, valid: np.ndarray) -> Any:
    """The entries at the frames that are not padding; ``(batch, heads, frames, keys)`` of attentions included."""
    if isinstance(values, tuple | list):
        return [at_valid(value, valid) for value in values]
    values = numpy(values)
    return (values.swapaxes(1, 2) if values.ndim == 4 else values)[valid]


def test_drawn_configuration(drawn: tuple[int, Any, Any, Any], dtype: str) -> None:
    seed, config, theirs, directory = drawn
    inputs = draw_inputs(config, seed)
    if dtype == "float64":
        theirs = to_double(theirs)
    torch_inputs = {name: torch.from_numpy(value).long() for name, value in inputs.as_dict().items()}
    windowed = config.sliding_window < inputs.input_ids.shape[1]
    with oracle_precision(dtype):
        if windowed:
            expected = step_with_cache(theirs, torch_inputs)
        else:
            outputs = theirs(**torch_inputs, output_hidden_states=True, output_attentions=True)
            names = ("logits", "hidden_states", "last_hidden_state", "attentions")
            expected = {name: getattr(outputs, name) for name in names}

    model = load_ours(FlaxMoshiForConditionalGeneration, directory, dtype)
    forward = jax.jit(
        lambda params, arrays: model(**arrays, params=params, output_hidden_states=True, output_attentions=True)
    )
    actual = forward(model.params, inputs.as_dict())
    for name, value in expected.items():
        assert_close(
            at_valid(actual[name], inputs.valid), at_valid(value, inputs.valid), TOLERANCE[dtype], f"{seed} {name}"
        )


def test_drawn_depth_decoder(drawn: tuple[int, Any, Any, Any], dtype: str) -> None:
    seed, config, theirs, directory = drawn
    theirs = theirs.depth_decoder
    if dtype == "float64":
        theirs = to_double(theirs)
    rng = np.random.default_rng(seed)
    batch, codebooks = 3, config.num_codebooks
    length = int(rng.integers(1, codebooks + 1))
    ids = rng.integers(0, config.audio_vocab_size + 1, (batch, length)).astype(np.int32)
    ids[:, 0] = rng.integers(0, config.vocab_size + 1, batch)
    context = draw_array(dtype, batch, 1, config.hidden_size, seed=seed)
    labels = rng.integers(0, config.audio_vocab_size + 1, (batch, length)).astype(np.int32)
    labels[0, 0] = 0  # at least one label that counts
    with oracle_precision(dtype):
        expected = theirs(
            input_ids=torch.from_numpy(ids).long(),
            last_hidden_state=torch.from_numpy(context),
            attention_mask=torch.ones(batch, length, dtype=torch.long),
            labels=torch.from_numpy(labels).long(),
            output_hidden_states=True,
            output_attentions=True,
        )
    model = load_ours(FlaxMoshiDepthDecoder, directory, dtype)
    forward = jax.jit(
        lambda params, ids, context, labels: model(
            input_ids=ids,
            last_hidden_state=context,
            labels=labels,
            params=params,
            output_hidden_states=True,
            output_attentions=True,
        )
    )
    actual = forward(model.params, ids, context, labels)
    for name in ("loss", "logits", "hidden_states", "attentions"):
        assert_close(actual[name], getattr(expected, name), TOLERANCE[dtype], f"{seed} {name}")


@pytest.fixture(scope="module", params=DTYPES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """The conditional-generation model of the tiny configuration."""
    with jax.enable_x64(request.param == "float64"):
        yield make_pair(
            MoshiForConditionalGeneration,
            FlaxMoshiForConditionalGeneration,
            tiny_moshi_config(),
            tmp_path_factory.mktemp("tiny"),
            request.param,
        )


def test_waveforms(pair: Pair) -> None:
    frame = pair.theirs.config.audio_encoder_config.frame_size
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 60, (2, 6)).astype(np.int32)
    user, moshi = (rng.standard_normal((2, 1, 6 * frame)).astype(pair.dtype) for _ in range(2))
    expected = pair.upstream(
        input_ids=torch.from_numpy(ids).long(),
        user_input_values=torch.from_numpy(user),
        moshi_input_values=torch.from_numpy(moshi),
    )
    actual = pair.ours(input_ids=ids, user_input_values=user, moshi_input_values=moshi)
    assert_close(actual.logits, expected.logits, pair.tol, "logits")
    assert_close(actual.last_hidden_state, expected.last_hidden_state, pair.tol, "last_hidden_state")


def test_inputs_embeds(pair: Pair) -> None:
    embeds = draw_array(pair.dtype, 2, 5, pair.theirs.config.hidden_size)
    expected = pair.upstream(inputs_embeds=torch.from_numpy(embeds))
    assert_close(pair.ours(inputs_embeds=embeds).logits, expected.logits, pair.tol)


def test_codes_have_priority_over_waveforms(pair: Pair) -> None:
    inputs = draw_inputs(pair.theirs.config, 3, masked=False).as_dict()
    noise = np.ones((inputs["input_ids"].shape[0], 1, 16 * inputs["input_ids"].shape[1]), pair.dtype)
    with_both = pair.ours(**inputs, user_input_values=noise, moshi_input_values=noise)
    np.testing.assert_array_equal(numpy(with_both.logits), numpy(pair.ours(**inputs).logits))


def test_tuple_equals_output_object(pair: Pair) -> None:
    inputs = draw_inputs(pair.theirs.config, 2, masked=False).as_dict()
    output = pair.ours(**inputs, output_hidden_states=True)
    as_tuple = pair.ours(**inputs, output_hidden_states=True, return_dict=False)
    assert isinstance(as_tuple, tuple)
    jax.tree.map(np.testing.assert_array_equal, as_tuple, output.to_tuple())


def backbone_inputs(dtype: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    mask = np.ones((3, 7), np.int32)
    mask[0, :3] = 0
    mask[1, -2:] = 0
    return {"input_ids": rng.integers(0, 61, (3, 7)).astype(np.int32), "attention_mask": mask}


@pytest.mark.parametrize("masked", [False, True])
def test_backbone(pair: Pair, masked: bool) -> None:
    inputs = backbone_inputs(pair.dtype)
    valid = inputs["attention_mask"] == 1 if masked else np.ones((3, 7), bool)
    if not masked:
        del inputs["attention_mask"]
    with oracle_precision(pair.dtype):
        expected = pair.theirs.decoder.model(
            **{name: torch.from_numpy(value).long() for name, value in inputs.items()},
            output_hidden_states=True,
            output_attentions=True,
        )
    model = load_ours(FlaxMoshiModel, pair.directory, pair.dtype)
    actual = model(**inputs, output_hidden_states=True, output_attentions=True)
    for name in ("last_hidden_state", "hidden_states", "attentions"):
        assert_close(at_valid(actual[name], valid), at_valid(getattr(expected, name), valid), pair.tol, name)


def test_backbone_position_ids(pair: Pair) -> None:
    ids = backbone_inputs(pair.dtype)["input_ids"]
    positions = np.array([[0, 0, 0, 0, 1, 2, 3], [2, 3, 5, 7, 11, 13, 17], [0, 1, 2, 3, 4, 5, 6]], np.int32)
    # An explicit mask: without one, upstream takes jumps in the positions for packed sequences.
    with oracle_precision(pair.dtype):
        expected = pair.theirs.decoder.model(
            input_ids=torch.from_numpy(ids).long(),
            position_ids=torch.from_numpy(positions).long(),
            attention_mask=torch.ones(3, 7, dtype=torch.long),
        )
    model = load_ours(FlaxMoshiModel, pair.directory, pair.dtype)
    actual = model(input_ids=ids, position_ids=positions)
    assert_close(actual.last_hidden_state, expected.last_hidden_state, pair.tol)


@pytest.mark.parametrize("ignored", [False, True])
def test_causal_lm_with_labels(pair: Pair, ignored: bool) -> None:
    ids = backbone_inputs(pair.dtype)["input_ids"]
    labels = np.where(ids == 60, -100, ids)
    if ignored:
        labels[:, 2:4] = -100
    with oracle_precision(pair.dtype):
        expected = pair.theirs.decoder(
            input_ids=torch.from_numpy(ids).long(),
            labels=torch.from_numpy(labels).long(),
            output_hidden_states=True,
            output_attentions=True,
        )
    model = load_ours(FlaxMoshiForCausalLM, pair.directory, pair.dtype)
    actual = model(input_ids=ids, labels=labels, output_hidden_states=True, output_attentions=True)
    for name in ("loss", "logits", "last_hidden_state", "hidden_states", "attentions"):
        assert_close(actual[name], getattr(expected, name), pair.tol, name)


@pytest.mark.parametrize("keep", [1, 3])
def test_causal_lm_logits_to_keep(pair: Pair, keep: int) -> None:
    ids = backbone_inputs(pair.dtype)["input_ids"]
    with oracle_precision(pair.dtype):
        expected = pair.theirs.decoder(input_ids=torch.from_numpy(ids).long(), logits_to_keep=keep)
    model = load_ours(FlaxMoshiForCausalLM, pair.directory, pair.dtype)
    assert_close(model(input_ids=ids, logits_to_keep=keep).logits, expected.logits, pair.tol)


@pytest.mark.parametrize(
    "upstream_class, our_class", [(MoshiModel, FlaxMoshiModel), (MoshiForCausalLM, FlaxMoshiForCausalLM)]
)
def test_part_saved_by_itself(tmp_path: Any, upstream_class: type, our_class: type) -> None:
    single = make_pair(upstream_class, our_class, tiny_moshi_config(), tmp_path)
    ids = backbone_inputs("float32")["input_ids"]
    expected = single.upstream(input_ids=torch.from_numpy(ids).long())
    assert_close(single.ours(input_ids=ids)[0], expected[0], single.tol)


def test_depth_decoder_saved_by_itself(tmp_path: Any) -> None:
    config = tiny_moshi_config().depth_decoder_config
    single = make_pair(MoshiDepthDecoder, FlaxMoshiDepthDecoder, config, tmp_path)
    ids = np.array([[59, 3, 31, 32], [60, 0, 1, 2]], np.int32)
    context = draw_array("float32", 2, 4, 64)
    expected = single.upstream(
        input_ids=torch.from_numpy(ids).long(),
        last_hidden_state=torch.from_numpy(context),
        attention_mask=torch.ones(2, 4, dtype=torch.long),
    )
    actual = single.ours(input_ids=ids, last_hidden_state=context)
    assert_close(actual.logits, expected.logits, single.tol)


@pytest.mark.parametrize("chunks", [[7], [1] * 7, [3, 1, 3]], ids=str)
def test_cached_backbone_equals_uncached(pair: Pair, chunks: list[int]) -> None:
    model = load_ours(FlaxMoshiForCausalLM, pair.directory, pair.dtype)
    ids = backbone_inputs(pair.dtype)["input_ids"]
    whole = model(input_ids=ids, output_hidden_states=True)
    cache, parts, start = model.init_cache(3, 9), [], 0
    for length in chunks:
        part = model(input_ids=ids[:, start : start + length], cache=cache)
        cache, start = part.cache, start + length
        parts.append(numpy(part.logits))
    assert_close(np.concatenate(parts, axis=1), numpy(whole.logits), pair.tol)
