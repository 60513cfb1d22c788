"""Moshi's decoders for the loop of generation: text alone, and text and audio frame by frame.

``generation/decoding.py`` has the loop, ``frame_flax_moshi.py`` what one frame does; here is how prompts are laid out
for them and audio is taken out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Shaped
from transformers import GenerationConfig

from ...generation.arrays import on_device, padded
from ...generation.buckets import SMALLEST
from ...generation.configuration import resolve_nested_sampling, warn_without_effect
from ...generation.decoding import FREE, Request, State, columns, take_rows, write_column
from ...generation.sampling import Sampling
from ...input_checks import is_traced, is_tracing
from ...modeling_flax_outputs import FlaxModelOutput
from ...nn.cache import LinearCache
from .delay_pattern import delay, undelay
from .frame_flax_moshi import frame_step


@dataclasses.dataclass
class FlaxMoshiGenerateOutput(FlaxModelOutput):
    """Output of nested ``generate``; upstream ``MoshiConditionalGenerationGenerateOutput``.

    Attributes:
        audio_sequences: waveform, ``(batch, 1, samples)`` float32 at 24 kHz, silent after a row's end.
        sequences: text ids of prompt and generated frames, ``(batch, length)`` int32.
        sequences_scores: of the beams, ``(batch,)``: sums of the text's log-probabilities over a power of the length.
        scores, logits: processed and raw text logits of every new frame, each ``(batch, vocab_size)``.
        beam_indices: which beam every new text id came from, ``(batch, new frames)``, -1 after a row's end.
        attentions, hidden_states: of the backbone for every new frame, tuples over the layers; the first those of the
            whole prompt.
        audio_codes: undelayed codes, ``(batch, num_codebooks, frames)`` int32, ``audio_vocab_size`` after a row's end.
        sequence_lengths: text ids of each row up to and with its end, ``(batch,)``.
        audio_lengths: audio frames of each row, ``(batch,)``.

    "batch" is that of the prompt times ``num_return_sequences``.
    """

    audio_sequences: jax.Array | None = None
    sequences: jax.Array | None = None
    sequences_scores: jax.Array | None = None
    scores: tuple[jax.Array, ...] | None = None
    logits: tuple[jax.Array, ...] | None = None
    beam_indices: jax.Array | None = None
    attentions: tuple[tuple[jax.Array, ...], ...] | None = None
    hidden_states: tuple[tuple[jax.Array, ...], ...] | None = None
    audio_codes: jax.Array | None = None
    sequence_lengths: jax.Array | None = None
    audio_lengths: jax.Array | None = None


@flax.struct.dataclass
class FrameInputs:
    """``Request.streams`` of nested generation.

    Attributes:
        user_codes: what is heard, delayed, ``(batch, codebooks, capacity)``.
        fixed_codes: Moshi's codes that are not chosen (prompt, start, forced ones), delayed, ``FREE`` elsewhere,
            ``(batch, codebooks, capacity)``.
        inputs_embeds: instead of the embeddings of the prompt, ``(batch, capacity, hidden_size)``, or None.
    """

    user_codes: Any
    fixed_codes: Any
    inputs_embeds: Any = None


def lay_out_prompt(
    input_ids: Int[ArrayLike, "batch frames"],
    user_codes: Int[ArrayLike, "batch codebooks heard"],
    moshi_codes: Int[ArrayLike, "batch codebooks frames"],
    attention_mask: Shaped[ArrayLike, "batch frames"],
    *,
    start_token: int | None,
    start_code: int,
) -> tuple[
    Int[ArrayLike, "batch laid_out"],
    Int[ArrayLike, "batch codebooks laid_out_heard"],
    Int[ArrayLike, "batch codebooks laid_out"],
    Int[ArrayLike, "batch laid_out"],
]:
    """The streams of a prompt so that the padding before a row makes no difference to it.

    Every row begins with its start frame, directly before the first frame that counts. Before that stands the start
    code, since the delay takes codes of the last frame of the padding into the first one that counts. On the host
    unless something is traced.

    Args:
        input_ids, moshi_codes: the prompt's, codes undelayed.
        user_codes: the user's, which may go on after the prompt.
        attention_mask: 0 for the padding.
        start_token: the text id of the start frame, or None without one.
        start_code: its codes.

    Returns:
        The four streams, with one frame more if there is a start frame.
    """
    xp = jnp if is_tracing(input_ids, user_codes, moshi_codes, attention_mask) else np
    input_ids, user_codes, moshi_codes, attention_mask = (
        xp.asarray(stream).astype(np.int32) for stream in (input_ids, user_codes, moshi_codes, attention_mask)
    )
    padding = xp.argmax(attention_mask, axis=1)[:, None]
    more = int(start_token is not None)

    def columns_of(stream: ArrayLike) -> ArrayLike:
        return xp.arange(stream.shape[-1] + more, dtype=np.int32)[None]

    def codes(stream: ArrayLike) -> ArrayLike:
        widths = ((0, 0), (0, 0), (more, 0))
        before = columns_of(stream) < padding + more
        return xp.where(before[:, None], start_code, xp.pad(stream, widths)).astype(np.int32)

    if start_token is not None:
        column = columns_of(input_ids)
        moved = xp.where(column < padding, xp.pad(input_ids, ((0, 0), (0, 1))), xp.pad(input_ids, ((0, 0), (1, 0))))
        input_ids = xp.where(column == padding, start_token, moved).astype(np.int32)
        attention_mask = xp.where(column == padding, 1, xp.pad(attention_mask, ((0, 0), (1, 0)))).astype(np.int32)
    return input_ids, codes(user_codes), codes(moshi_codes), attention_mask


def with_start_first(sequences: Int[ArrayLike, "rows length"], attention_mask, start_token: int) -> ArrayLike:
    """Sequences that :func:`lay_out_prompt` laid out as upstream returns them: start frame, prompt, new tokens.

    Args:
        sequences: with the start frame of each row behind its padding.
        attention_mask: of the prompt without the start frame, ``(batch, frames)``; ``rows`` are a multiple of it.
        start_token: the text id of the start frame.
    """
    xp = jnp if is_tracing(sequences, attention_mask) else np
    sequences = xp.asarray(sequences)
    padding = xp.argmax(xp.asarray(attention_mask) != 0, axis=1)
    padding = xp.repeat(padding, sequences.shape[0] // padding.shape[0])[:, None]
    column = xp.arange(sequences.shape[1], dtype=np.int32)[None]
    prompt = xp.where(column <= padding, xp.roll(sequences, 1, axis=1), sequences)
    return on_device(xp.where(column == 0, start_token, prompt), np.int32)


def frame_inputs(
    user_codes: Int[ArrayLike, "batch codebooks heard"],
    moshi_codes: Int[ArrayLike, "batch codebooks prompt"],
    blank_codes: Int[ArrayLike, "1 codebooks 1"],
    inputs_embeds: Float[ArrayLike, "batch prompt hidden"] | None,
    forced_codes: Int[ArrayLike, "batch codebooks forced"] | None,
    *,
    capacity: int,
    start_code: int,
) -> FrameInputs:
    """Lays out the streams over ``capacity`` columns, on the host unless they are traced.

    Args:
        user_codes: the user's undelayed codes; after them there is silence.
        moshi_codes: Moshi's undelayed codes of the prompt.
        blank_codes: the codes of one frame of silence.
        inputs_embeds: instead of the embeddings of the prompt.
        forced_codes: Moshi's undelayed codes after the prompt as far as they are not to be chosen, else ``FREE``.
        capacity: columns.
        start_code: stands where the delay leaves nothing.
    """
    xp = jnp if is_traced(user_codes, moshi_codes, blank_codes, forced_codes) else np
    heard = xp.asarray(user_codes)[:, :, :capacity]
    silent = (*heard.shape[:2], capacity - heard.shape[2])
    user = xp.concatenate([heard, xp.broadcast_to(xp.asarray(blank_codes), silent)], axis=2)
    fixed = [xp.asarray(codes) for codes in (moshi_codes, forced_codes) if codes is not None]
    fixed = padded(xp.concatenate(fixed, axis=2)[:, :, :capacity], capacity, FREE)
    return FrameInputs(
        user_codes=on_device(delay(user, start_code), np.int32),
        fixed_codes=on_device(delay(fixed, start_code), np.int32),
        inputs_embeds=None if inputs_embeds is None else on_device(padded(inputs_embeds, capacity, 0, axis=1)),
    )


def prompt_embeds(
    given: Float[Array, "batch capacity hidden"], request: Request, start: Int[Array, ""], length: int
) -> tuple[Float[Array, "batch length hidden"], Bool[Array, "1 length 1"]]:
    """The given embeddings of the columns from ``start`` on, and which of these are in the prompt."""
    in_prompt = start + jnp.arange(length, dtype=jnp.int32) < request.prompt_length
    return lax.dynamic_slice_in_dim(given, start, length, axis=1), in_prompt[None, :, None]


@dataclasses.dataclass(frozen=True)
class TextDecoder:
    """Text alone: a ``FlaxMoshiForCausalLMModule`` as a :class:`~transformers_moshi_flax.generation.decoding.Decoder`.

    The request's ``streams`` are the prompt's embeddings, ``(batch, capacity, hidden_size)``, or None.

    Attributes:
        module: the module.
    """

    module: Any

    def init_cache(self, batch_size: int, max_length: int) -> LinearCache:
        return LinearCache.create(self.module.config, batch_size, max_length, self.module.dtype)

    def init_streams(self, request: Request) -> None:
        return None

    def prefill(self, params, request: Request, state: State, start, length: int, output_attentions: bool = False):
        input_ids, inputs = columns(state.sequences, start, length), {}
        if request.streams is None:
            inputs["input_ids"] = input_ids
        else:
            embedded = self.module.apply({"params": params}, input_ids, method=self.module.embed)
            given, where = prompt_embeds(request.streams, request, start, length)
            inputs["inputs_embeds"] = jnp.where(where, given.astype(embedded.dtype), embedded)
        return self.module.apply(
            {"params": params},
            **inputs,
            attention_mask=columns(request.attention_mask, start, length),
            cache=state.cache,
            logits_to_keep=1,
            output_attentions=output_attentions,
        )

    def step(self, params, request: Request, state: State, choose, output_attentions: bool = False):
        outputs = self.prefill(params, request, state, state.position - 1, 1, output_attentions)
        return outputs, choose(outputs), None


@dataclasses.dataclass(frozen=True)
class FrameDecoder:
    """Text and audio: a ``FlaxMoshiForConditionalGenerationModule`` as a
    :class:`~transformers_moshi_flax.generation.decoding.Decoder`.

    The request's ``streams`` are :class:`FrameInputs`, the state's Moshi's delayed codes, ``(batch, codebooks,
    capacity)``.

    Attributes:
        module: the module.
    """

    module: Any

    def init_cache(self, batch_size: int, max_length: int) -> LinearCache:
        return LinearCache.create(self.module.config, batch_size, max_length, self.module.dtype)

    def init_streams(self, request: Request) -> Int[Array, "batch codebooks capacity"]:
        fixed = request.streams.fixed_codes
        return jnp.where(fixed == FREE, self.module.config.audio_vocab_size, fixed)

    def prefill(self, params, request: Request, state: State, start, length: int, output_attentions: bool = False):
        inputs = self._inputs(request, state, start, length)
        return self.module.apply(
            {"params": params}, **inputs, output_attentions=output_attentions, method=self.module.listen
        )

    def step(self, params, request: Request, state: State, choose, output_attentions: bool = False):
        outputs, chosen, codes = frame_step(
            self.module,
            params,
            **self._inputs(request, state, state.position - 1, 1),
            choose=choose,
            depth_sampling=request.depth_sampling,
            fixed_codes=columns(request.streams.fixed_codes, state.position, 1)[..., 0],
            output_attentions=output_attentions,
        )
        streams = state.streams if chosen.parents is None else take_rows(state.streams, chosen.parents)
        return outputs, chosen, write_column(streams, codes, state.position)

    def _inputs(self, request: Request, state: State, start: Int[Array, ""], length: int) -> dict[str, Any]:
        """What the module's ``listen`` needs to run these columns."""
        given = request.streams.inputs_embeds
        return {
            "text_ids": columns(state.sequences, start, length),
            "user_codes": columns(request.streams.user_codes, start, length),
            "moshi_codes": columns(state.streams, start, length),
            "cache": state.cache,
            "attention_mask": columns(request.attention_mask, start, length),
            "inputs_embeds": None if given is None else prompt_embeds(given, request, start, length),
        }


