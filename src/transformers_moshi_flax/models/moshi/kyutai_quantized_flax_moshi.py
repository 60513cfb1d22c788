"""Weights of the language model that Kyutai's packages have quantized, as quantized layers here, and back.

A file is read as tensors under the names that the published floats have, so that one table of rules reads all. Where a
matrix ``X``, ``(outputs, inputs)``, is quantized, its codes are under that name, and under ``X.scales`` the scales,
``(outputs, groups)`` float32: the leaves of a quantized layer (:mod:`~transformers_moshi_flax.nn.linear`), transposed.
The codes are those of the file, to the bit.

* The ``moshi`` package has int8 with ``X_scb``, the largest magnitude of each row: a code ``q`` stands for
  ``q scb / 127`` (``moshi/utils/quantize.py``).
* ``moshi_mlx`` has what ``mlx.nn.quantize`` makes: codes of 4 or 8 bits from 0 on, the first in the lowest bits of a
  uint32, and for each group of a row a scale and a bias: a code ``q`` stands for ``scale q + bias``. Codes here are
  less by half of their number, so that the offset, under ``X.offsets``, ``(outputs, groups)``, is ``bias + 8 scale``
  or ``bias + 128 scale``. Embeddings are quantized as well, and made floats, as no embedding here is quantized.
* Files for candle (Kyutai's Rust) are GGUF with Q8_0: blocks of 32 codes of 8 bits in a row with one scale, which is a
  float16: a code ``q`` stands for ``scale q``. Embeddings too.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from ...checkpoints.formats import TensorFile
from ...checkpoints.rules import Rule, Slot, table_tensors
from ...nn.linear import CODES, KERNEL, OFFSETS, SCALES
from ...quantization.config import QuantizationConfig

Q8 = QuantizationConfig("int8", skip=["audio_encoder"])
"""How the ``moshi`` package quantizes: all linear layers of the language model, a scale for each output."""

_SCALES, _OFFSETS, _LARGEST_MAGNITUDES = ".scales", ".offsets", "_scb"
_GREATEST = np.float32(127)


@dataclasses.dataclass(frozen=True)
class LanguageModelTensors(Mapping):
    """The tensors of a file under the names of the published floats, each made when it is asked for.

    Attributes:
        file: that they are made of.
        makers: key -> what makes its array.
        quantization: of the linear layers, None if they are floats.
        dequantized: whether embeddings are quantized in the file, and float32 here.
    """

    file: TensorFile
    makers: Mapping[str, Callable[[], np.ndarray]]
    quantization: QuantizationConfig | None = None
    dequantized: bool = False

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
    """What a weight file of the language model holds, quantized or not, of whichever package.

    Raises:
        ValueError: codes without scales, or scales without codes or of another shape; a grid that no quantized layer
            here has; depth steps with norms of their own.
    """
    if _OF_MLX in file or any(re.match(_STEP, key) for key in file):
        return _of_steps(file)
    if any(key.endswith(_LARGEST_MAGNITUDES) for key in file):
        return _of_torch(file)
    return LanguageModelTensors(file, {key: partial(file.__getitem__, key) for key in file})


_NUMBERED_STEP = re.compile(r"(?:depformer_in|linears|depformer_emb|depformer\.layers\.\d+\..*?)\.(\d+)(?:\.|$)")
_JOINED_STEPS = re.compile(r"depformer\..*\.(?:in_proj_weight|in_proj\.weight|out_proj\.weight)(?:\.\w+)?")
"""Names of tensors of one step of the depth decoder, with its number, and of those that have all steps."""


def own_steps(tensors: LanguageModelTensors, own: int, others: int) -> LanguageModelTensors:
    """Without the last ``others`` steps of the depth decoder, behind the ``own`` ones.

    Of the embeddings there is one less than steps, as what the last one says is never an input.
    """

    def rows(make: Callable[[], np.ndarray]) -> np.ndarray:
        array = make()
        return array[: len(array) // (own + others) * own]

    makers: dict[str, Callable[[], np.ndarray]] = {}
    for key, make in tensors.makers.items():
        step = _NUMBERED_STEP.match(key)
        first = own - 1 if key.startswith("depformer_emb.") else own
        if step is None or int(step[1]) < first:
            makers[key] = partial(rows, make) if _JOINED_STEPS.fullmatch(key) else make
    return dataclasses.replace(tensors, makers=makers)


# ---------------------------------------------------------------------------------------------------------- of `moshi`


def _of_torch(file: TensorFile) -> LanguageModelTensors:
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


# -------------------------------------------------------------------------------------- of `moshi_mlx`, and of candle

_OF_MLX = "out_norm.weight"
"""A name that only MLX's files have."""

_WEIGHT, _BIASES = ".weight", ".biases"

