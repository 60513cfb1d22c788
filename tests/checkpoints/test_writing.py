"""Saving as one commit: forms, transitions, and what a killed, crowded, full or read-only save leaves behind."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoints import saving
from transformers_moshi_flax.checkpoints import writing
from transformers_moshi_flax.checkpoints.files import (
    FLAX_INDEX,
    FLAX_MSGPACK,
    FLAX_WEIGHTS,
    LAYOUTS,
    MARKERS,
    PT_WEIGHTS,
    CheckpointNotFoundError,
    Source,
    fingerprint,
)
from transformers_moshi_flax.checkpoints.rules import FileTensor

FORMS = ["single", "sharded", "msgpack", "sharded msgpack", "pt", "sharded pt"]
ROOT = Path(__file__).parents[2]


def loaded_value(folder: Path, from_pt: bool | None = None) -> int:
    """Which checkpoint lies in the folder; fails if it isn't one whole checkpoint with its own configuration."""
    source = Source.locate(folder)
    layout, tensors = source.weights(from_pt)
    assert from_pt is None or layout == ("pt" if from_pt else "flax")
    (value,) = {float(number) for tensor in tensors.values() for number in np.unique(tensor)}
    expected = saving.tensors(int(value))
    assert {key: tensor.shape for key, tensor in tensors.items()} == {k: t.shape for k, t in expected.items()}
    assert source.read_json("config.json", from_pt) == {"value": value}
    assert source.read_json("generation_config.json", from_pt) == {"v": value}
    if from_pt is None:  # whoever insists on a layout gets a whole one, too, or none
        for insists in (True, False):
            with contextlib.suppress(CheckpointNotFoundError):
                loaded_value(folder, insists)
    return int(value)


def files_of(form: str) -> int:
    return 5 if "sharded" in form else 1


@pytest.mark.parametrize("old", FORMS)
@pytest.mark.parametrize("new", FORMS)
def test_every_form_replaces_every_form(tmp_path: Path, old: str, new: str):
    saving.save(tmp_path, 1, old)
    assert loaded_value(tmp_path) == 1
    saving.save(tmp_path, 2, new)
    assert loaded_value(tmp_path) == 2
    weights = [path for path in tmp_path.iterdir() if path.name.startswith(("flax_model", "model"))]
    assert len(list(tmp_path.iterdir())) == len(weights) + 2, "litter"
    assert len(weights) == files_of(new)


def test_shard_names_are_those_of_transformers_when_they_are_free(tmp_path: Path):
    saving.save(tmp_path, 1, "sharded")
    index = json.loads((tmp_path / FLAX_INDEX).read_text())
    first = set(index["weight_map"].values())
    assert first == {f"flax_model-{number:05d}-of-00004.safetensors" for number in range(1, 5)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in saving.tensors(1).values())
    saving.save(tmp_path, 2, "sharded")
    second = set(json.loads((tmp_path / FLAX_INDEX).read_text())["weight_map"].values())
    assert not first & second and len(second) == len(first)


@pytest.mark.parametrize(
    "size, expected",
    [
        (1, 1),
        (np.int64(7), 7),
        ("5GB", 5 * 10**9),
        ("1.5GB", 1_500_000_000),
        (" 1 mb ", 10**6),
        ("2KiB", 2048),
        ("2gib", 1 << 31),
        ("1TB", 10**12),
        ("100B", 100),
        ("0.0015MB", 1500),
        ("123456", 123456),
        (10**17 + 1, 10**17 + 1),
    ],
)
def test_sizes_of_shards(size: int | str, expected: int):
    assert writing.shard_bytes(size) == expected


