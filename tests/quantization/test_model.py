"""Models with quantized layers: what they compute, files, adapters beside them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from tests.configs import tiny_mimi_config, tiny_moshi_config
from tests.dialogues import spoken_codes
from tests.torch_oracle import assert_close
from transformers_moshi_flax import (
    FlaxMimiModel,
    FlaxMoshiDepthDecoder,
    FlaxMoshiForCausalLM,
    FlaxMoshiForConditionalGeneration,
    LoraConfig,
    QuantizationConfig,
)
from transformers_moshi_flax.models.moshi.layers_flax_moshi import FlaxMoshiFlexibleLinear
from transformers_moshi_flax.nn.linear import QUANTIZED_SCALES
from transformers_moshi_flax.ops.scales import QuantizedScales, float_scales
from transformers_moshi_flax.quantization.tree import dequantized, quantized
from transformers_moshi_flax.training import split_params

Model = FlaxMoshiForConditionalGeneration
KINDS = ("int8", "int4", "nf4")
FRAMES = 5


def grouped(kind: str, **fields: Any) -> QuantizationConfig:
    """In groups that the tiny layers can be cut into."""
    return QuantizationConfig(kind, group_size=None if kind == "int8" else 4, **fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of floats, and of each kind."""
    folder = tmp_path_factory.mktemp("quantized")
    model = Model(tiny_moshi_config(), seed=1)
    # upstream draws the layers of single codebooks with a deviation of 1, which makes much of a rounding error
    flat = flatten_dict(model.params["depth_decoder"])
    scaled = {path: leaf / leaf.shape[0] ** 0.5 if path[-1] == "kernel" else leaf for path, leaf in flat.items()}
    model.params = {**model.params, "depth_decoder": unflatten_dict(scaled)}
    model.save_pretrained(folder / "pt", to_pt=True)
    model.save_pretrained(folder / "flax")
    for kind in KINDS:
        Model.from_pretrained(folder / "pt", quantization=grouped(kind)).save_pretrained(folder / kind)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(folder: Path, kind: str) -> Model:
    """A quantized one. Not to be changed."""
    return Model.from_pretrained(folder / kind)


@pytest.fixture(scope="module")
def floats(folder: Path, kind: str) -> Model:
    """The same with the dequantized kernels. Not to be changed."""
    return Model.from_pretrained(folder / kind).dequantize()


