"""Who Moshi is to a caller: voices that there are, texts that callers give, and the states that both leave."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..audio_files import read_mono
from ..models.moshi.prompt_flax_moshi import IdleCodes, MoshiPrompt, voice_codes

VOICE_SECONDS = 60.0
"""The longest recording of a voice."""

CODES, RECORDINGS = ".safetensors", (".wav", ".flac", ".ogg", ".mp3")
"""Suffixes of files that are voices."""

CHARACTERS_A_FRAME = 16
"""Of a text, at most: longer ones are refused before anybody looks for their pieces."""


class Busy(RuntimeError):
    """So many personas are new that another one has to wait."""


@dataclass(frozen=True)
class Persona:
    """What a caller asks for.

    Attributes:
        voice: its name; None for none.
        text: who Moshi is; may be nothing.
        prompt: both.
    """

    voice: str | None
    text: str
    prompt: MoshiPrompt


class Personas:
    """Makes the states of personas, in a thread of its own, and keeps those that were asked for last.

    Args:
        stream: of the dialogues.
        tokenizer: of the texts.
        idle: the codes of those who say nothing.
        voices: by their names, of which alone callers can choose.
        kept: states.
        longest: frames of a prompt.

    Attributes:
        voices, longest: the same.

    Raises:
        ValueError: a voice is too long, or not for the model.
    """

    def __init__(
        self,
        stream: Any,
        tokenizer: Any,
        idle: IdleCodes,
        voices: Mapping[str, MoshiPrompt],
        kept: int,
        longest: int,
    ):
        self.voices, self.longest = dict(voices), longest
        self._stream, self._tokenizer, self._idle = stream, tokenizer, idle
        self._kept, self._made = kept, OrderedDict[tuple[str | None, str], Future]()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="moshi-personas")
        for name in voices:
            try:
                self.find(name, None)
            except ValueError as error:
                raise ValueError(f"the voice {name!r}: {error}") from error

    def find(self, voice: str | None, text: str | None) -> Persona | None:
        """The persona of a voice and a text; None without either.

        Raises:
            ValueError: there is no such voice, the prompt is too long, or the text has pieces unknown to the model.
        """
        text = " ".join((text or "").split())
        if not voice and not text:
            return None
        if len(text) > CHARACTERS_A_FRAME * self.longest:
            raise ValueError(f"the text has {len(text)} characters, at most {CHARACTERS_A_FRAME * self.longest} do")
        if voice and voice not in self.voices:
            raise ValueError(f"there is no voice {voice[:80]!r}; there are: {', '.join(self.voices) or 'none'}")
        prompt = MoshiPrompt.of_persona(self._idle, self.voices[voice] if voice else None, text, self._tokenizer)
        if prompt.frames > self.longest:
            raise ValueError(f"voice and text have {prompt.frames} frames, but {self.longest} are allowed; say less")
        self._stream.check_prompt(prompt)
        return Persona(voice or None, text, prompt)

    def state(self, persona: Persona) -> Future:
        """What dialogues with the persona begin from: at once, or when it has been made.

        Raises:
            Busy: as many as there are slots wait to be made.
        """
        key = (persona.voice, persona.text)
        known = self._made.get(key)
        if known is not None and not (known.done() and known.exception()):
            self._made.move_to_end(key)
            return known
        if sum(not future.done() for future in self._made.values()) >= self._stream.batch_size:
            raise Busy("too many new personas at once; try again later")
        made = self._made[key] = self._thread.submit(self._stream.prefill, persona.prompt, self.longest)
        self._made.move_to_end(key)
        for oldest in list(self._made):
            if len(self._made) > self._kept and self._made[oldest].done():
                del self._made[oldest]
        return made

    def close(self) -> None:
        """End the thread after what it is making."""
        self._thread.shutdown(cancel_futures=True)


def read_voices(folder: Path, model: Any, idle: IdleCodes) -> dict[str, MoshiPrompt]:
    """The voices of a folder: recordings, which Mimi encodes, and prompts of ``MoshiPrompt.save``.

    Their names are those of the files without the suffix. Other files are none.

    Args:
        folder: is read once; what changes in it later changes nothing here.
        model: a ``FlaxMoshiForConditionalGeneration``.
        idle: the codes of a user who says nothing.

    Raises:
        OSError: the folder cannot be read.
        ValueError: a file cannot be read, leads out of the folder or does not fit the model; two of a name; no voice.
    """
    voices: dict[str, MoshiPrompt] = {}
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if path.name.startswith(".") or suffix not in (CODES, *RECORDINGS):
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path.name!r} leads out of the folder; copy the file into it")
        if path.stem in voices:
            raise ValueError(f"two voices are called {path.stem!r}; rename one")
        if suffix == CODES:
            voice = MoshiPrompt.load(path)
        else:
            samples = read_mono(path, model.config.audio_encoder_config.sampling_rate, VOICE_SECONDS)
            voice = MoshiPrompt.from_codes(voice_codes(model, samples), idle.user)
        try:
            voice.check_for(model.config)
        except ValueError as error:
            raise ValueError(f"{path.name!r}: {error}") from error
        voices[path.stem] = voice
    if not voices:
        raise ValueError(f"there is no voice in {str(folder)!r}; put {CODES} or {', '.join(RECORDINGS)} there")
    return voices
