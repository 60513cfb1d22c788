"""The configuration of a training run: one YAML file, frozen dataclasses, checked before any work is done.

Every section of the file is a dataclass, whose fields are its keys. Keys that do not exist, values of another type and
values that contradict each other are all collected and raised together.

YAML is read more strictly than PyYAML does by itself: a key that occurs twice is an error. And what a scalar without
quotes is, its key says: under one of texts ``1e-5_run``, ``0123``, ``no`` and ``2024-01-31`` are texts, under one of
numbers ``1e-5`` is a number, and ``0123``, which YAML 1.1 reads as octal and 1.2 does not, is none.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from ..adapters.config import ALL_LINEAR, LoraConfig
from ..checkpoints.configs import did_you_mean
from ..quantization.config import QuantizationConfig
from .objective import ObjectiveConfig
from .optimizer import OptimizerConfig, make_schedule


class ConfigurationError(ValueError):
    """A configuration cannot be used; names the file, the keys, what was found and what to do."""


@dataclass(frozen=True)
class ModelConfig:
    """Section ``model``: what is trained.

    Attributes:
        path: the checkpoint to start from, a directory or an id on the Hub.
        config: instead of ``path``: a ``config.json`` or the directory of one; the weights are drawn at random.
        dtype: of the computation: float32, bfloat16, or float16 (with dynamic loss scaling). The weights that are
            trained are float32 in any case.
        gradient_checkpointing: recompute the activations of every layer in the backward pass: less memory, more time.
        scan_layers: compile one layer and run it in a loop, which compiles sooner.
        quantization: ``int8``, ``int4`` or ``nf4``: linear layers are quantized while the checkpoint is read, for an
            adapter that is trained beside them; null takes the checkpoint as it is.
        quantization_group_size: inputs of an output that share a scale; null is the kind's own, see
            :class:`~transformers_moshi_flax.quantization.config.QuantizationConfig`.
        double_quantization: quantize these scales as well, to 8 bits.
        freeze: regular expressions that match whole paths of parameters, joined by "/", which are not trained.
    """

    path: str | None = None
    config: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False
    scan_layers: bool = False
    quantization: Literal["int8", "int4", "nf4"] | None = None
    quantization_group_size: int | None = None
    double_quantization: bool = False
    freeze: tuple[str, ...] = ("audio_encoder/.*",)

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, each as a sentence that begins with a key."""
        if (self.path is None) == (self.config is None):
            yield "`path`: give either `path` (a checkpoint to start from) or `config` (random weights)"
        if self.quantization is None and self.quantization_group_size is not None:
            yield "`quantization_group_size`: nothing is quantized; give `quantization`, or leave it out"
        if self.quantization is None and self.double_quantization:
            yield "`double_quantization`: nothing is quantized; give `quantization`, or leave it out"
        try:
            self.quantization_config()
        except ValueError as error:
            yield f"`quantization_group_size`: {error}"
        for pattern in self.freeze:
            try:
                re.compile(pattern)
            except re.error as error:
                yield f"`freeze`: {pattern!r} is no regular expression ({error})"

    def quantization_config(self) -> QuantizationConfig | None:
        """As ``from_pretrained`` takes it."""
        if self.quantization is None:
            return None
        return QuantizationConfig(
            self.quantization,
            group_size=self.quantization_group_size,
            double_quantization=self.double_quantization,
        )


@dataclass(frozen=True)
class AdapterConfig:
    """Section ``adapter``: a LoRA adapter that is trained instead of the model, whose weights stay as they are.

    Attributes:
        r: the rank; null trains the model itself.
        target_modules, exclude_modules, lora_alpha, lora_dropout, use_rslora, modules_to_save, rank_pattern,
            alpha_pattern: see :class:`~transformers_moshi_flax.adapters.config.LoraConfig`; modules are lists of names
            or ends of names, ``all-linear`` among them stands for all.
    """

    r: int | None = None
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    exclude_modules: tuple[str, ...] = ()
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    modules_to_save: tuple[str, ...] = ()
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def problems(self) -> Iterator[str]:
        """As of :class:`ModelConfig`."""
        if self.r is None:
            none = AdapterConfig()
            names = [entry.name for entry in dataclasses.fields(self)]
            changed = [name for name in names if getattr(self, name) != getattr(none, name)]
            if changed:
                yield f"`{changed[0]}`: there is no adapter without a rank; give adapter.r, or leave it out"
            return
        if ALL_LINEAR in self.target_modules and len(self.target_modules) > 1:
            yield f"`target_modules`: {ALL_LINEAR} stands for all; leave out the others"
        try:
            self.lora_config()
        except ValueError as error:
            yield str(error)

    def lora_config(self, base: str | None = None) -> LoraConfig:
        """As ``add_adapter`` takes it, for the model ``base``."""
        everything = self.target_modules == (ALL_LINEAR,)
        return LoraConfig(
            r=self.r or 0,
            target_modules=ALL_LINEAR if everything else list(self.target_modules),
            exclude_modules=list(self.exclude_modules) or None,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
            modules_to_save=list(self.modules_to_save) or None,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            base_model_name_or_path=base,
        )


