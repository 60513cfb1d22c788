"""The encoders of audio under one interface: what goes in, what comes out, and what of it is trained."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ...adapters.config import LoraConfig
from ...adapters.lora import check_trained, with_leaves
from ...generation.arrays import on_device
from ...input_checks import check_input, refuse_params
from ...modeling_flax_auto import FlaxAutoAudioEncoder
from ...modeling_flax_encoder import FlaxEncoderModel
from ...modeling_flax_outputs import FlaxBaseModelOutput
from ...quantization.config import QuantizationConfig
from ..whisper import FlaxWhisperEncoder
from ..whisper.modeling_flax_whisper import AUDIO

SAMPLING_RATE = 16_000
"""Samples a second that all of them hear."""

POSITIONS = "embed_positions/embedding"
"""Whisper's table of sines, which is never trained."""


class FlaxAudioEncoder:
    """An encoder of audio: Whisper's, Wav2Vec2 or HuBERT.

    Args:
        model: the encoder itself. An active adapter of it is what is trained.
        finetune: whether all of its weights are trained; otherwise they stay as they are.

    Raises:
        ValueError: a model that is no encoder; ``finetune`` of one with an adapter or with quantized weights.
    """

    def __init__(self, model: FlaxEncoderModel, finetune: bool = False):
        if not isinstance(model, FlaxEncoderModel):
            raise ValueError(f"`model` must be an encoder of audio, but is a {type(model).__name__}.")
        if finetune and model.peft_config:
            raise ValueError("`finetune` is True, but the model has an adapter, which is trained instead: choose one.")
        if finetune and model.quantization is not None:
            raise ValueError(
                f"`finetune` is True, but the weights are quantized, {model.quantization}, which cannot be trained: "
                "give `lora` instead, or floats."
            )
        self.model = model
        self.finetune = finetune

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike,
        finetune: bool = False,
        lora: LoraConfig | str | os.PathLike | None = None,
        quantization: QuantizationConfig | str | None = None,
        **kwargs: Any,
    ) -> FlaxAudioEncoder:
        """An encoder from a checkpoint, chosen by its ``model_type``: frozen, unless something is to be trained.

        Args:
            name: a directory or a Hub id of Whisper (of which the encoder alone is read), Wav2Vec2 or HuBERT.
            finetune: all weights are trained.
            lora: an adapter is trained: what it is like, or where one lies that :meth:`save_pretrained` wrote.
            quantization: of the linear layers, as of ``from_pretrained``; with ``lora`` it is QLoRA.
            **kwargs: of the class's ``from_pretrained``, such as ``dtype``.

        Raises:
            ValueError: before weights are read: another ``model_type``; ``finetune`` with ``lora`` or
                ``quantization``; and what the class refuses.
        """
        if finetune and lora is not None:
            raise ValueError(f"`finetune` is True, but `lora` is {lora!r}, which is trained instead: leave one out.")
        if finetune and quantization is not None:
            raise ValueError(
                f"`finetune` is True, but `quantization` is {quantization!r}, whose weights cannot be trained: give "
                "`lora` instead, or leave one out."
            )
        if kwargs.get("_do_init", True) is not True or kwargs.get("output_loading_info"):
            raise ValueError("`_do_init` and `output_loading_info` are of the class of the encoder: load it by that.")
        model = FlaxAutoAudioEncoder.from_pretrained(name, quantization=quantization, **kwargs)
        if isinstance(lora, LoraConfig):
            model.add_adapter(lora)
        elif lora is not None:
            model.load_adapter(lora)
        return cls(model, finetune)

    # Sizes

    @property
    def hidden_size(self) -> int:
        """Of every hidden state."""
        return self.model.config.hidden_size

    @property
    def num_layers(self) -> int:
        """There is one hidden state more."""
        return self.model.config.num_hidden_layers

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        return SAMPLING_RATE / self.model.hop_length

    def output_lengths(self, lengths: Any) -> Any:
        """Frames of recordings of so many samples, an int or an integer array."""
        return self.model.output_lengths(lengths)

    # Calls

    def __call__(
        self,
        audio: ArrayLike,
        attention_mask: ArrayLike | None = None,
        params: Any | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        chunk_audio: bool = False,
    ) -> FlaxBaseModelOutput:
        """Hidden states of recordings: that of the input and of every layer in ``hidden_states``, and the last.

        Args:
            audio: ``(batch, samples)`` floats, 16 kHz, padded on the right: for Whisper in [-1, 1], up to 30 s, for
                the others as their feature extractor prepares them. Whisper takes its spectrogram ``(batch, bins,
                mel_frames)`` as well.
            attention_mask: ``(batch, samples)``, 1 for samples, 0 for padding; not of Whisper, which hears silence.
            params: those of the model, or of :meth:`with_trainable`; its own if None. Of a frozen encoder, nothing has
                a gradient by them.
            dropout_rng, train: as of the model.
            chunk_audio: Whisper hears windows of 30 s of longer audio, one after another and each by itself; their
                frames follow each other, ``output_lengths`` of the whole before padding.

        Raises:
            ValueError: ``attention_mask`` for Whisper, ``chunk_audio`` for the others, which hear any length, or for a
                spectrogram, and what the model refuses.
        """
        refuse_params(audio=audio, attention_mask=attention_mask)
        inputs: dict[str, Any]
        windows = 1
        if chunk_audio:
            audio, windows = self._in_windows(audio)
        if isinstance(self.model, FlaxWhisperEncoder):
            if attention_mask is not None:
                raise ValueError(
                    "`attention_mask` has no effect on Whisper, which hears padding as silence: leave it out, and cut "
                    "the frames by `output_lengths`."
                )
            inputs = {"input_features": self.model.features(audio) if np.ndim(audio) == 2 else audio}
        else:
            inputs = {"input_values": audio, "attention_mask": attention_mask}
        if not self._trains:
            params = jax.lax.stop_gradient(self.model.whole_params(params))
        outputs = self.model(
            **inputs,
            params=params,
            dropout_rng=dropout_rng,
            train=train,
            output_attentions=False,
            output_hidden_states=True,
            return_dict=True,
        )

        def in_a_row(states: Array) -> Array:
            return states.reshape(-1, windows * states.shape[1], states.shape[2])

        return FlaxBaseModelOutput(
            in_a_row(outputs.last_hidden_state), tuple(in_a_row(states) for states in outputs.hidden_states)
        )

    def _in_windows(self, audio: ArrayLike) -> tuple[Float[Array, "windows samples"], int]:
        """The windows of all rows, one below the other, and how many a row has."""
        if not isinstance(self.model, FlaxWhisperEncoder):
            raise ValueError("`chunk_audio` has no effect on an encoder that hears any length: leave it out.")
        check_input("audio", audio, AUDIO)
        windows = max(-(-np.shape(audio)[1] // self.model.max_samples), 1)
        samples = windows * self.model.max_samples
        padded = jnp.pad(on_device(audio), ((0, 0), (0, samples - np.shape(audio)[1])))
        return padded.reshape(-1, self.model.max_samples), windows

    # What is trained

    @property
    def _trains(self) -> bool:
        return self.finetune or bool(self.model.peft_config)

    def trainable(self) -> dict[str, Any]:
        """What is trained by "/"-joined path: of a frozen encoder nothing, so that an optimizer has no state of it; of
        one with an adapter that alone; otherwise all weights, but for Whisper's table of positions."""
        if self.model.peft_config:
            return self.model.adapter_leaves()
        if not self.finetune:
            return {}
        return {path: leaf for path, leaf in flatten_dict(self.model.params, sep="/").items() if path != POSITIONS}

    def with_trainable(self, leaves: Mapping[str, Any]) -> Any:
        """Parameters whose :meth:`trainable` are these, which may be traced: for ``params=`` of a loss.

        Raises:
            ValueError: other paths or shapes.
        """
        if self.model.peft_config:
            return self.model.with_adapter_leaves(leaves)
        check_trained(self.trainable(), leaves)
        return with_leaves(self.model.params, leaves)

    def set_trainable(self, leaves: Mapping[str, Any]) -> None:
        """Other values for :meth:`trainable`; ValueError as of :meth:`with_trainable`."""
        if self.model.peft_config:
            self.model.set_adapter_leaves(leaves)
        else:
            self.model.params = self.with_trainable(leaves)

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many numbers the weights are, without an adapter, or how many are trained."""
        if only_trainable:
            return sum(int(np.prod(leaf.shape)) for leaf in self.trainable().values())
        return self.model.num_parameters()

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the adapter if there is one, in PEFT's format, otherwise the weights in Flax's layout.

        :meth:`from_pretrained` reads the first by ``lora``, with the name of the base, and the second by ``name``.
        """
        if self.model.peft_config:
            self.model.save_adapter(directory)
        else:
            self.model.save_pretrained(directory)
