"""How the tensors of the encoder in a checkpoint of Whisper in PyTorch layout map to the parameter tree, and back."""

from ...checkpoints.rules import Rule

WHISPER_RULES = (
    Rule(r"(.*)/kernel", r"\1/weight", "transpose"),
    Rule(r"(.*)/(?:embedding|scale)", r"\1/weight", "identity"),
    Rule(r"(.*)/bias", r"\1/bias", "identity"),
)
