"""What the compiler made of it, counted: no weight is copied in the loop, and everything lowers for TPUs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import normalization

from tests.configs import tiny_moshi_config
from transformers_moshi_flax import FlaxMoshiForCausalLM, FlaxMoshiForConditionalGeneration
from transformers_moshi_flax.generation import decoding
from transformers_moshi_flax.models.moshi.layers_flax_moshi import FlaxMoshiDecoderLayer
from transformers_moshi_flax.nn.linear import Dense
from transformers_moshi_flax.ops.cpu import LARGE_CACHE, SLOTS_IN_USE


@pytest.fixture(scope="module")
def model() -> FlaxMoshiForConditionalGeneration:
    return FlaxMoshiForConditionalGeneration(tiny_moshi_config(hidden_size=128, ffn_dim=304))


MOVES = "copy|transpose|concatenate|slice|dynamic-slice|gather"


def example_inputs(frames: int = 3) -> dict[str, jax.Array]:
    ids, codes = jnp.zeros((1, frames), jnp.int32), jnp.zeros((1, 4, frames), jnp.int32)
    return {"input_ids": ids, "user_audio_codes": codes, "moshi_audio_codes": codes}


def loop_computations(text: str) -> dict[str, list[str]]:
    """The lines of every computation of an HLO module that a while loop runs, by name."""
    computations: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line.strip()):
            name = header.group(1)
            computations[name] = []
        elif name:
            computations[name].append(line)
    reached, waiting = set(), re.findall(r"body=%?([\w.\-]+)", text)
    while waiting:
        current = waiting.pop()
        if current in reached or current not in computations:
            continue
        reached.add(current)
        called = r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)"
        waiting += re.findall(called, "\n".join(computations[current]))
    return {name: computations[name] for name in reached}


def weight_sized_moves(text: str, sizes: set[int]) -> list[str]:
    """Copies, transposes and slices inside the loops whose result has as many elements as a weight."""
    found = []
    for lines in loop_computations(text).values():
        for line in lines:
            if move := re.search(rf"= \w+\[([\d,]*)\]\S* (?:{MOVES})\(", line):
                if math.prod(int(size) for size in move.group(1).split(",") if size) in sizes:
                    found.append(line.strip())
    return found


def large_weights(params: Any) -> set[int]:
    return {leaf.size for leaf in jax.tree.leaves(params) if leaf.size >= 4096}


# buckets, so that all of the cache is used; the second is large enough for attention to leave out unused slots
@pytest.mark.parametrize("cache_length", [80, 1024])
def test_loop_copies_neither_weights_nor_caches(
    model: FlaxMoshiForConditionalGeneration, monkeypatch: pytest.MonkeyPatch, cache_length: int
) -> None:
    programs = []
    compiled = type(model).compiled

    def spying(self: Any, function: Any, *donated: Any, **static: Any) -> Any:
        program = compiled(self, function, *donated, **static)

        def call(*args: Any) -> Any:
            if function is decoding.advance:
                programs.append(program.lower(*args).compile())
            return program(*args)

        return call

    monkeypatch.setattr(type(model), "compiled", spying)
    model.generate(max_new_tokens=cache_length - 1, stop_lengths=[2], do_sample=False, return_audio_waveforms=False)
    (program,) = programs
    text, sizes = program.as_text(), large_weights(model.params)
    cache = model.init_cache(1, cache_length)
    assert loop_computations(text), "the program has no loop"
    assert not sizes & {cache.keys[0].size}, "caches and weights cannot be told apart"
    assert weight_sized_moves(text, sizes | {cache.keys[0].size}) == []
    # the state, caches and all, is updated in place, and nothing large is hoisted out of the loop
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    # (but for the part of one layer's cache that is in use, where attention looks at no more)
    part = 0 if cache_length < LARGE_CACHE else 2 * cache.keys[0].nbytes * SLOTS_IN_USE // cache_length
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params["decoder"]))
    assert memory.temp_size_in_bytes <= part + 0.02 * weights


def test_the_count_can_count() -> None:
    """A loop that indexes stacked weights does copy them, and the search above sees it."""
    weights = jnp.ones((4, 64, 64))

    @jax.jit
    def loop(weights: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 4, lambda i, x: jnp.tanh(jnp.cumsum(weights[i].T, axis=0) @ x), x)

    text = loop.lower(weights, jnp.ones((64, 1))).compile().as_text()
    assert weight_sized_moves(text, {64 * 64})


def traced_layers(model: FlaxMoshiForConditionalGeneration, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the body of a decoder layer runs while generation of two frames is traced."""
    calls = []
    call = FlaxMoshiDecoderLayer.__call__

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0].path)
        return call(*args, **kwargs)

    monkeypatch.setattr(FlaxMoshiDecoderLayer, "__call__", counting)
    options = {"max_new_tokens": 2, "do_sample": False, "return_audio_waveforms": False}
    jax.eval_shape(lambda params: model.generate(params=params, **options).sequences, model.params_shape_tree)
    return len(calls)


