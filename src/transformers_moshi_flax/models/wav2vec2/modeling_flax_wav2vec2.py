"""The public model of Wav2Vec2, around the linen modules of ``modules_flax_wav2vec2.py``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from transformers import Wav2Vec2Config

from ...input_checks import Input, check_shape, is_traced, refuse_params
from ...modeling_flax_encoder import FlaxEncoderModel
from .checkpoint_flax_wav2vec2 import WAV2VEC2_RULES
from .modules_flax_wav2vec2 import FlaxWav2Vec2BaseModelOutput, FlaxWav2Vec2Module
from .topology import hop_length, output_length, samples_for

AUDIO = Input(
    {"batch": None, "samples": None},
    "floats",
    called="audio of one channel, as the feature extractor of `transformers` prepares it",
)


class FlaxWav2Vec2PreTrainedModel(FlaxEncoderModel):
    """What the classes share.

    A configuration that asks for what is not supported raises a ``ValueError`` that names field, value and remedy,
    before weights are read: layers behind the encoder (``add_adapter``) and adapters of languages
    (``adapter_attn_dim``).
    """

    config_class = Wav2Vec2Config
    base_model_prefix = "wav2vec2"
    main_input_name = "input_values"
    checkpoint_rules = WAV2VEC2_RULES
    checkpoint_prefixes = ("", "wav2vec2.")
    # lacking in files of models that were fine-tuned without
    checkpoint_optional = (r"masked_spec_embed",)
    dropout_fields = (
        *("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "layerdrop"),
        *("mask_time_prob", "mask_feature_prob"),
    )

    @property
    def hop_length(self) -> int:
        """Samples from one frame to the next."""
        return hop_length(self.config)

    def output_lengths(self, lengths: Any) -> Any:
        """Frames of recordings of so many samples, an int or an integer array of any shape."""
        return output_length(self.config, lengths)

    def dummy_inputs(self, input_shape: tuple[int, ...]) -> dict[str, Any]:
        rows, samples = input_shape
        return {"input_values": jnp.zeros((rows, max(samples, samples_for(self.config, 1))))}

    def _random_fields(self) -> list[str]:
        names = super()._random_fields()
        return [name for name in names if self.config.apply_spec_augment or not name.startswith("mask_")]

    def _checked(
        self, input_values: ArrayLike | None, attention_mask: ArrayLike | None, mask_time_indices: ArrayLike | None
    ) -> tuple[dict[str, Input], dict[str, Any]]:
        """The table of the inputs, and they; ValueError for what it cannot tell: lengths that make no frame, padding
        before audio, frames to mask where there is no masking."""
        config = self.config
        if input_values is None:
            raise ValueError("`input_values` is None: give audio, `(batch, samples)`.")
        refuse_params(input_values=input_values)
        check_shape("input_values", np.shape(input_values), AUDIO, {})
        least, samples = samples_for(config, 1), np.shape(input_values)[1]
        if samples < least:
            raise ValueError(f"`input_values` has {samples} samples, but a frame takes {least}: give longer audio.")
        table = {
            "input_values": AUDIO,
            "attention_mask": Input({"batch": None, "samples": None}, "mask"),
            "mask_time_indices": Input({"batch": None, "frames": output_length(config, samples)}, "bools"),
        }
        if mask_time_indices is not None:
            if not config.apply_spec_augment:
                raise ValueError("`mask_time_indices` has no effect with `apply_spec_augment=False`: leave one out.")
            if not (config.mask_time_prob or config.mask_feature_prob):
                raise ValueError(
                    "`mask_time_indices` needs the vector `masked_spec_embed`, which a model with `mask_time_prob` "
                    "and `mask_feature_prob` 0 has not: load it with mask_time_prob=0.05, say."
                )
        if attention_mask is not None and not is_traced(attention_mask) and np.ndim(attention_mask) == 2:
            mask = np.asarray(attention_mask).astype(np.int8)
            if (np.diff(mask, axis=1) > 0).any():
                raise ValueError("`attention_mask` has padding before audio: pad on the right.")
            short = np.flatnonzero(mask.sum(axis=1, dtype=np.int64) < least)
            if short.size:
                raise ValueError(
                    f"`attention_mask` has {mask[short[0]].sum(dtype=np.int64)} samples in row {short[0]}, but a "
                    f"frame takes {least}: give longer audio."
                )
        return table, {
            "input_values": input_values,
            "attention_mask": attention_mask,
            "mask_time_indices": mask_time_indices,
        }


class FlaxWav2Vec2Model(FlaxWav2Vec2PreTrainedModel):
    """Wav2Vec2 (Baevski et al., 2020) without a head; upstream ``Wav2Vec2Model``."""

    module_class = FlaxWav2Vec2Module

    def __call__(
        self,
        input_values: ArrayLike | None,
        attention_mask: ArrayLike | None = None,
        mask_time_indices: ArrayLike | None = None,
        params: Any | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> FlaxWav2Vec2BaseModelOutput | tuple[Any, ...]:
        """Runs the model, as one program for each of the shapes and options.

        With ``feat_extract_norm="layer"`` and ``attention_mask`` a padded row gives in its frames what it gives alone.
        With ``"group"`` it does not, as upstream: the first norm is over all samples of a row, padding included, and
        such models were trained without ``attention_mask``. For the same numbers, run rows of one length together.

        Args:
            input_values: ``(batch, samples)`` floats, 16 kHz, as the feature extractor of ``transformers`` prepares
                them, padded on the right.
            attention_mask: ``(batch, samples)``, 1 for samples, 0 for padding.
            mask_time_indices: ``(batch, frames)`` bool, frames that become ``masked_spec_embed``, in the place of
                random ones; also without ``train``.
            params: the parameters (default: the model's own).
            dropout_rng: key of what is random in training.
            train: applies dropout, LayerDrop, and masking augmentation if ``apply_spec_augment`` says so.
            output_attentions, output_hidden_states, return_dict: as in ``transformers``. The last of the
                ``hidden_states`` is the output of the last layer; ``last_hidden_state`` is behind one more norm where
                ``do_stable_layer_norm`` has it.

        Raises:
            ValueError: for wrong shapes and dtypes, values that are not finite, rows that are too short for a frame,
                padding before audio, ``train=True`` without the ``dropout_rng`` that it needs, masking spans that are
                longer than the audio, ``mask_time_indices`` where they have no effect or no vector.
        """
        table, inputs = self._checked(input_values, attention_mask, mask_time_indices)
        flags = (output_attentions, output_hidden_states, return_dict)
        return self._run(table, inputs, params, dropout_rng, train, *flags)
