"""Moshi's decoders for the loop of generation: text alone, and text and audio frame by frame.

``generation/decoding.py`` has the loop, ``frame_flax_moshi.py`` what one frame does; here are the programs around
them: prompts are laid out, and audio is taken out. ``preparing_flax_moshi.py`` calls them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from transformers import GenerationConfig

from ...generation.arrays import host_copy
from ...generation.buckets import SMALLEST
from ...generation.configuration import resolve_nested_sampling, warn_without_effect
from ...generation.decoding import UNFORCED, Request, State, take_rows, take_steps, write_step
from ...generation.sampling import Sampling
from ...generation.text import prompt_embeds
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
        fixed_codes: Moshi's codes that are not chosen (prompt, start, forced ones), delayed, ``UNFORCED`` elsewhere,
            ``(batch, codebooks, capacity)``.
        inputs_embeds: instead of the embeddings of the prompt, ``(batch, capacity, hidden_size)``, or None.
    """

    user_codes: Any
    fixed_codes: Any
    inputs_embeds: Any = None


@flax.struct.dataclass
class FramePrompt:
    """The streams of a prompt, undelayed, each row behind its padding, with room behind them.

    Attributes:
        input_ids: ``(batch, capacity)`` int32.
        attention_mask: 0 for the padding before a row, 1 behind the prompt, ``(batch, capacity)``.
        user_codes, moshi_codes: ``(batch, codebooks, any length)`` int32; what is behind their frames means nothing.
        forced_codes: Moshi's codes behind the prompt as far as they are not to be chosen, else ``UNFORCED``, ``(batch,
            codebooks, capacity)``.
        blank_codes: of a frame of silence, ``(1, codebooks, 1)``.
        frames: of the prompt, a scalar.
        user_frames: of the user's stream, which may go on after the prompt, a scalar.
    """

    input_ids: Any
    attention_mask: Any
    user_codes: Any
    moshi_codes: Any
    forced_codes: Any
    blank_codes: Any
    frames: Any
    user_frames: Any


@flax.struct.dataclass
class PromptLayout:
    """Where the rows of a prompt begin, as :func:`finish_frames` needs it.

    Attributes:
        padding: frames before each row, ``(batch,)`` int32.
        starts: frames that each row begins with that have the start code, those of its padding included, ``(batch,)``.
        given_codes: Moshi's codes that were given, ``(batch, codebooks, capacity)``.
    """

    padding: Any
    starts: Any
    given_codes: Any


def lay_out(
    decoder: FrameDecoder, prompt: FramePrompt, *, start_frame: bool
) -> tuple[Int[Array, "batch capacity"], Bool[Array, "batch capacity"], FrameInputs, PromptLayout]:
    """The streams of a prompt so that the padding before a row makes no difference to it; codes are delayed.

    Every row begins with its start frame, directly before the first frame that counts. Before that stands the start
    code, since the delay takes codes of the last frame of the padding into the first one that counts. Behind what is
    passed for the user there is silence.

    Args:
        decoder: the model.
        prompt: its streams.
        start_frame: whether to put the start frame before them. Then they have one frame more.

    Returns:
        Ids, mask, the streams, and where the rows begin.
    """
    config = decoder.module.config
    start_code, more = config.audio_vocab_size, int(start_frame)
    capacity = prompt.input_ids.shape[1]
    frame = jnp.arange(capacity, dtype=jnp.int32)
    padding = jnp.argmax(prompt.attention_mask != 0, axis=1).astype(jnp.int32)
    begin = padding[:, None]
    before = (frame[None] < begin + more)[:, None]

    def later(stream: Array) -> Array:
        """``stream`` behind the start frame, in which its own first frame stands for now."""
        return jnp.concatenate([stream[..., :more], stream[..., : capacity - more]], axis=-1)

    def with_start(stream: Int[Array, "batch capacity"], start: int) -> Int[Array, "batch capacity"]:
        if not start_frame:
            return stream
        behind = jnp.where(frame[None] < begin, stream, later(stream))
        return jnp.where(frame[None] == begin, start, behind).astype(stream.dtype)

    def laid_out(codes: Int[Array, "batch codebooks capacity"]) -> Int[Array, "batch codebooks capacity"]:
        return jnp.where(before, start_code, later(codes))

    given = with_length(prompt.moshi_codes, capacity)
    heard = with_length(prompt.user_codes, capacity)
    user = jnp.where((frame < prompt.user_frames)[None, None], heard, prompt.blank_codes)
    moshi = laid_out(jnp.where((frame < prompt.frames)[None, None], given, prompt.forced_codes))
    leading = jnp.cumprod((moshi[:, 0] == start_code) & (frame < prompt.frames + more)[None], axis=-1, dtype=jnp.int32)
    return (
        with_start(prompt.input_ids, config.vocab_size),
        with_start(prompt.attention_mask.astype(jnp.int32), 1).astype(bool),
        FrameInputs(user_codes=delay(laid_out(user), start_code), fixed_codes=delay(moshi, start_code)),
        PromptLayout(padding=padding, starts=jnp.sum(leading, axis=-1, dtype=jnp.int32), given_codes=given),
    )