def test_equal_layers_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One trace for all layers of the backbone, and one for all those of the depth decoder for each codebook."""
    config = tiny_moshi_config(num_hidden_layers=3)
    model = FlaxMoshiForConditionalGeneration(config, _do_init=False)
    assert traced_layers(model, monkeypatch) == 1 + config.num_codebooks


def test_interceptors_see_every_layer() -> None:
    """Tools may treat layers by their paths: then they are traced one by one."""
    model = FlaxMoshiForConditionalGeneration(tiny_moshi_config(), _do_init=False)
    paths = set()

    def note(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, Dense):
            paths.add("/".join(context.module.path))
        return call(*args, **kwargs)

    def generate(params: Any) -> jax.Array:
        return model.generate(params=params, max_new_tokens=2, return_audio_waveforms=False).sequences

    with nn.intercept_methods(note):
        jax.eval_shape(generate, model.params_shape_tree)
    kernels = {"/".join(path[:-1]) for path in model.required_params if path[-1] == "kernel"}
    assert {path for path in kernels if "layers" in path and "audio_encoder" not in path} <= paths


def test_dropout_is_the_same_with_a_cache() -> None:
    """Layers that draw numbers are traced one by one, with the same keys as anywhere else."""
    model = FlaxMoshiForCausalLM(tiny_moshi_config(attention_dropout=0.5))
    ids = jnp.arange(6, dtype=jnp.int32)[None]

    @jax.jit
    def logits(params: Any, cache: Any) -> jax.Array:
        rngs = {"dropout": jax.random.key(0)}
        return model.module.apply({"params": params}, ids, cache=cache, deterministic=False, rngs=rngs).logits

    np.testing.assert_allclose(
        logits(model.params, model.init_cache(1, 6)), logits(model.params, None), rtol=1e-5, atol=1e-6
    )


def tpu_module(function: Any, *args: Any) -> str:
    return jax.export.export(jax.jit(function), platforms=["tpu"])(*args).mlir_module()


def test_forward_lowers_for_tpu(model: FlaxMoshiForConditionalGeneration) -> None:
    def forward(params: Any, inputs: dict[str, jax.Array]) -> jax.Array:
        return model(**inputs, params=params).logits

    assert "stablehlo" in tpu_module(forward, model.params, example_inputs())


@pytest.mark.parametrize("do_sample", [False, True])
def test_generate_lowers_for_tpu(model: FlaxMoshiForConditionalGeneration, do_sample: bool) -> None:
    def generate(params: Any) -> tuple[jax.Array, jax.Array]:
        out = model.generate(max_new_tokens=4, do_sample=do_sample, params=params)
        return out.sequences, out.audio_sequences

    assert "stablehlo.while" in tpu_module(generate, model.params)


def with_promotion(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_implicit_promotion(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, gradient and generation mix no types, but inside of flax's own LayerNorm."""
    for name in ("_compute_stats", "_normalize"):
        monkeypatch.setattr(normalization, name, with_promotion(getattr(normalization, name)))
    model = FlaxMoshiForConditionalGeneration(tiny_moshi_config(), dtype=dtype, _do_init=False)
    inputs = example_inputs()
    labels = {"text_labels": inputs["input_ids"], "audio_labels": inputs["user_audio_codes"]}

    def loss(params: Any) -> jax.Array:
        return model(**inputs, **labels, params=params).loss

    def generate(params: Any) -> jax.Array:
        out = model.generate(**inputs, max_new_tokens=4, do_sample=True, top_p=0.9, params=params)
        return out.audio_sequences

    with jax.numpy_dtype_promotion("strict"):
        gradients = jax.eval_shape(jax.grad(loss), model.params_shape_tree)
        audio = jax.eval_shape(generate, model.params_shape_tree)
    assert audio.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}
