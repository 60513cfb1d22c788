"""Progress on standard error, tables on standard output."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from transformers_moshi_flax.cli.errors import one_line

PATIENCE = 2.0
"""Seconds that pass before a bar of :func:`slow` is shown."""

WIDTH = 119
"""Columns of a report that does not go to a terminal."""


def report_console() -> Console:
    """Standard output, for tables and trees."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


class _Bar(Progress):
    def stop(self) -> None:
        if not self.disable:  # it would print an empty line before version 14.3 of rich
            super().stop()


def progress_bar(notes: Console) -> Progress:
    """A bar that leaves nothing behind; on a stream that is no terminal it prints nothing."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return _Bar(*columns, console=notes, transient=True, disable=not notes.is_terminal)


@contextmanager
def notes_of_warnings() -> Iterator[None]:
    """Print warnings of the block's as lines on standard error, without the place in the code that they come from."""

    def print_note(message: Warning | str, *place: Any, **file: Any) -> None:
        print(f"moshi-flax: warning: {one_line(str(message))}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = print_note
        yield


@contextmanager
def slow(description: str, total: int | None = None, notes: Console | None = None) -> Iterator[Callable[[int], None]]:
    """Show a bar while the block runs, if it takes longer than :data:`PATIENCE` seconds.

    Args:
        description: what stands before the bar.
        total: of the steps; None for work that cannot be divided.
        notes: where to (default: standard error).

    Yields:
        A function that is told how many steps have been made since it was last called.
    """
    bar = progress_bar(Console(stderr=True) if notes is None else notes)
    task = bar.add_task(description, total=total)
    impatience = threading.Timer(PATIENCE, bar.start)
    impatience.daemon = True
    impatience.start()
    try:
        yield lambda steps: bar.advance(task, steps)
    finally:
        impatience.cancel()
        impatience.join()
        bar.stop()
