"""The ``moshi-flax`` command: one file a subcommand."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from transformers_moshi_flax.cli import (
    converse,
    convert,
    export_checkpoint,
    generate,
    inspect,
    prepare,
    train,
    train_codec,
    verify,
)
from transformers_moshi_flax.cli.errors import UserMistake, one_line

app = typer.Typer(
    name="moshi-flax",
    help="Moshi in Flax: generate speech and text; converse; convert, inspect and verify checkpoints; train.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("generate")(generate.generate)
app.command("converse")(converse.converse)
app.command("convert")(convert.convert)
app.command("inspect")(inspect.inspect)
app.command("prepare")(prepare.prepare)
app.command("train")(train.train)
app.command("train-codec")(train_codec.train_codec)
app.command("export-checkpoint")(export_checkpoint.export_checkpoint)
app.command("verify")(verify.verify)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2.

    ``inspect`` and ``verify`` end with exit code 1 where a checkpoint does not pass, ``train`` where a run cannot go
    on.

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
