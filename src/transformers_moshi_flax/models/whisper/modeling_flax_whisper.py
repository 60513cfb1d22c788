"""The encoder of Whisper, around the linen modules of ``modules_flax_whisper.py``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float
from transformers import VoxtralEncoderConfig, WhisperConfig

from ...generation.arrays import on_device
from ...input_checks import Input, check_input
from ...modeling_flax_encoder import FlaxEncoderModel
from ...modeling_flax_outputs import FlaxBaseModelOutput
from .checkpoint_flax_whisper import WHISPER_RULES
from .features_flax_whisper import HOP, WIDTH, log_mel
from .modules_flax_whisper import FlaxWhisperEncoderModule

AUDIO = Input({"batch": None, "samples": None}, "audio")


class FlaxWhisperEncoder(FlaxEncoderModel):
    """The encoder of Whisper (Radford et al., 2022); upstream ``WhisperEncoder`` and ``VoxtralEncoder``.

    It is read from checkpoints of the whole of Whisper or Voxtral, of which no other tensor is fetched, and from its
    own.
    """

    config_class = WhisperConfig
    config_classes = (WhisperConfig, VoxtralEncoderConfig)
    base_model_prefix = "model"
    main_input_name = "input_features"
    module_class = FlaxWhisperEncoderModule
    checkpoint_rules = WHISPER_RULES
    checkpoint_prefixes = ("", "encoder.", "audio_tower.", "model.encoder.")
    default_input_shape = (1,)
    dropout_fields = ("dropout", "activation_dropout", "attention_dropout", "encoder_layerdrop")

    @property
    def upstream_name(self) -> str:
        return "VoxtralEncoder" if isinstance(self.config, VoxtralEncoderConfig) else super().upstream_name

    @property
    def hop_length(self) -> int:
        """Samples from one frame to the next."""
        return 2 * HOP

    @property
    def max_samples(self) -> int:
        """Samples that the encoder hears at once: 30 s."""
        return self.config.max_source_positions * self.hop_length

    def output_lengths(self, lengths: Any) -> Any:
        """Frames that recordings of so many samples, an int or an integer array, fill; those behind are silence."""
        return -(-lengths // self.hop_length)

    def dummy_inputs(self, input_shape: tuple[int, ...]) -> dict[str, Any]:
        config = self.config
        return {"input_features": jnp.zeros((input_shape[0], config.num_mel_bins, 2 * config.max_source_positions))}

    def features(self, audio: ArrayLike) -> Float[Array, "batch bins mel_frames"]:
        """The log-mel spectrogram of recordings, as ``transformers.WhisperFeatureExtractor`` makes it; :func:`log_mel`
        does so inside of programs.

        Args:
            audio: ``(batch, samples)`` floats in [-1, 1], 16 kHz, up to 30 s; padded with zeros to that.

        Raises:
            ValueError: other shapes, dtypes and values, and more samples than it hears at once.
        """
        check_input("audio", audio, AUDIO)
        samples, most = np.shape(audio)[1], self.max_samples
        if samples > most:
            raise ValueError(
                f"`audio` has {samples} samples, but the encoder hears {most} at once: cut it in "
                "pieces, as `FlaxAudioEncoder` does with chunk_audio=True."
            )
        if most <= WIDTH // 2:
            raise ValueError(
                f"`max_source_positions` is {self.config.max_source_positions}, too few for a spectrogram: give "
                "`input_features`."
            )
        padded = jnp.pad(on_device(audio), ((0, 0), (0, most - samples)))
        return log_mel(padded, self.config.num_mel_bins)

    def __call__(
        self,
        input_features: ArrayLike | None,
        params: Any | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> FlaxBaseModelOutput | tuple[Any, ...]:
        """Runs the encoder, as one program for each of the shapes and options.

        There is no mask, as upstream has none: silence behind a recording is heard as such.

        Args:
            input_features: ``(batch, num_mel_bins, 2 * max_source_positions)`` floats, of :meth:`features` or of the
                feature extractor of ``transformers``.
            params: the parameters (default: the model's own).
            dropout_rng: key of what is random in training.
            train: applies dropout and LayerDrop.
            output_attentions, output_hidden_states, return_dict: as in ``transformers``. ``hidden_states`` are the
                input of every layer and ``last_hidden_state``.

        Raises:
            ValueError: for wrong shapes and dtypes, values that are not finite, ``train=True`` without the
                ``dropout_rng`` that it needs.
        """
        config = self.config
        if input_features is None:
            raise ValueError("`input_features` is None: give a spectrogram, such as that of `features(audio)`.")
        axes = {"batch": None, "bins": config.num_mel_bins, "mel_frames": 2 * config.max_source_positions}
        table = {"input_features": Input(axes, "floats", hint="pad audio to what the encoder hears, see `features`")}
        flags = (output_attentions, output_hidden_states, return_dict)
        return self._run(table, {"input_features": input_features}, params, dropout_rng, train, *flags)
