"""Whole runs on a tiny codec: what they leave, how they go on, what stops them, what comes out."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import torch
import yaml
from flax.traverse_util import flatten_dict
from rich.console import Console
from transformers import MimiModel

from tests.training.codec.runs import RATE, run_config, run_values, small_config, write_inputs
from transformers_moshi_flax import FlaxMimiModel
from transformers_moshi_flax.cli import main
from transformers_moshi_flax.training.codec.configuration import CodecTrainingConfig
from transformers_moshi_flax.training.codec.trainer import CodecTrainer
from transformers_moshi_flax.training.configuration import ConfigurationError, build_configuration
from transformers_moshi_flax.training.run_checkpoints import PARAMS, REST, RunCheckpoints
from transformers_moshi_flax.training.run_folder import export_checkpoint, open_run
from transformers_moshi_flax.training.trainer import NotFiniteError

BEFORE = ("encoder", "encoder_transformer", "downsample")


def train(folder: Path, teacher: Any = None, notes: Console | None = None, **overrides: Any) -> dict[str, float]:
    notes = notes or Console(file=io.StringIO(), width=200)
    return CodecTrainer(run_config(folder, **overrides), notes, teacher).train()


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def kept(run: Path, step: int) -> dict[str, Any]:
    """Everything of a checkpoint, flat."""
    checkpoints = RunCheckpoints(run / "checkpoints", read_only=True)
    found = {}
    for name in (PARAMS, REST):
        tree = checkpoints.restore(step, {name: checkpoints.host_target(step, name)}).arrays[name]
        found |= {f"{name}/{key}": np.asarray(leaf) for key, leaf in _leaves(tree)}
    checkpoints.close()
    return found


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(keys), leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def whole(inputs: Path) -> dict[str, Any]:
    """A run of six steps whose codebooks start before the third. Not to be changed."""
    notes = Console(file=io.StringIO(), width=200)
    held_out = str(inputs / "held-out" / "all.jsonl")
    options = {"data__evaluation": held_out, "run__evaluate_every": 2, "run__samples": 1}
    metrics = train(inputs, notes=notes, **options)
    return {"metrics": metrics, "run": inputs / "run", "notes": notes.file.getvalue()}


def test_log_and_folder_of_a_run(whole: dict[str, Any]) -> None:
    records = lines(whole["run"])
    assert [record["step"] for record in records if record["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    autoencoder, *_, quantized = [record for record in records if record["split"] == "train"]
    assert "perplexity" not in autoencoder and "commitment" not in autoencoder
    assert quantized["perplexity"] > 1 and quantized["commitment"] > 0 and quantized["frames"] == 4 * 30
    weights = {"log_mel": 1.0, "magnitude": 0.5, "waveform_l1": 0.3, "waveform_l2": 0.1, "commitment": 0.25}
    assert quantized["loss"] == pytest.approx(sum(w * quantized[name] for name, w in weights.items()), rel=1e-4)
    first, second, last = [record for record in records if record["split"] == "evaluation"]
    assert "usage_0" not in first
    assert {"loss", "log_mel", "si_sdr", "usage", "perplexity_2", "sample_si_sdr"} <= second.keys()
    assert 0 < second["usage_1"] <= 1 <= second["perplexity_1"] <= 32
    assert whole["metrics"]["loss"] == last["loss"]
    assert "codebooks started from 240 latents of 2 batches" in whole["notes"]
    record = json.loads((whole["run"] / "samples" / "step-6" / "0.json").read_text())
    audio, rate = soundfile.read(whole["run"] / "samples" / "step-6" / "0.wav")
    assert rate == RATE and len(audio) == round(record["seconds"] * RATE) and np.abs(audio[:, 1]).max() > 0


def test_it_learns(whole: dict[str, Any], inputs: Path) -> None:
    losses = [record["loss"] for record in lines(whole["run"]) if record["split"] == "train"]
    options = {"run__steps": 60, "quantizer__start_step": 40, "run__log_every": 60, "data__gain_db": 0.0}
    later = train(inputs, run__output_dir=str(inputs / "longer"), **options)
    assert later["loss"] < 0.7 * losses[0]


def test_export_streams_as_the_whole_and_equals_upstream(whole: dict[str, Any], tmp_path: Path) -> None:
    model = FlaxMimiModel.from_pretrained(whole["run"] / "export")
    audio = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 1, 16 * 12)).astype(np.float32)
    codes = model.encode(audio).audio_codes
    spoken = model.decode(codes).audio_values
    encoder, decoder, heard, said = model.init_encoder_state(1), model.init_decoder_state(1), [], []
    for start in range(0, audio.shape[-1], 16):
        encoder, frame = model.encode_step(encoder, audio[..., start : start + 16])
        decoder, sound = model.decode_step(decoder, frame)
        heard.append(frame)
        said.append(sound)
    np.testing.assert_array_equal(jnp.concatenate(heard, axis=-1), codes)
    np.testing.assert_allclose(jnp.concatenate(said, axis=-1), spoken, atol=1e-5)
    assert export_checkpoint(whole["run"], tmp_path / "pt", to_pt=True) == 6
    upstream = MimiModel.from_pretrained(tmp_path / "pt").eval()
    with torch.no_grad():
        theirs = upstream(torch.from_numpy(audio))
    np.testing.assert_array_equal(codes, theirs.audio_codes)
    np.testing.assert_allclose(spoken, theirs.audio_values, atol=1e-5)


def test_a_run_goes_on_to_the_bit(whole: dict[str, Any], inputs: Path) -> None:
    """Stopped before the codebooks start, and again after that."""
    run = inputs / "parts"
    for steps in (2, 4, 6):
        train(inputs, run__output_dir=str(run), run__steps=steps)
    ours, theirs = kept(run, 6), kept(whole["run"], 6)
    assert ours.keys() == theirs.keys() and any("embed_sum" in name for name in ours)
    for name, leaf in theirs.items():
        np.testing.assert_array_equal(ours[name], leaf, name)
    with pytest.raises(ConfigurationError, match=r"started with other values \(quantizer.decay: 0.99 -> 0.9\)"):
        train(inputs, run__output_dir=str(run), quantizer__decay=0.9)
    assert open_run(run).configuration().quantizer.start_step == 2


def test_the_start_of_codebooks_costs_no_steps(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take long, and what ends the process in it finds a checkpoint of the steps before."""

    def fail(trainer: CodecTrainer, state: Any, position: int) -> Any:
        raise InterruptedError("in the midst of it")

    monkeypatch.setattr(CodecTrainer, "start_codebooks", fail)
    with pytest.raises(InterruptedError):
        train(inputs, run__output_dir=str(inputs / "ended"))
    assert [path.name for path in (inputs / "ended/checkpoints").iterdir() if path.is_dir()] == ["2"]


