"""How the tensors of a checkpoint of Wav2Vec2 or HuBERT in PyTorch layout map to the parameter tree, and back."""

from ...checkpoints.rules import SCALE, Rule

WAV2VEC2_RULES = (
    # PyTorch calls the two parts of a kernel with weight norm one way today, and another way in older files
    Rule(
        r"(.*pos_conv_embed/conv)/scale",
        r"\1/parametrizations/weight/original0",
        SCALE,
        other_keys=(r"\1/weight_g",),
    ),
    Rule(
        r"(.*pos_conv_embed/conv)/kernel",
        r"\1/parametrizations/weight/original1",
        "conv",
        other_keys=(r"\1/weight_v",),
    ),
    Rule(r"(.*)/kernel", r"\1/weight", "transpose"),
    Rule(r"(.*)/scale", r"\1/weight", "identity"),
    Rule(r"(.*)/bias", r"\1/bias", "identity"),
    Rule(r"masked_spec_embed", r"masked_spec_embed", "identity"),
)
