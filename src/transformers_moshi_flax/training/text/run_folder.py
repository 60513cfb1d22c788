"""The folder of a language model's run: as that of a run of Moshi, with another class of model in it."""

from __future__ import annotations

from ...checkpoints.configs import read_config
from ...checkpoints.files import Source
from ...modeling_flax_auto import FLAX_MODEL_FOR_CAUSAL_LM_MAPPING
from ...modeling_flax_utils import FlaxPreTrainedModel
from ..run_folder import RunFolder


class TextRunFolder(RunFolder):
    """See :class:`RunFolder`; ``export/`` has a language model for ``FlaxAutoModelForCausalLM.from_pretrained``."""

    mapping = FLAX_MODEL_FOR_CAUSAL_LM_MAPPING
    called = "language model"

    def freezes(self) -> bool:
        """As of :class:`RunFolder`."""
        config = self.configuration()
        return bool(config.model.freeze) or config.adapter.r is not None

    def model_class(self, source: Source) -> type[FlaxPreTrainedModel]:
        model_type = read_config(source).get("model_type")
        model_class = self.mapping.of_model_type(model_type)
        if model_class is None:
            known = ", ".join(self.mapping.model_types)
            raise ValueError(f"{source.name!r} has model_type={model_type!r}, which is no {self.called} of {known}")
        return model_class
