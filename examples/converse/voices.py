"""Voices that speak a sentence and tell when each word is said: flite's and espeak-ng's, by their C libraries.

Both come from Debian (``apt-get install libflite1 espeak-ng``; espeak-ng also from PyPI, ``espeakng-loader``). Nothing
is downloaded. The licences of the voices are in ``docs/converse.md``.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import soxr
from jaxtyping import Float32

SAMPLING_RATE = 24_000
FRAME = 1920
"""Samples of a frame of the codec."""

_AROUND = 0.04


@dataclass(frozen=True)
class Spoken:
    """A sentence that has been spoken.

    Attributes:
        audio: at 24 kHz, in [-1, 1], without the silence around it.
        words: with begin and end in seconds.
    """

    audio: Float32[np.ndarray, "samples"]
    words: list[tuple[str, float, float]]


@dataclass(frozen=True)
class Voice:
    """A voice.

    Attributes:
        name: such as ``flite:rms`` or ``espeak:en-us+m3``.
        rate: how fast it speaks, 1 as it is.
        pitch: how high, 1 as it is.
    """

    name: str
    rate: float = 1.0
    pitch: float = 1.0

    def __call__(self, text: str) -> Spoken:
        """Speak words and simple punctuation.

        Raises:
            RuntimeError: the engine is not installed, does not know the voice, or splits words in another way.
        """
        engine, _, name = self.name.partition(":")
        speak = {"flite": _flite, "espeak": _espeak}[engine]()
        return speak(text, name, self.rate, self.pitch)


@dataclass(frozen=True)
class WordByWord:
    """A voice that speaks every word by itself, each from the beginning of a frame on.

    A word then sounds the same wherever it stands, so that the text alone tells the codes; and how it sounds does not
    tell the word that follows.
    """

    voice: Voice

    @property
    def name(self) -> str:
        """Of the voice."""
        return self.voice.name

    def __call__(self, text: str) -> Spoken:
        """Speak words; punctuation is not heard.

        Raises:
            RuntimeError: as of :class:`Voice`.
        """
        audio, words = np.zeros(0, np.float32), []
        for word in split_words(text):
            audio = np.pad(audio, (0, -len(audio) % FRAME))
            spoken, start = self.voice(word), len(audio) / SAMPLING_RATE
            words += [(word, start + begin, start + end) for _, begin, end in spoken.words]
            audio = np.concatenate([audio, spoken.audio])
        return Spoken(audio, words)


def pronounced(text: str) -> str:
    """What an engine is given: a capital A is the letter, which both would take for the article."""
    return re.sub(r"\bA\b", "ay", text).lower()


def split_words(text: str) -> list[str]:
    """The words of a sentence as they are written, without punctuation around them."""
    return re.findall(r"[A-Za-z']+", text)


class _Flite:
    """libflite: a synthesizer whose utterances know the times of their segments."""

    class _Wave(ctypes.Structure):
        _fields_ = (
            ("type", ctypes.c_char_p),
            ("rate", ctypes.c_int),
            ("size", ctypes.c_int),
            ("channels", ctypes.c_int),
            ("samples", ctypes.POINTER(ctypes.c_short)),
        )

    class _VoiceHead(ctypes.Structure):
        _fields_ = (("name", ctypes.c_char_p), ("features", ctypes.c_void_p))

    _START = b"R:SylStructure.daughter1.daughter1.R:Segment.p.end"
    _END = b"R:SylStructure.daughtern.daughtern.R:Segment.end"

    def __init__(self) -> None:
        pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_float
        self._library = self._loaded("libflite.so.1")
        for name in ("libflite_cmulex.so.1", "libflite_usenglish.so.1"):
            self._loaded(name)
        self._library.flite_init()

        def function(name: str, result: object, *arguments: object) -> Callable:
            found = getattr(self._library, name)
            found.restype, found.argtypes = result, arguments
            return found

        self._synthesize = function("flite_synth_text", pointer, text, pointer)
        self._wave = function("utt_wave", ctypes.POINTER(self._Wave), pointer)
        self._relation = function("utt_relation", pointer, pointer, text)
        self._head = function("relation_head", pointer, pointer)
        self._next = function("item_next", pointer, pointer)
        self._number = function("ffeature_float", number, pointer, text)
        self._delete = function("delete_utterance", None, pointer)
        self._set = function("feat_set_float", None, pointer, text, number)
        self._mean = function("get_param_float", number, pointer, text, number)
        self._seed = ctypes.CDLL(None).srand
        self._voices: dict[str, tuple[int, float]] = {}

    @staticmethod
    def _loaded(name: str) -> ctypes.CDLL:
        try:
            return ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise RuntimeError(f"{name} is not installed: apt-get install libflite1") from error

    def _voice(self, name: str) -> tuple[int, float]:
        """A voice, and the mean of its pitch in hertz."""
        if name not in self._voices:
            register = getattr(self._loaded(f"libflite_cmu_us_{name}.so.1"), f"register_cmu_us_{name}")
            register.restype, register.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
            voice = register(None)
            features = self._VoiceHead.from_address(voice).features
            self._voices[name] = voice, self._mean(features, b"int_f0_target_mean", 100.0)
        return self._voices[name]

    def __call__(self, text: str, name: str, rate: float, pitch: float) -> Spoken:
        voice, mean = self._voice(name)
        features = self._VoiceHead.from_address(voice).features
        self._set(features, b"duration_stretch", 1 / rate)
        self._set(features, b"int_f0_target_mean", mean * pitch)
        self._seed(1)  # else the noise in a voice is another one every time
        utterance = self._synthesize(pronounced(text).encode(), voice)
        if not utterance:
            raise RuntimeError(f"flite does not speak {text!r}")
        try:
            wave = self._wave(utterance).contents
            samples = np.ctypeslib.as_array(wave.samples, (wave.size,)).astype(np.float32) / 32768
            found_rate, times = wave.rate, []
            item = self._head(self._relation(utterance, b"Word"))
            while item:
                times.append((self._number(item, self._START), self._number(item, self._END)))
                item = self._next(item)
        finally:
            self._delete(utterance)
        return _trimmed(samples, found_rate, _named(text, times))


class _Espeak:
    """libespeak-ng, which tells when each word begins."""

    # of speak_lib.h
    _SYNCHRONOUS, _RATE, _PITCH, _UTF8, _WORD = 2, 1, 3, 1, 1

    class _Event(ctypes.Structure):
        _fields_ = (
            ("type", ctypes.c_int),
            ("identifier", ctypes.c_uint),
            ("text_position", ctypes.c_int),
            ("length", ctypes.c_int),
            ("audio_position", ctypes.c_int),
            ("sample", ctypes.c_int),
            ("user_data", ctypes.c_void_p),
            ("id", ctypes.c_char * 8),
        )

    def __init__(self) -> None:
        library, data = "libespeak-ng.so.1", None
        try:
            import espeakng_loader

            library, data = espeakng_loader.get_library_path(), espeakng_loader.get_data_path().encode()
        except ImportError:
            pass
        try:
            self._library = ctypes.cdll.LoadLibrary(library)
        except OSError as error:
            raise RuntimeError(f"{library} is not installed: apt-get install espeak-ng") from error
        self._rate = self._library.espeak_Initialize(self._SYNCHRONOUS, 0, data, 0)
        if self._rate <= 0:
            raise RuntimeError("espeak-ng does not start: install it again")
        self._chunks: list[np.ndarray] = []
        self._starts: list[tuple[int, float]] = []
        listener = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(self._Event))
        self._listener = listener(self._hear)  # kept, as the library calls it later
        self._library.espeak_SetSynthCallback(self._listener)

    def _hear(self, samples: int | None, count: int, events: object) -> int:
        if samples and count:
            pointer = ctypes.cast(samples, ctypes.POINTER(ctypes.c_short))
            self._chunks.append(np.ctypeslib.as_array(pointer, (count,)).copy())
        place = 0
        while events[place].type:
            if events[place].type == self._WORD:
                self._starts.append((events[place].text_position - 1, events[place].audio_position / 1000))
            place += 1
        return 0

    def __call__(self, text: str, name: str, rate: float, pitch: float) -> Spoken:
        self._chunks.clear()
        self._starts.clear()
        # else every run sounds a little different
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(0))
        failed = self._library.espeak_SetVoiceByName(name.encode())
        self._library.espeak_SetParameter(self._RATE, round(165 * rate), 0)
        self._library.espeak_SetParameter(self._PITCH, min(99, round(50 * pitch)), 0)
        read = pronounced(text)
        buffer = ctypes.create_string_buffer(read.encode())
        size = ctypes.c_size_t(len(buffer))
        failed = failed or self._library.espeak_Synth(buffer, size, 0, 1, 0, self._UTF8, None, None)
        if failed or not self._chunks:
            raise RuntimeError(f"espeak-ng does not speak {text!r} with the voice {name!r}")
        samples = np.concatenate(self._chunks).astype(np.float32) / 32768
        times = shared_times(read, [*self._starts, (len(read), len(samples) / self._rate)])
        return _trimmed(samples, self._rate, _named(text, times))


def shared_times(text: str, starts: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """Begin and end of every word, where some are spoken as one ("of a"): these share its time by their letters.

    Args:
        text: what is spoken.
        starts: the place in the text and the time at which each spoken word begins, and of the end.
    """
    times = []
    for (place, begin), (next_place, end) in itertools.pairwise(starts):
        letters = [len(word) for word in split_words(text[place:next_place])]
        steps = np.cumsum([0, *letters]) / max(sum(letters), 1) * (end - begin) + begin
        times += [(float(first), float(last)) for first, last in itertools.pairwise(steps)]
    return times


def _named(text: str, times: list[tuple[float, float]]) -> list[tuple[str, float, float]]:
    words = split_words(text)
    if len(words) != len(times):
        raise RuntimeError(f"{text!r} has {len(words)} words, but {len(times)} are spoken: write it in other words")
    return [(word, begin, end) for word, (begin, end) in zip(words, times)]


def _trimmed(samples: Float32[np.ndarray, "samples"], rate: int, words: list[tuple[str, float, float]]) -> Spoken:
    """Resampled, from a little before the first word to a little after the last."""
    first = max(round((words[0][1] - _AROUND) * rate), 0)
    last = min(round((words[-1][2] + _AROUND) * rate), len(samples))
    if last <= first or np.abs(samples[first:last]).max() < 1e-3:
        raise RuntimeError("nothing is heard of a sentence")
    audio = soxr.resample(samples[first:last], rate, SAMPLING_RATE).astype(np.float32)
    seconds, offset = len(audio) / SAMPLING_RATE, first / rate

    def moved(time: float) -> float:
        return float(min(max(time - offset, 0.0), seconds))

    return Spoken(audio, [(word, moved(begin), moved(end)) for word, begin, end in words])


_flite = functools.cache(_Flite)
_espeak = functools.cache(_Espeak)
