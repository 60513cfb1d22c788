"""The logs of a run in the formats of others: what Weights & Biases itself has written down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from transformers_moshi_flax.training.run_logging import drop_lines_after, has_evaluation

LOGGED = """
import sys
from pathlib import Path
from transformers_moshi_flax.training.run_logging import RunLog, check_packages

folder, done = Path(sys.argv[1]), int(sys.argv[2])
check_packages(False, "moshi")
with RunLog(folder, steps=4, first_step=done, config={"run": {"steps": 4}}, wandb_project="moshi") as log:
    for step in (done + 1, done + 2):
        log.train(step, {"loss": 1 / step, "accuracy": float("nan")})
    log.evaluation(done + 2, {"loss": 7.0, "text_loss": 3.0, "audio_loss": 4.0})
    if done:
        raise KeyboardInterrupt
"""
BLOCK, FILE_HEADER, HEADER = 32768, 7, 7


def records(path: Path) -> Iterator[bytes]:
    """Of a log in LevelDB's format: blocks of 32 KB; a piece of a record has a checksum, a length, a kind and data."""
    data, position, record = path.read_bytes(), FILE_HEADER, b""
    while position < len(data):
        if BLOCK - position % BLOCK < HEADER:  # the rest of a block in which no header has room
            position += BLOCK - position % BLOCK
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        position += HEADER
        record += data[position : position + length]
        position += length
        if kind in (1, 4):  # whole, or its last piece
            yield record
            record = b""


def test_lines_of_a_run_that_goes_on(tmp_path: Path) -> None:
    """What was torn is dropped, and a line that lacks its end gets it."""
    path = tmp_path / "metrics.jsonl"
    assert not has_evaluation(path, 2)
    drop_lines_after(path, 2)
    lines = [
        f'{{"step": {step}, "split": "{split}"}}\n' for step, split in ((2, "train"), (2, "evaluation"), (3, "train"))
    ]
    path.write_text("".join(lines)[:-1])
    assert [has_evaluation(path, step) for step in (1, 2, 3)] == [False, True, False]
    drop_lines_after(path, 3)
    assert path.read_text() == "".join(lines)
    path.write_text("".join(lines) + '{"step": 3, "split": "eval')
    assert not has_evaluation(path, 3)
    drop_lines_after(path, 2)
    assert path.read_text() == "".join(lines[:2])


def test_weights_and_biases(tmp_path: Path) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    environment = {**os.environ, "WANDB_MODE": "offline", "JAX_PLATFORMS": "cpu"}
    codes = [
        subprocess.run([sys.executable, "-c", LOGGED, str(tmp_path), str(done)], env=environment).returncode
        for done in (0, 2)
    ]
    assert codes[0] == 0 and codes[1] != 0  # the second is interrupted
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    runs = [[Record.FromString(record) for record in records(path)] for path in files]
    assert len(runs) == 2

    begun = [next(record.run for record in run if record.HasField("run")) for run in runs]
    assert begun[0].run_id == begun[1].run_id == (tmp_path / "wandb_id").read_text()  # it goes on
    assert {run.project for run in begun} == {"moshi"}
    config = {entry.key: json.loads(entry.value_json) for entry in begun[0].config.update}
    assert config["run"] == {"steps": 4}

    history: dict[int, dict[str, float]] = {}
    for record in (record for run in runs for record in run if record.HasField("history")):
        values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        history.setdefault(values["_step"], {}).update(values)
    assert sorted(history) == [1, 2, 3, 4]
    assert [history[step]["train/loss"] for step in (1, 2, 3, 4)] == [1.0, 0.5, 1 / 3, 0.25]
    assert [history[step].get("evaluation/audio_loss") for step in (1, 2, 3, 4)] == [None, 4.0, None, 4.0]
    assert [next(record.exit.exit_code for record in run if record.HasField("exit")) for run in runs] == [0, 1]
