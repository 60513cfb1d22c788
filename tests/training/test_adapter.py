"""Runs that train an adapter: what is trained, what stays, going on to the bit, and what is exported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from tests.torch_oracle import assert_close
from tests.training.runs import run_config, run_values, smaller_config, write_conversations
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration, QuantizationConfig
from transformers_moshi_flax.adapters.files import CONFIG, WEIGHTS
from transformers_moshi_flax.cli import main
from transformers_moshi_flax.training.configuration import ConfigurationError
from transformers_moshi_flax.training.run_checkpoints import PARAMS, RunCheckpoints
from transformers_moshi_flax.training.run_folder import export_checkpoint, open_run
from transformers_moshi_flax.training.scanned_layers import unstack_layers
from transformers_moshi_flax.training.trainer import Trainer

Model = FlaxMoshiForConditionalGeneration


OPTIONS = {"adapter__lora_dropout": 0.1, "optimizer__schedule": "constant"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model of two layers, and conversations."""
    folder = tmp_path_factory.mktemp("inputs")
    model = Model(smaller_config(num_hidden_layers=2), seed=1)
    # upstream draws the layers of single codebooks with a deviation of 1, with which attention sees one position alone
    flat = flatten_dict(model.params["depth_decoder"])
    scaled = {path: leaf / leaf.shape[0] ** 0.5 if path[-1] == "kernel" else leaf for path, leaf in flat.items()}
    model.params = {**model.params, "depth_decoder": unflatten_dict(scaled)}
    model.save_pretrained(folder / "base")
    write_conversations(folder / "train")
    return folder


def train(inputs: Path, folder: Path, **overrides: Any) -> Path:
    """The folder of a run."""
    given = {
        "model__config": None,
        "model__path": str(inputs / "base"),
        "adapter__r": 2,
        "run__output_dir": str(folder),
        **overrides,
    }
    Trainer(run_config(inputs, **given)).train()
    return folder


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(inputs, tmp_path_factory.mktemp("whole") / "run", **OPTIONS)


def trained_of(folder: Path, step: int) -> dict[str, np.ndarray]:
    checkpoints = RunCheckpoints(open_run(folder).checkpoints, read_only=True)
    found = checkpoints.restore(step, {PARAMS: checkpoints.host_target(step, PARAMS)}).arrays[PARAMS]
    checkpoints.close()
    return flatten_dict(found, sep="/")


def test_the_adapter_alone_is_trained(inputs: Path, whole: Path) -> None:
    trained = trained_of(whole, 6)
    assert {path.rpartition("/")[2] for path in trained} == {"lora_A", "lora_B"}
    # the query of the first codebook has one key to look at
    assert [path for path, leaf in trained.items() if not np.any(leaf)] == [
        "depth_decoder/layers/0/self_attn/q_proj/linear/0/lora_B"
    ]
    base = flatten_dict(Model.from_pretrained(inputs / "base").params, sep="/")
    frozen = flatten_dict(open_run(whole).restore_frozen(), sep="/")
    for path, leaf in base.items():
        np.testing.assert_array_equal(frozen[path], leaf)
    losses = [json.loads(line)["loss"] for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


def test_what_is_exported_is_an_adapter(inputs: Path, whole: Path) -> None:
    assert sorted(path.name for path in (whole / "export").iterdir()) == sorted([WEIGHTS, CONFIG, "README.md"])
    model = Model.from_pretrained(inputs / "base")
    model.load_adapter(whole / "export")
    trained = trained_of(whole, 6)
    leaves = model.adapter_leaves()
    assert leaves.keys() == trained.keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, trained[path])
    config = model.peft_config["default"]
    assert (config.r, config.lora_dropout, config.base_model_name_or_path) == (2, 0.1, str(inputs / "base"))


