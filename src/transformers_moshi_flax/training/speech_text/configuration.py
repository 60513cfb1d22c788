"""The configuration of a speech-language model's training: sections as of ``training.configuration``, with its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from ...quantization.config import QuantizationConfig
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
    held_out,
)
from ..optimizer import OptimizerConfig

PROJECTOR = "multi_modal_projector"


@dataclass(frozen=True)
class SpeechTextModelConfig(ModelConfig):
    """Section ``model``: which joined model is trained; as of :class:`ModelConfig`, without layers to scan.

    Attributes:
        path: of a joined model with its processor.
        config: instead of ``path``: the directory of a ``config.json`` with a processor; random weights.
        quantization: as there, but of the projector.
        freeze: as there; ``["audio_tower/.*", "language_model/.*"]`` trains the projector alone.
    """

    freeze: tuple[str, ...] = ()

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.scan_layers:
            yield "`scan_layers`: the layers of a joined model cannot be scanned; leave it false"

    def quantization_config(self) -> QuantizationConfig | None:
        config = super().quantization_config()
        return None if config is None else dataclasses.replace(config, skip=[PROJECTOR])


@dataclass(frozen=True)
class SpeechTextDataConfig:
    """Section ``data``: what it is trained on.

    Attributes:
        train: JSON lines with ``audio`` (the path of a recording, or a list of them), ``prompt`` (with ``<audio>`` for
            every recording) and ``answer``; paths are relative to the file.
        evaluation: the same of held-out examples, or null.
        evaluation_share: instead of ``evaluation``: the share of the examples of ``train`` that are held out, drawn by
            ``run.seed``.
        max_length: tokens of a row, those of its recordings included.
        max_seconds: of a recording; all are padded to that.
        batch_size: rows of one step, over all devices and accumulation steps.
        shuffle: whether rows are drawn in a new order every epoch.
        workers: processes that make batches; 0 makes them in a thread of this one.
    """

    train: str
    evaluation: str | None = None
    evaluation_share: float = 0.0
    max_length: int = 512
    max_seconds: float = 30.0
    batch_size: int = 16
    shuffle: bool = True
    workers: int = 0

    def problems(self) -> Iterator[str]:
        """As of :class:`ModelConfig`."""
        yield from at_least(self, max_length=2, batch_size=1, workers=0)
        if not self.max_seconds > 0:
            yield f"`max_seconds`: {self.max_seconds} seconds have no audio; give more"
        if not 0 <= self.evaluation_share < 1:
            yield f"`evaluation_share`: {self.evaluation_share} is no share that leaves some; give 0 to below 1"
        if self.evaluation is not None and self.evaluation_share:
            yield "`evaluation_share`: `evaluation` names what is held out; leave one of them out"


@dataclass(frozen=True)
class SpeechTextRunConfig(CommonRunConfig):
    """Section ``run``, as of :class:`CommonRunConfig`.

    Attributes:
        samples: how many held-out prompts are answered at an evaluation.
        sample_tokens: the most tokens of these answers.
    """

    samples: int = 0
    sample_tokens: int = 50

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from at_least(self, samples=0, sample_tokens=1)


@dataclass(frozen=True)
class SpeechTextTrainingConfig(Configuration):
    """A whole configuration (``task: speech_text``); the fields are the sections of the file.

    Raises:
        ConfigurationError: values out of range or contradicting each other; all of them are listed.
    """

    task: ClassVar[str | None] = "speech_text"

    model: SpeechTextModelConfig
    data: SpeechTextDataConfig
    run: SpeechTextRunConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)

    def __post_init__(self) -> None:
        check_sections(self, _contradictions)


def _contradictions(config: SpeechTextTrainingConfig) -> Iterator[str]:
    yield from contradictions(config)
    yield from adapter_contradictions(config)
    if config.run.samples and not held_out(config):
        yield "`run.samples`: held-out prompts are answered; set data.evaluation or data.evaluation_share"
