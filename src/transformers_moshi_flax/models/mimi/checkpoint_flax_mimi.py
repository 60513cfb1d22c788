"""How the tensors of a Mimi checkpoint in PyTorch layout map to the parameter tree, and back."""

import re

from ...checkpoints.rules import Rule


def mimi_rules(prefix: str = "") -> tuple[Rule, ...]:
    """The table of Mimi, for its own checkpoints or as the part ``prefix`` (``"audio_encoder"``) of a larger one.

    Files have the flat names of the first Mimi (``encoder.layers``, ``encoder_transformer``, ``quantizer``, ...),
    whatever the modules of the ``transformers`` version that wrote them are called.

    SEANet's transposed convolutions cannot be told from the others by their names, so all kernels reverse their axes:
    (out, in, width) becomes (width, in, out), and a transposed (in, out, width) becomes (width, out, in), which is
    also how ``flax.linen.ConvTranspose(transpose_kernel=True)`` keeps it.
    """
    start = f"({re.escape(prefix)}/)" if prefix else "()"
    return (
        Rule(rf"{start}(.*/codebook/(?:cluster_usage|embed_sum|initialized))", r"\1\2", "identity"),
        Rule(rf"{start}(.*layer_scale/scale)", r"\1\2", "identity"),
        Rule(rf"{start}(.*layernorm)/scale", r"\1\2/weight", "identity"),
        Rule(rf"{start}(.*/bias)", r"\1\2", "identity"),
        Rule(rf"{start}((?:.*/)?conv|quantizer/.*/(?:input|output)_proj)/kernel", r"\1\2/weight", "conv"),
        Rule(rf"{start}(.*)/kernel", r"\1\2/weight", "transpose"),
    )


MIMI_RULES = mimi_rules()

CODEBOOKS = r"quantizer\.\w+_residual_vector_quantizer\.layers\.\d+\.codebook\."
"""Codebooks refine those before them: with a smaller ``num_quantizers`` the first ones are a whole model."""
