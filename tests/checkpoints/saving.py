"""A process that saves checkpoints and is killed on the way: run by ``test_writing.py``, not imported by it.

``python saving.py kill FOLDER`` copies ``FOLDER/old`` for every write point, saves over the copy in a child process
that kills itself there with SIGKILL, and prints how many points there were. ``python saving.py save FOLDER N`` saves
checkpoint N into FOLDER ten times. ``python saving.py die FOLDER N`` saves N over the large checkpoint in FOLDER and
kills itself right before the commit.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from transformers_moshi_flax.checkpoints import writing
from transformers_moshi_flax.checkpoints.rules import FileTensor

NAMES = [f"layer.{number}.kernel" for number in range(6)]


def tensors(value: int) -> dict[str, np.ndarray]:
    return {name: np.full((4, 3 + number), value, np.float32) for number, name in enumerate(NAMES)}


def save(folder: Path, value: int, form: str) -> None:
    """Checkpoint ``value``, with a configuration that says so, in one of the forms."""
    names = {"msgpack": "flax_model.msgpack", "pt": "model.safetensors"}
    writing.save_checkpoint(
        folder,
        "pt" if form.endswith("pt") else "flax",
        names.get(form.split()[-1], "flax_model.safetensors"),
        [FileTensor(key, array.nbytes, partial(np.copy, array)) for key, array in tensors(value).items()],
        max_shard_bytes=200 if "sharded" in form else 1 << 20,
        companions={"config.json": json.dumps({"value": value}), "generation_config.json": json.dumps({"v": value})},
    )


def save_large(folder: Path, weight: int, value: int) -> None:
    """A msgpack file of which only the middle depends on ``weight``, with the configuration ``value``."""
    leaves = {"a": np.zeros(30_000, np.float32), "b": np.full(4, weight, np.float32), "c": np.ones(30_000, np.float32)}
    tensors = [FileTensor(key, leaf.nbytes, partial(np.copy, leaf)) for key, leaf in leaves.items()]
    companions = {"config.json": json.dumps({"value": value})}
    writing.save_checkpoint(folder, "flax", "flax_model.msgpack", tensors, 1 << 20, companions)


def dying(function: Callable[..., Any], counter: list[int], last: int, torn: bool = False) -> Callable[..., Any]:
    """``function``, with a point before it and one after it; ``torn`` writes half a file and dies at the first."""

    def point() -> None:
        counter[0] += 1
        if counter[0] == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if torn and counter[0] + 1 == last:
            Path(args[1]).write_bytes(b"\x08half of a file")
        point()
        result = function(*args, **kwargs)
        point()
        return result

    return wrapped


def run_to_point(save: Callable[[], None], last: int) -> bool:
    """Call ``save`` in a child that dies at write point ``last``; whether the child came to the end instead."""
    child = os.fork()
    if child == 0:
        counter = [0]
        for name in ("replace", "fsync", "unlink", "chmod"):
            setattr(os, name, dying(getattr(os, name), counter, last))
        writing.save_file = dying(writing.save_file, counter, last, torn=True)
        save()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


def main(command: str, folder: Path, argument: str) -> None:
    if command == "save":
        for _ in range(10):
            save(folder, int(argument), "sharded")
        return
    if command == "die":
        replace = os.replace

        def dying_replace(old: Path, new: Path) -> None:
            if Path(new).suffix == ".msgpack":
                os.kill(os.getpid(), signal.SIGKILL)
            replace(old, new)

        os.replace = dying_replace
        save_large(folder, int(argument), 2)
    last = 0
    finished = False
    while not finished:
        last += 1
        shutil.copytree(folder / "old", folder / f"killed-{last}")
        finished = run_to_point(partial(save, folder / f"killed-{last}", 2, argument), last)
    print(last)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
