"""``train`` and ``export-checkpoint``: mistakes are one line; whole runs are in ``tests/training``."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
import yaml

from tests.training.runs import run_values, write_inputs
from transformers_moshi_flax.training import run_checkpoints, trainer
from transformers_moshi_flax.training.data import loading


@pytest.fixture
def config(tmp_path: Path) -> Path:
    write_inputs(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(run_values(tmp_path)))
    return path


def assert_mistake(result, code: int, *words: str) -> None:
    assert (result.code, result.out) == (code, "")
    assert result.err.count("\n") == 1 and result.err.startswith("moshi-flax: error: ")
    for word in words:
        assert word in result.err


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("run.stepz=3", ["config.yaml", "run.stepz", "'steps'"]),
        ("data.train=nowhere", ["data.train", "nowhere"]),
        ("run.steps=0", ["run.steps", "1 or more"]),
        ("mesh.data=2", ["mesh", "devices"]),
    ],
)
def test_mistakes_in_the_configuration(moshi_flax, config: Path, assignment: str, words: list[str]) -> None:
    assert_mistake(moshi_flax("train", config, "--set", assignment), 2, *words)
    assert not (config.parent / "run").exists()


def test_no_configuration(moshi_flax, tmp_path: Path) -> None:
    assert_mistake(moshi_flax("train", tmp_path / "none.yaml"), 2, "none.yaml")


@pytest.mark.parametrize("package", ["yaml", "grain"])
def test_without_the_extra(moshi_flax, config: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for name in [name for name in sys.modules if name.startswith("transformers_moshi_flax.training")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert_mistake(moshi_flax("train", config), 2, package, 'pip install "transformers-moshi-flax[train]"')


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (trainer.NotFiniteError("10 steps in a row"), 1),
        (run_checkpoints.DamagedCheckpointError("no checkpoint is whole"), 1),
        (loading.WorkerError("one of these processes has ended"), 1),
        (OSError("no space left on the disk"), 1),
        (trainer.Interrupted(signal.SIGTERM, 7), 143),
        (trainer.Interrupted(signal.SIGINT, 7), 130),
    ],
)
def test_exit_codes(moshi_flax, config: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int) -> None:
    def train(self: trainer.Trainer) -> None:
        raise error

    monkeypatch.setattr(trainer.Trainer, "train", train)
    assert_mistake(moshi_flax("train", config), code, str(error))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["nowhere", "new"], ["RUN", "nowhere"]),
        (["run", "new"], ["RUN", "no checkpoints"]),
        (["run", "new", "--step", "3", "--best"], ["--step", "--best"]),
        (["run", "run"], ["DST", "not empty"]),
        (["run", "run/config.yaml"], ["DST", "is a file"]),
    ],
)
def test_mistakes_of_an_export(
    moshi_flax, config: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(config.parent)
    (config.parent / "run").mkdir()
    (config.parent / "run" / "config.yaml").write_text(config.read_text())
    assert_mistake(moshi_flax("export-checkpoint", *options), 2, *words)
