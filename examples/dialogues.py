"""Twenty spoken dialogues, made on the spot: two voices of espeak-ng, one question and one answer each.

The layout is that of Moshi's fine-tuners: ``manifest.jsonl`` names stereo recordings (left Moshi, right the user), and
beside each stands a JSON of the words with their times. Every word is spoken for itself, so its times are exact.

espeak-ng comes from PyPI (``espeakng-loader``, of the extra ``test``). ::

    python examples/dialogues.py DIRECTORY
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path

import espeakng_loader
import numpy as np
import soundfile
import soxr
from jaxtyping import Float

SAMPLING_RATE = 24_000
FRAME_SIZE = 1920
MOSHI, USER = "SPEAKER_MAIN", "SPEAKER_USER"
VOICES = {MOSHI: "en+f3", USER: "en-us+m3"}

WORDS_A_MINUTE = 190
SECONDS_BEFORE, SECONDS_BETWEEN_WORDS, SECONDS_BEFORE_THE_ANSWER, SECONDS_AFTER = 0.3, 0.04, 0.4, 0.3

# Questions begin alike, and answers too: which one is right is known only to who has listened to the end.
SCRIPT = (
    ("Are you there?", "Yes, I am listening."),
    ("Are you hungry?", "No, I never eat."),
    ("What is your name?", "My name is Moshi."),
    ("What is your favourite colour?", "I like dark green."),
    ("What colour is the sky?", "The sky is blue."),
    ("What colour is the grass?", "The grass is green."),
    ("What colour is the snow?", "Snow is white, of course."),
    ("How are you today?", "I am well, thank you."),
    ("How old are you?", "I am one year old."),
    ("How many days has a week?", "A week has seven days."),
    ("How many legs has a spider?", "A spider has eight legs."),
    ("Where is the station?", "Behind the old bridge."),
    ("Where is the key?", "Under the blue chair."),
    ("Where do fish live?", "Fish live in the water."),
    ("When does the train leave?", "The train leaves at noon."),
    ("When does the shop open?", "It opens at nine."),
    ("Can you sing a song?", "La la la, like this?"),
    ("Can you count to three?", "One, two, three!"),
    ("Shall I take an umbrella?", "Yes, it will rain soon."),
    ("Good night, Moshi.", "Good night, sleep well!"),
)


class Voices:
    """espeak-ng, one word at a time. It keeps its state in the library: there may be one at a time."""

    # of speak_lib.h
    _SYNCHRONOUS, _RATE, _UTF8 = 2, 1, 1

    def __init__(self) -> None:
        self._library = ctypes.cdll.LoadLibrary(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        self._rate = self._library.espeak_Initialize(self._SYNCHRONOUS, 0, data, 0)
        if self._rate <= 0:
            raise RuntimeError(f"espeak-ng does not start with its data in {data.decode()}: install it again")
        self._chunks: list[np.ndarray] = []
        # kept, as the library calls it later
        self._listener = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)(
            self._hear
        )
        self._library.espeak_SetSynthCallback(self._listener)
        self._library.espeak_SetParameter(self._RATE, WORDS_A_MINUTE, 0)
        # else every run sounds a little different
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(0))

    def _hear(self, samples, count: int, events) -> int:
        if samples and count:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def __call__(self, word: str, voice: str) -> Float[np.ndarray, "samples"]:
        """``word`` without the silence around it, at 24 kHz in [-1, 1].

        Raises:
            RuntimeError: the library refuses, or nothing is heard.
        """
        self._chunks.clear()
        text = ctypes.create_string_buffer(word.encode())
        length = ctypes.c_size_t(len(text))
        failed = self._library.espeak_SetVoiceByName(voice.encode())
        failed = failed or self._library.espeak_Synth(text, length, 0, 1, 0, self._UTF8, None, None)
        samples = np.concatenate([np.zeros(0, np.int16), *self._chunks])
        (loud,) = np.nonzero(np.abs(samples) > 60)
        if failed or not len(loud):
            raise RuntimeError(f"espeak-ng does not speak {word!r} with the voice {voice!r}")
        spoken = samples[loud[0] : loud[-1] + 1].astype(np.float32) / 32768
        return soxr.resample(spoken, self._rate, SAMPLING_RATE)


def render(
    question: str, answer: str, speak: Callable[[str, str], np.ndarray]
) -> tuple[Float[np.ndarray, "samples 2"], list]:
    """One dialogue: the recording in whole frames, and ``[word, [start, end], speaker]`` of every word, in seconds."""
    channels: tuple[list, list] = ([], [])
    alignments, now = [], round(SECONDS_BEFORE * SAMPLING_RATE)
    for speaker, text in ((USER, question), (MOSHI, answer)):
        for word in text.split():
            spoken = speak(word, VOICES[speaker])
            channels[0 if speaker == MOSHI else 1].append((now, spoken))
            end = now + len(spoken)
            alignments.append([word, [round(now / SAMPLING_RATE, 4), round(end / SAMPLING_RATE, 4)], speaker])
            now = end + round(SECONDS_BETWEEN_WORDS * SAMPLING_RATE)
        now += round((SECONDS_BEFORE_THE_ANSWER if speaker == USER else SECONDS_AFTER) * SAMPLING_RATE)
    recording = np.zeros((-(-now // FRAME_SIZE) * FRAME_SIZE, 2), np.float32)
    for channel, words in enumerate(channels):
        for start, spoken in words:
            recording[start : start + len(spoken), channel] = spoken
    return recording, alignments


def make_dialogues(directory: Path) -> Path:
    """Speaks the script into ``directory``; the path of the manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    speak = Voices()
    lines = []
    for index, (question, answer) in enumerate(SCRIPT):
        recording, alignments = render(question, answer, speak)
        wav = directory / f"{index:02d}.wav"
        soundfile.write(wav, recording, SAMPLING_RATE, subtype="PCM_16")
        wav.with_suffix(".json").write_text(json.dumps({"alignments": alignments}), encoding="utf-8")
        lines.append(json.dumps({"path": wav.name, "duration": len(recording) / SAMPLING_RATE}))
    manifest = directory / "manifest.jsonl"
    manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return manifest


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/dialogues.py DIRECTORY")
    print(make_dialogues(Path(sys.argv[1])))
