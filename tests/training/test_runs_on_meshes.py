"""Whole runs on meshes of eight host devices and of two processes end as that of one device."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import soundfile
import yaml
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from tests.training.runs import run_values, smaller_config, write_inputs
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
from transformers_moshi_flax.training.configuration import ConfigurationError, build_configuration
from transformers_moshi_flax.training.run_folder import RunFolder
from transformers_moshi_flax.training.trainer import Trainer

PATIENCE = 400
# Adam divides small gradients by themselves: without a larger eps their rounding would be all that is compared.
OPTIONS = {
    "data__batch_size": 8,
    "optimizer__schedule": "constant",
    "optimizer__eps": 1.0,
    "optimizer__learning_rate": 0.1,
    "run__steps": 4,
    "run__evaluate_every": 2,
}

SPOKEN = {"run__samples": 1, "run__sample_frames": 5}

MESHES = """
import sys
from pathlib import Path
import yaml
from transformers_moshi_flax.training.configuration import load_configuration
from transformers_moshi_flax.training.trainer import Trainer
for config in sys.argv[1:]:
    Trainer(load_configuration(config)).train()
"""

PROCESSES = """
import os, signal, sys
from transformers_moshi_flax.cli import main
from transformers_moshi_flax.training import signals, trainer

signals.PATIENCE = 600.0  # a process ends when its loop has seen the signal, however long the evaluation takes

def run(config, process, signalled):
    put, batches = trainer.put_batch, []

    def put_batch(*arguments):
        batches.append(None)
        if len(batches) == signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        return put(*arguments)

    trainer.put_batch = put_batch
    os.dup2(2, 1)
    main(["train", config, "--set", f"distributed.process_id={process}"])

