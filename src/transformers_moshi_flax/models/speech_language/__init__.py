"""An encoder of audio and a language model, joined."""

from .configuration_speech_language import SpeechLanguageConfig
from .modeling_flax_speech_language import FlaxSpeechLanguageModel
from .modules_flax_speech_language import FlaxSpeechLanguageModule

__all__ = ["FlaxSpeechLanguageModel", "FlaxSpeechLanguageModule", "SpeechLanguageConfig"]
