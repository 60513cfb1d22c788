"""``moshi-flax complete`` with a tiny language model: what it prints, and what its options do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models.llama.pairs import tiny_pair
from transformers_moshi_flax import FlaxLlamaForCausalLM
from transformers_moshi_flax.cli import checkpoints
from transformers_moshi_flax.cli.complete import Writer

GREEDY = ("--max-new-tokens", 5, "--temperature", 0)
PROMPT = "w7 w3 w9"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words are w0, w1, …; the model never ends."""
    folder = tmp_path_factory.mktemp("language-model")
    tiny_pair("llama", folder, num_hidden_layers=1)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(99)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_model(model: Path) -> None:
    """Load it once: its compiled programs then serve every test of this file."""
    loaded = Writer.load(str(model), None)
    real = Writer.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "load", lambda source, dtype: loaded if source == str(model) else real(source, dtype))
        yield


@pytest.mark.parametrize("more", [(), ("--no-cache",)], ids=["cache", "no cache"])
def test_greedy_words(moshi_flax, model: Path, more: tuple):
    result = moshi_flax("complete", "--model", model, "--prompt", PROMPT, *GREEDY, *more)
    assert result.code == 0, result.err
    ids = FlaxLlamaForCausalLM.from_pretrained(model).generate(np.array([[7, 3, 9]]), max_new_tokens=5).sequences
    assert result.out.split() == [f"w{number}" for number in ids[0, 3:]]
    assert "5 tokens, " in result.err and f"tokens/s {'without' if more else 'with'} the cache" in result.err


def test_the_seed_decides_what_is_drawn(moshi_flax, model: Path):
    drawn = [
        moshi_flax(
            *("complete", "--model", model, "--prompt", PROMPT, "--max-new-tokens", 5, "--temperature", 1.5),
            *("--top-k", 50, "--seed", seed),
        ).out
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0].split()) == 5


def test_line_by_line(moshi_flax, model: Path, monkeypatch: pytest.MonkeyPatch):
    typed = iter([PROMPT, "", PROMPT, "quit"])
    monkeypatch.setattr("builtins.input", lambda: next(typed))
    result = moshi_flax("complete", "--model", model, "--interactive", *GREEDY)
    assert result.code == 0, result.err
    first, second = np.array_split(result.out.split(), 2)
    assert len(first) == 5 and list(first) == list(second)
    assert result.err.count("tokens/s") == 2


def test_an_end_ends_it(moshi_flax, model: Path, monkeypatch: pytest.MonkeyPatch):
    """With and without the cache."""
    writer = Writer.load(str(model), None)
    ids = np.asarray(writer.model.generate(np.array([[7, 3, 9]]), max_new_tokens=5).sequences)[0, 3:]
    monkeypatch.setattr(writer.model.generation_config, "eos_token_id", int(ids[2]))
    expected = list(ids[: list(ids).index(ids[2]) + 1])
    for more in ((), ("--no-cache",)):
        result = moshi_flax("complete", "--model", model, "--prompt", PROMPT, *GREEDY, *more)
        assert result.out.split() == [f"w{number}" for number in expected]


def test_moshis_backbone(moshi_flax):
    """Without a model, the embedded one: its text alone, behind its start token."""
    result = moshi_flax("complete", "--prompt", "Hello", *GREEDY)
    assert result.code == 0, result.err
    assert checkpoints.NOTICE in result.err and "5 tokens" in result.err


@pytest.mark.parametrize(
    "options, message",
    [
        ((), "--prompt, --interactive: give one of them"),
        (("--prompt", "a", "--interactive"), "--prompt, --interactive: give one of them"),
        (("--prompt", ""), "--prompt: '' has no tokens; give some words"),
        (("--prompt", "w1", "--temperature", "inf"), "--temperature: inf is no temperature"),
        (("--prompt", "w1", "--temperature", 0, "--top-k", 3), "--top-k: no effect with --temperature 0"),
    ],
)
def test_mistakes(moshi_flax, model: Path, options: tuple, message: str):
    result = moshi_flax("complete", "--model", model, *options)
    assert result.code == 2 and message in result.err


def test_what_is_no_language_model(moshi_flax, layouts: dict[str, Path], model: Path, tmp_path: Path):
    result = moshi_flax("complete", "--model", layouts["flax"], "--prompt", "a")
    assert result.code == 2 and "'mimi' checkpoint; give a language model (gemma2, " in result.err
    FlaxLlamaForCausalLM.from_pretrained(model).save_pretrained(tmp_path)
    result = moshi_flax("complete", "--model", tmp_path, "--prompt", "a")
    assert result.code == 2 and "has no tokenizer that can be read" in result.err
