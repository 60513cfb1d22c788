"""``moshi-flax serve``: dialogues over the network, and a page to talk to."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
import ssl
import sys
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from transformers_moshi_flax.cli.checkpoints import NOTICE, is_embedded, source_of
from transformers_moshi_flax.cli.errors import FailedRun, UserMistake, as_mistake
from transformers_moshi_flax.cli.generate import check_moshi
from transformers_moshi_flax.cli.live import loaded
from transformers_moshi_flax.cli.options import (
    DepthTemperature,
    DepthTopK,
    DtypeOption,
    Model,
    Temperature,
    TopK,
    TopP,
    sampling_options,
)
from transformers_moshi_flax.cli.transcript import timed_words

KEPT_PERSONAS, LONGEST_PERSONA = 8, 500
EXTRA = ("aiohttp", "prometheus_client", "sphn")


def serve(
    model: Model = None,
    host: Annotated[str, typer.Option(help="Address to listen at; other machines need tokens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes a free one.")] = 8998,
    slots: Annotated[int, typer.Option(min=1, max=4096, help="Dialogues at once.")] = 4,
    queue: Annotated[int, typer.Option(min=0, max=256, help="Callers who may wait for a slot.")] = 0,
    per_address: Annotated[
        int | None, typer.Option(min=1, help="Dialogues at once of callers with the same address.")
    ] = None,
    max_seconds: Annotated[float, typer.Option(min=1, help="Of a dialogue.")] = 3600.0,
    idle_seconds: Annotated[float, typer.Option(min=1, help="Without audio, until a dialogue ends.")] = 30.0,
    record: Annotated[
        Path | None, typer.Option(help="Folder to keep what is said in; nothing is kept without.")
    ] = None,
    voices: Annotated[Path | None, typer.Option(help="Folder with the voices that callers may choose from.")] = None,
    personas: Annotated[
        int | None, typer.Option(min=0, help="Voices with texts that are kept ready; 0 for none at all.")
    ] = None,
    persona_frames: Annotated[
        int | None,
        typer.Option(min=1, help="Frames of the longest: voice, text, pauses. Default: 500, or the context."),
    ] = None,
    pin_personas: Annotated[bool, typer.Option("--pin-personas", help="Dialogues never forget theirs.")] = False,
    auth_token_file: Annotated[Path | None, typer.Option(help="Tokens that callers need one of, one a line.")] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Let everybody in who reaches this address.")] = False,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="A page that may connect besides our own, as https://example.org.")
    ] = None,
    ssl_cert: Annotated[Path | None, typer.Option(help="Certificate for HTTPS, PEM.")] = None,
    ssl_key: Annotated[Path | None, typer.Option(help="Its key, PEM.")] = None,
    grace: Annotated[float, typer.Option(min=0, help="Seconds to finish dialogues in after SIGTERM.")] = 30.0,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    depth_temperature: DepthTemperature = None,
    depth_top_k: DepthTopK = None,
    dtype: DtypeOption = None,
) -> None:
    """Serve dialogues over the network: Kyutai's clients connect, and browsers get a page to talk to."""
    sampling = sampling_options(temperature, top_k, top_p, depth_temperature, depth_top_k)
    check_extra()
    tokens = read_tokens(auth_token_file)
    tls = read_certificate(ssl_cert, ssl_key)
    with closing(bind(host, port)) as listener:
        local = ip_address(listener.getsockname()[0]).is_loopback
        if not (local or tokens or no_auth):
            raise UserMistake(
                f"--host: {host!r} can be reached from other machines; give --auth-token-file, or --no-auth to let "
                "everybody in"
            )
        source = source_of(model)
        check_moshi(source)

        from transformers_moshi_flax.serving.caller import Limits
        from transformers_moshi_flax.serving.gate import Gate
        from transformers_moshi_flax.serving.logs import log_to
        from transformers_moshi_flax.serving.metrics import Metrics
        from transformers_moshi_flax.serving.recording import Recorder
        from transformers_moshi_flax.serving.server import Server

        check_record(record, max_seconds)
        wanted = PersonaOptions(voices, personas, persona_frames, pin_personas)
        notes = Console(stderr=True, highlight=False)
        metrics = Metrics()
        engine, tokenizer, known = load(source, dtype, slots, queue, sampling, wanted, metrics, notes)
        words = partial(timed_words, tokenizer=tokenizer, frame_rate=engine.stream.frame_rate)
        recorder = None if record is None else Recorder(record, words, metrics)
        gate = Gate(tokens, allow_origin or (), local=local and not tokens)
        about = about_model(source)
        notes.print(
            f"http{'s' * (tls is not None)}://{_authority(listener)}/  {about['notice'] or ''}", soft_wrap=True
        )
        log_to(sys.stderr)

        async def run() -> None:
            limits = Limits(max_seconds, idle_seconds)
            server = Server(engine, tokenizer, metrics, about, gate, limits, recorder, per_address, known)
            await server.run(listener, tls, grace)

        with as_mistake(f"--model: {source!r} cannot be served", ValueError):
            try:
                asyncio.run(run())
            except RuntimeError as error:
                raise FailedRun(str(error)) from error


