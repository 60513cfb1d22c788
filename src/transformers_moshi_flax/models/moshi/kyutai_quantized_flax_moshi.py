"""Weights of the language model that Kyutai's packages have quantized, as quantized layers here, and back.

A file is read as tensors under the names that the published floats have, so that one table of rules reads all. Where a
matrix ``X``, ``(outputs, inputs)``, is quantized, its codes are under that name, and under ``X.scales`` the scales,
``(outputs, groups)`` float32: the leaves of a quantized layer (:mod:`~transformers_moshi_flax.nn.linear`), transposed.
The codes are those of the file, to the bit.

The ``moshi`` package has int8 with ``X_scb``, the largest magnitude of each row: a code ``q`` stands for
``q scb / 127`` (``moshi/utils/quantize.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from ...checkpoints.formats import TensorFile
from ...checkpoints.rules import Rule, Slot, table_tensors
from ...nn.linear import CODES, KERNEL, SCALES
from ...quantization.config import QuantizationConfig

Q8 = QuantizationConfig("int8", skip=["audio_encoder"])
"""How the ``moshi`` package quantizes: all linear layers of the language model, a scale for each output."""

_SCALES, _LARGEST_MAGNITUDES = ".scales", "_scb"
_GREATEST = np.float32(127)


@dataclasses.dataclass(frozen=True)
class LanguageModelTensors(Mapping):
    """The tensors of a file under the names of the published floats, each made when it is asked for.

    Attributes:
        file: that they are made of.
        makers: key -> what makes its array.
        quantization: of the linear layers, None if they are floats.
    """

    file: TensorFile
    makers: Mapping[str, Callable[[], np.ndarray]]
    quantization: QuantizationConfig | None = None

    def __getitem__(self, key: str) -> np.ndarray:
        return self.makers[key]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)

    def __contains__(self, key: object) -> bool:
        return key in self.makers

    @property
    def number_quantized(self) -> int:
        """Of matrices."""
        return sum(key.endswith(_SCALES) for key in self.makers)

    def refuse_floats(self, slots: Iterable[Slot]) -> None:
        """ValueError for a tensor of a linear layer that is not quantized, although others are."""
        for slot in slots:
            name = slot.name_in(self)
            if slot.path.rpartition("/")[2] in CODES.values() and name in self and name + _SCALES not in self:
                raise ValueError(
                    f"{self.file.path}: {name} is not quantized, as other linear layers of the file are; quantize all "
                    "of them, or none"
                )


def language_model_tensors(file: TensorFile) -> LanguageModelTensors:
    """What a weight file of the language model holds, quantized or not.

    Raises:
        ValueError: codes without scales, or scales without codes or of another shape.
    """
    if not any(key.endswith(_LARGEST_MAGNITUDES) for key in file):
        return LanguageModelTensors(file, {key: partial(file.__getitem__, key) for key in file})
    makers: dict[str, Callable[[], np.ndarray]] = {}
    for key, tensor in file.items():
        if key.endswith(_LARGEST_MAGNITUDES):
            matrix = key.removesuffix(_LARGEST_MAGNITUDES)
            _check_q8(file, matrix, tensor)
            makers[matrix + _SCALES] = partial(_row_scales, file, key)
            continue
        if tensor.dtype == np.int8 and key + _LARGEST_MAGNITUDES not in file:
            raise ValueError(
                f"{file.path}: {key} is int8, but there is no {key}{_LARGEST_MAGNITUDES} with its scales; download or "
                "save it again"
            )
        makers[key] = partial(file.__getitem__, key)
    return LanguageModelTensors(file, makers, Q8)


def _check_q8(file: TensorFile, matrix: str, magnitudes: np.ndarray) -> None:
    codes = file[matrix] if matrix in file else None
    if codes is None or codes.dtype != np.int8 or codes.ndim != 2:
        found = "is not there" if codes is None else f"is {codes.dtype.name} {codes.shape}"
        raise ValueError(
            f"{file.path} has {matrix}{_LARGEST_MAGNITUDES}, the scales of an int8 matrix, but {matrix} {found}; "
            "download or save it again"
        )
    if magnitudes.shape != codes.shape[:1] or not jnp.issubdtype(magnitudes.dtype, jnp.floating):
        raise ValueError(
            f"{file.path}: {matrix}{_LARGEST_MAGNITUDES} is {magnitudes.dtype.name} {magnitudes.shape}, but the rows "
            f"of {matrix} want floats {codes.shape[:1]}; download or save it again"
        )


def _row_scales(file: TensorFile, key: str) -> np.ndarray:
    return file[key].astype(np.float32)[:, None] / _GREATEST


def quantized_rules(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The table of the language model, with the leaves of quantized layers beside their kernels."""
    codes, added = "|".join(CODES.values()), list[Rule]()
    for rule in rules:
        layer, slash, last = rule.path.rpartition("/")
        if last == KERNEL:
            keys = {
                "key": rule.key + _SCALES,
                "other_keys": tuple(key + _SCALES for key in rule.other_keys),
            }
            added += [
                dataclasses.replace(rule, path=f"{layer}{slash}(?:{codes})"),
                dataclasses.replace(rule, path=f"{layer}{slash}{SCALES}", **keys),
            ]
    return (*rules, *added)


def q8_tensors(params: Mapping[str, Any], rules: tuple[Rule, ...]) -> dict[str, np.ndarray]:
    """The tensors of a file of the ``moshi`` package for parameters that are quantized as :data:`Q8`.

    Args:
        params: of the language model.
        rules: from :func:`quantized_rules`.

    Raises:
        ValueError: the codes are of another kind, or have more than one scale for an output.
    """
    tensors = {}
    for tensor in table_tensors(params, rules):
        key, array = tensor.key, tensor.build()
        if key.endswith(_SCALES):
            key = key.removesuffix(_SCALES) + _LARGEST_MAGNITUDES
            if array.shape[1] != 1:
                raise ValueError(f"{key} would be {array.shape[1]} scales for an output: Kyutai's format has one")
            array = array[:, 0] * _GREATEST
        elif array.dtype == np.uint8:
            raise ValueError(f"{key} would be codes of 4 bits: Kyutai's format has 8")
        tensors[key] = array
    return tensors
