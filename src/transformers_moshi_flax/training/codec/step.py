"""One step of a codec's training as one program: gradients, the update, codebooks, discriminators.

As in :mod:`~transformers_moshi_flax.training.train_step`, a step whose loss or gradients are not finite changes
nothing. The gradient goes from the decoder's latents to the encoder's past the codebooks; these follow the latents by
moving averages of sums over all devices and micro-batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from transformers import MimiConfig

from ...models.mimi.modules_flax_mimi import FlaxMimiDecoderModule, FlaxMimiEncoderModule
from ...models.mimi.topology import samples_per_frame
from ...ops.precision import at_least_float32
from ..train_state import TrainState, merge_params, split_paths
from ..train_step import compiler_options, counted, in_micro_batches, on_mesh
from .configuration import CodecTrainingConfig
from .discriminator import (
    MultiScaleSTFTDiscriminator,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
)
from .losses import cosine_distance, reconstruction_losses, si_sdr, spectral_distances, weighted
from .quantizer import (
    BEFORE_THE_CODEBOOKS,
    CODEBOOKS,
    Quantized,
    code_figures,
    project,
    quantize,
    quantized_codes,
    unquantized,
    updated,
)

ENCODER, DECODER = ("encoder", "encoder_transformer", "downsample"), ("upsample", "decoder_transformer", "decoder")

DISTILLATION = "distillation"
"""Name of the layer from codebook 0 to a teacher's features, which is trained but no part of the codec."""


class CodecTrainState(TrainState):
    """As :class:`TrainState`, whose ``params`` have the codebooks as well, and whose ``opt_state`` has not.

    Attributes:
        discriminator: ``{"params": …, "opt_state": …}``, or None.
    """

    discriminator: Any = None


@dataclass(frozen=True)
class Phase:
    """What a step does, which changes once or twice in a run.

    Attributes:
        quantizes: whether there are codebooks.
        trains_encoder: whether what lies before them is trained.
        is_judged: by discriminators.
    """

    quantizes: bool
    trains_encoder: bool
    is_judged: bool


def phase_of(config: CodecTrainingConfig, step: int) -> Phase:
    """Of the step after ``step`` steps."""
    quantizes = step >= config.quantizer.start_step
    judged = config.losses.uses_discriminator and step >= config.discriminator.start_step
    return Phase(quantizes, config.quantizer.train_encoder or not quantizes, judged)


@dataclass(frozen=True, eq=False)
class Codec:
    """Mimi's halves, and what judges them; parameters are given with every call.

    Attributes:
        config: of Mimi.
        training: of the run.
    """

    config: MimiConfig
    training: CodecTrainingConfig

    @property
    def dtype(self) -> DTypeLike:
        """Of the computation."""
        return jnp.dtype(self.training.model.dtype)

    @property
    def frame_samples(self) -> int:
        """Samples of a frame."""
        return samples_per_frame(self.config)

    @property
    def discriminator(self) -> nn.Module:
        """All scales."""
        settings = self.training.discriminator
        return MultiScaleSTFTDiscriminator(settings.windows, settings.filters, self.dtype)

    def encode(
        self, params: Mapping[str, Any], audio: Float[Array, "rows channels samples"], rngs: Any = None
    ) -> Float[Array, "rows frames hidden_size"]:
        """Latents."""
        module = FlaxMimiEncoderModule(self.config, self.dtype, self.training.model.gradient_checkpointing)
        audio = audio.astype(self.dtype)
        outputs = _applied(module, _parts(params, ENCODER), audio, deterministic=rngs is None, rngs=rngs)
        return outputs.latents.swapaxes(1, 2)

    def decode(
        self, params: Mapping[str, Any], latents: Float[Array, "rows frames hidden_size"], rngs: Any = None
    ) -> Float[Array, "rows channels samples"]:
        """Audio."""
        module = FlaxMimiDecoderModule(self.config, self.dtype, self.training.model.gradient_checkpointing)
        latents = latents.astype(self.dtype).swapaxes(1, 2)
        outputs = _applied(module, _parts(params, DECODER), latents, deterministic=rngs is None, rngs=rngs)
        return outputs.audio_values


def _parts(params: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: params[name] for name in names if name in params}


