"""Reading the configuration that belongs to a model class from a checkpoint."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..input_checks import is_whole
from .files import CheckpointNotFoundError, Source
from .recognising import foreign, is_foreign_config, is_kyutai_config

METADATA = ("transformers_version", "_name_or_path", "architectures", "auto_map", "dtype", "model_type")


def load_config(
    config_class: type[PreTrainedConfig] | tuple[type[PreTrainedConfig], ...],
    source: Source,
    from_pt: bool | None = None,
) -> PreTrainedConfig:
    """The configuration of ``config_class``, or of one of them, in a checkpoint; ``from_pt`` as the weights are read.

    If the checkpoint is of a larger model that contains this part (Moshi contains Mimi and the depth decoder), the
    part's configuration is taken out of the whole's, and says how that is quantized.

    Raises:
        CheckpointNotFoundError: no ``config.json``.
        ValueError: it is damaged, has bad values or is of a model that has no such part.
    """
    values = read_config(source, from_pt)
    config_classes = config_class if isinstance(config_class, tuple) else (config_class,)
    known = {each.model_type: each for each in config_classes}
    model_type = values.get("model_type", next(iter(known)))
    if isinstance(model_type, str) and model_type in known:
        return build_config(known[model_type], values)
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        whole = build_config(CONFIG_MAPPING[model_type], values)
        found = _find_part(whole, config_classes)
        if found is not None:
            if (quantization := getattr(whole, "quantization_config", None)) is not None:
                found.quantization_config = quantization
            return found
    raise ValueError(
        f"config.json of {source.name!r} has model_type={model_type!r}, which neither is nor contains "
        f"{' or '.join(map(repr, known))}; load the class that belongs to it or pass config="
    )


def read_config(source: Source, from_pt: bool | None = None) -> dict[str, Any]:
    """The values of a checkpoint's ``config.json``; ``from_pt`` as the weights are read with.

    Raises:
        CheckpointNotFoundError: there is none, or the Hub could not be asked for it.
        ValueError: it is damaged, or of files that have a door of their own.
    """
    values = source.read_json("config.json", from_pt)
    if values is None:
        if unseen := source.absence("config.json"):
            raise CheckpointNotFoundError(unseen)
        known = foreign(source, None)
        remedy = f"it {known}" if known else "add that of the model, or pass config="
        raise CheckpointNotFoundError(f"{source.name!r} has no config.json; {remedy}")
    if is_foreign_config(values):
        raise ValueError(f"{source.name!r} {foreign(source, values)}")
    return values


def refuse_to_replace_kyutais(name: str, values: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` if a ``config.json`` is of Kyutai's format, in which it says which files are the model's.

    ``name`` says where it is.
    """
    if is_kyutai_config(values):
        raise ValueError(
            f"{name} holds a checkpoint in Kyutai's format, which would lose its config.json: give another one, or "
            "remove it"
        )


def meaning(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a configuration but for those that say nothing about the model."""

    def of(fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: of(value) for name, value in fields.items() if name not in METADATA}

    return of(config.to_dict())


def known_values(read: Callable[[], Mapping[str, Any] | None]) -> Mapping[str, Any]:
    """What ``read`` finds in a ``config.json``, nothing if there is none or it is damaged."""
    try:
        return read() or {}
    except ValueError:
        return {}


def describes(values: Mapping[str, Any], config: PreTrainedConfig) -> bool:
    """Whether the values of a ``config.json`` are those of the model that ``config`` describes."""
    try:
        found = build_config(type(config), values)
    except ValueError:
        return False
    return values.get("model_type") == config.model_type and meaning(found) == meaning(config)


def build_config(config_class: type[PreTrainedConfig], values: Mapping[str, Any]) -> PreTrainedConfig:
    """``config_class.from_dict`` whose complaints are ValueErrors that name the class."""
    check_config_sizes(config_class, values)
    try:
        return config_class.from_dict(dict(values))
    except (StrictDataclassError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"the values do not make a {config_class.__name__}: {error}") from error


def check_config_sizes(config_class: type[PreTrainedConfig], values: Mapping[str, Any]) -> None:
    """ValueError that lists the sizes of a configuration and its parts that no model can have."""
    if problems := _bad_sizes(values):
        raise ValueError(
            f"the values do not make a {config_class.__name__}: {'; '.join(problems)}. Repair config.json, or pass a "
            "config with other values"
        )


def _bad_sizes(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    problems = []
    for name, value in values.items():
        if name == "quantization_config" and not isinstance(value, Mapping | None):
            problems.append(f"{prefix}{name} must be an object of JSON, but is {value!r:.50}")
        elif name.endswith("_config") and isinstance(value, Mapping):
            problems += _bad_sizes(value, f"{prefix}{name}.")
        elif name in _SIZES and value is not None and not (is_whole(value) and value >= _SIZES[name]):
            problems.append(f"{prefix}{name} must be a whole number, at least {_SIZES[name]}, but is {value!r:.50}")
        elif name == "_frame_rate" and value is not None and not _is_positive(value):
            problems.append(f"{prefix}{name} must be a positive number, but is {value!r:.50}")
        elif prefix == "audio_encoder_config." and name == "model_type" and value != "mimi":
            problems.append(f"{prefix}{name} must be 'mimi', but is {value!r:.50}")
    return problems


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


_SIZES = dict.fromkeys(
    (
        *("hidden_size", "input_size", "intermediate_size", "ffn_dim", "head_dim"),
        *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("max_position_embeddings", "sliding_window", "vocab_size", "audio_vocab_size", "num_codebooks"),
        *("sampling_rate", "audio_channels", "num_filters", "kernel_size", "last_kernel_size", "residual_kernel_size"),
        *("dilation_growth_rate", "compress", "upsample_groups", "codebook_size", "codebook_dim"),
        *("num_quantizers", "num_semantic_quantizers", "vector_quantization_hidden_dimension"),
    ),
    1,
) | {"num_residual_layers": 0}
"""The least that a size may be. Those that may be None then follow from others."""


def override_config(config: PreTrainedConfig, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """A copy of ``config`` with some attributes changed; derived ones are computed anew.

    A dict for one of its parts changes the fields that it has, as in ``transformers``.
    """
    if not overrides:
        return config
    values = config.to_dict()
    for name, value in overrides.items():
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig) and isinstance(value, Mapping):
            value = override_config(part, value).to_dict()
        values[name] = value
    return build_config(type(config), values)


def _find_part(
    config: PreTrainedConfig, config_classes: tuple[type[PreTrainedConfig], ...]
) -> PreTrainedConfig | None:
    """The configuration itself or the first of its parts, at any depth, that is of one of the classes."""
    if isinstance(config, config_classes):
        return config
    # Properties too: Mimi derives the configurations of its halves.
    names = [name for name in dir(config) if name.endswith("_config")]
    parts = [part for part in (getattr(config, name) for name in names) if isinstance(part, PreTrainedConfig)]
    return next(filter(None, (_find_part(part, config_classes) for part in parts)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest of the known names, empty if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
