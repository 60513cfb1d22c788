"""The options of a stream: how an endless dialogue chooses its tokens, with numbers that slots may have of their own.

A stream keeps no history of the text and has no end, so what depends on either has no place in it.
"""

from __future__ import annotations

import difflib
from typing import Any

import numpy as np
from transformers import GenerationConfig, MoshiConfig

from ...generation.configuration import (
    DEFAULTS,
    OUTPUT_FIELDS,
    PROCESSOR_FIELDS,
    RULES,
    SAMPLING_FIELDS,
    SUPPORTED_FIELDS,
    active,
    merge_generation_config,
    refuse_traced,
    resolve_processors,
    resolve_sampling,
)
from ...generation.sampling import Sampling
from .generation_flax_moshi import DEPTH_PREFIX, resolve_depth_sampling

SAMPLING_NUMBERS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
STREAM_FIELDS = (*SAMPLING_FIELDS, "suppress_tokens", "remove_invalid_values")
# what a configuration may not ask for: other results than those of a stream, or those of a search with an end
REFUSED_FIELDS = ("num_beams", "num_return_sequences", "max_time", *OUTPUT_FIELDS)
NEUTRAL = {**DEFAULTS, "repetition_penalty": 1, "no_repeat_ngram_size": 0, **dict.fromkeys(OUTPUT_FIELDS, False)}


def resolve_stream_sampling(
    default: GenerationConfig | None, given: GenerationConfig | None, kwargs: dict[str, Any], config: MoshiConfig
) -> tuple[Sampling, Sampling, dict[str, Any]]:
    """How text and codes are chosen, and the numbers that slots begin with, by name.

    Args:
        default: the model's generation configuration.
        given: that of the stream, or None.
        kwargs: arguments of the stream, those of the depth decoder with its prefix.
        config: of the model.

    Raises:
        ValueError: for unknown options, options without a meaning in a stream, and values out of range.
    """
    depth = {name: value for name, value in kwargs.items() if name.startswith(DEPTH_PREFIX)}
    text = {name: value for name, value in kwargs.items() if name not in depth}
    if "depth_decoder_config" in depth:
        text["depth_decoder_config"] = depth.pop("depth_decoder_config")
    for name in set(text) & set(SUPPORTED_FIELDS) - {*STREAM_FIELDS, *PROCESSOR_FIELDS, "depth_decoder_config"}:
        raise ValueError(
            f"`{name}` has no meaning in a stream, which has no end, one result and a cache: leave it out."
        )
    options, _ = merge_generation_config(default, given, text)
    for name in REFUSED_FIELDS:
        value = getattr(options, name, None)
        if active(value, NEUTRAL.get(name)):
            raise ValueError(
                f"`{name}={value!r}` of the generation configuration has no meaning in a stream, which has one result "
                "and no end: leave it unset there (and in the model's `generation_config`)."
            )
    for name in set(PROCESSOR_FIELDS) - set(STREAM_FIELDS):
        value = getattr(options, name, None)
        if value is not None and value != NEUTRAL.get(name):
            raise ValueError(
                f"`{name}={value!r}` needs a history of the text, which an endless stream does not keep: leave it "
                "unset."
            )
    values = {name: getattr(options, name, None) for name in STREAM_FIELDS}
    sampling = resolve_sampling(values, resolve_processors(values, 1, 2, config.vocab_size))
    depth_sampling = resolve_depth_sampling(
        getattr(options, "depth_decoder_config", None), depth, config.num_codebooks, config.audio_vocab_size
    )
    numbers = {
        f"{prefix}{name}": getattr(chosen, name)
        for prefix, chosen in (("", sampling), (DEPTH_PREFIX, depth_sampling))
        for name in SAMPLING_NUMBERS
        if getattr(chosen, name) is not None
    }
    return sampling, depth_sampling, numbers


def checked_numbers(
    numbers: dict[str, Any], known: dict[str, Any], bounds: dict[str, int], batch_size: int
) -> dict[str, np.ndarray]:
    """Numbers for all slots, ``(batch, 1)`` each.

    Args:
        numbers: each one for all slots, or one per slot.
        known: those of the stream, by name.
        bounds: the largest ``top_k`` of either sampling.
        batch_size: slots.

    Raises:
        ValueError: for numbers that the stream does not have, a wrong shape, values that are out of range or traced.
    """
    refuse_traced(numbers, operands=())
    checked = {}
    for name, value in numbers.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            has = ", ".join(f"`{other}`" for other in known) or "none, as it does not sample"
            raise ValueError(f"The stream was made without `{name}`; its numbers are: {has}.{hint}")
        array = np.asarray(value)
        if array.dtype.kind not in "iuf" or array.shape not in ((), (batch_size,)):
            raise ValueError(f"`{name}` must be a number, or one for each slot ({batch_size},), but is {value!r}.")
        good, rule = RULES[name.removeprefix(DEPTH_PREFIX)]
        for number in array.reshape(-1).tolist():
            if not good(number):
                raise ValueError(f"`{name}` must be {rule}, but is {number!r}.")
            if name in bounds and not 1 <= number <= bounds[name]:
                raise ValueError(
                    f"`{name}` must be in [1, {bounds[name]}] in this stream, but is {number!r}: make the stream with "
                    "the largest that you need."
                )
        column = np.broadcast_to(array.reshape(-1, 1), (batch_size, 1))
        checked[name] = column.astype(known[name].dtype)
    return checked