def with_length(codes: Int[Array, "batch codebooks any"], length: int) -> Int[Array, "batch codebooks {length}"]:
    """Cut, or with zeros behind it."""
    codes = codes[..., :length]
    return jnp.pad(codes, ((0, 0), (0, 0), (0, length - codes.shape[-1])))


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
        return jnp.where(fixed == UNFORCED, self.module.config.audio_vocab_size, fixed)

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
            fixed_codes=take_steps(request.streams.fixed_codes, state.position, 1)[..., 0],
            output_attentions=output_attentions,
        )
        streams = state.streams if chosen.parents is None else take_rows(state.streams, chosen.parents)
        return outputs, chosen, write_step(streams, codes, state.position)

    def _inputs(self, request: Request, state: State, start: Int[Array, ""], length: int) -> dict[str, Any]:
        """What the module's ``listen`` needs to run these steps."""
        given = request.streams.inputs_embeds
        return {
            "text_ids": take_steps(state.sequences, start, length),
            "user_codes": take_steps(request.streams.user_codes, start, length),
            "moshi_codes": take_steps(state.streams, start, length),
            "cache": state.cache,
            "attention_mask": take_steps(request.attention_mask, start, length),
            "inputs_embeds": None if given is None else prompt_embeds(given, request, start, length),
        }


@flax.struct.dataclass
class FinishedFrames:
    """What the loop made, as it is returned but for its length.

    Attributes:
        sequences: start frame, prompt and new tokens, ``(rows, capacity)``, as upstream has them.
        sequence_lengths: of each row.
        codes: undelayed, of each row from its first frame on, ``(rows, codebooks, frames)``.
        audio_lengths: frames of each row.
        padding: frames before each row.
        padded_codes, padded_lengths: the same behind the padding, in which the codes stand that were given for it.
    """

    sequences: Any
    sequence_lengths: Any
    codes: Any
    audio_lengths: Any
    padding: Any
    padded_codes: Any
    padded_lengths: Any


def finish_frames(
    decoder: FrameDecoder,
    sequences: Int[Array, "rows capacity"],
    lengths: Int[Array, "rows"],
    delayed_codes: Int[Array, "rows codebooks capacity"],
    layout: PromptLayout,
    skipped: Int[Array, ""],
    *,
    start_frame: bool,
) -> FinishedFrames:
    """The program after the loop.

    Args:
        decoder: the model.
        sequences, lengths, delayed_codes: of the last state. Its rows are those of the prompt, or several neighbours
            for each.
        layout: of the prompt.
        skipped: steps that the lengths of the sequences are not to count.
        start_frame: as of :func:`lay_out`. Start frames have no audio.
    """
    config = decoder.module.config
    copies = lengths.shape[0] // layout.padding.shape[0]
    layout = jax.tree.map(lambda array: jnp.repeat(array, copies, axis=0), layout)
    padding = layout.padding[:, None]
    if start_frame:
        step = jnp.arange(sequences.shape[1], dtype=jnp.int32)[None]
        sequences = jnp.where(step <= padding, jnp.roll(sequences, 1, axis=1), sequences)
        sequences = sequences.at[:, 0].set(config.vocab_size)

    # the audio of a row ends one frame before its text
    audio_lengths = jnp.maximum(lengths - 1 - layout.starts, 0)
    frame = jnp.arange(delayed_codes.shape[-1] - 1, dtype=jnp.int32)[None]
    indices = jnp.minimum(frame + layout.starts[:, None], frame.shape[-1] - 1)
    codes = jnp.take_along_axis(undelay(delayed_codes), indices[:, None], axis=-1)
    codes = jnp.where((frame < audio_lengths[:, None])[:, None], codes, config.audio_vocab_size)
    index = frame - padding
    behind = jnp.take_along_axis(codes, jnp.maximum(index, 0)[:, None], axis=-1)
    return FinishedFrames(
        sequences=sequences,
        sequence_lengths=lengths - skipped,
        codes=codes,
        audio_lengths=audio_lengths,
        padding=layout.padding,
        padded_codes=jnp.where((index < 0)[:, None], layout.given_codes[..., : frame.shape[-1]], behind),
        padded_lengths=audio_lengths + layout.padding,
    )


