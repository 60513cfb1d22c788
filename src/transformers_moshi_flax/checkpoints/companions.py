"""What lies beside the weights of a checkpoint: tokenizer, feature extractor, generation config."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers.utils import logging

from .files import Source

logger = logging.get_logger(__name__)

COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
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
    """Copy those files of a checkpoint that it has; what it may have, where the Hub cannot be asked, is told."""
    for name in COMPANIONS:
        found = source.find(name)
        if found is not None:
            shutil.copyfile(found, folder / name)
    if unseen := [name for name in COMPANIONS if source.absence(name)]:
        logger.warning(f"not copied, if there are such: {', '.join(unseen)}; {source.absence(*unseen)}")


def sentencepiece_model(source: Source) -> Path | None:
    """The SentencePiece model of a checkpoint, if it has one."""
    return next(filter(None, map(source.find, SENTENCEPIECE)), None)
