"""Outputs of two checkpoints on the same inputs; a checkpoint in PyTorch layout is run by upstream's own model."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from transformers_moshi_flax.cli.checkpoints import Checkpoint
from transformers_moshi_flax.cli.comparing import value_difference

TOLERANCE = 1e-3
"""Largest difference of outputs that rounding may explain, relative to the largest magnitude: all is in float32."""

CODES_TOLERANCE = 0.01
"""Largest share of audio codes that may differ: the nearest of two codebook entries can be a matter of rounding."""

FRAMES = 8


@dataclass(frozen=True)
class OutputDifference:
    """How an output of two models differs.

    Attributes:
        name: of the output.
        relative: the largest difference by the largest magnitude; for codes the share of those that differ.
        agrees: whether rounding may explain it.
    """

    name: str
    relative: float
    agrees: bool


def implementation(checkpoint: Checkpoint, model_class: type) -> str:
    """``"pytorch"`` where upstream's model of the same architecture can load the checkpoint, else ``"flax"``."""
    from transformers_moshi_flax.checkpoints.files import LAYOUTS

    named = checkpoint.source.file is None or checkpoint.source.file.name in LAYOUTS["pt"]
    architecture = model_class.__name__.removeprefix("Flax")
    same = ((checkpoint.config or {}).get("architectures") or [None])[0] == architecture
    there = importlib.util.find_spec("torch") is not None
    return "pytorch" if checkpoint.layout == "pt" and named and same and there else "flax"


def has_outputs(model_class: type) -> bool:
    """Whether :func:`run` knows the class."""
    return model_class.__name__ in ("FlaxMoshiForConditionalGeneration", "FlaxMimiModel")


def run(checkpoint: Checkpoint, model_class: type) -> dict[str, np.ndarray]:
    """Load a checkpoint in float32 and run it on inputs that depend on its configuration alone.

    Returns:
        For Moshi ``text_logits`` (frames, vocabulary), ``audio_logits`` (codebooks, codes), and as for Mimi
        ``audio_codes`` (codebooks, frames) and ``audio_values`` (samples).
    """
    if implementation(checkpoint, model_class) == "pytorch":
        return _run_pytorch(checkpoint, model_class.__name__.removeprefix("Flax"))
    return _run_flax(checkpoint, model_class)


def _mimi_inputs(config: Any) -> dict[str, np.ndarray]:
    from transformers_moshi_flax.models.mimi.topology import samples_per_frame

    draw = np.random.default_rng(0)
    codes = (1, config.num_quantizers, FRAMES)
    return {
        "input_values": draw.normal(0, 0.1, (1, config.audio_channels, FRAMES * samples_per_frame(config))).astype(
            np.float32
        ),
        "audio_codes": draw.integers(0, config.codebook_size, codes, np.int32),
    }


def _moshi_inputs(config: Any) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    codes = (1, config.num_codebooks, FRAMES)
    return {
        "input_ids": draw.integers(0, config.vocab_size, (1, FRAMES), np.int32),
        "moshi_audio_codes": draw.integers(0, config.audio_vocab_size, codes, np.int32),
        "user_audio_codes": draw.integers(0, config.audio_vocab_size, codes, np.int32),
    }


def _depth_inputs(config: Any) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(2)
    text = draw.integers(0, config.vocab_size, (1, 1), np.int32)
    codes = draw.integers(0, config.audio_vocab_size, (1, config.num_codebooks - 1), np.int32)
    state = draw.normal(0, 1, (1, 1, config.input_size)).astype(np.float32)
    return {"input_ids": np.concatenate([text, codes], axis=1), "last_hidden_state": state}


def _run_flax(checkpoint: Checkpoint, model_class: type[Any]) -> dict[str, np.ndarray]:
    import jax
    import jax.numpy as jnp

    from transformers_moshi_flax import FlaxMimiModel

    outputs = {}
    with jax.default_matmul_precision("highest"):
        if checkpoint.is_kyutai:
            model = model_class.from_kyutai(checkpoint.name, jnp.float32)
        else:
            model = model_class.from_pretrained(checkpoint.name, jnp.float32, from_pt=checkpoint.layout == "pt")
        mimi, params = model, model.params
        if model_class is not FlaxMimiModel:
            config = model.config
            outputs["text_logits"] = _compiled(model, params, _moshi_inputs(config))[0]
            depth = model.get_depth_decoder()
            depth_inputs = _depth_inputs(config.depth_decoder_config)
            outputs["audio_logits"] = _compiled(depth, params["depth_decoder"], depth_inputs)[0]
            mimi, params = model.audio_encoder, params["audio_encoder"]
        inputs = _mimi_inputs(mimi.config)
        outputs["audio_codes"] = mimi.encode(inputs["input_values"], params=params).audio_codes[0]
        outputs["audio_values"] = mimi.decode(inputs["audio_codes"], params=params).audio_values[0, 0]
    return {name: np.asarray(output) for name, output in outputs.items()}


def _compiled(model: Any, params: Any, inputs: dict[str, np.ndarray]) -> Any:
    """Logits by one program: operation by operation takes several times as long."""
    import jax

    return jax.jit(lambda params, inputs: model(**inputs, params=params).logits)(params, inputs)


def _run_pytorch(checkpoint: Checkpoint, architecture: str) -> dict[str, np.ndarray]:
    import torch
    import transformers

    def tensors(inputs: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        made = {name: torch.from_numpy(value) for name, value in inputs.items()}
        return {name: value if value.is_floating_point() else value.long() for name, value in made.items()}

    outputs = {}
    folder = checkpoint.name if checkpoint.source.folder is None else checkpoint.source.folder
    model = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        mimi = model
        if architecture != "MimiModel":
            config = model.config
            outputs["text_logits"] = model(**tensors(_moshi_inputs(config))).logits[0]
            depth = tensors(_depth_inputs(config.depth_decoder_config))
            # without a mask upstream's eager attention sees the codes that come after
            mask = torch.ones_like(depth["input_ids"])
            outputs["audio_logits"] = model.depth_decoder(**depth, attention_mask=mask).logits[0]
            mimi = model.audio_encoder
        inputs = tensors(_mimi_inputs(mimi.config))
        outputs["audio_codes"] = mimi.encode(inputs["input_values"]).audio_codes[0]
        outputs["audio_values"] = mimi.decode(inputs["audio_codes"]).audio_values[0, 0]
    return {name: output.numpy() for name, output in outputs.items()}


def output_differences(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> list[OutputDifference]:
    """Compare the outputs of :func:`run`; one that has another shape, or is not finite on one side, differs wholly."""
    found = []
    for name, left in a.items():
        right = b[name]
        if left.shape != right.shape:
            found.append(OutputDifference(name, 1.0, agrees=False))
        elif np.issubdtype(left.dtype, np.integer):
            share = float(np.mean(left != right))
            found.append(OutputDifference(name, share, share <= CODES_TOLERANCE))
        else:
            largest, not_finite = value_difference(left, right)
            relative = largest / max(float(np.abs(left[np.isfinite(left)]).max(initial=0.0)), 1e-30)
            found.append(OutputDifference(name, relative, not not_finite and relative <= TOLERANCE))
    return found
