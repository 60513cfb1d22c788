"""Asks a model all of a file's prompts, and tells how many answers are right, by prompt: see ``make.py``."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np

from transformers_moshi_flax import FlaxSpeechLanguageModel, SpeechLanguageProcessor
from transformers_moshi_flax.audio_files import read_mono
from transformers_moshi_flax.training.speech_text.examples import read_examples

ROWS = 32


def main(folder: str, path: str) -> None:
    model = FlaxSpeechLanguageModel.from_pretrained(folder)
    processor = SpeechLanguageProcessor.from_pretrained(folder)
    examples = read_examples(path, processor.audio_token).lines
    right, asked = Counter(), Counter()
    for start in range(0, len(examples), ROWS):
        batch = examples[start : start + ROWS]
        heard = [read_mono(each, processor.sampling_rate, 30.0) for example in batch for each in example.audio]
        inputs = processor([example.prompt for example in batch], heard, processor.sampling_rate)
        end = processor.tokenizer.eos_token_id
        outputs = model.generate(**inputs, max_new_tokens=5, eos_token_id=end, pad_token_id=end)
        new = np.asarray(outputs.sequences)[:, inputs["input_ids"].shape[1] :]
        for example, said in zip(batch, processor.batch_decode(new), strict=True):
            asked[example.prompt] += 1
            right[example.prompt] += said.strip() == example.answer
    for prompt, count in asked.items():
        print(f"{Path(path).name}: {prompt}: {right[prompt]} of {count} right ({right[prompt] / count:.1%})")


if __name__ == "__main__":
    main(*sys.argv[1:])
