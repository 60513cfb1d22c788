"""Whether a checkpoint fits a model class: what would be loaded, and what would be missing or left over."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict

from transformers_moshi_flax.checkpoints.rules import ReadResult, choose_renaming, flax_slots, pt_slots, read_slots


def fit(model: Any, layout: str, tensors: Mapping[str, Any]) -> ReadResult:
    """Distribute the tensors of a file over the parameters of a model, as ``from_pretrained`` does.

    Nothing is read: the leaves are views. Where ``from_pretrained`` draws a head that is missing, it is listed.

    Args:
        model: made with ``_do_init=False``.
        layout: ``"pt"`` or ``"flax"``.
        tensors: key -> array.

    Returns:
        The leaves by "/"-joined path; and what does not fit, among it tensors left over of a part that the class has.
    """
    shapes = flatten_dict(model.params_shape_tree, sep="/")
    slots = pt_slots(shapes, model.checkpoint_rules) if layout == "pt" else flax_slots(shapes)
    base = model.base_model_prefix if model.base_model_prefix in model.params_shape_tree else ""
    try:
        prefix, rename = choose_renaming(slots, tensors, model.checkpoint_prefixes, base)
    except ValueError:  # nothing fits
        return ReadResult({}, list(shapes), list(tensors), [], [])
    result = read_slots(slots, shapes, tensors, rename)
    parts = {slot.key.split(".")[0] for slot in slots}
    surplus = [
        key
        for key in result.unexpected
        if key.startswith(prefix) and key.removeprefix(prefix).split(".")[0] in parts and "rotary_emb" not in key
    ]
    return dataclasses.replace(result, unexpected=surplus)


def fit_kyutai(name: str) -> ReadResult:
    """The parameters of a checkpoint in Kyutai's layout, as those of ``FlaxMoshiForConditionalGeneration``.

    Raises:
        ValueError: its configuration cannot be expressed, or its tensors do not fit; all of them listed.
    """
    from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
    from transformers_moshi_flax.models.moshi.kyutai_flax_moshi import (
        find_kyutai_files,
        kyutai_config,
        read_kyutai_params,
    )

    files = find_kyutai_files(name)
    model = FlaxMoshiForConditionalGeneration(kyutai_config(files), _do_init=False)
    params = read_kyutai_params(files, model.config, model.params_shape_tree)
    return ReadResult(flatten_dict(params, sep="/"), [], [], [], [])


def fits(result: ReadResult) -> bool:
    """Whether nothing is missing, left over, or of another shape or kind."""
    return not (result.missing or result.unexpected or result.mismatched or result.not_floating)
