"""The text tokenizer of Kyutai's files, a SentencePiece model, as ``transformers`` converts it for Moshi."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

_UNIGRAM = 1
"""``TrainerSpec.ModelType`` of sentencepiece_model.proto."""


def sentencepiece_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """What upstream's ``MoshiConverter`` makes of a SentencePiece model, with its special tokens.

    Its ids are those of SentencePiece, but that runs of spaces stay.

    Raises:
        ValueError: the file is no such model, its algorithm is not that of Moshi's (unigram), or protobuf is missing.
        OSError: it cannot be read.
    """
    from transformers.convert_slow_tokenizer import MoshiConverter  # only here: half a second

    try:
        converter = MoshiConverter(str(path))
    except ImportError as error:
        raise ValueError(f"{str(path)!r} is read by protobuf, which is not installed: pip install protobuf") from error
    except OSError:
        raise
    except Exception as error:  # of protobuf, which need not be there to be named
        raise ValueError(f"{str(path)!r} is no SentencePiece model; download it again") from error
    trainer, pieces = converter.proto.trainer_spec, [piece.piece for piece in converter.proto.pieces]
    if trainer.model_type != _UNIGRAM:
        raise ValueError(f"{str(path)!r} is a SentencePiece model of another algorithm than unigram, Moshi's")
    ids = {name: getattr(trainer, f"{name}_id") for name in ("unk", "bos", "eos", "pad")}
    if not 0 <= ids["unk"] < len(pieces):
        raise ValueError(f"{str(path)!r} is no SentencePiece model; download it again")
    special = {f"{name}_token": pieces[number] for name, number in ids.items() if 0 <= number < len(pieces)}
    return PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(), clean_up_tokenization_spaces=False, **special
    )
