"""Dialogues as recordings: several exchanges in each, pauses, users who interrupt, repeat, or say nothing for a while.

Left is Moshi, right the user. Beside each recording stands a JSON of the words with their times, as ``moshi-flax
prepare`` wants it, and of the exchanges, for the evaluation.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from jaxtyping import Float32

from .sentences import AGAIN, SHARES, STOP, Exchange
from .voices import FRAME, SAMPLING_RATE, Spoken, Voice, WordByWord

MOSHI, USER = "SPEAKER_MAIN", "SPEAKER_USER"
MOSHI_VOICE = WordByWord(Voice("flite:slt"))
USER_VOICES = ("flite:rms", "flite:kal16", "espeak:en-us+m3", "espeak:en-us+f2", "espeak:en+m7")
HELD_OUT_VOICE = "flite:awb"
"""No sentence of this voice occurs in training."""

_AROUND = 0.4
"""Seconds of silence before and after single sentences: a codec that never hears silence makes a noise of it."""

_MOSHI_SHARE = 0.7
"""Of single sentences, those that are answers."""

_ANSWERS, _BETWEEN = 4, (0.3, 2.0)
"""Answers in a monologue, and seconds of silence around each."""

INTERRUPTED, STOPPED, AGAIN_SHARE, LONG_PAUSE = 0.08, 0.08, 0.08, 0.08
"""Shares of exchanges: asked while Moshi still speaks, stopped, asked to say it again, followed by a long silence."""

REACTION = (0.25, 0.45)
"""Seconds until Moshi is silent when the user begins to speak."""

Sound = Callable[[], Float32[np.ndarray, "samples"]]
"""Speaks when it is called."""


@dataclass
class Dialogue:
    """A dialogue that is being laid out.

    Attributes:
        channels: sounds by their first sample, of Moshi and of the user.
        words: ``[word, [begin, end], speaker]``, in seconds.
        exchanges: what was asked and answered, with times.
    """

    channels: dict[str, list[tuple[int, Float32[np.ndarray, "samples"]]]] = field(
        default_factory=lambda: {MOSHI: [], USER: []}
    )
    words: list[list[Any]] = field(default_factory=list)
    exchanges: list[dict[str, Any]] = field(default_factory=list)

    def say(self, speaker: str, spoken: Spoken, start: float, until: float | None = None) -> float:
        """Put a sentence at ``start``, cut off after the last word that begins before ``until``; returns its end."""
        words, audio = spoken.words, spoken.audio
        if until is not None and start + len(audio) / SAMPLING_RATE > until:
            words = [word for word in words if start + word[2] <= until]
            audio = audio[: round(words[-1][2] * SAMPLING_RATE) if words else 0]
            audio = audio * np.minimum(np.arange(len(audio), 0, -1) / (0.02 * SAMPLING_RATE), 1).astype(np.float32)
        self.channels[speaker].append((round(start * SAMPLING_RATE), audio))
        for word, begin, end in words:
            self.words.append([word, [round(start + begin, 4), round(start + end, 4)], speaker])
        return start + len(audio) / SAMPLING_RATE

    def recording(self, seconds: float) -> Float32[np.ndarray, "samples 2"]:
        """Both channels, in whole frames."""
        samples = -(-round(seconds * SAMPLING_RATE) // FRAME) * FRAME
        audio = np.zeros((samples, 2), np.float32)
        for channel, speaker in enumerate((MOSHI, USER)):
            for start, sound in self.channels[speaker]:
                audio[start : start + len(sound), channel] += sound[: samples - start]
        return audio


@functools.lru_cache(maxsize=4096)
def speak(voice: Voice | WordByWord, text: str) -> Spoken:
    """A sentence, spoken once."""
    return voice(text)


def lay_out(exchanges: Sequence[Exchange], voice: Voice, draw: np.random.Generator) -> tuple[Dialogue, float]:
    """A dialogue of these exchanges, and its length in seconds."""
    dialogue, now = Dialogue(), draw.uniform(0.3, 1.5)
    last: str | None = None
    for place, exchange in enumerate(exchanges):
        question, answer = exchange.question, exchange.answer
        if last is not None and draw.random() < AGAIN_SHARE:
            now, _ = _exchange(dialogue, voice, str(draw.choice(AGAIN)), last, "again", now, draw)
            now += draw.uniform(0.5, 2.0)
        stopped = len(answer.split()) > 3 and draw.random() < STOPPED
        interrupted = place + 1 < len(exchanges) and len(answer.split()) > 3 and draw.random() < INTERRUPTED
        if stopped or interrupted:
            now = _cut_off(dialogue, voice, question, answer, exchange.topic, now, stopped, draw)
            last = None
        else:
            now, _ = _exchange(dialogue, voice, question, answer, exchange.topic, now, draw)
            now += draw.uniform(0.5, 2.5) if draw.random() > LONG_PAUSE else draw.uniform(5, 10)
            last = answer
    return dialogue, now + 0.3


def _exchange(
    dialogue: Dialogue, voice: Voice, question: str, answer: str, topic: str, now: float, draw: np.random.Generator
) -> tuple[float, float]:
    """The ends of answer and question."""
    asked = dialogue.say(USER, speak(voice, question), now)
    begin = _at_a_frame(asked + draw.uniform(0.3, 0.7))
    end = dialogue.say(MOSHI, speak(MOSHI_VOICE, answer), begin)
    dialogue.exchanges.append(_record(question, answer, topic, now, asked, begin, end, False))
    return end, asked


def _at_a_frame(seconds: float) -> float:
    """The beginning of the nearest frame."""
    return round(seconds * SAMPLING_RATE / FRAME) * FRAME / SAMPLING_RATE


def _cut_off(
    dialogue: Dialogue,
    voice: Voice,
    question: str,
    answer: str,
    topic: str,
    now: float,
    stopped: bool,
    draw: np.random.Generator,
) -> float:
    """An answer that the user does not wait for; returns when the user goes on."""
    asked = dialogue.say(USER, speak(voice, question), now)
    begin = _at_a_frame(asked + draw.uniform(0.3, 0.7))
    spoken = speak(MOSHI_VOICE, answer)
    user = begin + draw.uniform(0.3, 0.7) * len(spoken.audio) / SAMPLING_RATE
    end = dialogue.say(MOSHI, spoken, begin, until=user + draw.uniform(*REACTION))
    dialogue.exchanges.append(_record(question, answer, topic, now, asked, begin, end, True))
    if not stopped:
        return user  # when the next question begins
    said = dialogue.say(USER, speak(voice, str(draw.choice(STOP))), user)
    return max(said, end) + draw.uniform(1.0, 3.0)


def _record(
    question: str, answer: str, topic: str, asks: float, asked: float, begin: float, end: float, cut: bool
) -> dict[str, Any]:
    times = {"asked": [round(asks, 4), round(asked, 4)], "answered": [round(begin, 4), round(end, 4)]}
    return {"question": question, "answer": answer, "topic": topic, **times, "cut_off": cut}


def in_a_room(audio: Float32[np.ndarray, "samples"], draw: np.random.Generator) -> Float32[np.ndarray, "samples"]:
    """A user's channel louder or softer, with a little echo and noise."""
    if draw.random() < 0.3:
        length = round(draw.uniform(0.05, 0.2) * SAMPLING_RATE)
        echo = draw.standard_normal(length) * np.exp(-5 * np.arange(length) / length) * 0.02
        echo[0] = 1.0
        size = len(audio) + length - 1
        audio = np.fft.irfft(np.fft.rfft(audio, size) * np.fft.rfft(echo, size), size)[: len(audio)]
    audio = audio * 10 ** (draw.uniform(-8, 3) / 20)
    audio = audio + draw.standard_normal(len(audio)) * 10 ** (draw.uniform(-75, -50) / 20)
    return (audio / max(1.0, np.abs(audio).max())).astype(np.float32)


