"""How the tensors of a joined model in PyTorch layout map to the parameter tree, and back: the tables of its parts."""

from ...checkpoints.rules import Rule
from ..llama.checkpoint_flax_llama import LLAMA_RULES
from ..wav2vec2.checkpoint_flax_wav2vec2 import WAV2VEC2_RULES

SPEECH_LANGUAGE_RULES = (
    Rule(r"(audio_tower/masked_spec_embed)", r"\1", "identity"),
    Rule(r"(audio_tower/.*layer_scale/scale)", r"\1", "identity"),  # Mimi's
    *WAV2VEC2_RULES,
    *LLAMA_RULES,
)
