"""How the linear layers of a model are quantized, as ``config.json`` says it under ``quantization_config``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..checkpoints.configs import did_you_mean
from ..input_checks import is_whole
from ..ops.quantization import BITS

METHOD = "transformers-moshi-flax"
"""``quant_method`` of what this library has quantized."""

_DEFAULT_KIND = {8: "int8", 4: "int4"}
_DEFAULT_GROUP_SIZE = {"int8": None, "int4": 32, "nf4": 32}


@dataclasses.dataclass
class QuantizationConfig:
    """Weights of linear layers in few bits; embeddings, norms, convolutions and codebooks stay as they are.

    Attributes:
        kind: ``"int8"``, ``"int4"`` or ``"nf4"`` (:mod:`~transformers_moshi_flax.ops.quantization`); that of ``bits``
            if None.
        bits: of a weight, 8 or 4; those of ``kind`` if None.
        group_size: how many weights of an output, neighbours among the inputs, share a scale; an even number with 4
            bits. None is the kind's own: 32, and with ``int8`` all of an output's.
        skip: names of modules whose layers stay as they are, such as ``"audio_encoder"``, ``"lm_head"`` or
            ``"decoder.model.layers.0"``: pieces of the names of parameters in the whole of Moshi.
        offsets: whether a group has an offset beside its scale, so that its codes reach from its smallest number to
            its largest; not with ``"nf4"``.
        double_quantization: whether the scales of groups are quantized once more, to 8 bits in blocks of 256
            (:mod:`~transformers_moshi_flax.ops.scales`); not with ``offsets``, nor where an output has one scale.

    Raises:
        ValueError: values that do not exist or contradict each other; all of them are listed.
    """

    kind: str | None = None
    bits: int | None = None
    group_size: int | None = None
    skip: list[str] = dataclasses.field(default_factory=list)
    offsets: bool = False
    double_quantization: bool = False

    def __post_init__(self):
        problems = [*self._problems()]
        if problems:
            raise ValueError("; ".join(problems))
        self.kind = self.kind or _DEFAULT_KIND[self.bits]
        self.bits = BITS[self.kind]
        self.group_size = self.group_size or _DEFAULT_GROUP_SIZE[self.kind]
        self.skip = list(self.skip)

    def _problems(self):
        bits = BITS.get(self.kind, self.bits) if isinstance(self.kind, str) else self.bits
        if self.kind is None and self.bits is None:
            yield f"`kind` is missing; give one of {_listed(BITS)}"
        if self.kind is not None and self.kind not in [*BITS]:
            yield f"`kind`={self.kind!r} must be one of {_listed(BITS)}{did_you_mean(str(self.kind), BITS)}"
        if self.bits is not None and not (is_whole(self.bits) and self.bits in _DEFAULT_KIND):
            yield f"`bits`={self.bits!r} must be 8 or 4"
        elif self.bits not in (None, bits):
            yield f"`bits`={self.bits!r}, but `kind`={self.kind!r} has {bits}; leave out `bits`"
        if self.group_size is not None and not (is_whole(self.group_size) and self.group_size >= 1):
            yield f"`group_size`={self.group_size!r} must be a whole number, at least 1"
        elif self.group_size is not None and bits == 4 and self.group_size % 2:
            yield f"`group_size`={self.group_size} must be even, as two weights of 4 bits share a byte"
        if isinstance(self.skip, str) or not all(isinstance(name, str) and name for name in self.skip):
            yield f"`skip`={self.skip!r} must be a list of names, such as ['audio_encoder']"
        if not isinstance(self.offsets, bool):
            yield f"`offsets`={self.offsets!r} must be True or False"
        elif self.offsets and self.kind == "nf4":
            yield "`offsets`=True, but the numbers of 'nf4' lie around zero; leave it out, or take 'int4'"
        if not isinstance(self.double_quantization, bool):
            yield f"`double_quantization`={self.double_quantization!r} must be True or False"
        elif self.double_quantization and self.offsets:
            yield "`double_quantization`=True, but `offsets` stay in 32 bits; leave out one of the two"
        elif self.double_quantization and bits == 8 and self.group_size is None:
            yield "`double_quantization`=True, but 'int8' has a scale for each output only; give a `group_size`"

    @classmethod
    def of(cls, value: QuantizationConfig | str) -> QuantizationConfig:
        """What ``quantization=`` of a call says: a configuration, or a kind with its defaults."""
        if isinstance(value, QuantizationConfig):
            return value
        if isinstance(value, str) and value in BITS:
            return cls(value)
        hint = did_you_mean(value, BITS) if isinstance(value, str) else ""
        raise ValueError(f"quantization={value!r:.80} must be one of {_listed(BITS)} or a QuantizationConfig{hint}")

    @classmethod
    def of_model(cls, config: Any) -> QuantizationConfig | None:
        """That of a model's configuration, None if its weights are floats.

        Raises:
            ValueError: another program has quantized the weights, or the fields make no sense.
        """
        values = getattr(config, "quantization_config", None)
        if values is None:
            return None
        if not isinstance(values, Mapping):
            raise ValueError(f"quantization_config={values!r:.80} must be a dict, as to_dict() makes it")
        if values.get("quant_method") != METHOD:
            raise ValueError(
                f"quantization_config says quant_method={values.get('quant_method')!r}, which is not read; get the "
                "weights that are not quantized, and pass quantization="
            )
        fields = {name: value for name, value in values.items() if name != "quant_method"}
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields.keys() - set(known):
            raise ValueError(f"quantization_config has an unknown field {name!r}{did_you_mean(name, known)}")
        try:
            return cls(**fields)
        except ValueError as error:
            raise ValueError(f"quantization_config: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The fields as ``config.json`` has them: what came later is left out where it is not chosen, so that older
        versions read it."""
        fields = dataclasses.asdict(self)
        if not self.double_quantization:
            del fields["double_quantization"]
        return {"quant_method": METHOD, **fields}

    def __str__(self) -> str:
        groups = f"groups of {self.group_size}" if self.group_size else "a scale for each output"
        groups += " with offsets" if self.offsets else ""
        groups += " with scales in 8 bits" if self.double_quantization else ""
        skipped = f", without {', '.join(self.skip)}" if self.skip else ""
        return f"{self.kind} ({self.bits} bits, {groups}{skipped})"


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, names))