@dataclass(frozen=True)
class DataConfig:
    """Section ``data``: what it is trained on.

    Attributes:
        train: a dataset as ``moshi-flax prepare`` makes it, or a folder of arrays per sample.
        evaluation: the same of held-out conversations, or null.
        max_length: the most frames of a row, the start frame included (12.5 frames are a second).
        min_length: the fewest dialogue frames that the last chunk of a conversation must have to be used.
        batch_size: rows of one step, over all devices and accumulation steps.
        buckets: lengths that batches are padded to, ascending; the last one is ``max_length``. Empty: ``max_length``.
        shuffle: whether conversations are chunked and drawn in a new order every epoch.
        swap_moshi_user: the share of chunks in which Moshi and the user change their roles.
        user_code_noise: the largest share of a chunk's user codes that are replaced by random ones, so that little
            data is not learned by heart; drawn for each chunk, in every epoch anew.
        moshi_code_noise: the same of Moshi's own codes as it remembers them, not of those that it is to say: else what
            it is about to say can be told by how its voice sounds, where there is little of it.
        workers: processes that make batches; 0 makes them in a thread of this one.
    """

    train: str
    evaluation: str | None = None
    max_length: int = 1024
    min_length: int = 16
    batch_size: int = 16
    buckets: tuple[int, ...] = ()
    shuffle: bool = True
    swap_moshi_user: float = 0.0
    user_code_noise: float = 0.0
    moshi_code_noise: float = 0.0
    workers: int = 0

    def problems(self) -> Iterator[str]:
        """As of :class:`ModelConfig`."""
        yield from at_least(self, max_length=2, min_length=1, batch_size=1, workers=0)
        if self.min_length >= self.max_length:
            yield f"`min_length`: {self.min_length} frames and a start frame exceed max_length = {self.max_length}"
        if list(self.buckets) != sorted(set(self.buckets)) or (self.buckets and self.buckets[0] < 2):
            yield f"`buckets`: {list(self.buckets)} must be ascending lengths of 2 or more"
        elif self.buckets and self.buckets[-1] != self.max_length:
            yield f"`buckets`: the last of {list(self.buckets)} must be max_length = {self.max_length}"
        for name in ("swap_moshi_user", "user_code_noise", "moshi_code_noise"):
            if not 0 <= getattr(self, name) <= 1:
                yield f"`{name}`: {getattr(self, name)} is no share; give 0 to 1"


@dataclass(frozen=True)
class CommonRunConfig:
    """Section ``run``: how long, how often, and where to; of any task.

    Attributes:
        output_dir: the run folder. A run that has been interrupted goes on when it is started with the same folder.
        steps: how many steps are made.
        accumulation_steps: into how many parts a batch is divided, one after another, to save memory.
        seed: of the order of the data, of dropout, and of random weights.
        log_every: steps between two lines of the log.
        checkpoint_every: steps between two checkpoints. One is also written at every evaluation and at the end.
        max_to_keep: how many of the latest checkpoints are kept; the best one is kept besides.
        best_metric: which of the held-out metrics makes a checkpoint the best (the lowest value).
        evaluate_every: steps between two evaluations; null evaluates at the end alone.
        max_bad_steps: after how many steps in a row whose loss or gradient is not finite the run gives up.
        tensorboard: also log to ``tensorboard/`` in the run folder.
        wandb_project: also log to this project of Weights & Biases.
    """

    output_dir: str
    steps: int
    accumulation_steps: int = 1
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 500
    max_to_keep: int = 3
    best_metric: Literal["loss"] = "loss"
    evaluate_every: int | None = None
    max_bad_steps: int = 10
    tensorboard: bool = False
    wandb_project: str | None = None

    def problems(self) -> Iterator[str]:
        """As of :class:`ModelConfig`."""
        yield from at_least(
            self,
            **dict.fromkeys(("steps", "accumulation_steps", "log_every", "checkpoint_every", "max_to_keep"), 1),
            **dict.fromkeys(("evaluate_every", "max_bad_steps"), 1),
            seed=0,
        )
        if self.seed >= 2**32:
            yield f"`seed`: {self.seed} is too large; give a number below 2**32"
        if not self.output_dir:
            yield "`output_dir`: it is empty; name a folder"


