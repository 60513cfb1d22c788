"""The cache of compiled programs: damaged, orphaned, unwritable, of others; it costs a line at most, and heals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

import jax
import pytest

from transformers_moshi_flax.cli import compilation_cache
from transformers_moshi_flax.cli.compilation_cache import CHECKED, is_whole, tell_once, tidy, use_compilation_cache

PROGRAM = zlib.compress(bytes(range(256)) * 40)


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch):
    """Those of the process are as before; the cache itself is not opened here."""
    names = (
        "jax_compilation_cache_dir",
        "jax_enable_compilation_cache",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_compilation_cache_max_size",
    )
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        yield
    for name, value in before.items():
        jax.config.update(name, value)


def entry(folder: Path, name: str, content: bytes = PROGRAM) -> Path:
    path = folder / f"{name}-cache"
    path.write_bytes(content)
    return path


def test_damaged_entries_go(tmp_path: Path):
    whole = entry(tmp_path, "jit_step")
    for name, content in {
        "cut": PROGRAM[:50],
        "empty": b"",
        "other": b"nonsense",
        "zstd": b"\x28\xb5\x2f\xfd1",
    }.items():
        entry(tmp_path, name, content)
    tidy(tmp_path)
    # what is compressed in a way that this Python cannot read is somebody else's
    kept = {whole.name, CHECKED} | ({"zstd-cache"} if compilation_cache._zstd() is None else set())
    assert {path.name for path in tmp_path.iterdir()} == kept
    entry(tmp_path, "jit_step", PROGRAM[:-1])
    tidy(tmp_path)
    assert not whole.exists()


def test_what_was_whole_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = entry(tmp_path, "jit_step")
    tidy(tmp_path)
    read = []
    monkeypatch.setattr(compilation_cache, "is_whole", lambda path: read.append(path.name) or is_whole(path))
    tidy(tmp_path)
    assert not read
    os.truncate(path, 20)
    entry(tmp_path, "jit_new")
    tidy(tmp_path)
    assert sorted(read) == ["jit_new-cache", "jit_step-cache"] and not path.exists()
    (tmp_path / CHECKED).write_text("{")
    tidy(tmp_path)
    assert set(json.loads((tmp_path / CHECKED).read_text())) == {"jit_new-cache"}


def test_orphans_beside_a_limit(tmp_path: Path):
    """Without its time, JAX would write no entry any more."""
    entry(tmp_path, "jit_step")
    (tmp_path / "jit_gone-atime").write_bytes(bytes(8))
    tidy(tmp_path, limited=True)
    assert len((tmp_path / "jit_step-atime").read_bytes()) == 8 and not (tmp_path / "jit_gone-atime").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    (tmp_path / "file").touch()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file" / "compiled"))
    use_compilation_cache()
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "compiled programs are not kept" in told and "JAX_COMPILATION_CACHE_DIR" in told
    assert not jax.config.jax_enable_compilation_cache


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """What is there is read, and nothing is tried to be written."""

    def refuse(*args: object, **options: object) -> None:
        raise OSError(30, "Read-only file system", str(tmp_path))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # stands in for a file system, which would not stop root
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_compilation_cache_max_size", 10_000)
    use_compilation_cache()
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "Read-only file system" in told
    assert jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_max_size == -1
    assert jax.config.jax_persistent_cache_min_compile_time_secs == float("inf")


def test_turned_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    jax.config.update("jax_enable_compilation_cache", False)
    use_compilation_cache()
    assert not list(tmp_path.iterdir())


def test_one_line_for_all_warnings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    others = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *where: others.append(str(message)))
    with warnings.catch_warnings():
        warnings.resetwarnings()
        tell_once()
        for name in ("step", "prefill", "step"):
            text = f"Error writing persistent compilation cache entry for '{name}': OSError: disk full"
            warnings.warn(text, stacklevel=1)
        warnings.warn("another", stacklevel=1)
    told = capsys.readouterr().err
    assert told == "moshi-flax: a compiled program could not be kept or read: disk full\n" and others == ["another"]


CODE = """
import jax
from transformers_moshi_flax.cli.compilation_cache import use_compilation_cache
use_compilation_cache()
print(jax.jit(lambda x: x * 3 + 1)(2.0))
"""


@pytest.mark.parametrize("limit", ["-1", "10000000"])
def test_jax_writes_anew_what_was_cut_off(tmp_path: Path, limit: str):
    """Real processes: one fills the cache, which is then cut off and loses its times; the next ones say nothing."""
    variables = {
        "HF_HOME": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_COMPILATION_CACHE_MAX_SIZE": limit,
    }

    def run() -> dict[str, int]:
        run = subprocess.run(
            [sys.executable, "-c", CODE], env={**os.environ, **variables}, capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == "7.0" and run.stderr == ""
        return {path.name: path.stat().st_size for path in tmp_path.rglob("*-cache")}

    sizes = run()
    assert sizes
    first = next(tmp_path.rglob("*-cache"))
    os.truncate(first, 10)
    for path in tmp_path.rglob("*-atime"):
        path.unlink()
    again = run()
    assert again.keys() == sizes.keys() and min(again.values()) > 10