@pytest.mark.parametrize(
    "size",
    [
        0,
        -1,
        True,
        1.5,
        None,
        "",
        "big",
        "0MB",
        "0.5B",
        "-1GB",
        "1e3",
        "5G",
        "5iB",
        "5 GB GB",
        "GB",
        "1,5GB",
        "inf",
        "٣GB",
        [5],
    ],
)
def test_what_is_no_size_of_a_shard(size: object):
    with pytest.raises(ValueError, match=f"max_shard_size={re.escape(repr(size))} .*500MB"):
        writing.shard_bytes(size)


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(1, 60))
def test_shards_keep_the_order_and_the_limit(sizes: list[int], limit: int):
    tensors = [FileTensor(str(number), size, lambda: np.zeros(1)) for number, size in enumerate(sizes)]
    shards = writing.plan_shards(tensors, limit)
    assert [tensor for shard in shards for tensor in shard] == tensors
    assert all(sum(tensor.nbytes for tensor in shard) <= limit or len(shard) == 1 for shard in shards)
    following = itertools.pairwise(shards)
    assert all(sum(tensor.nbytes for tensor in shard) + after[0].nbytes > limit for shard, after in following)


@pytest.mark.parametrize(
    "old, new",
    [
        ("sharded", "sharded"),
        ("single", "sharded"),
        ("sharded", "sharded msgpack"),
        ("sharded pt", "single"),
        ("several", "pt"),
    ],
)
def test_a_killed_save_leaves_the_old_or_the_new_checkpoint(tmp_path: Path, old: str, new: str):
    saving.save(tmp_path / "old", 1, "single" if old == "several" else old)
    if old == "several":  # as other programs leave it: the same in another layout, and a stale one
        for value, form, name in ((1, "pt", PT_WEIGHTS), (0, "msgpack", FLAX_MSGPACK)):
            saving.save(tmp_path / form, value, form)
            shutil.copy(tmp_path / form / name, tmp_path / "old")
    run = subprocess.run(
        [sys.executable, "-m", "tests.checkpoints.saving", "kill", str(tmp_path), new],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    points = int(run.stdout) - 1  # the last one came to the end
    assert points >= (40 if "sharded" in new else 20)
    values = [loaded_value(tmp_path / f"killed-{point}") for point in range(1, points + 2)]
    assert values == sorted(values) and set(values) == {1, 2}, values
    # the next save finds its way in whatever was left, and tidies up
    for point in range(1, points + 1):
        folder = tmp_path / f"killed-{point}"
        saving.save(folder, 3, new)
        assert loaded_value(folder) == 3
        assert len(list(folder.iterdir())) == files_of(new) + 2


@pytest.mark.parametrize("weight", [2, 1])
def test_before_the_commit_no_likeness_of_the_old_file_to_the_new_one_counts(tmp_path: Path, weight: int):
    """Ends and size are the same, or with weight 1 everything but the configuration."""
    saving.save_large(tmp_path, 1, 1)
    command = [sys.executable, "-m", "tests.checkpoints.saving", "die", str(tmp_path), str(weight)]
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == -signal.SIGKILL
    source = Source.locate(tmp_path)
    assert list(tmp_path.glob(MARKERS)) and source.weights()[1]["b"][0] == 1
    assert source.read_json("config.json") == {"value": 1}
    # a copy may lack temporary files: where weights differ, it is the old checkpoint all the same
    next(tmp_path.glob(".*.tmp")).unlink()
    assert source.read_json("config.json") == {"value": 1 if weight == 2 else 2}


def test_markers_of_strangers_write_nothing_outside(tmp_path: Path):
    folder = tmp_path / "inner"
    saving.save(folder, 1, "single")
    fields = {
        "entry": FLAX_WEIGHTS,
        "temporary": ".gone",
        "fingerprint": fingerprint(folder / FLAX_WEIGHTS, FLAX_WEIGHTS),
    }
    more = {"replaces": ["../escaped"], "files": {"../escaped": "x", "note": "y"}}
    (folder / ".save-0.json").write_text(json.dumps({**fields, **more}))
    saving.save(folder, 2, "single")
    assert not (tmp_path / "escaped").exists() and (folder / "note").read_text() == "y"


def test_two_savers_at_once(tmp_path: Path):
    command = [sys.executable, "-m", "tests.checkpoints.saving", "save", str(tmp_path)]
    savers = [subprocess.Popen([*command, value], cwd=ROOT) for value in ("1", "2")]
    assert [saver.wait(timeout=120) for saver in savers] == [0, 0]
    assert loaded_value(tmp_path) in (1, 2)
    assert len(list(tmp_path.iterdir())) == files_of("sharded") + 2


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("entry", ["flax_model.safetensors", "flax_model.msgpack"])
@pytest.mark.parametrize("shard_bytes", [1 << 20, 30_000])
def test_a_full_disk_leaves_the_old_checkpoint(small_disk: Path, entry: str, shard_bytes: int):
    saving.save(small_disk, 1, "sharded")
    before = {path.name: path.read_bytes() for path in small_disk.iterdir()}
    large = [FileTensor(str(number), 28_000, lambda: np.ones(7_000, np.float32)) for number in range(4)]
    with pytest.raises(OSError, match=r"No space left|cannot write"):
        writing.save_checkpoint(small_disk, "flax", entry, large, shard_bytes, {"config.json": "{}"})
    assert {path.name: path.read_bytes() for path in small_disk.iterdir()} == before
    assert loaded_value(small_disk) == 1


def test_a_read_only_directory_stays_as_it_is(small_disk: Path):
    saving.save(small_disk, 1, "single")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match="Read-only file system"):
        saving.save(small_disk, 2, "single")
    assert loaded_value(small_disk) == 1


