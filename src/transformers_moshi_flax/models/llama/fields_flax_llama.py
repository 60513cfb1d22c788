"""What the language models differ in, as fields that follow from upstream's configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    HeliumConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from ...nn.activations import ACT2FN
from ...ops.rotary import inverse_frequencies

CONFIG_CLASSES: tuple[type[PreTrainedConfig], ...] = (
    LlamaConfig,
    Gemma2Config,
    Gemma3TextConfig,
    HeliumConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

FULL, SLIDING = "full_attention", "sliding_attention"
"""The kinds of layers, as ``layer_types`` has them."""

Rope = tuple[tuple[str, Any], ...]
"""The items of ``rope_parameters``, which can be hashed."""


class LayerKind(NamedTuple):
    """What layers of one model differ in.

    Attributes:
        window: how many tokens, its own included, a token may attend; None for all.
        rope: of the rotary embedding.
    """

    window: int | None
    rope: Rope


@dataclasses.dataclass(frozen=True)
class LlamaFields:
    """A language model of this family.

    Attributes:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads,
            head_dim, max_position_embeddings, rms_norm_eps, initializer_range, attention_dropout: as of the
            configuration.
        tie_word_embeddings: the head is the table of embeddings.
        activation: of the MLP, a name.
        layers: the kind of each layer.
        query_scale: of the scores of attention.
        qkv_bias, output_bias, mlp_bias: whether these projections have biases.
        qk_norm: queries and keys are normed, each head by itself.
        norm_offset: what is added to the scales of norms.
        post_norms: what attention and MLP give is normed, too.
        interleaved_rotary: pairs of the rotary embedding are neighbours.
        embedding_scale: by which embeddings are multiplied, or None.
        attention_soft_cap, logits_soft_cap: as ``attn_logit_softcapping`` and ``final_logit_softcapping``.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    initializer_range: float
    attention_dropout: float
    tie_word_embeddings: bool
    activation: str
    layers: tuple[LayerKind, ...]
    query_scale: float
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    post_norms: bool = False
    interleaved_rotary: bool = False
    embedding_scale: float | None = None
    attention_soft_cap: float | None = None
    logits_soft_cap: float | None = None

    @property
    def is_dynamic(self) -> bool:
        """Whether the rotary embedding depends on the length of a text."""
        return any(("rope_type", "dynamic") in kind.rope for kind in self.layers)


def of_llama(config: Any) -> dict[str, Any]:
    bias = bool(config.attention_bias)
    return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": bool(config.mlp_bias)}


def of_qwen3(config: Any) -> dict[str, Any]:
    return {"qkv_bias": bool(config.attention_bias), "output_bias": bool(config.attention_bias), "qk_norm": True}


def of_gemma(config: Any) -> dict[str, Any]:
    bias = bool(config.attention_bias)
    attention_cap, logits_cap = config.attn_logit_softcapping, config.final_logit_softcapping
    return {
        "activation": config.hidden_activation,
        "query_scale": config.query_pre_attn_scalar**-0.5,
        "qkv_bias": bias,
        "output_bias": bias,
        "qk_norm": config.model_type == "gemma3_text",
        "norm_offset": 1.0,
        "post_norms": True,
        "embedding_scale": config.hidden_size**0.5,
        "attention_soft_cap": None if attention_cap is None else float(attention_cap),
        "logits_soft_cap": None if logits_cap is None else float(logits_cap),
    }


def of_helium(config: Any) -> dict[str, Any]:
    return {
        "qkv_bias": bool(config.attention_bias),
        "mlp_bias": bool(config.mlp_bias),
        "interleaved_rotary": True,
    }


DIFFERENCES: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "gemma2": of_gemma,
    "gemma3_text": of_gemma,
    "helium": of_helium,
    "llama": of_llama,
    "mistral": lambda config: {},
    "qwen2": lambda config: {"qkv_bias": True},
    "qwen3": of_qwen3,
}
"""The fields in which a model differs from the plainest one, by ``model_type``."""


