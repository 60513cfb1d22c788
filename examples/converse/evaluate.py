"""What the converser can do: right answers, intelligible speech, turn-taking. ::

    python -m examples.converse.evaluate MODEL --questions 300 --minutes 10

Questions are held out of training; they are asked live, 80 ms at a time, by known voices and by one that is held out.
The figures are printed and written as JSON; shares have Wilson's 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int
from transformers import PreTrainedTokenizerBase

from transformers_moshi_flax import FlaxMimiModel, FlaxMoshiForConditionalGeneration, MoshiProcessor
from transformers_moshi_flax.cli.transcript import joined, timed_words
from transformers_moshi_flax.training.codec.recognition import Recognizer, word_accuracy

from .dialogues import MOSHI_VOICE, draw_voice, in_a_room, speak
from .sentences import SHARES, STOP, WORDS, Exchange, exchanges
from .voices import SAMPLING_RATE

BEFORE, AFTER = 1.0, 6.0
"""Seconds of silence around a question."""

LOUD = 10 ** (-45 / 20)
"""Root mean square of 20 ms in which somebody speaks."""

BLOCK = SAMPLING_RATE // 50
GAP = 0.35
"""Seconds of silence within an utterance."""

SILENCE = 3.2
"""Seconds before a sentence that the codec alone says: whole frames, more than its transformers look back."""

RECOGNIZED = 100
"""The most answers that are given to the recognizer, which takes longer than all else."""


@dataclass(frozen=True)
class Asked:
    """Something that a user says to Moshi.

    Attributes:
        exchange: what is asked, and the right answer; None for "stop".
        begin, end: in seconds.
    """

    exchange: Exchange | None
    begin: float
    end: float


def share(hits: int, of: int) -> dict[str, float]:
    """A share with Wilson's 95 % interval."""
    if not of:
        return {"share": math.nan, "low": math.nan, "high": math.nan, "of": 0}
    z, p = 1.96, hits / of
    middle, width = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    scale = 1 + z * z / of
    return {"share": p, "low": (middle - width) / scale, "high": (middle + width) / scale, "of": of}


