"""Moshi in Flax: full-duplex speech-text generation for JAX, with the API of Hugging Face ``transformers``.

Names are imported on first use, so ``import transformers_moshi_flax`` is quick.
"""

from .auto_processor import make_known
from .lazy_names import lazy_names

__version__ = "0.1.0"

_PUBLIC = {
    "modeling_flax_auto": [
        "FLAX_MODEL_FOR_CAUSAL_LM_MAPPING",
        "FLAX_MODEL_FOR_MULTIMODAL_LM_MAPPING",
        "FLAX_MODEL_MAPPING",
        "FlaxAutoModel",
        "FlaxAutoModelForCausalLM",
        "FlaxAutoModelForMultimodalLM",
    ],
    "adapters.config": ["LoraConfig"],
    "quantization.config": ["QuantizationConfig"],
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
    "models.audio_encoder": ["FlaxAudioEncoder"],
    "models.hubert": ["FlaxHubertModel", "FlaxHubertPreTrainedModel"],
    "models.llama": ["FlaxLlamaForCausalLM", "FlaxLlamaModel", "FlaxLlamaPreTrainedModel"],
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
    "models.moshi.prompt_flax_moshi": ["IdleCodes", "MoshiPrompt"],
    "models.speech_language": ["FlaxSpeechLanguageModel", "SpeechLanguageConfig"],
    "models.speech_language.processing_speech_language": ["SpeechLanguageProcessor"],
    "models.wav2vec2": ["FlaxWav2Vec2Model", "FlaxWav2Vec2PreTrainedModel"],
    "models.whisper": ["FlaxWhisperEncoder"],
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _PUBLIC)

make_known()
