"""The loop: builds everything that a configuration names, goes on where a run was left, and ends with an export.

The host runs ahead of the devices: it waits for them only where something is logged, evaluated or kept. So it learns
of steps that were not finite, and, with several processes, of signals, at the next line of the log.

A checkpoint is written before an evaluation, so that whatever ends the run there costs no step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.typing import ArrayLike
from rich.console import Console

from ..adapters.lora import with_leaves
from ..checkpoints.configs import load_config
from ..checkpoints.files import Source
from ..modeling_flax_utils import FlaxPreTrainedModel
from ..partitioning import param_shardings
from .adapter import TrainedAdapter
from .configuration import Configuration, ConfigurationError
from .data.loading import Loader, check_workers, make_loader
from .data.prepared import open_dataset
from .evaluation import evaluate, speak, write_samples
from .mesh import initialize_distributed, make_mesh, put_batch, state_shardings
from .objective import Objective, check_padding_ids
from .optimizer import make_optimizer
from .run_checkpoints import PARAMS, REST, RunCheckpoints
from .run_folder import RunFolder
from .run_logging import METRICS, RunLog, check_packages, has_evaluation
from .scanned_layers import stack_layers, unstack_layers
from .signals import Signals
from .train_state import TrainState, create_train_state, split_params
from .train_step import make_eval_step, make_train_step

logger = logging.getLogger(__name__)


class NotFiniteError(RuntimeError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


class Interrupted(RuntimeError):
    """A signal has ended the run, after a checkpoint if there is a step to keep.

    Attributes:
        signal: its number.
        step: of the checkpoint.
    """

    def __init__(self, number: int, step: int):
        kept = f"the checkpoint of step {step} is written; start it to go on" if step else "no step is made yet"
        super().__init__(f"{signal.Signals(number).name}: {kept}")
        self.signal = number
        self.step = step

    def __reduce__(self) -> tuple[Any, ...]:  # an exception is made of its message otherwise, where it is unpickled
        return Interrupted, (self.signal, self.step)


class Trainer:
    """A run of training. Only the first process logs and writes; all of them call :meth:`train`.

    Args:
        config: what to train.
        notes: where people are told of the progress; the standard error by default.

    Raises:
        ConfigurationError: the data, the model or the run folder do not go with the configuration.
        WorkerError: this process can have no ``data.workers``, as where a script has no guard for them.
    """

    folder_class = RunFolder
    counts = "frames"
    """The metric that the speed is told in."""

    def __init__(self, config: Configuration, notes: Console | None = None):
        self.config = cast(Any, config)  # what sections it has is known to the classes of the tasks
        check_workers(self.config.data.workers)
        self.folder = self.folder_class(self.config.run.output_dir)
        self._notes = notes
        distributed = self.config.distributed
        if distributed.num_processes is not None:
            initialize_distributed(**dataclasses.asdict(distributed))
        self._is_first = jax.process_index() == 0
        processes = distributed.num_processes or 1
        if jax.process_count() != processes:
            raise ConfigurationError(
                f"`distributed.num_processes`: the run has {processes}, but JAX {jax.process_count()}; leave "
                "jax.distributed.initialize to the section distributed"
            )
        self._mesh, self._train_data, self._held_out = in_all(self._opened)

    def _opened(self) -> tuple[Mesh, Any, Any | None]:
        config = self.config
        check_packages(config.run.tensorboard, config.run.wandb_project)
        explained("run.output_dir", lambda: self.folder.check(config))
        mesh = explained("mesh", lambda: make_mesh(**dataclasses.asdict(config.mesh)))
        train = explained("data.train", lambda: self._open(config.data.train))
        held_out = None
        if config.data.evaluation is not None:
            held_out = explained("data.evaluation", lambda: self._open(config.data.evaluation))
        return mesh, train, held_out

    def _open(self, path: str) -> Any:
        return open_dataset(path)

    def train(self) -> dict[str, float]:
        """Train to the last step, from the latest checkpoint that is whole, if there are any.

        Returns:
            The metrics of the held-out data after the last step, or of the last step if there are none; empty if the
            run had ended before.

        Raises:
            ConfigurationError: as the class; or another process trains in the same folder.
            DamagedCheckpointError: no checkpoint of the run is whole, or the weights that are not trained are not.
            Interrupted: SIGTERM or SIGINT; a checkpoint is written. A second one ends the process at once, and so does
                the first SIGTERM in a compilation or another long call, where nothing is lost.
            NotFiniteError: see the class.
            WorkerError: one of the ``data.workers`` has ended.
            OSError: the disk is full, or the like; the checkpoints before are kept.
        """

        def lock() -> None:
            if self._is_first:
                stack.enter_context(explained("run.output_dir", self.folder.lock))

        with contextlib.ExitStack() as stack:
            in_all(lock)
            return self._train(stack)

    def _train(self, stack: contextlib.ExitStack) -> dict[str, float]:
        config, run = self.config, self.config.run
        resumes = in_all(self._prepare_folder)
        model, params = in_all(self._resumed_model if resumes else self._new_model)
        self._check(model)
        shapes = self._shapes(model)
        split = self._splitting(model)
        trained, frozen = explained("model.freeze", lambda: jax.eval_shape(split, shapes))
        optimizer, schedule = explained("optimizer", lambda: self._optimizer(trained))
        create = self._creation(model, optimizer)
        state_shapes = jax.eval_shape(create, trained, frozen)
        shardings = explained("mesh", lambda: state_shardings(self._mesh, state_shapes))
        target = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state_shapes, shardings
        )
        loader = in_all(lambda: explained("data", lambda: self._loader(model, self._train_data, epochs=None)))
        stack.callback(loader.close)
        self._tell_dropped(loader)

        checkpoints = RunCheckpoints(self.folder.checkpoints, run.max_to_keep, run.best_metric)
        stack.callback(checkpoints.close)
        step, evaluated = 0, True
        if resumes:
            state, step, progress = self._restored(checkpoints, target)
            evaluated = progress["evaluated"] or self._has_evaluated(step)
            explained("data.train", lambda: loader.set_state(progress["data"]))
            self._say(f"going on from the checkpoint of step {step}")
        else:
            create = jax.jit(create, out_shardings=shardings, donate_argnums=(0, 1))
            parts = split(params)
            del params  # with scanned layers a copy; the moments come next
            state = create(*parts)
            self._keep_frozen(state)
        if self._is_first:
            self.folder.begin(config, step)
        train_step = self._train_step(model, optimizer, schedule, shardings)
        evaluation = None
        if self._held_out is not None:
            evaluation = in_all(lambda: explained("data.evaluation", lambda: self._evaluation(model, shardings)))
        log = self._log(step)
        with log or contextlib.nullcontext(), Signals() as signals:
            loop = self._loop(self, log, checkpoints, loader, train_step, evaluation, signals)
            state, metrics = loop.run(state, step, evaluated)
        if self.folder.exported_step() != run.steps:
            self._export(state)
        return metrics

    # Beginning and going on

    def _prepare_folder(self) -> bool:
        """Whether the run goes on; if it does not, the folder is made ready to begin."""
        resumes = self.folder.has_checkpoints()
        if self._is_first:
            # another run may have been here since the folder was looked at, before it was locked
            explained("run.output_dir", lambda: self.folder.check(self.config))
            if not resumes:
                explained("run.output_dir", lambda: self.folder.begin_anew(self.config))
        return resumes

    def _source(self) -> Source:
        """Where the model lies that the run begins with."""
        settings = self.config.model
        if settings.path is not None:
            return Source.locate(settings.path)
        path = Path(settings.config)
        if path.is_file() and path.name != "config.json":
            raise ValueError(f"{settings.config!r} is not named config.json; rename it, or give a directory")
        return Source.locate(path.parent if path.is_file() else path)

    def _new_model(self) -> tuple[FlaxPreTrainedModel, Mapping[str, Any]]:
        """The model that the run begins with; what it takes to go on without its source is put into the folder."""
        config = self.config.model
        dtype = jnp.dtype(config.dtype)

        def loaded() -> tuple[FlaxPreTrainedModel, Mapping[str, Any], Source]:
            source = self._source()
            model_class = self.folder.model_class(source)
            if config.path is not None:
                # beside an adapter the weights stay as they are
                param_dtype = dtype if self.config.adapter.r is not None else jnp.float32
                model, params = model_class.from_pretrained(
                    config.path,
                    dtype=dtype,
                    param_dtype=param_dtype,
                    quantization=config.quantization_config(),
                    sharding=self._mesh,
                    _do_init=False,
                )
                if self.config.adapter.r is None:
                    model._refuse_quantized("training")
                return model, params, source
            model_config = load_config(model_class.known_configs(), source)
            model = model_class(model_config, seed=self.config.run.seed, dtype=dtype, _do_init=False)
            model._refuse_quantized("training")
            shardings = param_shardings(self._mesh, model.params_shape_tree)
            return model, jax.tree.map(placed, model.init_weights(model.key), shardings), source

        key = "model.path" if config.path is not None else "model.config"
        model, params, source = explained(key, loaded)
        if self._is_first:
            self.folder.keep_model(model, self._companions(source))
        if (adapter := self._adapter(model)) is not None:
            everywhere = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
            leaves = {path: placed(leaf, everywhere) for path, leaf in adapter.new_leaves().items()}
            params = with_leaves(params, leaves)
        return model, params

    def _companions(self, source: Source) -> Source:
        """Where the tokenizer lies of a model from ``source``."""
        return source

    def _adapter(self, model: FlaxPreTrainedModel) -> TrainedAdapter | None:
        """What is trained instead of the model."""
        if self.config.adapter.r is None:
            return None
        return explained("adapter", lambda: TrainedAdapter(self.config, model))

    def _resumed_model(self) -> tuple[FlaxPreTrainedModel, None]:
        return self.folder.load_model(dtype=jnp.dtype(self.config.model.dtype)), None

    def _keep_frozen(self, state: TrainState) -> None:
        if not jax.tree.leaves(state.frozen_params):
            return
        frozen = RunCheckpoints(self.folder.frozen)
        frozen.save(0, state.frozen_params, None, {})
        frozen.close()

    def _restored(self, checkpoints: RunCheckpoints, target: TrainState) -> tuple[TrainState, int, dict[str, Any]]:
        found = checkpoints.restore_latest({PARAMS: target.params, REST: _rest(target)})
        assert found is not None  # only a run with checkpoints is resumed
        steps = self.config.run.steps
        if found.step > steps:
            raise ConfigurationError(
                f"`run.steps`: {steps} is less than the {found.step} that are made already; "
                f"give {found.step} or more, or another run.output_dir"
            )
        kept = self.folder.restore_frozen(target.frozen_params)
        state = found.arrays[REST].replace(params=found.arrays[PARAMS], frozen_params=kept)
        return state, found.step, found.progress

    def _has_evaluated(self, step: int) -> bool:
        """Whether the evaluation of a step has been made after its checkpoint; all processes say the same."""
        found = self._is_first and has_evaluation(self.folder.path / METRICS, step)
        if jax.process_count() == 1:
            return found
        return bool(multihost_utils.broadcast_one_to_all(np.asarray(found)))

    # Parts

    @property
    def _objective(self) -> Objective:
        return self.config.objective

    def _check(self, model: Any) -> None:
        """Raises where the model and the configuration do not go together."""
        objective = self.config.objective
        explained("objective", lambda: check_padding_ids(objective, model.config.vocab_size))

    def _shapes(self, model: FlaxPreTrainedModel) -> Mapping[str, Any]:
        if (adapter := self._adapter(model)) is None:
            return model.params_shape_tree
        casts = {"float32": model.to_fp32, "bfloat16": model.to_bf16, "float16": model.to_fp16}
        shapes = jax.eval_shape(casts[self.config.model.dtype], model.params_shape_tree)
        return with_leaves(shapes, jax.eval_shape(adapter.new_leaves))

    def _optimizer(self, trained: Mapping[str, Any]) -> tuple[Any, Any]:
        return make_optimizer(self.config.optimizer, self.config.run.steps, trained)

    def _creation(self, model: FlaxPreTrainedModel, optimizer: Any) -> Callable[[Any, Any], TrainState]:
        config = self.config
        return partial(create_train_state, optimizer=optimizer, seed=config.run.seed, dtype=config.model.dtype)

    def _module(self, model: FlaxPreTrainedModel) -> Any:
        settings = self.config.model
        return model.module.clone(
            gradient_checkpointing=settings.gradient_checkpointing, scan_layers=settings.scan_layers
        )

    def _train_step(self, model: FlaxPreTrainedModel, optimizer: Any, schedule: Any, shardings: Any) -> Any:
        return make_train_step(
            self._module(model),
            self._objective,
            optimizer,
            schedule,
            accumulation_steps=self.config.run.accumulation_steps,
            state_shardings=shardings,
        )

    def _evaluation(self, model: FlaxPreTrainedModel, shardings: Any) -> Callable[..., dict[str, float]]:
        step = make_eval_step(self._module(model), self._objective, state_shardings=shardings)
        return Evaluation(self, model, step)

    def _loop(self, *parts: Any) -> Loop:
        return Loop(*parts)

    def _splitting(self, model: Any) -> Callable[[Any], tuple[dict[str, Any], dict[str, Any]]]:
        """What divides parameters into the trained ones and the others."""
        adapter = self._adapter(model)
        return self._split if adapter is None else partial(self._split, adapter=adapter)

    def _split(
        self, params: Mapping[str, Any], adapter: TrainedAdapter | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The trained parameters and the others, as the module has them; ``freeze`` has the paths of files."""
        parts = split_params(params, self.config.model.freeze) if adapter is None else adapter.split(params)
        if not self.config.model.scan_layers:
            return parts
        try:
            trained, others = map(stack_layers, parts)
            return trained, others
        except ValueError as error:
            raise ConfigurationError(
                f"`model.freeze`: {list(self.config.model.freeze)} freezes some layers of a decoder and trains "
                "others, but model.scan_layers stacks all of them in one parameter; freeze all or none, or set "
                "model.scan_layers to false"
            ) from error

    def _loader(self, model: FlaxPreTrainedModel, data: Any, epochs: int | None) -> Loader:
        settings, moshi = self.config.data, model.config
        trains = epochs is None
        # an evaluation runs as many rows at once as training does
        rows = settings.batch_size // (1 if trains else self.config.run.accumulation_steps)
        return make_loader(
            data,
            batch_size=rows,
            max_length=settings.max_length,
            vocab_size=moshi.vocab_size,
            audio_vocab_size=moshi.audio_vocab_size,
            num_codebooks=moshi.num_codebooks,
            min_length=settings.min_length if trains else 1,
            buckets=settings.buckets,
            seed=self.config.run.seed,
            shuffle=settings.shuffle and trains,
            swap_moshi_user=settings.swap_moshi_user if trains else 0.0,
            user_code_noise=settings.user_code_noise if trains else 0.0,
            moshi_code_noise=settings.moshi_code_noise if trains else 0.0,
            epochs=epochs,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=settings.workers if trains else 0,
        )

    def _tell_dropped(self, loader: Loader) -> None:
        dropped = loader.plan.dropped
        if dropped.frames:
            self._say(
                f"data.min_length: {dropped.frames} frames are not used: {dropped.tails} ends of conversations, and "
                f"{len(dropped.conversations)} that are shorter"
            )

    def _log(self, step: int) -> RunLog | None:
        run = self.config.run
        if not self._is_first:
            return None
        return RunLog(
            self.folder.path,
            steps=run.steps,
            first_step=step,
            config=dataclasses.asdict(self.config),
            tensorboard=run.tensorboard,
            wandb_project=run.wandb_project,
            notes=self._notes,
            counts=self.counts,
        )

    def _say(self, text: str) -> None:
        if self._is_first:
            (self._notes or Console(stderr=True, highlight=False)).print(text, soft_wrap=True, markup=False)

    def _put(self, batch: Mapping[str, Any]) -> Any:
        return put_batch(batch, self._mesh)

    def _all_params(self, state: TrainState) -> dict[str, Any]:
        return unstack_layers(state.all_params) if self.config.model.scan_layers else state.all_params

    def _export(self, state: TrainState) -> None:
        params = state.all_params
        if jax.process_count() > 1:
            params = multihost_utils.process_allgather(params, tiled=True)
        if self.config.model.scan_layers:  # on the host, where a layer of a stack is a view
            params = unstack_layers(jax.device_get(params))

        def write() -> None:
            if (adapter := self.folder.adapter()) is None:
                self.folder.write_export(params, self.folder.export)
            else:
                adapter.write(params, self.folder.export)
            self.folder.set_exported_step(self.config.run.steps)
            self._say(f"{self.folder.export}: the model of the last step")

        # the others wait: a process that has ended would be missed after some minutes
        in_all(write if self._is_first else lambda: None)


