"""A dialogue that is held live with a checkpoint: its stream, its frames one after another, what is written of it."""

from __future__ import annotations

import contextlib
import gc
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import typer
from jaxtyping import Float, Int
from rich.console import Console

from transformers_moshi_flax.cli.audio import check_place, check_suffix, write_audio
from transformers_moshi_flax.cli.checkpoints import Dtype, name_of, with_notice
from transformers_moshi_flax.cli.compilation_cache import use_compilation_cache
from transformers_moshi_flax.cli.console import progress_bar
from transformers_moshi_flax.cli.errors import UserMistake, as_mistake
from transformers_moshi_flax.cli.generate import Speaker
from transformers_moshi_flax.cli.pacing import Pace
from transformers_moshi_flax.cli.timing import compilation_time
from transformers_moshi_flax.cli.transcript import PAUSE, Timed, subtitles, timed_words, to_record, to_srt
from transformers_moshi_flax.cli.watching import Watcher, stopped_by_interrupt


@contextlib.contextmanager
def loaded(source: str, dtype: Dtype | None, notes: Console) -> Iterator[Speaker]:
    """The checkpoint ``source``, whose stream is compiled in the block, with bars on ``notes``.

    Raises:
        UserMistake: the checkpoint is of no use.
    """
    use_compilation_cache()
    with progress_bar(notes) as bar:
        stage = bar.add_task(f"loading {with_notice(source, name_of(source))}", total=None)
        speaker = Speaker.load(source, dtype)
        bar.update(stage, description="compiling")
        yield speaker
        bar.remove_task(stage)
    # what the libraries have made so far stays: looking through it again would hold up a step
    gc.freeze()


@dataclass(frozen=True)
class Partner:
    """A checkpoint that listens.

    Attributes:
        speaker: the model and its tokenizer.
        stream: of one dialogue, compiled.
        compile_seconds: how long that took.
    """

    speaker: Speaker
    stream: Any
    compile_seconds: float

    @classmethod
    def load(cls, source: str, dtype: Dtype | None, sampling: dict[str, Any], notes: Console) -> Partner:
        """Load and compile, with bars on ``notes``.

        Raises:
            UserMistake: the checkpoint or an option of ``sampling`` is of no use.
        """
        with loaded(source, dtype, notes) as speaker, compilation_time() as compilation:
            with as_mistake("cannot converse", ValueError):
                stream = speaker.model.streaming(batch_size=1, **sampling)
                stream.warmup()
        return cls(speaker, stream, compilation.seconds)

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        return self.stream.sampling_rate / self.stream.frame_size

    def words(self, text_ids: Int[np.ndarray, "frames"]) -> list[Timed]:
        """What Moshi says, with times."""
        return timed_words(text_ids, self.speaker.tokenizer, self.frame_rate)


def hold(
    partner: Partner,
    samples: Float[np.ndarray, "recorded"],
    length: int,
    seed: int,
    pace: Pace,
    notes: Console,
    listen: Callable[[int], None] | None = None,
) -> tuple[Float[np.ndarray, "samples"], Int[np.ndarray, "frames"]]:
    """Hold a dialogue of ``length`` samples with a user who says ``samples``, and then nothing.

    Args:
        partner: who answers.
        samples: the user's.
        length: of the dialogue.
        seed: of the sampling.
        pace: when steps begin.
        notes: where a bar is shown, if nobody listens.
        listen: is told the text id of every frame as it comes.

    Returns:
        Moshi's samples, ``length`` of them, and its text ids; less of both after Ctrl-C or SIGTERM.
    """
    import jax

    from transformers_moshi_flax.generation import StopGeneration
    from transformers_moshi_flax.models.moshi.pcm import PcmDialogue

    size = partner.stream.frame_size
    dialogue = PcmDialogue(partner.stream, jax.random.key(seed))
    frames = math.ceil(length / size)
    spoken: list[np.ndarray] = []
    text_ids: list[int] = []
    with progress_bar(Console(quiet=True) if listen else notes) as bar:
        watcher = Watcher(lambda: None, partial(bar.advance, bar.add_task("frames", total=frames)))
        with stopped_by_interrupt(watcher), contextlib.suppress(StopGeneration):
            notes.print(f"a dialogue of {frames} frames; Ctrl-C keeps what there is", soft_wrap=True)
            for frame in range(frames):
                pace.begin()
                # what a frame lacks is silence, and after the recording it lacks everything
                dialogue.feed(samples[frame * size : (frame + 1) * size])
                reply = dialogue.step()
                pace.end()
                spoken.append(reply.audio[0])
                text_ids.append(int(reply.text_ids[0]))
                if listen is not None:
                    listen(text_ids[-1])
                watcher.put(np.array(text_ids[-1:], np.int32))
    return np.concatenate(spoken)[:length], np.array(text_ids, np.int32)


class Printed:
    """What is said, word by word; on a new line, with its time, after a pause or when the other side speaks."""

    def __init__(self) -> None:
        self._last: tuple[str, Timed] | None = None

    def add(self, speaker: str, words: Iterable[Timed]) -> None:
        """Print these words of ``speaker``."""
        for word in words:
            if self._last is None or self._last[0] != speaker or word.start - self._last[1].end >= PAUSE:
                self.end()
                typer.echo(f"{word.start:6.1f} s  {speaker:<5}  {word.text}", nl=False)
            else:
                typer.echo(" " * word.spaced + word.text, nl=False)
            self._last = speaker, word

    def end(self) -> None:
        """End the line, if there is one."""
        if self._last is not None:
            typer.echo()


def both_channels(
    moshi: Float[np.ndarray, "samples"], user: Float[np.ndarray, "recorded"]
) -> Float[np.ndarray, "samples 2"]:
    """Moshi on the left, and on the right the user as Moshi heard them: with silence after the recording."""
    user = user[: len(moshi)]
    return np.stack([moshi, np.pad(user, (0, len(moshi) - len(user)))], axis=1)


def write_sound(path: Path, samples: Float[np.ndarray, "samples *channels"], rate: int) -> None:
    """Raises :class:`UserMistake` if it cannot be written."""
    with as_mistake(f"--output: cannot write {str(path)!r}", OSError):
        write_audio(path, samples, rate)


def write_transcript(
    path: Path, partner: Partner, text_ids: Int[np.ndarray, "frames"], seconds: float, **more: Any
) -> None:
    """SRT or JSON, by the suffix; ``more`` goes into the JSON.

    Raises:
        UserMistake: it cannot be written.
    """
    from transformers_moshi_flax.checkpoints.writing import write_text

    source, tokenizer = partner.speaker.source, partner.speaker.tokenizer
    if path.suffix.lower() == ".srt":
        content = to_srt(subtitles(partner.words(text_ids), seconds))
    else:
        record = {
            "model": name_of(source),
            "seconds": seconds,
            **more,
            **to_record(text_ids, tokenizer, partner.frame_rate),
        }
        content = json.dumps(record, ensure_ascii=False) + "\n"
    with as_mistake(f"--text: cannot write {str(path)!r}", OSError):
        write_text(path, content)


def check_file(option: str, path: Path, suffixes: tuple[str, ...], user_audio: Path | None, overwrite: bool) -> None:
    """Raises :class:`UserMistake` if a file cannot or should not be written at ``path``."""
    check_suffix(option, path, suffixes)
    check_place(option, path)
    if user_audio is not None and path.resolve() == user_audio.resolve():
        raise UserMistake(f"{option}: {str(path)!r} is the file of --user-audio; give another name")
    if path.exists() and not overwrite:
        raise UserMistake(f"{option}: {str(path)!r} is there already; give another name, or --overwrite")
