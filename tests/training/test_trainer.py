"""Whole runs on a tiny model: what they leave, how they go on, what stops them."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import soundfile
from flax.traverse_util import flatten_dict
from rich.console import Console
from safetensors.numpy import load_file

from tests.training.runs import LENGTHS, run_config, smaller_config, write_conversations, write_inputs
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
from transformers_moshi_flax.training import evaluation, signals
from transformers_moshi_flax.training import trainer as trainer_module
from transformers_moshi_flax.training.configuration import ConfigurationError, load_configuration
from transformers_moshi_flax.training.data import loading
from transformers_moshi_flax.training.run_checkpoints import PARAMS, DamagedCheckpointError, RunCheckpoints
from transformers_moshi_flax.training.run_folder import RunFolder, export_checkpoint
from transformers_moshi_flax.training.run_logging import RunLog
from transformers_moshi_flax.training.trainer import Interrupted, NotFiniteError, Trainer

OPTIONS = {
    "run__evaluate_every": 4,
    "run__samples": 1,
    "run__sample_frames": 5,
    "run__tensorboard": True,
    "run__wandb_project": "moshi",
}


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def train(folder: Path, notes: Console | None = None, **overrides: Any) -> dict[str, float]:
    return Trainer(run_config(folder, **overrides), notes or quiet()).train()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


class Wandb:
    """A stand-in that takes down the calls of Weights & Biases."""

    def __init__(self):
        self.calls: list[tuple[str, Any]] = []

    def init(self, **kwargs: Any) -> Wandb:
        self.calls.append(("init", kwargs))
        return self

    def log(self, values: dict, step: int) -> None:
        self.calls.append(("log", (step, values)))

    def finish(self, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))


@pytest.fixture(scope="module")
def wandb() -> Iterator[Wandb]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in = Wandb()
        monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=stand_in.init))
        yield stand_in


@pytest.fixture(scope="module")
def whole(inputs: Path, wandb: Wandb) -> dict[str, Any]:
    """A run of six steps with an evaluation in the middle, and what it leaves. Not to be changed."""
    notes = quiet()
    options = {**OPTIONS, "data__evaluation": str(inputs / "held-out")}
    metrics = train(inputs, notes, **options)
    found = {"metrics": metrics, "run": inputs / "run", "notes": notes.file.getvalue(), "wandb": list(wandb.calls)}
    return {**found, "export": exported(inputs / "run" / "export")}


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses_of(run: Path, split: str = "train") -> dict[int, float]:
    """By step, each of which has been logged once."""
    found = [(record["step"], record["loss"]) for record in lines(run) if record["split"] == split]
    assert len(dict(found)) == len(found)
    return dict(found)


def exported(folder: Path) -> dict[tuple[str, ...], np.ndarray]:
    model, params = FlaxMoshiForConditionalGeneration.from_pretrained(folder, _do_init=False)
    assert model.config.num_codebooks == 2
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(params).items()}


def stored(folder: Path) -> dict[tuple[str, ...], np.ndarray]:
    """As :func:`exported`, from the file."""
    return {tuple(name.split(".")): leaf for name, leaf in load_file(folder / "flax_model.safetensors").items()}


def kept(run: Path, step: int) -> dict[tuple[str, ...], np.ndarray]:
    """The trained parameters of a checkpoint."""
    checkpoints = RunCheckpoints(run / "checkpoints", read_only=True)
    params = checkpoints.restore(step, {PARAMS: checkpoints.host_target(step, PARAMS)}).arrays[PARAMS]
    checkpoints.close()
    return flatten_dict(params)


def assert_has(whole: dict, part: dict) -> None:
    for path, leaf in part.items():
        np.testing.assert_array_equal(whole[path], leaf, "/".join(path))


def test_log_of_a_run(whole: dict[str, Any]) -> None:
    records = lines(whole["run"])
    assert [(record["step"], record["split"]) for record in records] == [
        *((step, "train") for step in (1, 2, 3, 4)),
        (4, "evaluation"),
        *((step, "train") for step in (5, 6)),
        (6, "evaluation"),
    ]
    assert all(np.isfinite(record["loss"]) for record in records)
    # a row is 11 dialogue frames at most, and the whole split is evaluated
    assert records[4]["frames"] == sum(LENGTHS[:3])
    assert 0 <= records[3]["data_wait"] <= 1 and records[3]["frames_per_second"] > 0
    logged = {name: records[-1][name] for name in whole["metrics"]}
    assert logged == {name: value if np.isfinite(value) else None for name, value in whole["metrics"].items()}
    assert "step 6/6" in whole["notes"] and "evaluation at step 4" in whole["notes"]
    assert list((whole["run"] / "tensorboard").iterdir())


def test_folder_of_a_run(whole: dict[str, Any]) -> None:
    folder = RunFolder(whole["run"])
    assert folder.configuration().run.evaluate_every == 4
    (start,) = [json.loads(line) for line in (whole["run"] / "starts.jsonl").read_text().splitlines()]
    assert start["step"] == 0 and start["versions"]["jax"] == jax.__version__
    assert start["git"] is None or len(start["git"]["commit"]) == 40
    assert sorted(int(path.name) for path in folder.checkpoints.iterdir()) == [2, 4, 6]


def test_samples_of_an_evaluation(whole: dict[str, Any]) -> None:
    for step in (4, 6):
        folder = whole["run"] / "samples" / f"step-{step}"
        record = json.loads((folder / "0.json").read_text())
        assert record["frames"] == 5 == len(record["text_ids"]) == len(record["reference_text_ids"])
        samples, rate = soundfile.read(folder / "0.wav")
        assert rate == 24_000 and samples.shape == (5 * 16, 2)
        assert np.abs(samples[:, 1]).max() > 0
        assert not (folder / "1.wav").exists()


def test_export_has_the_parameters_of_the_checkpoint(whole: dict[str, Any], tmp_path: Path) -> None:
    final = whole["export"]
    assert_has(final, kept(whole["run"], 6))
    assert all(leaf.dtype == np.float32 for leaf in final.values())
    assert export_checkpoint(whole["run"], tmp_path / "four", step=4) == 4
    four = stored(tmp_path / "four")
    assert four.keys() == final.keys()
    assert_has(four, kept(whole["run"], 4))
    changed = {path for path in final if not np.array_equal(final[path], four[path])}
    assert changed and all(path[0] != "audio_encoder" for path in changed)
    losses = losses_of(whole["run"], "evaluation")
    best = min(losses, key=losses.get)
    assert export_checkpoint(whole["run"], tmp_path / "best", best=True, to_pt=True, dtype="bfloat16") == best
    assert (tmp_path / "best" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="no checkpoint of step 3; there are: 2, 4, 6"):
        export_checkpoint(whole["run"], tmp_path / "three", step=3)


def test_a_run_that_is_over_stays_as_it_is(whole: dict[str, Any], inputs: Path, wandb: Wandb) -> None:
    """Weights & Biases is told again, by the same name."""
    before = lines(whole["run"])
    wandb.calls.clear()
    assert train(inputs, **OPTIONS, data__evaluation=str(inputs / "held-out")) == {}
    assert lines(whole["run"]) == before
    assert [name for name, _ in wandb.calls] == ["init", "finish"]
    first, second = (calls[0][1] for calls in (whole["wandb"], wandb.calls))
    assert first["id"] == second["id"] and first["project"] == "moshi" and first["resume"] == "allow"


def test_another_configuration_is_refused(whole: dict[str, Any], inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"optimizer\.learning_rate: 0\.01 -> 0\.02") as caught:
        Trainer(run_config(inputs, optimizer__learning_rate=0.02))
    assert "run.output_dir" in str(caught.value)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mine.txt").write_text("dear")
    with pytest.raises(ConfigurationError, match=r"mine\.txt"):
        Trainer(run_config(inputs, run__output_dir=str(tmp_path / "letters")))


@pytest.mark.parametrize(
    ("key", "value"), [("data__train", "missing"), ("data__evaluation", "missing"), ("mesh__data", 2)]
)
def test_what_is_not_there_is_named_before_any_work(inputs: Path, tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=key.split("__")[0]):
        Trainer(run_config(inputs, **{"run__output_dir": str(tmp_path / "run"), key: value}))
    assert not (tmp_path / "run").exists()


@contextmanager
def terminated_in_step(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process sends itself SIGTERM when the batch of that step is there."""
    put, batches = trainer_module.put_batch, []

    def put_and_signal(*args: Any) -> Any:
        batches.append(args)
        if len(batches) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return put(*args)

    with monkeypatch.context() as patches:
        patches.setattr(trainer_module, "put_batch", put_and_signal)
        patches.setattr(signals, "PATIENCE", 600.0)  # nobody else ends this process
        yield


