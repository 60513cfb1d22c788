"""What a checkpoint is that cannot be loaded as it lies, and what to do with it: for messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .files import Source

_KYUTAIS = (
    "loaded with from_kyutai (of FlaxMoshiForConditionalGeneration and MoshiProcessor), or converted with "
    "moshi-flax convert --from kyutai"
)
_MIMI = re.compile(r"tokenizer-[0-9a-f]+-checkpoint\d+\.safetensors")
_TOKENIZER = re.compile(r"tokenizer_spm_\w+\.model")
_UNREAD = re.compile(r".*(?<!q8)\.gguf")
_KYUTAI_FILES = (_MIMI, _TOKENIZER, re.compile(r"model\.q[48]\.(?:safetensors|gguf)"))
_KYUTAI_TENSORS = ("depformer", "text_emb.weight", "quantizer.rvq_", "encoder.model.")
"""How names begin that only Kyutai's files have, of the language model and of Mimi."""


def is_kyutai_config(values: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of Kyutai's own format."""
    return any(field in values for field in ("depformer_dim", "moshi_name", "lora"))


def is_foreign_config(values: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is not of ``transformers``."""
    return is_kyutai_config(values) or values.get("model_type") == "personaplex"


def no_model(source: Source, values: Mapping[str, Any] | None, names: Iterable[str] | None = None) -> str | None:
    """What a checkpoint is that holds no whole model in a form that is read, as a predicate with a remedy.

    Args:
        source: where it lies.
        values: its ``config.json``, None if it has none.
        names: its files, looked up if None.

    Returns:
        Such as ``"holds a LoRA adapter ...: merge it ..."``, None for all else.
    """
    values = values or {}
    names = source.filenames() if names is None else set(names)
    weights = [name for name in names if name.endswith((".safetensors", "q8.gguf")) and not _is_part(name)]
    if "lora.safetensors" in names and not weights:
        return (
            "holds a LoRA adapter of moshi-finetune, no whole model: load its base model, and then the adapter with "
            "load_adapter; merge_adapter makes one model of both"
        )
    if "adapter_config.json" in names or any(name.startswith("adapter_model.") for name in names):
        return (
            "holds an adapter of PEFT, no whole model: load its base model, and then the adapter with load_adapter; "
            "merge_adapter makes one model of both"
        )
    if "checkpoints" in names and "config.yaml" in names:
        return "is the folder of a training run: load its export/, or write one with moshi-flax export-checkpoint"
    unread = sorted(name for name in names if _UNREAD.fullmatch(name))
    if unread and not weights:
        return f"has no 'model.safetensors': {unread[0]} is of a type that is not read; get the bfloat16 weights"
    return None


def foreign(source: Source, values: Mapping[str, Any] | None) -> str | None:
    """As :func:`no_model`, also of Kyutai's own files, for those who read the formats of ``transformers``."""
    names = source.filenames()
    if known := no_model(source, values, names):
        return known
    if is_foreign_config(values) if values else any(pattern.fullmatch(n) for n in names for pattern in _KYUTAI_FILES):
        return f"is in Kyutai's own format, which is {_KYUTAIS}"
    return None


def foreign_tensors(keys: Iterable[str]) -> str | None:
    """What the names of tensors say about a file that is not of ``transformers``, as a predicate with a remedy."""
    keys = list(keys)
    if any(".lora_A" in key or ".lora_B" in key for key in keys):
        return "they are those of an adapter: merge it into its base model, save that and load it"
    if any(key.startswith(_KYUTAI_TENSORS) for key in keys):
        return f"they are those of Kyutai's own files, which are {_KYUTAIS}"
    return None


def _is_part(name: str) -> bool:
    """Whether a file of weights is not the whole language model."""
    return name == "lora.safetensors" or bool(_MIMI.fullmatch(name))
