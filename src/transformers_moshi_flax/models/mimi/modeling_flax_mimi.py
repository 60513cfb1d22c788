"""The public models of Mimi: their arguments, checks and outputs around the modules.

Names and argument order follow ``transformers.models.mimi.modeling_mimi``, and so do the parameter paths, which are
those of its files. What departs from it:

- ``padding_mask`` counts: a row that is padded on the right is coded and decoded as if it were alone.
- What upstream forces to float32 is computed in *at least* float32.
- The codebook buffers are leaves of the parameter tree, without gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int
from transformers import MimiConfig
from transformers.models.mimi.configuration_mimi import MimiDecoderConfig, MimiEncoderConfig

from ...former_names import accept_former_names
from ...generation.arrays import on_one_device
from ...generation.programs import Program
from ...input_checks import (
    AnyArray,
    Input,
    check_input,
    check_shape,
    is_traced,
    is_tracing,
    private_copy,
    refuse_params,
)
from ...modeling_flax_utils import FlaxPreTrainedModel
from ...nn.cache import RingCache
from ...nn.linear import dropout_rngs
from .checkpoint_flax_mimi import CODEBOOKS, MIMI_RULES
from .modules_flax_mimi import (
    STEP_PARTS,
    FlaxMimiDecoderModule,
    FlaxMimiDecoderOutput,
    FlaxMimiEncoderModelOutput,
    FlaxMimiEncoderModule,
    FlaxMimiEncoderOutput,
    FlaxMimiModule,
    FlaxMimiOutput,
    parts_of,
    require_decoder,
    require_encoder,
)
from .quantizer_flax_mimi import codebooks_for_frames, norms_for_frames, with_norms
from .rounding import rounded, shortened
from .streaming_flax_mimi import (
    FlaxMimiDecoderState,
    FlaxMimiEncoderState,
    check_rows,
    check_state,
)
from .topology import encoded_length, samples_per_frame

Params = Any

Codebooks = dict[tuple[str, str], jax.Array]
"""Something of each codebook, by the names of quantizer and layer."""

State = TypeVar("State", FlaxMimiEncoderState, FlaxMimiDecoderState)


# ------------------------------------------------------------------------------------------------------------ checks


def audio_input(config: MimiConfig) -> Input:
    """What is encoded."""
    return Input({"batch": None, "channels": config.audio_channels, "samples": None}, "audio")


def codes_input(config: MimiConfig) -> Input:
    """What is decoded."""
    number = range(config.num_semantic_quantizers, config.num_quantizers + 1)
    return Input({"batch": None, "codebooks": number, "frames": None}, "ids", config.codebook_size)


def latents_input(config: MimiConfig) -> Input:
    """What the decoder's half is called with."""
    return Input({"batch": None, "hidden_size": config.hidden_size, "frames": None}, "floats")


MASK = Input({"batch": None, "samples": None}, "mask")
"""Of samples that count."""


def _checked_audio(config: MimiConfig, input_values: ArrayLike, rows: Any = ...) -> AnyArray:
    """``rows``: those whose values count."""
    check_input("input_values", input_values, audio_input(config), rows=rows)
    audio = private_copy(input_values)
    with np.errstate(over="ignore"):  # in rows that do not count
        return audio.astype(jax.dtypes.canonicalize_dtype(audio.dtype), copy=False)


def _checked_codes(config: MimiConfig, audio_codes: ArrayLike, rows: Any = ...) -> jax.Array:
    """``rows``: those whose values count."""
    check_input("audio_codes", audio_codes, codes_input(config), rows=rows)
    return jnp.asarray(private_copy(audio_codes), jnp.int32)


def _streams(name: str, asked: bool | None, default: bool, *states: Any) -> bool:
    """Whether a call is part of a stream: it was asked for, or is given what the chunk before returned.

    ``default`` is the configuration's wish, which yields where the call has what no stream has (a mask, say).
    """
    if not isinstance(asked, bool | np.bool_ | None):
        raise ValueError(f"`{name}` must be True, False, or None for what the configuration says, but is {asked!r}.")
    given = any(state is not None for state in states)
    if given and asked is not None and not asked:
        raise ValueError(f"`{name}` is False, but the state of a stream is given: leave one of them out.")
    return given or bool(default if asked is None else asked)


