"""Whole runs of a tiny language model: what they leave, how they go on, what is exported, what is refused."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import yaml
from flax.traverse_util import flatten_dict
from rich.console import Console
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from tests.configs import tiny_llama_config, tiny_moshi_config
from tests.torch_oracle import assert_close
from tests.training.text.runs import draw_texts, run_config, run_values, write_inputs, write_lines, write_tokenizer
from transformers_moshi_flax import FlaxLlamaForCausalLM, FlaxMoshiForCausalLM
from transformers_moshi_flax.cli import main
from transformers_moshi_flax.training import trainer as trainer_module
from transformers_moshi_flax.training.configuration import ConfigurationError, build_configuration, to_yaml
from transformers_moshi_flax.training.run_folder import export_checkpoint, open_run
from transformers_moshi_flax.training.text.configuration import TextTrainingConfig
from transformers_moshi_flax.training.text.run_folder import TextRunFolder
from transformers_moshi_flax.training.text.trainer import TextTrainer
from transformers_moshi_flax.training.trainer import Interrupted, make_trainer


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def train(folder: Path, notes: Console | None = None, **overrides: Any) -> dict[str, float]:
    return make_trainer(run_config(folder, **overrides), notes or quiet()).train()


def command(*arguments: object) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 0


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, str, float]]:
    return [(line["step"], line["split"], line["loss"]) for line in lines(run)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def whole(inputs: Path) -> Path:
    """A run of six steps. Not to be changed."""
    notes = quiet()
    train(inputs, notes)
    (inputs / "notes").write_text(notes.file.getvalue())
    return inputs / "run"


def test_what_a_run_leaves(inputs: Path, whole: Path) -> None:
    assert [entry[:2] for entry in losses(whole)] == [
        *((step, "train") for step in (1, 2, 3)),
        (3, "evaluation"),
        *((step, "train") for step in (4, 5, 6)),
        (6, "evaluation"),
    ]
    evaluated, trained = lines(whole)[-1], lines(whole)[-2]
    assert evaluated["perplexity"] == pytest.approx(np.exp(evaluated["loss"]), rel=1e-5)
    assert trained["tokens_per_second"] > 0 and trained["tokens"] <= 4 * 12
    notes = (inputs / "notes").read_text()
    assert "data.train: 8 texts" in notes and "held out: 2 texts" in notes and "tokens/s" in notes
    for step in (3, 6):
        sample = (whole / "samples" / f"step-{step}" / "0.txt").read_text()
        assert sample.startswith("w3 w5 w")
    assert isinstance(open_run(whole), TextRunFolder) and not (whole / "frozen").exists()


def test_interrupted_it_goes_on_to_the_bit(
    inputs: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the fourth step; afterwards the model that it began with is gone."""
    put, batches = trainer_module.put_batch, []

    def put_and_signal(*args: Any) -> Any:
        batches.append(args)
        if len(batches) == 5:  # an evaluation of one batch is among them
            os.kill(os.getpid(), signal.SIGTERM)
        return put(*args)

    write_inputs(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="step 4"):
        patch.setattr(trainer_module, "put_batch", put_and_signal)
        train(tmp_path, run__checkpoint_every=50)
    (tmp_path / "model" / "config.json").unlink()
    train(tmp_path, run__checkpoint_every=50, data__workers=1)
    assert losses(tmp_path / "run") == losses(whole)
    ours, theirs = (load_file(run / "export" / "flax_model.safetensors") for run in (tmp_path / "run", whole))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, name)
    with pytest.raises(ConfigurationError, match=r"data\.evaluation_share: 0\.2 -> 0\.3"):
        train(tmp_path, data__evaluation_share=0.3)
    values = {"model": {"config": "x"}, "data": {"train": "x"}, "run": {"output_dir": str(whole), "steps": 1}}
    with pytest.raises(ConfigurationError, match="task: text -> dialogue"):
        make_trainer(build_configuration(values))