_STEP = r"depformer\.(?:slices\.)?(\d+)\."
_RENAMED = (
    (r"audio_embs\.(\d+)\.weight", r"emb.\1.weight"),
    (r"(.*norm[12]?)\.weight", r"\1.alpha"),
    (rf"{_STEP}linear_in\.weight", r"depformer_in.\1.weight"),
    (rf"{_STEP}linear_out\.weight", r"linears.\1.weight"),
    (
        rf"{_STEP}transformer\.layers\.(\d+)\.self_attn\.(in|out)_proj[._]weight",
        r"depformer.layers.\2.self_attn.\3_projs.\1.weight",
    ),
    (rf"{_STEP}transformer\.layers\.(\d+)\.gating\.(\w+)\.weight", r"depformer.layers.\2.gating.\1.\3.weight"),
    (rf"{_STEP}transformer\.layers\.(\d+)\.(norm[12])\.alpha", r"depformer.layers.\2.\3.alpha"),
)
"""Names of a package that has a transformer for each step of the depth decoder -> those of the published floats; each
that matches changes what the one before has made."""


def _published_name(key: str) -> str:
    for pattern, template in _RENAMED:
        key = re.sub(f"^{pattern}$", template, key)
    if match := re.fullmatch(rf"{_STEP}emb\.weight", key):
        step = int(match[1])
        return f"depformer_emb.{step - 1}.weight" if step else "depformer_text_emb.weight"
    return key


def is_embedding(name: str) -> bool:
    """Whether a tensor of the published floats is one of embeddings."""
    return name.partition(".")[0].endswith("emb")


def _of_steps(file: TensorFile) -> LanguageModelTensors:
    """Of a package that has a transformer for each step of the depth decoder."""
    grid: _Affine | _Blocks = _Affine.of(file) if _OF_MLX in file else _Blocks()
    makers: dict[str, Callable[[], np.ndarray]] = {}
    norms: dict[str, str] = {}
    dequantized = False
    for key, tensor in file.items():
        if key.endswith((_SCALES, _BIASES)):
            if not grid.holds(file, grid.matrix_of(key)):
                raise ValueError(f"{file.path} has {key}, but no codes that it belongs to; download or save it again")
            continue
        name = _published_name(key)
        if name.endswith(".alpha"):
            same = norms.setdefault(name, key)
            if not np.array_equal(file[same], tensor):
                raise ValueError(
                    f"{file.path}: {key} is not equal to {same}, but here the steps of the depth decoder share their "
                    "norms"
                )
            makers[name] = partial(_norm, file, key)
        elif not grid.holds(file, key):
            makers[name] = partial(file.__getitem__, key)
        elif is_embedding(name):
            grid.check(file, key)
            makers[name], dequantized = partial(grid.floats, file, key), True
        else:
            grid.check(file, key)
            makers |= {name + suffix: make for suffix, make in grid.makers(file, key).items()}
    is_quantized = any(key.endswith(_SCALES) for key in makers)
    return LanguageModelTensors(file, makers, grid.quantization if is_quantized else None, dequantized)


