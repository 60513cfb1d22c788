"""One implementation's steps of training in a process of its own: seconds, processor seconds and memory.

Run as a program, ``python -m utils.benchmark.training_sides SIDE FOLDER THREADS BATCH FRAMES STEPS``, it prints what
it measured as JSON. Every side trains all of Moshi but Mimi, which it frees, in float32 with AdamW; those with LoRA an
adapter of rank 16 of all linear layers but the heads.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from utils.benchmark.generate import limit_threads

SIDES = {
    "ours": "this library",
    "ours, recomputed": "this library, layers scanned and recomputed",
    "ours, accumulated": "this library, in two micro-batches",
    "ours, two batches": "this library, two such batches as micro-batches of one update, a batch",
    "ours, lora": "this library, LoRA",
    "ours, qlora": "this library, LoRA beside nf4",
    "upstream": "upstream PyTorch",
    "mended": "upstream, products mended",
    "mended, recomputed": "upstream, products mended, gradient checkpointing",
    "mended, lora": "upstream, products mended, PEFT's LoRA",
}
QUANTIZED = ("ours, qlora",)
"""Those whose losses are others."""

RANK = 16


@dataclasses.dataclass
class Result:
    """What a process measured.

    Attributes:
        seconds, processor_seconds: of every step but the first; half a step's where it takes two batches.
        text_loss: of the first step, the same on all sides.
        step_bytes: the largest resident size during these steps, less what the imports left.
        process_bytes: the same from loading and compilation on.
        missing: why there is nothing.
    """

    seconds: list[float] = dataclasses.field(default_factory=list)
    processor_seconds: list[float] = dataclasses.field(default_factory=list)
    text_loss: float = float("nan")
    step_bytes: int = 0
    process_bytes: int = 0
    missing: str = ""


def batches_of(side: str) -> int:
    """Batches that a step takes."""
    return 2 if side == "ours, two batches" else 1


def draw_training_batch(config: Any, batch: int, frames: int) -> dict[str, np.ndarray]:
    """Random frames, all of them real; the inputs are as upstream takes them."""
    rng = np.random.default_rng(0)
    codes = (2, batch, config.num_codebooks, frames)
    text, (user, moshi) = (
        rng.integers(0, config.vocab_size, (batch, frames)),
        rng.integers(0, config.audio_vocab_size, codes),
    )
    arrays = {"input_ids": text, "user_audio_codes": user, "moshi_audio_codes": moshi}
    arrays |= {"text_labels": text, "audio_labels": moshi, "attention_mask": np.ones_like(text)}
    return {name: array.astype(np.int32) for name, array in arrays.items()}


def prepare_ours(side: str, folder: str, batch: int, frames: int) -> Callable[[], float]:
    """The step of ``make_train_step``; gives the text loss."""
    import jax

    from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
    from transformers_moshi_flax.training.objective import ObjectiveConfig
    from transformers_moshi_flax.training.optimizer import OptimizerConfig, make_optimizer
    from transformers_moshi_flax.training.scanned_layers import stack_layers
    from transformers_moshi_flax.training.train_state import create_train_state, split_params
    from transformers_moshi_flax.training.train_step import make_train_step

    quantization = "nf4" if side in QUANTIZED else None
    model, params = FlaxMoshiForConditionalGeneration.from_pretrained(
        folder, quantization=quantization, _do_init=False
    )
    recomputed = side == "ours, recomputed"
    module = model.module.clone(gradient_checkpointing=recomputed, scan_layers=recomputed)
    if side.endswith("lora"):
        params, frozen = with_adapter(model, params)
    else:
        params, frozen = split_params(stack_layers(params) if recomputed else params)[0], {}
    optimizer, schedule = make_optimizer(OptimizerConfig(schedule="constant", max_grad_norm=0.0), 1000, params)
    state = create_train_state(params, frozen, optimizer)
    del params, frozen
    objective = ObjectiveConfig(text_padding_weight=1.0)
    parts = 2 if side in ("ours, accumulated", "ours, two batches") else 1
    step = make_train_step(module, objective, optimizer, schedule, accumulation_steps=parts)
    arrays = draw_training_batch(model.config, batch, frames)
    if batches_of(side) == 2:
        arrays = {name: np.concatenate([array, array]) for name, array in arrays.items()}

    def run() -> float:
        nonlocal state
        state, metrics = step(state, arrays)
        jax.block_until_ready(state)
        return float(metrics["text_loss"])

    return run


def with_adapter(model: Any, params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The leaves of a new adapter, and the parameters beside them without Mimi's."""
    import jax
    from flax.traverse_util import flatten_dict, unflatten_dict

    from transformers_moshi_flax import LoraConfig
    from transformers_moshi_flax.adapters.lora import new_leaves, trained_leaves
    from transformers_moshi_flax.adapters.targets import linear_layers, targeted

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    layers = targeted(config, linear_layers(model._float_shape_tree, model.checkpoint_rules))
    leaves = new_leaves(config, layers, jax.random.key(0))
    trained = trained_leaves(leaves)
    del params["audio_encoder"]
    settings = {path: leaf for path, leaf in leaves.items() if path not in trained}
    frozen = {**flatten_dict(params, sep="/"), **settings}
    return unflatten_dict(trained, sep="/"), unflatten_dict(frozen, sep="/")