def draw_voice(draw: np.random.Generator, held_out: bool = False) -> Voice:
    """A user's voice, its rate and its pitch."""
    name = HELD_OUT_VOICE if held_out else str(draw.choice(USER_VOICES))
    return Voice(name, round(float(draw.uniform(0.88, 1.12)), 2), round(float(draw.uniform(0.88, 1.12)), 2))


def write_dialogues(
    folder: Path, exchanges: Sequence[Exchange], number: int, seed: int, held_out_voice: bool = False
) -> Path:
    """Speak ``number`` dialogues of these exchanges into ``folder``; the path of their manifest.

    What is there already is not spoken again: a dialogue depends on the seed and its number alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    topics = sorted({each.topic for each in exchanges})
    by_topic = {topic: [each for each in exchanges if each.topic == topic] for topic in topics}
    lines = []
    for index in range(number):
        path = folder / f"{index:05d}.flac"
        if not path.with_suffix(".json").exists():
            draw = np.random.default_rng([seed, index])
            chosen = [by_topic[topic] for topic in draw.choice(topics, draw.integers(2, 6))]
            chosen = [each[draw.integers(len(each))] for each in chosen]
            dialogue, seconds = lay_out(chosen, draw_voice(draw, held_out_voice), draw)
            audio = dialogue.recording(seconds)
            audio[:, 1] = in_a_room(audio[:, 1], draw)
            soundfile.write(path, audio, SAMPLING_RATE, subtype="PCM_16")
            words = sorted(dialogue.words, key=lambda word: word[1][0])
            record = {"alignments": words, "exchanges": dialogue.exchanges}
            path.with_suffix(".json").write_text(json.dumps(record), encoding="utf-8")
        lines.append(json.dumps({"path": path.name, "duration": soundfile.info(path).duration}))
    manifest = folder / "all.jsonl"
    manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return manifest


def write_utterances(folder: Path, exchanges: Sequence[Exchange], number: int, seed: int) -> Path:
    """Single sentences, for the codec: answers and questions; the path of a manifest with their texts.

    Topics are drawn as in training.
    """
    exchange_of = _by_topic(exchanges)

    def sentence(draw: np.random.Generator) -> tuple[str, Sound]:
        exchange = exchange_of(draw)
        is_moshi = draw.random() < _MOSHI_SHARE
        text = exchange.answer if is_moshi else exchange.question

        def sound() -> Float32[np.ndarray, "samples"]:
            audio = speak(MOSHI_VOICE if is_moshi else draw_voice(draw), text).audio
            return np.pad(audio, round(_AROUND * SAMPLING_RATE))

        return text, sound

    return _write_sounds(folder, sentence, number, seed)


def write_monologues(folder: Path, exchanges: Sequence[Exchange], number: int, seed: int) -> Path:
    """Moshi's side of dialogues: a few answers with silences between them; the path of a manifest with their texts."""
    exchange_of = _by_topic(exchanges)

    def monologue(draw: np.random.Generator) -> tuple[str, Sound]:
        texts = [exchange_of(draw).answer for _ in range(_ANSWERS)]

        def sound() -> Float32[np.ndarray, "samples"]:
            parts = [_silence(draw)]
            for text in texts:
                spoken = speak(MOSHI_VOICE, text).audio
                parts += [np.pad(spoken, (0, -len(spoken) % FRAME)), _silence(draw)]
            return np.concatenate(parts)

        return " ".join(texts), sound

    return _write_sounds(folder, monologue, number, seed)