def utterances(audio: Float32[np.ndarray, "samples"]) -> list[tuple[float, float]]:
    """When somebody speaks: begin and end in seconds; shorter silences than ``GAP`` do not count."""
    blocks = audio[: len(audio) // BLOCK * BLOCK].reshape(-1, BLOCK)
    loud = np.flatnonzero(np.sqrt(np.mean(np.square(blocks), axis=1)) > LOUD)
    found: list[tuple[float, float]] = []
    for block in loud.tolist():
        begin, end = block / 50, (block + 1) / 50
        if found and begin - found[-1][1] < GAP:
            found[-1] = found[-1][0], end
        else:
            found.append((begin, end))
    return found


def drawn_exchanges(
    draw: np.random.Generator, everything: Sequence[Exchange] | None = None, shares: Mapping[str, float] = SHARES
) -> Iterator[Exchange]:
    """Questions without end, of each topic as many as in training; none twice before all of its topic.

    Args:
        draw: random numbers.
        everything: that is asked, by default what is held out of training.
        shares: how often each topic is drawn.
    """
    if everything is None:
        everything = [each for each in exchanges() if each.held_out]
    left: dict[str, list[Exchange]] = {topic: [] for topic in shares}
    while True:
        topic = str(draw.choice(list(shares), p=list(shares.values())))
        if not left[topic]:
            left[topic] = [each for each in everything if each.topic == topic]
            draw.shuffle(left[topic])
        yield left[topic].pop()


def spoken_questions(
    drawn: Iterator[Exchange], number: int, seed: int, held_out_voice: bool
) -> tuple[list[Asked], Float32[np.ndarray, "rows samples"]]:
    """The next so many questions, each as the only one of a recording."""
    asked, rows = [], []
    for index in range(number):
        draw = np.random.default_rng([seed, index])
        exchange = next(drawn)
        spoken = speak(draw_voice(draw, held_out_voice), exchange.question).audio
        seconds = len(spoken) / SAMPLING_RATE
        silence = (
            np.zeros(round(BEFORE * SAMPLING_RATE), np.float32),
            np.zeros(round(AFTER * SAMPLING_RATE), np.float32),
        )
        rows.append(in_a_room(np.concatenate([silence[0], spoken, silence[1]]), draw))
        asked.append(Asked(exchange, BEFORE, BEFORE + seconds))
    longest = max(map(len, rows))
    return asked, np.stack([np.pad(row, (0, longest - len(row))) for row in rows])


def held_out_questions(
    number: int, seed: int, held_out_voice: bool
) -> tuple[list[Asked], Float32[np.ndarray, "rows samples"]]:
    """So many questions of all topics, as of :func:`spoken_questions`."""
    return spoken_questions(drawn_exchanges(np.random.default_rng(seed)), number, seed, held_out_voice)


def long_dialogue(minutes: float, seed: int) -> tuple[list[Asked], Float32[np.ndarray, "samples"]]:
    """The user of a dialogue: questions one after another, some answers stopped, a minute of silence in the middle."""
    draw = np.random.default_rng(seed)
    drawn = drawn_exchanges(np.random.default_rng([seed, 1]))
    voice = draw_voice(draw)
    audio = np.zeros(round(minutes * 60 * SAMPLING_RATE), np.float32)
    asked: list[Asked] = []
    now, has_rested = 1.0, False
    while True:
        exchange = next(drawn)
        question = speak(voice, exchange.question).audio
        answer = len(speak(MOSHI_VOICE, exchange.answer).audio) / SAMPLING_RATE
        begin, end = now, now + len(question) / SAMPLING_RATE
        if end + answer + 4 > minutes * 60:
            break
        _put(audio, question, begin)
        asked.append(Asked(exchange, begin, end))
        now = end + 0.5 + answer + draw.uniform(1.0, 2.5)
        if answer > 1.5 and draw.random() < 0.15:
            begin = end + 0.5 + 0.4 * answer
            stop = speak(voice, str(draw.choice(STOP))).audio
            _put(audio, stop, begin)
            end = begin + len(stop) / SAMPLING_RATE
            asked.append(Asked(None, begin, end))
            now = end + draw.uniform(1.5, 3.0)
        if not has_rested and now > minutes * 30 and minutes > 2:
            now, has_rested = now + 60, True
    return asked, in_a_room(audio, draw)


def _put(audio: Float32[np.ndarray, "samples"], sound: Float32[np.ndarray, "heard"], at: float) -> None:
    start = round(at * SAMPLING_RATE)
    audio[start : start + len(sound)] += sound[: len(audio) - start]


def live(
    model: FlaxMoshiForConditionalGeneration,
    users: Float32[np.ndarray, "rows samples"],
    params: Mapping[str, Any] | None = None,
) -> tuple[Int[np.ndarray, "rows frames"], Float32[np.ndarray, "rows heard"]]:
    """Moshi's text ids and its sound, to users who are heard frame by frame; ``params`` instead of the model's."""
    stream = model.streaming(batch_size=len(users), params=params)
    size = stream.frame_size
    frames = -(-users.shape[1] // size)
    users = np.pad(users, ((0, 0), (0, frames * size - users.shape[1])))
    state = stream.init(jax.random.key(0))
    ids, sounds = [], []
    for frame in range(frames):
        state, made = stream.step(state, users[:, None, frame * size : (frame + 1) * size])
        ids.append(np.asarray(made.text_ids))
        sounds.append(np.asarray(made.audio, np.float32)[:, 0])
    return np.stack(ids, axis=1), np.concatenate(sounds, axis=1)


def grammar() -> str:
    """All answers of the domain, in JSGF; letters as the recognizer's dictionary has them.

    Pairs of words are any two: one by one, they would make the recognizer a hundred times as slow.
    """
    answers = sorted({recognizable(each.answer) for each in exchanges() if each.topic != "echo"})
    rules = [each for each in answers if each] + ["<word> <word>"]
    words = [word for word in WORDS if recognizable(word)]
    return f"#JSGF V1.0; grammar answers; public <answer> = {' | '.join(rules)}; <word> = {' | '.join(words)};"


def recognizable(text: str) -> str:
    """A sentence in the words of the recognizer's dictionary; empty where one is not in it."""
    if "moshi" in text.split():
        return ""
    return " ".join(f"{word.lower()}." if word.isupper() else word for word in text.split())


def texts_of(
    ids: Int[np.ndarray, "rows frames"], tokenizer: PreTrainedTokenizerBase, frame_rate: float
) -> list[list[tuple[str, float]]]:
    """The words that each row says, with the second at which each begins."""
    return [[(word.text, word.start) for word in timed_words(row, tokenizer, frame_rate)] for row in ids]


def question_figures(
    model: FlaxMoshiForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    number: int,
    held_out_voice: bool,
    rows: int,
) -> dict[str, Any]:
    """How many answers are right, how they sound, and when they begin."""
    frame_rate = SAMPLING_RATE / model.config.audio_encoder_config.frame_size
    asked, users = held_out_questions(-(-number // rows) * rows, 7 + held_out_voice, held_out_voice)
    said: list[str] = []
    sounds: list[Float32[np.ndarray, "samples"]] = []
    for start in range(0, len(users), rows):
        ids, audio = live(model, users[start : start + rows])
        said += [joined(timed_words(row, tokenizer, frame_rate)) for row in ids]
        sounds += list(audio)
    asked, said, sounds = asked[:number], said[:number], sounds[:number]
    right = [text == each.exchange.answer for text, each in zip(said, asked)]
    by_topic: dict[str, list[bool]] = {}
    for each, is_right in zip(asked, right):
        by_topic.setdefault(each.exchange.topic, []).append(is_right)
    starts = [utterances(sound[round(each.end * SAMPLING_RATE) :]) for sound, each in zip(sounds, asked)]
    prompt = [bool(found) and 0.2 <= found[0][0] <= 1.2 for found in starts]
    early = [bool(utterances(sound[: round(each.end * SAMPLING_RATE)])) for sound, each in zip(sounds, asked)]
    wrong = [
        {"question": each.exchange.question, "answer": each.exchange.answer, "said": text}
        for each, text, is_right in zip(asked, said, right)
        if not is_right
    ]
    return {
        "right": share(sum(right), len(right)),
        "right_by_topic": {topic: share(sum(each), len(each)) for topic, each in sorted(by_topic.items())},
        "begins_in_time": share(sum(prompt), len(prompt)),
        "speaks_before_the_end": share(sum(early), len(early)),
        "speech": speech_figures(model.audio_encoder, said, sounds, asked),
        "wrong": wrong,
    }


def speech_figures(
    codec: FlaxMimiModel,
    said: Sequence[str],
    sounds: Sequence[Float32[np.ndarray, "samples"]],
    asked: Sequence[Asked],
) -> dict[str, float]:
    """Word accuracy of a recognizer: of Moshi, of the codec alone, and of the voice that Moshi has learned.

    Moshi's speech is held against the text that it says it speaks, where that is an answer of the domain; of these,
    the first ``RECOGNIZED``.
    """
    answers = {each.answer for each in exchanges()}
    chosen = [index for index, text in enumerate(said) if text in answers and recognizable(text)][:RECOGNIZED]
    texts = [recognizable(said[index]) for index in chosen]
    originals = [speak(MOSHI_VOICE, said[index]).audio for index in chosen]
    heard = {
        "moshi": [sounds[index][round(asked[index].end * SAMPLING_RATE) :] for index in chosen],
        "codec": [through(codec, audio) for audio in originals],
        "voice": originals,
    }
    if not texts:
        return {}
    figures = {}
    for kind, recognizer in (("grammar", Recognizer(grammar())), ("free", Recognizer())):
        for name, recordings in heard.items():
            words = [recognizer(audio, SAMPLING_RATE) for audio in recordings]
            figures[f"{name}_{kind}"] = word_accuracy(texts, words)
    return figures


def through(codec: FlaxMimiModel, audio: Float32[np.ndarray, "samples"]) -> Float32[np.ndarray, "samples"]:
    """Encoded and decoded, after silence, as in a dialogue."""
    before = round(SILENCE * SAMPLING_RATE)
    codes = codec.encode(np.pad(audio, (before, 0))[None, None]).audio_codes
    return np.asarray(codec.decode(codes).audio_values, np.float32)[0, 0, before : before + len(audio)]


def turn_counts(
    asked: Sequence[Asked],
    words: Sequence[tuple[str, float]],
    sound: Float32[np.ndarray, "samples"],
    minutes: float,
) -> Counter[str]:
    """What happened in one dialogue, counted.

    Args:
        asked: what the user said.
        words: what Moshi said, with the second at which each word begins.
        sound: Moshi's.
        minutes: how long it lasted.
    """
    spoken, counts = utterances(sound), Counter()
    ends = [*(each.begin for each in asked[1:]), minutes * 60]
    for each, following, until in zip(asked, [*asked[1:], None], ends):
        begins = [begin for begin, _ in spoken if each.end <= begin < until]
        if each.exchange is None:
            counts["stops"] += 1
            counts["stopped"] += not any(begin < until and end > each.begin + 0.6 for begin, end in spoken)
            continue
        counts["asked"] += 1
        counts["in_time"] += bool(begins) and 0.2 <= begins[0] - each.end <= 1.2
        if until - each.end > 60:
            counts["rests"] += 1
            counts["quiet"] += len(begins) <= 2  # the answer, and one more
        if following is not None and following.exchange is None:
            continue  # the answer was cut off
        # the text may be a frame ahead of the voice
        answer = " ".join(word for word, start in words if each.end - 0.1 <= start < until - 0.1)
        kinds = ["answered"]
        kinds += ["answered_in_the_first_minute"] * (each.begin < 60)
        kinds += ["answered_in_the_last_minute"] * (each.begin >= minutes * 60 - 60)
        for kind in kinds:
            counts[kind] += 1
            counts[kind.replace("answered", "right")] += answer == each.exchange.answer
    blocks = len(sound) // BLOCK
    speaks = _blocks(blocks, spoken) & _blocks(blocks, [(each.begin, each.end) for each in asked if each.exchange])
    return counts + Counter(blocks=blocks, overlapping=int(speaks.sum()))


def _blocks(number: int, spans: Sequence[tuple[float, float]]) -> Bool[np.ndarray, "blocks"]:
    covered = np.zeros(number, bool)
    for begin, end in spans:
        covered[round(begin * SAMPLING_RATE / BLOCK) : round(end * SAMPLING_RATE / BLOCK)] = True
    return covered


def dialogue_figures(
    model: FlaxMoshiForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, number: int, minutes: float
) -> dict[str, Any]:
    """Turn-taking in long dialogues."""
    frame_rate = SAMPLING_RATE / model.config.audio_encoder_config.frame_size
    made = [long_dialogue(minutes, seed) for seed in range(number)]
    ids, sounds = live(model, np.stack([user for _, user in made]))
    counts: Counter[str] = Counter()
    for (asked, _), words, sound in zip(made, texts_of(ids, tokenizer, frame_rate), sounds):
        counts += turn_counts(asked, words, sound, minutes)
    return {
        "right": share(counts["right"], counts["answered"]),
        "right_in_the_first_minute": share(
            counts["right_in_the_first_minute"], counts["answered_in_the_first_minute"]
        ),
        "right_in_the_last_minute": share(counts["right_in_the_last_minute"], counts["answered_in_the_last_minute"]),
        "begins_in_time": share(counts["in_time"], counts["asked"]),
        "stops_in_time": share(counts["stopped"], counts["stops"]),
        "quiet_in_a_minute_of_silence": share(counts["quiet"], counts["rests"]),
        "speaks_while_the_user_speaks": counts["overlapping"] / max(counts["blocks"], 1),
    }


def evaluate(folder: Path, questions: int, dialogues: int, minutes: float, rows: int = 32) -> dict[str, Any]:
    """All figures of the model in ``folder``; so many questions are asked at once."""
    model = FlaxMoshiForConditionalGeneration.from_pretrained(folder, dtype=jnp.float32)
    tokenizer = MoshiProcessor.from_pretrained(folder).tokenizer
    return {
        "known_voices": question_figures(model, tokenizer, questions, False, rows),
        "held_out_voice": question_figures(model, tokenizer, questions, True, rows),
        "dialogues": dialogue_figures(model, tokenizer, dialogues, minutes) if dialogues else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--dialogues", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--output", type=Path, default=Path("outputs/converse-figures.json"))
    given = parser.parse_args()
    figures = evaluate(given.model, given.questions, given.dialogues, given.minutes)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(figures, indent=1)
    given.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