class Evaluation:
    """Losses and samples of the held-out conversations.

    Raises:
        ValueError: their first batch cannot be made.
    """

    def __init__(self, trainer: Any, model: Any, step: Any):
        self._trainer, self._model, self._step = trainer, model, step
        with contextlib.closing(self._loader()) as loader:
            next(loader)

    def _loader(self) -> Loader:
        return self._trainer._loader(self._model, self._trainer._held_out, epochs=1)

    def __call__(self, state: TrainState, step: int, heed: Callable[[], None]) -> dict[str, float]:
        """The metrics; ``heed`` is called before every batch and within dialogues, and may raise."""
        trainer = self._trainer

        def batches(loader: Loader) -> Iterator[Any]:
            for batch in iter(lambda: explained("data.evaluation", partial(next, loader, None)), None):
                heed()
                yield trainer._put(batch)

        with contextlib.closing(self._loader()) as loader:
            metrics = evaluate(self._step, state, batches(loader), trainer._objective)
        self._sample(state, trainer.folder.path / "samples" / f"step-{step}", heed)
        return metrics

    def _sample(self, state: TrainState, folder: Path, heed: Callable[[], None]) -> None:
        trainer, run = self._trainer, self._trainer.config.run
        if not run.samples:
            return
        held_out = trainer._held_out
        numbers = range(min(run.samples, len(held_out)))
        users = in_all(lambda: explained("data.evaluation", lambda: [held_out[number] for number in numbers]))
        params = trainer._all_params(state)
        samples = speak(self._model, params, users, run.sample_frames, self._tokenizer(), run.seed, heed)
        rate = self._model.config.audio_encoder_config.sampling_rate
        in_all(lambda: write_samples(samples, folder, rate) if trainer._is_first else None)

    def _tokenizer(self) -> Any | None:
        folder = self._trainer.folder.model
        if not (folder / "tokenizer_config.json").exists():
            return None
        from transformers import AutoTokenizer  # only here: it imports a lot

        return AutoTokenizer.from_pretrained(folder)