def _refuse_in_stream(arguments: dict[str, Any], padding_mask: ArrayLike | None, batch: int, samples: int) -> None:
    """Raises ``ValueError`` for what has no meaning in a stream, or is not kept there."""
    wrong = [name for name, value in arguments.items() if value]
    if _checked_mask(padding_mask, batch, samples) is not None:
        wrong.append("padding_mask")
    if wrong:
        names = ", ".join(f"`{name}`" for name in wrong)
        raise ValueError(f"{names} cannot be combined with a stream: leave it out, or code the whole at once.")


def _check_batch(name: str, array: ArrayLike, state: FlaxMimiEncoderState | FlaxMimiDecoderState) -> None:
    if np.shape(array)[0] != state.batch_size:
        raise ValueError(
            f"`{name}` has {np.shape(array)[0]} rows, but the state has {state.batch_size}: give all of them, and "
            "say in `active` which go on."
        )


def _checked_mask(padding_mask: ArrayLike | None, batch: int, samples: int | None = None) -> jax.Array | None:
    """The mask as booleans; ``samples`` is None where its length need not be that of anything else."""
    refuse_params(padding_mask=padding_mask)
    if padding_mask is None:
        return None
    mask = padding_mask if is_traced(padding_mask) else np.asarray(padding_mask)
    if mask.ndim not in (2, 3) or mask.shape[0] != batch or samples not in (None, mask.shape[-1]):
        length = "samples" if samples is None else samples
        raise ValueError(
            f"`padding_mask` must have the shape ({batch}, {length}) or ({batch}, channels, {length}), but has the "
            f"shape {mask.shape}."
        )
    if not is_traced(mask):
        if not np.isin(mask, (0, 1)).all():
            raise ValueError("`padding_mask` must hold only 0 (padding) and 1 (audio).")
        if (np.diff(mask.astype(np.int8), axis=-1) > 0).any():
            raise ValueError("`padding_mask` has padding before audio: pad on the right (`padding_side='right'`).")
        if samples is not None and mask.all():
            return None  # nothing to mask: keep the quick path
    return jnp.asarray(mask.astype(bool))


# ------------------------------------------------------------------------------------------------------------ models


