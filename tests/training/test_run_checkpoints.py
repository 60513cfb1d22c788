"""Checkpoints of a run: what is kept, what damage does, what an interrupted save leaves."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformers_moshi_flax.training import run_checkpoints
from transformers_moshi_flax.training.run_checkpoints import (
    MANIFEST,
    METRICS_FILE,
    PARAMS,
    REST,
    WRITTEN_LAST,
    DamagedCheckpointError,
    RunCheckpoints,
    find_damage,
)

PARAMETERS = {"layers": {"0": {"kernel": jnp.arange(600, dtype=jnp.float32).reshape(20, 30)}}}
OTHERS = {"count": jnp.int32(3), "nothing": None}
METRICS = {2: 3.0, 3: 1.0, 5: 2.0}


def shapes(tree: Any) -> Any:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)


TARGETS = {PARAMS: shapes(PARAMETERS), REST: shapes(OTHERS)}


def save(checkpoints: RunCheckpoints, step: int, metric: float | None = None) -> None:
    params = jax.tree.map(lambda leaf: leaf + step, PARAMETERS)
    checkpoints.save(step, params, OTHERS, {"position": step})
    if metric is not None:
        checkpoints.add_metrics(step, {"loss": metric})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six checkpoints have been written, two are kept, and the best one. Not to be changed."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = RunCheckpoints(folder, max_to_keep=2)
    for step in range(1, 7):
        save(checkpoints, step, METRICS.get(step))
    checkpoints.close()
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def test_the_latest_and_the_best_are_kept(saved: Path) -> None:
    checkpoints = RunCheckpoints(saved, read_only=True)
    assert checkpoints.steps() == [3, 5, 6]
    assert checkpoints.best_step() == 3
    assert checkpoints.host_target(5, PARAMS)["layers"]["0"]["kernel"].shape == (20, 30)
    checkpoints.close()


def test_what_is_restored_is_what_was_saved(saved: Path) -> None:
    checkpoints = RunCheckpoints(saved, read_only=True)
    for step in (3, 6):
        found = checkpoints.restore(step, TARGETS)
        kernel = found.arrays[PARAMS]["layers"]["0"]["kernel"]
        np.testing.assert_array_equal(kernel, PARAMETERS["layers"]["0"]["kernel"] + step)
        assert found.arrays[REST]["count"] == 3 and found.arrays[REST]["nothing"] is None
        assert found.progress == {"position": step}
    with pytest.raises(ValueError, match="no checkpoint of step 4; there are: 3, 5, 6"):
        checkpoints.restore(4, TARGETS)
    checkpoints.close()


def test_an_empty_folder_has_nothing_to_restore(tmp_path: Path) -> None:
    checkpoints = RunCheckpoints(tmp_path / "checkpoints")
    assert checkpoints.restore_latest(TARGETS) is None
    checkpoints.close()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


def files(checkpoint: Path) -> list[Path]:
    names = (path.relative_to(checkpoint) for path in sorted(checkpoint.rglob("*")) if path.is_file())
    return [name for name in names if str(name) not in WRITTEN_LAST]


def test_a_flipped_bit_in_any_file_is_found(folder: Path, tmp_path: Path) -> None:
    names = files(folder / "5")
    assert len(names) > 10 and find_damage(folder / "5") == []
    for name in names:
        damaged = Path(shutil.copytree(folder / "5", tmp_path / "damaged"))
        flip(damaged / name)
        problems = find_damage(damaged)
        assert (problems and any(Path(problem.split(" ")[0]) == name for problem in problems)) or name.name == MANIFEST
        shutil.rmtree(damaged)


@pytest.mark.parametrize("kind", ["params", "metrics", "missing", "more", MANIFEST])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    folder: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    save_to = RunCheckpoints(folder, max_to_keep=9)
    save(save_to, 7, 0.5)
    save_to.close()
    data = max(((folder / "7" / "params").rglob("*")), key=lambda path: path.is_file() and path.stat().st_size)
    victim = {"metrics": folder / "7" / METRICS_FILE, MANIFEST: folder / "7" / MANIFEST}.get(kind, data)
    if kind == "missing":
        victim.unlink()
    elif kind == "more":
        victim = folder / "7" / "params" / "more"
        victim.write_text("not ours")
    elif kind == MANIFEST:
        victim.write_bytes(victim.read_bytes()[:50])
    else:
        flip(victim)
    with caplog.at_level(logging.ERROR):
        checkpoints = RunCheckpoints(folder, max_to_keep=2)
        found = checkpoints.restore_latest(TARGETS)
    assert found.step == 6
    assert victim.name in caplog.text and str(folder / "7") in caplog.text
    assert checkpoints.best_step() == 3
    assert (folder.parent / "damaged" / "7").is_dir()
    save(checkpoints, 7)  # the step is made again
    assert checkpoints.restore_latest(TARGETS).step == 7
    checkpoints.close()


def test_metrics_come_after_the_checkpoint(folder: Path) -> None:
    """What is the best then stays; what is not, and not among the latest, goes."""
    checkpoints = RunCheckpoints(folder, max_to_keep=2)
    save(checkpoints, 7)
    assert (checkpoints.steps(), checkpoints.best_step()) == ([3, 6, 7], 3)
    assert RunCheckpoints(folder, read_only=True).restore(7, TARGETS).progress == {"position": 7}
    checkpoints.add_metrics(7, {"loss": 0.5})
    assert (checkpoints.steps(), checkpoints.best_step()) == ([6, 7], 7)
    save(checkpoints, 8)
    save(checkpoints, 9)
    checkpoints.close()
    # as somebody else sees it
    for reader in (RunCheckpoints(folder, read_only=True), RunCheckpoints(folder, max_to_keep=2)):
        assert (reader.steps(), reader.best_step()) == ([7, 8, 9], 7)
        reader.close()


def test_metrics_that_orbax_wrote_count(folder: Path) -> None:
    """As in folders of before."""
    for step, loss in ((5, 0.25), (6, 0.5)):
        (folder / str(step) / METRICS_FILE).unlink(missing_ok=True)
        (folder / str(step) / "metrics").mkdir()
        (folder / str(step) / "metrics" / "metrics").write_text(json.dumps({"loss": loss}))
    (folder / "5" / MANIFEST).write_text(json.dumps(run_checkpoints._checksums(folder / "5")))
    assert RunCheckpoints(folder, read_only=True).best_step() == 5  # that of 6 is not in its manifest


def test_nothing_is_begun_anew_where_all_are_damaged(folder: Path) -> None:
    for step in ("3", "5", "6"):
        flip(folder / step / MANIFEST)
    for _ in range(2):
        checkpoints = RunCheckpoints(folder)
        with pytest.raises(DamagedCheckpointError, match=r"no checkpoint in .* is whole"):
            checkpoints.restore_latest(TARGETS)
        checkpoints.close()


def test_leftovers_of_a_torn_save_are_removed(folder: Path) -> None:
    torn = folder / "7.orbax-checkpoint-tmp"
    shutil.copytree(folder / "6", torn)
    checkpoints = RunCheckpoints(folder, max_to_keep=2)
    assert checkpoints.restore_latest(TARGETS).step == 6
    save(checkpoints, 7)
    checkpoints.close()
    assert not torn.exists() and (folder / "7").is_dir()


@pytest.mark.parametrize("error", [OSError, ValueError])  # the latter is what Orbax raises for arrays
def test_a_checkpoint_without_its_manifest_gets_no_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*args: object) -> None:
        raise error("no space left")

    checkpoints = RunCheckpoints(folder, max_to_keep=2)
    monkeypatch.setattr(run_checkpoints, "write_text", fail)
    save(checkpoints, 7)
    with pytest.raises(
        OSError, match="checkpoint of step 7 cannot be written; those before it are kept: no space left"
    ):
        checkpoints.wait()
    monkeypatch.undo()
    assert not (folder / "7").exists()
    assert RunCheckpoints(folder, read_only=True).steps() == [3, 5, 6]
