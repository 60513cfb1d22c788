"""The linen modules of Mimi: its halves, and the codec of both with the quantizer.

Mimi (Défossez et al., 2024) is a SEANet encoder, a transformer and a downsampling convolution, a split residual vector
quantizer, and the mirror image of the first three. Each half codes the whole at once, or the next frames of a stream
from an explicit state. The public classes around the modules are in ``modeling_flax_mimi.py``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int
from transformers import MimiConfig

from ...modeling_flax_outputs import FlaxModelOutput
from ...nn.cache import RingCache
from ...ops.convolution import output_length
from .layers_flax_mimi import (
    FlaxMimiConv1d,
    FlaxMimiConvTranspose1d,
    FlaxMimiDecoder,
    FlaxMimiEncoder,
    FlaxMimiTransformerModel,
    Lengths,
)
from .quantizer_flax_mimi import FlaxMimiSplitResidualVectorQuantizer
from .streaming_flax_mimi import (
    FlaxMimiDecoderState,
    FlaxMimiEncoderState,
    histories_by_name,
    inputs_by_order,
    seanet_histories,
)
from .topology import (
    convolutions,
    decoder_convolutions,
    downsampling,
    encoded_length,
    resamples,
    seanet_encoder,
    upsampling,
)

Params = Any

# parts of a Mimi that a step uses, SEANet's encoder first
STEP_PARTS = {
    "encode_step": ("encoder", "encoder_transformer", "downsample", "quantizer"),
    "decode_step": ("quantizer", "upsample", "decoder_transformer", "decoder"),
}


def parts_of(params: Params, names: tuple[str, ...]) -> Params:
    """These parts of a Mimi, as far as it has them."""
    return {name: params[name] for name in names if name in params}


# ----------------------------------------------------------------------------------------------------------- outputs


@dataclasses.dataclass
class FlaxMimiEncoderModelOutput(FlaxModelOutput):
    """Output of the encoder half.

    Attributes:
        latents: ``(batch, hidden_size, frames)``.
        cache: of the transformer, where the call was part of a stream.
        padding_cache: what the convolutions remember, where the call was part of a stream.
        hidden_states: input and output of every transformer layer, each ``(batch, steps, hidden_size)``, where steps
            come before the downsampling (two a frame in the released Mimi).
        attentions: weights of every transformer layer, each ``(batch, heads, steps, steps)``.
    """

    latents: jax.Array | None = None
    cache: RingCache | None = None
    padding_cache: tuple[jax.Array, ...] | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@dataclasses.dataclass
class FlaxMimiEncoderOutput(FlaxModelOutput):
    """Output of ``encode``: ``audio_codes`` ``(batch, num_quantizers, frames)`` int32, the rest as in
    :class:`FlaxMimiEncoderModelOutput` (whose ``cache`` is ``encoder_cache`` here)."""

    audio_codes: jax.Array | None = None
    encoder_cache: RingCache | None = None
    padding_cache: tuple[jax.Array, ...] | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@dataclasses.dataclass
class FlaxMimiDecoderOutput(FlaxModelOutput):
    """Output of the decoder half: ``audio_values`` ``(batch, audio_channels, samples)``, the state after it as
    ``decoder_cache`` where the call was part of a stream, the rest as in
    :class:`FlaxMimiEncoderModelOutput`."""

    audio_values: jax.Array | None = None
    decoder_cache: FlaxMimiDecoderState | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@dataclasses.dataclass
class FlaxMimiOutput(FlaxModelOutput):
    """Output of the whole codec: ``audio_codes`` ``(batch, num_quantizers, frames)`` int32 and ``audio_values``
    ``(batch, audio_channels, samples)``; hidden states and attentions of both halves as in
    :class:`FlaxMimiEncoderModelOutput`, the encoder's where it ran."""

    audio_codes: jax.Array | None = None
    audio_values: jax.Array | None = None
    encoder_hidden_states: tuple[jax.Array, ...] | None = None
    encoder_attentions: tuple[jax.Array, ...] | None = None
    decoder_hidden_states: tuple[jax.Array, ...] | None = None
    decoder_attentions: tuple[jax.Array, ...] | None = None


# ------------------------------------------------------------------------------------------------------------ halves


def _row_lengths(padding_mask: Bool[Array, "batch ..."] | None) -> Lengths:
    """Samples that count in each row of a mask ``(batch, samples)`` or ``(batch, channels, samples)``."""
    if padding_mask is None:
        return None
    mask = padding_mask if padding_mask.ndim == 2 else padding_mask.any(axis=1)
    return mask.sum(axis=-1, dtype=jnp.int32)


