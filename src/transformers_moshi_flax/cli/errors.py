"""The one exception by which a subcommand says that what it was given cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserMistake(Exception):
    """Shown as one line without a traceback; names the option, what was found and what to do."""


@contextmanager
def as_mistake(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions of ``kinds`` raised inside into a :class:`UserMistake` that starts with ``what``."""
    try:
        yield
    except kinds as error:
        raise UserMistake(f"{what}: {error}") from error


def one_line(text: str) -> str:
    """``text`` with every run of white space, line ends included, as one space."""
    return " ".join(text.split())
