"""The two ends of nested ``generate``: arguments become operands of the programs, and their results become outputs.

In between, in ``generation/utils.py``'s ``decode``, nothing comes back to the host.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int
from transformers import GenerationConfig, MoshiConfig

from ...generation.arrays import cut, on_device, on_host, padded, turned
from ...generation.buckets import bucket
from ...generation.configuration import Plan, merge_generation_config, resolve_plan
from ...generation.decoding import UNFORCED, State
from ...generation.sampling import Sampling
from ...generation.utils import Prepared, capacity_of, check_watching, fetch, forced_input, further_outputs
from ...input_checks import AnyArray, check_inputs, check_left_padding, is_traced, is_tracing
from ..mimi.streaming_flax_mimi import is_causal
from ..mimi.topology import encoded_length, samples_per_frame
from .generation_flax_moshi import (
    DEPTH_PREFIX,
    FlaxMoshiGenerateOutput,
    FramePrompt,
    PromptLayout,
    decode_audio,
    decoded_frames,
    encode_audio,
    encode_prompt,
    finish_frames,
    lay_out,
    new_audio_codes,
    resolve_depth_sampling,
)
from .inputs_flax_moshi import conversation_inputs, require_waveforms, streams_that_count

CALL_INPUTS = ("attention_mask", "stop_lengths", "logits_processor")
"""Arguments of ``generate`` that are no fields of a generation configuration."""


@dataclasses.dataclass(frozen=True)
class PreparedFrames(Prepared):
    """A call of nested ``generate``.

    Attributes:
        layout: where the rows of the prompt begin.
        start_frame: whether the start frame was put before the prompt.
        returns_waveforms, returns_codes: whether the outputs have them.
    """

    layout: PromptLayout
    start_frame: bool
    returns_waveforms: bool
    returns_codes: bool | None


def prepare(
    model: Any,
    streams: dict[str, Any],
    forced: dict[str, Any],
    generation_config: GenerationConfig | None,
    kwargs: dict[str, Any],
    *,
    prng_key: jax.Array | None,
    params: Any,
    streamer: Any,
    start_frame: bool,
    returns_waveforms: bool,
    returns_codes: bool | None,
) -> PreparedFrames:
    """Checks a call of ``generate`` before any work, and brings it to the device.

    Args:
        model: a ``FlaxMoshiForConditionalGeneration``.
        streams: the prompt, by the names of the arguments.
        forced: ``forced_text_ids`` and ``forced_audio_codes``.
        generation_config, kwargs, prng_key, params, streamer: as of ``generate``.
        start_frame: ``concat_unconditional_inputs``.
        returns_waveforms, returns_codes: ``return_audio_waveforms`` and ``return_audio_codes``.

    Raises:
        ValueError: as ``generate``.
    """
    config = model.config
    options, depth_sampling, call = resolve_options(model, generation_config, kwargs)
    given = on_host({**streams, **forced, **call})
    streams, start_frame = complete_prompt(config, {name: given[name] for name in streams}, start_frame)
    mask = given.get("attention_mask")
    batch_size, frames = check_prompt(config, streams, mask)
    length = frames + start_frame
    plan = resolve_plan(
        options,
        length,
        config.vocab_size,
        batch_size,
        mask,
        given.get("stop_lengths"),
        given.get("logits_processor"),
    )
    check_forced(config, given, batch_size, plan.max_length - length)
    traced = is_tracing(streams, params, prng_key, plan.sampling, depth_sampling, given)
    check_watching(plan, streamer, traced)
    if returns_waveforms:
        require_waveforms(config)
    params, capacity = model.whole_params(params, batch_size), capacity_of(plan, traced)
    prompt = place_prompt(model, params, streams, mask, given["forced_audio_codes"], plan, capacity)
    input_ids, attention_mask, inputs, layout = model.compiled(lay_out, start_frame=start_frame)(prompt)
    if "inputs_embeds" in streams:
        inputs = inputs.replace(inputs_embeds=on_device(padded(streams["inputs_embeds"], capacity, 0, axis=1)))
    request = model.make_request(
        plan,
        input_ids,
        attention_mask,
        prng_key,
        capacity,
        given["forced_text_ids"],
        prompt_length=length,
        streams=inputs,
        depth_sampling=depth_sampling,
    )
    return PreparedFrames(
        plan,
        request,
        length,
        params,
        has_text="input_ids" in streams,
        streamer=streamer,
        audio_codes=partial(new_audio_codes, filler=config.audio_vocab_size),
        layout=layout,
        start_frame=start_frame,
        returns_waveforms=returns_waveforms,
        returns_codes=returns_codes,
    )


def resolve_options(
    model: Any, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
) -> tuple[GenerationConfig, Sampling, dict[str, Any]]:
    """The options of the text, how codes are chosen, and the arguments that are no options."""
    depth = {name: value for name, value in kwargs.items() if name.startswith(DEPTH_PREFIX)}
    # a field of the generation configuration, not an option of the depth decoder
    depth.pop("depth_decoder_config", None)
    rest = {name: value for name, value in kwargs.items() if name not in depth}
    options, call = merge_generation_config(model.generation_defaults(), generation_config, rest, CALL_INPUTS)
    sampling = resolve_depth_sampling(
        getattr(options, "depth_decoder_config", None),
        depth,
        model.config.num_codebooks,
        model.config.audio_vocab_size,
    )
    return options, sampling, call


def start_of(config: MoshiConfig, rows: int) -> dict[str, np.ndarray]:
    """The start frame."""
    codes = np.full((rows, config.num_codebooks, 1), config.audio_vocab_size, dtype=np.int32)
    ids = np.full((rows, 1), config.vocab_size, dtype=np.int32)
    return {"input_ids": ids, "user_audio_codes": codes, "moshi_audio_codes": codes}


def complete_prompt(config: MoshiConfig, streams: dict[str, Any], start_frame: bool) -> tuple[dict[str, Any], bool]:
    """The streams that count, those of the start frame if there are none, and whether it is to be put before them."""
    alternatives = (
        ("input_ids", "inputs_embeds"),
        ("user_input_values", "user_audio_codes"),
        ("moshi_input_values", "moshi_audio_codes"),
    )
    given = streams_that_count(streams)
    missing = [names for names in alternatives if not any(name in given for name in names)]
    if len(missing) == len(alternatives):
        return start_of(config, 1), False
    if missing:
        names = " and ".join(" or ".join(f"`{name}`" for name in names) for names in missing)
        codec = config.audio_encoder_config
        raise ValueError(
            f"Pass {names} as well, or no input at all (see `get_unconditional_inputs`). What is not said is silence: "
            f"zeros of the shape (batch, {codec.audio_channels}, frames * {samples_per_frame(codec)}) as "
            "`_input_values`; for text, the id of padding in every frame. `MoshiProcessor` fills in both."
        )
    return given, start_frame and "inputs_embeds" not in given


def check_prompt(config: MoshiConfig, streams: dict[str, Any], mask: Any) -> tuple[int, int]:
    """Rows and frames of the prompt; ValueError if something is wrong with it."""
    table = conversation_inputs(config, user_may_go_on=True)
    sizes = check_inputs(table, {**streams, "attention_mask": mask})
    if mask is not None:
        check_left_padding("attention_mask", mask)
    if "moshi_audio_codes" in streams:
        check_start_codes("moshi_audio_codes", streams["moshi_audio_codes"], mask, config.audio_vocab_size)
    return sizes["batch"], sizes["frames"]


def check_forced(config: MoshiConfig, given: dict[str, Any], batch_size: int, new_frames: int) -> None:
    """Raises ``ValueError`` for what cannot be said in the new frames."""
    codebooks = {"num_codebooks": config.num_codebooks}
    table = {
        "forced_text_ids": forced_input(config.vocab_size, {}, new_frames),
        "forced_audio_codes": forced_input(config.audio_vocab_size, codebooks, new_frames),
    }
    for name, expected in table.items():
        check_inputs({name: expected}, given, {"batch": batch_size})


def check_start_codes(name: str, codes: Any, attention_mask: Any, start_code: int) -> None:
    """Raises ``ValueError`` for start codes anywhere but in the frames that a row begins with, padding left out."""
    if is_traced(codes, attention_mask):
        return
    starts = np.asarray(codes) == start_code
    counts = np.ones(starts.shape[::2], bool) if attention_mask is None else np.asarray(attention_mask) != 0
    leading = np.logical_and.accumulate(starts.all(axis=1) | ~counts, axis=-1)
    wrong = np.argwhere(starts.any(axis=1) & counts & ~leading)
    if wrong.size:
        row, frame = wrong[0]
        raise ValueError(
            f"`{name}` has the start code {start_code} in frame {frame} of row {row}, behind other codes: no sound "
            "belongs to it; leave such frames out."
        )


def place_prompt(
    model: Any,
    params: Any,
    streams: dict[str, Any],
    mask: Any,
    forced_codes: Any,
    plan: Plan,
    capacity: int,
) -> FramePrompt:
    """The streams on the device, with room for ``capacity`` frames, for which programs are compiled."""
    config, codec = model.config, model.config.audio_encoder_config
    text = streams["inputs_embeds" if "inputs_embeds" in streams else "input_ids"]
    batch_size, frames = np.shape(text)[:2]
    if "input_ids" in streams:
        input_ids = streams["input_ids"]
    else:
        # no id of the vocabulary, so that no processor of logits takes it for a part of the history
        input_ids = np.full((batch_size, frames), config.vocab_size)
    mask = np.ones((batch_size, frames)) if mask is None else mask
    padding = padding_before(mask)

    def codes_of(name: str) -> tuple[Array, int]:
        codes = streams.get(f"{name}_audio_codes")
        if codes is None:
            return encode(model, params, streams[f"{name}_input_values"], padding)
        length = np.shape(codes)[-1]
        codes = codes if length <= capacity else codes[..., :capacity]
        return on_device(padded(codes, capacity, 0), np.int32), length

    user_codes, user_frames = codes_of("user")
    moshi_codes, _ = codes_of("moshi")
    xp = jnp if is_traced(forced_codes) else np
    forced = np.full((batch_size, config.num_codebooks, frames), UNFORCED, dtype=np.int32)
    if forced_codes is not None:
        forced = xp.concatenate([forced, xp.asarray(forced_codes).astype(np.int32)], axis=-1)
    silence = np.zeros((1, codec.audio_channels, samples_per_frame(codec)), dtype=model.dtype)
    return FramePrompt(
        input_ids=on_device(padded(input_ids, capacity, plan.pad_token_id), np.int32),
        attention_mask=on_device(padded(mask, capacity, 1), np.int32),
        user_codes=user_codes,
        moshi_codes=moshi_codes,
        forced_codes=on_device(padded(forced, capacity, UNFORCED)),
        blank_codes=model.compiled(encode_audio, unoptimized=True)(params, on_device(silence)),
        frames=on_device(frames, np.int32),
        user_frames=on_device(user_frames, np.int32),
    )


def padding_before(mask: ArrayLike) -> Int[AnyArray, "batch"] | None:
    """Frames of padding before each row, or None if it is known that there are none."""
    if not is_traced(mask) and np.all(mask):
        return None
    xp = jnp if is_traced(mask) else np
    return xp.argmax(xp.asarray(mask) != 0, axis=-1).astype(np.int32)


def encode(
    model: Any,
    params: Any,
    values: AnyArray,
    padding: Int[AnyArray, "batch"] | None = None,
    mask: ArrayLike | None = None,
) -> tuple[Int[Array, "batch codebooks any"], int]:
    """The codes of waveforms, each row's as if it were alone, and how many frames of them count.

    Args:
        model: a ``FlaxMoshiForConditionalGeneration``.
        params: of the whole model.
        values: ``(batch, channels, samples)``; they are padded to a bucket.
        padding: frames before each row's first one. Codes of padding mean nothing.
        mask: ``(batch, samples)``, of which False is padding behind a row.
    """
    codec = model.config.audio_encoder_config
    size, (batch_size, _, samples) = samples_per_frame(codec), np.shape(values)
    frames = encoded_length(codec, samples)
    # leaving out what follows takes as long again, and whole frames of a causal codec do not hear it
    lengths = None
    if samples % size or not is_causal(codec) or mask is not None:
        xp = jnp if is_traced(padding, mask) else np
        counts = xp.ones((batch_size, samples), bool) if mask is None else xp.asarray(mask)
        if padding is not None:
            counts = counts & (xp.arange(samples)[None] >= xp.asarray(padding)[:, None] * size)
        lengths = on_device(counts.sum(axis=1, dtype=np.int32))
    if padding is not None:
        values = turned(values, padding * size)
    if not is_traced(values):
        values = padded(values, bucket(frames) * size, 0.0)
    elif padding is None and mask is None:
        lengths = None  # all of it counts, to its end
    rows = np.zeros(batch_size) if padding is None else padding
    program = model.compiled(encode_prompt)
    codes = program(params, on_device(values), lengths, on_device(rows, np.int32), on_device(frames, np.int32))
    return codes, frames


def finish(model: Any, prepared: PreparedFrames, state: State, found: dict[str, jax.Array]) -> FlaxMoshiGenerateOutput:
    """The outputs, cut after the longest row; under ``jax.jit`` they keep the full length."""
    skipped = 0 if prepared.has_text else prepared.prompt_length
    program = model.compiled(finish_frames, start_frame=prepared.start_frame)
    finished = program(state.sequences, state.lengths, state.streams, prepared.layout, on_device(skipped, np.int32))
    reached = fetch(prepared, state, finished.padded_lengths)
    frames, capacity = reached.frames, finished.codes.shape[-1]
    decoded = next((size for size in decoded_frames(capacity) if size >= frames), capacity)
    if is_traced(state.lengths):
        frames, decoded = prepared.plan.max_length - 1 - prepared.start_frame, capacity
    audio = None
    if prepared.returns_waveforms:
        program = model.compiled(decode_audio, frames=decoded)
        audio = program(prepared.params, finished.codes, finished.audio_lengths, finished.padding)
        audio = cut(audio, audio.shape[-1] // decoded * frames)
    return FlaxMoshiGenerateOutput(
        audio_sequences=audio,
        sequences=cut(finished.sequences, reached.length - skipped, start=skipped),
        audio_codes=cut(finished.padded_codes, frames) if prepared.returns_codes else None,
        sequence_lengths=finished.sequence_lengths,
        audio_lengths=finished.padded_lengths,
        **further_outputs(prepared, state, found, reached),
    )
