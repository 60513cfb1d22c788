"""What the example of a language model is made from, and its configuration."""

from __future__ import annotations

from examples.language_model.make import ROOT, make_tokenizer, sections, small_config

from transformers_moshi_flax.training.configuration import load_configuration
from transformers_moshi_flax.training.text.configuration import TextTrainingConfig


def test_sections_are_the_pages() -> None:
    """Comments in code are no headings."""
    texts = [text for text in sections() if text]
    assert len(texts) > 100 and sum(map(len, texts)) > 150_000
    page = (ROOT / "docs" / "language_models.md").read_text("utf-8")
    begun = [text for text in texts if page.startswith(text)]
    assert len(begun) == 1 and begun[0].startswith("# Language models")
    assert not any(text.startswith("# What the small language model") for text in texts)


def test_the_tokenizer_knows_every_text() -> None:
    texts = ["the cat sat", "the mat, the hat", "naïve"]
    tokenizer = make_tokenizer(texts, pieces=270)
    for text in (*texts, "日本"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    config = small_config(tokenizer)
    assert config.vocab_size == len(tokenizer) and config.eos_token_id == tokenizer.eos_token_id


def test_the_configuration_is_one() -> None:
    config = load_configuration(ROOT / "examples" / "language_model" / "train.yaml")
    assert isinstance(config, TextTrainingConfig) and config.data.evaluation_share == 0.1