def test_in_half_floats(inputs: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It is known as the base's all the same; and the message names the format."""
    with pytest.raises(SystemExit) as end:
        main(["export-checkpoint", str(whole), str(tmp_path / "half"), "--dtype", "float16"])
    assert end.value.code == 0 and "in PEFT's format" in capsys.readouterr().err
    assert {tensor.dtype.name for tensor in load_file(tmp_path / "half" / WEIGHTS).values()} == {"float16"}
    Model.from_pretrained(inputs / "base").load_adapter(tmp_path / "half")


def test_a_merged_model_takes_the_place_of_an_adapter(whole: Path, tmp_path: Path) -> None:
    """Beside it, transformers would apply the adapter once more."""
    export_checkpoint(whole, tmp_path / "out")
    export_checkpoint(whole, tmp_path / "out", merges=True)
    assert not any(path.name.startswith("adapter") for path in (tmp_path / "out").iterdir())


def test_merged(inputs: Path, whole: Path, tmp_path: Path) -> None:
    assert export_checkpoint(whole, tmp_path / "merged", merges=True) == 6
    model = Model.from_pretrained(inputs / "base")
    model.load_adapter(whole / "export")
    model.merge_adapter()
    merged = Model.from_pretrained(tmp_path / "merged").params
    jax.tree.map(np.testing.assert_array_equal, merged, model.params)
    with pytest.raises(SystemExit) as end:
        main(["export-checkpoint", str(whole), str(tmp_path / "pt"), "--merge", "--to-pt", "--step", "4"])
    assert end.value.code == 0 and (tmp_path / "pt" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="`to_pt`: an adapter's files are those of PyTorch anyway"):
        export_checkpoint(whole, tmp_path / "other", to_pt=True)


def test_an_interrupted_run_ends_as_the_whole_one(inputs: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(inputs, folder, run__steps=4, **OPTIONS)
    train(inputs, folder, run__steps=6, **OPTIONS)
    for path, leaf in trained_of(folder, 6).items():
        np.testing.assert_array_equal(leaf, trained_of(whole, 6)[path], err_msg=path)


def test_modules_that_are_trained_whole(inputs: Path, tmp_path: Path) -> None:
    given = {"adapter__target_modules": ["decoder.model.layers.0.mlp.fc1"], "adapter__modules_to_save": ["lm_head"]}
    folder = train(inputs, tmp_path / "run", **given)
    assert "decoder/lm_head/kernel" in trained_of(folder, 6)
    written = load_file(folder / "export" / WEIGHTS)
    assert set(written) == {
        "base_model.model.decoder.lm_head.weight",
        "base_model.model.decoder.model.layers.0.mlp.fc1.lora_A.weight",
        "base_model.model.decoder.model.layers.0.mlp.fc1.lora_B.weight",
    }
    model = Model.from_pretrained(inputs / "base")
    before = np.asarray(model.params["decoder"]["lm_head"]["kernel"])
    model.load_adapter(folder / "export")
    after = np.asarray(model.adapted_params()["decoder"]["lm_head"]["kernel"])
    assert not np.array_equal(before, after)


def test_scanned_layers(inputs: Path, tmp_path: Path) -> None:
    options = {"run__steps": 2, "optimizer__eps": 1.0}  # Adam divides small gradients by themselves
    plain = train(inputs, tmp_path / "plain", **options)
    scanned = train(inputs, tmp_path / "scanned", model__scan_layers=True, **options)
    ours, theirs = (load_file(folder / "export" / WEIGHTS) for folder in (scanned, plain))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert_close(tensor, theirs[key], 1e-4, key)


@pytest.mark.parametrize("scans", [False, True])
def test_dropout_has_an_effect(inputs: Path, tmp_path: Path, scans: bool) -> None:
    options = {"run__steps": 1, "optimizer__eps": 1.0, "model__scan_layers": scans}
    found = [
        load_file(train(inputs, tmp_path / f"{share}", adapter__lora_dropout=share, **options) / "export" / WEIGHTS)
        for share in (0.0, 0.5)
    ]
    # of every layer, far more than rounding: B moves by what A sees
    for key in (key for key in found[0] if "lora_B" in key and "decoder.model" in key):
        plain, dropped = (tensors[key] for tensors in found)
        assert np.abs(plain - dropped).max() > 0.05 * np.abs(plain).max(), key


def test_the_base_is_kept_in_the_dtype_of_the_computation(inputs: Path, tmp_path: Path) -> None:
    folder = train(inputs, tmp_path / "run", model__dtype="bfloat16", model__scan_layers=True, run__steps=2)
    assert {tensor.dtype.name for tensor in load_file(folder / "export" / WEIGHTS).values()} == {"float32"}
    frozen = flatten_dict(open_run(folder).restore_frozen(), sep="/")
    assert frozen["decoder/lm_head/kernel"].dtype.name == "bfloat16"


def scaled_steps(**options: Any) -> dict[str, Any]:
    """Few steps, by gradients as they are: Adam divides small ones by themselves."""
    return {"run__steps": 3, "optimizer__eps": 1.0, "optimizer__schedule": "constant", **options}


GROUP_SIZE = {"int8": None, "int4": 4, "nf4": 4}


def quantized_by(kind: str) -> dict[str, Any]:
    """Settings of a run."""
    return {"model__quantization": kind, "model__quantization_group_size": GROUP_SIZE[kind]}


@pytest.fixture(scope="module", params=["int8", "int4", "nf4"])
def quantized(request: pytest.FixtureRequest, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A kind, the base in it, the base of the floats that this one computes with, and a run beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    size = GROUP_SIZE[request.param]
    model = Model.from_pretrained(inputs / "base", quantization=QuantizationConfig(request.param, group_size=size))
    model.save_pretrained(folder / "quantized")
    model.dequantize().save_pretrained(folder / "floats")
    train(inputs, folder / "run", **scaled_steps(**quantized_by(request.param)))
    return request.param, folder


def test_beside_quantized_weights(inputs: Path, quantized: Any) -> None:
    """The adapter becomes what it becomes beside the floats that the codes stand for."""
    kind, folder = quantized
    found = load_file(folder / "run" / "export" / WEIGHTS)
    run = train(inputs, folder / "plain", **scaled_steps(model__path=str(folder / "floats")))
    for key, tensor in load_file(run / "export" / WEIGHTS).items():
        assert_close(found[key], tensor, 1e-4, key)
    # the weights that do not learn are codes in the folder as well, and no floats of these layers
    frozen = flatten_dict(open_run(folder / "run").restore_frozen(), sep="/")
    frozen = {path: leaf for path, leaf in frozen.items() if not path.endswith("/lora_scaling")}
    ours = flatten_dict(Model.from_pretrained(folder / "quantized").params, sep="/")
    assert frozen.keys() == ours.keys() and any(path.endswith(f"kernel_{kind}") for path in frozen)
    for path, leaf in ours.items():
        np.testing.assert_array_equal(frozen[path], leaf, err_msg=path)


def test_a_base_that_is_quantized_already(inputs: Path, quantized: Any) -> None:
    _, folder = quantized
    run = train(inputs, folder / "already", **scaled_steps(model__path=str(folder / "quantized")))
    for key, tensor in load_file(run / "export" / WEIGHTS).items():
        np.testing.assert_array_equal(tensor, load_file(folder / "run" / "export" / WEIGHTS)[key], err_msg=key)


def test_quantized_runs_go_on_to_the_bit(inputs: Path, quantized: Any) -> None:
    kind, folder = quantized
    for steps in (2, 3):
        train(inputs, folder / "interrupted", **scaled_steps(**quantized_by(kind), run__steps=steps))
    for path, leaf in trained_of(folder / "interrupted", 3).items():
        np.testing.assert_array_equal(leaf, trained_of(folder / "run", 3)[path], err_msg=path)


def test_merged_into_the_floats_of_quantized_weights(quantized: Any, tmp_path: Path) -> None:
    _, folder = quantized
    export_checkpoint(folder / "run", tmp_path / "merged", merges=True)
    merged, expected = Model.from_pretrained(tmp_path / "merged"), Model.from_pretrained(folder / "floats")
    assert merged.quantization is None
    expected.load_adapter(folder / "run" / "export")
    expected.merge_adapter()
    jax.tree.map(np.testing.assert_array_equal, merged.params, expected.params)
    # and the adapter alone goes beside the quantized weights
    model = Model.from_pretrained(folder / "quantized")
    model.load_adapter(folder / "run" / "export")
    ids = np.ones((1, 4), np.int32)
    # the depth decoder's layers and Mimi's are not run by this
    found, wanted = (
        each.decoder(ids, params=params["decoder"]).logits
        for each, params in ((model, model.adapted_params()), (expected, expected.params))
    )
    assert_close(found, wanted, 1e-5, "logits")


@pytest.mark.slow
def test_scales_that_are_quantized_too(inputs: Path, tmp_path: Path) -> None:
    """An interrupted run with scanned layers; the adapter becomes what it becomes beside the floats."""
    quantization = QuantizationConfig("nf4", group_size=4, double_quantization=True)
    model = Model.from_pretrained(inputs / "base", quantization=quantization)
    ours = flatten_dict(model.params, sep="/")
    options = scaled_steps(**quantized_by("nf4"), model__double_quantization=True, model__scan_layers=True)
    for steps in (2, 3):
        run = train(inputs, tmp_path / "run", **{**options, "run__steps": steps})
    frozen = flatten_dict(unstack_layers(open_run(run).restore_frozen()), sep="/")
    for path, leaf in ours.items():
        np.testing.assert_array_equal(frozen[path], leaf, err_msg=path)
    model.dequantize().save_pretrained(tmp_path / "floats")
    plain = train(inputs, tmp_path / "plain", **scaled_steps(model__path=str(tmp_path / "floats")))
    found = load_file(run / "export" / WEIGHTS)
    for key, tensor in load_file(plain / "export" / WEIGHTS).items():
        assert_close(found[key], tensor, 1e-4, key)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_and_scanned_layers(inputs: Path, tmp_path: Path, kind: str) -> None:
    options = scaled_steps(**quantized_by(kind), model__dtype="bfloat16")
    folders = [
        train(inputs, tmp_path / f"{scans}", model__scan_layers=scans, model__gradient_checkpointing=scans, **options)
        for scans in (False, True)
    ]
    plain, scanned = (load_file(folder / "export" / WEIGHTS) for folder in folders)
    for key, tensor in scanned.items():
        assert_close(tensor, plain[key], 2e-2, key)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"adapter__r": None, "model__quantization": "nf4"},
            "`model.quantization`: quantized weights are not trained; give adapter.r",
        ),
        ({"model__quantization": "nf5"}, "`model.quantization`"),
        ({"model__quantization_group_size": 4}, "`model.quantization_group_size`: nothing is quantized"),
        (
            {"model__quantization": "nf4", "model__quantization_group_size": 3},
            "`model.quantization_group_size`: .* must be even",
        ),
        ({"model__double_quantization": True}, "`model.double_quantization`: nothing is quantized"),
        (
            {"model__quantization": "int8", "model__double_quantization": True},
            "`model.quantization_group_size`: `double_quantization`=True, but 'int8' has a scale for each output",
        ),
        (
            {"model__quantization": "int8", "adapter__modules_to_save": ["decoder.lm_head"]},
            "`modules_to_save`: decoder/lm_head/kernel is quantized",
        ),
        ({"adapter__r": 0}, "`adapter.r` must be a whole number, at least 1"),
        ({"adapter__r": None, "adapter__lora_alpha": 3.0}, "`adapter.lora_alpha`: there is no adapter without a rank"),
        ({"adapter__lora_dropout": 1.0}, "`adapter.lora_dropout` must be"),
        ({"adapter__target_modules": ["all-linear", "fc1"]}, "`adapter.target_modules`: all-linear stands for all"),
        ({"model__freeze": []}, "`model.freeze`: with an adapter the whole model is frozen"),
        ({"model__path": None, "model__config": "x"}, "`adapter`: an adapter of random weights is of no use"),
        ({"adapter__rank": 3}, "`adapter.rank` is no key"),
        ({"adapter__target_modules": ["q_prj.linear"]}, "`adapter`: .*'q_prj.linear' is no layer.*did you mean"),
    ],
)
def test_mistakes(inputs: Path, tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        train(inputs, tmp_path / "run", **overrides)
    assert not (tmp_path / "run" / "checkpoints").exists()


ON_MESHES = """
import sys
from transformers_moshi_flax.training.configuration import load_configuration
from transformers_moshi_flax.training.trainer import Trainer
for config in sys.argv[1:]:
    Trainer(load_configuration(config)).train()
"""


@pytest.mark.slow
def test_meshes_and_accumulation(inputs: Path, tmp_path: Path) -> None:
    """Two devices that share rows or weights, and two micro-batches, end where one device does."""
    variants = {"one": {}, "data": {"mesh__data": 2}, "fsdp": {"mesh__fsdp": 2}, "tensor": {"mesh__tensor": 2}}
    variants["parts"] = {"run__accumulation_steps": 2}
    quantized = quantized_by("nf4")
    double = {**quantized, "model__double_quantization": True}
    variants |= {
        **{f"{name} quantized": {**variant, **quantized} for name, variant in variants.items()},
        **{f"{name} double": {**variants[name], **double} for name in ("one", "fsdp", "tensor")},
    }
    paths = []
    for name, variant in variants.items():
        options = {"model__config": None, "model__path": str(inputs / "base"), "adapter__r": 2, "optimizer__eps": 1.0}
        values = run_values(inputs, run__output_dir=str(tmp_path / name), run__steps=3, **options, **variant)
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(values))
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", ON_MESHES, *map(str, paths)], env=environment, check=True, timeout=600)
    found = {name: load_file(tmp_path / name / "export" / WEIGHTS) for name in variants}
    for name in variants:
        alone = " ".join(["one", *name.split()[1:]])
        for key, tensor in found[alone].items():
            assert_close(found[name][key], tensor, 1e-4, f"{name} {key}")