def require_encoder(config: MimiConfig) -> None:
    if config.encoder_config is None:
        raise ValueError("this Mimi has no encoder (`encoder_config=None`): load one that has it to encode audio.")


def require_decoder(config: MimiConfig) -> None:
    if config.decoder_config is None:
        raise ValueError("this Mimi has no decoder (`decoder_config=None`): load one that has it to decode codes.")


def _all_rows(state: FlaxMimiEncoderState | FlaxMimiDecoderState) -> Bool[Array, "batch"]:
    return jnp.ones((state.batch_size,), dtype=bool)


class _EncoderHalf:
    """SEANet encoder, transformer and downsampling, for the two modules that hold them under the same names."""

    config: MimiConfig

    def _setup_encoder(self):
        config, dtype = self.config, self.dtype
        self.encoder = FlaxMimiEncoder(config, dtype)
        self.encoder_transformer = FlaxMimiTransformerModel(config, dtype, self.gradient_checkpointing)
        if resamples(config):
            self.downsample = FlaxMimiConv1d(config, *downsampling(config), dtype)

    def _encode_latents(self, input_values, padding_mask, output_attentions, output_hidden_states, deterministic):
        """Latents channels last, and the transformer's output."""
        lengths = _row_lengths(padding_mask)
        x, _ = self.encoder(input_values.swapaxes(1, 2), lengths)
        outputs = self.encoder_transformer(x, output_attentions, output_hidden_states, deterministic)
        x = outputs.last_hidden_state
        if resamples(self.config):
            if lengths is not None:
                lengths = output_length(lengths, math.prod(self.config.upsampling_ratios))
            x, _ = self.downsample(x, lengths)
        return x, outputs

    def _step_latents(self, state, input_values, active):
        """The next state, and the latents, channels last, of the next frames of a stream."""
        active = _all_rows(state) if active is None else active
        count = seanet_histories(self.config)
        convolved, features = self.convolve_step(state.histories[:count], state.cache.length, input_values, active)
        state, latents = self._transform_step(state.replace(histories=state.histories[count:]), features, active)
        return state.replace(histories=(*convolved, *state.histories)), latents

    def convolve_step(
        self,
        histories: tuple[Array, ...],
        cache_length: Int[Array, "batch"],
        input_values: Float[Array, "batch channels samples"],
        active: Bool[Array, "batch"],
    ) -> tuple[tuple[Array, ...], Float[Array, "batch steps hidden_size"]]:
        """SEANet's part of a step: what its convolutions remember, and its features of the next frames.

        Args:
            histories: what they remember so far, the first ones of :class:`FlaxMimiEncoderState`.
            cache_length: of the state's cache; zero where a stream begins.
            input_values: whole frames of audio.
            active: rows that go on.
        """
        seanet = convolutions(seanet_encoder(self.config))
        before = histories_by_name(seanet, histories, cache_length > 0, active)
        # what is not finite would stay in the ring, and no weight is small enough for it
        input_values = jnp.where(active[:, None, None], input_values, 0)
        features, after = self.encoder(input_values.swapaxes(1, 2), None, before)
        return inputs_by_order(seanet, after), features

    def _transform_step(self, state, features, active):
        """The rest of a step, for a state without the histories of SEANet."""
        resampling = {("downsample",): downsampling(self.config)} if resamples(self.config) else {}
        histories = histories_by_name(resampling, state.histories, state.cache.length > 0, active)
        cache, x = self.encoder_transformer.step(state.cache, features, active)
        if resamples(self.config):
            x, histories["downsample"] = self.downsample(x, None, histories["downsample"])
        return state.replace(histories=inputs_by_order(resampling, histories), cache=cache), x


