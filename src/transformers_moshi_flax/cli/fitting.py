"""Whether a checkpoint fits a model class: what would be loaded, and what would be missing or left over."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict

from transformers_moshi_flax.checkpoints import fitting
from transformers_moshi_flax.checkpoints.rules import ReadResult


def fit(model: Any, layout: str, tensors: Mapping[str, Any]) -> ReadResult:
    """As ``checkpoints.fitting.fit``, with views of the file, only surplus keys, and no error where nothing fits."""
    try:
        result, surplus = fitting.fit(model, layout, tensors)
    except ValueError:
        return ReadResult({}, list(flatten_dict(model.params_shape_tree, sep="/")), list(tensors), [], [])
    return dataclasses.replace(result, unexpected=surplus)


def fit_kyutai(name: str) -> ReadResult:
    """The parameters of a checkpoint in Kyutai's layout, as those of ``FlaxMoshiForConditionalGeneration``.

    Raises:
        ValueError: its configuration cannot be expressed, or its files are damaged.
    """
    from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
    from transformers_moshi_flax.models.moshi.kyutai_flax_moshi import (
        find_kyutai_files,
        kyutai_config,
        kyutai_weights,
    )

    files = find_kyutai_files(name)
    config = kyutai_config(files)
    weights = kyutai_weights(files, config)
    model = FlaxMoshiForConditionalGeneration(weights.described(config), _do_init=False)
    result, surplus = weights.fit(model, lambda path, leaf: leaf)
    return dataclasses.replace(result, unexpected=surplus)


def fits(result: ReadResult) -> bool:
    """Whether nothing is missing, left over, or of another shape or kind."""
    return not (result.missing or result.unexpected or result.mismatched or result.not_floating)
