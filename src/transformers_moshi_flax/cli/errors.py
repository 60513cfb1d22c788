"""The exceptions by which a subcommand says that what it was given cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserMistake(ValueError):
    """Shown as one line without a traceback; names the option, what was found and what to do.

    Attributes:
        code: the exit code.
    """

    code = 2


class BadCheckpoint(UserMistake):
    """A checkpoint is damaged; shown as a :class:`UserMistake`, with the exit code of a check that has failed."""

    code = 1


class FailedRun(UserMistake):
    """Training cannot go on; shown as a :class:`UserMistake`, with the exit code of a check that has failed."""

    code = 1


class InterruptedRun(UserMistake):
    """A signal has ended training; shown as a :class:`UserMistake`, with the exit code that shells give the signal."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.code = 128 + signal


@contextmanager
def as_mistake(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions of ``kinds`` raised inside into a :class:`UserMistake` that starts with ``what``."""
    try:
        yield
    except UserMistake:
        raise
    except kinds as error:
        raise UserMistake(f"{what}: {error}") from error


def hub_errors() -> tuple[type[Exception], ...]:
    """What is raised where the Hub cannot be reached, or refuses: ``OSError``, and the errors of the HTTP client."""
    from huggingface_hub.errors import HfHubHTTPError

    # its bases are that of the client, whichever it is, and OSError
    return HfHubHTTPError.__bases__


def one_line(text: str) -> str:
    """``text`` with every run of white space, line ends included, as one space."""
    return " ".join(text.split())
