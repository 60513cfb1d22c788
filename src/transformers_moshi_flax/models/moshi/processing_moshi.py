"""Text and two voices in, aligned model inputs out; and back from what ``generate`` returns. Upstream has none."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
from collections.abc import Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int
from transformers import BatchFeature, EncodecFeatureExtractor, MimiConfig, PreTrainedTokenizerBase

from ...checkpoints.configs import load_config
from ...checkpoints.files import CheckpointNotFoundError, Source
from ...checkpoints.recognising import foreign, is_foreign_config
from ...input_checks import AnyArray, Input, check_input, is_whole
from ...modeling_flax_outputs import FlaxModelOutput
from ...processing_flax_utils import FlaxProcessorMixin, known_keywords
from ..mimi.topology import samples_per_frame
from .kyutai_flax_moshi import TOKENIZER_NAME, find_kyutai_files, kyutai_config
from .kyutai_tokenizer_moshi import sentencepiece_tokenizer

Waveform = ArrayLike | Sequence[float]
Ids = AnyArray | Sequence[int]

T = TypeVar("T")

VOICE = Input({"samples": None}, "audio", hint="mono, a row each; mix channels down and pass a batch as a list")
"""One item of audio."""

_HUB = ("cache_dir", "force_download", "token", "local_files_only", "revision", "subfolder")


_OF_PARTS = (
    *inspect.signature(EncodecFeatureExtractor.__init__).parameters,
    *inspect.signature(PreTrainedTokenizerBase.__init__).parameters,
    *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES,
    *("use_fast", "from_slow", "legacy", "add_prefix_space", "add_bos_token", "add_eos_token", "padding_side"),
    *("truncation_side", "model_max_length", "clean_up_tokenization_spaces", "split_special_tokens"),
    *("extra_special_tokens", "additional_special_tokens", "chat_template", "tokenizer_type", "return_attention_mask"),
)
"""What feature extractor and tokenizers take."""


class MoshiProcessor(FlaxProcessorMixin):
    """A feature extractor and a tokenizer, and how words and samples are laid on frames.

    Args:
        feature_extractor: mono; its ``sampling_rate`` is the one that audio must have.
        tokenizer: of Moshi's text stream.
        frame_size: samples a frame. :meth:`from_pretrained` takes it from ``config.json`` if the processor's own
            configuration does not tell.
        pad_token_id: id of the frames without a new word piece.
        end_of_pad_token_id: id of the frame before a new word.

    Raises:
        ValueError: the feature extractor is not mono, ``frame_size`` is not positive, or the tokenizer has no such id.
    """

    options = ("frame_size", "pad_token_id", "end_of_pad_token_id")

    def __init__(
        self,
        feature_extractor: EncodecFeatureExtractor,
        tokenizer: PreTrainedTokenizerBase,
        frame_size: int = 1920,
        pad_token_id: int = 3,
        end_of_pad_token_id: int = 0,
    ):
        if feature_extractor.feature_size != 1:
            raise ValueError(
                f"`feature_extractor` has feature_size={feature_extractor.feature_size}, but Moshi's audio is mono: "
                "give one with feature_size=1"
            )
        if not is_whole(frame_size) or frame_size < 1:
            raise ValueError(f"`frame_size` must be a positive integer, got {frame_size!r}")
        for name, token in (("pad_token_id", pad_token_id), ("end_of_pad_token_id", end_of_pad_token_id)):
            if not is_whole(token) or not 0 <= token < len(tokenizer):
                raise ValueError(f"`{name}`={token!r} is no id of the tokenizer, which has {len(tokenizer)}")
        super().__init__(feature_extractor, tokenizer)
        self.frame_size = frame_size
        self.pad_token_id = pad_token_id
        self.end_of_pad_token_id = end_of_pad_token_id

    @property
    def sampling_rate(self) -> int:
        """Samples a second."""
        return self.feature_extractor.sampling_rate

    @property
    def model_input_names(self) -> list[str]:
        """The keys of what a call returns."""
        return ["input_ids", "user_input_values", "moshi_input_values", "attention_mask"]

    def __call__(
        self,
        text: str | Sequence[str | None] | None = None,
        user_audio: Waveform | Sequence[Waveform | None] | None = None,
        moshi_audio: Waveform | Sequence[Waveform | None] | None = None,
        sampling_rate: int | None = None,
        input_ids: Ids | Sequence[Ids | None] | None = None,
        padding_side: str = "left",
        return_tensors: str = "np",
    ) -> BatchFeature:
        """The three streams of a batch of prompts, aligned frame by frame.

        Each of the streams is one item or a list of one item a row. A single item serves all rows; what is missing
        (the argument, or None in its list) is silence, or text padding. A row has the frames of the longest of its
        streams: audio is followed by silence, ``input_ids`` by padding, and ``text`` stands at the end, one piece a
        frame in the last frames. Rows are then padded to the longest one, with 0 in the attention mask.

        The mask hides padding from the backbone, and the models encode every row from its own start: a row has the
        same codes as alone, on whichever side the padding is. Text without audio means that both are silent.

        Args:
            text: what Moshi says at the end of the prompt.
            user_audio, moshi_audio: mono waveforms, each ``(samples,)``, floats in [-1, 1].
            sampling_rate: of the audio, in Hz; there must be one if there is audio.
            input_ids: instead of ``text``, an id for each frame from the first on, ``(frames,)`` a row.
            padding_side: ``"left"``, as ``generate`` needs it, or ``"right"``.
            return_tensors: ``"np"`` or ``"jax"``.

        Returns:
            ``input_ids`` ``(batch, frames)`` int32, ``user_input_values`` and ``moshi_input_values``
            ``(batch, 1, frames * frame_size)`` float32, ``attention_mask`` ``(batch, frames)`` int32.

        Raises:
            ValueError: another or no sampling rate, audio that is not mono, empty, not finite or not of floats, rows
                without anything, batches of different size, text with characters unknown to the tokenizer.
        """
        if padding_side not in ("left", "right"):
            raise ValueError(f'`padding_side` must be "left" or "right", got {padding_side!r}')
        if return_tensors not in ("np", "jax"):
            raise ValueError(f'`return_tensors` must be "np" or "jax", got {return_tensors!r}')
        if text is not None and input_ids is not None:
            raise ValueError("`text` and `input_ids` are both the text stream: pass one of them")
        if sampling_rate is None and (user_audio is not None or moshi_audio is not None):
            raise ValueError(f"`sampling_rate` is missing: pass that of the audio, which must be {self.sampling_rate}")
        if sampling_rate not in (None, self.sampling_rate):
            raise ValueError(
                f"`sampling_rate` is {sampling_rate}, but Moshi hears {self.sampling_rate}: resample the audio"
            )

        streams = {
            "text": [text] if text is None or isinstance(text, str) else list(text),
            "input_ids": [*np.asarray(input_ids)] if getattr(input_ids, "ndim", 1) == 2 else _items(input_ids),
            "user_audio": _items(user_audio),
            "moshi_audio": _items(moshi_audio),
        }
        batch_size = _batch_size(streams)
        texts = [self._pieces(item) for item in streams["text"]]
        aligned = [self._aligned_ids(item) for item in streams["input_ids"]]
        users, moshis = (
            [self._samples(f"{name}[{row}]", item) for row, item in enumerate(streams[name])]
            for name in ("user_audio", "moshi_audio")
        )

        # from here on, a stream of one item serves all rows
        texts, aligned = _for_rows(texts, batch_size), _for_rows(aligned, batch_size)
        users, moshis = _for_rows(users, batch_size), _for_rows(moshis, batch_size)
        lengths = [
            max(len(pieces), len(ids), math.ceil(max(len(user), len(moshi)) / self.frame_size))
            for pieces, ids, user, moshi in zip(texts, aligned, users, moshis)
        ]
        if 0 in lengths:
            raise ValueError(f"row {lengths.index(0)} has neither text nor audio: give it a stream or leave it out")

        frames = max(lengths)
        inputs = {
            "input_ids": np.full((batch_size, frames), self.pad_token_id, np.int32),
            "user_input_values": np.zeros((batch_size, 1, frames * self.frame_size), np.float32),
            "moshi_input_values": np.zeros((batch_size, 1, frames * self.frame_size), np.float32),
            "attention_mask": np.zeros((batch_size, frames), np.int32),
        }
        for row, length in enumerate(lengths):
            start = frames - length if padding_side == "left" else 0
            end, sample = start + length, start * self.frame_size
            inputs["input_ids"][row, start : start + len(aligned[row])] = aligned[row]
            inputs["input_ids"][row, end - len(texts[row]) : end] = texts[row]
            inputs["user_input_values"][row, 0, sample : sample + len(users[row])] = users[row]
            inputs["moshi_input_values"][row, 0, sample : sample + len(moshis[row])] = moshis[row]
            inputs["attention_mask"][row, start:end] = 1
        if return_tensors == "jax":
            return BatchFeature({name: jnp.asarray(array) for name, array in inputs.items()})
        return BatchFeature(inputs)

    def decode(self, token_ids: Ids, skip_special_tokens: bool = True, **kwargs: Any) -> str:
        """The words in one row of text ids.

        Args:
            token_ids: ``(frames,)``. Padding, end-of-padding and what is no piece (the start id) are left out.
            skip_special_tokens: leave out the tokenizer's special tokens too.
            **kwargs: for the tokenizer's ``decode``.

        Raises:
            ValueError: ``token_ids`` is not one row.
        """
        ids = np.asarray(token_ids)
        if ids.ndim != 1:
            raise ValueError(
                f"`token_ids` must have the shape (frames,), got {ids.shape}: use `batch_decode` for more"
            )
        fill = (self.pad_token_id, self.end_of_pad_token_id)
        pieces = [int(token) for token in ids if 0 <= token < len(self.tokenizer) and token not in fill]
        return self.tokenizer.decode(pieces, skip_special_tokens=skip_special_tokens, **kwargs)

    def batch_decode(
        self, sequences: FlaxModelOutput | AnyArray | Sequence[Ids], skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """The words of each row, as :meth:`decode`.

        Args:
            sequences: text ids ``(batch, frames)`` or a list of rows, or what ``generate`` returned: then the words of
                prompt and reply, up to each row's end.
            skip_special_tokens, **kwargs: as in :meth:`decode`.
        """
        if isinstance(sequences, FlaxModelOutput):
            rows, lengths = np.asarray(sequences["sequences"]), sequences.get("sequence_lengths")
            sequences = rows if lengths is None else [row[:end] for row, end in zip(rows, np.asarray(lengths))]
        return [self.decode(row, skip_special_tokens=skip_special_tokens, **kwargs) for row in sequences]

    def decode_audio(self, outputs: FlaxModelOutput) -> list[Float[np.ndarray, "samples"]]:
        """Moshi's voice in each row of what ``generate`` returned, prompt included, cut at the row's end.

        Rows that were padded begin with as much silence.

        Raises:
            ValueError: the outputs have no waveforms.
        """
        if "audio_sequences" not in outputs:
            raise ValueError("`outputs` have no audio_sequences: generate with return_audio_waveforms=True")
        ends = np.asarray(outputs["audio_lengths"]) * self.frame_size
        return [row[0, :end] for row, end in zip(np.asarray(outputs["audio_sequences"], np.float32), ends)]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> MoshiProcessor:
        """The processor of a checkpoint, be it saved with :meth:`save_pretrained` or upstream's tokenizer and
        ``preprocessor_config.json`` alone.

        Args:
            pretrained_model_name_or_path: a directory or a Hub id.
            **kwargs: ``revision``, ``subfolder``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``;
                arguments of the class, of the feature extractor and of tokenizers, which come before the
                checkpoint's. Keywords that ask for nothing here are taken as by a model's ``from_pretrained``.

        Raises:
            OSError: the checkpoint or its feature extractor is not there.
            ValueError: the tokenizer is not there, an option is bad or unknown, or the sampling rate or the frame size
                of the files is not that of the Mimi in ``config.json`` beside them.
        """
        name = os.fspath(pretrained_model_name_or_path)
        kwargs = known_keywords(f"{cls.__name__}.from_pretrained", kwargs, {*_HUB, *cls.options, *_OF_PARTS})
        try:
            processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (OSError, ValueError) as error:
            if known := _why_none(Source.locate(name, **{key: kwargs[key] for key in _HUB if key in kwargs})):
                raise CheckpointNotFoundError(f"{name!r} gives no processor: {known}") from error
            if isinstance(error, OSError):
                raise
            # upstream's message about a missing tokenizer does not tell where it was looked for
            raise ValueError(f"{name!r} gives no processor: {error}") from error
        codec = None
        with contextlib.suppress(ValueError):  # of another model, which the processor did not need
            codec = _codec_beside(pretrained_model_name_or_path, kwargs)
        if codec is not None:
            processor._check_codec(os.fspath(pretrained_model_name_or_path), codec, kwargs.get("frame_size"))
        return processor

    def _check_codec(self, name: str, codec: MimiConfig, frame_size: int | None) -> None:
        """Raises ``ValueError`` if the Mimi of a checkpoint hears other audio than this processor makes.

        ``frame_size`` is what the caller insists on.
        """
        found = {"sampling rate": self.sampling_rate, "frame size": self.frame_size}
        wanted = {"sampling rate": codec.sampling_rate, "frame size": frame_size or samples_per_frame(codec)}
        for what, value in wanted.items():
            if found[what] != value:
                raise ValueError(
                    f"{name!r} has a processor with the {what} {found[what]}, but the Mimi in its config.json has "
                    f"{value}: give preprocessor_config.json or processor_config.json the value of the Mimi"
                )

    @classmethod
    def from_kyutai(cls, name_or_path: str | os.PathLike, **hub: Any) -> MoshiProcessor:
        """The processor of a checkpoint in Kyutai's format: of its tokenizer, and of what its Mimi hears.

        Args:
            name_or_path: a directory or a Hub id.
            **hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

        Raises:
            CheckpointNotFoundError: (an ``OSError`` and a ``ValueError``) the checkpoint or its tokenizer is missing.
            ValueError: the tokenizer is damaged or of another kind, or Mimi cannot be expressed.
        """
        hub = known_keywords(f"{cls.__name__}.from_kyutai", hub, {*_HUB} - {"subfolder"})
        files = find_kyutai_files(name_or_path, **hub)
        if files.tokenizer is None:
            raise CheckpointNotFoundError(
                f"{files.name!r} has no tokenizer: add {TOKENIZER_NAME}, or set tokenizer_name in config.json"
            )
        mimi = kyutai_config(files).audio_encoder_config
        extractor = EncodecFeatureExtractor(feature_size=1, sampling_rate=mimi.sampling_rate)
        return cls(extractor, sentencepiece_tokenizer(files.tokenizer), frame_size=samples_per_frame(mimi))

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The processor's options in a checkpoint; the frame size is that of its Mimi if they do not tell it."""
        options, rest = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "frame_size" not in options:
            codec = _codec_beside(pretrained_model_name_or_path, kwargs)
            if codec is not None:
                options["frame_size"] = samples_per_frame(codec)
        return options, rest

    def _pieces(self, text: str | None) -> list[int]:
        if not text:
            return []
        pieces = self.tokenizer.encode(text, add_special_tokens=False)
        if self.end_of_pad_token_id in pieces:
            raise ValueError(f"`text`: {text!r} has characters that the tokenizer does not know; leave them out")
        return pieces

    def _aligned_ids(self, ids: Ids | None) -> Int[np.ndarray, "frames"]:
        if ids is None:
            return np.zeros(0, np.int32)
        ids = np.asarray(ids)
        size = len(self.tokenizer)
        check_input("input_ids", ids, Input({"frames": None}, "ids", size, allowed=(size,), hint="a row each"))
        return ids.astype(np.int32)

    def _samples(self, name: str, waveform: Waveform | None) -> Float[np.ndarray, "samples"]:
        if waveform is None:
            return np.zeros(0, np.float32)
        check_input(name, waveform, VOICE)
        waveform = np.asarray(waveform, np.float32)
        extracted = self.feature_extractor(waveform, sampling_rate=self.sampling_rate, padding=False)
        return extracted["input_values"][0][0]