def new_audio_codes(state: State, begin: int, end: int, filler: int) -> np.ndarray:
    """The undelayed codes ``(batch, codebooks, end - begin)`` of a range of steps, copied to the host.

    ``filler`` stands after a row's end; the step ``end`` must be there, as it has the delayed ones.
    """
    # all steps: XLA would compile a program for every range
    codes, lengths = host_copy(state.streams), host_copy(state.lengths)
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


def decode_audio(
    decoder: FrameDecoder,
    params: Any,
    audio_codes: Int[Array, "batch codebooks capacity"],
    audio_lengths: Int[Array, "batch"],
    padding: Int[Array, "batch"] | None = None,
    *,
    frames: int | None = None,
) -> Float[Array, "batch channels samples"]:
    """The waveform of undelayed codes, silent after each row's end (Mimi is causal: what follows changes nothing).

    Args:
        decoder: the model.
        params: its parameters.
        audio_codes: the codes.
        audio_lengths: frames of each row.
        padding: frames of silence before each row, for which there is room behind it.
        frames: only so many of the codes, from the first on.
    """
    audio_codes = audio_codes[..., :frames]
    inside = jnp.arange(audio_codes.shape[-1], dtype=jnp.int32)[None] < audio_lengths[:, None]
    audio_codes = jnp.where(inside[:, None], audio_codes, 0)
    module = decoder.module
    audio = module.apply({"params": params}, audio_codes, method=module.decode_audio)
    samples_per_frame = audio.shape[-1] // audio_codes.shape[-1]
    inside = jnp.repeat(inside, samples_per_frame, axis=-1)[:, None]
    audio = jnp.where(inside, audio, jnp.zeros((), audio.dtype)).astype(jnp.float32)
    if padding is None:
        return audio
    # the silence behind a row comes in at its front
    return jax.vmap(lambda row, shift: jnp.roll(row, shift, axis=-1))(audio, padding * samples_per_frame)


def encode_audio(
    decoder: FrameDecoder, params: Any, input_values: Any, samples: Int[Array, "batch"] | None = None
) -> Int[Array, "batch codebooks frames"]:
    """The codes of waveforms, or of each row's first ``samples``: what follows makes no difference."""
    mask = None
    if samples is not None:
        mask = jnp.arange(input_values.shape[-1], dtype=jnp.int32) < samples[:, None]
    return decoder.module.apply({"params": params}, input_values, mask, method=decoder.module.encode_audio)


def encode_prompt(
    decoder: FrameDecoder,
    params: Any,
    input_values: Any,
    samples: Int[Array, "batch"] | None,
    padding: Int[Array, "batch"],
    frames: Int[Array, ""],
) -> Int[Array, "batch codebooks any"]:
    """As :func:`encode_audio`, with the codes of each row behind its padding.

    Args:
        decoder, params, input_values, samples: as there; the padding of the waveforms stands behind each row.
        padding: frames.
        frames: of the waveforms, with those of the padding. Codes of padding and behind all frames mean nothing.
    """
    codes = encode_audio(decoder, params, input_values, samples)
    index = (jnp.arange(codes.shape[-1], dtype=jnp.int32)[None] - padding[:, None]) % frames
    return jnp.take_along_axis(codes, index[:, None], axis=-1, mode="clip")


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