def test_an_interrupted_run_ends_as_the_whole_one(
    whole: dict[str, Any], inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the third step; then another process makes the batches."""
    held_out = {"data__evaluation": str(inputs / "held-out"), "run__evaluate_every": 3}
    options = {"run__output_dir": str(tmp_path / "run"), "run__checkpoint_every": 50, **held_out}
    handler = signal.getsignal(signal.SIGTERM)
    with (
        terminated_in_step(3, monkeypatch),
        pytest.raises(Interrupted, match="SIGTERM: the checkpoint of step 3 is written") as caught,
    ):
        train(inputs, **options)
    assert (caught.value.signal, caught.value.step) == (signal.SIGTERM, 3)
    assert signal.getsignal(signal.SIGTERM) == handler
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "split": "train", "loss": 1.0}\n{"step": 5, "spl')
    notes = quiet()
    train(inputs, notes, **options, data__workers=1)
    assert "going on from the checkpoint of step 3" in notes.file.getvalue()
    assert losses_of(tmp_path / "run") == losses_of(whole["run"])
    # the signal came before the evaluation of step 3, which is made up for
    assert losses_of(tmp_path / "run", "evaluation").keys() == {3, 6}
    assert losses_of(tmp_path / "run", "evaluation")[6] == losses_of(whole["run"], "evaluation")[6]
    ours = stored(tmp_path / "run" / "export")
    assert whole["export"].keys() == ours.keys()
    assert_has(whole["export"], ours)


def kept_steps(run: Path) -> list[int]:
    checkpoints = RunCheckpoints(run / "checkpoints", read_only=True)
    steps = checkpoints.steps()
    checkpoints.close()
    return steps


def test_an_evaluation_is_made_up_for_once(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends the run before it, in its midst, or behind it; and it counts for the best checkpoint."""
    run = tmp_path / "run"
    options = {"run__output_dir": str(run), "run__checkpoint_every": 50, "run__steps": 4, "run__max_to_keep": 1}
    options |= {"data__evaluation": str(inputs / "held-out"), "run__evaluate_every": 2}
    with terminated_in_step(2, monkeypatch), pytest.raises(Interrupted, match="step 2"):
        train(inputs, **options)
    # SIGKILL where the checkpoint of step 2 would be told of its metrics, and where they would be logged
    for owner, name in ((RunCheckpoints, "add_metrics"), (RunLog, "evaluation")):
        killed_at(inputs, owner, name, **options)
        assert kept_steps(run) == [2] and not losses_of(run, "evaluation")
    killed_at(inputs, trainer_module.Loop, "_save", **options)
    assert losses_of(run, "evaluation").keys() == {2} and kept_steps(run) == [2]
    with terminated_in_step(2, monkeypatch), pytest.raises(Interrupted, match="step 4"):
        train(inputs, **options)
    assert losses_of(run, "evaluation").keys() == {2}
    metrics = train(inputs, **options)
    assert train(inputs, **options) == {}
    losses = losses_of(run, "evaluation")
    assert losses.keys() == {2, 4} and losses[4] == metrics["loss"]
    best = min(losses, key=losses.get)
    assert kept_steps(run) == sorted({best, 4}) and export_checkpoint(run, tmp_path / "best", best=True) == best


@pytest.mark.parametrize(
    ("place", "number"), [("batch", signal.SIGTERM), ("sample", signal.SIGINT), ("end", signal.SIGTERM)]
)
def test_a_signal_in_an_evaluation_is_heard_within_a_batch(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, number: signal.Signals
) -> None:
    """Of the losses or of a spoken dialogue; the checkpoint of before the evaluation is there."""
    run, told = tmp_path / "run", []
    monkeypatch.setattr(signals, "PATIENCE", 600.0)  # nobody else ends this process
    options = {"run__output_dir": str(run), "run__checkpoint_every": 50, "run__steps": 3, "run__evaluate_every": 2}
    options |= {"data__evaluation": str(inputs / "held-out"), "run__samples": 2, "run__sample_frames": 5}
    evaluate_step, put, add = trainer_module.make_eval_step, evaluation.Heeding.put, RunCheckpoints.add_metrics

    def tell(*given: Any) -> None:
        told.append(given)
        if len(told) == 1:
            os.kill(os.getpid(), number)

    def make_eval_step(*args: Any, **kwargs: Any) -> Any:
        step = evaluate_step(*args, **kwargs)
        return lambda *given: (step(*given), tell(*given))[0]

    kept = 3 if place == "end" else 2  # behind the evaluation of step 2 it is heard after the next step
    message = f"{number.name}: the checkpoint of step {kept} is written"
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=message):
        if place == "batch":
            patch.setattr(trainer_module, "make_eval_step", make_eval_step)
        elif place == "sample":
            patch.setattr(evaluation.Heeding, "put", lambda *given: (tell(*given), put(*given))[1])
        else:
            patch.setattr(RunCheckpoints, "add_metrics", lambda *given: (add(*given), tell(*given))[0])
        train(inputs, **options)
    # heard before the next batch or frame is begun, and before the evaluation of step 3
    assert len(told) == 1 and kept_steps(run) == ([2, 3] if place == "end" else [2])
    assert (len(losses_of(run, "evaluation")), (run / "samples").exists()) == (
        (1, True) if place == "end" else (0, False)
    )
    if place == "sample":
        train(inputs, **options)
        assert losses_of(run, "evaluation").keys() == {2, 3}
        assert sorted(path.name for path in (run / "samples").iterdir()) == ["step-2", "step-3"]


