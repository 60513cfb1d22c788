"""The folder of a speech-language model's run: as that of a language model's, with another class of model in it."""

from __future__ import annotations

from flax.traverse_util import flatten_dict

from ...modeling_flax_auto import FLAX_MODEL_FOR_MULTIMODAL_LM_MAPPING
from ...models.speech_language.modeling_flax_speech_language import UNTRAINED
from ..text.run_folder import TextRunFolder


class SpeechTextRunFolder(TextRunFolder):
    """See :class:`RunFolder`; ``export/`` has model and processor for their ``from_pretrained``."""

    mapping = FLAX_MODEL_FOR_MULTIMODAL_LM_MAPPING
    called = "speech-language model"

    def freezes(self) -> bool:
        """As of :class:`RunFolder`; some parameters are never trained."""
        return super().freezes() or any(
            path in flatten_dict(self.load_model().params_shape_tree, sep="/") for path in UNTRAINED
        )
