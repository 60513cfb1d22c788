"""Words that a recognizer hears: whether speech that has been decoded can be understood.

The recognizer is PocketSphinx with its own English model (``pip install "transformers-moshi-flax[speech]"``), old and
small, but independent of everything here. With a grammar it hears one of its sentences in whatever it is given: noise
also scores then. Figures should be those of free words, or stand beside that of noise.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import soxr
from jaxtyping import Float32

_RATE = 16_000


class Recognizer:
    """PocketSphinx, one utterance at a time.

    Args:
        grammar: in JSGF, such as ``"#JSGF V1.0; grammar yes; public <s> = yes | no;"``; by default any English words,
            by the model of the package.

    Raises:
        ImportError: ``pocketsphinx`` is not installed.
        ValueError: a grammar that cannot be read, or has words that the dictionary lacks.
    """

    def __init__(self, grammar: str | None = None):
        try:
            import pocketsphinx
        except ImportError as error:
            raise ImportError(
                'recognition needs pocketsphinx: run `pip install "transformers-moshi-flax[speech]"`'
            ) from error
        if grammar is None:
            self._decoder = pocketsphinx.Decoder(loglevel="FATAL")
            return
        self._decoder = pocketsphinx.Decoder(lm=None, loglevel="FATAL")
        missing = sorted({word for word in _grammar_words(grammar) if self._decoder.lookup_word(word) is None})
        if missing:
            raise ValueError(f"`grammar` has words that the dictionary lacks: {', '.join(missing[:10])}")
        try:
            self._decoder.add_jsgf_string("sentences", grammar)
        except RuntimeError as error:
            raise ValueError(f"`grammar` cannot be read: {error}") from error
        self._decoder.activate_search("sentences")

    def __call__(self, audio: Float32[np.ndarray, "samples"], sampling_rate: int) -> str:
        """The words that are heard; empty for none.

        Args:
            audio: in [-1, 1].
            sampling_rate: in hertz.
        """
        audio = soxr.resample(audio, sampling_rate, _RATE)
        samples = np.clip(audio * 32767, -32768, 32767).astype(np.int16)
        self._decoder.start_utt()
        self._decoder.process_raw(samples.tobytes(), full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return "" if found is None else found.hypstr


def _grammar_words(grammar: str) -> set[str]:
    body = re.sub(r"#JSGF[^;]*;|grammar[^;]*;|public|<[^>]*>|/[\d.]+/", " ", grammar)
    return set(re.findall(r"[a-z']+", body))


def normalized_words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.findall(r"[a-z0-9']+", text.lower())


def word_accuracy(texts: Sequence[str], heard: Sequence[str]) -> float:
    """One less the word error rate: words that were replaced, left out or added, as a share of those that were said.

    Raises:
        ValueError: as many texts as there are heard ones are needed, and a word in them.
    """
    if len(texts) != len(heard):
        raise ValueError(f"`texts` are {len(texts)}, but `heard` are {len(heard)}; give as many")
    pairs = [(normalized_words(said), normalized_words(got)) for said, got in zip(texts, heard)]
    total = sum(len(said) for said, _ in pairs)
    if not total:
        raise ValueError("`texts` hold no words; give some")
    return 1 - sum(edit_distance(said, got) for said, got in pairs) / total


def edit_distance(said: Sequence[str], heard: Sequence[str]) -> int:
    """The fewest words to replace, leave out or add (Levenshtein)."""
    row = list(range(len(heard) + 1))
    for place, word in enumerate(said, 1):
        before, row[0] = row[0], place
        for column, other in enumerate(heard, 1):
            before, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, before + (word != other))
    return row[-1]