def test_on_the_command_line(
    inputs: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Train, export, complete: upstream's class reads the export, and gives the same."""
    for name in ("train", "complete"):
        monkeypatch.setattr(f"transformers_moshi_flax.cli.{name}.use_compilation_cache", lambda: None)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(run_values(inputs, run__output_dir=str(tmp_path / "run"))))
    command("train", config, "--set", "run.accumulation_steps=2", "--set", "run.evaluate_every=null")
    # a batch in two parts gives the same steps
    steps = {step: loss for step, split, loss in losses(whole) if split == "train"}
    found = {step: loss for step, split, loss in losses(tmp_path / "run") if split == "train"}
    np.testing.assert_allclose([found[step] for step in steps], [*steps.values()], rtol=1e-5)

    command("export-checkpoint", whole, tmp_path / "out", "--to-pt")
    ours = FlaxLlamaForCausalLM.from_pretrained(tmp_path / "out")
    exported = FlaxLlamaForCausalLM.from_pretrained(whole / "export")
    jax.tree.map(np.testing.assert_array_equal, ours.params, exported.params)
    ids = np.array([[3, 5, 7, 11]], np.int32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(theirs).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        assert_close(ours(ids).logits, theirs(torch.tensor(ids).long()).logits, 1e-5)
    capsys.readouterr()
    command("complete", "--model", tmp_path / "out", "--prompt", "w3 w5", "--max-new-tokens", 3, "--temperature", 0)
    words = np.asarray(ours.generate(np.array([[3, 5]]), max_new_tokens=3).sequences)[0, 2:]
    assert capsys.readouterr().out.split() == [f"w{number}" for number in words if number]


def test_an_adapter_beside_quantized_weights(inputs: Path, tmp_path: Path) -> None:
    """QLoRA in bfloat16 from an export, on held-out texts of their own: the base stays, the adapter is learned."""
    base = FlaxLlamaForCausalLM(run_base_config(inputs), seed=3)
    base.save_pretrained(tmp_path / "base")
    write_lines(tmp_path / "held-out.jsonl", draw_texts((5, 9)))
    options = {"adapter__r": 2, "model__quantization": "nf4", "model__quantization_group_size": 8}
    options |= {"model__dtype": "bfloat16", "run__prompts": []}
    options |= {"model__config": None, "model__path": str(tmp_path / "base"), "run__output_dir": str(tmp_path / "run")}
    options |= {"model__tokenizer": str(inputs / "model"), "data__evaluation_share": 0.0}
    options |= {"data__evaluation": str(tmp_path / "held-out.jsonl"), "run__steps": 4, "optimizer__eps": 1e-8}
    metrics = train(inputs, **options)
    assert np.isfinite(metrics["loss"])
    export_checkpoint(tmp_path / "run", tmp_path / "adapter")
    leaves = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(np.any(leaf) for name, leaf in leaves.items() if "lora_B" in name)
    model = FlaxLlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.load_adapter(tmp_path / "adapter")
    export_checkpoint(tmp_path / "run", tmp_path / "merged", merges=True)
    merged = FlaxLlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    kernel = ("model", "layers", "0", "mlp", "up_proj", "kernel")
    assert not np.array_equal(flatten_dict(merged.params)[kernel], flatten_dict(base.params)[kernel])


def run_base_config(inputs: Path) -> Any:
    return FlaxLlamaForCausalLM.config_class.from_pretrained(inputs / "model")


def test_moshis_backbone_is_a_language_model(tmp_path: Path) -> None:
    tiny_moshi_config(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    write_lines(tmp_path / "train.jsonl", draw_texts())
    train(tmp_path, run__steps=2, run__evaluate_every=2, run__sample_temperature=1.0)
    model = FlaxMoshiForCausalLM.from_pretrained(tmp_path / "run" / "export")
    assert set(model.params) == {"lm_head", "model"}
    assert (tmp_path / "run" / "samples" / "step-2" / "0.txt").read_text().startswith("w3 w5")


MESH = """
import sys
from transformers_moshi_flax.training import load_configuration, make_trainer
make_trainer(load_configuration(sys.argv[1])).train()
"""


def test_on_a_mesh(inputs: Path, whole: Path, tmp_path: Path, keeping: dict[str, str]) -> None:
    """Four devices, by rows, parameters and layers: the losses are those of one device, and so is the sample."""
    options = {"run__output_dir": str(tmp_path / "run"), "run__steps": 3, "mesh__fsdp": 2, "mesh__tensor": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run_values(inputs, **options)))
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    environment = {**os.environ, **keeping, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", MESH, str(tmp_path / "config.yaml")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = losses(tmp_path / "run"), losses(whole)[:4]
    assert [entry[:2] for entry in ours] == [entry[:2] for entry in theirs]
    np.testing.assert_allclose([entry[2] for entry in ours], [entry[2] for entry in theirs], rtol=1e-5)
    samples = [(run / "samples" / "step-3" / "0.txt").read_text() for run in (tmp_path / "run", whole)]
    assert samples[0] == samples[1]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"data__evaluation_share": 1.0}, ["data.evaluation_share", "0 to below 1"]),
        ({"data__evaluation": "x"}, ["data.evaluation_share", "leave one"]),
        ({"data__evaluation_share": 0.0, "run__evaluate_every": None}, ["run.prompts", "data.evaluation_share"]),
        ({"data__evaluation_share": 0.0, "run__prompts": []}, ["run.evaluate_every"]),
        ({"data__min_length": 3}, ["data.min_length", "no key"]),
        ({"run__samples": 3}, ["run.samples", "no key"]),
        ({"run__best_metric": "text_loss"}, ["run.best_metric", "one of loss"]),
        ({"adapter__r": 2}, ["adapter", "model.path"]),
        ({"objective__text_weight": 1.0}, ["objective", "no section"]),
    ],
)
def test_contradictions(tmp_path: Path, overrides: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        run_config(tmp_path, **overrides)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"data__train": "nowhere"}, ["data.train", "nowhere"]),
        ({"data__max_length": 129}, ["data.max_length", "128"]),
        ({"model__config": "tokenizer"}, ["model.config", "config.json"]),
        ({"model__tokenizer": "bare"}, ["model.tokenizer", "no tokenizer"]),
        ({"model__config": "bare"}, ["model.tokenizer", "no tokenizer"]),
        ({"model__config": "mimi"}, ["model.config", "mimi", "no language model"]),
        ({"model__config": "gemma", "model__scan_layers": True}, ["model.scan_layers", "layer_types"]),
        ({"run__prompts": [""]}, ["run.prompts", "no tokens"]),
        ({"run__sample_tokens": 127}, ["run.prompts", "2 tokens"]),
        (
            {"data__evaluation": "one.jsonl", "data__evaluation_share": 0.0, "model__config": "small"},
            ["data.train", "the id 39"],
        ),
    ],
)
def test_what_does_not_go_together_is_named_before_any_work(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: dict[str, Any], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tokenizer(tmp_path / "tokenizer")
    write_lines(tmp_path / "one.jsonl", ["w1 w2"])
    base = run_base_config(inputs)
    base.save_pretrained(tmp_path / "bare")
    small = type(base)(**{**base.to_dict(), "vocab_size": 39})
    small.save_pretrained(tmp_path / "small")
    write_tokenizer(tmp_path / "small")
    tiny_llama_config("gemma2").save_pretrained(tmp_path / "gemma")
    write_tokenizer(tmp_path / "gemma")
    (tmp_path / "mimi").mkdir()
    (tmp_path / "mimi" / "config.json").write_text('{"model_type": "mimi"}')
    with pytest.raises(ConfigurationError) as caught:
        make_trainer(run_config(inputs, **{"run__output_dir": str(tmp_path / "run"), **overrides}))
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_task_is_written_down(inputs: Path) -> None:
    config = run_config(inputs)
    assert isinstance(config, TextTrainingConfig) and isinstance(make_trainer(config), TextTrainer)
    written = to_yaml(config)
    assert written.startswith("task: text\n")
    assert build_configuration(yaml.safe_load(written)) == config
    with pytest.raises(ConfigurationError, match="`task`: 'texts' must be one of dialogue, text"):
        build_configuration({**run_values(inputs), "task": "texts"})