def leading_starts(moshi_codes: Int[ArrayLike, "batch codebooks frames"], start_code: int) -> Int[ArrayLike, "batch"]:
    """How many frames each row begins with that have the start code, those of its padding included."""
    xp = jnp if is_traced(moshi_codes) else np
    leading = xp.cumprod(moshi_codes[:, 0] == start_code, axis=-1, dtype=np.int32)
    return xp.sum(leading, axis=-1, dtype=np.int32)


def finish_audio(
    decoder: FrameDecoder,
    codes: Int[Array, "batch codebooks capacity"],
    lengths: Int[Array, "batch"],
    starts: Int[Array, "batch"],
) -> tuple[Int[Array, "batch codebooks frames"], Int[Array, "batch"]]:
    """Undelayed codes from the first frame that is no start frame on, and how many frames each row has.

    Args:
        decoder: the model.
        codes: delayed.
        lengths: text ids of each row.
        starts: :func:`leading_starts`. The audio of a row ends one frame before its text.
    """
    lengths = jnp.maximum(lengths - 1 - starts, 0)
    frames = jnp.arange(codes.shape[-1] - 1, dtype=jnp.int32)
    indices = jnp.minimum(frames[None] + starts[:, None], codes.shape[-1] - 2)
    audio = jnp.take_along_axis(undelay(codes), indices[:, None], axis=-1)
    inside = (frames[None] < lengths[:, None])[:, None]
    return jnp.where(inside, audio, decoder.module.config.audio_vocab_size), lengths