def test_a_failure_after_the_commit_keeps_the_new_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saving.save(tmp_path, 1, "single")
    write_text = writing.write_text

    def failing(path: Path, text: str) -> None:
        if path.name == "config.json":
            raise OSError("disk full")
        write_text(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_text", failing)
        with pytest.raises(OSError, match="disk full"):
            saving.save(tmp_path, 2, "single")
    assert loaded_value(tmp_path) == 2
    assert json.loads((tmp_path / "config.json").read_text()) == {"value": 1}, "else nothing was tested"


def test_a_failure_right_after_the_commit_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where there are no configuration files that would tell that the save is committed."""
    tensors = [FileTensor(str(number), 28, lambda: np.ones(7, np.float32)) for number in range(3)]
    sync = writing._sync

    def failing(path: Path) -> None:
        if path == tmp_path and (tmp_path / FLAX_INDEX).exists():
            raise OSError("input/output error")
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_sync", failing)
        with pytest.raises(OSError, match="input/output error"):
            writing.save_checkpoint(tmp_path, "flax", "flax_model.safetensors", tensors, 30, {})
    assert set(Source.locate(tmp_path).weights()[1]) == {"0", "1", "2"}


def test_files_of_others_stay(tmp_path: Path):
    names = ["README.md", "adapter.safetensors", "adapter-00001-of-00001.safetensors", "pytorch_lora.bin"]
    for name in names:
        (tmp_path / name).write_text("mine")
    for form in FORMS:
        saving.save(tmp_path, 1, form)
    assert [(tmp_path / name).read_text() for name in names] == ["mine"] * len(names)


def test_pickles_stay_where_their_layout_does(tmp_path: Path):
    names = ("pytorch_model.bin", "pytorch_model-00001-of-00001.bin")
    for name in names:
        (tmp_path / name).write_text("{}")
    tensors = [FileTensor("a", 4, lambda: np.zeros(1, np.float32))]
    writing.save_checkpoint(tmp_path, "flax", FLAX_WEIGHTS, tensors, 1 << 20, {}, LAYOUTS["flax"])
    assert all((tmp_path / name).exists() for name in names)


def test_pickles_go_too(tmp_path: Path):
    """They would be loaded, on demand, with the configuration of the new checkpoint."""
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"):
        (tmp_path / name).write_text("{}")
    saving.save(tmp_path, 1, "single")
    assert len(list(tmp_path.iterdir())) == files_of("single") + 2
