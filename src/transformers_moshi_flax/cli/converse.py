"""``moshi-flax converse``: a recording is heard live, frame by frame, and Moshi speaks meanwhile."""

from __future__ import annotations

import contextlib
import gc
import json
import math
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from jaxtyping import Float, Int
from rich.console import Console

from transformers_moshi_flax.cli.audio import AUDIO_OUT, check_place, check_suffix, read_audio, write_audio
from transformers_moshi_flax.cli.checkpoints import EMBEDDED_CLIP, EMBEDDED_MODEL
from transformers_moshi_flax.cli.compilation_cache import use_compilation_cache
from transformers_moshi_flax.cli.console import progress_bar
from transformers_moshi_flax.cli.errors import UserMistake, as_mistake
from transformers_moshi_flax.cli.generate import RANDOM, Speaker, check_moshi, is_random, name_of
from transformers_moshi_flax.cli.options import (
    DepthTemperature,
    DepthTopK,
    DtypeOption,
    Model,
    Seed,
    Temperature,
    TopK,
    TopP,
    UserAudio,
    sampling_options,
)
from transformers_moshi_flax.cli.pacing import Pace
from transformers_moshi_flax.cli.timing import compilation_time
from transformers_moshi_flax.cli.transcript import joined, subtitles, timed_words, to_record, to_srt
from transformers_moshi_flax.cli.watching import Watcher, stopped_by_interrupt

DAY = 86_400.0
TEXT_OUT = (".srt", ".json")


def converse(
    model: Model = None,
    user_audio: UserAudio = None,
    output: Annotated[Path, typer.Option(help="Moshi's reply, as long as the recording.")] = Path("moshi.wav"),
    stereo: Annotated[bool, typer.Option("--stereo", help="Moshi on the left, the user on the right.")] = False,
    text: Annotated[Path | None, typer.Option(help="What Moshi says, with times: .srt or .json.")] = None,
    realtime: Annotated[bool, typer.Option("--realtime", help="Hear no frame before its time.")] = False,
    extra_seconds: Annotated[float, typer.Option(min=0, help="Silence after the recording, for an answer.")] = 0.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    depth_temperature: DepthTemperature = None,
    depth_top_k: DepthTopK = None,
    seed: Seed = 0,
    dtype: DtypeOption = None,
) -> None:
    """Talk with a recording: Moshi hears it from its first frame on, and its reply has the same timeline."""
    from transformers_moshi_flax.checkpoints.writing import write_text

    sampling = sampling_options(temperature, top_k, top_p, depth_temperature, depth_top_k)
    if not extra_seconds <= DAY:
        raise UserMistake(f"--extra-seconds: {extra_seconds} is not in [0, {DAY:.0f}]; give at most a day")
    user_audio = user_audio or EMBEDDED_CLIP
    _check_file("--output", output, AUDIO_OUT, user_audio, overwrite)
    if text is not None:
        _check_file("--text", text, TEXT_OUT, user_audio, overwrite)
    source = model or str(EMBEDDED_MODEL)
    rate = check_moshi(source)
    samples = read_audio(user_audio, rate)
    length = len(samples) + round(extra_seconds * rate)

    notes = Console(stderr=True, highlight=False)
    use_compilation_cache()
    with progress_bar(notes) as bar:
        stage = bar.add_task(f"loading {name_of(source)}", total=None)
        speaker = Speaker.load(source, dtype)
        bar.update(stage, description="compiling")
        with as_mistake("cannot converse", ValueError), compilation_time() as compilation:
            stream = speaker.model.streaming(batch_size=1, **sampling)
            stream.warmup()
        bar.remove_task(stage)
    # what the libraries have made so far stays: looking through it again would hold up a step
    gc.freeze()
    frame_rate = stream.sampling_rate / stream.frame_size
    pace = Pace(1 / frame_rate, realtime)
    moshi, text_ids = _dialogue(stream, samples, length, seed, pace, notes)
    words = timed_words(text_ids, speaker.tokenizer, frame_rate)
    typer.echo(joined(words))

    interrupted = len(moshi) < length
    seconds = len(moshi) / rate
    if text is not None:
        if text.suffix.lower() == ".srt":
            content = to_srt(subtitles(words, seconds))
        else:
            record = {
                "model": EMBEDDED_MODEL.name if is_random(source) else source,
                "random": is_random(source),
                "seed": seed,
                "seconds": seconds,
                "interrupted": interrupted,
                **to_record(text_ids, speaker.tokenizer, frame_rate),
            }
            content = json.dumps(record, ensure_ascii=False) + "\n"
        with as_mistake(f"--text: cannot write {str(text)!r}", OSError):
            write_text(text, content)
    with as_mistake(f"--output: cannot write {str(output)!r}", OSError):
        write_audio(output, np.stack([moshi, _heard(samples, len(moshi))], axis=1) if stereo else moshi, rate)
    written = f"{output} and {text}" if text else str(output)
    warning = f" ({RANDOM})" if is_random(source) else ""
    notes.print(
        f"{written}: {seconds:.2f} s, {len(text_ids)} frames after {compilation.seconds:.0f} s of "
        f"compilation{warning}",
        soft_wrap=True,
    )
    notes.print(pace.report(), soft_wrap=True)


def _check_file(option: str, path: Path, suffixes: tuple[str, ...], user_audio: Path, overwrite: bool) -> None:
    """Raises :class:`UserMistake` if a file cannot or should not be written at ``path``."""
    check_suffix(option, path, suffixes)
    check_place(option, path)
    if path.resolve() == user_audio.resolve():
        raise UserMistake(f"{option}: {str(path)!r} is the file of --user-audio; give another name")
    if path.exists() and not overwrite:
        raise UserMistake(f"{option}: {str(path)!r} is there already; give another name, or --overwrite")


def _heard(samples: Float[np.ndarray, "recorded"], length: int) -> Float[np.ndarray, "samples"]:
    """The first ``length`` samples of the user, with silence after the recording."""
    samples = samples[:length]
    return np.pad(samples, (0, length - len(samples)))


def _dialogue(
    stream: object, samples: Float[np.ndarray, "recorded"], length: int, seed: int, pace: Pace, notes: Console
) -> tuple[Float[np.ndarray, "samples"], Int[np.ndarray, "frames"]]:
    """Moshi's samples, ``length`` of them, and its text ids; less of both after Ctrl-C."""
    import jax

    from transformers_moshi_flax.generation import StopGeneration
    from transformers_moshi_flax.models.moshi.pcm import PcmDialogue

    dialogue = PcmDialogue(stream, jax.random.key(seed))
    frames = math.ceil(length / stream.frame_size)
    spoken: list[np.ndarray] = []
    text_ids: list[int] = []
    with progress_bar(notes) as bar:
        watcher = Watcher(lambda: None, partial(bar.advance, bar.add_task("frames", total=frames)))
        with stopped_by_interrupt(watcher), contextlib.suppress(StopGeneration):
            notes.print(f"a dialogue of {frames} frames; Ctrl-C keeps what there is", soft_wrap=True)
            for frame in range(frames):
                pace.begin()
                # what a frame lacks is silence, and after the recording it lacks everything
                dialogue.feed(samples[frame * stream.frame_size : (frame + 1) * stream.frame_size])
                reply = dialogue.step()
                pace.end()
                spoken.append(reply.audio[0])
                text_ids.append(reply.text_ids[0])
                watcher.put(np.array(text_ids[-1:], np.int32))
    return np.concatenate(spoken)[:length], np.array(text_ids, np.int32)