@dataclass(frozen=True)
class RunConfig(CommonRunConfig):
    """Section ``run``, as of :class:`CommonRunConfig`, of dialogues.

    Attributes:
        samples: how many held-out dialogues Moshi speaks at an evaluation.
        sample_frames: the most frames of each of these.
    """

    best_metric: Literal["loss", "text_loss", "audio_loss"] = "loss"  # type: ignore[assignment]  # more metrics
    samples: int = 2
    sample_frames: int = 125

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from at_least(self, samples=0, sample_frames=1)


@dataclass(frozen=True)
class MeshConfig:
    """Section ``mesh``: how the devices share the work; their product is the number of devices.

    Attributes:
        data: copies of the model, each with its own rows.
        fsdp: devices that share the weights and the optimizer's state, each with its own rows.
        tensor: devices that share every layer's work.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def problems(self) -> Iterator[str]:
        """As of :class:`ModelConfig`."""
        yield from at_least(self, data=1, fsdp=1, tensor=1)


@dataclass(frozen=True)
class DistributedConfig:
    """Section ``distributed``: several processes; all null for one.

    Attributes:
        coordinator_address: host and port of the first process.
        num_processes: how many there are.
        process_id: which of them this is, from 0.
    """

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def problems(self) -> Iterator[str]:
        """As of :class:`ModelConfig`."""
        given = [value is not None for value in dataclasses.astuple(self)]
        if any(given) and not all(given):
            yield "`coordinator_address`: give `coordinator_address`, `num_processes` and `process_id`, or none"
        elif self.num_processes is not None and self.process_id is not None:
            yield from at_least(self, num_processes=1, process_id=0)
            if self.process_id >= self.num_processes:
                yield f"`process_id`: {self.process_id} must be below num_processes = {self.num_processes}"


@dataclass(frozen=True)
class Configuration:
    """A whole configuration: a dataclass whose fields are the sections of the file.

    Attributes:
        task: what the file says beside its sections; None for configurations that have a command of their own.
    """

    task: ClassVar[str | None] = None


@dataclass(frozen=True)
class TrainingConfig(Configuration):
    """A whole configuration of Moshi's training on dialogues; the fields are the sections of the file.

    Raises:
        ConfigurationError: values out of range or contradicting each other; all of them are listed.
    """

    task: ClassVar[str | None] = "dialogue"

    model: ModelConfig
    data: DataConfig
    run: RunConfig
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)

    def __post_init__(self) -> None:
        check_sections(self, _contradictions)


def _contradictions(config: TrainingConfig) -> Iterator[str]:
    yield from contradictions(config)
    yield from adapter_contradictions(config)


def adapter_contradictions(config: Any) -> Iterator[str]:
    """What contradicts itself in a configuration with model and adapter."""
    if config.adapter.r is not None and config.model.freeze != type(config.model).freeze:
        yield "`model.freeze`: with an adapter the whole model is frozen; leave it out"
    if config.adapter.r is None and config.model.quantization is not None:
        yield "`model.quantization`: quantized weights are not trained; give adapter.r, or leave it out"
    if config.adapter.r is not None and config.model.path is None:
        yield "`adapter`: an adapter of random weights is of no use; give model.path"


def check_sections(config: Configuration, between: Callable[[Any], Iterator[str]]) -> None:
    """Raise what is wrong with the sections of a configuration, or else what is wrong ``between`` them."""
    problems = []
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        if hasattr(values, "problems"):
            problems += [problem.replace("`", f"`{section.name}.", 1) for problem in values.problems()]
    problems = problems or list(between(config))
    if problems:
        raise ConfigurationError("; ".join(problems))


def contradictions(config: Any) -> Iterator[str]:
    """What contradicts itself in a configuration with data, run, optimizer, mesh and distributed."""
    rows, parts = config.data.batch_size, config.run.accumulation_steps
    devices = config.mesh.data * config.mesh.fsdp
    processes = config.distributed.num_processes or 1
    if rows % (parts * devices):
        yield (
            f"`data.batch_size`: {rows} rows are not divisible by run.accumulation_steps * mesh.data * mesh.fsdp "
            f"= {parts} * {config.mesh.data} * {config.mesh.fsdp}; use a multiple of {parts * devices}"
        )
    if rows % processes:
        yield f"`data.batch_size`: {rows} rows are not divisible by distributed.num_processes = {processes}"
    if devices % processes:
        yield (
            f"`mesh`: data * fsdp = {devices} is not divisible by distributed.num_processes = {processes}; each "
            "process must have rows of its own"
        )
    try:
        make_schedule(config.optimizer, config.run.steps)
    except ValueError as error:
        yield f"`run.steps`: {error}"
    if not held_out(config) and config.run.evaluate_every is not None:
        yield "`run.evaluate_every`: there is nothing to evaluate on; set data.evaluation"


def held_out(config: Any) -> bool:
    """Whether there are data to evaluate on."""
    return config.data.evaluation is not None or bool(getattr(config.data, "evaluation_share", 0))


def configurations_of_tasks() -> dict[str, type[Configuration]]:
    """What the tasks of ``moshi-flax train`` are configured by."""
    from .speech_text.configuration import SpeechTextTrainingConfig  # which are made of what is here
    from .text.configuration import TextTrainingConfig

    return {"dialogue": TrainingConfig, "text": TextTrainingConfig, "speech_text": SpeechTextTrainingConfig}


def load_configuration(
    path: str | Path, assignments: Sequence[str] = (), kind: type[Configuration] | None = None
) -> Any:
    """Read a configuration.

    Args:
        path: of the YAML file.
        assignments: such as ``"run.steps=100"``, which replace single values; what follows ``=`` is YAML.
        kind: the class of the configuration, whose fields are its sections; by default that of the file's ``task``.

    Raises:
        ConfigurationError: the file cannot be read, is no YAML or has bad keys or values; all of them are listed.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: cannot be read ({error}); give a YAML file") from error
    values = _parse(text, str(path))
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: it holds no sections; write `model:`, `data:` and `run:` with their keys")
    kind = _kind_of(values, str(path), kind)
    for assignment in assignments:
        _assign(values, assignment, kind)
    return build_configuration(values, str(path), kind)