def same(ours: Any, theirs: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def size(params: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def outputs(model: Model) -> tuple[np.ndarray, np.ndarray]:
    rng, config = np.random.default_rng(0), model.config
    codes = rng.integers(0, config.audio_vocab_size, (2, 2, config.num_codebooks, FRAMES)).astype(np.int32)
    ids = rng.integers(0, config.vocab_size, (2, FRAMES)).astype(np.int32)
    found = model(ids, user_audio_codes=codes[0], moshi_audio_codes=codes[1], text_labels=ids, audio_labels=codes[1])
    return np.asarray(found.logits), np.asarray(found.audio_logits)


def generated(model: Model) -> tuple[np.ndarray, np.ndarray]:
    found = model.generate(
        **model.get_unconditional_inputs(1), max_new_tokens=6, do_sample=False, return_audio_codes=True
    )
    return np.asarray(found.sequences), np.asarray(found.audio_codes)


def test_computes_with_the_dequantized_weights(model: Model, floats: Model) -> None:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        found = outputs(model)
    for ours, theirs in zip(found, outputs(floats)):
        assert_close(ours, theirs, 1e-5)


def test_generates_the_same(model: Model, floats: Model) -> None:
    same(generated(model), generated(floats))


def test_streams(folder: Path) -> None:
    model = Model.from_pretrained(folder / "int4")
    ours = spoken_codes(model)
    same(ours, spoken_codes(model.dequantize()))


def test_mimi_too(model: Model, floats: Model) -> None:
    codes = np.random.default_rng(0).integers(0, 32, (1, 6, 4), np.int32)
    ours, theirs = (each.audio_encoder.decode(codes).audio_values for each in (model, floats))
    assert_close(ours, theirs, 1e-5)


def test_in_memory_or_while_reading(folder: Path, model: Model, kind: str) -> None:
    in_memory = Model.from_pretrained(folder / "flax")
    assert in_memory.quantize(grouped(kind)) is in_memory
    same(in_memory.params, model.params)
    assert in_memory.config.to_dict() == model.config.to_dict()
    assert in_memory.quantization == model.quantization == grouped(kind)
    part, params = Model.from_pretrained(folder / "pt", quantization=grouped(kind), _do_init=False)
    same(params, model.params)
    assert part.required_params == model.required_params


@pytest.mark.parametrize("options", [("pt", "nf4"), ("nf4", None)])
def test_on_a_mesh(folder: Path, options: tuple[str, str | None]) -> None:
    """Codes lie as kernels would; of a checkpoint of floats, and of a quantized one."""
    source, kind = options
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tensor"))
    model = Model.from_pretrained(folder / source, sharding=mesh, quantization=None if kind is None else grouped(kind))
    same(model.params, Model.from_pretrained(folder / "nf4").params)
    lies = model.params["decoder"]["lm_head"]
    assert lies["kernel_nf4"].sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    assert lies["scales"].sharding.spec == jax.sharding.PartitionSpec()


def test_what_is_quantized(model: Model, floats: Model, kind: str) -> None:
    """All linear layers, no other leaf; the bytes are those of codes and scales."""
    before, after = flatten_dict(floats.params, sep="/"), flatten_dict(model.params, sep="/")
    kernels = [path for path, leaf in before.items() if path.endswith("/kernel") and leaf.ndim == 2]
    for path, leaf in before.items():
        if path not in kernels:
            np.testing.assert_array_equal(after[path], leaf)
    layers = [path.removesuffix("/kernel") for path in kernels]
    expected = {f"{layer}/{name}" for layer in layers for name in (f"kernel_{kind}", "scales")}
    assert after.keys() - before.keys() == expected and before.keys() - after.keys() == set(kernels)
    for layer in layers:
        inputs, outputs = before[f"{layer}/kernel"].shape
        groups = 1 if kind == "int8" else inputs // 4
        codes = inputs * outputs // (1 if kind == "int8" else 2)
        assert after[f"{layer}/kernel_{kind}"].nbytes == codes
        assert after[f"{layer}/scales"].nbytes == 4 * groups * outputs
    assert model.num_parameters() == floats.num_parameters() == sum(leaf.size for leaf in before.values())


@pytest.mark.parametrize("way", [{}, {"max_shard_size": "50KB"}, {"safe_serialization": False}])
def test_files_to_the_bit(model: Model, tmp_path: Path, kind: str, way: dict[str, Any]) -> None:
    model.save_pretrained(tmp_path, **way)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["quantization_config"] == grouped(kind).to_dict() and values["dtype"] == "float32"
    again = Model.from_pretrained(tmp_path, verify=True)
    same(again.params, model.params)
    assert again.quantization == model.quantization and again.dtype == jnp.float32


def test_parts(folder: Path, model: Model, kind: str) -> None:
    """A part of a quantized model is quantized: taken out of it, loaded alone, and saved alone."""
    for name, part_class in (
        ("decoder", FlaxMoshiForCausalLM),
        ("depth_decoder", FlaxMoshiDepthDecoder),
        ("audio_encoder", FlaxMimiModel),
    ):
        loaded, part = part_class.from_pretrained(folder / kind), getattr(model, name)
        same(loaded.params, model.params[name])
        assert loaded.quantization == part.quantization == model.quantization
        assert loaded.params_shape_tree == part.params_shape_tree == model.params_shape_tree[name]
    with pytest.raises(ValueError, match="is a part of a FlaxMoshiForConditionalGeneration; quantize that one"):
        model.depth_decoder.quantize("int8")


def test_a_part_is_saved_alone(model: Model, tmp_path: Path) -> None:
    model.depth_decoder.save_pretrained(tmp_path)
    again = FlaxMoshiDepthDecoder.from_pretrained(tmp_path)
    same(again.params, model.params["depth_decoder"])


def test_floats_again(folder: Path, floats: Model, tmp_path: Path) -> None:
    assert floats.quantization is None and "quantization_config" not in floats.config.to_dict()
    floats.save_pretrained(tmp_path, to_pt=True)
    again = Model.from_pretrained(tmp_path)
    same(again.params, floats.params)
    assert again.params_shape_tree == Model(tiny_moshi_config(), _do_init=False).params_shape_tree
    with pytest.raises(ValueError, match="dequantize: the weights of this model are not quantized"):
        again.dequantize()


def test_narrow_floats(folder: Path, tmp_path: Path) -> None:
    """Codes are made of the values as they are stored; scales stay float32, whatever the others are."""
    half = Model.from_pretrained(folder / "flax", jnp.bfloat16, quantization=grouped("int4"))
    flat, wide = flatten_dict(half.params), flatten_dict(Model.from_pretrained(folder / "int4").params)
    for path, leaf in flat.items():
        if path[-1] in ("scales", "kernel_int4"):
            np.testing.assert_array_equal(leaf, wide[path])
        else:
            assert leaf.dtype == jnp.bfloat16, path
    assert half.dtype == jnp.bfloat16
    same(half.to_bf16(unflatten_dict(wide)), half.params)
    half.save_pretrained(tmp_path)
    again = Model.from_pretrained(tmp_path)
    assert again.dtype == jnp.bfloat16
    same(again.params, half.params)
    assert all(np.isfinite(output.astype(np.float32)).all() for output in outputs(again))


def test_with_offsets(folder: Path, tmp_path: Path) -> None:
    """Leaves beside the scales: saved and loaded to the bit, float32 whatever the others are, and computed with."""
    quantization = QuantizationConfig("int4", group_size=4, offsets=True)
    model = Model.from_pretrained(folder / "flax", quantization=quantization)
    leaves = flatten_dict(model.params, sep="/")
    lines = [path for path in leaves if path.endswith("/offsets")]
    assert len(lines) == sum(path.endswith("/scales") for path in leaves) == 93
    assert str(model.quantization) == "int4 (4 bits, groups of 4 with offsets)"
    narrow = flatten_dict(model.to_bf16(model.params), sep="/")
    assert narrow[lines[0]].dtype == jnp.float32
    model.save_pretrained(tmp_path)
    again = Model.from_pretrained(tmp_path, jnp.float32)
    same(again.params, model.params)
    found = outputs(model)
    for ours, theirs in zip(found, outputs(again.dequantize())):
        assert_close(ours, theirs, 1e-5)
    assert again.quantization is None and not any("offsets" in path for path in flatten_dict(again.params, sep="/"))


def test_scales_that_are_quantized_too(folder: Path, tmp_path: Path) -> None:
    """Three leaves for the scales, which are those of the plain kind in 8 bits; the other leaves are the same."""
    quantization = grouped("nf4", double_quantization=True)
    assert str(quantization) == "nf4 (4 bits, groups of 4 with scales in 8 bits)"
    model = Model.from_pretrained(folder / "pt", quantization=quantization)
    same(Model.from_pretrained(folder / "flax").quantize(quantization).params, model.params)
    plain = flatten_dict(Model.from_pretrained(folder / "nf4").params, sep="/")
    leaves = flatten_dict(model.params, sep="/")
    layers = [path.removesuffix("/scales") for path in plain if path.endswith("/scales")]
    assert leaves.keys() - plain.keys() == {f"{layer}/{name}" for layer in layers for name in QUANTIZED_SCALES}
    same(
        {path: leaves[path] for path in leaves.keys() & plain.keys()},
        {path: plain[path] for path in leaves.keys() & plain.keys()},
    )
    for layer in layers:
        scales = QuantizedScales(*(leaves.pop(f"{layer}/{name}") for name in QUANTIZED_SCALES))
        wanted = plain[f"{layer}/scales"]
        assert scales.codes.nbytes == wanted.size and scales.steps.nbytes == 4 * len(wanted)
        off = np.abs(float_scales(scales) - wanted)
        assert (off <= 0.501 * scales.steps).all() and off.max() > 0
    for way in ({}, {"safe_serialization": False}):
        target = tmp_path / f"{len(way)}"
        model.save_pretrained(target, **way)
        again = Model.from_pretrained(target, verify=True)
        same(again.params, model.params)
        assert again.quantization == quantization and again.params_shape_tree == model.params_shape_tree
    same(FlaxMoshiDepthDecoder.from_pretrained(tmp_path / "0").params, model.params["depth_decoder"])
    with pytest.raises(ValueError, match=r"the weights are quantized, nf4 .*, but 'moshi' has int8"):
        model.save_kyutai(tmp_path / "kyutai")
    (tmp_path / "0" / "flax_model.safetensors").unlink()
    (tmp_path / "0" / "model.safetensors").write_bytes((folder / "pt" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="which the PyTorch layout has not"):
        Model.from_pretrained(tmp_path / "0")


def test_computes_with_scales_in_8_bits(folder: Path) -> None:
    """Calls, generation, streams, adapters and codebooks that are known when it runs, in narrow floats too."""
    quantization = grouped("nf4", double_quantization=True)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tensor"))
    model = Model.from_pretrained(folder / "flax", quantization=quantization, sharding=mesh)
    lies = model.params["decoder"]["lm_head"]
    assert lies["kernel_nf4"].sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    assert {lies[name].sharding.spec for name in QUANTIZED_SCALES} == {jax.sharding.PartitionSpec()}
    model = Model.from_pretrained(folder / "flax", quantization=quantization)
    dtypes = {path[-1]: leaf.dtype.name for path, leaf in flatten_dict(model.to_bf16(model.params)).items()}
    assert [dtypes[name] for name in ("embedding", *QUANTIZED_SCALES)] == ["bfloat16", "int8", "float32", "float32"]
    floats = Model.from_pretrained(folder / "flax", quantization=quantization).dequantize()
    assert not any(path[-1] in QUANTIZED_SCALES for path in flatten_dict(floats.params))
    for each in (model, floats):
        each.add_adapter(LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False), "a", seed=2)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        found = outputs(model)
    for ours, theirs in zip(found, outputs(floats)):
        assert_close(ours, theirs, 1e-5)
    same(generated(model), generated(floats))
    same(spoken_codes(model), spoken_codes(floats))


def test_new_weights_of_a_quantized_configuration(model: Model) -> None:
    assert jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), Model(model.config).params) == (
        model.params_shape_tree
    )


