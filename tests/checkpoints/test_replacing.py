"""Directories that are replaced are there whole, whatever happens in between."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from transformers_moshi_flax.checkpoints.replacing import remove_folder, whole_checkpoint, whole_folder


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
    if where == "between":
        replacing.os.rename = lambda *paths, rename=os.rename: (rename(*paths), kill())
    else:
        setattr(*{"renamed": (replacing.os, "rename"), "removed": (replacing.shutil, "rmtree")}[where], kill)
"""


@pytest.mark.parametrize("where", ["inside", "renamed", "between", "removed"])
def test_killed(tmp_path: Path, where: str) -> None:
    """By SIGKILL; the next time removes what is left, but for what another process is at work on."""
    folder, busy = tmp_path / "export", tmp_path / f".export.{'0' * 32}.tmp"
    fill(folder, "old")
    fill(busy, "export/other")
    descriptor = os.open(busy, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), where])
    assert done.returncode == -signal.SIGKILL
    assert names(folder) == {"removed": ["new"], "between": []}.get(where, ["old"])
    if where == "between":  # the new one comes to its place first
        with pytest.raises(OSError, match="full"), whole_folder(folder):
            assert names(folder) == ["new"]
            raise OSError("the disk is full")
        assert names(folder) == ["new"]
    with whole_folder(folder) as fresh:
        fill(fresh, "newer")
    assert names(folder) == ["newer"] and sorted(path.name for path in tmp_path.iterdir()) == [busy.name, "export"]
    os.close(descriptor)


OLD = ["config.json", "flax_model.safetensors", "model.safetensors", "tokenizer.model", "vocab.json"]
NEW = ["config.json", "model.safetensors", "tokenizer.json"]


def fill_as(folder: Path, text: str, *files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        (folder / name).write_text(text)


@pytest.mark.parametrize("others", [["notes.txt"], ["notes.txt", "logs", "logs/one.txt"]], ids=["renamed", "filled"])
def test_a_checkpoint_is_replaced_and_other_files_stay(tmp_path: Path, others: list[str]) -> None:
    folder = tmp_path / "model"
    for time in ("absent", "old"):
        if time == "old":
            shutil.rmtree(folder)
            fill_as(folder, "old", *OLD)
            fill(folder, *(name for name in others if "." in name))
            folder.chmod(0o750)
            with pytest.raises(OSError, match="full"), whole_checkpoint(folder) as fresh:
                fill_as(fresh, "new", *NEW)
                raise OSError("the disk is full")
            assert names(folder) == sorted(OLD + others) and (folder / "config.json").read_text() == "old"
        with whole_checkpoint(folder) as fresh:
            fill_as(fresh, "new", *NEW)
        assert names(folder) == sorted(NEW + (others if time == "old" else []))
        assert all((folder / name).read_text() == "new" for name in NEW)
    assert all((folder / name).read_text() == name for name in others if "." in name)
    assert folder.stat().st_mode & 0o777 == 0o750 and names(tmp_path)[0] == "model"


KILLED_WHILE_FILLING = """
import os, signal, sys
from pathlib import Path
from transformers_moshi_flax.checkpoints import replacing

def dying(call):
    def wrapped(*args, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **options)
    return wrapped

for folder in map(Path, sys.argv[1].split(":")):
    if os.fork():
        assert os.wait()[1] == signal.SIGKILL
        continue
    with replacing.whole_checkpoint(folder) as fresh:
        for name in sys.argv[2:]:
            (fresh / name).write_text("new")
        left = int(folder.name)
        os.unlink, os.replace = dying(os.unlink), dying(os.replace)
"""


def test_killed_while_filling(tmp_path: Path) -> None:
    """What cannot be renamed never has a configuration beside files of two checkpoints; nothing is lost."""
    folders = [tmp_path / str(calls) for calls in range(len(OLD) + len(NEW))]
    for folder in folders:
        fill_as(folder, "old", *OLD)
        (folder / "logs").mkdir()
    subprocess.run([sys.executable, "-c", KILLED_WHILE_FILLING, ":".join(map(str, folders)), *NEW], check=True)
    for folder in folders:
        there = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}
        (staged,) = folder.glob(".replacement-*/new")
        if folder.name == "0":
            assert there == dict.fromkeys(OLD, "old")
        else:
            assert "config.json" not in there
            assert {name for name, text in there.items() if text == "new"} | set(names(staged)) == set(NEW)
        with whole_checkpoint(folder) as fresh:
            fill_as(fresh, "newer", *NEW)
        assert names(folder) == sorted(["logs", *NEW])
