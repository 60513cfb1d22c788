"""A run that is killed at any time and started again ends with the same numbers, to the bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from tests.training.runs import run_values, write_inputs
from transformers_moshi_flax.training.run_folder import export_checkpoint

STEPS, KILLS, PATIENCE = 30, 10, 300.0
TEMPORARY = "*orbax-checkpoint-tmp*"


class Nursery:
    """A process that has imported everything, and forks one that trains whenever it is asked to.

    Imports are most of a start, and the runs here are to be many.
    """

    def __init__(self, process: subprocess.Popen):
        self._process = process

    def start(self, config: Path, place: str = "") -> int:
        """The id of a process that runs ``moshi-flax train`` on ``config``, and hears nothing any more in ``place``.

        What it tells is in ``stderr`` beside the configuration, where ``mark`` is made when it has come to that place.
        """
        self._process.stdin.write(f"{json.dumps([str(config), place])}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self) -> int:
        """How the process ended that was started last: its exit code, or minus the signal."""
        return int(self._process.stdout.readline())


NURSERY = """
import ctypes, json, os, sys
from pathlib import Path
from transformers_moshi_flax.cli import main
from transformers_moshi_flax.training import evaluation, run_folder, trainer

PLACES = {
    "evaluation": (trainer, "evaluate"),
    "sample": (evaluation.FlaxMoshiForConditionalGeneration, "generate"),
    "first step": (trainer._Meter, "count"),
    "export": (run_folder.FlaxMoshiForConditionalGeneration, "save_pretrained"),
}

def be_deaf(*args, **kwargs):
    # as a compilation is: one long call, in which no handler of Python's runs
    (folder / "mark").touch()
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)

for line in sys.stdin:
    config, place = json.loads(line)
    child = os.fork()
    if child == 0:
        folder = Path(config).parent
        errors = os.open(folder / "stderr", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(errors, 1)
        os.dup2(errors, 2)
        if place:
            setattr(*PLACES[place], be_deaf)
        main(["train", config])
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def children(keeping: dict[str, str]) -> Iterator[Nursery]:
    process = subprocess.Popen(
        [sys.executable, "-c", NURSERY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | keeping,
    )
    try:
        yield Nursery(process)
    finally:
        process.communicate(timeout=PATIENCE)


def write_config(folder: Path, name: str) -> Path:
    values = run_values(
        folder, run__output_dir=str(folder / name), run__steps=STEPS, run__checkpoint_every=1, run__max_to_keep=2
    )
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def lines(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def wait_for(condition, process: int) -> None:
    """Until the condition holds or the process is gone."""
    end = time.monotonic() + PATIENCE
    while not condition() and Path(f"/proc/{process}").exists():
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.001)


def timeless(record: dict) -> dict:
    return {
        name: value
        for name, value in record.items()
        if name not in ("frames_per_second", "steps_per_second", "data_wait")
    }


@pytest.mark.slow
def test_killed_runs_end_as_one_that_was_not(children: Nursery, tmp_path: Path) -> None:
    draw = random.Random(0)
    write_inputs(tmp_path)
    children.start(write_config(tmp_path, "whole"))
    assert children.wait() == 0
    config, run = write_config(tmp_path, "killed"), tmp_path / "killed"
    torn = 0
    for kill in range(KILLS):
        before = len(lines(run))
        process = children.start(config)
        if kill == 0:  # before the first step, while the folder is made ready
            wait_for(lambda: (run / "model").exists() or (run / "frozen").exists(), process)
            time.sleep(draw.uniform(0, 0.02))
        elif kill % 2:  # in the middle of a save
            wait_for(lambda before=before: len(lines(run)) > before, process)
            wait_for(lambda: any((run / "checkpoints").glob(TEMPORARY)), process)
            time.sleep(draw.uniform(0, 0.02))
        elif kill % 4 == 0:  # anywhere between two steps
            wait_for(lambda before=before: len(lines(run)) > before, process)
            time.sleep(draw.uniform(0, 0.3))
        else:  # before the first step
            time.sleep(draw.uniform(0, 2))
        os.kill(process, signal.SIGKILL)
        assert children.wait() == -signal.SIGKILL, (tmp_path / "stderr").read_text()
        assert kill or not lines(run)
        torn += any((run / "checkpoints").glob(TEMPORARY))
    assert torn, "no save was torn, so this proves nothing about them"
    assert len(lines(run)) < STEPS
    children.start(config)
    assert children.wait() == 0, (tmp_path / "stderr").read_text()

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert [timeless(line) for line in lines(killed)] == [timeless(line) for line in lines(whole)]
    exported = [load_file(run / "export" / "flax_model.safetensors") for run in (whole, killed)]
    assert exported[0].keys() == exported[1].keys()
    for name, array in exported[0].items():
        np.testing.assert_array_equal(array, exported[1][name], name)
    assert not list((killed / "checkpoints").glob(TEMPORARY))
    assert sorted(entry.name for entry in (killed / "checkpoints").iterdir()) == [str(STEPS - 1), str(STEPS)]
    # what was exported is what the checkpoint has
    export_checkpoint(killed, tmp_path / "again")
    again = load_file(tmp_path / "again" / "flax_model.safetensors")
    for name, array in exported[0].items():
        np.testing.assert_array_equal(array, again[name], name)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_first(children: Nursery, tmp_path: Path, number: signal.Signals) -> None:
    write_inputs(tmp_path)
    values = run_values(tmp_path, run__steps=100_000, run__checkpoint_every=100_000)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    process = children.start(config)
    wait_for(lambda: len(lines(tmp_path / "run")) > 3, process)
    os.kill(process, number)
    assert children.wait() == 128 + number
    (step,) = [int(entry.name) for entry in (tmp_path / "run" / "checkpoints").iterdir()]
    assert step == lines(tmp_path / "run")[-1]["step"]
    message = (tmp_path / "stderr").read_text().splitlines()[-1]
    assert number.name in message and f"checkpoint of step {step} is written" in message


@pytest.mark.parametrize("place", ["evaluation", "sample", "first step", "export"])
def test_terminated_where_no_handler_runs(children: Nursery, tmp_path: Path, place: str) -> None:
    """The process ends in seconds, with the checkpoint of all steps, and without a part of an export."""
    write_inputs(tmp_path)
    held_out = {"data__evaluation": str(tmp_path / "held-out"), "run__samples": 1, "run__sample_frames": 5}
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(run_values(tmp_path, run__steps=2, run__checkpoint_every=50, **held_out)))
    process = children.start(config, place)
    wait_for((tmp_path / "mark").exists, process)
    begin = time.monotonic()
    os.kill(process, signal.SIGTERM)
    code, told = children.wait(), (tmp_path / "stderr").read_text()
    assert time.monotonic() - begin < 30
    kept = [entry.name for entry in (run / "checkpoints").iterdir() if entry.name.isdecimal()]
    assert kept == ([] if place == "first step" else ["2"])
    if place == "export":
        assert code == -signal.SIGTERM and not (run / "export").exists()
    else:
        assert code == 128 + signal.SIGTERM, told
        assert ("no step is made yet" if place == "first step" else "checkpoint of step 2 is written") in told
