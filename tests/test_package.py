"""The package from outside: quick to import, no torch needed, every public name there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import transformers_moshi_flax
import transformers_moshi_flax.training

# Finding nothing is what an environment without torch does; raising would be noticed by those who only ask.
NO_TORCH = """
import sys
class WithoutTorch:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "torch" else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [WithoutTorch(finder) for finder in sys.meta_path]
"""


def run(code: str, *args: str, cwd: Path) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_import_is_lazy(tmp_path: Path):
    code = "import sys, transformers_moshi_flax; print(*sys.modules)"
    loaded = set(run(code, cwd=tmp_path).stdout.split())
    assert not loaded & {"jax", "flax", "torch", "transformers", "numpy"}


def test_torch_is_really_hidden(tmp_path: Path):
    code = NO_TORCH + "import importlib.util; print(importlib.util.find_spec('torch'))"
    assert run(code, cwd=tmp_path).stdout.strip() == "None"


def test_whole_demo_without_torch(tmp_path: Path):
    code = NO_TORCH + (
        "from transformers_moshi_flax.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    assert not any(name.partition('.')[0] == 'torch' for name in sys.modules)\n"
    )
    done = run(code, "generate", "--output", "demo.wav", "--max-new-frames", "5", cwd=tmp_path)
    record = json.loads((tmp_path / "demo.json").read_text())
    assert done.stdout.strip() == record["text"]
    assert len(record["text_ids"]) == 5
    assert (tmp_path / "demo.wav").stat().st_size > 4 * 1920 * 2


@pytest.mark.parametrize("package", [transformers_moshi_flax, transformers_moshi_flax.training])
def test_public_names_resolve(package: ModuleType):
    assert package.__all__ == dir(package)
    for name in package.__all__:
        assert getattr(getattr(package, name), "__name__", name) == name


def test_unknown_name():
    with pytest.raises(AttributeError, match="FlaxMosh"):
        _ = transformers_moshi_flax.FlaxMosh


def test_version_is_that_of_the_distribution():
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("transformers-moshi-flax")
    except PackageNotFoundError:
        pytest.skip("the package is on the path, not installed")
    assert installed == transformers_moshi_flax.__version__
