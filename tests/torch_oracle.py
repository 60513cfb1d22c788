"""Upstream's PyTorch models as oracle: weights that hide nothing, double precision throughout, real files."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from transformers import modeling_rope_utils
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.helium import modeling_helium
from transformers.models.llama import modeling_llama
from transformers.models.mimi import modeling_mimi
from transformers.models.mistral import modeling_mistral
from transformers.models.moshi import modeling_moshi
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.voxtral import modeling_voxtral

from transformers_moshi_flax.former_names import FORMER_NAMES

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
"""Largest difference allowed, relative to the largest magnitude of the oracle's output."""

MODELING = (
    *(modeling_gemma2, modeling_gemma3, modeling_helium, modeling_llama, modeling_mistral, modeling_qwen2),
    *(modeling_qwen3, modeling_mimi, modeling_moshi, modeling_rope_utils, modeling_voxtral),
)
"""Upstream's files that force something to float32."""

Model = TypeVar("Model", bound=nn.Module)


def upstreams_name(name: str) -> str:
    """What the installed ``transformers`` calls a cache: ``cache`` is ``past_key_values`` up to 5.23."""
    if "cache" in inspect.signature(modeling_moshi.MoshiModel.forward).parameters:
        return name
    return {new: former for former, new in FORMER_NAMES.items()}.get(name, name)


def randomize(model: Model, seed: int = 0) -> Model:
    """Draw every weight and buffer of an upstream model so that a wrong or forgotten one shows, in place.

    Norms and layer scales are around 1 (Gemma's around 0, as 1 is added to them), biases are not zero, Mimi's
    codebooks are random with unequal cluster usage, and heads are large enough that the two best logits of a position
    are practically never close.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, std: float, mean: float = 0.0) -> None:
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))

    with torch.no_grad():
        for module_name, module in model.named_modules():
            for name, weight in module.named_parameters(recurse=False):
                kind = type(module).__name__
                if kind.endswith(("RMSNorm", "LayerNorm", "GroupNorm")) and name == "weight":
                    normal(weight, 0.3, mean=0.0 if kind.startswith("Gemma") else 1.0)
                elif name == "scale":
                    normal(weight, 0.3, mean=1.0)
                elif kind == "ParametrizationList" and name in ("original0", "original1"):
                    # weight norm: the norm at every place, and the direction
                    normal(weight, 0.3, mean=1.0) if name == "original0" else normal(weight, 1.0)
                elif name == "masked_spec_embed":
                    normal(weight, 1.0)
                elif name == "bias":
                    normal(weight, 0.3)
                elif isinstance(module, nn.Embedding):
                    normal(weight, 1.0)
                elif isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
                    normal(weight, (weight[0].numel()) ** -0.5)
                elif isinstance(module, nn.Linear | modeling_moshi.MoshiFlexibleLinear):
                    gain = 3.0 if module_name.endswith(("lm_head", "lm_heads")) else 1.0
                    normal(weight, gain * weight.shape[-1] ** -0.5)
                else:
                    raise TypeError(f"no rule to draw {module_name}.{name} of {type(module).__name__}")
            if isinstance(module, modeling_mimi.MimiEuclideanCodebook):
                module.cluster_usage.copy_(0.5 + 1.5 * torch.rand(module.cluster_usage.shape, generator=generator))
                normal(module.embed_sum, 1.0)
                module._embed = None  # upstream keeps the quotient of the two
    return model.eval()


class _TorchInDouble:
    """Stands for the name ``torch`` in upstream's modelling files: what they force to float32 becomes float64."""

    float = torch.float64
    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def double_oracle() -> Iterator[None]:
    """Upstream computes in float64 inside this context whatever it forces to float32 outside.

    That is: ``Tensor.float()`` (norms, losses, quantizer distances), the softmax of eager attention and the angles of
    the rotary embedding. The model itself comes from :func:`to_double`.
    """
    float_method = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double
    for modeling in MODELING:
        modeling.torch = _TorchInDouble()
    try:
        yield
    finally:
        torch.Tensor.float = float_method
        for modeling in MODELING:
            modeling.torch = torch


def to_double(model: Model) -> Model:
    """A float64 copy with the same weights; the rotary frequencies are computed anew in float64."""
    model = copy.deepcopy(model).double()
    with double_oracle():
        for module in model.modules():
            if type(module).__name__.endswith("RotaryEmbedding"):
                vars(module).update(vars(type(module)(module.config)))
            if hasattr(module, "scalar_embed_scale"):
                module.embed_scale.fill_(module.scalar_embed_scale)
            if isinstance(module, modeling_mimi.MimiEuclideanCodebook):
                module._embed = None
    return model


