"""Progress is shown for what takes its time, and nowhere else."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from transformers_moshi_flax.cli import console
from transformers_moshi_flax.cli.console import report_console, slow


def shown(monkeypatch: pytest.MonkeyPatch, patience: float, terminal: bool) -> str:
    monkeypatch.setattr(console, "PATIENCE", patience)
    stream = io.StringIO()
    with slow("counting", 3, Console(file=stream, force_terminal=terminal, width=100)) as advance:
        for _ in range(3):
            time.sleep(0.1)
            advance(1)
    return stream.getvalue()


def test_slow_work_has_a_bar(monkeypatch: pytest.MonkeyPatch):
    assert "counting" in shown(monkeypatch, patience=0.05, terminal=True)


def test_quick_work_has_none(monkeypatch: pytest.MonkeyPatch):
    assert shown(monkeypatch, patience=60, terminal=True) == ""


def test_no_bar_without_a_terminal(monkeypatch: pytest.MonkeyPatch):
    assert shown(monkeypatch, patience=0.05, terminal=False).strip() == ""


def test_a_failure_ends_the_bar(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(console, "PATIENCE", 0.01)
    stream = io.StringIO()
    with pytest.raises(KeyError), slow("counting", notes=Console(file=stream, force_terminal=True)):
        time.sleep(0.2)
        raise KeyError
    written = stream.getvalue()
    assert "counting" in written
    time.sleep(0.3)
    assert stream.getvalue() == written


def test_reports_are_wide_where_there_is_no_terminal():
    assert report_console().width == 119
