"""What is refused of SentencePiece models; that ids are theirs is in ``tests/cli/test_kyutai.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer
from transformers.utils import import_utils

from transformers_moshi_flax.models.moshi.kyutai_tokenizer_moshi import sentencepiece_tokenizer


@pytest.mark.parametrize("content", [b"", b"\x0a\xff", b"\x80" * 30, b"version https://git-lfs"])
def test_damaged_tokenizers_are_refused(tmp_path: Path, content: bytes):
    (tmp_path / "spm.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"spm.model' is no SentencePiece model; download it again"):
        sentencepiece_tokenizer(tmp_path / "spm.model")


def test_tokenizers_of_another_algorithm_are_refused(tmp_path: Path):
    SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world"] * 9),
        model_prefix=str(tmp_path / "spm"),
        model_type="char",
        vocab_size=12,
        hard_vocab_limit=False,
        minloglevel=9,
    )
    with pytest.raises(ValueError, match="another algorithm than unigram"):
        sentencepiece_tokenizer(tmp_path / "spm.model")


def test_what_reads_them_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "spm.model").touch()
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "protobuf", (lambda: False, "{0} needs protobuf"))
    with pytest.raises(ValueError, match=r"spm.model' is read by protobuf.*pip install protobuf"):
        sentencepiece_tokenizer(tmp_path / "spm.model")
