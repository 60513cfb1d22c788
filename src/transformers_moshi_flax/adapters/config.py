"""What an adapter is like: PEFT's names, meanings and defaults."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from ..checkpoints.configs import did_you_mean

ALL_LINEAR = "all-linear"

_OF_PEFT: dict[str, Any] = {
    "peft_type": "LORA",
    "peft_version": None,
    "task_type": None,
    "auto_mapping": None,
    "revision": None,
    "inference_mode": None,
    "runtime_config": None,
    "megatron_core": None,
    "layers_pattern": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "loftq_config": {},
    "lora_bias": False,
    "use_dora": False,
    "use_qalora": False,
    "qalora_group_size": None,
    "ensure_weight_tying": False,
}
"""Fields of PEFT's files that mean nothing here, with the value that they must have; None stands for any."""

_READ_AS_UNSET: tuple[Any, ...] = (None, False, {}, [], "none")


@dataclasses.dataclass
class LoraConfig:
    """A low-rank adapter of linear layers, ``W + scaling · A B``; PEFT's ``LoraConfig``.

    Attributes:
        r: the rank.
        target_modules: the linear layers that get one, by PEFT's rules: names as in ``transformers``' PyTorch model
            (``decoder.model.layers.0.self_attn.q_proj.linear``) or ends of such, a regular expression that matches
            whole names, or ``"all-linear"``: all but the heads and Mimi's. The layers of the depth decoder that are
            one a codebook are one name, and get an adapter a codebook.
        exclude_modules: of these, the ones that get none.
        target_parameters: names of the weights of layers that are one a codebook, or ends of such; PEFT reaches these
            layers by them. Here either way will do.
        lora_alpha: ``scaling`` is ``lora_alpha / r``, with ``use_rslora`` ``lora_alpha / sqrt(r)``.
        lora_dropout: the share of an adapter's inputs that are dropped in training.
        use_rslora: see ``lora_alpha``.
        scaling: instead of ``lora_alpha``, as Kyutai gives it.
        modules_to_save: modules that are trained and saved whole; names or ends of such.
        rank_pattern, alpha_pattern: other values of ``r`` and ``lora_alpha`` by regular expressions that match the
            ends of names, of layers that are one a codebook those of their weights (``fc1.weight``).
        init_lora_weights: True draws A uniformly (Kaiming) and sets B to 0, ``"gaussian"`` draws A normally with a
            deviation of ``1 / r``; False draws both, so that the adapter changes the model from the start.
        base_model_name_or_path: what the adapter was made for.

    Raises:
        ValueError: values out of range or contradicting each other; all of them are listed.
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    lora_alpha: int | float = 8
    lora_dropout: int | float = 0.0
    use_rslora: bool = False
    scaling: int | float | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = dataclasses.field(default_factory=dict)
    init_lora_weights: bool | str = True
    base_model_name_or_path: str | None = None

    def __post_init__(self):
        for name in ("target_modules", "exclude_modules", "target_parameters", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, (tuple, set, frozenset)):
                setattr(self, name, sorted(value) if isinstance(value, (set, frozenset)) else list(value))
        problems = [*self._problems()]
        if problems:
            raise ValueError("; ".join(problems))

    def _problems(self):
        for name, value in (
            ("r", self.r),
            *((f"rank_pattern[{key!r}]", rank) for key, rank in self.rank_pattern.items()),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                yield f"`{name}` must be a whole number, at least 1, but is {value!r}"
        alphas = (("lora_alpha", self.lora_alpha), ("scaling", 1.0 if self.scaling is None else self.scaling))
        for name, value in (
            *alphas,
            *((f"alpha_pattern[{key!r}]", alpha) for key, alpha in self.alpha_pattern.items()),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                yield f"`{name}` must be a finite number, but is {value!r}"
        if self.scaling is not None and (self.use_rslora or self.alpha_pattern):
            yield "`scaling` says it all: leave out `use_rslora` and `alpha_pattern`"
        dropout = self.lora_dropout
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            yield f"`lora_dropout` must be at least 0 and below 1, but is {dropout!r}"
        if self.init_lora_weights not in (True, False, "gaussian"):
            yield f"`init_lora_weights` must be True, False or 'gaussian', but is {self.init_lora_weights!r}"
        if not (self.target_modules or self.target_parameters or self.modules_to_save):
            yield f"`target_modules` names no layer: give names, a regular expression, or {ALL_LINEAR!r}"
        expressions = [*self.rank_pattern, *self.alpha_pattern]
        expressions += [each for each in (self.target_modules, self.exclude_modules) if isinstance(each, str)]
        for expression in expressions:
            try:
                re.compile(expression)
            except re.error as error:
                yield f"{expression!r} is no regular expression ({error})"

    def rank_of(self, name: str) -> int:
        """The rank of the adapter of a layer, by the name that PEFT has for it."""
        return _by_pattern(self.rank_pattern, name, self.r)

    def scaling_of(self, name: str) -> int | float:
        """What the product of its matrices is multiplied by."""
        if self.scaling is not None:
            return self.scaling
        rank, alpha = self.rank_of(name), _by_pattern(self.alpha_pattern, name, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "the configuration") -> LoraConfig:
        """From the fields of PEFT's ``adapter_config.json``.

        Raises:
            ValueError: another kind of adapter, or a field that is set and does not exist here.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        taken = {name: value for name, value in values.items() if name in known and value is not None}
        problems = []
        for name, value in values.items():
            if name in known:
                continue
            if name not in _OF_PEFT:
                if value not in _READ_AS_UNSET:
                    problems.append(f"`{name}`={value!r} is no option here{did_you_mean(name, known)}")
            elif _OF_PEFT[name] is not None and value not in (_OF_PEFT[name], None):
                problems.append(f"`{name}`={value!r}: here it is always {_OF_PEFT[name]!r}")
        if problems:
            raise ValueError(f"{where}: {'; '.join(problems)}")
        return cls(**taken)

    def to_dict(self) -> dict[str, Any]:
        """The fields as PEFT's ``adapter_config.json`` has them: a ``scaling`` is told as an alpha."""
        values = dataclasses.asdict(self)
        scaling = values.pop("scaling")
        if scaling is not None:
            values["lora_alpha"] = scaling * self.r
            values["alpha_pattern"] = {name: scaling * rank for name, rank in self.rank_pattern.items()}
        return {"peft_type": "LORA", "task_type": None, "bias": "none", "inference_mode": True, **values}


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default
