"""``moshi-flax generate``: speech and text in, Moshi's speech and text out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from jaxtyping import Float, Int
from rich.console import Console

from transformers_moshi_flax.cli.audio import check_output, read_audio, write_audio
from transformers_moshi_flax.cli.checkpoints import (
    EMBEDDED_QUESTION,
    Dtype,
    load_with_tokenizer,
    name_of,
    read_config,
    source_of,
    with_notice,
)
from transformers_moshi_flax.cli.compilation_cache import use_compilation_cache
from transformers_moshi_flax.cli.console import progress_bar
from transformers_moshi_flax.cli.errors import UserMistake, as_mistake
from transformers_moshi_flax.cli.options import (
    DepthTemperature,
    DepthTopK,
    DtypeOption,
    Model,
    Seed,
    Temperature,
    TopK,
    TopP,
    sampling_options,
)
from transformers_moshi_flax.cli.timing import compilation_time
from transformers_moshi_flax.cli.transcript import END_OF_PAD, HALF, PAD
from transformers_moshi_flax.cli.watching import Watcher, stopped_by_interrupt

DAY_OF_FRAMES = 1_080_000
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aiff")


def generate(
    model: Model = None,
    user_audio: Annotated[
        Path | None,
        typer.Option(
            help="What the user says: WAV or FLAC, any rate. Default: an embedded clip; with a text prompt, silence."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Moshi's reply; a JSON is written beside it.")] = Path("moshi.wav"),
    text_prompt: Annotated[
        str | None, typer.Option(help="Words put in Moshi's mouth at the prompt's end; alone, to silence.")
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Ask turn by turn for a text prompt or an audio file.")
    ] = False,
    max_new_frames: Annotated[
        int, typer.Option(min=1, max=DAY_OF_FRAMES, help="Frames to generate, 12.5 a second.")
    ] = 125,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    depth_temperature: DepthTemperature = None,
    depth_top_k: DepthTopK = None,
    seed: Seed = 0,
    dtype: DtypeOption = None,
) -> None:
    """Answer a recording: writes Moshi's speech (WAV) and text, codes and timings (JSON), prints the text."""
    sampling = sampling_options(temperature, top_k, top_p, depth_temperature, depth_top_k)
    check_output(output)
    silent = user_audio is None and (text_prompt is not None or interactive)
    user_audio = user_audio or EMBEDDED_QUESTION
    if user_audio.resolve() == output.resolve():
        raise UserMistake(f"--output: {str(output)!r} is the file of --user-audio; give another name")
    source = source_of(model)
    rate = check_moshi(source)
    samples = None if silent else read_audio(user_audio, rate)

    notes = Console(stderr=True, highlight=False)
    use_compilation_cache()
    with progress_bar(notes) as bar:
        stage = bar.add_task(f"loading {with_notice(source, name_of(source))}", total=None)
        speaker = Speaker.load(source, dtype)
        bar.remove_task(stage)
    if samples is None:
        notes.print("without --user-audio the user is silent while Moshi says the text prompt", soft_wrap=True)
    if not interactive:
        heard = speaker.silence(text_prompt or "") if samples is None else samples
        _turn(speaker, heard, text_prompt, max_new_frames, sampling, seed, output, notes)
        return

    notes.print(
        "Type words for Moshi to begin with, or the path of an audio file, which is heard from then on; quit ends."
    )
    for turn, line in enumerate(lines(notes), start=1):
        try:
            if Path(line).suffix.lower() in AUDIO_SUFFIXES:
                samples, prompt = read_audio(Path(line), rate), text_prompt
            else:
                prompt = line
            heard = speaker.silence(prompt or "") if samples is None else samples
            numbered = output.with_stem(f"{output.stem}-{turn}")
            if not _turn(speaker, heard, prompt, max_new_frames, sampling, seed + turn - 1, numbered, notes):
                return
        except UserMistake as mistake:
            notes.print(f"[red]{mistake}[/red]")


def lines(notes: Console) -> Iterator[str]:
    """What is typed, line by line, until the end of input or ``quit``."""
    while True:
        notes.print("> ", end="")
        try:
            line = input().strip()
        except EOFError:
            return
        if line in ("quit", "exit"):
            return
        if line:
            yield line


def check_moshi(source: str) -> int:
    """The sampling rate of the Moshi checkpoint ``source``.

    Raises:
        UserMistake: there is no such checkpoint, or it is another model.
    """
    config = read_config("--model", source)
    if config.get("model_type") != "moshi":
        raise UserMistake(f"--model: {source!r} is a {config.get('model_type')!r} checkpoint; give a Moshi one")
    return int((config.get("audio_encoder_config") or {}).get("sampling_rate", 24_000))


@dataclass(frozen=True)
class Reply:
    """What was generated in answer to one prompt.

    Attributes:
        text: the words, without padding.
        text_ids: ``(frames,)``, one id a frame.
        audio_codes: ``(num_codebooks, frames - 1)``: the last frame's codes would need one more step of the backbone.
        audio: ``(samples,)`` float32.
        seconds: wall time of the generation, without compilation.
        compile_seconds: wall time of the compilation; 0 if the program was there already.
        interrupted: whether Ctrl-C or SIGTERM ended it.
    """

    text: str
    text_ids: Int[np.ndarray, "frames"]
    audio_codes: Int[np.ndarray, "num_codebooks codes"]
    audio: Float[np.ndarray, "samples"]
    seconds: float
    compile_seconds: float
    interrupted: bool


