"""Nested generation: text and audio, frame by frame, in one XLA program.

One frame (see the diagram in ``docs/architecture.md``)::

    text, Moshi's codes, user's codes of frame t --> backbone --> hidden state --> text token t+1
                                                                       |                |
                                                                       +--> depth decoder: codes 0, 1, … of t+1

:func:`frame_step` is that frame; the time loop runs it, and so can streaming. Prefill fills the cache with all frames
of the prompt but the last.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from ...generation.sampling import Sampling, select_token
from ...generation.utils import fold_step, is_in
from ...modeling_flax_outputs import FlaxModelOutput
from .delay_pattern import apply_delay_pattern_mask, build_delay_pattern_mask, undelay


@flax.struct.dataclass
class FlaxMoshiGenerateOutput(FlaxModelOutput):
    """Output of nested ``generate``; upstream ``MoshiConditionalGenerationGenerateOutput``.

    Attributes:
        audio_sequences: waveform, ``(batch, 1, samples)`` float32 at 24 kHz, silent after a row's end.
        sequences: text ids of prompt and generated frames, ``(batch, length)`` int32.
        audio_codes: undelayed codes, ``(batch, num_codebooks, frames)`` int32, ``audio_vocab_size`` after a row's end.
        sequence_lengths: text ids of each row up to and with its end, ``(batch,)``.
        audio_lengths: audio frames of each row, ``(batch,)``.
    """

    audio_sequences: jax.Array | None = None
    sequences: jax.Array | None = None
    audio_codes: jax.Array | None = None
    sequence_lengths: jax.Array | None = None
    audio_lengths: jax.Array | None = None


@flax.struct.dataclass
class FrameOutput:
    """What one frame step chose.

    Attributes:
        text: the text token of the next frame, ``(batch,)``.
        codes: the codes of the next frame, ``(batch, codebooks)``; as inputs, they are delayed already.
        hidden_state: of the backbone, ``(batch, hidden_size)``.
        text_logits: ``(batch, vocab_size)``.
    """

    # Any: under jax.eval_shape the leaves are shapes
    text: Any
    codes: Any
    hidden_state: Any
    text_logits: Any


def depth_step(
    module,
    params,
    make_depth_cache,
    hidden_state: Float[Array, "batch hidden"],
    text: Int[Array, "batch"],
    keys: Key[Array, "batch"],
    sampling: Sampling,
) -> Int[Array, "batch codebooks"]:
    """Chooses the codes of one frame, one codebook after another.

    The loop is unrolled: each codebook has its own weights, and reading them by a loop index would copy them.
    """
    cache = make_depth_cache(hidden_state.shape[0])
    history = token = text[:, None]
    for codebook in range(module.config.num_codebooks):
        outputs = module.apply({"params": params}, token, hidden_state[:, None], cache, method=module.decode_codebook)
        cache = outputs.past_key_values
        token = select_token(outputs.logits[:, -1], history, 1 + codebook, keys, 1 + codebook, sampling)[:, None]
        history = jnp.concatenate([history, token], axis=1)
    return history[:, 1:]


def frame_step(
    module,
    params,
    cache,
    make_depth_cache,
    inputs_embeds: Float[Array, "batch 1 hidden"],
    attention_mask,
    text_ids: Int[Array, "batch capacity"],
    position: int | Int[Array, ""],
    keys: Key[Array, "batch"],
    text_sampling: Sampling,
    depth_sampling: Sampling,
) -> tuple[Any, FrameOutput]:
    """Feeds one frame to the backbone and chooses text and codes of the next frame.

    Args:
        module: a ``FlaxMoshiForConditionalGenerationModule``.
        params: its parameters.
        cache: a ``FlaxMoshiCache`` with room for the frame.
        make_depth_cache: makes the empty cache of the depth decoder for a batch size.
        inputs_embeds: ``module.embed`` of the frame's delayed streams.
        attention_mask: ``(batch, 1)`` or None.
        text_ids: the text so far, for the logits processors.
        position: columns of it in use.
        keys: a key per row, of this step.
        text_sampling, depth_sampling: how text tokens and codes are chosen.

    Returns:
        The updated cache and the chosen tokens.
    """
    outputs = module.apply({"params": params}, inputs_embeds, attention_mask, cache, method=module.decode_frame)
    hidden_state, logits = outputs.last_hidden_state[:, -1], outputs.logits[:, -1]
    text = select_token(logits, text_ids, position, keys, 0, text_sampling)
    codes = depth_step(module, params, make_depth_cache, hidden_state, text, keys, depth_sampling)
    return outputs.past_key_values, FrameOutput(text, codes, hidden_state, logits)


def generate_frames(
    module,
    params,
    input_ids: Int[Array, "batch prompt"] | None,
    user_codes: Int[Array, "batch codebooks heard"],
    moshi_codes: Int[Array, "batch codebooks prompt"],
    blank_codes: Int[Array, "1 codebooks 1"],
    inputs_embeds: Float[Array, "batch prompt hidden"] | None,
    attention_mask,
    keys: Key[Array, "batch"],
    text_sampling: Sampling,
    depth_sampling: Sampling,
    *,
    make_cache,
    make_depth_cache,
    max_length: int,
    eos_token_ids: tuple[int, ...],
    pad_token_id: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The program of nested ``generate``.

    Args:
        module, params: as in :func:`frame_step`.
        input_ids: text of the prompt, start frame included; None if only ``inputs_embeds`` stand for it.
        user_codes: the user's undelayed codes, at least as many frames as the prompt; what is heard after them is
            silence.
        moshi_codes: Moshi's undelayed codes of the prompt.
        blank_codes: the codes of one frame of silence.
        inputs_embeds: instead of the embeddings of the prompt.
        attention_mask: of the prompt.
        keys: a key per row.
        text_sampling, depth_sampling: how text tokens and codes are chosen.
        make_cache, make_depth_cache: make the empty caches.
        max_length: frames in all.
        eos_token_ids, pad_token_id: what ends a row, and what follows.

    Returns:
        Text ids ``(batch, max_length)``, their lengths, undelayed codes ``(batch, codebooks, max_length - 1)``
        beginning with the first frame that is no start frame, and their lengths.
    """
    start = module.config.audio_vocab_size
    batch_size, _, prompt_length = moshi_codes.shape
    prompt, moshi_mask = build_delay_pattern_mask(moshi_codes, start, start, max_length)
    heard, user_mask = build_delay_pattern_mask(user_codes[:, :, : max_length - 1], start, start, max_length)
    user_stream = apply_delay_pattern_mask(jnp.broadcast_to(blank_codes, user_mask.shape), user_mask)

    text_ids = jnp.full((batch_size, max_length), pad_token_id, dtype=jnp.int32)
    if input_ids is None:
        # no text that logits processors should look at
        text_ids = text_ids.at[:, :prompt_length].set(module.config.vocab_size)
    else:
        text_ids = lax.dynamic_update_slice_in_dim(text_ids, input_ids, 0, axis=1)
    codes = jnp.full(moshi_mask.shape, start, dtype=jnp.int32)
    codes = lax.dynamic_update_slice_in_dim(codes, prompt, 0, axis=2)
    attended = jnp.ones((batch_size, max_length), dtype=bool)
    if attention_mask is not None:
        attended = lax.dynamic_update_slice_in_dim(attended, attention_mask, 0, axis=1)

    # all frames of the prompt but the last, which begins the loop; the last frame of all is never fed
    cache = make_cache(batch_size, max_length - 1)
    prompt_embeds = inputs_embeds
    if prompt_embeds is None:
        prompt_embeds = module.apply(
            {"params": params}, input_ids, heard[:, :, :prompt_length], prompt, method=module.embed
        )
    if prompt_length > 1:
        before = slice(0, prompt_length - 1)
        prefill = module.apply(
            {"params": params}, prompt_embeds[:, before], attended[:, before], cache, method=module.decode_frame
        )
        cache = prefill.past_key_values

    def unfinished(state):
        position, _, _, _, _, finished = state
        return (position < max_length) & ~jnp.all(finished)

    def step(state):
        position, cache, text_ids, codes, lengths, finished = state

        def at(stream, position):
            return lax.dynamic_slice_in_dim(stream, position, 1, axis=-1)

        previous = position - 1
        inputs = module.apply(
            {"params": params},
            at(text_ids, previous),
            at(user_stream, previous),
            at(codes, previous),
            method=module.embed,
        )
        if inputs_embeds is not None:
            inputs = jnp.where(previous < prompt_length, inputs_embeds[:, -1:].astype(inputs.dtype), inputs)
        cache, frame = frame_step(
            module,
            params,
            cache,
            make_depth_cache,
            inputs,
            at(attended, previous),
            text_ids,
            position,
            fold_step(keys, position - prompt_length),
            text_sampling,
            depth_sampling,
        )
        text = jnp.where(finished, pad_token_id, frame.text)
        text_ids = lax.dynamic_update_slice_in_dim(text_ids, text[:, None], position, axis=1)
        chosen = apply_delay_pattern_mask(frame.codes[:, :, None], at(moshi_mask, position))
        codes = lax.dynamic_update_slice_in_dim(codes, chosen, position, axis=2)
        lengths = jnp.where(finished, lengths, position + 1)
        return position + 1, cache, text_ids, codes, lengths, finished | is_in(text, eos_token_ids)

    nobody = jnp.zeros((batch_size,), dtype=bool)
    state = (jnp.int32(prompt_length), cache, text_ids, codes, jnp.zeros((batch_size,), dtype=jnp.int32), nobody)
    _, _, text_ids, codes, lengths, _ = lax.while_loop(unfinished, step, state)

    # the audio of a row begins after its start frames and ends one frame before its text
    starts = jnp.sum(moshi_codes[:, 0] == start, axis=-1, dtype=jnp.int32)
    audio_lengths = jnp.maximum(lengths - 1 - starts, 0)
    frames = jnp.arange(max_length - 1, dtype=jnp.int32)
    indices = jnp.minimum(frames[None] + starts[:, None], max_length - 2)
    audio = jnp.take_along_axis(undelay(codes), indices[:, None], axis=-1)
    audio = jnp.where((frames[None] < audio_lengths[:, None])[:, None], audio, start)
    return text_ids, lengths, audio, audio_lengths


def decode_audio(module, params, audio_codes, audio_lengths) -> Float[Array, "batch 1 samples"]:
    """The waveform of undelayed codes, silent after each row's end (Mimi is causal: what follows changes nothing)."""
    frames = jnp.arange(audio_codes.shape[-1], dtype=jnp.int32)
    inside = frames[None] < audio_lengths[:, None]
    audio_codes = jnp.where(inside[:, None], audio_codes, 0)
    audio = module.apply({"params": params}, audio_codes, method=module.decode_audio)
    samples_per_frame = audio.shape[-1] // audio_codes.shape[-1]
    inside = jnp.repeat(inside, samples_per_frame, axis=-1)[:, None]
    return jnp.where(inside, audio, jnp.zeros((), audio.dtype)).astype(jnp.float32)


def encode_audio(module, params, input_values) -> Int[Array, "batch codebooks frames"]:
    """The codes of a waveform."""
    return module.apply({"params": params}, input_values, method=module.encode_audio)