def test_the_decoder_alone_is_tuned_on_quantized_latents(inputs: Path) -> None:
    run = inputs / "decoder"
    options = {"quantizer__train_encoder": False, "run__checkpoint_every": 2, "run__output_dir": str(run)}
    train(inputs, **options, optimizer__weight_decay=0.1)
    before, after = (flatten_dict(_params(run, step), sep="/") for step in (2, 6))
    for path, leaf in after.items():
        same = np.array_equal(leaf, before[path])
        if path.startswith(BEFORE) or path.endswith("acoustic_residual_vector_quantizer/input_proj/kernel"):
            assert same, path
        elif path.startswith(("decoder/", "decoder_transformer/layers/0/mlp")) or path.endswith("embed_sum"):
            assert not same, path
    assert not any("commitment" in record for record in lines(run))


def _params(run: Path, step: int) -> dict[str, Any]:
    checkpoints = RunCheckpoints(run / "checkpoints", read_only=True)
    params = checkpoints.restore(step, {PARAMS: checkpoints.host_target(step, PARAMS)}).arrays[PARAMS]
    checkpoints.close()
    return params


def test_discriminators_and_a_teacher(inputs: Path) -> None:
    def teacher(audio: np.ndarray) -> np.ndarray:
        frames = audio.reshape(len(audio), -1, 16)
        return np.concatenate([frames.mean(axis=-1, keepdims=True), frames[..., :4]], axis=-1)

    run = inputs / "judged"
    options = {
        "losses__adversarial": 0.1,
        "losses__feature_matching": 1.0,
        "losses__distillation": 1.0,
        "discriminator__windows": [64],
        "discriminator__filters": 3,
        "discriminator__start_step": 1,
        "quantizer__start_step": 0,
        "run__steps": 3,
        "run__checkpoint_every": 1,
        "run__output_dir": str(run),
        "data__evaluation": str(inputs / "held-out"),
    }
    train(inputs, teacher, **options)
    first, second, _, evaluated = lines(run)
    assert "adversarial" not in first and {"adversarial", "feature_matching", "discriminator"} <= second.keys()
    assert 0 <= second["distillation"] <= 2 and 0 <= evaluated["distillation"] <= 2
    one, two = kept(run, 1), kept(run, 2)
    moved = [name for name in one if "discriminator" in name and not np.array_equal(one[name], two[name])]
    assert any("['params']" in name for name in moved)
    assert "distillation" in _params(run, 3)
    assert "distillation" not in FlaxMimiModel.from_pretrained(run / "export").params
    with pytest.raises(
        ConfigurationError, match=r"features of the shape \(1, 480, 1\) for 480 samples, which are 30 fr"
    ):
        train(inputs, lambda audio: audio[..., None], **{**options, "run__output_dir": str(inputs / "other")})