def build_configuration(
    values: Mapping[str, Any], name: str = "configuration", kind: type[Configuration] | None = None
) -> Any:
    """Make a configuration from nested mappings.

    Args:
        values: section -> key -> value, as YAML has them, and ``task``.
        name: of the file, for errors.
        kind: the class of the configuration, whose fields are its sections; by default that of the ``task``.

    Raises:
        ConfigurationError: unknown keys, values of another type, missing ones, bad ones; all of them are listed.
    """
    problems: list[str] = []
    kind = _kind_of(values, name, kind)
    sections = _sections_of(kind)
    built = {}
    for key in values:
        if key not in sections and not (key == "task" and kind.task):
            hint = did_you_mean(str(key), sections) or did_you_mean(str(key), _all_keys(kind))
            problems.append(f"`{key}` is no section{hint or '; there are ' + ', '.join(sections)}")
    for section, section_class in sections.items():
        given = values.get(section)
        if _is_null(given):
            given = {}
        if not isinstance(given, Mapping):
            problems.append(f"`{section}`: {given!r} must be keys with values")
            continue
        built[section] = _section(section, section_class, given, problems, kind)
    if problems:
        raise ConfigurationError(f"{name}: {'; '.join(problems)}")
    try:
        return kind(**built)
    except ConfigurationError as error:
        raise ConfigurationError(f"{name}: {error}") from error