def _why_none(source: Source) -> str | None:
    """Why a checkpoint may have no processor, if that is known: what it is, or that the Hub could not be asked."""
    names = ("processor_config.json", "preprocessor_config.json", "config.json")
    found = [name for name in names if source.find(name) is not None]
    if not found and (unseen := source.absence(*names)):
        return unseen
    values = source.read_json("config.json")
    known = foreign(source, values) if values is None or is_foreign_config(values) else None
    return f"it {known}" if known else None


def _codec_beside(name_or_path: str | os.PathLike, kwargs: dict[str, Any]) -> MimiConfig | None:
    """The configuration of the Mimi in a checkpoint; None if it has no ``config.json``."""
    source = Source.locate(name_or_path, **{name: kwargs[name] for name in _HUB if name in kwargs})
    if source.find("config.json") is None:
        return None
    return load_config(MimiConfig, source)


def _items(stream: Any) -> list[Any]:
    """A stream's items: those of a list of arrays, or the one that it is itself, as an array or a list of numbers."""
    batched = isinstance(stream, list | tuple) and any(item is None or np.ndim(item) for item in stream)
    return list(stream) if batched else [stream]


def _for_rows(items: list[T], batch_size: int) -> list[T]:
    return items * batch_size if len(items) == 1 else items


def _batch_size(streams: dict[str, list[Any]]) -> int:
    """The number of rows that the streams agree on, where one item goes with any number."""
    sizes = {name: len(items) for name, items in streams.items() if len(items) != 1}
    if len(set(sizes.values())) > 1 or 0 in sizes.values():
        raise ValueError(
            f"the streams differ in their number of items: {sizes}; give one item for all rows, or one each"
        )
    return max(sizes.values(), default=1)
