"""The configuration of a language model's training: sections as of ``training.configuration``, with its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from ..configuration import (
    AdapterConfig,
    CommonRunConfig,
    Configuration,
    DistributedConfig,
    MeshConfig,
    ModelConfig,
    adapter_contradictions,
    at_least,
    check_sections,
    contradictions,
)
from ..optimizer import OptimizerConfig


@dataclass(frozen=True)
class TextModelConfig(ModelConfig):
    """Section ``model``: which language model is trained; as of :class:`ModelConfig`.

    Attributes:
        path: the checkpoint to start from, of any class that ``FlaxAutoModelForCausalLM`` knows.
        config: instead of ``path``: its ``config.json``, or the directory of one; the weights are drawn at random.
        tokenizer: a directory or an id on the Hub; null takes that beside ``path`` or ``config``.
        freeze: as there.
    """

    tokenizer: str | None = None
    freeze: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextDataConfig:
    """Section ``data``: what it is trained on.

    Attributes:
        train: a text (``.txt``, ``.md``), texts as JSON lines (``.jsonl``, with ``text``), or a folder of such files.
        evaluation: the same of held-out texts, or null.
        evaluation_share: instead of ``evaluation``: the share of the texts of ``train`` that are held out, drawn by
            ``run.seed``.
        max_length: tokens of a row. Rows hold several texts as far as they fit; longer texts are cut.
        batch_size: rows of one step, over all devices and accumulation steps.
        shuffle: whether rows are drawn in a new order every epoch.
        workers: processes that make batches; 0 makes them in a thread of this one.
    """

    train: str
    evaluation: str | None = None
    evaluation_share: float = 0.0
    max_length: int = 1024
    batch_size: int = 16
    shuffle: bool = True
    workers: int = 0

    def problems(self) -> Iterator[str]:
        """As of :class:`ModelConfig`."""
        yield from at_least(self, max_length=2, batch_size=1, workers=0)
        if not 0 <= self.evaluation_share < 1:
            yield f"`evaluation_share`: {self.evaluation_share} is no share that leaves some; give 0 to below 1"
        if self.evaluation is not None and self.evaluation_share:
            yield "`evaluation_share`: `evaluation` names what is held out; leave one of them out"


@dataclass(frozen=True)
class TextRunConfig(CommonRunConfig):
    """Section ``run``, as of :class:`CommonRunConfig`.

    Attributes:
        prompts: how texts begin that the model goes on with at every evaluation.
        sample_tokens: the most tokens that it adds.
        sample_temperature: of these; 0 takes the likeliest ones.
    """

    prompts: tuple[str, ...] = ()
    sample_tokens: int = 100
    sample_temperature: float = 1.0

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from at_least(self, sample_tokens=1, sample_temperature=0)


@dataclass(frozen=True)
class TextTrainingConfig(Configuration):
    """A whole configuration (``task: text``); the fields are the sections of the file.

    Raises:
        ConfigurationError: values out of range or contradicting each other; all of them are listed.
    """

    task: ClassVar[str | None] = "text"

    model: TextModelConfig
    data: TextDataConfig
    run: TextRunConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)

    def __post_init__(self) -> None:
        check_sections(self, _contradictions)


def _contradictions(config: TextTrainingConfig) -> Iterator[str]:
    yield from contradictions(config)
    yield from adapter_contradictions(config)
    if config.run.prompts and config.data.evaluation is None and not config.data.evaluation_share:
        yield "`run.prompts`: they are gone on with at evaluations; set data.evaluation or data.evaluation_share"
