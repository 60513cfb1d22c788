"""The text of a dialogue, piece by piece, as it is sent."""

from __future__ import annotations

import codecs
import re
from typing import Any

from ..models.moshi.kyutai_config_flax_moshi import TEXT_END_OF_PAD, TEXT_PAD

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""A piece of SentencePiece that is one byte of a character."""


class Words:
    """Turns text ids into what a reader appends.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._silent = {TEXT_PAD, TEXT_END_OF_PAD, *tokenizer.all_special_ids}
        self._known = len(tokenizer)
        self._bytes = codecs.getincrementaldecoder("utf-8")("ignore")

    def put(self, text_id: int) -> str:
        """What a frame's id adds to the text: nothing for padding, and while a character lacks bytes."""
        if text_id in self._silent or not 0 <= text_id < self._known:
            return ""
        piece = self._tokenizer.convert_ids_to_tokens(text_id)
        byte = _BYTE.fullmatch(piece)
        if byte:
            return self._bytes.decode(bytes([int(byte[1], 16)]))
        # a character that was left incomplete is none
        self._bytes.reset()
        return piece.replace("▁", " ")