def test_a_run_from_a_checkpoint_keeps_its_codebooks(whole: dict[str, Any], inputs: Path) -> None:
    options = {"model": {"path": str(whole["run"] / "export"), "freeze": ["quantizer/.*", "encoder.*"]}}
    values = {**run_values(inputs, run__output_dir=str(inputs / "frozen"), run__steps=1), **options}
    values["quantizer"]["start_step"] = 0
    notes = Console(file=io.StringIO(), width=200)
    CodecTrainer(build_configuration(values, kind=CodecTrainingConfig), notes).train()
    assert "codebooks started" not in notes.file.getvalue()
    before, after = (
        flatten_dict(dict(FlaxMimiModel.from_pretrained(folder / "export").params), sep="/")
        for folder in (whole["run"], inputs / "frozen")
    )
    same = {path for path in before if np.array_equal(before[path], after[path])}
    assert {path for path in before if path.startswith(("quantizer/", "encoder"))} <= same
    assert any(path.startswith("decoder/") for path in before.keys() - same)


def test_codebooks_that_collapse_are_told(inputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"quantizer__least_usage": 1.0, "quantizer__patience": 2, "quantizer__start_step": 0}
    options |= {"data__evaluation": str(inputs / "held-out"), "data__evaluation_crops": 1, "run__evaluate_every": 1}
    with caplog.at_level(logging.ERROR):
        train(inputs, run__output_dir=str(inputs / "collapsed"), run__steps=2, **options)
    assert caplog.text.count("codebook 0 has collapsed: it used") == 1
    assert "Lower losses.commitment" in caplog.text


def test_steps_that_are_not_finite_end_the_run(inputs: Path) -> None:
    options = {"optimizer__learning_rate": 1e38, "run__max_bad_steps": 2, "optimizer__max_grad_norm": 0.0}
    with pytest.raises(NotFiniteError, match="2 steps in a row had a loss or a gradient that is not finite"):
        train(inputs, run__output_dir=str(inputs / "bad"), quantizer__start_step=10, run__steps=8, **options)


def test_command(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(run_values(inputs, run__output_dir=str(tmp_path / "run"))))
    with pytest.raises(SystemExit) as end:
        main(["train-codec", str(path), "--set", "run.steps=1"])
    assert end.value.code == 0
    with pytest.raises(SystemExit) as end:
        main(["export-checkpoint", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "bfloat16"])
    assert end.value.code == 0
    assert FlaxMimiModel.from_pretrained(tmp_path / "out").config.num_quantizers == 3
    with pytest.raises(SystemExit) as end:
        main(["train-codec", str(path), "--set", "quantizer.bypas=1"])
    assert end.value.code == 2 and "did you mean 'bypass'" in capsys.readouterr().err


