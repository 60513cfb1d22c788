"""Processes that save checkpoints in Kyutai's format: run by ``test_kyutai_saving.py``, not imported by it.

``python saving_kyutai.py kill FOLDER`` saves checkpoint 2 over a copy of ``FOLDER/old`` (none if it is not there) for
every second write point, in a child process that kills itself there with SIGKILL, and prints how many there were.
``python saving_kyutai.py save FOLDER N`` saves checkpoint N into each of some directories of FOLDER.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict
from transformers import MoshiConfig

from tests.checkpoints.saving import run_to_point
from transformers_moshi_flax.models.moshi.kyutai_flax_moshi import write_kyutai

DIRECTORIES = 5
STEP = 2  # every second write point is tried


def save(inputs: Path, folder: Path, value: int) -> None:
    """A checkpoint whose numbers are all ``value``, of the model that ``inputs`` has the shapes of."""
    shapes = json.loads((inputs / "shapes.json").read_text())
    params = {path: np.full(shape, value, np.float32) for path, shape in shapes.items()}
    config = MoshiConfig.from_json_file(inputs / "config.json")
    write_kyutai(config, unflatten_dict(params, sep="/"), folder, inputs / "tokenizer_spm_32k_3.model")


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
        finished = run_to_point(partial(save, inputs, inputs / f"killed-{last}", 2), last)
    print(last)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