class Loop:
    """The steps, and what happens between them."""

    def __init__(
        self,
        trainer: Trainer,
        log: RunLog | None,
        checkpoints: RunCheckpoints,
        loader: Loader,
        train_step: Any,
        evaluation: Callable[..., dict[str, float]] | None,
        signals: Signals,
    ):
        self._trainer, self._run = trainer, trainer.config.run
        self._log, self._checkpoints, self._loader = log, checkpoints, loader
        self._train_step, self._evaluation, self._signals = train_step, evaluation, signals

    def run(self, state: TrainState, step: int, evaluated: bool) -> tuple[TrainState, dict[str, float]]:
        """From after ``step`` steps to the end; returns the state and the last metrics.

        ``evaluated``: whether the evaluation that is due after ``step`` steps, if any, has been made.
        """
        run, last = self._run, {}
        begun = step
        if not evaluated and self._evaluation is not None:  # a signal came before it, or in its midst
            last = self._evaluate(state, step)
        meter, in_a_row = _Meter(self._trainer.counts), []
        while step < run.steps:
            with self._kept_on_failure(state, step):
                batch = meter.waiting_for(lambda: explained("data.train", partial(next, self._loader)))
            # the first step is compiled, and there is none before it to be lost
            with self._expendable(step) if step == begun else contextlib.nullcontext():
                state, metrics = self._advanced(state, self._trainer._put(batch), step)
                step += 1
                meter.count(metrics, next(iter(batch.values())).shape)
            in_a_row.append(metrics["bad_steps_in_a_row"])
            if self._log is not None:
                self._log.advance(step)
            if step % run.log_every == 0 or step == run.steps:
                last = {name: float(value) for name, value in jax.device_get(metrics).items()}
                last |= meter.read()
                if self._log is not None:
                    self._log.train(step, last)
            if step % min(run.log_every, run.max_bad_steps) == 0 or step == run.steps:
                self._check_finite(state, step, max(map(int, jax.device_get(in_a_row))))
                in_a_row.clear()
            interrupted, due = self._signalled(step), self._evaluates_after(step)
            with meter.paused():
                regular = step == run.steps or step % run.checkpoint_every == 0
                if due or interrupted or regular or self._is_long(step):
                    self._save(state, step)
                if due and not interrupted:
                    last = self._evaluate(state, step)
            if interrupted:
                self._end(interrupted, step)
        if number := self._signal_of_all():
            self._end(number, step)
        self._checkpoints.wait()
        return state, last

    def _end(self, number: int, step: int) -> NoReturn:
        self._checkpoints.wait()
        raise Interrupted(number, step)

    def _expendable(self, step: int) -> contextlib.AbstractContextManager[None]:
        """A block in which nothing is lost but itself, as the checkpoint of the step is there or on its way.

        One process of several does not end alone: the others would wait for it.
        """

        def finish(number: int) -> None:
            self._checkpoints.wait()
            if self._log is not None:
                self._log.settle()
            self._trainer._say(f"{Interrupted(number, step)}")

        return contextlib.nullcontext() if jax.process_count() > 1 else self._signals.expendable(finish)

    def _advanced(self, state: TrainState, batch: Any, step: int) -> tuple[TrainState, dict[str, Any]]:
        """After one more step than ``step``, and its metrics."""
        return self._train_step(state, batch)

    def _is_long(self, step: int) -> bool:
        """Whether much is done before the step after ``step`` steps, in which a signal is to cost none of these."""
        return False

    def _evaluates_after(self, step: int) -> bool:
        if self._evaluation is None:
            return False
        return step == self._run.steps or bool(self._run.evaluate_every and step % self._run.evaluate_every == 0)

    def _evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        """The metrics of the held-out data, of which the log and the checkpoint of the step are told."""

        def heed() -> None:
            if number := self._signal_of_all():
                self._end(number, step)

        assert self._evaluation is not None
        with self._expendable(step):
            metrics = self._evaluation(state, step, heed)
        if np.isfinite(metrics[self._run.best_metric]):
            self._checkpoints.add_metrics(step, metrics)
        if self._log is not None:
            self._log.evaluation(step, metrics)
        return metrics

    def _save(self, state: TrainState, step: int) -> None:
        progress = {"data": self._loader.get_state(), "evaluated": not self._evaluates_after(step)}
        self._checkpoints.save(step, state.params, _rest(state), progress)

    @contextlib.contextmanager
    def _kept_on_failure(self, state: TrainState, step: int) -> Iterator[None]:
        """What fails in the block costs no steps: one process alone can write a checkpoint first."""
        try:
            yield
        except Exception as error:
            if jax.process_count() > 1 or step == 0:
                raise
            if step not in self._checkpoints.steps():
                self._save(state, step)
                self._checkpoints.wait()
            if self._signals.number:  # which also ends processes of the loader
                raise Interrupted(self._signals.number, step) from error
            raise

    def _check_finite(self, state: TrainState, step: int, in_a_row: int) -> None:
        if in_a_row >= self._run.max_bad_steps:
            if step not in self._checkpoints.steps():
                self._save(state, step)
                self._checkpoints.wait()
            raise NotFiniteError(
                f"{in_a_row} steps in a row had a loss or a gradient that is not finite (run.max_bad_steps is "
                f"{self._run.max_bad_steps}), and changed nothing; the checkpoint of step {step} has the parameters "
                "of before them. Start it again to go on with the next data; or export it and begin another run with "
                "it as model.path, a lower optimizer.learning_rate or other data"
            )

    def _signalled(self, step: int) -> int:
        """The signal that ends the run after a step, 0 if none; several processes look at lines of the log alone."""
        return self._signal_of_all() if jax.process_count() == 1 or step % self._run.log_every == 0 else 0

    def _signal_of_all(self) -> int:
        """The signal that ends the run, 0 if none; the same in all processes, which must ask at the same places."""
        number = int(self._signals.number)
        if jax.process_count() == 1:
            return number
        return int(np.max(multihost_utils.process_allgather(np.asarray(number))))


