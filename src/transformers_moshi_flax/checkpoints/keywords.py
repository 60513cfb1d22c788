"""Keywords of ``from_pretrained`` that programs for ``transformers`` pass always, and what they are here.

Those that ask for nothing are accepted. What cannot have its effect is told, and refused where ignoring it would be
wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from transformers.utils import logging

logger = logging.get_logger(__name__)

ATTENTIONS = ("eager", "sdpa")
"""Values of ``attn_implementation`` that are equal in what they compute, which is what is computed here."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "trust_remote_code": (False,),
    "resume_download": (True,),
    "low_cpu_mem_usage": (False, True),
    "proxies": ({},),
    "device_map": (),
    "from_tf": (False,),
    "from_flax": (False, True),
    "load_in_4bit": (False,),
    "load_in_8bit": (False,),
    "quantization_config": (),
    "state_dict": (),
    "variant": (),
    "max_memory": (),
    "offload_folder": (),
    "offload_buffers": (False,),
    "offload_state_dict": (False, True),
    "tp_plan": (),
    "tp_size": (1,),
    "device_mesh": (),
    "distributed_config": (),
    "key_mapping": ({},),
    "fusion_config": ({},),
    "experts_implementation": (),
    "use_kernels": (False,),
    "allow_all_kernels": (False,),
    "kernel_config": (),
    "disable_mmap": (False,),
    "tqdm_class": (),
    "mirror": (),
    "code_revision": (),
    "weights_only": (True,),
    "gguf_file": (),
    "adapter_kwargs": ({},),
    "adapter_name": ("default",),
    "_from_auto": (False, True),
    "_from_pipeline": (),
    "_commit_hash": (),
    "_fast_init": (False, True),
}
"""Values besides None with which a keyword asks for nothing."""

_TOLD: Mapping[str, str] = {
    "trust_remote_code": "code of a repository is never run by this class, only by the auto classes",
    "resume_download": "a download that was cut goes on always; force_download=True starts it afresh",
    "mirror": "set HF_ENDPOINT to load from another address",
    "code_revision": "code of a repository is never run by this class",
    "weights_only": "pickles are opened with weights_only=True always",
    "offload_folder": "weights are mapped from their files, none are put aside",
    "offload_buffers": "weights are mapped from their files, none are put aside",
    "adapter_name": "adapters are not read",
    "experts_implementation": "these models have no experts",
    "use_kernels": "XLA makes the kernels",
    "allow_all_kernels": "XLA makes the kernels",
    "kernel_config": "XLA makes the kernels",
    "disable_mmap": "weights are mapped from their files",
    "tqdm_class": "loading shows no bar",
    "_from_pipeline": "pipelines are no concern of loading",
    "_commit_hash": "give revision= the hash",
}
"""Keywords without which the same is loaded: a value that asks for something is told."""

_REFUSED: Mapping[str, str] = {
    "proxies": "set the environment variables HTTP_PROXY and HTTPS_PROXY",
    "device_map": "give sharding=, or load under jax.default_device",
    "max_memory": "give sharding=",
    "tp_plan": "give sharding=, a mesh with an axis 'tensor'",
    "tp_size": "give sharding=, a mesh with an axis 'tensor'",
    "device_mesh": "give sharding=, a mesh of JAX",
    "distributed_config": "give sharding=",
    "key_mapping": "save the weights under the names of the model",
    "fusion_config": "layers are not fused: leave it out",
    "from_tf": "weights of TensorFlow are not read: convert them to safetensors",
    "load_in_4bit": "give quantization='nf4' or 'int4'",
    "load_in_8bit": "give quantization='int8'",
    "quantization_config": "give quantization=, a kind or a QuantizationConfig",
    "state_dict": "save them as model.safetensors beside config.json and give the directory",
    "variant": "give the file itself, or rename it to model.safetensors",
    "gguf_file": "from_kyutai reads the GGUF files of Moshi: give it their directory",
    "adapter_kwargs": "adapters are not read: merge them into the base model",
}
"""Keywords without which something else would be loaded, with the remedy."""


@dataclasses.dataclass(frozen=True)
class Keywords:
    """What was passed, with the names of here.

    Attributes:
        dtype: of computation and storage, None follows the checkpoint.
        param_dtype: of storage, if it is another.
        token: of the Hub.
        rest: keywords that are none of these.
    """

    dtype: Any
    param_dtype: Any
    token: str | bool | None
    rest: dict[str, Any]


def understood(dtype: Any, param_dtype: Any, token: str | bool | None, keywords: Mapping[str, Any]) -> Keywords:
    """Take out of the keywords of a call those that ``transformers`` has and this library has not.

    Raises:
        ValueError: one that asks for what would be wrong to ignore, two that contradict each other.
    """
    rest = dict(keywords)
    if (torch_dtype := rest.pop("torch_dtype", None)) is not None:
        if dtype is not None and _dtype(dtype) != _dtype(torch_dtype):
            raise ValueError(f"dtype={dtype!r}, but torch_dtype={torch_dtype!r}, its former name: give one")
        dtype = torch_dtype
    token = one_token(token, rest.pop("use_auth_token", None))
    attention = rest.pop("attn_implementation", None)
    if attention is not None and attention not in ATTENTIONS:
        raise ValueError(
            f"attn_implementation={attention!r} is not here, only {' and '.join(map(repr, ATTENTIONS))}, which "
            "compute the same: leave it out"
        )
    for name in [name for name in rest if name in _NEUTRAL]:
        value = rest.pop(name)
        if value is None or value in _NEUTRAL[name]:
            continue
        if name in _REFUSED:
            raise ValueError(f"{name}={value!r:.200} cannot be followed: {_REFUSED[name]}")
        logger.warning(f"{name}={value!r:.200} has no effect: {_TOLD[name]}")
    return Keywords(_dtype(dtype), _dtype(param_dtype), token, rest)


def one_name(name: Any, former: Any) -> Any:
    """What is to be loaded, by ``pretrained_model_name_or_path`` or its former name here, ``name_or_path``."""
    if (name is None) == (former is None):
        raise ValueError(
            "from_pretrained needs pretrained_model_name_or_path, once: a directory, a weight file or a Hub id"
        )
    return former if name is None else name


def one_token(token: str | bool | None, use_auth_token: str | bool | None) -> str | bool | None:
    """``token`` by its name or the former one; ValueError for two different ones."""
    if use_auth_token is None:
        return token
    if token is not None and token != use_auth_token:
        raise ValueError("token and use_auth_token, its former name, differ: give one")
    return use_auth_token


def _dtype(dtype: Any) -> Any:
    """A dtype as JAX has it: ``"auto"`` is that of the checkpoint, PyTorch's and their names are those of here."""
    if isinstance(dtype, str):
        dtype = dtype.removeprefix("torch.")
        return None if dtype == "auto" else dtype
    if type(dtype).__module__ == "torch":
        return getattr(jnp, str(dtype).removeprefix("torch."), dtype)
    return dtype