def fields_of(config: Any) -> LlamaFields:
    """The fields of a configuration of one of :data:`CONFIG_CLASSES`.

    Raises:
        ValueError: it asks for what is not supported; field, value and remedy are named.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    check_supported(config, heads, kv_heads, head_dim)
    fields: dict[str, Any] = {
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "activation": getattr(config, "hidden_act", None),
        "layers": layer_kinds(config, head_dim),
        "query_scale": head_dim**-0.5,
        "rms_norm_eps": float(config.rms_norm_eps),
        "attention_dropout": float(config.attention_dropout or 0),
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        **DIFFERENCES[config.model_type](config),
    }
    names = [field.name for field in dataclasses.fields(LlamaFields)]
    as_they_are = {name: getattr(config, name) for name in names if name not in fields and hasattr(config, name)}
    ACT2FN[fields["activation"]]
    return LlamaFields(**as_they_are, **fields)


def check_supported(config: Any, heads: int, kv_heads: int, head_dim: int) -> None:
    """Raises ``ValueError`` for sizes that do not go together, and for what no model here does."""
    kind = config.model_type

    def refuse(name: str, why: str) -> None:
        raise ValueError(f"`{name}` of this {kind!r} configuration is {getattr(config, name, None)!r}, {why}.")

    if heads % kv_heads:
        refuse("num_key_value_heads", f"which does not divide the {heads} heads (`num_attention_heads`): change one")
    if head_dim % 2:
        raise ValueError(
            f"`head_dim` of this {kind!r} configuration is {head_dim}, but the rotary embedding turns pairs: take an "
            "even one."
        )
    if not getattr(config, "head_dim", None) and config.hidden_size % heads:
        refuse("hidden_size", f"which {heads} heads (`num_attention_heads`) do not divide: change one")
    if kind == "helium" and heads * head_dim != config.hidden_size:
        refuse("head_dim", f"but must be hidden_size / num_attention_heads = {config.hidden_size / heads:g}: set it")
    if getattr(config, "use_bidirectional_attention", None):
        refuse("use_bidirectional_attention", "but attention is causal here: set it to False")
    if kind == "gemma3_text" and config.attn_logit_softcapping is not None:
        refuse("attn_logit_softcapping", "which upstream leaves out in this model: set it to None")


def layer_kinds(config: Any, head_dim: int) -> tuple[LayerKind, ...]:
    """The kinds of the layers; ValueError for one that is not known, or its rotary embedding."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if config.model_type in ("llama", "helium", "mistral"):  # whose layers are all alike
        window = window if config.model_type == "mistral" else None
        types = [FULL if window is None else SLIDING] * config.num_hidden_layers
    if types is None or len(types) != config.num_hidden_layers:
        raise ValueError(
            f"`layer_types` has {len(types or ())} layers, but `num_hidden_layers` is {config.num_hidden_layers}: "
            "give the type of each layer, or leave it out."
        )
    unknown = sorted(set(types) - {FULL, SLIDING})
    if unknown:
        raise ValueError(f"`layer_types` has {unknown[0]!r}, which is not supported: use {FULL!r} and {SLIDING!r}.")
    if SLIDING in types and window is None:
        raise ValueError(f"`layer_types` has {SLIDING!r}, but `sliding_window` is None: give one, or use {FULL!r}.")
    ropes = {name: rope_of(config, name, head_dim) for name in dict.fromkeys(types)}
    return tuple(LayerKind(window if name == SLIDING else None, ropes[name]) for name in types)


def rope_of(config: Any, layer_type: str, head_dim: int) -> Rope:
    """The rotary embedding of a type of layers; ValueError if it is not supported."""
    parameters = config.rope_parameters
    if config.model_type == "gemma3_text":
        parameters = parameters.get(layer_type)
    if not isinstance(parameters, Mapping):
        raise ValueError(
            f"`rope_parameters` has {parameters!r} for layers of {layer_type!r}: give a rope_type and its parameters."
        )
    inverse_frequencies(parameters, head_dim, jnp.dtype(jnp.float32))
    return tuple(sorted(parameters.items()))