@dataclasses.dataclass(frozen=True)
class _Affine:
    """How MLX has quantized a file: ``bits`` of a code, of which ``group_size`` share a scale and a bias."""

    bits: int
    group_size: int

    @classmethod
    def of(cls, file: TensorFile) -> _Affine:
        """That of the head, whose inputs are known; the package's own if the head is not quantized."""
        head, scales = (file.get(key) for key in ("text_linear.weight", "text_linear.scales"))
        if head is None or head.dtype != np.uint32:
            return cls(8, 64)
        if scales is None or head.ndim != 2 or scales.ndim != 2 or not scales.size:
            raise ValueError(
                f"{file.path}: text_linear.weight is quantized, but there is no text_linear.scales of the same rows; "
                "download or save it again"
            )
        inputs = file[_OF_MLX].size
        bits, group_size = 32 * head.shape[1] / inputs, inputs / scales.shape[1]
        if bits not in (4, 8) or group_size % 2:
            raise ValueError(
                f"{file.path}: text_linear.weight has codes of {bits:g} bits in groups of {group_size:g}; 4 and 8 "
                "bits are read, in groups of an even number"
            )
        return cls(int(bits), int(group_size))

    @property
    def quantization(self) -> QuantizationConfig:
        return QuantizationConfig(bits=self.bits, group_size=self.group_size, skip=["audio_encoder"], offsets=True)

    def matrix_of(self, key: str) -> str:
        """The codes that scales or biases belong to."""
        return key.removesuffix(_SCALES).removesuffix(_BIASES) + _WEIGHT

    def holds(self, file: TensorFile, key: str) -> bool:
        """Whether a tensor is one of codes."""
        return key in file and file[key].dtype == np.uint32

    def check(self, file: TensorFile, key: str) -> None:
        """ValueError if a matrix has not the scales and biases that belong to its codes."""
        codes, stem = file[key], key.removesuffix(_WEIGHT)
        inputs = codes.shape[-1] * 32 // self.bits
        wanted = (*codes.shape[:-1], inputs // self.group_size)
        for name in (stem + _SCALES, stem + _BIASES):
            found = file.get(name)
            if found is None:
                raise ValueError(f"{file.path}: {key} is quantized, but there is no {name}; download or save it again")
            floating = jnp.issubdtype(found.dtype, jnp.floating)
            if codes.ndim != 2 or inputs % self.group_size or found.shape != wanted or not floating:
                raise ValueError(
                    f"{file.path}: {name} is {found.dtype.name} {found.shape}, but {key} {codes.shape}, codes of "
                    f"{self.bits} bits in groups of {self.group_size}, wants floats {wanted}"
                )

    def makers(self, file: TensorFile, key: str) -> dict[str, Callable[[], np.ndarray]]:
        """Those of codes, scales and offsets, by what their names end with."""
        return {
            "": partial(self.codes, file, key),
            _SCALES: lambda: self.of_groups(file, key)[0],
            _OFFSETS: partial(self.offsets, file, key),
        }

    @property
    def _middle(self) -> int:
        """The code in MLX of what is 0 here."""
        return 2 ** (self.bits - 1)

    def codes(self, file: TensorFile, key: str) -> np.ndarray:
        """``(outputs, inputs)`` int8, or two of 4 bits in a byte, uint8, whose nibbles are the same in both."""
        found = file[key].view(np.uint8)
        return found if self.bits == 4 else (found ^ np.uint8(self._middle)).view(np.int8)

    def of_groups(self, file: TensorFile, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Scales and biases, ``(outputs, groups)`` float32."""
        stem = key.removesuffix(_WEIGHT)
        return file[stem + _SCALES].astype(np.float32), file[stem + _BIASES].astype(np.float32)

    def offsets(self, file: TensorFile, key: str) -> np.ndarray:
        """What the code 0 here stands for, ``(outputs, groups)``: exact where scales and biases have 16 bits."""
        scales, biases = self.of_groups(file, key)
        return biases + self._middle * scales

    def floats(self, file: TensorFile, key: str) -> np.ndarray:
        """The matrix in float32."""
        found = file[key].view(np.uint8)
        codes = np.stack([found & 15, found >> 4], axis=-1) if self.bits == 4 else found
        scales, biases = self.of_groups(file, key)
        matrix = codes.reshape(*scales.shape, -1).astype(np.float32)
        matrix *= scales[..., None]
        matrix += biases[..., None]
        return matrix.reshape(len(found), -1)


class _Blocks:
    """GGUF's Q8_0, as :func:`~transformers_moshi_flax.checkpoints.formats.open_gguf` has it: codes of 8 bits, of which
    32 share a scale."""

    quantization = QuantizationConfig("int8", group_size=32, skip=["audio_encoder"])

    def matrix_of(self, key: str) -> str:
        return key.removesuffix(_SCALES)

    def holds(self, file: TensorFile, key: str) -> bool:
        return key + _SCALES in file

    def check(self, file: TensorFile, key: str) -> None:
        """ValueError for what is no matrix."""
        if file[key].ndim != 3:
            raise ValueError(f"{file.path}: {key} is quantized, but no matrix: {file[key].shape} with its blocks")

    def makers(self, file: TensorFile, key: str) -> dict[str, Callable[[], np.ndarray]]:
        return {
            "": lambda: file[key].reshape(len(file[key]), -1),
            _SCALES: lambda: file[key + _SCALES].astype(np.float32),
        }

    def floats(self, file: TensorFile, key: str) -> np.ndarray:
        codes = file[key]
        return (codes * file[key + _SCALES].astype(np.float32)[..., None]).reshape(len(codes), -1)


def _norm(file: TensorFile, key: str) -> np.ndarray:
    return file[key].reshape(1, 1, -1)


# ---------------------------------------------------------------------------------------------------------- the tables


def quantized_rules(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The table of the language model, with the leaves of quantized layers beside their kernels."""
    codes, added = "|".join(CODES.values()), list[Rule]()
    for rule in rules:
        layer, slash, last = rule.path.rpartition("/")
        if last != KERNEL:
            continue
        added.append(dataclasses.replace(rule, path=f"{layer}{slash}(?:{codes})"))
        for leaf, suffix in ((SCALES, _SCALES), (OFFSETS, _OFFSETS)):
            key, *others = (key + suffix for key in (rule.key, *rule.other_keys))
            path = f"{layer}{slash}{leaf}"
            added.append(dataclasses.replace(rule, path=path, key=key, other_keys=tuple(others)))
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