class FlaxMimiPreTrainedModel(FlaxPreTrainedModel):
    """What the Mimi classes share.

    ``base_model_prefix`` is ``"mimi"`` for the halves too: upstream's ``"encoder"`` would name SEANet in the files.
    """

    config_class = MimiConfig
    base_model_prefix = "mimi"
    main_input_name = "input_values"
    checkpoint_rules = MIMI_RULES
    checkpoint_prefixes = ("", "audio_encoder.")
    checkpoint_series = (CODEBOOKS,)
    default_input_shape = (1, 1, 1)

    def _run(
        self,
        method: str,
        inputs: Mapping[str, ArrayLike | None],
        params: Params | None,
        return_dict: bool | None,
        train: bool,
        dropout_rng: jax.Array | None,
        **options: Any,
    ):
        """Call a method of the module, compiled once per bucket of lengths and options: hundreds of operations, each
        compiled for itself, would take many times as long."""
        if train and dropout_rng is None:
            if self.config.attention_dropout:
                raise ValueError("`train=True` with `attention_dropout` needs `dropout_rng`: pass a PRNG key.")
            if params is None and self.adapters_drop():
                raise ValueError("`train=True` with an adapter's `lora_dropout` needs `dropout_rng`: pass a PRNG key.")
        program = self._program(method, train, **options)
        rngs = dropout_rngs(dropout_rng) if train and dropout_rng is not None else {}
        params = self._params_in_use() if params is None else params
        if train or is_tracing(params, inputs) or not on_one_device(params, inputs):
            outputs = program(params, rngs, inputs)
        else:
            padded, lengths = rounded(self.config, inputs)
            outputs = shortened(program(params, rngs, padded), lengths)
        return self._returned(outputs, return_dict)

    def _step(
        self,
        method: str,
        state: Any,
        inputs: AnyArray,
        active: ArrayLike | None = None,
        params: Params | None = None,
        donated: bool = True,
        **options: Any,
    ) -> tuple[Any, jax.Array]:
        """The next state and output of a stream, compiled once per shapes and options.

        ``state``, ``inputs`` and ``active`` have been checked. ``donated`` lets the result take the state's memory.
        """
        programs = self._compiled()
        key = (method, donated, *sorted(options.items()))
        if key not in programs:
            module = self.module

            def program(params, state, inputs, active):
                return module.apply({"params": params}, state, inputs, active, **options, method=method)

            program.__name__ = method
            programs[key] = Program(program, (1,) if donated else ())
        active = np.ones(inputs.shape[0], dtype=bool) if active is None else active
        params = self._params_in_use() if params is None else params
        if "num_quantizers" in options:
            params = self._with_norms(params, options["num_quantizers"])
        # of the other half, every call would look at every parameter
        params = parts_of(params, STEP_PARTS[method])
        return programs[key](params, state, inputs, active)

    def _with_norms(self, params: Params, num_quantizers: int | None) -> Params:
        """``params`` with the norms of the codebooks' entries, which are kept until there are other tables."""
        number = self.config.num_quantizers if num_quantizers is None else num_quantizers
        if number not in range(self.config.num_semantic_quantizers, self.config.num_quantizers + 1):
            return params  # the program says what is wrong
        codebooks = codebooks_for_frames(params, self.config, number)
        tables = {place: codebook["embed_sum"] for place, codebook in codebooks.items()}
        # of arrays that may change, nothing can be kept
        known = all(isinstance(table, jax.Array) and not is_traced(table) for table in tables.values())
        if not known or any("squares" in codebook for codebook in codebooks.values()):
            return params
        nothing: tuple[Codebooks, Codebooks] = ({}, {})
        before, norms = getattr(self, "_norms", nothing)
        if before.keys() != tables.keys() or any(before[place] is not table for place, table in tables.items()):
            norms = norms_for_frames(codebooks, self.dtype)
            if is_traced(*norms.values()):  # inside of jax.jit everything new is
                return params
            self._norms = tables, norms
        return with_norms(params, codebooks, norms)

    def _checked_state(self, name: str, state: Any, state_class: type[State]) -> State:
        if not isinstance(state, state_class):
            raise ValueError(f"`{name}` must be a {state_class.__name__}, but is a {type(state).__name__}.")
        programs, batch_size = self._compiled(), state.batch_size
        key = (state_class, batch_size)
        if key not in programs:
            programs[key] = jax.eval_shape(lambda: state_class.create(self.config, batch_size, self.dtype))
        check_state(name, state, programs[key])
        return state

    def _checked_chunk(self, state: Any, audio: ArrayLike, rows: Any = ...) -> AnyArray:
        """Audio for a step from ``state``: whole frames, as many rows."""
        check_shape("input_values", np.shape(audio), audio_input(self.config), {})
        _check_batch("input_values", audio, state)
        checked = _checked_audio(self.config, audio, rows)
        kept = self._compiled()
        if samples_per_frame not in kept:  # reading a configuration takes longer than the other checks
            kept[samples_per_frame] = samples_per_frame(self.config)
        size = kept[samples_per_frame]
        if checked.shape[-1] % size:
            raise ValueError(
                f"`input_values` has {checked.shape[-1]} samples, but a stream is coded in whole frames of {size}: "
                "keep the rest for the next call."
            )
        return checked

    def _encode_chunk(
        self,
        input_values: ArrayLike,
        padding_mask: ArrayLike | None,
        past: tuple[str, Any],
        padding_cache: tuple[jax.Array, ...] | None,
        params: Params | None,
        refused: dict[str, Any],
        **options: Any,
    ) -> tuple[FlaxMimiEncoderState, jax.Array]:
        """A step with upstream's arguments; ``past`` is the name of the one for the transformer, and its value."""
        name, cache = past
        check_shape("input_values", np.shape(input_values), audio_input(self.config), {})
        batch, _, samples = np.shape(input_values)
        _refuse_in_stream(refused, padding_mask, batch, samples)
        if (cache is None) != (padding_cache is None):
            given, lacking = (name, "padding_cache") if padding_cache is None else ("padding_cache", name)
            raise ValueError(
                f"`{given}` is given without `{lacking}`: pass on both, as the chunk before returned them."
            )
        if cache is None or padding_cache is None:
            state = FlaxMimiEncoderState.create(self.config, batch, self.dtype)
        else:
            for argument, value, kind in ((name, cache, RingCache), ("padding_cache", padding_cache, tuple)):
                if not isinstance(value, kind):
                    raise ValueError(
                        f"`{argument}` must be a {kind.__name__}, but is of the type {type(value).__name__}: "
                        "pass on what the chunk before returned under this name."
                    )
            state = FlaxMimiEncoderState(histories=padding_cache, cache=cache)
            state = self._checked_state(f"{name}` and `padding_cache", state, FlaxMimiEncoderState)
        audio = self._checked_chunk(state, input_values)
        return self._step("encode_step", state, audio, params=params, donated=False, **options)

    def _decode_chunk(
        self,
        inputs: jax.Array,
        padding_mask: ArrayLike | None,
        past: tuple[str, Any],
        params: Params | None,
        return_dict: bool | None,
        refused: dict[str, Any],
    ) -> FlaxMimiDecoderOutput | tuple:
        """As :meth:`_encode_chunk`, of checked codes or latents."""
        name, state = past
        batch, _, frames = inputs.shape
        _refuse_in_stream(refused, padding_mask, batch, frames * samples_per_frame(self.config))
        if state is None:
            state = FlaxMimiDecoderState.create(self.config, batch, self.dtype)
        else:
            state = self._checked_state(name, state, FlaxMimiDecoderState)
        _check_batch("audio_codes" if name.startswith("decoder") else "latents", inputs, state)
        state, audio = self._step("decode_step", state, inputs, params=params, donated=False)
        outputs = FlaxMimiDecoderOutput(audio_values=audio, decoder_cache=state)
        return self._returned(outputs, return_dict)

    def get_encoded_length(self, input_length):
        """Frames of the codes of ``input_length`` samples (an int or an integer array, of any shape)."""
        return encoded_length(self.config, input_length)

    def get_audio_codes_mask(
        self, padding_mask: ArrayLike, padding_side: str = "right"
    ) -> Bool[Array, "batch frames"]:
        """Which frames of the codes count, from the mask of the samples. Not traceable: the shape depends on values.

        Args:
            padding_mask: ``(batch, samples)``, 1 for audio.
            padding_side: ``"right"``, or ``"left"`` if the frames are to be aligned at the end.

        Returns:
            As many frames as the longest row has.

        Raises:
            ValueError: another rank or side.
        """
        check_input("padding_mask", padding_mask, MASK)
        if padding_side not in ("left", "right"):
            raise ValueError(f"`padding_side` is {padding_side!r}, but must be 'left' or 'right'.")
        lengths = encoded_length(self.config, np.asarray(padding_mask).astype(np.int64).sum(axis=-1))
        mask = np.arange(lengths.max()) < lengths[:, None]
        return jnp.asarray(mask if padding_side == "right" else mask[:, ::-1])


