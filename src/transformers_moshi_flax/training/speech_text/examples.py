"""Recordings, prompts and answers -> batches, endlessly and in the same order every time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from ...audio_files import read_mono
from ..data.loading import IGNORED, Batch, Loader
from ..text.packing import RowPlan


@dataclass(frozen=True)
class Example:
    """A line of the data.

    Attributes:
        audio: paths of the recordings.
        prompt: with the audio token for each of them.
        answer: what is learned.
    """

    audio: tuple[Path, ...]
    prompt: str
    answer: str


@dataclass(frozen=True)
class Examples:
    """All lines of a file."""

    lines: tuple[Example, ...]

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def fingerprint(self) -> str:
        """Changes with what the lines say, not with the recordings."""
        said = [(*map(str, example.audio), example.prompt, example.answer) for example in self.lines]
        return hashlib.sha256(repr(said).encode()).hexdigest()

    @property
    def most_recordings(self) -> int:
        """Of an example."""
        return max(len(example.audio) for example in self.lines)

    def parted(self, share: float, seed: int) -> tuple[Examples, Examples]:
        """Most of them, and a share of them (at least one) that is drawn by the seed; ValueError if there is one."""
        if len(self) < 2:
            raise ValueError(f"{share} of the examples are to be held out, but there is one only; give more")
        order = np.random.default_rng(seed).permutation(len(self))
        held = max(1, min(len(self) - 1, round(share * len(self))))
        parts = (sorted(order[held:].tolist()), sorted(order[:held].tolist()))
        kept, out = (Examples(tuple(self.lines[number] for number in numbers)) for numbers in parts)
        return kept, out


def read_examples(path: str | Path, audio_token: str) -> Examples:
    """The examples of a file of JSON lines; see ``SpeechTextDataConfig``.

    Raises:
        ValueError: the file is not there or is no JSON, a line lacks something, a recording is not there, or the
            prompt does not have as many audio tokens as there are recordings.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is no file; give JSON lines with audio, prompt and answer")
    lines = []
    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{str(path)!r}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: no JSON ({error})") from error
        lines.append(_example(record, where, path.parent, audio_token))
    if not lines:
        raise ValueError(f"{str(path)!r} has no lines")
    return Examples(tuple(lines))


def _example(record: Any, where: str, folder: Path, audio_token: str) -> Example:
    fields = record if isinstance(record, dict) else {}
    audio, prompt, answer = (fields.get(name) for name in ("audio", "prompt", "answer"))
    audio = [audio] if isinstance(audio, str) else audio
    if not isinstance(audio, list) or not all(isinstance(each, str) for each in audio) or not audio:
        raise ValueError(f"{where}: `audio` must be a path or a list of paths, but is {audio!r:.80}")
    if not isinstance(prompt, str) or not isinstance(answer, str) or not answer:
        raise ValueError(f"{where}: `prompt` and `answer` must be texts; write them")
    if prompt.count(audio_token) != len(audio):
        raise ValueError(
            f"{where}: `prompt` has {prompt.count(audio_token)} {audio_token!r}, but there are {len(audio)} "
            "recordings: one each"
        )
    paths = tuple(folder / each for each in audio)
    for each in paths:
        if not each.is_file():
            raise ValueError(f"{where}: {str(each)!r} is no file; paths are relative to the JSON lines")
    return Example(paths, prompt, answer)


def recordings_of(example: Example, sampling_rate: int, max_seconds: float) -> list[Float32[np.ndarray, "_"]]:
    """The recordings of an example; ValueError for what cannot be read, or is longer."""
    return [read_mono(path, sampling_rate, max_seconds) for path in example.audio]


@dataclass(frozen=True)
class RowMaker:
    """Makes this process's rows of a batch.

    Attributes:
        examples: what they are made of.
        processor: a ``SpeechLanguageProcessor``.
        plan: which examples are in which batch.
        rows: of this process, first and behind the last.
        max_length: tokens of a row.
        max_seconds: of a recording.
        recordings: room in a row.
    """

    examples: Examples
    processor: Any
    plan: RowPlan
    rows: tuple[int, int]
    max_length: int
    max_seconds: float
    recordings: int

    def tokens(self, example: Example, counts: Sequence[int]) -> tuple[list[int], int]:
        """Those of prompt and answer, and how many are the prompt's; ValueError if they are too many."""
        tokenizer = self.processor.tokenizer
        prompt = tokenizer(self.processor.expanded(example.prompt, counts))["input_ids"]
        answer = [*tokenizer.encode(example.answer, add_special_tokens=False), tokenizer.eos_token_id]
        if len(prompt) + len(answer) - 1 > self.max_length:
            raise ValueError(
                f"{str(example.audio[0])!r}: prompt and answer have {len(prompt) + len(answer) - 1} tokens, more than "
                f"data.max_length = {self.max_length}; raise it"
            )
        return [*prompt, *answer], len(prompt)

    def __call__(self, number: int) -> Batch:
        """The batch of that number; see :func:`make_loader`."""
        chosen = self.plan.batch(number)[slice(*self.rows)].tolist()
        shape = (len(chosen), self.max_length)
        input_ids, labels = np.zeros(shape, np.int32), np.full(shape, IGNORED, np.int32)
        counts = np.zeros((len(chosen), self.recordings), np.int32)
        silence = np.zeros(self.processor.padded_samples(self.max_seconds), np.float32)
        audio = [silence] * counts.size
        for row, line in enumerate(chosen):
            if line < 0:
                continue
            example = self.examples.lines[line]
            heard = recordings_of(example, self.processor.sampling_rate, self.max_seconds)
            lengths = [self.processor.num_audio_tokens(len(each)) for each in heard]
            tokens, prompt = self.tokens(example, lengths)
            counts[row, : len(heard)] = lengths
            audio[row * self.recordings : row * self.recordings + len(heard)] = heard
            input_ids[row, : len(tokens) - 1] = tokens[:-1]
            labels[row, prompt - 1 : len(tokens) - 1] = tokens[prompt:]
        batch = {"input_ids": input_ids, "labels": labels, "audio_counts": counts}
        for name, array in self.processor.audio_inputs(audio, len(silence)).items():
            key = "audio_attention_mask" if name == "audio_attention_mask" else "audio"
            batch[key] = array.reshape(len(chosen), self.recordings, *array.shape[1:])
        return batch


def make_loader(
    examples: Examples,
    processor: Any,
    *,
    batch_size: int,
    max_length: int,
    max_seconds: float,
    recordings: int,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> Loader:
    """Batches of examples, a row each.

    A batch has ``input_ids`` and ``labels`` ``(rows, max_length)`` int32, padded on the right, the labels -100 but for
    the answer; ``audio`` ``(rows, recordings, ...)`` as the encoder takes it, ``audio_attention_mask`` where there is
    one, and ``audio_counts`` ``(rows, recordings)``, the tokens of each, 0 where there is no recording.

    Args:
        examples: of :func:`read_examples`.
        processor: a ``SpeechLanguageProcessor``.
        batch_size: rows of a batch over all processes.
        max_length, max_seconds, recordings: room in a row.
        seed, shuffle, epochs, process_index, process_count, workers: as of ``text.packing.make_loader``.
    """
    plan = RowPlan(len(examples), f"{examples.fingerprint} {max_length} {max_seconds}", batch_size, seed, shuffle)
    share = batch_size // process_count
    rows = (process_index * share, (process_index + 1) * share)
    maker = RowMaker(examples, processor, plan, rows, max_length, max_seconds, recordings)
    return Loader(maker, epochs, workers, prefetch=2)