@contextlib.contextmanager
def oracle_precision(dtype: str) -> Iterator[None]:
    """No gradients, and :func:`double_oracle` for ``"float64"``."""
    with torch.no_grad(), double_oracle() if dtype == "float64" else contextlib.nullcontext():
        yield


def save_upstream(model: nn.Module, directory: str | Path) -> Path:
    """Write the model as upstream does: config.json and model.safetensors in PyTorch layout."""
    model.save_pretrained(directory)
    return Path(directory)


def load_ours(cls: type, directory: str | Path, dtype: str = "float32", **kwargs: Any) -> Any:
    """Our model from upstream's files, in ``dtype`` for weights and computation (float64 needs the fixture x64)."""
    return cls.from_pretrained(directory, dtype=jnp.dtype(dtype), from_pt=True, **kwargs)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Upstream's model and ours with the same weights, which went through ``directory``."""

    theirs: Any
    ours: Any
    directory: Path
    dtype: str

    @property
    def tol(self) -> float:
        return TOLERANCE[self.dtype]

    def upstream(self, *args: Any, **kwargs: Any) -> Any:
        """Upstream's forward, without gradients, in the precision of the pair."""
        with oracle_precision(self.dtype):
            return self.theirs(*args, **kwargs)


def make_pair(
    upstream_class: type, our_class: type, config: Any, directory: str | Path, dtype: str = "float32", seed: int = 0
) -> Pair:
    """Draw an upstream model with eager attention, save it, load ours from the files (float64 needs x64 on)."""
    theirs = randomize(upstream_class._from_config(config, attn_implementation="eager"), seed)
    save_upstream(theirs, directory)
    ours = load_ours(our_class, directory, dtype)
    return Pair(to_double(theirs) if dtype == "float64" else theirs, ours, Path(directory), dtype)


@contextlib.contextmanager
def single_codebook_works() -> Iterator[None]:
    """Let upstream's gating MLP take a codebook index when it has one plain linear: it crashes there otherwise."""
    forward = modeling_moshi.MoshiGatingMLP.forward

    def patched(self: Any, hidden_states: torch.Tensor, layer_idx: Any = None) -> torch.Tensor:
        return forward(self, hidden_states, None if isinstance(self.fc1, nn.Linear) else layer_idx)

    modeling_moshi.MoshiGatingMLP.forward = patched
    try:
        yield
    finally:
        modeling_moshi.MoshiGatingMLP.forward = forward


def numpy(value: Any) -> np.ndarray:
    """The values of a torch tensor or an array, without gradient."""
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def block_params(block: nn.Module, of: Callable[[torch.Tensor], Any] = lambda weight: weight) -> dict[str, Any]:
    """The weights of an upstream block of Moshi as our parameter tree, or their gradients through ``of``.

    Written apart from the package's checkpoint rules, so that the two check each other.
    """
    if isinstance(block, modeling_moshi.MoshiRMSNorm):
        return {"scale": jnp.asarray(numpy(of(block.weight)))}
    if isinstance(block, nn.Linear):
        return {"kernel": jnp.asarray(numpy(of(block.weight)).T)}
    if isinstance(block, nn.Embedding):
        return {"embedding": jnp.asarray(numpy(of(block.weight)))}
    if isinstance(block, modeling_moshi.MoshiFlexibleLinear):
        return {str(index): {"kernel": jnp.asarray(numpy(weight).T)} for index, weight in enumerate(of(block.weight))}
    children = {name: block_params(child, of) for name, child in block.named_children()}
    return {name: tree for name, tree in children.items() if tree}


def assert_close(ours: Any, theirs: Any, tol: float, where: str = "") -> None:
    """Same shape, and no element further away than ``tol`` times the largest magnitude of the oracle's array.

    Tuples and lists (hidden states, attentions) are compared item by item.
    """
    if isinstance(theirs, tuple | list):
        assert len(ours) == len(theirs), f"{where}: {len(ours)} items, the oracle has {len(theirs)}"
        for index, (our_item, their_item) in enumerate(zip(ours, theirs)):
            assert_close(our_item, their_item, tol, f"{where}[{index}]")
        return
    ours, theirs = numpy(ours), numpy(theirs)
    assert ours.shape == theirs.shape, f"{where}: shape {ours.shape}, the oracle has {theirs.shape}"
    assert np.isfinite(theirs).all(), f"{where}: the oracle is not finite"
    if theirs.size == 0:
        return
    if tol < 1e-6:
        assert ours.dtype == np.float64 == theirs.dtype, f"{where}: {ours.dtype} against {theirs.dtype}"
    scale = max(float(np.abs(theirs).max()), 1e-30)
    error = float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max())
    assert error <= tol * scale, (
        f"{where}: differs by {error:.3e} at scale {scale:.3e}: {error / scale:.1e} > {tol:.0e}"
    )