def _applied(module: nn.Module, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """What the module returns; without variables that change, ``apply`` returns nothing else."""
    return module.apply({"params": params}, *args, **kwargs)


def create_codec_state(
    params: Mapping[str, Any],
    frozen: Mapping[str, Any],
    *,
    codec: Codec,
    optimizer: optax.GradientTransformation,
    seed: int,
) -> CodecTrainState:
    """The state before the first step; arguments as of ``create_train_state``."""
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, at_least_float32(leaf.dtype)), dict(params))
    weights, _ = split_paths(params, (CODEBOOKS,))
    key = jax.random.key(seed)
    discriminator = None
    if codec.training.losses.uses_discriminator:
        samples = 2 * max(codec.training.discriminator.windows)
        audio = jnp.zeros((1, codec.config.audio_channels, samples))
        drawn = codec.discriminator.init(jax.random.fold_in(key, 1), audio)["params"]
        discriminator = {"params": drawn, "opt_state": discriminator_optimizer(codec.training).init(drawn)}
    zero = jnp.zeros((), jnp.int32)
    return CodecTrainState(
        step=zero,
        params=params,
        frozen_params=jax.tree.map(jnp.asarray, dict(frozen)),
        opt_state=optimizer.init(weights),
        rng=jax.random.key_data(key),
        bad_steps=jnp.zeros_like(zero),
        bad_steps_in_a_row=jnp.zeros_like(zero),
        discriminator=discriminator,
    )


def discriminator_optimizer(config: CodecTrainingConfig) -> optax.GradientTransformation:
    """Of the discriminators."""
    settings = config.discriminator
    return optax.adam(settings.learning_rate, settings.b1, settings.b2)


def make_codec_train_step(
    codec: Codec,
    phase: Phase,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Callable[[Any], Array],
    *,
    state_shardings: Any = None,
) -> Callable[[CodecTrainState, Mapping[str, Any]], tuple[CodecTrainState, dict[str, Array]]]:
    """Compiles (at the first call) a step of training.

    Args:
        codec: what is trained, and how.
        phase: what the step does.
        optimizer, schedule: from ``make_optimizer``.
        state_shardings: as of ``make_train_step``.

    Returns:
        A function ``(state, batch) -> (state, metrics)`` that consumes its state. The metrics are ``loss`` and its
        parts before the update, ``perplexity`` (of the codes of the step, averaged over codebooks), ``frames``, and
        those that ``make_train_step`` has of every step.
    """
    parts = codec.training.run.accumulation_steps

    def step(state: CodecTrainState, batch: Mapping[str, Any]) -> tuple[CodecTrainState, dict[str, Array]]:
        batch = {name: jnp.asarray(array) for name, array in batch.items()}
        step_key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

        def gradients_of(part: Mapping[str, Any], index: Any) -> Gradients:
            return micro_batch_gradients(codec, phase, state, part, step_key, index)

        found = gradients_of(batch, 0) if parts == 1 else _added(gradients_of, batch, parts)
        losses = found.losses
        grad_norm = optax.tree.norm(found.weights)
        finite = jnp.isfinite(losses["loss"]) & jnp.isfinite(grad_norm)
        if phase.is_judged:
            finite &= jnp.isfinite(losses["discriminator"]) & jnp.isfinite(optax.tree.norm(found.judges))
        learning_rate = schedule(state.step - state.bad_steps)

        def update(round: Any, values: Any) -> Any:
            return _updated_values(codec, phase, optimizer, found, grad_norm, state.step, values)

        values = (state.params, state.opt_state, state.discriminator)
        params, opt_state, discriminator = jax.lax.fori_loop(0, finite.astype(jnp.int32), update, values)
        state, counts = counted(state, finite, jnp.isfinite(losses["loss"]))
        state = state.replace(params=params, opt_state=opt_state, discriminator=discriminator)
        frames = batch["audio"].shape[0] * batch["audio"].shape[-1] // codec.frame_samples
        metrics = {**losses, "frames": jnp.asarray(frames, jnp.int32), "grad_norm": grad_norm}
        if found.statistics is not None:
            metrics["perplexity"] = jnp.mean(_perplexity(found.statistics.counts))
        return state, {**metrics, "learning_rate": learning_rate, **counts}

    outputs: dict[str, Any] = {} if state_shardings is None else {"out_shardings": (state_shardings, None)}
    return jax.jit(on_mesh(step, state_shardings), donate_argnums=0, compiler_options=compiler_options(), **outputs)


class Gradients(NamedTuple):
    """Of a micro-batch, or of a whole batch.

    Attributes:
        weights: gradients of what the optimizer moves.
        judges: those of the discriminator, or None.
        losses: by name, and their sum as ``loss``.
        statistics: of the codebooks' entries, or None.
    """

    weights: Any
    judges: Any
    losses: dict[str, Array]
    statistics: Any


