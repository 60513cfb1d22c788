"""Processes that save checkpoints in Kyutai's format: run by ``test_kyutai_saving.py``, not imported by it.

``python saving_kyutai.py kill FOLDER`` saves checkpoint 2 over a copy of ``FOLDER/old`` (none if it is not there) for
every second write point, in a child process that kills itself there with SIGKILL, and prints how many there were.
``python saving_kyutai.py save FOLDER N`` saves checkpoint N into each of some directories of FOLDER.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict
from transformers import MoshiConfig

from tests.checkpoints.saving import dying
from transformers_moshi_flax.checkpoints import writing
from transformers_moshi_flax.models.moshi.kyutai_flax_moshi import write_kyutai

DIRECTORIES = 5
STEP = 2  # every second write point is tried


def save(inputs: Path, folder: Path, value: int) -> None:
    """A checkpoint whose numbers are all ``value``, of the model that ``inputs`` has the shapes of."""
    shapes = json.loads((inputs / "shapes.json").read_text())
    params = {path: np.full(shape, value, np.float32) for path, shape in shapes.items()}
    config = MoshiConfig.from_json_file(inputs / "config.json")
    write_kyutai(config, unflatten_dict(params, sep="/"), folder, inputs / "tokenizer_spm_32k_3.model")


def run_to_point(inputs: Path, folder: Path, last: int) -> bool:
    """Save in a child that dies at point ``last``; whether the child came to the end instead."""
    child = os.fork()
    if child == 0:
        counter = [0]
        for name in ("replace", "fsync", "unlink", "chmod"):
            setattr(os, name, dying(getattr(os, name), counter, last))
        writing.save_file = dying(writing.save_file, counter, last, torn=True)
        save(inputs, folder, 2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


def main(command: str, inputs: Path, argument: str) -> None:
    if command == "save":
        (inputs / f"ready-{argument}").touch()
        while len(list(inputs.glob("ready-*"))) < 2:
            time.sleep(0.01)
        for number in range(DIRECTORIES):
            save(inputs, inputs / f"both-{number}", int(argument))
        return
    last = 1 - STEP
    finished = False
    while not finished:
        last += STEP
        if (inputs / argument).exists():
            shutil.copytree(inputs / argument, inputs / f"killed-{last}")
        finished = run_to_point(inputs, inputs / f"killed-{last}", last)
    print(last)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
