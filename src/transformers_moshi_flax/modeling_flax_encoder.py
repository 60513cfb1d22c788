"""What the encoders of audio share: their lengths, their checks, and the call around ``module.apply``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import numpy as np

from .generation.arrays import on_device
from .input_checks import Input, check_inputs, is_traced
from .modeling_flax_outputs import FlaxModelOutput
from .modeling_flax_utils import FlaxPreTrainedModel
from .nn.linear import dropout_rngs


class FlaxEncoderModel(FlaxPreTrainedModel):
    """A model that turns a recording into hidden states, a number of frames a second.

    Class attributes that a model sets:
        dropout_fields: fields of the configuration that are rates of what happens at random in training.
    """

    pipeline_tag = "feature-extraction"
    dropout_fields: ClassVar[tuple[str, ...]] = ()
    __call__: Callable[..., Any]

    # What a model class defines

    @property
    def hop_length(self) -> int:
        """Samples from one frame to the next."""
        raise NotImplementedError(f"{type(self).__name__} must define hop_length")

    def output_lengths(self, lengths: Any) -> Any:
        """Frames of recordings of so many samples, an int or an integer array of any shape."""
        raise NotImplementedError(f"{type(self).__name__} must define output_lengths")

    # What it gets

    def _random_fields(self) -> list[str]:
        """Those of the fields that make training random."""
        return [name for name in self.dropout_fields if getattr(self.config, name)]

    def _run(
        self,
        table: dict[str, Input],
        inputs: dict[str, Any],
        params: Any,
        dropout_rng: jax.Array | None,
        train: bool,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
        return_dict: bool | None,
    ) -> FlaxModelOutput | tuple:
        """Runs the module, compiled once for each of the shapes and options.

        Args:
            table: of the inputs.
            inputs: by name, of which the first is there.
            params: the model's own if None.
            dropout_rng, train, output_attentions, output_hidden_states, return_dict: as of the call.

        Raises:
            ValueError: inputs that are not as described, floats that are NaN or infinite, no ``dropout_rng`` where
                training needs one.
        """
        sizes = check_inputs(table, inputs)
        for name, value in inputs.items():
            if table[name].kind == "floats" and not is_traced(value) and not np.isfinite(np.asarray(value)).all():
                raise ValueError(f"`{name}` has values that are NaN or infinite: repair the audio.")
        if train and dropout_rng is None:
            self._refuse_to_train_without_rng(params)
        arrays = {name: None if value is None else on_device(value) for name, value in inputs.items()}
        rngs = dropout_rngs(dropout_rng) if train and dropout_rng is not None else {}
        flags = self._flags(output_attentions, output_hidden_states)
        program = self._program("__call__", train, **{name: bool(value) for name, value in flags.items()})
        return self._returned(program(self.whole_params(params, sizes["batch"]), rngs, arrays), return_dict)

    def _refuse_to_train_without_rng(self, params: Any) -> None:
        random = [f"`{name}`" for name in self._random_fields()]
        if params is None and self.adapters_drop():
            random.append("an adapter's `lora_dropout`")
        if random:
            raise ValueError(
                f"`train=True` with {', '.join(random)} > 0 needs `dropout_rng`: pass a key of `jax.random.key`."
            )