def _silence(draw: np.random.Generator) -> Float32[np.ndarray, "samples"]:
    return np.zeros(round(draw.uniform(*_BETWEEN) * SAMPLING_RATE / FRAME) * FRAME, np.float32)


def _by_topic(exchanges: Sequence[Exchange]) -> Callable[[np.random.Generator], Exchange]:
    """Draws exchanges, of each topic as many as in training."""
    by_topic = {topic: [each for each in exchanges if each.topic == topic] for topic in SHARES}
    shares = {topic: share for topic, share in SHARES.items() if by_topic[topic]}
    topics, sizes = list(shares), np.array(list(shares.values())) / sum(shares.values())

    def exchange(draw: np.random.Generator) -> Exchange:
        chosen = by_topic[str(draw.choice(topics, p=sizes))]
        return chosen[draw.integers(len(chosen))]

    return exchange


def _write_sounds(
    folder: Path, make: Callable[[np.random.Generator], tuple[str, Sound]], number: int, seed: int
) -> Path:
    """Write ``number`` sounds, but those that are there; the path of a manifest with their texts."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(number):
        path = folder / f"{index:05d}.flac"
        text, sound = make(np.random.default_rng([seed, index]))
        if not path.exists():
            soundfile.write(path, sound(), SAMPLING_RATE, subtype="PCM_16")
        lines.append(json.dumps({"path": path.name, "text": text}))
    manifest = folder / "all.jsonl"
    manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return manifest
