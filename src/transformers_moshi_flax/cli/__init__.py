"""The ``moshi-flax`` command: one file a subcommand."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from transformers_moshi_flax.cli.errors import UserMistake, one_line

SUBCOMMANDS = {
    "generate": "Answer a recording: writes Moshi's speech (WAV) and text, codes and timings (JSON), prints the text.",
    "complete": "Complete a text with a language model: words are printed as they come, then tokens a second.",
    "converse": "Talk with a recording: Moshi hears it from its first frame on, and its reply has the same timeline.",
    "demo": "Let Moshi hear the embedded recording of three questions: both sides' words are printed as they come.",
    "ask": "Ask Moshi a question aloud: words are printed as they come, and both sides are written as a stereo file.",
    "serve": "Serve dialogues over the network: Kyutai's clients connect, and browsers get a page to talk to.",
    "talk": "Talk with a server: by microphone and speakers, or with a recording that it hears as fast as one speaks.",
    "convert": "Write the checkpoint SRC to the directory DST in the layout of Flax, PyTorch, Kyutai or its MLX.",
    "export": "Write a Moshi as ONNX graphs to the directory DIR, for dialogues without JAX, and verify it.",
    "inspect": "Show what a checkpoint holds, and check that it fits its configuration, without reading the tensors.",
    "prepare": "Encode recordings (left Moshi, right user) and lay their words on frames.",
    "train": "Train as CONFIG says. A run that was interrupted goes on when it is started again.",
    "train-codec": "Train a codec (Mimi) as CONFIG says. A run that was interrupted goes on when it is started again.",
    "export-checkpoint": "Write a checkpoint of the run RUN to DST, with configuration and tokenizer.",
    "verify": "Check every tensor of A for damage (checksums, numbers that are not finite), and compare A with B.",
}
"""The subcommands and the first lines of their docstrings. Each is a function of its name in a file of its name."""


def load(name: str) -> Any:
    """The subcommand ``name``; imports what it needs."""
    identifier = name.replace("-", "_")
    function = getattr(import_module(f"{__name__}.{identifier}"), identifier)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name)(function)
    return typer.main.get_command(app)


class Subcommands(TyperGroup):
    """Imports the subcommand that is run, and none to list them."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return TyperCommand(cmd_name, help=SUBCOMMANDS[cmd_name]) if cmd_name in SUBCOMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else load(name), rest


app = typer.Typer(
    name="moshi-flax",
    cls=Subcommands,
    help="Moshi in Flax: generate speech and text; converse; convert, inspect and verify checkpoints; train.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def moshi_flax() -> None:
    """Takes no options of its own."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2.

    ``inspect``, ``verify`` and ``export`` end with exit code 1 where a checkpoint does not pass, ``train`` where a run
    cannot go on.

    Args:
        args: the arguments without the program's name; None reads ``sys.argv``.

    Raises:
        SystemExit: always; code 0, 1 (a check that has failed), 2 (a mistake in what was given), 130 or 143
            (interrupted).
    """
    command = typer.main.get_command(app)
    try:
        code = command.main(args=args, prog_name="moshi-flax", standalone_mode=False)
    except UserMistake as mistake:
        _fail(str(mistake), mistake.code)
    except typer.Abort:
        print("moshi-flax: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        # typer's usage errors; they have a common base only in a private module
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message())
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int = 2) -> None:
    print(f"moshi-flax: error: {one_line(message)}", file=sys.stderr)
    sys.exit(code)