def micro_batch_gradients(
    codec: Codec, phase: Phase, state: CodecTrainState, part: Mapping[str, Any], step_key: Array, index: Any
) -> Gradients:
    """Gradients and losses of a micro-batch, each divided by the number of micro-batches.

    Args:
        codec, phase: as of :func:`make_codec_train_step`.
        state: the state before the step.
        part: the micro-batch.
        step_key: of the step.
        index: which micro-batch of the step it is.
    """
    parts = codec.training.run.accumulation_steps
    weights, codebooks = split_paths(state.params, (CODEBOOKS,))
    judges = None if state.discriminator is None else state.discriminator["params"]

    def loss_of(weights: Any) -> tuple[Array, Any]:
        params = merge_params(merge_params(weights, codebooks), state.frozen_params)
        losses, statistics, spoken = _losses(codec, phase, params, judges, part, jax.random.fold_in(step_key, index))
        loss = weighted(losses, codec.training.losses)
        sums = {"loss": loss, **losses}
        return loss / parts, (jax.tree.map(lambda leaf: leaf / parts, sums), statistics, spoken)

    gradients, (sums, statistics, spoken) = jax.grad(loss_of, has_aux=True)(weights)
    if statistics is not None:
        # what replaces dead entries comes from the first micro-batch
        candidates = jnp.where(index == 0, statistics.candidates, 0)
        statistics = jax.lax.stop_gradient(statistics._replace(candidates=candidates))
    if not phase.is_judged:
        return Gradients(gradients, None, sums, statistics)

    def judged(judges: Any) -> Array:
        real = _applied(codec.discriminator, judges, part["audio"])
        fake = _applied(codec.discriminator, judges, jax.lax.stop_gradient(spoken))
        return discriminator_loss(real, fake) / parts

    lost, judge_gradients = jax.value_and_grad(judged)(judges)
    return Gradients(gradients, judge_gradients, {**sums, "discriminator": lost}, statistics)


def _losses(
    codec: Codec, phase: Phase, params: Any, judges: Any, part: Mapping[str, Any], key: Array
) -> tuple[dict[str, Array], Any, Array]:
    """The losses of a micro-batch by name, the statistics of the codebooks' entries, and what was spoken."""
    training, settings, audio = codec.training, codec.training.losses, part["audio"]
    quantizer_key, dropout_key = jax.random.split(key)
    latents = codec.encode(params, audio, {"dropout": dropout_key} if phase.trains_encoder else None)
    losses: dict[str, Array] = {}
    statistics = None
    if phase.quantizes:
        if not phase.trains_encoder:
            latents = jax.lax.stop_gradient(latents)
        found = quantize(params["quantizer"], latents, codec.config, training.quantizer, quantizer_key)
        latents, statistics = found.latents, found.statistics
        if settings.commitment and phase.trains_encoder:
            losses["commitment"] = jnp.mean(found.commitment)
        if settings.distillation:
            losses["distillation"] = _distance_to_teacher(params, found, part)
    else:
        latents = unquantized(params["quantizer"], latents)
    spoken = codec.decode(params, latents, {"dropout": dropout_key})
    losses |= {
        name: jnp.mean(rows)
        for name, rows in reconstruction_losses(spoken, audio, settings, codec.config.sampling_rate).items()
        if getattr(settings, name)
    }
    if phase.is_judged:
        real = _applied(codec.discriminator, judges, audio)
        fake = _applied(codec.discriminator, judges, spoken)
        losses["adversarial"] = adversarial_loss(fake)
        if settings.feature_matching:
            losses["feature_matching"] = feature_matching_loss(real, fake)
    return losses, statistics, spoken


def _added(
    gradients_of: Callable[[Mapping[str, Any], Any], Gradients], batch: Mapping[str, Array], parts: int
) -> Gradients:
    """The sums over the micro-batches of a batch."""
    micro_batches = jax.tree.map(lambda array: in_micro_batches(array, parts), batch)
    first = jax.tree.map(lambda array: array[0], micro_batches)
    shapes = jax.eval_shape(gradients_of, first, 0)
    zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), shapes)

    def add(added: Gradients, part_and_index: Any) -> tuple[Gradients, None]:
        return jax.tree.map(jnp.add, added, gradients_of(*part_and_index)), None

    sums, _ = jax.lax.scan(add, zeros, (micro_batches, jnp.arange(parts, dtype=jnp.int32)))
    return sums


def _updated_values(
    codec: Codec,
    phase: Phase,
    optimizer: optax.GradientTransformationExtraArgs,
    found: Gradients,
    grad_norm: Array,
    step: Array,
    values: tuple[Any, Any, Any],
) -> tuple[Any, Any, Any]:
    """Parameters, state of the optimizer and discriminator after a step."""
    training = codec.training
    params, opt_state, discriminator = values
    weights, codebooks = split_paths(params, (CODEBOOKS,))
    with jax.numpy_dtype_promotion("standard"):  # optax mixes floats and counts
        updates, opt_state = optimizer.update(found.weights, opt_state, weights, grad_norm=grad_norm)
        if not phase.trains_encoder:  # nor do old gradients move it, or weight decay
            before, after = split_paths(updates, (BEFORE_THE_CODEBOOKS,), matching=True)
            updates = merge_params(jax.tree.map(jnp.zeros_like, before), after)
    weights = optax.apply_updates(weights, updates)
    if found.statistics is not None and codebooks:
        replaces = (step + 1) % training.quantizer.replace_every == 0
        moved = updated(codebooks["quantizer"], found.statistics, codec.config, training.quantizer, replaces)
        codebooks = {"quantizer": moved}
    if phase.is_judged:
        with jax.numpy_dtype_promotion("standard"):
            changes, judge_state = discriminator_optimizer(training).update(
                found.judges, discriminator["opt_state"], discriminator["params"]
            )
        moved = optax.apply_updates(discriminator["params"], changes)
        discriminator = {"params": moved, "opt_state": judge_state}
    return merge_params(weights, codebooks), opt_state, discriminator


