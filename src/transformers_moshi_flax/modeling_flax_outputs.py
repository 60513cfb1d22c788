"""Output dataclasses shared by the models: ``ModelOutput`` of ``transformers``, and pytrees.

They have the access that users know: ``out.logits``, ``out["logits"]``, ``out[0]``, ``out.to_tuple()``; fields that
are None do not count. What ``transformers`` called ``past_key_values`` up to 5.23 is ``cache``, and is found by both
names.

``ModelOutput`` itself takes apart what is not a tensor of PyTorch where only the first field is set, which no pytree
bears, and imports PyTorch where it is installed. So it is the base for the sake of ``isinstance`` alone.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NoReturn

import jax
from jax.tree_util import GetAttrKey
from transformers.utils import ModelOutput

from .former_names import FORMER_NAMES


class _FieldsAndItems(OrderedDict):
    """A dictionary of the fields of a dataclass that are not None, in their order; each subclass is a pytree node.

    The children of the node are all fields.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # the next in line is `ModelOutput`, which would import PyTorch
        def children(output: Any) -> tuple[tuple[tuple[GetAttrKey, Any], ...], None]:
            return tuple((GetAttrKey(name), getattr(output, name)) for name in names(cls)), None

        def values(output: Any) -> tuple[tuple[Any, ...], None]:
            return tuple(getattr(output, name) for name in names(cls)), None

        def made(_: None, values: Iterable[Any]) -> Any:
            output = cls.__new__(cls)
            vars(output).update(zip(names(cls), values))
            output._keep_items()
            return output

        jax.tree_util.register_pytree_with_keys(cls, children, made, values)

    def __post_init__(self) -> None:
        """In the place of that of ``ModelOutput``."""

    def _keep_items(self) -> None:
        """Makes the items those of the fields."""
        OrderedDict.clear(self)
        for name in names(type(self)):
            value = vars(self).get(name)
            if value is not None:
                OrderedDict.__setitem__(self, name, value)

    def to_tuple(self) -> tuple[Any, ...]:
        """The present values, in field order: what ``return_dict=False`` returns."""
        return tuple(self.values())

    def replace(self, **changes: Any) -> Any:
        """A copy with other values of some fields; TypeError for what is no field."""
        return dataclasses.replace(self, **changes)

    def copy(self) -> Any:
        return self.replace()

    def get(self, name: str, default: Any = None) -> Any:
        return OrderedDict.get(self, FORMER_NAMES.get(name, name), default)

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return OrderedDict.__getitem__(self, FORMER_NAMES.get(key, key))
        return self.to_tuple()[key]

    def __contains__(self, name: object) -> bool:
        return OrderedDict.__contains__(self, FORMER_NAMES.get(name, name) if isinstance(name, str) else name)

    def __getattr__(self, name: str) -> Any:
        if FORMER_NAMES.get(name) in names(type(self)):
            return getattr(self, FORMER_NAMES[name])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def past_key_values(self) -> Any:
        return self.__getattr__("past_key_values")  # there is a property in the way

    @property
    def cache_params(self) -> NoReturn:
        raise AttributeError  # upstream's name for caches of other models

    # Changes: of fields, whose items follow

    def __setattr__(self, name: str, value: Any) -> None:
        name = FORMER_NAMES.get(name, name)
        object.__setattr__(self, name, value)
        if name in names(type(self)):
            self._keep_items()

    def __setitem__(self, name: str, value: Any) -> None:
        name = FORMER_NAMES.get(name, name)
        if name not in names(type(self)):
            raise KeyError(f"{type(self).__name__} has no field {name!r}, only {', '.join(names(type(self)))}")
        setattr(self, name, value)

    def update(self, other: Any = (), /, **values: Any) -> None:
        """Sets fields, as ``dict.update``; KeyError for what is no field."""
        for name, value in (*(other.items() if isinstance(other, Mapping) else other), *values.items()):
            self[name] = value

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    # plain dictionaries, as what is joined may have other keys than the fields

    def __or__(self, other: Any) -> dict[str, Any]:  # type: ignore[override]  # see above
        return dict(self) | dict(other)

    def __ror__(self, other: Any) -> dict[str, Any]:  # type: ignore[override]  # see above
        return dict(other) | dict(self)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"the fields of a {type(self).__name__} stay: set one to None")

    __delitem__ = pop = popitem = setdefault = clear = move_to_end = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, name) for name in names(type(self)))


def names(output_class: type[_FieldsAndItems]) -> tuple[str, ...]:
    """The fields of an output."""
    return tuple(output_class.__dataclass_fields__)


@dataclasses.dataclass
class FlaxModelOutput(_FieldsAndItems, ModelOutput):
    """Base of the outputs: attribute, key and position access over the fields that are not None."""


@dataclasses.dataclass
class FlaxBaseModelOutput(FlaxModelOutput):
    """Output of an encoder.

    Attributes:
        last_hidden_state: ``(batch, frames, hidden_size)``.
        hidden_states: input of the first layer and output of every layer, each ``(batch, frames, hidden_size)``.
        attentions: weights of every layer, each ``(batch, heads, frames, frames)``.
    """

    last_hidden_state: jax.Array | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@dataclasses.dataclass
class FlaxBaseModelOutputWithPast(FlaxModelOutput):
    """Output of a decoder without a head.

    Attributes:
        last_hidden_state: ``(batch, frames, hidden_size)``, after the last layer (and the final norm, if any).
        cache: the updated cache, if one was passed.
        hidden_states: input of every layer and the last hidden state, each ``(batch, frames, hidden_size)``.
        attentions: weights of every layer, each ``(batch, heads, frames, keys)``.
    """

    last_hidden_state: jax.Array | None = None
    cache: Any = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@dataclasses.dataclass
class FlaxCausalLMOutputWithPast(FlaxModelOutput):
    """Output of a decoder with a head; ``loss`` is there when labels were passed, ``logits`` are
    ``(batch, frames, vocab_size)``, the rest as in :class:`FlaxBaseModelOutputWithPast`."""

    loss: jax.Array | None = None
    logits: jax.Array | None = None
    last_hidden_state: jax.Array | None = None
    cache: Any = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
