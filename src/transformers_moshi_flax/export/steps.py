"""The steps of a dialogue as graphs: Mimi's encoder, a frame of Moshi, Mimi's decoder, their state in and out.

They are the functions that a ``FlaxMoshiStream`` calls, with all slots active.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..generation.sampling import row_keys
from ..models.mimi.streaming_flax_mimi import seanet_histories
from ..models.moshi.generation_flax_moshi import FrameDecoder
from ..models.moshi.stream_files import named_leaves
from ..models.moshi.stream_state import StreamState, empty_state
from ..models.moshi.streaming_flax_moshi import FlaxMoshiStream, convolve_frame, decode_frame, encode_frame, next_frame
from ..runtime.manifest import NEXT
from .graph import Graph, Value, constant
from .walking import STEP, Draw, Key, Walk, objects

KEYS, STEPS = "dialogue.keys", "dialogue.columns"
"""Leaves of the state that a runtime keeps by itself: what it draws with."""
NUMBERS = "dialogue.numbers."


@dataclasses.dataclass(frozen=True)
class StateInput:
    """An array of the state.

    Attributes:
        name: of the input; the output is called ``next.<name>``.
        shape, dtype: as the graph has them.
        initial: what it is filled with in the beginning.
        in_place: whether the output may have the memory of the input.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    initial: int | float
    in_place: bool


@dataclasses.dataclass(frozen=True)
class Step:
    """A step as a graph.

    Attributes:
        graph: inputs are state and what is heard or chosen; outputs are the next state and what is made.
        state: the arrays of the state.
        draws: the random numbers that it wants.
    """

    graph: Graph
    state: tuple[StateInput, ...]
    draws: tuple[Draw, ...]


def dialogue_steps(model: Any, stream: FlaxMoshiStream, quantization: str = "none") -> dict[str, Step]:
    """The steps of a stream by name: ``mimi_encode_step`` and ``mimi_decode_step`` (each where the model has that
    half), ``moshi_step``.

    Args:
        model: a ``FlaxMoshiForConditionalGeneration``.
        stream: of it, which says how many slots there are and how tokens are chosen.
        quantization: of the linear layers of Moshi, not of Mimi: ``"none"`` or ``"int8"``.

    Raises:
        NotExportable: something of the model or of the options has no counterpart in ONNX.
    """
    decoder = model.make_decoder()
    batch, codebooks = stream.batch_size, stream.num_codebooks
    initial = initial_state(decoder, stream)
    active = np.ones(batch, bool)
    ids = jax.ShapeDtypeStruct((batch,), jnp.int32)
    codes = jax.ShapeDtypeStruct((batch, codebooks), jnp.int32)
    sound = jax.ShapeDtypeStruct((batch, stream.channels, stream.frame_size), jnp.float32)

    def encode(params: Any, state: Any, audio: Array) -> tuple[Any, dict[str, Array]]:
        count = seanet_histories(decoder.module.config.audio_encoder_config)
        before, rest = state.histories[:count], state.histories[count:]
        convolved, features = convolve_frame(
            decoder, params["convolve"], before, state.cache.length, audio, jnp.asarray(active)
        )
        state, found = encode_frame(
            decoder, params["encode"], state.replace(histories=rest), features, jnp.asarray(active)
        )
        return state.replace(histories=(*convolved, *state.histories)), {"user_codes": found}

    def converse(params: Any, state: Any, **heard: Array) -> tuple[Any, dict[str, Array]]:
        after, frame = next_frame(
            decoder,
            params["frame"],
            (stream.samplings[0], stream.samplings[1]),
            state,
            active=jnp.asarray(active),
            **heard,
        )
        made = {"text_ids": frame.text_ids, "audio_codes": frame.audio_codes, "text_logits": frame.text_logits}
        return after.replace(steps=state.steps), made  # which are counted where numbers are drawn

    def decode(params: Any, state: Any, audio_codes: Array) -> tuple[Any, dict[str, Array]]:
        state, audio = decode_frame(decoder, params["decode"], state, audio_codes, jnp.asarray(active))
        return state, {"audio": audio}

    heard = {"user_codes": codes, "forced_ids": ids, "forced_codes": codes}
    steps = {"moshi_step": _step("moshi_step", converse, stream, initial, "dialogue", heard, quantization)}
    if initial.encoder is not None:
        steps["mimi_encode_step"] = _step("mimi_encode_step", encode, stream, initial, "encoder", {"audio": sound})
    if initial.decoder is not None:
        codes_in = {"audio_codes": codes}
        steps["mimi_decode_step"] = _step("mimi_decode_step", decode, stream, initial, "decoder", codes_in)
    return steps


