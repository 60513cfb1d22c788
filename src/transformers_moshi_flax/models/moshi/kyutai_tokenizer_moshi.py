"""The text tokenizer of Kyutai's files, a SentencePiece model, as a tokenizer of ``transformers``.

The file is read here, so that neither ``sentencepiece`` nor ``protobuf`` needs to be installed.
"""

from __future__ import annotations

import struct
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

# Fields of sentencepiece_model.proto, and their defaults
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _BYTE_FALLBACK = 3, 35
_SPECIAL_IDS = {"unk_token": (40, 0), "bos_token": (41, 1), "eos_token": (42, 2), "pad_token": (43, -1)}
_CHARSMAP, _DUMMY_PREFIX, _EXTRA_WHITESPACES = 2, 3, 4
_NORMAL, _CONTROL, _USER_DEFINED, _UNIGRAM = 1, 3, 4, 1
_SPACE = "▁"

_Message = dict[int, list[int | bytes]]


def sentencepiece_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """A tokenizer with the ids of a SentencePiece model.

    Raises:
        ValueError: the file is no such model, or its algorithm is not that of Moshi's (unigram).
        OSError: it cannot be read.
    """
    try:
        model = _message(path.read_bytes())
        pieces = [_message(piece) for piece in model[_PIECES]]
        texts = [piece[_TEXT][0].decode() for piece in pieces]
        scores = [struct.unpack("<f", piece[_SCORE][0])[0] if _SCORE in piece else 0.0 for piece in pieces]
        types = [_last(piece, _TYPE, _NORMAL) for piece in pieces]
        trainer, normalizer = (_message(_last(model, field, b"")) for field in (_TRAINER, _NORMALIZER))
        ids = {name: _signed(_last(trainer, *field)) for name, field in _SPECIAL_IDS.items()}
        special = {name: texts[number] for name, number in ids.items() if number >= 0}
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, struct.error) as error:
        raise ValueError(f"{str(path)!r} is no SentencePiece model; download it again") from error
    if _last(trainer, _MODEL_TYPE, _UNIGRAM) != _UNIGRAM:
        raise ValueError(f"{str(path)!r} is a SentencePiece model of another algorithm than unigram, Moshi's")

    byte_fallback = bool(_last(trainer, _BYTE_FALLBACK, 0))
    dummy_prefix = bool(_last(normalizer, _DUMMY_PREFIX, 1))
    charsmap = _last(normalizer, _CHARSMAP, b"")
    tokenizer = Tokenizer(Unigram(list(zip(texts, scores)), unk_id=ids["unk_token"], byte_fallback=byte_fallback))
    steps = [normalizers.Precompiled(charsmap)] if charsmap else []
    if _last(normalizer, _EXTRA_WHITESPACES, 1):
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(_SPACE)] if dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    words = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*words, decoders.Strip(" ", 1, 0)] if dummy_prefix else words)
    tokenizer.add_tokens(
        [
            AddedToken(text, normalized=False, special=kind == _CONTROL)
            for text, kind in zip(texts, types)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def _last(message: _Message, field: int, default: int | bytes) -> int | bytes:
    return message.get(field, [default])[-1]


def _signed(number: int) -> int:
    """A negative number is written as its complement in 64 bits."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _message(data: bytes) -> _Message:
    """The fields of a message in protobuf's wire format; what is not a whole number stays bytes."""
    fields: _Message = {}
    position = 0

    def varint() -> int:
        nonlocal position
        number = shift = 0
        while True:
            byte = data[position]
            position += 1
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number

    while position < len(data):
        field, kind = divmod(varint(), 8)
        if kind == 0:
            value: int | bytes = varint()
        else:
            size = {1: 8, 5: 4}[kind] if kind != 2 else varint()
            value = data[position : position + size]
            position += size
            if len(value) < size:
                raise ValueError("the message ends early")
        fields.setdefault(field, []).append(value)
    return fields
