"""Text and recordings in, inputs of the joined model out; and back from what ``generate`` returns."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float32
from transformers import BatchFeature, FeatureExtractionMixin, PreTrainedTokenizerBase, VoxtralConfig

from ...input_checks import Input, check_input, is_whole
from ...modeling_flax_outputs import FlaxModelOutput
from ...processing_flax_utils import FlaxProcessorMixin
from .configuration_speech_language import check_config, projector_of

RECORDING = Input({"samples": None}, "audio", hint="mono; mix channels down")
"""One recording."""


class SpeechLanguageProcessor(FlaxProcessorMixin):
    """A feature extractor and a tokenizer, and how many tokens a recording has; :meth:`for_model` knows them.

    Args:
        feature_extractor: of the encoder; its ``sampling_rate`` is the one that audio must have.
        tokenizer: of the language model, with ``audio_token`` as one of its tokens.
        audio_token: what stands in a text for a recording.
        convolutions: widths and strides of what makes tokens of samples, first to last.
        max_samples: that the encoder hears at once; None for any number.
        whole_windows: a recording has the tokens of ``max_samples``, silence included, as in Voxtral.

    Raises:
        ValueError: the tokenizer lacks the token, the feature extractor is not mono, numbers that make no sense.
    """

    options = ("audio_token", "convolutions", "max_samples", "whole_windows")

    def __init__(
        self,
        feature_extractor: FeatureExtractionMixin,
        tokenizer: PreTrainedTokenizerBase,
        audio_token: str = "<audio>",
        convolutions: Sequence[Sequence[int]] = ((1, 320), (1, 4)),
        max_samples: int | None = None,
        whole_windows: bool = False,
    ):
        pieces = tokenizer.encode(audio_token, add_special_tokens=False)
        if len(pieces) != 1 or pieces[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"`tokenizer` has no token {audio_token!r} (`audio_token`): add it, "
                f"tokenizer.add_special_tokens({{'additional_special_tokens': [{audio_token!r}]}}), or name another."
            )
        numbers = [number for pair in convolutions for number in pair]
        if any(len(pair) != 2 for pair in convolutions) or not all(is_whole(each) and each >= 1 for each in numbers):
            raise ValueError(f"`convolutions` must be pairs of a width and a stride, but is {convolutions!r}.")
        if max_samples is not None and not (is_whole(max_samples) and max_samples >= 1):
            raise ValueError(f"`max_samples` must be a whole number of at least 1 or None, but is {max_samples!r}.")
        if whole_windows and max_samples is None:
            raise ValueError("`whole_windows` is True, but `max_samples` is None: give the samples of a window.")
        super().__init__(feature_extractor, tokenizer)
        self.audio_token = audio_token
        self.audio_token_id = int(pieces[0])
        self.convolutions = [[int(width), int(stride)] for width, stride in convolutions]
        self.max_samples = max_samples
        self.whole_windows = whole_windows

    @classmethod
    def for_model(
        cls,
        config: Any,
        feature_extractor: FeatureExtractionMixin,
        tokenizer: PreTrainedTokenizerBase,
        audio_token: str = "<audio>",
    ) -> SpeechLanguageProcessor:
        """The processor of a joined model.

        Args:
            config: of the model, a :class:`SpeechLanguageConfig` or a ``VoxtralConfig``.
            feature_extractor, tokenizer, audio_token: as of the class.

        Raises:
            ValueError: also another sampling rate or number of features than the encoder takes, or another token than
                the model's ``audio_token_id``.
        """
        tower, projector = check_config(config), projector_of(config)
        wanted = {"sampling_rate": tower.sampling_rate, "feature_size": tower.feature_size}
        for name, value in wanted.items():
            if getattr(feature_extractor, name) != value:
                takes = "hears" if name == "sampling_rate" else "takes"
                raise ValueError(
                    f"`feature_extractor` has {name}={getattr(feature_extractor, name)}, but the encoder "
                    f"({config.audio_config.model_type!r}) {takes} {value}: take that of the encoder."
                )
        processor = cls(
            feature_extractor,
            tokenizer,
            audio_token,
            [*tower.convolutions, (1, projector.stack_stride)],
            tower.max_samples,
            isinstance(config, VoxtralConfig),
        )
        if processor.audio_token_id != config.audio_token_id:
            raise ValueError(
                f"`tokenizer` has the id {processor.audio_token_id} for {audio_token!r}, but `audio_token_id` of the "
                f"model is {config.audio_token_id}: join the model with that of the tokenizer."
            )
        return processor

    @property
    def sampling_rate(self) -> int:
        """Samples a second."""
        return self.feature_extractor.sampling_rate

    @property
    def model_input_names(self) -> list[str]:
        """The keys of what a call returns."""
        return ["input_ids", "attention_mask", *self.feature_extractor.model_input_names[:1], "audio_attention_mask"]

    def num_audio_tokens(self, samples: int) -> int:
        """How many tokens a recording of so many samples has."""
        if self.max_samples is None:
            return self._tokens(samples)
        whole, rest = divmod(samples, self.max_samples)
        if self.whole_windows:
            return (whole + bool(rest)) * self._tokens(self.max_samples)
        return whole * self._tokens(self.max_samples) + self._tokens(rest)

    def _tokens(self, samples: int) -> int:
        length = samples
        for width, stride in self.convolutions:
            length = max((length - width) // stride + 1, 0)
        return length

    def __call__(
        self,
        text: str | Sequence[str],
        audio: ArrayLike | Sequence[ArrayLike] | None = None,
        sampling_rate: int | None = None,
        chunk_audio: bool = False,
        padding_side: str = "left",
        return_tensors: str = "np",
    ) -> BatchFeature:
        """Inputs of the model, :meth:`FlaxSpeechLanguageModel.__call__`.

        Args:
            text: a text, or one for each row, in which ``audio_token`` stands once for every recording.
            audio: recordings in the order in which they stand in the texts, row after row, ``(samples,)`` floats in
                [-1, 1] each; or a single one.
            sampling_rate: of the audio, in Hz; there must be one if there is audio.
            chunk_audio: recordings that are longer than the encoder takes are heard in windows, one after another.
            padding_side: ``"left"``, as ``generate`` needs it, or ``"right"``.
            return_tensors: ``"np"``.

        Returns:
            ``input_ids`` and ``attention_mask``, ``(batch, tokens)`` int32; with audio what the feature extractor
            makes of it, ``input_features`` or ``input_values``, and ``audio_attention_mask``.

        Raises:
            ValueError: another or no sampling rate; audio that is not mono, empty, not finite, not of floats, too
                short for a token or longer than the encoder takes; as many recordings as the texts do not name.
        """
        if padding_side not in ("left", "right"):
            raise ValueError(f'`padding_side` must be "left" or "right", but is {padding_side!r}.')
        if return_tensors != "np":
            raise ValueError(f'`return_tensors` must be "np", but is {return_tensors!r}.')
        texts = [text] if isinstance(text, str) else list(text)
        recordings = self._recordings(audio, sampling_rate, chunk_audio)
        named = sum(each.count(self.audio_token) for each in texts)
        if named != len(recordings):
            raise ValueError(
                f"`text` has {named} {self.audio_token!r}, but `audio` has {len(recordings)} recordings: one each."
            )
        counts = iter([self.num_audio_tokens(len(each)) for each in recordings])
        expanded = [self.expanded(each, counts) for each in texts]
        inputs = self._padded([self.tokenizer(each)["input_ids"] for each in expanded], padding_side)
        if recordings:
            inputs |= self.audio_inputs(recordings)
        return BatchFeature(inputs)

    def _padded(self, rows: list[list[int]], padding_side: str) -> dict[str, np.ndarray]:
        """Ids and mask; tokenizers of language models often have no padding, which the mask hides."""
        length, pad = max(map(len, rows)), self.tokenizer.pad_token_id or 0
        inputs = {"input_ids": np.full((len(rows), length), pad, np.int32)}
        inputs["attention_mask"] = np.zeros((len(rows), length), np.int32)
        for row, ids in enumerate(rows):
            part = slice(length - len(ids), None) if padding_side == "left" else slice(len(ids))
            inputs["input_ids"][row, part], inputs["attention_mask"][row, part] = ids, 1
        return inputs

    def expanded(self, text: str, counts: Iterable[int]) -> str:
        """A text with as many audio tokens for each of its recordings as ``counts`` say."""
        first, *others = text.split(self.audio_token)
        return first + "".join(self.audio_token * count + each for each, count in zip(others, counts))

    def _recordings(self, audio: Any, sampling_rate: int | None, chunk_audio: bool) -> list[np.ndarray]:
        """The recordings, checked."""
        if audio is None:
            return []
        if sampling_rate is None:
            raise ValueError(f"`sampling_rate` is missing: pass that of the audio; it must be {self.sampling_rate}.")
        if sampling_rate != self.sampling_rate:
            raise ValueError(
                f"`sampling_rate` is {sampling_rate}, but the encoder hears {self.sampling_rate}: resample the audio."
            )
        if chunk_audio and self.max_samples is None:
            raise ValueError("`chunk_audio` has no effect on an encoder that hears any length: leave it out.")
        single = np.ndim(audio) == 1 if isinstance(audio, np.ndarray) else np.ndim(audio[0]) == 0
        recordings = [audio] if single else list(audio)
        for number, each in enumerate(recordings):
            check_input(f"audio[{number}]", each, RECORDING)
            samples = np.shape(each)[0]
            if self.max_samples is not None and samples > self.max_samples and not chunk_audio:
                raise ValueError(
                    f"`audio[{number}]` has {samples / self.sampling_rate:g} s, but the encoder hears "
                    f"{self.max_samples / self.sampling_rate:g} s at once: cut it, or pass chunk_audio=True."
                )
            if self.num_audio_tokens(samples) < 1:
                raise ValueError(f"`audio[{number}]` has {samples} samples, too few for a token: give more.")
        return [np.asarray(each, np.float32) for each in recordings]

    def padded_samples(self, seconds: float) -> int:
        """Samples that recordings of up to so many seconds are padded to; some encoders hear as many always."""
        return round(seconds * self.sampling_rate) if self.max_samples is None else self.max_samples

    def audio_inputs(
        self, recordings: Sequence[Float32[np.ndarray, "_"]], samples: int | None = None
    ) -> dict[str, np.ndarray]:
        """What the feature extractor makes of recordings, of long ones window by window.

        Args:
            recordings: at the encoder's sampling rate.
            samples: that all are padded to; those of the longest, or of what the encoder hears at once, if None.
        """
        size = self.max_samples
        if size is not None:
            recordings = [each[start : start + size] for each in recordings for start in range(0, len(each), size)]
        length = size if samples is None else samples
        padding: dict[str, Any] = {"padding": True}
        if length is not None:
            padding = {"padding": "max_length", "max_length": length, "truncation": False}
        if "return_attention_mask" in inspect.signature(self.feature_extractor.__call__).parameters:
            padding["return_attention_mask"] = True
        made = self.feature_extractor(
            list(recordings), sampling_rate=self.sampling_rate, return_tensors="np", **padding
        )
        name = self.feature_extractor.model_input_names[0]
        inputs = {name: np.asarray(made[name], np.float32)}
        if not self.whole_windows:
            mask = made["attention_mask"] if "attention_mask" in made else made["padding_mask"]
            inputs["audio_attention_mask"] = np.asarray(mask, np.int32)
        return inputs

    def batch_decode(
        self, sequences: FlaxModelOutput | Sequence[Any] | Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """The text of each row.

        Args:
            sequences: ids ``(batch, tokens)``, a list of rows, or what ``generate`` returned.
            skip_special_tokens: leave out those, of which the audio token is one.
            **kwargs: for the tokenizer's ``decode``.
        """
        if isinstance(sequences, FlaxModelOutput):
            sequences = sequences["sequences"]
        rows = [[token for token in np.asarray(row).tolist() if token < len(self.tokenizer)] for row in sequences]
        return [self.tokenizer.decode(row, skip_special_tokens=skip_special_tokens, **kwargs) for row in rows]