class FlaxMimiEncoderModel(FlaxMimiPreTrainedModel):
    """The encoder half: SEANet encoder, transformer, downsampling; upstream ``MimiEncoderModel``."""

    config_class = MimiEncoderConfig
    module_class = FlaxMimiEncoderModule

    def dummy_inputs(self, input_shape: tuple[int, ...]) -> dict[str, Any]:
        return {"input_values": jnp.zeros((input_shape[0], self.config.audio_channels, input_shape[-1]))}

    @accept_former_names
    def __call__(
        self,
        input_values: ArrayLike,
        padding_mask: ArrayLike | None = None,
        cache: RingCache | None = None,
        padding_cache: tuple[jax.Array, ...] | None = None,
        use_streaming: bool | None = None,
        *,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> FlaxMimiEncoderModelOutput | tuple:
        """Latents of audio.

        Args:
            input_values: ``(batch, channels, samples)``, floating, in [-1, 1].
            padding_mask: ``(batch, samples)`` or ``(batch, channels, samples)``, 1 for audio and 0 for padding, which
                must be on the right. The latents of a row's own frames are those of the row alone; frames after its
                end are returned too and mean nothing (:meth:`get_audio_codes_mask` tells which count).
            cache, padding_cache: as the chunk before returned them, for the next chunk of a stream. Both or none. The
                former name of ``cache`` is ``past_key_values``.
            use_streaming: True for the first chunk of a stream, which then is in whole frames. None is what the
                configuration says, but with a mask, which no stream has, the whole is encoded.

        Raises:
            ValueError: wrong rank or channels; empty, integer or non-finite audio; a mask of another shape or with
                padding on the left. Values are not checked where they are traced. In a stream: no whole frames, a
                configuration that cannot be streamed, caches of another model or batch size, and arguments that have
                no meaning there.
        """
        refused = {"train": train, **self._flags(output_attentions, output_hidden_states)}
        default = self.config.use_streaming and padding_mask is None and not any(refused.values())
        if _streams("use_streaming", use_streaming, default, cache, padding_cache):
            past = ("cache", cache)
            state, latents = self._encode_chunk(input_values, padding_mask, past, padding_cache, params, refused)
            outputs = FlaxMimiEncoderModelOutput(latents=latents, cache=state.cache, padding_cache=state.histories)
            return self._returned(outputs, return_dict)
        audio = _checked_audio(self.config, input_values)
        mask = _checked_mask(padding_mask, audio.shape[0], audio.shape[-1])
        flags = self._flags(output_attentions, output_hidden_states)
        inputs = {"input_values": audio, "padding_mask": mask}
        return self._run("__call__", inputs, params, return_dict, train, dropout_rng, **flags)


class FlaxMimiDecoderModel(FlaxMimiPreTrainedModel):
    """The decoder half: upsampling, transformer, SEANet decoder; upstream ``MimiDecoderModel``."""

    config_class = MimiDecoderConfig
    main_input_name = "latents"
    module_class = FlaxMimiDecoderModule

    def dummy_inputs(self, input_shape: tuple[int, ...]) -> dict[str, Any]:
        return {"latents": jnp.zeros((input_shape[0], self.config.hidden_size, input_shape[-1]))}

    @accept_former_names
    def __call__(
        self,
        latents: ArrayLike,
        padding_mask: ArrayLike | None = None,
        cache: Any = None,
        *,
        use_cache: bool | None = None,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> FlaxMimiDecoderOutput | tuple:
        """Audio of latents.

        Args:
            latents: ``(batch, hidden_size, frames)``.
            padding_mask: as in :meth:`FlaxMimiModel.decode`.
            cache, use_cache: as ``decoder_cache`` and ``use_cache`` there. The former name of ``cache`` is
                ``past_key_values``.

        Raises:
            ValueError: wrong rank or size; no frames; a mask of another batch size or with padding on the left; in a
                stream, as for :meth:`FlaxMimiModel.decode`.
        """
        check_input("latents", latents, latents_input(self.config))
        latents = jnp.asarray(latents)
        flags = self._flags(output_attentions, output_hidden_states)
        refused = {"train": train, **flags}
        default = self.config.use_cache and padding_mask is None and not any(refused.values())
        if _streams("use_cache", use_cache, default, cache):
            past = ("cache", cache)
            return self._decode_chunk(latents, padding_mask, past, params, return_dict, refused)
        inputs = {"latents": latents, "padding_mask": _checked_mask(padding_mask, latents.shape[0])}
        return self._run("__call__", inputs, params, return_dict, train, dropout_rng, **flags)


class FlaxMimiModel(FlaxMimiPreTrainedModel):
    """The codec; upstream ``MimiModel``. ``encoder_config=None`` or ``decoder_config=None`` drops a half."""

    module_class = FlaxMimiModule

    def dummy_inputs(self, input_shape: tuple[int, ...]) -> dict[str, Any]:
        return {}

    @accept_former_names
    def encode(
        self,
        input_values: ArrayLike,
        padding_mask: ArrayLike | None = None,
        num_quantizers: int | None = None,
        encoder_cache: RingCache | None = None,
        padding_cache: tuple[jax.Array, ...] | None = None,
        use_streaming: bool | None = None,
        *,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> FlaxMimiEncoderOutput | tuple:
        """Codes of audio, ``(batch, num_quantizers, frames)`` int32; arguments and errors as in
        :class:`FlaxMimiEncoderModel`.

        Args:
            num_quantizers: how many codebooks, the semantic ones first; all if None.
            encoder_cache, padding_cache, use_streaming: for a stream, as there. :meth:`encode_step` does the same in
                place. The former name of ``encoder_cache`` is ``encoder_past_key_values``.

        Raises:
            ValueError: also ``num_quantizers`` that do not exist, or no encoder.
        """
        given = (encoder_cache, padding_cache)
        refused = {"train": train, **self._flags(output_attentions, output_hidden_states)}
        default = self.config.use_streaming and padding_mask is None and not any(refused.values())
        if _streams("use_streaming", use_streaming, default, *given):
            require_encoder(self.config)
            past = ("encoder_cache", encoder_cache)
            state, codes = self._encode_chunk(
                input_values, padding_mask, past, padding_cache, params, refused, num_quantizers=num_quantizers
            )
            outputs = FlaxMimiEncoderOutput(
                audio_codes=codes, encoder_cache=state.cache, padding_cache=state.histories
            )
            return self._returned(outputs, return_dict)
        audio = _checked_audio(self.config, input_values)
        mask = _checked_mask(padding_mask, audio.shape[0], audio.shape[-1])
        inputs = {"input_values": audio, "padding_mask": mask}
        flags = self._flags(output_attentions, output_hidden_states)
        return self._run(
            "encode", inputs, params, return_dict, train, dropout_rng, num_quantizers=num_quantizers, **flags
        )

    @accept_former_names
    def decode(
        self,
        audio_codes: ArrayLike,
        padding_mask: ArrayLike | None = None,
        decoder_cache: Any = None,
        *,
        use_cache: bool | None = None,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> FlaxMimiDecoderOutput | tuple:
        """Audio of codes, ``(batch, channels, samples)``.

        Args:
            audio_codes: ``(batch, num_quantizers, frames)`` in ``[0, codebook_size)``; fewer codebooks than there are
                give a coarser sound.
            padding_mask: of the samples, as for :meth:`encode`. The audio is cut to its length, and the samples of a
                padded row are those of the row alone.
            decoder_cache: as the chunk before returned them, for the next chunk of a stream: all of the state, that
                of the convolutions too. :meth:`decode_step` does the same in place. Its former name is
                ``decoder_past_key_values``.
            use_cache: True for the first chunk of a stream. None is what the configuration says, but with a mask,
                which no stream has, the whole is decoded.

        Raises:
            ValueError: wrong rank or number of codebooks, no frames, codes outside the codebook (traced ones are
                clamped, and ``checkify`` reports them), a bad mask, or no decoder. In a stream: a configuration that
                cannot be streamed, a state of another model or batch size, and arguments that have no meaning there.
        """
        codes = _checked_codes(self.config, audio_codes)
        flags = self._flags(output_attentions, output_hidden_states)
        refused = {"train": train, **flags}
        default = self.config.use_cache and padding_mask is None and not any(refused.values())
        if _streams("use_cache", use_cache, default, decoder_cache):
            require_decoder(self.config)
            past = ("decoder_cache", decoder_cache)
            return self._decode_chunk(codes, padding_mask, past, params, return_dict, refused)
        inputs = {"audio_codes": codes, "padding_mask": _checked_mask(padding_mask, codes.shape[0])}
        return self._run("decode", inputs, params, return_dict, train, dropout_rng, **flags)

    def init_encoder_state(self, batch_size: int) -> FlaxMimiEncoderState:
        """What :meth:`encode_step` begins with: ``batch_size`` rows that have heard nothing.

        Raises:
            ValueError: no encoder, no rows, or a configuration that cannot be streamed
                (:meth:`FlaxMimiEncoderState.create`).
        """
        require_encoder(self.config)
        return FlaxMimiEncoderState.create(self.config, batch_size, self.dtype)

    def init_decoder_state(self, batch_size: int) -> FlaxMimiDecoderState:
        """What :meth:`decode_step` begins with; see :meth:`init_encoder_state`."""
        require_decoder(self.config)
        return FlaxMimiDecoderState.create(self.config, batch_size, self.dtype)

    def encode_step(
        self,
        state: Any,
        audio: ArrayLike,
        active: ArrayLike | None = None,
        num_quantizers: int | None = None,
        params: Params | None = None,
    ) -> tuple[FlaxMimiEncoderState, Int[Array, "batch num_quantizers frames"]]:
        """The codes of the next frames of every row: those that :meth:`encode` gives for the whole.

        One program per shapes, updating the state in place: ``state`` is consumed, and may not be used again. Errors
        come before that.

        Args:
            state: a :class:`FlaxMimiEncoderState` from :meth:`init_encoder_state`, or from the step before.
            audio: ``(batch, channels, samples)``, floating, in [-1, 1]; one or more whole frames
                (``samples_per_frame(config)`` samples).
            active: ``(batch,)`` bool, rows that go on; all if None. The others keep their state, whatever their audio,
                and their codes mean nothing.
            num_quantizers: how many codebooks, the semantic ones first; all if None.

        Returns:
            The next state, and the codes, int32.

        Raises:
            ValueError: no whole frames; wrong rank, rows or channels; integer or non-finite audio in an active row;
                ``active`` of another shape or dtype; a state of another configuration or batch size, or one that was
                consumed; ``num_quantizers`` that do not exist. Traced values are not checked.
        """
        state = self._checked_state("state", state, FlaxMimiEncoderState)
        active = None if active is None else check_rows("active", active, state.batch_size)
        audio = self._checked_chunk(state, audio, ... if active is None else active)
        return self._step("encode_step", state, audio, active, params, num_quantizers=num_quantizers)

    def decode_step(
        self,
        state: Any,
        codes: ArrayLike,
        active: ArrayLike | None = None,
        params: Params | None = None,
    ) -> tuple[FlaxMimiDecoderState, Float[Array, "batch channels samples"]]:
        """The audio of the next frames of every row: that of :meth:`decode` for the whole.

        Args:
            state: a :class:`FlaxMimiDecoderState` from :meth:`init_decoder_state`, or from the step before; consumed
                as by :meth:`encode_step`.
            codes: ``(batch, num_quantizers, frames)`` in ``[0, codebook_size)``, one or more frames.
            active: as for :meth:`encode_step`.

        Returns:
            The next state, and the audio.

        Raises:
            ValueError: wrong rank, rows or number of codebooks; no frames; codes of an active row outside the
                codebook; the rest as for :meth:`encode_step`.
        """
        state = self._checked_state("state", state, FlaxMimiDecoderState)
        active = None if active is None else check_rows("active", active, state.batch_size)
        check_shape("audio_codes", np.shape(codes), codes_input(self.config), {})
        _check_batch("audio_codes", codes, state)
        codes = _checked_codes(self.config, codes, ... if active is None else active)
        return self._step("decode_step", state, codes, active, params)

    def __call__(
        self,
        input_values: ArrayLike | None = None,
        padding_mask: ArrayLike | None = None,
        num_quantizers: int | None = None,
        audio_codes: ArrayLike | None = None,
        *,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> FlaxMimiOutput | tuple:
        """Audio to codes to audio, cut to the length of the input.

        Args:
            input_values, padding_mask, num_quantizers: as for :meth:`encode`. With ``audio_codes``, the input is not
                encoded and may be left out.
            audio_codes: codes to decode, as for :meth:`decode`.
            output_attentions, output_hidden_states: of both halves.

        Raises:
            ValueError: as for :meth:`encode` and :meth:`decode`; neither audio nor codes; ``num_quantizers`` together
                with ``audio_codes``, where it has no effect.
        """
        if input_values is None and audio_codes is None:
            raise ValueError("`input_values` and `audio_codes` are both None: give one of them.")
        if num_quantizers is not None and audio_codes is not None:
            raise ValueError(f"`num_quantizers` is {num_quantizers}, but `audio_codes` are given: leave one out.")
        codes = None if audio_codes is None else _checked_codes(self.config, audio_codes)
        audio = None if input_values is None else _checked_audio(self.config, input_values)
        mask = None
        if audio is not None:
            mask = _checked_mask(padding_mask, audio.shape[0], audio.shape[-1])
        elif codes is not None:
            mask = _checked_mask(padding_mask, codes.shape[0])
        inputs = {"input_values": audio, "padding_mask": mask, "audio_codes": codes}
        flags = self._flags(output_attentions, output_hidden_states)
        return self._run(
            "__call__", inputs, params, return_dict, train, dropout_rng, num_quantizers=num_quantizers, **flags
        )
