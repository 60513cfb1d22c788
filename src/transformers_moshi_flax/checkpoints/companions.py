"""What lies beside the weights of a checkpoint: tokenizer, feature extractor, generation config."""

from __future__ import annotations

import shutil
from pathlib import Path

from .files import Source

COMPANIONS = (
    "added_tokens.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
"""Files that a checkpoint may have; one without some of them is whole all the same."""

SENTENCEPIECE = ("tokenizer_spm_32k_3.model", "tokenizer.model")
"""Names that Kyutai and others give to the model of the tokenizer."""


def copy_companions(source: Source, folder: Path) -> None:
    """Copy those files of a checkpoint that it has."""
    for name in COMPANIONS:
        found = source.find(name)
        if found is not None:
            shutil.copyfile(found, folder / name)


def sentencepiece_model(source: Source) -> Path | None:
    """The SentencePiece model of a checkpoint, if it has one."""
    return next(filter(None, map(source.find, SENTENCEPIECE)), None)
