"""``moshi-flax prepare``: recordings with word alignments -> a dataset of codes and text ids for training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from transformers_moshi_flax.cli.checkpoints import check_source
from transformers_moshi_flax.cli.compilation_cache import use_compilation_cache
from transformers_moshi_flax.cli.console import notes_of_warnings, report_console, slow
from transformers_moshi_flax.cli.errors import UserMistake, as_mistake, hub_errors

if TYPE_CHECKING:
    from transformers_moshi_flax.training.data.preparing import Report

SHOWN = 20
"""Most lines of a table; ``report.json`` has all."""

LATE = 1.0
"""Seconds; recordings whose text is never later have no line of it in the table."""


def prepare(
    manifest: Annotated[
        Path, typer.Argument(metavar="MANIFEST", help="JSON lines with the path of a stereo recording each.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the dataset. Work that is there goes on.")],
    model: Annotated[str, typer.Option(help="Checkpoint directory or Hub id of the Moshi that is to be trained.")],
    main_speaker: Annotated[
        str, typer.Option(metavar="LABEL", help="The speaker of Moshi's words; all others are the user's.")
    ] = "SPEAKER_MAIN",
    whitespace_before_word: Annotated[
        bool,
        typer.Option(
            "--whitespace-before-word/--no-whitespace-before-word",
            help="The latter for languages that are written without spaces.",
        ),
    ] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Recordings that are encoded at once.")] = 8,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read audio.")] = 4,
    recordings_per_shard: Annotated[
        int, typer.Option(min=1, help="Recordings in a file; as many are redone at most after an interruption.")
    ] = 64,
) -> None:
    """Encode recordings (left Moshi, right user) and lay their words on frames.

    Beside each NAME.wav, NAME.json has {"alignments": [[word, [start, end], "SPEAKER_MAIN"], ...]}.
    Recordings that cannot be used are skipped, and listed in OUT/report.json. So are words that are left out, and how
    late text is.
    """
    if not manifest.is_file():
        raise UserMistake(f"MANIFEST: {str(manifest)!r} is not a file; give a JSON lines file")
    if out.exists() and not out.is_dir():
        raise UserMistake(f"OUT: {str(out)!r} is a file; give the name of a folder")
    if not main_speaker:
        raise UserMistake("--main-speaker: it is empty; give the label of Moshi's words, such as SPEAKER_00")
    check_source("--model", model)
    use_compilation_cache()

    import jax.numpy as jnp
    from transformers import MoshiConfig

    from transformers_moshi_flax import FlaxMimiModel, MoshiProcessor
    from transformers_moshi_flax.checkpoints.configs import load_config
    from transformers_moshi_flax.checkpoints.files import Source
    from transformers_moshi_flax.training.data import preparing

    with as_mistake("MANIFEST", OSError, ValueError):
        count = len(preparing.read_manifest(manifest))
    with as_mistake(f"--model: cannot load {model!r}", *hub_errors(), OSError, ValueError):
        config = load_config(MoshiConfig, Source.locate(model))
        processor = MoshiProcessor.from_pretrained(model)
        mimi = FlaxMimiModel.from_pretrained(model, dtype=jnp.float32)
    with (
        slow("preparing", count) as advance,
        as_mistake("--model", ValueError),
        as_mistake("OUT", OSError, preparing.UnusableFolder),
        notes_of_warnings(),
        as_mistake("--main-speaker", preparing.NoMainSpeaker),
    ):
        report = preparing.prepare(
            manifest,
            out,
            mimi=mimi,
            config=config,
            tokenizer=processor.tokenizer,
            pad_token_id=processor.pad_token_id,
            end_of_pad_token_id=processor.end_of_pad_token_id,
            main_speaker=main_speaker,
            whitespace_before_word=whitespace_before_word,
            batch_size=batch_size,
            workers=workers,
            recordings_per_shard=recordings_per_shard,
            advance=advance,
        )
    _show(report, main_speaker, report_console())
    if not report.conversations:
        raise UserMistake(f"MANIFEST: none of its recordings can be used; {str(out / preparing.REPORT)!r} says why")


def _show(report: Report, main_speaker: str, console: Console) -> None:
    hours = report.seconds / 3600
    resumed = f", {report.resumed} recordings done before" if report.resumed else ""
    console.print(f"{report.conversations} conversations, {hours:.2f} hours, {report.frames} frames{resumed}")
    labels = ", ".join(f"{label}: {count}" for label, count in sorted(report.speakers.items()))
    console.print(f"words by speaker: {labels or 'none'}", markup=False)
    if report.incomplete:
        console.print(f"recordings of which audio is missing: {len(report.incomplete)}")
    if report.late_pieces:
        console.print(_lag(report.pieces, report.late_pieces, report.largest_lag))
    rows = [(entry["path"], f"skipped: {entry['reason']}") for entry in report.skipped]
    rows += [(shard, f"made again: {reason}") for shard, reason in report.redone.items()]
    rows += [(path, f"audio is missing: {'; '.join(problems)}") for path, problems in report.incomplete.items()]
    for path, others in report.without_moshi.items():
        there = f"; there are {', '.join(others)} (--main-speaker)" if others else ", nor of anybody"
        rows.append((path, f"no word of Moshi's ({main_speaker}){there}"))
    for path, remarks in report.remarks.items():
        rows.append((path, "left out: " + ", ".join(f"{what}: {count}" for what, count in remarks.items())))
    rows += [(path, _lag(**lag)) for path, lag in report.lags.items() if lag["largest_lag"] >= LATE]
    if not rows:
        return
    table = Table("recording", "what")
    for path, what in rows[:SHOWN]:
        table.add_row(escape(path), escape(what))
    console.print(table)
    if len(rows) > SHOWN:
        console.print(f"and {len(rows) - SHOWN} more (report.json has all)")


def _lag(pieces: int | float, late_pieces: int | float, largest_lag: int | float) -> str:
    return f"text: {late_pieces / pieces:.0%} of the pieces are late, by up to {largest_lag:.1f} s"