@pytest.mark.parametrize("kind", KINDS)
def test_codebooks_that_are_known_when_it_runs(kind: str) -> None:
    layer, draw = FlaxMoshiFlexibleLinear(6, 5, 3), np.random.default_rng(0)
    x = jnp.asarray(draw.standard_normal((2, 3, 6)), jnp.float32)
    kernels = {str(index): {"kernel": jnp.asarray(draw.standard_normal((6, 5)), jnp.float32)} for index in range(3)}
    params = quantized(kernels, QuantizationConfig(kind, group_size=2), "")
    traced = jax.jit(lambda indices: layer.apply({"params": params}, x, indices))(jnp.array((2, 0, 0)))
    assert_close(traced, layer.apply({"params": dequantized(params)}, x, (2, 0, 0)), 1e-5)


# ------------------------------------------------------------------------------------------------------------ adapters


@pytest.fixture
def adapted(folder: Path) -> tuple[Model, Model]:
    """An int4 model, and the same in floats, with the same adapter."""
    made = []
    for number in range(2):
        model = Model.from_pretrained(folder / "int4")
        if number:
            model.dequantize()
        model.add_adapter(LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False), "a", seed=2)
        made.append(model)
    return made[0], made[1]


def test_an_adapter_beside(adapted: tuple[Model, Model], tmp_path: Path) -> None:
    ours, theirs = adapted
    for one, other in zip(outputs(ours), outputs(theirs)):
        assert_close(one, other, 1e-5)
    ours.save_adapter(tmp_path / "adapter")
    again = adapted[0]
    again.delete_adapter("a")
    plain = outputs(again)
    again.load_adapter(tmp_path / "adapter")
    for one, other, without in zip(outputs(again), outputs(theirs), plain):
        assert_close(one, other, 1e-5)
        assert not np.array_equal(one, without)
    # of an adapter of the floats' own the checksum is that of the floats, which a quantized model cannot tell
    theirs.save_adapter(tmp_path / "of-floats")
    again.load_adapter(tmp_path / "of-floats", "b")


