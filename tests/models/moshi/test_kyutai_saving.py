"""Saving in Kyutai's format as one commit: what a killed save and two savers at once leave behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.models.moshi import saving_kyutai
from tests.training.runs import smaller_config
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
from transformers_moshi_flax.checkpoints.files import CheckpointNotFoundError
from transformers_moshi_flax.checkpoints.formats import open_safetensors
from transformers_moshi_flax.models.moshi.kyutai_flax_moshi import find_kyutai_files

ROOT = Path(__file__).parents[3]
FILES = 5
"""Of a checkpoint: weights of both models, their configurations, the tokenizer."""


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the processes make checkpoints of."""
    folder = tmp_path_factory.mktemp("described")
    config = smaller_config()
    shapes = flatten_dict(FlaxMoshiForConditionalGeneration(config, _do_init=False).params_shape_tree, sep="/")
    config.to_json_file(folder / "config.json")
    (folder / "shapes.json").write_text(json.dumps({path: leaf.shape for path, leaf in shapes.items()}))
    (folder / "tokenizer_spm_32k_3.model").write_bytes(b"a SentencePiece model")
    return folder


@pytest.fixture
def inputs(described: Path, tmp_path: Path) -> Path:
    shutil.copytree(described, tmp_path, dirs_exist_ok=True)
    return tmp_path


def loaded_value(folder: Path) -> int:
    """Which checkpoint lies in the folder; fails if it isn't one whole checkpoint."""
    files = find_kyutai_files(folder)
    tensors = [*open_safetensors(files.moshi_weights).values(), *open_safetensors(files.mimi_weights).values()]
    (value,) = {float(number) for tensor in tensors for number in np.unique(tensor)}
    assert files.tokenizer.read_bytes() == b"a SentencePiece model"
    return int(value)


@pytest.mark.parametrize("old", ["old", "absent"])
def test_a_killed_save_leaves_the_old_or_the_new_checkpoint(inputs: Path, old: str):
    if old == "old":
        saving_kyutai.save(inputs, inputs / "old", 1)
    run = subprocess.run(
        [sys.executable, "-m", saving_kyutai.__name__, "kill", str(inputs), old],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    points = int(run.stdout)
    assert points >= 40
    values = []
    for point in range(1, points + 1, saving_kyutai.STEP):
        folder = inputs / f"killed-{point}"
        if old == "absent" and not (folder / "config.json").exists():
            continue
        values.append(loaded_value(folder))
    assert values == sorted(values) and set(values) == ({1, 2} if old == "old" else {2}), values
    # the next save finds its way in whatever was left, and tidies up
    for point in range(1, points + 1, 2 * saving_kyutai.STEP):
        saving_kyutai.save(inputs, inputs / f"killed-{point}", 3)
        assert loaded_value(inputs / f"killed-{point}") == 3
        left = sorted(path.name for path in (inputs / f"killed-{point}").iterdir())
        assert len(left) == FILES, left


def test_two_savers_at_once(inputs: Path):
    command = [sys.executable, "-m", saving_kyutai.__name__, "save", str(inputs)]
    savers = [subprocess.Popen([*command, value], cwd=ROOT) for value in ("1", "2")]
    assert [saver.wait(timeout=120) for saver in savers] == [0, 0]
    for folder in inputs.glob("both-*"):
        assert loaded_value(folder) in (1, 2)
        left = sorted(path.name for path in folder.iterdir())
        assert len(left) == FILES, left


def test_files_of_others_stay(inputs: Path):
    folder = inputs / "kyutai"
    saving_kyutai.save(inputs, folder, 1)
    names = ("notes-01234567.md", "model-large.safetensors", "voice.model", "README.md")
    for name in names:
        (folder / name).write_text("mine")
    saving_kyutai.save(inputs, folder, 2)
    assert loaded_value(folder) == 2
    assert [(folder / name).read_text() for name in names] == ["mine"] * len(names)


def test_a_failed_save_leaves_nothing(inputs: Path, monkeypatch: pytest.MonkeyPatch):
    saving_kyutai.save(inputs, inputs / "kyutai", 1)
    before = {path.name: path.read_bytes() for path in (inputs / "kyutai").iterdir()}
    (inputs / "tokenizer_spm_32k_3.model").write_bytes(b"another one, to be copied")

    def full(source: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(shutil, "copyfile", full)
    for folder in ("kyutai", "new"):
        with pytest.raises(OSError, match="no space left"):
            saving_kyutai.save(inputs, inputs / folder, 2)
    assert {path.name: path.read_bytes() for path in (inputs / "kyutai").iterdir()} == before
    assert not list((inputs / "new").iterdir())
    with pytest.raises(CheckpointNotFoundError):
        find_kyutai_files(inputs / "new")
