"""What the tests of the command line share: running it, and files to give it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.random_model import RANDOM_MODEL
from transformers_moshi_flax.cli import checkpoints, complete, generate, live, main, train


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests neither read nor fill the user's cache of compiled programs."""
    for command in (complete, generate, live, train):
        monkeypatch.setattr(command, "use_compilation_cache", lambda: None)


@pytest.fixture(autouse=True)
def embedded_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model is the random one, which compiles faster and never falls silent."""
    monkeypatch.setattr(checkpoints, "EMBEDDED_MODEL", RANDOM_MODEL)


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def moshi_flax(capsys: pytest.CaptureFixture) -> Callable[..., Result]:
    """Run the command in this process."""

    def run(*args: object) -> Result:
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Result(stop.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """A second and a bit of stereo noise at 8 kHz, as a WAV file."""
    path = tmp_path / "speech.wav"
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, (8_500, 2))
    soundfile.write(path, noise, 8_000)
    return path


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny Mimi with weights that hide nothing, saved by upstream and by us in every way. Not to be changed."""
    from transformers import MimiModel

    from tests.configs import tiny_mimi_config
    from tests.torch_oracle import randomize
    from transformers_moshi_flax import FlaxMimiModel

    folder = tmp_path_factory.mktemp("layouts")
    randomize(MimiModel(tiny_mimi_config())).save_pretrained(folder / "upstream")
    model = FlaxMimiModel.from_pretrained(folder / "upstream")
    model.save_pretrained(folder / "flax")
    model.save_pretrained(folder / "flax-shards", max_shard_size="40KB")
    model.save_pretrained(folder / "msgpack", safe_serialization=False)
    model.save_pretrained(folder / "pt", to_pt=True)
    model.save_pretrained(folder / "pt-shards", to_pt=True, max_shard_size="40KB")
    named = ("upstream", "flax", "flax-shards", "msgpack", "pt", "pt-shards")
    return {name: folder / name for name in named} | {"file": folder / "flax" / "flax_model.safetensors"}


@pytest.fixture(scope="session")
def moshi(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny Moshi with weights that hide nothing, saved by upstream (``pt``) and by us (``flax``). As ``layouts``."""
    from transformers import MoshiForConditionalGeneration

    from tests.configs import tiny_moshi_config
    from tests.torch_oracle import randomize
    from transformers_moshi_flax import FlaxMoshiForConditionalGeneration

    folder = tmp_path_factory.mktemp("moshi")
    randomize(MoshiForConditionalGeneration(tiny_moshi_config())).save_pretrained(folder / "pt")
    FlaxMoshiForConditionalGeneration.from_pretrained(folder / "pt").save_pretrained(folder / "flax")
    return {name: folder / name for name in ("pt", "flax")}