MESHES = """
import sys
from transformers_moshi_flax.training.codec.configuration import CodecTrainingConfig
from transformers_moshi_flax.training.codec.trainer import CodecTrainer
from transformers_moshi_flax.training.configuration import load_configuration
for config in sys.argv[1:]:
    CodecTrainer(load_configuration(config, kind=CodecTrainingConfig)).train()
"""


@pytest.mark.slow
def test_devices_and_accumulation_sum_what_codebooks_learn(inputs: Path, tmp_path: Path) -> None:
    """Without what is random in a micro-batch, two devices, or two micro-batches, end where one does."""
    options = {"quantizer__dropout": 0.0, "quantizer__bypass": 0.0, "quantizer__dead_share": 0.0}
    # Adam divides small gradients by themselves
    options |= {"optimizer__eps": 1.0, "optimizer__learning_rate": 0.1, "quantizer__decay": 0.5, "run__steps": 4}
    variants = {
        "one": {},
        "two": {"mesh__data": 2},
        "parts": {"run__accumulation_steps": 2},
        "fsdp": {"mesh__fsdp": 2},
    }
    paths = []
    for name, variant in variants.items():
        values = run_values(inputs, run__output_dir=str(tmp_path / name), **options, **variant)
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(values))
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", MESHES, *map(str, paths)], env=environment, check=True, timeout=600)
    found = {name: flatten_dict(_params(tmp_path / name, 4), sep="/") for name in variants}
    for name in ("two", "parts", "fsdp"):
        for path, leaf in found["one"].items():
            scale = max(np.abs(leaf).max(), 1e-3)
            np.testing.assert_allclose(found[name][path], leaf, atol=1e-4 * scale, err_msg=f"{name} {path}")


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"quantizer__dropout": 2.0}, "`quantizer.dropout`: 2.0 is no share"),
        ({"losses__feature_matching": 1.0}, "`losses.feature_matching`: it compares features of discriminators"),
        ({"mesh__tensor": 2}, "`mesh.tensor`: 2 devices would share layers"),
        ({"distillation__teacher": "x"}, "`distillation.teacher`: losses.distillation has no weight"),
        ({"model__dtype": "float16"}, "`model.dtype`: spectra overflow in float16"),
        ({"model__scan_layers": True}, "`model.scan_layers`: the layers of a codec cannot be scanned"),
        ({"data__crop_seconds": 0.0}, "`data.crop_seconds`: 0.0 must be above 0"),
        ({"run__best_metric": "text_loss"}, "`run.best_metric`: 'text_loss' must be one of loss, log_mel, magnitude"),
        ({"losses__windows": [100]}, "`losses`: `windows` must be multiples of 32"),
        ({"objective__text_weight": 1.0}, "`objective` is no section"),
    ],
)
def test_bad_configurations(tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        run_config(tmp_path, **overrides)


def test_what_does_not_go_with_the_codec(inputs: Path, tmp_path: Path) -> None:
    def refused(match: str, **overrides: Any) -> None:
        with pytest.raises((ConfigurationError, ValueError), match=match):
            train(inputs, run__output_dir=str(tmp_path / "run"), **overrides)

    small_config(frame_rate=13).save_pretrained(tmp_path / "rate")
    refused(r"make frames of \d+ samples, but `frame_rate` 13", model__config=str(tmp_path / "rate"))
    refused("`data.crop_seconds` is 0.001, 32 samples, but the windows", data__crop_seconds=0.001)
    refused("`data.train`: 'nowhere' is not there", data__train="nowhere")
    refused("losses.distillation has a weight, but there is no teacher", losses__distillation=1.0)
    few = {"quantizer__kmeans_batches": 1, "data__batch_size": 1, "quantizer__start_step": 0}
    refused("30 latents are too few for 32 entries; raise quantizer.kmeans_batches to 2", **few)
    refused(
        "`model.freeze`: it freezes codebooks that hold nothing yet",
        model__freeze=["quantizer/.*"],
        quantizer__start_step=0,
    )