@dataclass(frozen=True)
class Speaker:
    """A loaded ``FlaxMoshiForConditionalGeneration`` with its tokenizer."""

    source: str
    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, source: str, dtype: Dtype | None) -> Speaker:
        """As :func:`~transformers_moshi_flax.cli.checkpoints.load_with_tokenizer`."""
        from transformers_moshi_flax import FlaxMoshiForConditionalGeneration

        return cls(source, *load_with_tokenizer(FlaxMoshiForConditionalGeneration, source, dtype))

    @property
    def sampling_rate(self) -> int:
        return self.model.config.audio_encoder_config.sampling_rate

    @property
    def frame_size(self) -> int:
        """Samples a frame."""
        from transformers_moshi_flax.models.mimi.topology import samples_per_frame

        return samples_per_frame(self.model.config.audio_encoder_config)

    def silence(self, text: str) -> Float[np.ndarray, "samples"]:
        """The user's, for as long as ``text`` takes, a piece a frame."""
        pieces = self.tokenizer.encode(text, add_special_tokens=False)
        return np.zeros(max(1, len(pieces)) * self.frame_size, np.float32)

    def prompt_ids(self, frames: int, text: str | None) -> Int[np.ndarray, "1 frames"]:
        """Moshi's text stream during the prompt: padding, and ``text`` in the last frames, one piece a frame.

        Raises:
            UserMistake: ``text`` has more pieces than there are frames, or characters unknown to the tokenizer.
        """
        ids = np.full((1, frames), PAD, np.int32)
        pieces = self.tokenizer.encode(text, add_special_tokens=False) if text else []
        if END_OF_PAD in pieces:
            raise UserMistake(
                f"--text-prompt: {text!r} has characters that the tokenizer does not know; leave them out"
            )
        if len(pieces) > frames:
            raise UserMistake(
                f"--text-prompt: {len(pieces)} pieces do not fit the {frames} frames of --user-audio; "
                "shorten the text or give longer audio"
            )
        if pieces:
            ids[0, -len(pieces) :] = pieces
        return ids

    def reply(
        self,
        samples: Float[np.ndarray, "samples"],
        text_prompt: str | None,
        max_new_frames: int,
        sampling: dict[str, Any],
        seed: int,
        watcher: Watcher,
    ) -> Reply:
        """Answer the user's ``samples``. Moshi's own stream is silent, but for ``text_prompt``, while the user speaks.

        ``watcher`` hears of every frame and may end the reply early.

        Raises:
            UserMistake: the prompt or an option does not fit the model.
        """
        import jax

        prompt_frames = math.ceil(len(samples) / self.frame_size)
        user = samples[None, None]
        ids = self.prompt_ids(prompt_frames, text_prompt)
        start = time.perf_counter()
        with as_mistake("cannot generate", ValueError), compilation_time() as compilation:
            output = self.model.generate(
                input_ids=ids,
                user_input_values=user,
                moshi_input_values=np.zeros_like(user),
                max_new_tokens=max_new_frames,
                return_audio_codes=True,
                prng_key=jax.random.PRNGKey(seed),
                streamer=watcher,
                **sampling,
            )
            jax.block_until_ready(output.audio_sequences)
        seconds = time.perf_counter() - start
        # the start token and the prompt come first, in the text as in the codes (which have no start token)
        text_ids = np.asarray(output.sequences)[0, 1 + prompt_frames :]
        words = [int(token) for token in text_ids if token not in (END_OF_PAD, PAD)]
        return Reply(
            text=self.tokenizer.decode(words, skip_special_tokens=True).replace(HALF, "").strip(),
            text_ids=text_ids,
            audio_codes=np.asarray(output.audio_codes)[0, :, prompt_frames:],
            audio=np.asarray(output.audio_sequences, np.float32)[0, 0, prompt_frames * self.frame_size :],
            seconds=seconds - compilation.seconds,
            compile_seconds=compilation.seconds,
            interrupted=watcher.interrupted,
        )


def _turn(
    speaker: Speaker,
    samples: Float[np.ndarray, "samples"],
    text_prompt: str | None,
    max_new_frames: int,
    sampling: dict[str, Any],
    seed: int,
    output: Path,
    notes: Console,
) -> bool:
    """Generate one reply, print its text and write its files; returns whether another may be begun."""
    from transformers_moshi_flax.checkpoints.writing import write_text

    with progress_bar(notes) as bar:
        stage = bar.add_task("frames", total=max_new_frames)
        note = f"generating {max_new_frames} frames; the first time also compiles; Ctrl-C keeps what there is"
        watcher = Watcher(partial(notes.print, note, soft_wrap=True), partial(bar.advance, stage))
        with stopped_by_interrupt(watcher):
            reply = speaker.reply(samples, text_prompt, max_new_frames, sampling, seed, watcher)
        bar.remove_task(stage)
    typer.echo(reply.text)
    frames = len(reply.text_ids)
    record = {
        "model": name_of(speaker.source),
        "text": reply.text,
        "text_ids": reply.text_ids.tolist(),
        "audio_codes": reply.audio_codes.tolist(),
        "seconds": len(reply.audio) / speaker.sampling_rate,
        "generation_seconds": reply.seconds,
        "compile_seconds": reply.compile_seconds,
        "frames_per_second": frames / reply.seconds,
        "seed": seed,
        "text_prompt": text_prompt,
        "interrupted": reply.interrupted,
    }
    transcript = output.with_suffix(".json")
    with as_mistake(f"--output: cannot write {str(output)!r}", OSError):
        write_audio(output, reply.audio, speaker.sampling_rate)
        write_text(transcript, json.dumps(record, ensure_ascii=False) + "\n")
    told = (
        f"{output} and {transcript.name}: {record['seconds']:.2f} s of audio, {frames} frames, "
        f"{record['frames_per_second']:.1f} frames/s after {reply.compile_seconds:.0f} s of compilation"
    )
    notes.print(with_notice(speaker.source, told), soft_wrap=True)
    return not watcher.terminated