def test_an_adapter_with_a_layer_instead_of_a_quantized_one(adapted: tuple[Model, Model], tmp_path: Path) -> None:
    ours, theirs = adapted
    config = LoraConfig(r=1, target_modules=["fc1"], modules_to_save=["decoder.lm_head"])
    with pytest.raises(ValueError, match=r"`modules_to_save`=.*the weights are quantized.*dequantize"):
        ours.add_adapter(config, "whole")
    theirs.add_adapter(config, "whole")
    doubled = {path: 2 * leaf for path, leaf in theirs.adapter_leaves().items() if path.endswith("kernel")}
    theirs.set_adapter_leaves({**theirs.adapter_leaves(), **doubled})
    theirs.save_adapter(tmp_path)
    ours.load_adapter(tmp_path, "whole")
    for one, other in zip(outputs(ours), outputs(theirs)):
        assert_close(one, other, 1e-5)


def test_adapters_that_need_floats(adapted: tuple[Model, Model], tmp_path: Path) -> None:
    ours, theirs = adapted
    for call in (ours.merge_adapter, lambda: ours.save_adapter(tmp_path / "new", format="kyutai")):
        with pytest.raises(ValueError, match=r"the weights are quantized, int4 .*; call dequantize\(\) first"):
            call()
    assert not (tmp_path / "new").exists()
    theirs.merge_adapter()
    with pytest.raises(ValueError, match="quantize: adapters are merged into the weights"):
        theirs.quantize("int8")


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ("int3", "quantization='int3' must be one of 'int8', 'int4', 'nf4' or a QuantizationConfig; did you mean"),
        (8, "quantization=8 must be one of"),
        ("nf4", "`group_size`=32 does not divide the inputs of"),
        (QuantizationConfig("int8", skip=["lm_haed"]), "`skip`: 'lm_haed' is no module.*did you mean 'lm_head'"),
    ],
)
def test_what_cannot_be_made(folder: Path, quantization: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a tensor is read."""
    monkeypatch.setattr("transformers_moshi_flax.checkpoints.fitting.read_slots", None)
    with pytest.raises(ValueError, match=message):
        Model.from_pretrained(folder / "pt", quantization=quantization)


def test_twice(folder: Path, model: Model, kind: str) -> None:
    message = f"quantization='int8', but the weights are quantized already, {kind} "
    with pytest.raises(ValueError, match=message):
        Model.from_pretrained(folder / kind, quantization="int8")
    with pytest.raises(ValueError, match=message):
        model.quantize("int8")


def test_other_layouts_and_training_want_floats(model: Model, tmp_path: Path) -> None:
    message = r"the weights are quantized, .*; call dequantize\(\) first \(of files: moshi-flax convert"
    head = model.decoder
    for call in (
        lambda: model.save_pretrained(tmp_path / "pt", to_pt=True),
        lambda: model.save_kyutai(tmp_path / "kyutai"),
        lambda: model.resize_token_embeddings(70),
        head.get_output_embeddings,
        lambda: head.set_output_embeddings(np.zeros((60, 64), np.float32)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"params hold quantized weights, which are not trained: call dequantize\(\)"):
        split_params(model.params)


def test_parameters_of_another_kind(folder: Path, tmp_path: Path) -> None:
    model, other = (Model.from_pretrained(folder / kind) for kind in ("int8", "int4"))
    with pytest.raises(ValueError, match=r"params lack .*kernel_int8"):
        model(np.zeros((1, 1), np.int32), params=other.params)
    flat = flatten_dict(model.params, sep="/")
    path = next(path for path in flat if path.endswith("kernel_int8"))
    wrong = unflatten_dict({**flat, path: flat[path].astype(jnp.float32)}, sep="/")
    with pytest.raises(ValueError, match=f"{path} is float32 instead of int8"):
        model.save_pretrained(tmp_path, wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codes: codes.astype(np.float32), "kernel_int8 is float32 in the file, but int8 by the config"),
        (lambda codes: codes.view(np.uint8), "kernel_int8 is uint8 in the file, but int8 by the config"),
        (lambda codes: codes[:-1], "kernel_int8 is .* by the config, .* in the file"),
        (lambda codes: None, "no weights for .*kernel_int8"),
    ],
)
def test_damaged_files(folder: Path, tmp_path: Path, change: Any, message: str) -> None:
    tensors = load_file(folder / "int8" / "flax_model.safetensors")
    key = "decoder.lm_head.kernel_int8"
    changed = change(tensors.pop(key))
    tensors |= {} if changed is None else {key: np.ascontiguousarray(changed)}
    (tmp_path / "config.json").write_text((folder / "int8" / "config.json").read_text())
    save_file(tensors, tmp_path / "flax_model.safetensors", metadata={"format": "flax"})
    with pytest.raises(ValueError, match=message):
        Model.from_pretrained(tmp_path)


def test_a_configuration_of_other_weights(folder: Path, tmp_path: Path) -> None:
    """Quantized, says ``config.json``, but the weights are PyTorch's."""
    (tmp_path / "config.json").write_text((folder / "int8" / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "pt" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="which the PyTorch layout has not"):
        Model.from_pretrained(tmp_path)


def test_mimi_alone() -> None:
    """With groups that divide its layers, and a part of it left out."""
    model = FlaxMimiModel(tiny_mimi_config(), seed=3)
    before = size(model.params)
    model.quantize(QuantizationConfig("nf4", group_size=16, skip=["encoder_transformer"]))
    assert {path[0] for path in model.required_params if path[-1] == "scales"} == {"decoder_transformer"}
    assert size(model.params) < before