class _Meter:
    """Speed since it was last read, or since the last step that had to be compiled; pauses do not count."""

    def __init__(self, counts: str):
        self._counts = counts
        self._compiled: set[tuple[int, ...]] = set()
        self._reset()

    def _reset(self) -> None:
        self._start, self._waited, self._steps = time.perf_counter(), 0.0, 0
        self._done: list[Any] = []

    def waiting_for(self, make: Any) -> Any:
        """What ``make`` returns; its time is that of waiting for data."""
        start = time.perf_counter()
        made = make()
        self._waited += time.perf_counter() - start
        return made

    def count(self, metrics: Mapping[str, Any], shape: tuple[int, ...]) -> None:
        """A step with a batch of ``shape`` has been started."""
        self._done.append(metrics[self._counts])
        self._steps += 1
        if shape not in self._compiled:
            jax.block_until_ready(metrics)
            self._compiled.add(shape)
            self._reset()

    def read(self) -> dict[str, float]:
        """``frames_per_second`` (or of what else is counted), ``steps_per_second`` and ``data_wait``, the share of the
        time that data took.

        Nothing where there has been no step since.
        """
        if not self._steps:
            return {}
        seconds = max(time.perf_counter() - self._start, 1e-9)
        done = sum(int(count) for count in jax.device_get(self._done))
        read = {
            f"{self._counts}_per_second": done / seconds,
            "steps_per_second": self._steps / seconds,
            "data_wait": self._waited / seconds,
        }
        self._reset()
        return read

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time in the block does not count."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start