def to_yaml(config: Configuration) -> str:
    """The whole configuration, defaults included, as YAML that :func:`load_configuration` reads."""
    plain: dict[str, dict[str, Any]] = {section.name: {} for section in dataclasses.fields(config)}
    for section in plain:
        for key, value in dataclasses.asdict(getattr(config, section)).items():
            plain[section][key] = list(value) if isinstance(value, tuple) else value
    task = {"task": config.task} if config.task else {}
    return yaml.dump({**task, **plain}, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """YAML that is read as it was: some ends of lines that only Unicode knows are folded unless they are escaped."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent_text)


MAY_CHANGE = {
    "model": {"gradient_checkpointing"},
    "data": {"train", "evaluation", "workers"},
    "run": {
        "output_dir",
        "accumulation_steps",
        "log_every",
        "checkpoint_every",
        "max_to_keep",
        "best_metric",
        "evaluate_every",
        "prompts",
        "samples",
        "sample_frames",
        "sample_temperature",
        "sample_tokens",
        "max_bad_steps",
        "tensorboard",
        "wandb_project",
    },
    "mesh": {"data", "fsdp", "tensor"},
    "distributed": {"coordinator_address", "num_processes", "process_id"},
}
"""Keys that an interrupted run may be given anew: they change its results by no more than rounding. ``run.steps`` may
change as well where the learning rate does not depend on it (``optimizer.schedule: constant``). The conversations of
``data.train`` must be the same, wherever they lie: the loader compares their fingerprint."""


MOST = 2**31 - 1
"""The largest whole number: steps are counted in 32 bits."""


def changes_of_the_run(before: Configuration, now: Configuration) -> list[str]:
    """What differs between two configurations such that the one's run cannot go on as the other's.

    Returns:
        Such as ``"optimizer.b1: 0.9 -> 0.95"``; empty if the run can go on.
    """
    if before.task != now.task:
        return [f"task: {before.task} -> {now.task}"]
    changes = []
    for section in dataclasses.fields(now):
        old, new = getattr(before, section.name), getattr(now, section.name)
        allowed = set(MAY_CHANGE.get(section.name, ()))
        if section.name == "run" and vars(now)["optimizer"].schedule == "constant":
            allowed.add("steps")
        for key in (entry.name for entry in dataclasses.fields(old)):
            if key not in allowed and _comparable(getattr(old, key)) != _comparable(getattr(new, key)):
                changes.append(f"{section.name}.{key}: {getattr(old, key)!r} -> {getattr(new, key)!r}")
    return changes


def at_least(values: Any, **bounds: float | int) -> Iterator[str]:
    """A sentence for every key whose value is below its bound, where it is not None."""
    for key, bound in bounds.items():
        value = getattr(values, key)
        if value is not None and value < bound:
            yield f"`{key}`: {value} is too small; give {bound} or more"


def _comparable(value: Any) -> Any:
    """Of mappings the order counts: the first expression that matches a path does."""
    return list(value.items()) if isinstance(value, Mapping) else value


# Reading YAML


class _Plain(str):
    """A scalar without quotes and tag; what it is, the key says that it is for."""


_PLAIN = "!plain"
_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9_]*)", re.ASCII)
_NUMBER = re.compile(r"[-+]?(?!0[0-9_]+$)([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?", re.ASCII)
_NOT_FINITE = re.compile(r"[-+]?\.(inf|nan)", re.IGNORECASE)


class _Loader(yaml.SafeLoader):
    """YAML whose keys are unique and whose plain scalars are :class:`_Plain`."""

    def resolve(self, kind: type[yaml.Node], value: str | None, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0]:
            return "tag:yaml.org,2002:merge" if value == "<<" else _PLAIN
        return super().resolve(kind, value, implicit)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        given = (key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge")
        keys = [self.construct_object(key, deep=True) for key in given]
        for key in keys:
            if keys.count(key) > 1:
                problem = f"the key {key!r} occurs twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_constructor(_PLAIN, lambda loader, node: _Plain(node.value))


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, _Plain) and value in _NULLS)


def _resolved(value: _Plain, kind: Any) -> Any:
    """A plain scalar as a value of ``kind``, or as it is if it is none."""
    if kind is str and value not in _NULLS:
        return str(value)
    if kind is bool:
        return _BOOLEANS.get(value.lower(), value)
    if kind in (int, float) and _WHOLE.fullmatch(value):
        digits = value.replace("_", "")
        return int(digits) if len(digits) < 400 else math.inf  # beyond any float, and what int() reads
    if kind is float and _NUMBER.fullmatch(value):
        return float(value.replace("_", ""))
    if kind is float and _NOT_FINITE.fullmatch(value):
        return math.nan
    return value


def _parse(text: str, name: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as of a 13th month with the tag of a date
        raise ConfigurationError(f"{name}: no YAML: {error}") from error


def _assign(values: dict[str, Any], assignment: str, kind: type) -> None:
    """Carry out ``section.key=value`` in nested dictionaries."""
    path, equals, text = assignment.partition("=")
    section, dot, key = path.strip().partition(".")
    if not (equals and dot and section and key):
        raise ConfigurationError(f"--set {assignment!r}: write section.key=value, such as run.steps=100")
    if section not in _sections_of(kind):
        hint = did_you_mean(path, _all_keys(kind))
        raise ConfigurationError(f"--set {assignment!r}: {section!r} is no section{hint}")
    if _is_null(values.get(section)):
        values[section] = {}
    if not isinstance(values[section], dict):
        raise ConfigurationError(f"--set {assignment!r}: `{section}` of the file holds no keys")
    values[section][key] = _parse(text, f"--set {assignment!r}")


# From what YAML has to what the dataclasses have


def _kind_of(values: Mapping[str, Any], name: str, kind: type[Configuration] | None) -> type[Configuration]:
    """The class of a configuration, of the task that it names; ConfigurationError if that is none."""
    task, known = values.get("task"), configurations_of_tasks()
    if kind is not None and kind.task is not None:
        known = {kind.task: kind}
    if kind is not None and (task is None or kind.task is None):
        return kind
    if _is_null(task):
        return TrainingConfig
    if not isinstance(task, str) or task not in known:
        raise ConfigurationError(f"{name}: `task`: {task!r} must be one of {', '.join(known)}")
    return known[task]


def _sections_of(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(kind)}


def _all_keys(kind: type) -> list[str]:
    sections = _sections_of(kind)
    return [f"{name}.{entry.name}" for name, section in sections.items() for entry in dataclasses.fields(section)]


def _section(name: str, section: type, given: Mapping[str, Any], problems: list[str], kind: type) -> Any:
    """An instance of a section's class, or None, with the reasons added to ``problems``."""
    known = {entry.name: entry for entry in dataclasses.fields(section)}
    hints = typing.get_type_hints(section)
    found = len(problems)
    values = {}
    for key, value in given.items():
        if key not in known:
            elsewhere = [path for path in _all_keys(kind) if path.endswith(f".{key}")]
            hint = f"; it belongs to {elsewhere[0].split('.')[0]!r}" if elsewhere else did_you_mean(str(key), known)
            problems.append(f"`{name}.{key}` is no key{hint or f' of {name}; there are ' + ', '.join(known)}")
            continue
        try:
            values[key] = _convert(value, hints[key])
        except ValueError as error:
            problems.append(f"`{name}.{key}`: {value!r} must be {error}")
    for key, entry in known.items():
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and key not in given:
            problems.append(f"`{name}.{key}` is missing; the file must give it")
    if len(problems) > found:
        return None
    try:
        return section(**values)
    except ValueError as error:
        problems.append(f"`{name}`: {error}")
        return None


def _convert(value: Any, kind: Any) -> Any:
    """``value`` as an annotation has it; ValueError that says what it must be."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        others = [arg for arg in args if arg is not types.NoneType]
        if _is_null(value) and len(others) < len(args):
            return None
        try:
            return _convert(value, others[0])
        except ValueError as error:
            raise ValueError(f"{error}, or null") from error
    if origin is Literal:
        if not isinstance(value, str) or value not in args:
            raise ValueError("one of " + ", ".join(args) + did_you_mean(str(value), args))
        return str(value)
    if isinstance(value, _Plain):
        value = _resolved(value, kind)
    if origin is tuple:
        return tuple(_convert_items(value, list, args[0]))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError("keys with values")
        return {_convert(key, args[0]): _convert(item, args[1]) for key, item in value.items()}
    if kind is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError as error:
            raise ValueError("a finite number") from error
    if type(value) is kind is int and abs(value) > MOST:
        raise ValueError(f"a whole number within ±{MOST}")
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        quoted = type(value) is str and type(_resolved(_Plain(value), kind)) in (kind, int)
        raise ValueError(f"{names[kind]}, without quotes" if quoted else names[kind])
    if kind is float and not math.isfinite(value):
        raise ValueError("a finite number")
    return value


def _convert_items(value: Any, container: type, kind: Any) -> list[Any]:
    if not isinstance(value, container):
        raise ValueError("a list")
    items: Any = value
    try:
        return [_convert(item, kind) for item in items]
    except ValueError as error:
        raise ValueError(f"a list, each entry of it {error}") from error