class _DecoderHalf:
    """Upsampling, transformer and SEANet decoder, for the two modules that hold them under the same names."""

    def _setup_decoder(self):
        config, dtype = self.config, self.dtype
        if resamples(config):
            self.upsample = FlaxMimiConvTranspose1d(config, *upsampling(config), dtype)
        self.decoder_transformer = FlaxMimiTransformerModel(config, dtype, self.gradient_checkpointing)
        self.decoder = FlaxMimiDecoder(config, dtype)

    def _decode_latents(self, x, padding_mask, output_attentions, output_hidden_states, deterministic):
        """Audio from latents that are channels last."""
        lengths = _row_lengths(padding_mask)
        if lengths is not None:
            # A row without padding keeps frames beyond the mask, which says only where to cut the audio.
            padded = lengths < padding_mask.shape[-1]
            lengths = jnp.where(padded, jnp.minimum(encoded_length(self.config, lengths), x.shape[1]), x.shape[1])
        if resamples(self.config):
            x, _ = self.upsample(x, lengths)
            lengths = None if lengths is None else lengths * self.config.latent_stride
        outputs = self.decoder_transformer(x, output_attentions, output_hidden_states, deterministic)
        audio, _ = self.decoder(outputs.last_hidden_state, lengths)
        audio = audio.swapaxes(1, 2)
        if padding_mask is not None:
            audio = audio[..., : padding_mask.shape[-1]]
        return FlaxMimiDecoderOutput(
            audio_values=audio, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _step_audio(self, state, x, active):
        """The next state, and the audio of the next frames of a stream, whose latents are channels last."""
        active = _all_rows(state) if active is None else active
        half = decoder_convolutions(self.config)
        histories = histories_by_name(half, state.histories, state.cache.length > 0, active)
        x = jnp.where(active[:, None, None], x, 0)
        if resamples(self.config):
            x, histories["upsample"] = self.upsample(x, None, histories["upsample"])
        cache, x = self.decoder_transformer.step(state.cache, x, active)
        audio, histories["decoder"] = self.decoder(x, None, histories["decoder"])
        return state.replace(histories=inputs_by_order(half, histories), cache=cache), audio.swapaxes(1, 2)


class FlaxMimiEncoderModule(_EncoderHalf, nn.Module):
    """From audio to latents; upstream ``MimiEncoderModel``."""

    config: MimiConfig
    dtype: DTypeLike = jnp.float32
    gradient_checkpointing: bool = False

    def setup(self):
        self._setup_encoder()

    def __call__(
        self,
        input_values: Float[Array, "batch channels samples"],
        padding_mask: Bool[Array, "batch ..."] | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        deterministic: bool = True,
    ) -> FlaxMimiEncoderModelOutput:
        latents, outputs = self._encode_latents(
            input_values, padding_mask, output_attentions, output_hidden_states, deterministic
        )
        return FlaxMimiEncoderModelOutput(
            latents=latents.swapaxes(1, 2), hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def encode_step(
        self,
        state: FlaxMimiEncoderState,
        input_values: Float[Array, "batch channels samples"],
        active: Bool[Array, "batch"] | None = None,
    ) -> tuple[FlaxMimiEncoderState, Float[Array, "batch hidden_size frames"]]:
        """The next state, and the latents of the next whole frames of a stream; see :class:`FlaxMimiModule`."""
        state, latents = self._step_latents(state, input_values, active)
        return state, latents.swapaxes(1, 2)


class FlaxMimiDecoderModule(_DecoderHalf, nn.Module):
    """From latents to audio; upstream ``MimiDecoderModel``."""

    config: MimiConfig
    dtype: DTypeLike = jnp.float32
    gradient_checkpointing: bool = False

    def setup(self):
        self._setup_decoder()

    def __call__(
        self,
        latents: Float[Array, "batch hidden_size frames"],
        padding_mask: Bool[Array, "batch ..."] | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        deterministic: bool = True,
    ) -> FlaxMimiDecoderOutput:
        latents = latents.swapaxes(1, 2)
        return self._decode_latents(latents, padding_mask, output_attentions, output_hidden_states, deterministic)

    def decode_step(
        self,
        state: FlaxMimiDecoderState,
        latents: Float[Array, "batch hidden_size frames"],
        active: Bool[Array, "batch"] | None = None,
    ) -> tuple[FlaxMimiDecoderState, Float[Array, "batch channels samples"]]:
        """The next state, and the audio of the next frames of a stream; see :class:`FlaxMimiModule`."""
        return self._step_audio(state, latents.swapaxes(1, 2), active)


class FlaxMimiModule(_EncoderHalf, _DecoderHalf, nn.Module):
    """The codec, without a half that the configuration drops; upstream ``MimiModel``."""

    config: MimiConfig
    dtype: DTypeLike = jnp.float32
    gradient_checkpointing: bool = False

    def setup(self):
        if self.config.encoder_config is not None:
            self._setup_encoder()
        if self.config.decoder_config is not None:
            self._setup_decoder()
        self.quantizer = FlaxMimiSplitResidualVectorQuantizer(self.config, self.dtype)

    def encode(
        self,
        input_values: Float[Array, "batch channels samples"],
        padding_mask: Bool[Array, "batch ..."] | None = None,
        num_quantizers: int | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        deterministic: bool = True,
    ) -> FlaxMimiEncoderOutput:
        """Codes of audio; ValueError if the configuration drops the encoder."""
        require_encoder(self.config)
        latents, outputs = self._encode_latents(
            input_values, padding_mask, output_attentions, output_hidden_states, deterministic
        )
        return FlaxMimiEncoderOutput(
            audio_codes=self.quantizer.encode(latents, num_quantizers),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def decode(
        self,
        audio_codes: Int[Array, "batch num_quantizers frames"],
        padding_mask: Bool[Array, "batch ..."] | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        deterministic: bool = True,
    ) -> FlaxMimiDecoderOutput:
        """Audio of codes; ValueError if the configuration drops the decoder."""
        require_decoder(self.config)
        latents = self.quantizer.decode(audio_codes).astype(self.dtype)
        return self._decode_latents(latents, padding_mask, output_attentions, output_hidden_states, deterministic)

    def encode_step(
        self,
        state: FlaxMimiEncoderState,
        input_values: Float[Array, "batch channels samples"],
        active: Bool[Array, "batch"] | None = None,
        num_quantizers: int | None = None,
    ) -> tuple[FlaxMimiEncoderState, Int[Array, "batch num_quantizers frames"]]:
        """The next state, and the codes of the next whole frames of a stream.

        Rows that are not ``active`` keep their state (but for the ring's slot that their next step writes), and their
        codes mean nothing.
        """
        require_encoder(self.config)
        state, latents = self._step_latents(state, input_values, active)
        return state, self.quantizer.encode(latents, num_quantizers)

    def encode_features_step(
        self,
        state: FlaxMimiEncoderState,
        features: Float[Array, "batch steps hidden_size"],
        active: Bool[Array, "batch"],
        num_quantizers: int | None = None,
    ) -> tuple[FlaxMimiEncoderState, Int[Array, "batch num_quantizers frames"]]:
        """What :meth:`encode_step` does after :meth:`convolve_step`, whose histories the states here lack."""
        state, latents = self._transform_step(state, features, active)
        return state, self.quantizer.encode(latents, num_quantizers)

    def decode_step(
        self,
        state: FlaxMimiDecoderState,
        audio_codes: Int[Array, "batch num_quantizers frames"],
        active: Bool[Array, "batch"] | None = None,
    ) -> tuple[FlaxMimiDecoderState, Float[Array, "batch channels samples"]]:
        """The next state, and the audio of the next frames of a stream; ``active`` as for :meth:`encode_step`."""
        require_decoder(self.config)
        latents = self.quantizer.decode(audio_codes).astype(self.dtype)
        return self._step_audio(state, latents, active)

    def __call__(
        self,
        input_values: Float[Array, "batch channels samples"] | None = None,
        padding_mask: Bool[Array, "batch ..."] | None = None,
        num_quantizers: int | None = None,
        audio_codes: Int[Array, "batch num_quantizers frames"] | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        deterministic: bool = True,
    ) -> FlaxMimiOutput:
        """Codes of the audio, unless they are given, and the audio of the codes, cut to the length of the input.

        ``init`` takes no input and returns no output: it calls the halves that there are.
        """
        if self.is_initializing():
            self._reach_all_parameters()
            return FlaxMimiOutput()
        flags = (output_attentions, output_hidden_states, deterministic)
        encoded = FlaxMimiEncoderOutput(audio_codes=audio_codes)
        if audio_codes is None:
            assert input_values is not None
            encoded = self.encode(input_values, padding_mask, num_quantizers, *flags)
            audio_codes = encoded.audio_codes
        assert audio_codes is not None
        decoded = self.decode(audio_codes, padding_mask, *flags)
        audio_values = decoded.audio_values
        assert audio_values is not None
        if input_values is not None and padding_mask is None:
            audio_values = audio_values[..., : input_values.shape[-1]]
        return FlaxMimiOutput(
            audio_codes=encoded.audio_codes,
            audio_values=audio_values,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
        )

    def _reach_all_parameters(self) -> None:
        config = self.config
        if config.encoder_config is not None:
            self.encode(jnp.zeros((1, config.audio_channels, 1), self.dtype))
        if config.decoder_config is not None:
            self.decode(jnp.zeros((1, config.num_quantizers, 1), jnp.int32))