def after_padding(
    codes: Int[ArrayLike, "rows codebooks frames"],
    audio: Float[ArrayLike, "rows channels samples"] | None,
    padding: Int[ArrayLike, "rows"],
    given_codes: Int[ArrayLike, "batch codebooks prompt"],
) -> tuple[Int[Array, "rows codebooks frames"], Float[Array, "rows channels samples"] | None]:
    """What :func:`finish_audio` and :func:`decode_audio` made, with the padding of each row in front of it again.

    Args:
        codes, audio: with as many frames behind each row as it has padding, at least.
        padding: frames.
        given_codes: of the prompt; they stand in the padding, and silence in that of the audio.
    """
    xp = jnp if is_traced(codes, padding, given_codes) else np
    frames = codes.shape[-1]
    given = xp.repeat(xp.asarray(given_codes), codes.shape[0] // np.shape(given_codes)[0], axis=0)
    given = padded(given, max(frames, given.shape[-1]), 0)[..., :frames]

    def moved(array: ArrayLike, shift: Int[ArrayLike, "rows"], front: ArrayLike) -> Array:
        column = xp.arange(array.shape[-1], dtype=np.int32)[None] - shift[:, None]
        behind = xp.take_along_axis(xp.asarray(array), xp.maximum(column, 0)[:, None], axis=-1)
        return on_device(xp.where((column < 0)[:, None], front, behind), array.dtype)

    if audio is not None:
        audio = moved(audio, padding * np.int32(audio.shape[-1] // frames), np.zeros((), audio.dtype))
    return moved(codes, padding, given), audio


def new_audio_codes(state: State, begin: int, end: int, filler: int) -> np.ndarray:
    """The undelayed codes ``(batch, codebooks, end - begin)`` of a range of columns, copied to the host.

    ``filler`` stands after a row's end; the column ``end`` must be there, as it has the delayed ones.
    """
    # all columns: XLA would compile a program for every range
    codes, lengths = np.array(state.streams), np.array(state.lengths)
    audio = np.concatenate([codes[:, :1, begin:end], codes[:, 1:, begin + 1 : end + 1]], axis=1)
    inside = np.arange(begin, end)[None] < lengths[:, None] - 1
    return np.where(inside[:, None], audio, filler)


def decoded_frames(capacity: int) -> list[int]:
    """The lengths that waveforms of at most ``capacity`` frames are decoded in: few, so that they share programs, and
    the longest one without a frame too many."""
    lengths = [min(SMALLEST, capacity)]
    while lengths[-1] < capacity:
        lengths.append(min(2 * lengths[-1], capacity))
    return lengths


def decode_audio(decoder: FrameDecoder, params, audio_codes, audio_lengths) -> Float[Array, "batch 1 samples"]:
    """The waveform of undelayed codes, silent after each row's end (Mimi is causal: what follows changes nothing)."""
    frames = jnp.arange(audio_codes.shape[-1], dtype=jnp.int32)
    inside = frames[None] < audio_lengths[:, None]
    audio_codes = jnp.where(inside[:, None], audio_codes, 0)
    module = decoder.module
    audio = module.apply({"params": params}, audio_codes, method=module.decode_audio)
    samples_per_frame = audio.shape[-1] // audio_codes.shape[-1]
    inside = jnp.repeat(inside, samples_per_frame, axis=-1)[:, None]
    return jnp.where(inside, audio, jnp.zeros((), audio.dtype)).astype(jnp.float32)


def encode_audio(
    decoder: FrameDecoder, params, input_values, samples: Int[Array, "batch"] | None = None
) -> Int[Array, "batch codebooks frames"]:
    """The codes of waveforms, or of each row's first ``samples``: what follows makes no difference."""
    mask = None
    if samples is not None:
        mask = jnp.arange(input_values.shape[-1], dtype=jnp.int32) < samples[:, None]
    return decoder.module.apply({"params": params}, input_values, mask, method=decoder.module.encode_audio)


DEPTH_PREFIX = "depth_decoder_"
"""Of arguments for the depth decoder."""


def resolve_depth_sampling(
    depth_config: Any, kwargs: dict[str, Any], num_codebooks: int, audio_vocab_size: int
) -> Sampling:
    """How codes are chosen: ``depth_decoder_*`` arguments over the generation configuration's sub-configuration.
    Arguments without an effect warn.

    The history of its processors is the text token of the frame and the codes so far.

    Raises:
        ValueError: for options without an effect, values out of range, or a length other than one text token and all
            codebooks.
    """
    values = depth_config.to_dict() if isinstance(depth_config, GenerationConfig) else depth_config or {}
    given = {name.removeprefix(DEPTH_PREFIX): value for name, value in kwargs.items()}
    values = {**values, **given}
    sampling = resolve_nested_sampling(values, DEPTH_PREFIX, num_codebooks + 1, audio_vocab_size)
    warn_without_effect(given, values, DEPTH_PREFIX)
    return sampling
