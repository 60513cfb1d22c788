"""What ``generate`` is asked for: ``GenerationConfig`` and keyword arguments, checked and resolved.

A field either has its effect or raises, naming itself. Fields that only choose the PyTorch runtime (the cache's
class, ``torch.compile``) have nothing to choose here and are accepted, since the published generation configurations
set them.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import logging
from typing import Any

import jax.numpy as jnp
from transformers import GenerationConfig

from .sampling import Sampling

logger = logging.getLogger(__name__)

SAMPLING_FIELDS = ("do_sample", "temperature", "top_k", "top_p")
LENGTH_FIELDS = ("max_length", "max_new_tokens")
TOKEN_FIELDS = ("eos_token_id", "pad_token_id", "bos_token_id")
# chosen by upstream's runtime, without a counterpart in one compiled program
RUNTIME_FIELDS = ("cache_implementation", "cache_config", "compile_config", "disable_compile", "use_cache")
# results are always objects, so asking for one changes nothing
OUTPUT_FIELDS = ("return_dict_in_generate",)
METADATA_FIELDS = ("transformers_version", "depth_decoder_config")
# fields whose neutral value is not None
NEUTRAL = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "repetition_penalty": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "early_stopping": False,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "low_memory": False,
    "token_healing": False,
    "is_assistant": False,
    "use_mambapy": False,
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
    "decoder_start_token_id": None,
    "forced_decoder_ids": None,
}
DEFAULT_TOP_K = 50
DEFAULT_NEW_TOKENS = 20


@dataclasses.dataclass(frozen=True)
class Plan:
    """The resolved options of one ``generate`` call.

    Attributes:
        sampling: how tokens are chosen.
        max_length: length of the sequences, prompt included.
        eos_token_ids: what ends a row.
        pad_token_id: what follows the end of a row.
    """

    sampling: Sampling
    max_length: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int


def merge_generation_config(
    default: GenerationConfig, given: GenerationConfig | None, kwargs: dict[str, Any], extra: tuple[str, ...] = ()
) -> tuple[GenerationConfig, dict[str, Any]]:
    """Keyword arguments over ``given`` over the model's default.

    Args:
        default: the model's generation configuration.
        given: the call's, or None.
        kwargs: keyword arguments of the call.
        extra: names of model inputs among them, which are returned apart.

    Raises:
        ValueError: for a keyword that is neither a field nor a model input, with the nearest name.
    """
    config = copy.deepcopy(default)
    if given is not None:
        for name, value in given.to_dict().items():
            if value is not None:
                setattr(config, name, copy.deepcopy(value))
    inputs = {name: kwargs[name] for name in extra if name in kwargs}
    known = {*config.to_dict(), *vars(config), *NEUTRAL}
    for name, value in kwargs.items():
        if name in inputs:
            continue
        if name not in known or name.startswith("_"):
            near = difflib.get_close_matches(name, [*known, *extra], n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise ValueError(f"`generate` has no argument `{name}`.{hint}")
        setattr(config, name, value)
    # the later of the two lengths wins, as a keyword over a default
    if kwargs.get("max_length") is not None and kwargs.get("max_new_tokens") is None:
        config.max_new_tokens = None
    refuse_unsupported(config)
    return config, inputs


def refuse_unsupported(config: GenerationConfig) -> None:
    """Raises ``ValueError`` for the first field that is set and has no effect here."""
    supported = {
        *SAMPLING_FIELDS, *LENGTH_FIELDS, *TOKEN_FIELDS, *RUNTIME_FIELDS, *OUTPUT_FIELDS, *METADATA_FIELDS
    }  # fmt: skip
    for name, value in vars(config).items():
        if name.startswith("_") or name in supported or value is None or value == NEUTRAL.get(name):
            continue
        raise ValueError(f"`{name}={value!r}` is not supported by `generate` here: leave it unset.")


def resolve_sampling(values: dict[str, Any], prefix: str = "") -> Sampling:
    """The sampling options among ``values``; unset ones take upstream's defaults.

    Raises:
        ValueError: for values out of range; names carry ``prefix``.
    """

    def check(name: str, good: bool, rule: str) -> None:
        if not good:
            raise ValueError(f"`{prefix}{name}` must be {rule}, but is {values[name]!r}.")

    do_sample = values.get("do_sample")
    check("do_sample", do_sample is None or isinstance(do_sample, bool), "True or False")
    temperature, top_k, top_p = (values.get(name) for name in ("temperature", "top_k", "top_p"))
    check("temperature", temperature is None or temperature > 0, "above 0 (for greedy search use `do_sample=False`)")
    check("top_k", top_k is None or (int(top_k) == top_k and top_k >= 0), "a whole number, 0 for no limit")
    check("top_p", top_p is None or 0 < top_p <= 1, "in (0, 1]")
    if not do_sample:
        return Sampling()
    top_k = DEFAULT_TOP_K if top_k is None else int(top_k)
    return Sampling(
        temperature=jnp.asarray(1.0 if temperature is None else temperature, dtype=jnp.float32),
        top_p=None if top_p in (None, 1.0) else jnp.asarray(top_p, dtype=jnp.float32),
        do_sample=True,
        top_k=top_k or None,
    )


def resolve_plan(config: GenerationConfig, prompt_length: int, vocab_size: int) -> Plan:
    """Resolves the options of the text stream.

    Args:
        config: merged configuration.
        prompt_length: tokens of the prompt.
        vocab_size: for the check of the token ids.

    Raises:
        ValueError: for lengths that leave nothing to generate and ids outside the vocabulary.
    """
    if config.max_new_tokens is not None:
        if int(config.max_new_tokens) != config.max_new_tokens or config.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be a whole number of at least 1, but is {config.max_new_tokens}.")
        max_length = prompt_length + int(config.max_new_tokens)
    elif config.max_length is not None:
        max_length = int(config.max_length)
        if max_length <= prompt_length:
            raise ValueError(
                f"`max_length` is {max_length}, but the prompt alone has {prompt_length} tokens: `max_length` counts "
                "the prompt; raise it or use `max_new_tokens`."
            )
    else:
        max_length = prompt_length + DEFAULT_NEW_TOKENS
    eos = config.eos_token_id
    eos_token_ids = () if eos is None else tuple(int(i) for i in (eos if isinstance(eos, list | tuple) else [eos]))
    for name, token in [("eos_token_id", i) for i in eos_token_ids] + [("pad_token_id", config.pad_token_id)]:
        if token is not None and not 0 <= token <= vocab_size:
            raise ValueError(f"`{name}` must be in [0, {vocab_size}], but is {token}.")
    pad = config.pad_token_id
    return Plan(
        sampling=resolve_sampling({name: getattr(config, name, None) for name in SAMPLING_FIELDS}),
        max_length=max_length,
        eos_token_ids=eos_token_ids,
        pad_token_id=int(pad) if pad is not None else (eos_token_ids[0] if eos_token_ids else 0),
    )
