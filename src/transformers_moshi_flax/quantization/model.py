"""What models do with quantized layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from jax.typing import DTypeLike
from transformers import PreTrainedConfig

from ..checkpoints.configs import override_config
from .config import QuantizationConfig
from .tree import check_skip, dequantized, quantized, quantized_layers, quantized_shapes


class FlaxQuantizationMixin:
    """Quantized layers of a model, which its configuration tells of (``config.quantization_config``)."""

    config: PreTrainedConfig
    checkpoint_prefixes: ClassVar[tuple[str, ...]]
    dtype: Any
    params: Any
    _whole: Any
    _name_in_whole: str
    _before_merge: dict[str, Any] | None
    _rebuild: Callable[[PreTrainedConfig], None]
    # the shapes of the parameters as floats, whatever they are
    _float_shape_tree: dict[str, Any]

    @property
    def quantization(self) -> QuantizationConfig | None:
        """How the linear layers are quantized, None if they are not."""
        return QuantizationConfig.of_model(self.config)

    @property
    def _prefix_in_whole(self) -> str:
        """What the names of the parameters begin with in the model that this one is a part of, such as Moshi."""
        if self._whole is None:
            return self.checkpoint_prefixes[-1]
        return f"{self._whole._prefix_in_whole}{self._name_in_whole}."

    def quantize(self, quantization: QuantizationConfig | str) -> Any:
        """Quantize the linear layers, in place; an adapter stays beside them.

        ``from_pretrained(quantization=)`` does so while it reads, without ever holding all of the floats.

        Args:
            quantization: ``"int8"``, ``"int4"``, ``"nf4"``, or more exactly how.

        Returns:
            The model itself.

        Raises:
            ValueError: it is quantized already, has adapters merged, is a part of another, keeps no parameters, or is
                not to be quantized that way.
        """
        chosen = self._checked_quantization(quantization)
        if self._before_merge is not None:
            raise ValueError(
                "quantize: adapters are merged into the weights; unmerge_adapter first, or save the model and load it "
                "with quantization="
            )
        params = quantized(self.params, chosen, self._prefix_in_whole)
        self._rebuild(self._config_with(chosen))
        self.params = params
        return self

    def dequantize(self, dtype: DTypeLike | None = None) -> Any:
        """Turn quantized layers into floats, in place.

        Args:
            dtype: of their kernels; that of the computation if None.

        Returns:
            The model itself.

        Raises:
            ValueError: it is not quantized, is a part of another, or keeps no parameters.
        """
        self._refuse_part("dequantize")
        if self.quantization is None:
            raise ValueError("dequantize: the weights of this model are not quantized")
        params = dequantized(self.params, self.dtype if dtype is None else dtype)
        self._rebuild(self._config_with(None))
        self.params = params
        return self

    def _checked_quantization(self, quantization: QuantizationConfig | str) -> QuantizationConfig:
        """What is asked for; ValueError if this model cannot be quantized that way."""
        chosen = QuantizationConfig.of(quantization)
        self._refuse_part("quantize")
        if self.quantization is not None:
            raise ValueError(
                f"quantization={chosen.kind!r}, but the weights are quantized already, {self.quantization}: take them "
                "as they are, or quantize the floats that they were made of"
            )
        check_skip(self._float_shape_tree, chosen, self._prefix_in_whole)
        quantized_layers(self._float_shape_tree, chosen, self._prefix_in_whole)
        return chosen

    def _refuse_part(self, what: str) -> None:
        if self._whole is not None:
            raise ValueError(
                f"{what}: this {type(self).__name__} is a part of a {type(self._whole).__name__}; {what} that one "
                "(`skip` leaves out others of its parts)"
            )

    def _refuse_quantized(self, what: str) -> None:
        """ValueError for what needs weights that are floats."""
        if self.quantization is not None:
            raise ValueError(
                f"{what}: the weights are quantized, {self.quantization}; call dequantize() first (of files: "
                "moshi-flax convert SRC DST --quantize none)"
            )

    def _config_with(self, quantization: QuantizationConfig | None) -> PreTrainedConfig:
        """A copy of the configuration that tells of this quantization, or of none."""
        if quantization is not None:
            return override_config(self.config, {"quantization_config": quantization.to_dict()})
        config = override_config(self.config, {"quantization_config": None})
        del config.quantization_config
        return config

    def _quantized_shapes(self) -> dict[str, Any]:
        """The shapes of the parameters as the configuration says that they are."""
        quantization = self.quantization
        if quantization is None:
            return self._float_shape_tree
        return quantized_shapes(self._float_shape_tree, quantization, self._prefix_in_whole)
