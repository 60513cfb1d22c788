"""The tables of the language models, and another size of the vocabulary, as upstream resizes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models.llama.pairs import tiny_pair
from tests.torch_oracle import assert_close
from transformers_moshi_flax import FlaxLlamaForCausalLM

IDS = np.array([[1, 2, 3, 98]], np.int32)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_another_vocabulary(model_type: str, tmp_path: Path) -> None:
    """With a head of its own, and tied to a table whose rows are scaled where they are looked up."""
    pair = tiny_pair(model_type, tmp_path / "pair")
    ours, theirs = pair.ours, pair.theirs
    given, logits = ours.config, np.asarray(ours(IDS).logits)
    for size, rounded in ((110, None), (111, 16)):
        table = ours.resize_token_embeddings(size, pad_to_multiple_of=rounded)
        with torch.no_grad():
            expected = theirs.resize_token_embeddings(size, pad_to_multiple_of=rounded)
        assert table.num_embeddings == expected.num_embeddings == ours.config.vocab_size == theirs.config.vocab_size
        assert ours.get_output_embeddings().weight.shape == theirs.get_output_embeddings().weight.shape
        # new rows lie so close to the mean of the old ones that those of both sides are alike
        for own, other in ((table, expected), (ours.get_output_embeddings(), theirs.get_output_embeddings())):
            np.testing.assert_allclose(own.weight, other.weight.detach().numpy(), atol=2e-3)
    assert given.vocab_size == 99 and ours.config.vocab_size == 112
    assert_close(np.asarray(ours(IDS).logits)[..., :99], logits, 1e-6)
    with torch.no_grad():
        inputs = theirs.get_input_embeddings()(torch.tensor(IDS).long())
    assert_close(ours.get_input_embeddings()(IDS), inputs, 1e-6)
    ours.save_pretrained(tmp_path / "out", to_pt=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert_close(ours(IDS).logits, again(torch.tensor(IDS).long()).logits, 1e-5)
    assert FlaxLlamaForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 112
    # back again
    ours.resize_token_embeddings(99)
    assert_close(ours(IDS).logits, logits, 1e-6)


def test_tables_are_set(tmp_path: Path) -> None:
    """A tied head is the table of inputs, whichever is set."""
    model = tiny_pair("gemma3_text", tmp_path, num_hidden_layers=3).ours
    assert set(model.params) == {"model"}
    head = model.get_output_embeddings()
    model.set_output_embeddings(2 * head.weight)
    np.testing.assert_array_equal(model.get_input_embeddings().weight, 2 * head.weight)
    model.set_output_embeddings(head)
    np.testing.assert_array_equal(model.get_input_embeddings().weight, head.weight)
    with pytest.raises(ValueError, match="a part of a FlaxLlamaForCausalLM"):
        model.model.resize_token_embeddings(100)
    assert model.model.get_output_embeddings() is None
