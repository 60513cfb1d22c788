"""The training of a codec on the trainer of Moshi: what differs is what is trained, on what, and how it is judged."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console
from transformers import MimiConfig

from ...checkpoints.configs import load_config
from ...checkpoints.files import Source
from ...modeling_flax_utils import FlaxPreTrainedModel
from ...models.mimi import FlaxMimiModel
from ...partitioning import param_shardings
from ..configuration import ConfigurationError
from ..data.loading import Loader
from ..optimizer import make_optimizer
from ..run_logging import METRICS
from ..train_state import TrainState, split_params, split_paths
from ..trainer import Loop, Trainer, explained, in_all, placed
from .configuration import CodecTrainingConfig, crop_samples, frame_samples
from .evaluation import add_sums, sample_figures, write_samples
from .quantizer import BRANCHES, CODEBOOKS, is_started, started, unstarted
from .recordings import CropMaker, CropPlan, RecordingSet, Teacher, evaluation_crops, open_recordings
from .run_folder import CodecRunFolder
from .step import (
    DISTILLATION,
    Codec,
    codec_metrics,
    create_codec_state,
    make_codec_eval_step,
    make_codec_train_step,
    phase_of,
)
from .teacher import TransformersTeacher

logger = logging.getLogger(__name__)


class CodecTrainer(Trainer):
    """A run that trains a Mimi; see :class:`Trainer`.

    Args:
        config: what to train.
        notes: where people are told of the progress; the standard error by default.
        teacher: instead of ``distillation.teacher``: a function of audio ``(rows, samples)`` float32 at the codec's
            rate, in [-1, 1], that gives features ``(rows, frames, dim)``, one vector a frame of the codec. With
            ``data.workers``, processes must be able to import it.
    """

    folder_class = CodecRunFolder
    folder: CodecRunFolder

    def __init__(self, config: CodecTrainingConfig, notes: Console | None = None, teacher: Teacher | None = None):
        self._teacher = teacher
        super().__init__(config, notes)

    # What is trained, and on what

    def _opened(self) -> Any:
        explained("run.output_dir", lambda: self.folder.check(self.config))
        resumes = self.folder.has_checkpoints()
        key = "model.path" if self.config.model.path is not None else "model.config"
        self._mimi: MimiConfig = explained(
            key, self.folder.load_config if resumes else lambda: self._source_and_config()[1]
        )
        explained(key, lambda: frame_samples(self._mimi))
        if self._mimi.encoder_config is None or self._mimi.decoder_config is None:
            raise ConfigurationError(f"`{key}`: a half of this codec is dropped; both are trained together")
        self._samples = explained("data.crop_seconds", lambda: crop_samples(self.config, self._mimi))
        self._codec = Codec(self._mimi, self.config)
        self._features = explained("distillation.teacher", self._checked_teacher)
        return super()._opened()

    def _source_and_config(self) -> tuple[Source, MimiConfig]:
        source = self._source()
        return source, load_config(MimiConfig, source)

    def _checked_teacher(self) -> int | None:
        """The size of the teacher's features; None without a teacher."""
        settings, mimi = self.config.distillation, self._mimi
        if not self.config.losses.distillation:
            if self._teacher is not None:
                raise ValueError("a teacher is given, but losses.distillation has no weight; give it one")
            return None
        if self._teacher is None:
            if settings.teacher is None:
                raise ValueError("losses.distillation has a weight, but there is no teacher; give one")
            self._teacher = TransformersTeacher(settings.teacher, settings.layer, mimi.sampling_rate, mimi.frame_rate)
        frames = self._samples // frame_samples(mimi)
        found = np.asarray(self._teacher(np.zeros((1, self._samples), np.float32)))
        if found.ndim != 3 or found.shape[:2] != (1, frames):
            raise ValueError(
                f"the teacher gives features of the shape {found.shape} for {self._samples} samples, which are "
                f"{frames} frames: they must be (rows, {frames}, dim), {mimi.frame_rate:g} a second"
            )
        return found.shape[-1]

    def _open(self, path: str) -> RecordingSet:
        return open_recordings(path, self._mimi.audio_channels, self.config.data.least_seconds)

    def _new_model(self) -> tuple[FlaxMimiModel, Mapping[str, Any]]:
        config = self.config.model

        def loaded() -> tuple[FlaxMimiModel, Mapping[str, Any], Source]:
            source, mimi = self._source_and_config()
            if config.path is not None:
                model, params = FlaxMimiModel.from_pretrained(
                    config.path, dtype=self._codec.dtype, param_dtype=jnp.float32, sharding=self._mesh, _do_init=False
                )
                model._refuse_quantized("training")
                return model, dict(params), source
            model = FlaxMimiModel(mimi, seed=self.config.run.seed, dtype=self._codec.dtype, _do_init=False)
            model._refuse_quantized("training")
            drawn = dict(model.init_weights(model.key))
            drawn["quantizer"] = unstarted(drawn["quantizer"])
            shardings = param_shardings(self._mesh, model.params_shape_tree)
            return model, jax.tree.map(placed, drawn, shardings), source

        model, params, source = explained("model.path" if config.path is not None else "model.config", loaded)
        if self._is_first:
            self.folder.keep_model(model, source)
        if self._features is not None:
            params = {**params, DISTILLATION: self._drawn_distillation()}
        return model, params

    def _drawn_distillation(self) -> Any:
        shape = (1, self._mimi.codebook_dim, self._features)
        key = jax.random.fold_in(jax.random.key(self.config.run.seed), 2)
        kernel = jax.random.normal(key, shape) * self._mimi.codebook_dim**-0.5
        sharding = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
        return {"kernel": placed(kernel, sharding)}

    def _shapes(self, model: FlaxPreTrainedModel) -> Mapping[str, Any]:
        shapes = dict(model.params_shape_tree)
        if self._features is not None:
            kernel = jax.ShapeDtypeStruct((1, self._mimi.codebook_dim, self._features), jnp.float32)
            shapes[DISTILLATION] = {"kernel": kernel}
        return shapes

    def _check(self, model: FlaxPreTrainedModel) -> None:
        pass  # all has been checked

    def _splitting(self, model: FlaxPreTrainedModel) -> Callable[[Any], tuple[dict[str, Any], dict[str, Any]]]:
        return self._split

    def _split(self, params: Mapping[str, Any], adapter: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        return split_params(params, self.config.model.freeze)

    def _optimizer(self, trained: Mapping[str, Any]) -> tuple[Any, Any]:
        weights, _ = split_paths(trained, (CODEBOOKS,))
        return make_optimizer(self.config.optimizer, self.config.run.steps, weights)

    def _creation(self, model: FlaxPreTrainedModel, optimizer: Any) -> Callable[[Any, Any], TrainState]:
        return partial(create_codec_state, codec=self._codec, optimizer=optimizer, seed=self.config.run.seed)

    # Data

    def _rows(self, batch_size: int) -> tuple[int, int]:
        share = batch_size // jax.process_count()
        return jax.process_index() * share, (jax.process_index() + 1) * share

    def _loader(self, model: FlaxPreTrainedModel, data: RecordingSet, epochs: int | None) -> Loader:
        settings, seed = self.config.data, self.config.run.seed
        rate = self._mimi.sampling_rate
        plan = CropPlan(data, batch_size=settings.batch_size, samples=self._samples, sampling_rate=rate, seed=seed)
        self._maker = CropMaker(
            data,
            plan,
            self._rows(settings.batch_size),
            self._samples,
            rate,
            settings.gain_db,
            settings.noise_probability,
            settings.noise_snr_db,
            self._teacher,
        )
        return Loader(self._maker, epochs, settings.workers, prefetch=4)

    def _tell_dropped(self, loader: Loader) -> None:
        for key, data in (("data.train", self._train_data), ("data.evaluation", self._held_out)):
            if data is None:
                continue
            self._say(f"{key}: {len(data)} recordings, {data.seconds / 3600:.2f} hours")
            for name, reason in list(data.skipped.items())[:10]:
                self._say(f"{key}: {name} is skipped: {reason}")
            if len(data.skipped) > 10:
                self._say(f"{key}: {len(data.skipped) - 10} more are skipped")

    # Steps

    def _train_step(self, model: FlaxPreTrainedModel, optimizer: Any, schedule: Any, shardings: Any) -> Any:
        @cache
        def compiled(phase: Any) -> Any:
            return make_codec_train_step(self._codec, phase, optimizer, schedule, state_shardings=shardings)

        return lambda step: compiled(phase_of(self.config, step))

    def _evaluation(self, model: FlaxPreTrainedModel, shardings: Any) -> CodecEvaluation:
        return CodecEvaluation(self, shardings)

    def _loop(self, *parts: Any) -> Loop:
        return CodecLoop(*parts)

    def start_codebooks(self, state: TrainState, position: int) -> TrainState:
        """The state with codebooks that k-means has found in the latents of the next batches of training.

        Args:
            state: after the last step.
            position: how many batches have been handed out.
        """
        settings = self.config.quantizer
        encode = jax.jit(self._codec.encode)
        params, found = state.all_params, []
        for number in range(position, position + settings.kmeans_batches):
            batch = in_all(lambda number=number: explained("data.train", lambda: self._maker(number)))
            latents = encode(params, self._put({"audio": batch["audio"]})["audio"])
            found.append(_gathered(latents).reshape(-1, self._mimi.hidden_size))
        quantizer = jax.tree.map(_gathered, params["quantizer"])
        projections, _ = split_paths(state.params, (r"quantizer/.*_proj/.*",), matching=True)
        ties = len(jax.tree.leaves(projections)) in (0, 2 * len(BRANCHES))
        start = partial(started, seed=self.config.run.seed, ties=ties)
        made = explained(
            "quantizer.kmeans_batches",
            lambda: start(quantizer, np.concatenate(found), len(found[0]), settings.kmeans_iterations),
        )
        trained, _ = self._split({**params, "quantizer": made})
        self._say(f"codebooks started from {sum(map(len, found))} latents of {settings.kmeans_batches} batches")

        def put(old: jax.Array, new: Any) -> jax.Array:
            return new if new is old else placed(new, old.sharding)

        return state.replace(params=jax.tree.map(put, state.params, trained))


def _gathered(leaf: jax.Array) -> np.ndarray:
    if jax.process_count() == 1:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


class CodecLoop(Loop):
    """Steps whose program changes, and codebooks that are started in between."""

    _trainer: CodecTrainer
    _is_started = False

    def _advanced(self, state: TrainState, batch: Any, step: int) -> tuple[TrainState, dict[str, Any]]:
        trainer = self._trainer
        if not self._is_started and step >= trainer.config.quantizer.start_step:
            _, codebooks = split_paths(state.params, (CODEBOOKS,))
            if not is_started(jax.tree.map(_gathered, state.all_params["quantizer"])):
                if not codebooks:
                    raise ConfigurationError(
                        "`model.freeze`: it freezes codebooks that hold nothing yet; leave them out"
                    )
                with self._expendable(step):
                    state = trainer.start_codebooks(state, self._loader.position)
            self._is_started = True
        return self._train_step(step)(state, batch)

    def _is_long(self, step: int) -> bool:
        return not self._is_started and step == self._trainer.config.quantizer.start_step


class CodecEvaluation:
    """Held-out crops, and whole recordings as samples.

    Raises:
        ValueError: the first batch cannot be made.
    """

    def __init__(self, trainer: CodecTrainer, shardings: Any):
        self._trainer, self._shardings = trainer, shardings
        settings, mimi = trainer.config.data, trainer._mimi
        rows = settings.batch_size // trainer.config.run.accumulation_steps
        self._batches = evaluation_crops(
            trainer._held_out,
            batch_size=rows,
            samples=trainer._samples,
            sampling_rate=mimi.sampling_rate,
            most=settings.evaluation_crops,
            rows=trainer._rows(rows),
            teacher=trainer._teacher,
        )
        self._batches[0]()

    @cache  # noqa: B019 - there is one for a run
    def _step(self, phase: Any) -> Any:
        return make_codec_eval_step(self._trainer._codec, phase, state_shardings=self._shardings)

    def __call__(self, state: TrainState, step: int, heed: Callable[[], None]) -> dict[str, float]:
        """The metrics; ``heed`` is called before every batch and before the samples, and may raise."""
        trainer = self._trainer
        phase = phase_of(trainer.config, step - 1)
        phase = dataclasses.replace(phase, trains_encoder=True, is_judged=False)

        def batches() -> Iterator[Any]:
            for make in self._batches:
                heed()
                yield trainer._put(explained("data.evaluation", make))

        metrics = codec_metrics(add_sums(self._step(phase), state, batches()), trainer._codec)
        if trainer.config.run.samples:
            heed()
            metrics |= self._listen(state, step, phase.quantizes)
        if phase.quantizes and trainer._is_first:
            self._tell_collapse(metrics, step)
        return metrics

    def _listen(self, state: TrainState, step: int, quantizes: bool) -> dict[str, float]:
        trainer = self._trainer
        params = jax.tree.map(_gathered, state.all_params)
        recordings = trainer._held_out.recordings
        numbers = np.linspace(0, len(recordings) - 1, min(trainer.config.run.samples, len(recordings)))
        chosen = [recordings[number] for number in numbers.round().astype(int)]
        most = trainer.config.run.sample_frames * frame_samples(trainer._mimi)
        samples = sample_figures(trainer._codec, params, chosen, most, quantizes)
        folder = trainer.folder.path / "samples" / f"step-{step}"
        in_all(lambda: write_samples(samples, folder, trainer._mimi.sampling_rate) if trainer._is_first else None)
        names = {name for sample in samples for name, value in sample.record.items() if isinstance(value, float)}
        means = {}
        for name in sorted(names - {"seconds"}):
            values = [sample.record[name] for sample in samples if name in sample.record]
            means[f"sample_{name}" if name == "si_sdr" else name] = float(np.mean(values))
        return means

    def _tell_collapse(self, metrics: Mapping[str, float], step: int) -> None:
        settings = self._trainer.config.quantizer
        told = list(_evaluations(self._trainer.folder.path / METRICS, step))[-(settings.patience - 1) :]
        history = [*(told if settings.patience > 1 else ()), metrics]
        if len(history) < settings.patience:
            return
        number = 0
        while (name := f"usage_{number}") in metrics:
            if all(each.get(name, 1.0) < settings.least_usage for each in history):
                text = (
                    f"codebook {number} has collapsed: it used {metrics[name]:.1%} of its entries, and less than "
                    f"quantizer.least_usage = {settings.least_usage:.0%} in {settings.patience} evaluations in a row. "
                    "Lower losses.commitment or optimizer.learning_rate, raise quantizer.dead_share, or train an "
                    "autoencoder first (quantizer.start_step)"
                )
                logger.error(text)
                self._trainer._say(text)
            number += 1


def _evaluations(path: Path, before: int) -> Iterator[dict[str, float]]:
    """The evaluations in ``metrics.jsonl`` of steps before that one."""
    if path.exists():
        for line in path.read_text("utf-8").splitlines():
            record = json.loads(line)
            if record["split"] == "evaluation" and record["step"] < before:
                yield record