for line in sys.stdin:
    config, *signals = line.split()
    children = []
    for process, signalled in enumerate(signals):
        children.append(os.fork())
        if children[-1] == 0:
            run(config, process, int(signalled))
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
"""


def environment(devices: int) -> dict[str, str]:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def values_of(folder: Path, run: Path, **overrides: Any) -> dict[str, dict[str, Any]]:
    """The configuration of a run into the folder ``run``."""
    paths = {
        "model__config": None,
        "model__path": str(folder / "model"),
        "data__evaluation": str(folder / "held-out"),
        "run__output_dir": str(run),
    }
    return run_values(folder, **paths | OPTIONS | overrides)


def write_config(path: Path, values: dict[str, dict[str, Any]]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_equal_runs(run: Path, expected: Path) -> None:
    records, wanted = lines(run), lines(expected)
    assert [(line["step"], line["split"]) for line in records] == [(line["step"], line["split"]) for line in wanted]
    for record, line in zip(records, wanted):
        for name in ("loss", "audio_accuracy", "frames"):
            np.testing.assert_allclose(record[name], line[name], rtol=1e-5)
    params, whole = (load_file(folder / "export" / "flax_model.safetensors") for folder in (run, expected))
    assert params.keys() == whole.keys()
    for name, array in whole.items():
        np.testing.assert_allclose(params[name], array, rtol=0, atol=1e-5 * np.abs(array).max(), err_msg=name)


def assert_equal_samples(run: Path, expected: Path) -> None:
    """Those of the last evaluation, by a model whose weights lie on several devices."""
    folder, wanted = (path / "samples" / "step-4" for path in (run, expected))
    assert (folder / "0.json").read_text() == (wanted / "0.json").read_text()
    voices, voices_wanted = (soundfile.read(path / "0.wav")[0] for path in (folder, wanted))
    assert voices_wanted.shape == (5 * 16, 2) and np.abs(voices_wanted).max() > 0
    np.testing.assert_allclose(voices, voices_wanted, rtol=0, atol=1e-4 * np.abs(voices_wanted).max())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As :func:`write_inputs`, and the model with its weights."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    model = FlaxMoshiForConditionalGeneration(smaller_config())
    # upstream draws layers of the depth decoder with a deviation of 1: losses of 1000, and rounding to go with them
    depth = flatten_dict(model.params["depth_decoder"])
    scaled = {path: leaf / math.sqrt(leaf.shape[0]) if path[-1] == "kernel" else leaf for path, leaf in depth.items()}
    model.params["depth_decoder"] = unflatten_dict(scaled)
    model.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def one_device(inputs: Path) -> Path:
    """The folder of a run of four steps on one device. Not to be changed."""
    run = inputs / "one device"
    Trainer(build_configuration(values_of(inputs, run, **SPOKEN))).train()
    return run


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(
    inputs: Path, one_device: Path, tmp_path: Path, keeping: dict[str, str]
) -> None:
    run = tmp_path / "run"
    first = write_config(tmp_path / "first.yaml", values_of(inputs, run, mesh__fsdp=8, run__steps=2))
    options = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, **SPOKEN}
    second = write_config(tmp_path / "second.yaml", values_of(inputs, run, **options))
    subprocess.run(
        [sys.executable, "-c", MESHES, str(first), str(second)],
        env=environment(8) | keeping,
        check=True,
        timeout=PATIENCE,
    )
    assert_equal_runs(run, one_device)
    assert_equal_samples(run, one_device)


@contextmanager
def nursery(folder: Path, keeping: dict[str, str]) -> Iterator[Any]:
    """A function that runs a configuration in several processes, and returns their exit codes.

    The second argument tells for each process in which of its steps it is sent SIGTERM, 0 for none.
    """
    with open(folder / "stderr", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", PROCESSES],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment(1) | keeping,
        )

        def run(config: Path, *signalled: int) -> list[int]:
            process.stdin.write(f"{config} {' '.join(map(str, signalled))}\n")
            process.stdin.flush()
            return [int(code) for code in process.stdout.readline().split()]

        try:
            yield run
        finally:
            process.communicate(timeout=PATIENCE)


@pytest.mark.slow
def test_processes_that_are_stopped_end_as_one(
    inputs: Path, one_device: Path, tmp_path: Path, keeping: dict[str, str]
) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = {"coordinator_address": address, "num_processes": 2, "process_id": 0}
    options = {f"distributed__{key}": value for key, value in processes.items()}
    options["model__scan_layers"] = True
    config = write_config(tmp_path / "two.yaml", values_of(inputs, tmp_path / "run", mesh__fsdp=2, **options))
    speaking = write_config(
        tmp_path / "end.yaml", values_of(inputs, tmp_path / "run", mesh__fsdp=2, **options, **SPOKEN)
    )
    options["distributed__num_processes"] = 1
    alone = write_config(tmp_path / "one.yaml", values_of(inputs, tmp_path / "run", **options))
    with nursery(tmp_path, keeping) as run:
        # one is told of the signal by the other; then both have it
        assert run(config, 0, 1) == [143, 143], (tmp_path / "stderr").read_text()
        assert [line["step"] for line in lines(tmp_path / "run")] == [1]
        # what two have written one goes on with, and the other way round
        assert run(alone, 2) == [143], (tmp_path / "stderr").read_text()
        assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 2, 3]
        with RunFolder(tmp_path / "run").lock():
            # what the first one finds ends the other
            assert run(config, 0, 0) == [2, 2]
        assert run(speaking, 0, 0) == [0, 0], (tmp_path / "stderr").read_text()
    assert_equal_runs(tmp_path / "run", one_device)
    assert_equal_samples(tmp_path / "run", one_device)
    errors = (tmp_path / "stderr").read_text()
    assert errors.count("SIGTERM: the checkpoint of step 1 is written") == 2
    assert "where another process is training" in errors and "process 0 of the run has failed" in errors


def test_processes_are_joined_by_the_configuration_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigurationError, match=r"`distributed\.num_processes`: the run has 1, but JAX 2"):
        Trainer(build_configuration(values_of(tmp_path, tmp_path / "run")))