def make_codec_eval_step(
    codec: Codec, phase: Phase, *, state_shardings: Any = None
) -> Callable[[CodecTrainState, Mapping[str, Any]], dict[str, Array]]:
    """Compiles the evaluation of a batch, ``(state, batch) -> sums``, without dropout and bypass.

    The sums of all batches are to be added, then :func:`codec_metrics` makes the figures of the whole split. Rows
    whose weight is 0 add nothing.
    """
    settings, rate = codec.training.losses, codec.config.sampling_rate

    def step(state: CodecTrainState, batch: Mapping[str, Any]) -> dict[str, Array]:
        params = state.all_params
        audio, weights = jnp.asarray(batch["audio"]), jnp.asarray(batch["weights"])
        latents = codec.encode(params, audio)
        sums: dict[str, Array] = {}
        if phase.quantizes:
            codes = quantized_codes(params["quantizer"], latents, codec.config)
            hits = jax.nn.one_hot(codes, codec.config.codebook_size, dtype=jnp.float32)
            sums["counts"] = jnp.einsum("rkte,r->ke", hits, weights)
            plain = dataclasses.replace(codec.training.quantizer, dropout=0.0, bypass=0.0)
            found = quantize(params["quantizer"], latents, codec.config, plain, jax.random.key(0))
            latents = found.latents
            if settings.distillation:
                sums["distillation"] = jnp.sum(weights * _teacher_distances(params, found, batch))
        else:
            latents = unquantized(params["quantizer"], latents)
        spoken = codec.decode(params, latents).astype(jnp.float32)
        rows = spectral_distances(spoken, audio, settings, rate)
        rows |= reconstruction_losses(spoken, audio, settings, rate)
        rows["si_sdr"] = si_sdr(spoken, audio)
        audible = jnp.where(jnp.max(jnp.abs(audio), axis=(1, 2)) > 0, weights, 0)
        sums |= {name: jnp.sum(values * (audible if name == "si_sdr" else weights)) for name, values in rows.items()}
        return {**sums, "rows": jnp.sum(weights), "audible": jnp.sum(audible)}

    return jax.jit(on_mesh(step, state_shardings))


def codec_metrics(sums: Mapping[str, Any], codec: Codec) -> dict[str, float]:
    """From the added sums of :func:`make_codec_eval_step`.

    Returns:
        ``loss`` (of the distances between waveforms, and to the teacher), its parts, ``si_sdr`` in dB, ``seconds`` of
        audio; and of every codebook k ``usage_k`` (the share of entries that occur) and ``perplexity_k``.
    """
    settings = codec.training.losses
    rows = max(float(sums["rows"]), 1.0)
    names = [name for name in sums if name not in ("counts", "rows", "audible", "si_sdr")]
    means = {name: float(sums[name]) / rows for name in names}
    loss = sum(getattr(settings, name) * value for name, value in means.items())
    metrics = {"loss": loss, **means, "si_sdr": float(sums["si_sdr"]) / max(float(sums["audible"]), 1.0)}
    if "counts" in sums:
        figures = code_figures(sums["counts"])
        for name, values in figures.items():
            metrics |= {f"{name}_{number}": value for number, value in enumerate(values)}
            metrics[name] = sum(values) / len(values)
    return metrics


def _teacher_distances(params: Mapping[str, Any], found: Quantized, batch: Mapping[str, Any]) -> Float[Array, "rows"]:
    features = jnp.asarray(batch["features"])
    ours = project(params, DISTILLATION, found.semantic)
    return cosine_distance(ours, features.astype(ours.dtype))


def _distance_to_teacher(params: Mapping[str, Any], found: Quantized, batch: Mapping[str, Any]) -> Float[Array, ""]:
    return jnp.mean(_teacher_distances(params, found, batch))


def _perplexity(counts: Float[Array, "codebooks entries"]) -> Float[Array, "codebooks"]:
    shares = counts / jnp.maximum(counts.sum(axis=1, keepdims=True), 1)
    return jnp.exp(-jnp.sum(jnp.where(shares > 0, shares * jnp.log(jnp.where(shares > 0, shares, 1)), 0), axis=1))
