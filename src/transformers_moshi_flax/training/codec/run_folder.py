"""The folder of a codec's run: as that of a run of Moshi, with a Mimi in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import MimiConfig

from ...checkpoints.companions import copy_companions
from ...checkpoints.configs import load_config
from ...checkpoints.files import Source
from ...checkpoints.writing import write_text
from ...modeling_flax_utils import FlaxPreTrainedModel
from ...models.mimi import FlaxMimiModel
from ..run_folder import RunFolder
from .configuration import CodecTrainingConfig
from .step import DISTILLATION


class CodecRunFolder(RunFolder):
    """See :class:`RunFolder`; ``export/`` has a Mimi for ``FlaxMimiModel.from_pretrained``."""

    configuration_class = CodecTrainingConfig

    def keep_model(self, model: FlaxPreTrainedModel, source: Source | None) -> None:
        """Write down the configuration of the codec, and copy what lies beside its weights."""
        self.model.mkdir(exist_ok=True)
        if source is not None:
            copy_companions(source, self.model)
        write_text(self.model / "config.json", model.config.to_json_string(use_diff=True))

    def load_config(self) -> MimiConfig:
        """The configuration of the codec."""
        return load_config(MimiConfig, Source.locate(self.model))

    def load_model(self, **fields: Any) -> FlaxMimiModel:
        """The codec of :meth:`keep_model`, without parameters."""
        return FlaxMimiModel(self.load_config(), _do_init=False, **fields)

    def freezes(self) -> bool:
        """As of :class:`RunFolder`."""
        return bool(self.configuration().model.freeze)

    def write_export(self, params: Mapping[str, Any], folder: Path, to_pt: bool = False) -> None:
        """As of :class:`RunFolder`; what is trained beside the codec is left out."""
        own = {name: part for name, part in params.items() if name != DISTILLATION}
        super().write_export(own, folder, to_pt)
