"""Moshi in Flax: full-duplex speech-text generation for JAX, with the API of Hugging Face ``transformers``.

Names are imported on first use, so ``import transformers_moshi_flax`` is quick.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "modeling_flax_utils": ["FlaxPreTrainedModel"],
    "generation": [
        "FlaxGenerationMixin",
        "FlaxEpsilonLogitsWarper",
        "FlaxEtaLogitsWarper",
        "FlaxExponentialDecayLengthPenalty",
        "FlaxForceTokensLogitsProcessor",
        "FlaxForcedBOSTokenLogitsProcessor",
        "FlaxForcedEOSTokenLogitsProcessor",
        "FlaxInfNanRemoveLogitsProcessor",
        "FlaxLogitNormalization",
        "FlaxLogitsProcessor",
        "FlaxLogitsProcessorList",
        "FlaxLogitsWarper",
        "FlaxMinLengthLogitsProcessor",
        "FlaxMinNewTokensLengthLogitsProcessor",
        "FlaxMinPLogitsWarper",
        "FlaxNoBadWordsLogitsProcessor",
        "FlaxNoRepeatNGramLogitsProcessor",
        "FlaxRepetitionPenaltyLogitsProcessor",
        "FlaxSequenceBiasLogitsProcessor",
        "FlaxSuppressTokensAtBeginLogitsProcessor",
        "FlaxSuppressTokensLogitsProcessor",
        "FlaxTemperatureLogitsWarper",
        "FlaxTopKLogitsWarper",
        "FlaxTopPLogitsWarper",
        "FlaxTypicalLogitsWarper",
    ],
    "models.mimi": [
        "FlaxMimiDecoderModel",
        "FlaxMimiEncoderModel",
        "FlaxMimiModel",
        "FlaxMimiPreTrainedModel",
    ],
    "models.moshi": [
        "FlaxMoshiDepthDecoder",
        "FlaxMoshiForCausalLM",
        "FlaxMoshiForConditionalGeneration",
        "FlaxMoshiModel",
        "FlaxMoshiPreTrainedModel",
    ],
    "models.moshi.pcm": ["PcmBuffer", "PcmDialogue", "PcmFrame"],
    "models.moshi.processing_moshi": ["MoshiProcessor"],
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