def prepare_upstream(side: str, folder: str, batch: int, frames: int) -> Callable[[], float]:
    """``model(...).loss.backward()`` and ``torch.optim.AdamW``; gives the text loss, in the first step only."""
    import torch
    from torch.nn import functional
    from transformers import MoshiForConditionalGeneration
    from transformers.models.moshi import modeling_moshi

    def mended(self: Any, x: torch.Tensor, layer_idx: torch.Tensor | None = None) -> torch.Tensor:
        # upstream's own product copies the weights for every row of the batch
        weight = self.weight if layer_idx is None else self.weight[layer_idx]
        return torch.bmm(x.expand(-1, len(weight), -1).transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)

    if side.startswith("mended"):
        modeling_moshi.MoshiFlexibleLinear.forward = mended
    model = MoshiForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).train()
    if "recomputed" in side:
        model.gradient_checkpointing_enable()
    model.audio_encoder = None
    if side.endswith("lora"):
        model = with_pefts_adapter(model)
    # a mask together with labels crashes upstream
    arrays = draw_training_batch(model.config, batch, frames)
    inputs = {name: torch.tensor(array).long() for name, array in arrays.items() if name != "attention_mask"}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1)
    text_losses: list[float] = []

    def run() -> float:
        outputs = model(**inputs)
        if not text_losses:
            with torch.no_grad():
                logits = outputs.logits[:, :-1].flatten(0, 1)
                text_losses.append(functional.cross_entropy(logits, inputs["text_labels"][:, 1:].flatten()).item())
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return text_losses[0]

    return run


def with_pefts_adapter(model: Any) -> Any:
    """The same layers; weights of three dimensions are PEFT's parameters."""
    import peft

    names = [name for name, module in model.named_modules() if type(module).__name__ == "Linear"]
    names = [name for name in names if not name.endswith(("lm_head", "lm_heads"))]
    by_codebook = [name for name, weight in model.named_parameters() if weight.ndim == 3 and "lm_heads" not in name]
    by_codebook = [name for name in by_codebook if "embed" not in name]
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, target_parameters=by_codebook)
    return peft.get_peft_model(model, config)


def memory(name: str) -> int:
    """A line of this process's status: ``VmRSS``, or ``VmHWM``, the largest since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def reset_peak() -> None:
    """Gives free memory back and begins a new maximum."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def measure_side(side: str, folder: str, batch: int, frames: int, steps: int) -> Result:
    """Runs ``steps`` steps and one before them, in this process."""
    result = Result()
    if side.startswith("ours"):
        import jax
        import jax.numpy as jnp

        import transformers_moshi_flax.models.moshi.modeling_flax_moshi  # noqa: F401

        jax.block_until_ready(jnp.zeros(1))
        prepare = prepare_ours
    else:
        import torch  # noqa: F401
        import transformers.models.moshi.modeling_moshi  # noqa: F401

        prepare = prepare_upstream
    reset_peak()
    imports = memory("VmRSS")
    run = prepare(side, folder, batch, frames)
    result.text_loss = run()
    result.process_bytes = memory("VmHWM") - imports
    reset_peak()
    for _ in range(steps):
        begin, processor = time.perf_counter(), time.process_time()
        run()
        result.seconds.append((time.perf_counter() - begin) / batches_of(side))
        result.processor_seconds.append((time.process_time() - processor) / batches_of(side))
    result.step_bytes = memory("VmHWM") - imports
    result.process_bytes = max(result.process_bytes, result.step_bytes)
    return result


def main(side: str, folder: str, threads: int, batch: int, frames: int, steps: int) -> None:
    """Prints the result as JSON; a side that needs more memory than is free says so."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if side.startswith(("upstream", "mended")):  # its allocator fails in an orderly way
        resource.setrlimit(resource.RLIMIT_AS, (available, available))
    limit_threads(threads)
    try:
        result = measure_side(side, folder, batch, frames, steps)
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        result = Result(missing=f"needs more than the {available / 1e9:.0f} GB that are free")
    print(json.dumps(dataclasses.asdict(result)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
