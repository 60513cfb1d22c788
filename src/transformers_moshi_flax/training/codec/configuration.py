"""The configuration of a codec's training: sections as of ``training.configuration``, with the codec's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from transformers import MimiConfig

from ...models.mimi.topology import samples_per_frame
from ..configuration import (
    Configuration,
    DistributedConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    at_least,
    check_sections,
    contradictions,
)
from ..optimizer import OptimizerConfig
from .discriminator import DiscriminatorConfig
from .losses import LossConfig
from .quantizer import QuantizerConfig


@dataclass(frozen=True)
class CodecModelConfig(ModelConfig):
    """Section ``model``: which codec is trained; as of :class:`ModelConfig`, without layers to scan.

    Attributes:
        path: the Mimi to start from, a directory or an id on the Hub.
        config: instead of ``path``: a ``config.json`` of a ``MimiConfig``, or the directory of one.
        freeze: as there; codebooks that are frozen do not follow the latents.
    """

    freeze: tuple[str, ...] = ()

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.scan_layers:
            yield "`scan_layers`: the layers of a codec cannot be scanned; leave it false"
        if self.dtype == "float16":
            yield "`dtype`: spectra overflow in float16; use bfloat16 or float32"


@dataclass(frozen=True)
class CodecDataConfig:
    """Section ``data``: what the codec is trained on.

    Attributes:
        train: a folder of audio files, or a manifest (JSON lines with ``path``, and ``text`` where it is known).
        evaluation: the same of held-out recordings, or null.
        crop_seconds: of a row; it is made longer to whole frames.
        batch_size: crops of one step, over all devices and accumulation steps.
        least_seconds: files that are shorter are skipped.
        gain_db: crops are made louder or softer by as much at most.
        noise_probability: the share of crops that get white noise.
        noise_snr_db: the least ratio of signal to noise; the most is 20 dB more.
        evaluation_crops: the most crops of an evaluation.
        workers: processes that make batches; 0 makes them in a thread of this one.
    """

    train: str
    evaluation: str | None = None
    crop_seconds: float = 1.28
    batch_size: int = 16
    least_seconds: float = 0.5
    gain_db: float = 6.0
    noise_probability: float = 0.0
    noise_snr_db: float = 20.0
    evaluation_crops: int = 256
    workers: int = 0

    def problems(self) -> Iterator[str]:
        """As of :class:`ModelConfig`."""
        yield from at_least(self, batch_size=1, evaluation_crops=1, workers=0, gain_db=0, least_seconds=0)
        if not 0 < self.crop_seconds <= 600:
            yield f"`crop_seconds`: {self.crop_seconds} must be above 0, and 600 at most"
        if not 0 <= self.noise_probability <= 1:
            yield f"`noise_probability`: {self.noise_probability} is no share; give 0 to 1"


@dataclass(frozen=True)
class CodecRunConfig(RunConfig):
    """Section ``run``, as of :class:`RunConfig`; samples are held-out recordings, decoded.

    Attributes:
        best_metric: which of the held-out metrics makes a checkpoint the best (the lowest value).
        sample_frames: the most frames of each sample.
    """

    best_metric: Literal["loss", "log_mel", "magnitude"] = "loss"  # type: ignore[assignment]  # other metrics


@dataclass(frozen=True)
class CodecOptimizerConfig(OptimizerConfig):
    """Section ``optimizer``, as of :class:`OptimizerConfig`, for training from random weights."""

    learning_rate: float = 1e-3
    b2: float = 0.99
    weight_decay: float = 0.0


@dataclass(frozen=True)
class DistillationConfig:
    """Section ``distillation``: whose features codebook 0 learns, where ``losses.distillation`` has a weight.

    Attributes:
        teacher: an encoder of ``transformers`` that takes waveforms (WavLM, HuBERT, …), a directory or an id on the
            Hub; it needs torch. In Python any function may be given to ``CodecTrainer`` instead.
        layer: of the teacher, whose hidden states are the features; the last one if null.
    """

    teacher: str | None = None
    layer: int | None = None


@dataclass(frozen=True)
class CodecTrainingConfig(Configuration):
    """A whole configuration; the fields are the sections of the file.

    Raises:
        ConfigurationError: values out of range or contradicting each other; all of them are listed.
    """

    model: CodecModelConfig
    data: CodecDataConfig
    run: CodecRunConfig
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    optimizer: CodecOptimizerConfig = field(default_factory=CodecOptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        check_sections(self, _contradictions)


def _contradictions(config: CodecTrainingConfig) -> Iterator[str]:
    yield from contradictions(config)
    if config.mesh.tensor != 1:
        yield f"`mesh.tensor`: {config.mesh.tensor} devices would share layers, which are not split; use mesh.data"
    if config.distillation.teacher is not None and not config.losses.distillation:
        yield "`distillation.teacher`: losses.distillation has no weight for it; give it one, or leave it out"
    if not config.quantizer.train_encoder and config.losses.distillation:
        yield (
            "`quantizer.train_encoder`: what codebook 0 learns from a teacher it learns through the encoder; leave it "
            "true with losses.distillation"
        )


def crop_samples(config: CodecTrainingConfig, mimi: MimiConfig) -> int:
    """Samples of a crop, whole frames.

    Raises:
        ValueError: they are fewer than a window of the losses or of the discriminators needs.
    """
    frames = max(1, -(-round(config.data.crop_seconds * mimi.sampling_rate) // frame_samples(mimi)))
    samples = frames * frame_samples(mimi)
    least = max(config.losses.windows) if config.losses.log_mel or config.losses.magnitude else 1
    if config.losses.uses_discriminator:
        least = max(least, *(2 * window for window in config.discriminator.windows))
    if samples < least:
        raise ValueError(
            f"`data.crop_seconds` is {config.data.crop_seconds}, {samples} samples, but the windows of losses and "
            f"discriminators need {least}; give {least / mimi.sampling_rate:.3f} or more, or smaller windows"
        )
    return samples


def frame_samples(mimi: MimiConfig) -> int:
    """Samples of a frame of the codec.

    Raises:
        ValueError: the strides do not make the frame rate.
    """
    samples = samples_per_frame(mimi)
    if samples * mimi.frame_rate != mimi.sampling_rate:
        raise ValueError(
            f"`upsampling_ratios` {list(mimi.upsampling_ratios)} make frames of {samples} samples, but `frame_rate` "
            f"{mimi.frame_rate:g} at {mimi.sampling_rate} Hz ones of {mimi.sampling_rate / mimi.frame_rate:g}; leave "
            "`frame_rate` out, or choose ratios that make it"
        )
    return samples