def make_trainer(config: Configuration, notes: Console | None = None) -> Trainer:
    """The trainer of the configuration's task; arguments and errors as of :class:`Trainer`."""
    if config.task == "text":
        from .text.trainer import TextTrainer  # which is made of what is here

        return TextTrainer(config, notes)
    if config.task == "speech_text":
        from .speech_text.trainer import SpeechTextTrainer

        return SpeechTextTrainer(config, notes)
    return Trainer(config, notes)


def placed(leaf: ArrayLike, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has, on the mesh of all."""
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _rest(state: TrainState) -> TrainState:
    """The state without what lies elsewhere."""
    return state.replace(params=None, frozen_params=None)


def in_all(make: Any) -> Any:
    """What ``make`` returns in this process; what fails in one process fails in all, so that none waits for it."""
    if jax.process_count() == 1:
        return make()
    made = failure = None
    try:
        made = make()
    except Exception as error:
        failure = error
    failed = np.ravel(multihost_utils.process_allgather(np.asarray(failure is not None)))
    if failure is not None:
        raise failure
    if failed.any():
        raise ConfigurationError(f"process {int(np.argmax(failed))} of the run has failed; see what it says")
    return made


def explained(key: str, make: Any) -> Any:
    """What ``make`` returns; its complaints name the key of the configuration."""
    try:
        return make()
    except ConfigurationError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"`{key}`: {error}") from error
