"""Generation that is watched: a real process that gets a real Ctrl-C, and the cache of compiled programs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from huggingface_hub import constants

from transformers_moshi_flax.cli.compilation_cache import use_compilation_cache
from transformers_moshi_flax.cli.watching import Watcher, stopped_by_interrupt
from transformers_moshi_flax.generation import StopGeneration


def start(folder: Path, frames: int) -> subprocess.Popen:
    command = [sys.executable, "-c", "from transformers_moshi_flax.cli import main; main()", "generate"]
    command += ["--max-new-frames", str(frames), "--output", str(folder / "reply.wav")]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_interrupt_keeps_what_there_is(tmp_path: Path) -> None:
    process = start(tmp_path, 20_000)
    line = ""
    while "Ctrl-C keeps what there is" not in line:
        line = process.stderr.readline()
        assert line, "the command has ended before it generated"
    process.send_signal(signal.SIGINT)
    _, notes = process.communicate(timeout=300)
    assert process.returncode == 0, notes
    record = json.loads((tmp_path / "reply.json").read_text("utf-8"))
    assert record["interrupted"] is True
    frames = len(record["text_ids"])
    assert 0 < frames < 20_000
    assert np.shape(record["audio_codes"])[1:] in ((frames - 1,), ())
    audio, _ = soundfile.read(tmp_path / "reply.wav")
    assert len(audio) == (frames - 1) * 1920
    # what was compiled serves the next process
    programs = {path.name for path in (tmp_path / "compiled").iterdir()}
    assert any("advance" in name for name in programs), programs


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C raises ``KeyboardInterrupt``; in the background of a shell, processes are started to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_sigterm_keeps_what_there_is(interrupts: None) -> None:
    """As a job that is preempted gets it; the second one is as always."""
    watcher, heard = Watcher(lambda: None, lambda frames: None), []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with stopped_by_interrupt(watcher):
            signal.raise_signal(signal.SIGTERM)
            assert watcher.interrupted and watcher.terminated and not heard
            signal.raise_signal(signal.SIGTERM)
            assert heard == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_second_interrupt_is_as_always(interrupts: None) -> None:
    watcher = Watcher(lambda: None, lambda frames: None)
    with stopped_by_interrupt(watcher):
        assert not watcher.interrupted
        signal.raise_signal(signal.SIGINT)
        assert watcher.interrupted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_watcher_counts_frames_but_not_the_prompt() -> None:
    counted: list[int] = []
    began: list[bool] = []
    watcher = Watcher(lambda: began.append(True), counted.append)
    watcher.put(np.zeros((1, 7), np.int32))
    for _ in range(3):
        watcher.put(np.zeros((1,), np.int32))
    assert began == [True] and sum(counted) == 3
    watcher.interrupted = True
    with pytest.raises(StopGeneration):
        watcher.put(np.zeros((1,), np.int32))
    watcher.end()


def test_cache_lies_beside_the_hub_s_unless_another_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name, before = "jax_compilation_cache_dir", jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    try:
        jax.config.update(name, None)
        use_compilation_cache()
        assert Path(jax.config.jax_compilation_cache_dir).is_relative_to(tmp_path)
        jax.config.update(name, "elsewhere")
        use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == "elsewhere"
    finally:
        jax.config.update(name, before)
