"""What the small language model of this folder is trained from: a text, a tokenizer, a configuration.

The text are the pages of this repository (``README.md``, ``CONTRIBUTING.md``, ``CHANGELOG.md``, ``docs/``), under its
licence, Apache 2.0: a text for each section. The tokenizer has 1024 pieces of bytes that are frequent in it. Nothing
is downloaded. ::

    python examples/language_model/make.py outputs/language_model
    moshi-flax train examples/language_model/train.yaml
    moshi-flax complete --model outputs/language_model/run/export --prompt "The model" --temperature 0.7

It also prints what the weights say that are drawn for the training, before anything is learned.

Needs ``pip install "transformers-moshi-flax[train]"``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from transformers_moshi_flax import FlaxLlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md")
END = "<|endoftext|>"
PROMPT = "The model"


def sections() -> Iterator[str]:
    """Those of all pages: from a heading, or the beginning, to the next one."""
    for path in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        lines: list[str] = []
        is_code = False
        for line in path.read_text("utf-8").splitlines():
            is_code ^= line.lstrip().startswith("```")
            if line.startswith("#") and not is_code and lines:
                yield "\n".join(lines).strip()
                lines = []
            lines.append(line)
        yield "\n".join(lines).strip()


def make_tokenizer(texts: list[str], pieces: int = 1024) -> PreTrainedTokenizerFast:
    """Byte pairs, so that no text is unknown to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def small_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """A Llama of 0.9 million parameters."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def main(directory: Path) -> None:
    texts = [text for text in sections() if text]
    tokenizer = make_tokenizer(texts)
    config = small_config(tokenizer)
    (directory / "model").mkdir(parents=True)
    config.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    with open(directory / "text.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    print(f"{len(texts)} texts, {sum(map(len, texts))} characters")
    model = FlaxLlamaForCausalLM(config, seed=0)
    print(f"{model.num_parameters()} parameters, which say before training:\n")
    ids = np.array([tokenizer.encode(PROMPT)], np.int32)
    said = model.generate(ids, max_new_tokens=40, do_sample=True, prng_key=jax.random.key(0)).sequences
    print(tokenizer.decode(np.asarray(said)[0]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/language_model/make.py DIRECTORY")
    main(Path(sys.argv[1]))
