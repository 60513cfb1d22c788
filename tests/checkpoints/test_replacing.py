"""Directories that are replaced are there whole, whatever happens in between."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from transformers_moshi_flax.checkpoints.replacing import remove_folder, whole_folder


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "some[1]" / "export"
    if there:
        fill(folder, "old", "sub/old")
    before = names(folder)
    with pytest.raises(OSError, match="full"), whole_folder(folder) as fresh:
        fill(fresh, "new")
        raise OSError("the disk is full")
    assert (
        folder.exists() == there
        and names(folder) == before
        and names(folder.parent) == (["export"] + [f"export/{name}" for name in before] if there else [])
    )
    with whole_folder(folder) as fresh:
        fill(fresh, "new", "sub/new")
        assert names(folder) == before
    assert names(folder.parent) == ["export", "export/new", "export/sub", "export/sub/new"]


def test_links_are_followed(tmp_path: Path) -> None:
    """Also to what is not there yet."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "export").symlink_to(tmp_path / "disk" / "models")
    for name in ("first", "second"):
        with whole_folder(tmp_path / "run" / "export") as fresh:
            fill(fresh, name)
        assert names(tmp_path / "disk") == ["models", f"models/{name}"]
    remove_folder(tmp_path / "run" / "export")
    assert names(tmp_path / "disk") == [] and (tmp_path / "run" / "export").is_symlink()
    remove_folder(tmp_path / "run" / "export")


KILLED = """
import os, signal, sys
from pathlib import Path
from transformers_moshi_flax.checkpoints import replacing

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

folder, where = Path(sys.argv[1]), sys.argv[2]
with replacing.whole_folder(folder) as fresh:
    (fresh / "new").write_text("new")
    if where == "inside":
        kill()
    setattr(*{"renamed": (replacing.os, "rename"), "removed": (replacing.shutil, "rmtree")}[where], kill)
"""


@pytest.mark.parametrize("where", ["inside", "renamed", "removed"])
def test_killed(tmp_path: Path, where: str) -> None:
    """By SIGKILL; the next time removes what is left, but for what another process is at work on."""
    folder, busy = tmp_path / "export", tmp_path / f".export.{'0' * 32}.tmp"
    fill(folder, "old")
    fill(busy, "export/other")
    descriptor = os.open(busy, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), where])
    assert done.returncode == -signal.SIGKILL
    assert names(folder) == (["new"] if where == "removed" else ["old"])
    with whole_folder(folder) as fresh:
        fill(fresh, "newer")
    assert names(folder) == ["newer"] and sorted(path.name for path in tmp_path.iterdir()) == [busy.name, "export"]
    os.close(descriptor)
