"""Names that ``transformers`` had for caches up to 5.23, accepted beside those it has now."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

FORMER_NAMES = {
    "past_key_values": "cache",
    "encoder_past_key_values": "encoder_cache",
    "decoder_past_key_values": "decoder_cache",
}

Function = TypeVar("Function", bound=Callable[..., Any])


def accept_former_names(function: Function) -> Function:
    """Lets callers pass caches by their former names, as keywords.

    Raises:
        ValueError: from a call that passes both names of one cache.
    """
    parameters = inspect.signature(function).parameters
    former_names = {former: name for former, name in FORMER_NAMES.items() if name in parameters}

    @wraps(function)
    def call(*args, **kwargs):
        for former, name in former_names.items():
            value = kwargs.pop(former, None)
            if value is None:
                continue
            if kwargs.get(name) is not None:
                raise ValueError(f"`{former}` is the former name of `{name}`, and both are given: pass `{name}` only.")
            kwargs[name] = value
        return function(*args, **kwargs)

    return cast(Function, call)