def initial_state(decoder: FrameDecoder, stream: FlaxMoshiStream) -> StreamState:
    """The state before the start frame."""
    config = decoder.module.config
    return empty_state(
        decoder,
        row_keys(jax.random.key(0), stream.batch_size),
        stream.numbers,
        with_encoder=config.audio_encoder_config.encoder_config is not None,
        with_decoder=stream.return_audio_waveforms,
        dtype=jnp.float32,
        pinned=stream.pin_prompt,
        origin="",
        mesh=None,
    )


def _step(
    name: str,
    function: Callable[..., Any],
    stream: FlaxMoshiStream,
    initial: StreamState,
    part: str,
    inputs: dict[str, jax.ShapeDtypeStruct],
    quantization: str = "none",
) -> Step:
    """The graph of ``function(params, state, **inputs)``, which returns the next state and a dictionary of outputs."""
    graph = Graph(name, quantization)
    walk = Walk(graph, stream.batch_size)
    state = getattr(initial, part)
    parameters, _ = jax.tree_util.tree_flatten_with_path(stream.parts)
    leaves = {key: leaf for key, leaf in named_leaves(initial).items() if key.startswith(f"{part}.")}
    # keys are typed, so that what is drawn from them can be told from numbers
    program, (_, made) = jax.make_jaxpr(
        lambda params, state, given: function(params, state, **given), return_shape=True
    )(stream.parts, state, inputs)
    values = [constant(np.asarray(leaf), _label(path)) for path, leaf in parameters]
    values += [_state_value(graph, key, leaf, stream.batch_size) for key, leaf in leaves.items()]
    values += [graph.input(key, inputs[key].shape, inputs[key].dtype) for key in sorted(inputs)]
    # the order of the leaves
    results = walk.program(program, values)
    kept = [key for key in leaves if key not in (KEYS, STEPS) and not key.startswith(NUMBERS)]
    for key, value in zip(leaves, results):
        if key in kept:
            graph.output(NEXT + key, value)
    for key, value in zip(sorted(made), results[len(leaves) :], strict=True):
        graph.output(key, value)
    graph.finish()
    in_place = set(graph.written_in_place())
    described = [
        StateInput(key, *_shape_and_dtype(graph, key), _fill(key, leaves[key]), key in in_place) for key in kept
    ]
    return Step(graph, tuple(described), tuple(walk.draws))


def _state_value(graph: Graph, key: str, leaf: Array, rows: int) -> Value:
    if key == KEYS:
        return constant(objects([Key(row) for row in range(rows)], (rows,)))
    if key == STEPS:
        return constant(objects([STEP] * rows, (rows,)))
    name = key.removeprefix(NUMBERS)
    return graph.input(name, leaf.shape, leaf.dtype)


def _shape_and_dtype(graph: Graph, key: str) -> tuple[tuple[int, ...], str]:
    shape, dtype = graph.inputs[key]
    return shape, dtype.name


def _fill(key: str, leaf: Array) -> int | float:
    values = np.unique(np.asarray(leaf))
    if len(values) != 1:
        raise ValueError(f"the state {key!r} does not begin with the same number everywhere")
    return values[0].item()


def _label(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