def test_steps_that_are_not_finite_end_the_run(inputs: Path, tmp_path: Path) -> None:
    options = {"run__output_dir": str(tmp_path / "run"), "run__max_bad_steps": 2, "run__steps": 6}
    with pytest.raises(NotFiniteError, match=r"2 steps in a row .* the checkpoint of step 3 has the parameters"):
        # weights of 1e38 overflow in the update, so that all steps after the first are NaN
        train(inputs, **options, optimizer__learning_rate=1e38, optimizer__schedule="constant")
    records = lines(tmp_path / "run")
    assert [record["bad_steps_in_a_row"] for record in records] == [0, 1, 2]
    assert records[-1]["loss"] is None
    assert not (tmp_path / "run" / "export").exists()
    assert_has(kept(tmp_path / "run", 3), kept(tmp_path / "run", 2))


def test_steps_that_are_not_finite_are_noticed_between_lines_of_the_log(inputs: Path, tmp_path: Path) -> None:
    options = {"run__output_dir": str(tmp_path / "run"), "run__max_bad_steps": 2, "run__log_every": 100}
    with pytest.raises(NotFiniteError, match="the checkpoint of step 4"):
        train(inputs, **options, optimizer__learning_rate=1e38, optimizer__schedule="constant")


def test_data_that_fail_cost_no_steps(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"run__output_dir": str(tmp_path / "run"), "run__checkpoint_every": 50}
    made = loading.Loader.__next__

    def make_three(loader: loading.Loader) -> Any:
        if loader.position == 3:
            raise RuntimeError("a worker is gone")
        return made(loader)

    monkeypatch.setattr(loading.Loader, "__next__", make_three)
    with pytest.raises(RuntimeError, match="a worker is gone"):
        train(inputs, **options)
    monkeypatch.undo()
    assert RunCheckpoints(tmp_path / "run" / "checkpoints", read_only=True).steps() == [3]
    train(inputs, **options)
    assert losses_of(tmp_path / "run").keys() == set(range(1, 7))


