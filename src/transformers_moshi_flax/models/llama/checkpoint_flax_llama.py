"""How the tensors of a language model's checkpoint in PyTorch layout map to the parameter tree, and back."""

from ...checkpoints.rules import Rule

LLAMA_RULES = (
    Rule(r"(.*)/kernel", r"\1/weight", "transpose"),
    Rule(r"(.*)/(?:embedding|scale)", r"\1/weight", "identity"),
    Rule(r"(.*)/bias", r"\1/bias", "identity"),
)