@dataclass(frozen=True)
class PersonaOptions:
    """What is said of personas on the command line.

    Attributes:
        folder: of the voices.
        kept: states; None where nothing was said.
        frames: of the longest; None where nothing was said.
        pinned: whether dialogues never forget theirs.
    """

    folder: Path | None
    kept: int | None
    frames: int | None
    pinned: bool

    def of_model(self, config: Any) -> tuple[int, int]:
        """How many states are kept for a model, and the frames of the longest: 0 and 0 for no personas.

        By default there are some if there are voices, or if it was trained for them.

        Raises:
            UserMistake: options without an effect, or a longest one that the model cannot hear.
        """
        by_default = KEPT_PERSONAS if self.folder or hasattr(config, "idle_codes") else 0
        kept = by_default if self.kept is None else self.kept
        if not kept and (self.folder or self.pinned or self.frames is not None):
            raise UserMistake("--personas: --voices, --persona-frames and --pin-personas need at least 1")
        most = config.sliding_window - 2
        frames = min(LONGEST_PERSONA, most) if self.frames is None else self.frames
        if kept and frames > most:
            raise UserMistake(f"--persona-frames: the model hears {most + 2} frames at once; give {most} at most")
        return (kept, frames) if kept else (0, 0)


def load(
    source: str,
    dtype: Any,
    slots: int,
    queue: int,
    sampling: dict[str, Any],
    wanted: PersonaOptions,
    metrics: Any,
    notes: Console,
) -> tuple[Any, Any, Any]:
    """The engine, with all that it needs compiled, the tokenizer and the personas, if any; with bars on ``notes``.

    Raises:
        UserMistake: the checkpoint, an option of ``sampling`` or a voice is of no use.
    """
    from transformers_moshi_flax.models.moshi.prompt_flax_moshi import IdleCodes
    from transformers_moshi_flax.serving.engine import Engine, stream_for_callers
    from transformers_moshi_flax.serving.personas import Personas, read_voices

    personas = None
    with loaded(source, dtype, notes) as speaker, as_mistake("cannot serve", ValueError):
        kept, frames = wanted.of_model(speaker.model.config)
        stream, numbers = stream_for_callers(speaker.model, slots, sampling, wanted.pinned)
        if kept:
            idle, voices = IdleCodes.of(speaker.model), {}
            if wanted.folder is not None:
                with as_mistake(f"--voices: cannot use {str(wanted.folder)!r}", OSError, ValueError):
                    voices = read_voices(wanted.folder, speaker.model, idle)
            personas = Personas(stream, speaker.tokenizer, idle, voices, kept, frames)
        engine = Engine(stream, metrics, numbers, queue=queue)
        engine.warmup(frames)
    return engine, speaker.tokenizer, personas


def about_model(source: str) -> dict[str, Any]:
    """What callers are told of a checkpoint: its name without the folders above, and what to know of it."""
    import jax

    import transformers_moshi_flax

    return {
        "model": source if not Path(source).exists() else Path(source).resolve().name,
        "notice": NOTICE if is_embedded(source) else None,
        "version": transformers_moshi_flax.__version__,
        "jax": jax.__version__,
        "backend": jax.default_backend(),
    }


def check_extra() -> None:
    """Raises :class:`UserMistake` where what a server needs is not installed."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise UserMistake(f"serve: {', '.join(missing)} not installed; pip install 'transformers-moshi-flax[serve]'")


def read_tokens(path: Path | None) -> list[str]:
    """The tokens of a file, one a line; none without a file.

    Raises:
        UserMistake: it cannot be read, or there is none in it.
    """
    if path is None:
        return []
    with as_mistake(f"--auth-token-file: cannot read {str(path)!r}", OSError, ValueError):
        tokens = path.read_text("utf-8").split()
    if not tokens:
        raise UserMistake(f"--auth-token-file: there is no token in {str(path)!r}; write one a line")
    return tokens


def read_certificate(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """What HTTPS needs; None without certificate and key.

    Raises:
        UserMistake: one of them alone, or files that are of no use.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise UserMistake("--ssl-cert, --ssl-key: one needs the other; give both, or none for HTTP")
    with as_mistake(f"--ssl-cert, --ssl-key: cannot use {str(certificate)!r} and {str(key)!r}", OSError):
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, key)
    return context


def check_record(folder: Path | None, max_seconds: float) -> None:
    """Raises :class:`UserMistake` if dialogues cannot be kept in ``folder``, or not whole."""
    from transformers_moshi_flax.serving.recording import LARGEST_SECONDS, check_folder

    if folder is None:
        return
    if max_seconds > LARGEST_SECONDS:
        raise UserMistake(
            f"--record: a WAV holds no dialogue of {max_seconds:g} s; give --max-seconds of at most {LARGEST_SECONDS}"
        )
    with as_mistake(f"--record: cannot write in {str(folder)!r}", OSError):
        check_folder(folder)


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address, which is taken from now on; nobody is let in yet.

    Raises:
        UserMistake: there is no such address here, or another program has it.
    """
    with as_mistake(f"--host, --port: cannot listen at {host}:{port}", OSError):
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    return listener


def _authority(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