def test_a_script_without_a_guard_is_told_before_any_work(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    importing = types.SimpleNamespace(_inheriting=True, daemon=False)
    monkeypatch.setattr(multiprocessing, "current_process", lambda: importing)
    with pytest.raises(loading.WorkerError, match=r"`data\.workers` is 2, .*__main__"):
        Trainer(run_config(inputs, run__output_dir=str(tmp_path / "run"), data__workers=2))


def test_held_out_data_are_looked_at_before_any_step(inputs: Path, tmp_path: Path) -> None:
    write_conversations(tmp_path / "mono", LENGTHS[:2], codebooks=1)
    options = {"run__output_dir": str(tmp_path / "run"), "data__evaluation": str(tmp_path / "mono")}
    with pytest.raises(ConfigurationError, match=r"data\.evaluation.*has 1 codebooks, but the model wants 2"):
        train(inputs, **options)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("samples", [0, 3])
def test_held_out_data_that_are_damaged_cost_no_steps(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    """Be it beyond the first batch, which is looked at before any step, or where the samples are read."""
    write_conversations(tmp_path / "bad", LENGTHS[:3])
    evaluate = trainer_module.evaluate

    def spoil(spoiled: Callable[[np.ndarray], np.ndarray]) -> None:
        with np.load(tmp_path / "bad" / "2.npz") as file:
            arrays = {name: spoiled(array) for name, array in file.items()}
        np.savez(tmp_path / "bad" / "2.npz", **arrays)

    def evaluate_and_spoil(*args: Any) -> dict[str, float]:
        metrics = evaluate(*args)
        spoil(lambda array: array[..., :3])
        run._held_out._opened.clear()  # files that have been read of late are kept
        return metrics

    if samples:
        monkeypatch.setattr(trainer_module, "evaluate", evaluate_and_spoil)
    else:
        spoil(lambda array: array + 999)
    options = {"run__output_dir": str(tmp_path / "run"), "data__evaluation": str(tmp_path / "bad")}
    run = Trainer(run_config(inputs, run__steps=1, run__samples=samples, **options), quiet())
    with pytest.raises(ConfigurationError, match=r"^`data\.evaluation`: .*2\.npz"):
        run.train()
    assert RunCheckpoints(tmp_path / "run" / "checkpoints", read_only=True).steps() == [1]


@pytest.mark.parametrize("name", ["user_code_noise", "moshi_code_noise"])
def test_noise_in_codes_is_for_training_alone(inputs: Path, tmp_path: Path, name: str) -> None:
    options = {"data__evaluation": str(inputs / "held-out"), "run__steps": 1, "optimizer__learning_rate": 0.0}
    runs = [tmp_path / "without", tmp_path / "with"]
    for run, noise in zip(runs, (0.0, 0.9)):
        train(inputs, **options, run__output_dir=str(run), **{f"data__{name}": noise})
    trained_on, evaluated = ([losses_of(run, split)[1] for run in runs] for split in ("train", "evaluation"))
    assert trained_on[0] != trained_on[1]
    assert evaluated[0] == evaluated[1]


def test_padding_ids_must_be_of_the_model(inputs: Path, tmp_path: Path) -> None:
    options = {"run__output_dir": str(tmp_path / "run"), "objective__text_padding_ids": [70_000]}
    with pytest.raises(ConfigurationError, match=r"`objective`: `text_padding_ids` has \[70000\]"):
        train(inputs, **options)


class Killed(BaseException):
    """In the place of SIGKILL: nothing handles it."""


def killed_at(folder: Path, owner: Any, name: str, **overrides: Any) -> None:
    """A run that ends where ``owner.name`` is called."""

    def kill(*args: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, kill)
        train(folder, **overrides)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(
    whole: dict[str, Any], inputs: Path, tmp_path: Path
) -> None:
    """Even with other weights: nothing of the runs before is in what is trained, kept and exported."""
    run = tmp_path / "run"
    options = {"run__output_dir": str(run), "run__checkpoint_every": 50}
    killed_at(inputs, RunFolder, "keep_model", **options)
    (run / ".config.yaml.0.tmp").write_text("torn")
    killed_at(inputs, Trainer, "_keep_frozen", **options, run__seed=1)
    killed_at(inputs, trainer_module.Loop, "run", **options, run__seed=2)
    train(inputs, **options)
    final = exported(whole["run"] / "export")
    assert_has(exported(run / "export"), final)
    export_checkpoint(run, tmp_path / "again")
    assert_has(exported(tmp_path / "again"), final)


def test_begun_anew_the_export_is_of_the_new_run(whole: dict[str, Any], inputs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole["run"], tmp_path / "run"))
    shutil.rmtree(run / "checkpoints")
    options = {"run__output_dir": str(run), "run__checkpoint_every": 50, "run__seed": 1}
    killed_at(inputs, trainer_module.Loop, "run", **options)
    assert RunFolder(run).exported_step() is None and not (run / "export").exists()
    train(inputs, **options)
    assert_has(exported(run / "export"), kept(run, 6))
    assert RunFolder(run).exported_step() == 6
    shutil.rmtree(run / "export")
    assert RunFolder(run).exported_step() is None


def test_fewer_steps_than_are_made_are_refused(inputs: Path, tmp_path: Path) -> None:
    options = {
        "run__output_dir": str(tmp_path / "run"),
        "run__checkpoint_every": 50,
        "optimizer__schedule": "constant",
    }
    train(inputs, **options, run__steps=2)
    with pytest.raises(ConfigurationError, match=r"`run\.steps`: 1 is less than the 2 that are made already"):
        train(inputs, **options, run__steps=1)
    assert RunFolder(tmp_path / "run").configuration().run.steps == 2


@pytest.mark.parametrize("damage", ["torn", "missing"])
def test_damaged_frozen_weights_are_named(
    whole: dict[str, Any], inputs: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(whole["run"], tmp_path / "run"))
    if damage == "torn":
        manifest = run / "frozen" / "0" / "manifest.json"
        manifest.write_bytes(manifest.read_bytes()[:50])
    else:
        shutil.rmtree(run / "frozen")
    message = r"frozen.* not trained: bring a copy of it back, or remove .*checkpoints"
    with pytest.raises(DamagedCheckpointError, match=message):
        train(inputs, run__output_dir=str(run))
    with pytest.raises(DamagedCheckpointError, match=message):
        export_checkpoint(run, tmp_path / "copy")
    assert not (run / "damaged").exists() and not caplog.records


def test_a_model_configuration_has_its_name(inputs: Path, tmp_path: Path) -> None:
    other = tmp_path / "small.json"
    other.write_text((inputs / "model" / "config.json").read_text())
    with pytest.raises(ConfigurationError, match=r"`model\.config`: .*small\.json' is not named config\.json"):
        train(inputs, run__output_dir=str(tmp_path / "run"), model__config=str(other))


def test_quantized_weights_are_not_trained(inputs: Path, tmp_path: Path) -> None:
    quantized = tmp_path / "int8"
    FlaxMoshiForConditionalGeneration(smaller_config()).quantize("int8").save_pretrained(quantized)
    for key, options in (
        ("path", {"model__path": str(quantized), "model__config": None}),
        ("config", {"model__config": str(quantized)}),
    ):
        message = rf"`model\.{key}`: training: the weights are quantized, int8 .*--quantize none"
        with pytest.raises(ConfigurationError, match=message):
            train(inputs, run__output_dir=str(tmp_path / key), **options)


def test_the_folder_is_looked_at_again_when_it_is_locked(whole: dict[str, Any], inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    late = Trainer(run_config(inputs, run__output_dir=str(run), run__seed=1), quiet())
    shutil.copytree(whole["run"], run)
    with pytest.raises(ConfigurationError, match=r"run\.seed: 0 -> 1"):
        late.train()


def test_a_folder_that_cannot_be_made(inputs: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"`run\.output_dir`: .*/proc/nothing"):
        train(inputs, run__output_dir="/proc/nothing/here")


def test_an_export_in_another_layout_replaces_the_one_there(whole: dict[str, Any], tmp_path: Path) -> None:
    for step, to_pt, weights in ((2, False, "flax_model"), (4, True, "model"), (6, False, "flax_model")):
        export_checkpoint(whole["run"], tmp_path / "copy", step=step, to_pt=to_pt)
        assert [path.name for path in (tmp_path / "copy").glob("*.safetensors")] == [f"{weights}.safetensors"]
        assert_has(exported(tmp_path / "copy"), kept(whole["run"], step))


@pytest.mark.parametrize("best", [False, True])
def test_an_export_while_checkpoints_are_removed(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: bool
) -> None:
    """The one that is read goes, as another one has been written."""
    run, later = Path(shutil.copytree(whole["run"], tmp_path / "run")), tmp_path / "6"
    losses = {record["step"]: record["loss"] for record in lines(run) if record["split"] == "evaluation"}
    first = min(losses, key=losses.get) if best else 4
    other = {4: 6, 6: 4}[first]
    shutil.move(run / "checkpoints" / str(other), later)
    target = RunCheckpoints.host_target

    def prune(self: RunCheckpoints, step: int, name: str) -> Any:
        if step == first:
            later.rename(run / "checkpoints" / str(other))
            shutil.rmtree(run / "checkpoints" / str(first))
        return target(self, step, name)

    monkeypatch.setattr(RunCheckpoints, "host_target", prune)
    assert export_checkpoint(run, tmp_path / "copy", best=best) == other
    assert_has(exported(tmp_path / "copy"), kept(whole["run"], other))


def test_an_export_needs_no_processor_backend(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with ``JAX_PLATFORMS=cuda``."""
    find = jax.local_devices

    def local_devices(*args: Any, backend: str | None = None, **options: Any) -> list[jax.Device]:
        if backend == "cpu":
            raise RuntimeError("no backend cpu")
        return find(*args, backend=backend, **options)

    monkeypatch.setattr(jax, "local_devices", local_devices)
    assert export_checkpoint(whole["run"], tmp_path / "copy") == 6


def test_two_processes_cannot_train_in_one_folder(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with RunFolder(output).lock(), pytest.raises(ConfigurationError, match="another process"):
        train(inputs, run__output_dir=str(output))


def test_wandb(whole: dict[str, Any], inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first, config), *logged, last = whole["wandb"]
    assert first == "init" and config["config"]["run"]["steps"] == 6
    assert last == ("finish", 0) and {name for name, _ in logged} == {"log"}
    expected = [(line["step"], line["split"], line["loss"]) for line in lines(whole["run"])]
    found = [
        (step, split, values[f"{split}/loss"])
        for _, (step, values) in logged
        for split in {name.split("/")[0] for name in values}
    ]
    assert found == expected
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigurationError, match=r"run\.wandb_project.*pip install wandb"):
        train(inputs, run__output_dir=str(tmp_path / "run"), run__wandb_project="moshi")
    assert not (tmp_path / "run").exists()


def test_a_yaml_of_the_run_is_one_that_loads(whole: dict[str, Any], inputs: Path) -> None:
    options = {**OPTIONS, "data__evaluation": str(inputs / "held-out")}
    assert load_configuration(whole["run"] / "config.yaml") == run_config(inputs, **options)


def test_a_second_signal_ends_the_process(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # JAX has threads; the child needs none
        child = os.fork()
    if child == 0:
        with signals.Signals() as received:
            os.kill(os.getpid(), signal.SIGTERM)
            (tmp_path / "first").write_text(str(int(received.number)))
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGINT
    assert (tmp_path / "first").read_text() == "15"


@pytest.fixture(scope="module")
def two_layers(inputs: Path) -> dict[str, Any]:
    """Options for a model of two layers."""
    smaller_config(num_hidden_layers=2).save_pretrained(inputs / "two layers")
    return {"model__config": str(inputs / "two layers"), "run__max_to_keep": 9, "run__checkpoint_every": 1}


def test_stacked_layers_in_bfloat16(inputs: Path, two_layers: dict[str, Any], tmp_path: Path) -> None:
    """Paths are those of files, also where they name one of the layers that are stacked."""
    train(
        inputs,
        **two_layers,
        run__output_dir=str(tmp_path / "run"),
        run__steps=2,
        model__dtype="bfloat16",
        model__scan_layers=True,
        model__gradient_checkpointing=True,
        model__freeze=["decoder/model/layers/.*/self_attn/.*"],
        optimizer__schedule="constant",
        optimizer__learning_rate_multipliers={"decoder/model/layers/1/.*": 0.0},
    )
    first, second = kept(tmp_path / "run", 1), kept(tmp_path / "run", 2)
    name = ("decoder", "model", "layers", "stacked", "mlp", "fc1", "kernel")
    np.testing.assert_array_equal(second[name][1], first[name][1])
    assert second[name].dtype == np.float32 and not np.array_equal(second[name][0], first[name][0])
    final = exported(tmp_path / "run" / "export")
    for number in (0, 1):
        path = tuple(str(number) if part == "stacked" else part for part in name)
        np.testing.assert_array_equal(final[path], second[name][number])
        assert (*path[:4], "self_attn", "q_proj", "linear", "kernel") in final
    assert not any("self_attn" in path for path in second if path[0] == "decoder")
    assert all(np.isfinite(leaf).all() and leaf.dtype == np.float32 for leaf in final.values())


def test_one_of_the_stacked_layers_cannot_be_frozen(inputs: Path, two_layers: dict[str, Any], tmp_path: Path) -> None:
    options = {**two_layers, "run__output_dir": str(tmp_path / "run"), "model__scan_layers": True}
    with pytest.raises(ConfigurationError, match=r"`model\.freeze`: .*layers/1.* some layers .*model\.scan_layers"):
        train(inputs, **options, model__freeze=["decoder/model/layers/1/.*"])


def test_float16(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss scale is found, the model learns with it, and a run that is interrupted keeps it."""
    options = {"run__steps": 12, "model__dtype": "float16", "run__log_every": 2}
    train(inputs, run__output_dir=str(tmp_path / "run"), **options)
    records = lines(tmp_path / "run")
    assert records[-1]["loss_scale"] < records[0]["loss_scale"] <= 2**16
    assert records[-1]["bad_steps"] < 12 and records[-1]["bad_steps_in_a_row"] == 0
    assert records[-1]["loss"] < 0.9 * records[0]["loss"]
    assert all(np.isfinite(leaf).all() for leaf in exported(tmp_path / "run" / "export").values())

    again = {**options, "run__output_dir": str(tmp_path / "again")}
    with terminated_in_step(5, monkeypatch), pytest.raises(Interrupted):
        train(inputs, **again)
    train(inputs, **again)
    for name in ("loss", "loss_scale", "bad_steps"):
        assert [record[name] for record in lines(tmp_path / "again")] == [record[name] for record in records]
    assert_has(stored(tmp_path / "run" / "export"), stored(tmp_path / "again" / "export"))
