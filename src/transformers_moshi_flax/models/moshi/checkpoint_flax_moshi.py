"""How the tensors of a Moshi checkpoint in PyTorch layout map to the parameter tree, and back."""

from ...checkpoints.rules import Rule
from ..mimi.checkpoint_flax_mimi import mimi_rules

MOSHI_RULES = (
    *mimi_rules(prefix="audio_encoder"),
    # per-codebook linears of the depth decoder: one stacked tensor in the file, one kernel per codebook here
    Rule(r"(.*)/linear/(?P<codebook>\d+)/kernel", r"\1.linear.weight", "transpose"),
    Rule(r"(.*)/mlp/(fc1|fc2)/(?P<codebook>\d+)/kernel", r"\1/mlp/\2/weight", "transpose", squeeze_single=True),
    Rule(r"((?:.*/)?(?:input_projections|lm_heads))/(?P<codebook>\d+)/kernel", r"\1/weight", "transpose"),
    Rule(r"(.*)/kernel", r"\1/weight", "transpose"),
    Rule(r"(.*)/(?:embedding|scale)", r"\1/weight", "identity"),
)
