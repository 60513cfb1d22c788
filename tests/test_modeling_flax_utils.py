"""FlaxPreTrainedModel on a toy model: loading, saving, refusing. What real models must do is in the common tests."""

import json
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import jax_utils
from flax.serialization import to_bytes
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import GenerationConfig, MimiConfig, MoshiConfig

from transformers_moshi_flax import FlaxMoshiForConditionalGeneration, FlaxPreTrainedModel
from transformers_moshi_flax.checkpoints import Rule
from transformers_moshi_flax.checkpoints.formats import TensorFile
from transformers_moshi_flax.param_shapes import param_shapes

from .configs import tiny_mimi_config, tiny_moshi_config

RULES = (
    Rule(r"(.*)/heads/(?P<codebook>\d+)/kernel", r"\1/heads/weight", "transpose"),
    Rule(r"(.*)/kernel", r"\1/weight", "transpose"),
    Rule(r"(.*)/embedding|(embed)/embedding", r"\1\2/weight"),
)


class Heads(nn.Module):
    config: Any
    dtype: Any

    @nn.compact
    def __call__(self, x):
        return sum(nn.Dense(3, use_bias=False, dtype=self.dtype, name=str(index))(x) for index in range(2))


class ToyModule(nn.Module):
    config: Any
    dtype: Any = jnp.float32
    gradient_checkpointing: bool = False

    @nn.compact
    def __call__(self, input_ids):
        x = nn.Embed(self.config.vocab_size, self.config.hidden_size, dtype=self.dtype, name="embed")(input_ids)
        for index in range(self.config.num_hidden_layers):
            x = nn.Dense(self.config.hidden_size, use_bias=False, dtype=self.dtype, name=f"layer{index}")(x)
        return Top(self.config, self.dtype, name="top")(x)


class Top(nn.Module):
    config: Any
    dtype: Any

    @nn.compact
    def __call__(self, x):
        return Heads(self.config, self.dtype, name="heads")(x)


class ToyWithHeadModule(nn.Module):
    config: Any
    dtype: Any = jnp.float32
    gradient_checkpointing: bool = False

    @nn.compact
    def __call__(self, input_ids):
        x = ToyModule(self.config, self.dtype, name="model")(input_ids)
        return nn.Dense(5, use_bias=False, dtype=self.dtype, name="lm_head")(x)


class FlaxToy(FlaxPreTrainedModel):
    config_class = MoshiConfig
    base_model_prefix = "model"
    module_class = ToyModule
    checkpoint_rules = RULES
    checkpoint_prefixes = ("", "model.", "decoder.model.")

    def dummy_inputs(self, input_shape):
        return {"input_ids": jnp.zeros(input_shape, jnp.int32)}

    def __call__(self, input_ids, params=None):
        return self.module.apply({"params": self.params if params is None else params}, input_ids)


class FlaxToyWithHead(FlaxToy):
    module_class = ToyWithHeadModule
    checkpoint_rules = (*RULES, Rule("lm_head/kernel", "lm_head/weight", "transpose"))
    checkpoint_prefixes = ("", "decoder.")
    _generates = True


@pytest.fixture(scope="module")
def config():
    return tiny_moshi_config()


@pytest.fixture(scope="module")
def toy(config):
    return FlaxToy(config)


@pytest.fixture(scope="module")
def with_head(config):
    return FlaxToyWithHead(config, seed=1)


@pytest.fixture
def pt_folder(tmp_path, with_head):
    with_head.save_pretrained(tmp_path, to_pt=True)
    return tmp_path


def change(folder, edit):
    """Rewrite the PyTorch weights of a folder after ``edit(tensors)``."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def same(left, right):
    left, right = flatten_dict(left, sep="/"), flatten_dict(right, sep="/")
    return left.keys() == right.keys() and all(
        left[path].dtype == right[path].dtype and np.asarray(left[path]).tobytes() == np.asarray(right[path]).tobytes()
        for path in left
    )


# Making a model


def test_new_model(config, toy):
    assert toy.framework == "flax" and toy.dtype == jnp.float32 and toy.config is config
    assert toy.input_shape == (1, 1) and FlaxToy(config, (2, 3), _do_init=False).input_shape == (2, 3)
    assert toy.required_params == set(flatten_dict(toy.params_shape_tree)) == set(flatten_dict(toy.params))
    assert toy.num_parameters() == sum(leaf.size for leaf in jax.tree.leaves(toy.params))
    assert same(toy.params, FlaxToy(config, (3, 2), seed=0).params)
    assert not same(toy.params, FlaxToy(config, seed=1).params)
    assert toy.generation_config is None and not toy.can_generate() and FlaxToyWithHead.can_generate()


def test_bad_arguments(config):
    with pytest.raises(ValueError, match="MoshiConfig, got MimiConfig"):
        FlaxToy(tiny_mimi_config())
    with pytest.raises(ValueError, match="'gradient_checkpoint'; did you mean 'gradient_checkpointing'"):
        FlaxToy(config, gradient_checkpoint=True)
    for dtype in (jnp.int32, "float23", jnp.float8_e4m3fn):
        with pytest.raises(ValueError, match="dtype must be a floating dtype of 16 bits or more"):
            FlaxToy(config, dtype=dtype)
    with pytest.raises(ValueError, match="jax_enable_x64"):
        FlaxToy(config, dtype=jnp.float64)


def test_arguments_of_loading(toy, tmp_path, unchecked_types):
    toy.save_pretrained(tmp_path)
    assert same(FlaxToy.from_pretrained(tmp_path, subfolder=None).params, toy.params)
    with pytest.raises(ValueError, match=r"config must be .* but is {'vocab_size': 60}; single fields are keyword"):
        FlaxToy.from_pretrained(tmp_path, config={"vocab_size": 60})


def test_casts(toy):
    params = {**toy.params, "counter": jnp.zeros(2, jnp.int32)}
    for cast, dtype in ((toy.to_bf16, jnp.bfloat16), (toy.to_fp16, jnp.float16)):
        lower = cast(params)
        assert lower["embed"]["embedding"].dtype == dtype and lower["counter"].dtype == jnp.int32
        assert toy.params["embed"]["embedding"].dtype == jnp.float32
        assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(toy.to_fp32(lower)))
    mask = jax.tree.map(lambda _: False, params)
    mask["layer1"]["kernel"] = True
    cast = toy.to_bf16(params, mask)
    wide = {path for path, leaf in flatten_dict(cast, sep="/").items() if leaf.dtype != jnp.bfloat16}
    assert set(flatten_dict(params, sep="/")) - wide == {"layer1/kernel"}
    with pytest.raises(ValueError, match="mask"):
        toy.to_bf16(params, {"layer1": True})


def test_init_weights_keeps_what_is_given(toy):
    given = {"layer0": {"kernel": jnp.full((64, 64), 7.0)}}
    params = toy.init_weights(jax.random.key(3), params=given)
    assert params["layer0"]["kernel"] is given["layer0"]["kernel"]
    assert set(flatten_dict(params)) == toy.required_params


# Loading


def test_loads_either_layout_from_directory_or_file(with_head, pt_folder):
    flax_folder = pt_folder / "flax"
    with_head.save_pretrained(flax_folder)
    for source in (pt_folder, str(pt_folder), pt_folder / "model.safetensors", flax_folder):
        model, info = FlaxToyWithHead.from_pretrained(source, output_loading_info=True)
        assert same(model.params, with_head.params)
        assert info == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
    assert same(FlaxToyWithHead.from_pretrained(pt_folder, from_pt=True).params, with_head.params)
    with pytest.raises(OSError, match="from_pt=False"):
        FlaxToyWithHead.from_pretrained(pt_folder, from_pt=False)


def test_dtype_none_follows_the_checkpoint(with_head, tmp_path):
    mask = jax.tree.map(lambda _: True, with_head.params)
    mask["lm_head"]["kernel"] = False
    mixed = with_head.to_bf16(with_head.params, mask)
    with_head.save_pretrained(tmp_path, params=mixed)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    model = FlaxToyWithHead.from_pretrained(tmp_path)
    assert model.dtype == jnp.bfloat16 == model.module.dtype and same(model.params, mixed)
    model = FlaxToyWithHead.from_pretrained(tmp_path, jnp.float16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"float16"} and model.dtype == jnp.float16
    model = FlaxToyWithHead.from_pretrained(tmp_path, dtype="bfloat16", param_dtype=jnp.float32)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"float32"} and model.dtype == "bfloat16"
    for name in ("dtype", "param_dtype"):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            FlaxToyWithHead.from_pretrained(tmp_path, **{name: jnp.int8})


def test_float64_is_never_cut_silently(pt_folder):
    change(pt_folder, lambda tensors: tensors.update({k: v.astype(np.float64) for k, v in tensors.items()}))
    with pytest.raises(ValueError, match=r"float64.*jax_enable_x64"):
        FlaxToyWithHead.from_pretrained(pt_folder)
    assert FlaxToyWithHead.from_pretrained(pt_folder, jnp.float32).params["lm_head"]["kernel"].dtype == jnp.float32
    with jax.enable_x64(True):
        model = FlaxToyWithHead.from_pretrained(pt_folder)
        assert model.params["lm_head"]["kernel"].dtype == jnp.float64 == model.dtype


def test_without_init_the_params_stay_outside(with_head, pt_folder):
    model, params = FlaxToyWithHead.from_pretrained(pt_folder, _do_init=False)
    assert same(params, with_head.params)
    with pytest.raises(ValueError, match="_do_init=False"):
        model.params  # noqa: B018
    with pytest.raises(ValueError, match="_do_init=False"):
        model.params = params
    with pytest.raises(ValueError, match="_do_init=False"):
        model.save_pretrained(pt_folder)
    model.save_pretrained(pt_folder / "new", params=params)
    assert same(FlaxToyWithHead.from_pretrained(pt_folder / "new").params, params)


def test_head_from_base_and_base_from_head(toy, with_head, tmp_path):
    for to_pt in (True, False):
        toy.save_pretrained(tmp_path / f"base{to_pt}", to_pt=to_pt)
        with_head.save_pretrained(tmp_path / f"head{to_pt}", to_pt=to_pt)
        model, info = FlaxToyWithHead.from_pretrained(tmp_path / f"base{to_pt}", output_loading_info=True)
        assert same(model.params["model"], toy.params)
        assert info["missing_keys"] == ["lm_head/kernel"] and info["unexpected_keys"] == []
        assert set(flatten_dict(model.params)) == model.required_params
        model, params = FlaxToyWithHead.from_pretrained(tmp_path / f"base{to_pt}", _do_init=False)
        assert "lm_head" not in params
        assert set(flatten_dict(model.init_weights(model.key, params=params))) == model.required_params
        base, info = FlaxToy.from_pretrained(tmp_path / f"head{to_pt}", output_loading_info=True)
        assert same(base.params, with_head.params["model"])
        assert len(info["unexpected_keys"]) == 1 and "lm_head" in info["unexpected_keys"][0]


def test_random_head_has_the_dtype_of_the_rest(toy, tmp_path):
    toy.save_pretrained(tmp_path, params=toy.to_bf16(toy.params))
    model = FlaxToyWithHead.from_pretrained(tmp_path)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"bfloat16"}


def test_part_of_a_larger_checkpoint(with_head, pt_folder):
    def nest(tensors):
        for key in list(tensors):
            tensors[f"decoder.{key}"] = tensors.pop(key)
        tensors["embed_tokens.0.weight"] = np.zeros((2, 2), np.float32)

    change(pt_folder, nest)
    assert same(FlaxToyWithHead.from_pretrained(pt_folder).params, with_head.params)
    assert same(FlaxToy.from_pretrained(pt_folder).params, with_head.params["model"])


def test_missing_weights_are_all_told(pt_folder):
    def drop(tensors):
        del tensors["model.layer0.weight"], tensors["model.top.heads.weight"]

    change(pt_folder, drop)
    for options in ({}, {"ignore_mismatched_sizes": True}, {"_do_init": False}):
        with pytest.raises(ValueError, match="no weights for") as error:
            FlaxToyWithHead.from_pretrained(pt_folder, **options)
        for path in ("model/layer0/kernel", "model/top/heads/0/kernel", "model/top/heads/1/kernel"):
            assert path in str(error.value)
        assert "lm_head" not in str(error.value)


def test_mismatched_weights_are_all_told(pt_folder):
    def reshape(tensors):
        tensors["model.layer0.weight"] = tensors["model.layer0.weight"][:3]
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :2].copy()

    change(pt_folder, reshape)
    with pytest.raises(ValueError) as error:
        FlaxToyWithHead.from_pretrained(pt_folder)
    assert "model.layer0.weight is (64, 64) by the config, (3, 64) in the file" in str(error.value)
    assert "lm_head.weight is (5, 3) by the config, (5, 2) in the file" in str(error.value)
    model, info = FlaxToyWithHead.from_pretrained(pt_folder, ignore_mismatched_sizes=True, output_loading_info=True)
    assert len(info["mismatched_keys"]) == 2
    assert model.params["model"]["layer0"]["kernel"].shape == (64, 64)


def test_weights_the_config_has_no_place_for(pt_folder):
    with pytest.raises(ValueError, match=r"no weights for \['model/layer2/kernel'\]"):
        FlaxToyWithHead.from_pretrained(pt_folder, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"no place for \['model\.layer1\.weight'\]"):
        FlaxToyWithHead.from_pretrained(pt_folder, num_hidden_layers=1)
    model = FlaxToyWithHead.from_pretrained(pt_folder, num_hidden_layers=1, ignore_mismatched_sizes=True)
    assert "layer1" not in model.params["model"] and model.config.num_hidden_layers == 1


def test_weights_of_something_else(pt_folder):
    save_file({"x": np.zeros(1)}, pt_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="none of the file's 1 tensors"):
        FlaxToyWithHead.from_pretrained(pt_folder)


def test_keywords(pt_folder):
    assert FlaxToyWithHead.from_pretrained(pt_folder, sliding_window=9).config.sliding_window == 9
    assert FlaxToyWithHead.from_pretrained(pt_folder, gradient_checkpointing=True).module.gradient_checkpointing
    assert FlaxToyWithHead.from_pretrained(pt_folder, input_shape=(3, 4)).input_shape == (3, 4)
    for name, meant in (
        ("slidingwindow", "sliding_window"),
        ("torch_dtypes", ""),
        ("from_torch", ""),
        ("revison", "revision"),
    ):
        with pytest.raises(ValueError, match=f"{name!r}.*{meant}"):
            FlaxToyWithHead.from_pretrained(pt_folder, **{name: 1})


def test_config(pt_folder, config):
    with pytest.raises(ValueError, match="MoshiConfig"):
        FlaxToyWithHead.from_pretrained(pt_folder, num_hidden_layers="many")
    (pt_folder / "config.json").unlink()
    with pytest.raises(OSError, match=r"no config\.json"):
        FlaxToyWithHead.from_pretrained(pt_folder)
    assert FlaxToyWithHead.from_pretrained(pt_folder, config=config).config is config
    config.save_pretrained(pt_folder / "elsewhere")
    model = FlaxToyWithHead.from_pretrained(pt_folder, config=pt_folder / "elsewhere")
    assert model.config.to_dict() == MoshiConfig.from_pretrained(pt_folder / "elsewhere").to_dict()
    (pt_folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no valid JSON"):
        FlaxToyWithHead.from_pretrained(pt_folder)
    tiny_mimi_config().save_pretrained(pt_folder)
    with pytest.raises(ValueError, match=r"model_type='mimi'.*'moshi'"):
        FlaxToyWithHead.from_pretrained(pt_folder)


def test_part_takes_its_config_out_of_the_whole(pt_folder):
    class FlaxMimiToy(FlaxToy):
        config_class = MimiConfig
        module_class = PartModule

    # The module checks its configuration; the file has no weights for it.
    with pytest.raises(ValueError, match="none of the file's"):
        FlaxMimiToy.from_pretrained(pt_folder)


class PartModule(nn.Module):
    config: Any
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, input_ids):
        assert isinstance(self.config, MimiConfig) and self.config.num_filters == 4
        return nn.Embed(3, 3, name="elsewhere")(input_ids)


# Saving


def test_saved_files(with_head, tmp_path):
    with_head.save_pretrained(tmp_path / "pt", to_pt=True)
    with_head.save_pretrained(tmp_path / "flax")
    names = {"config.json", "generation_config.json"}
    assert {file.name for file in (tmp_path / "pt").iterdir()} == {*names, "model.safetensors"}
    assert {file.name for file in (tmp_path / "flax").iterdir()} == {*names, "flax_model.safetensors"}
    with safe_open(tmp_path / "pt" / "model.safetensors", "numpy") as file:
        assert file.metadata()["format"] == "pt"
        assert file.get_slice("model.top.heads.weight").get_shape() == [2, 3, 64]
    with safe_open(tmp_path / "flax" / "flax_model.safetensors", "numpy") as file:
        assert file.metadata()["format"] == "flax"
        assert file.get_slice("model.top.heads.1.kernel").get_shape() == [64, 3]
    values = json.loads((tmp_path / "pt" / "config.json").read_text())
    assert (
        values["architectures"] == ["ToyWithHead"] and values["model_type"] == "moshi" and values["dtype"] == "float32"
    )


def test_generation_config_goes_to_the_file_and_back(with_head, config, tmp_path):
    model = FlaxToyWithHead(config)
    model.generation_config = GenerationConfig.from_dict({"top_k": 7, "depth_decoder_config": {"top_k": 9}})
    model.save_pretrained(tmp_path)
    again = FlaxToyWithHead.from_pretrained(tmp_path).generation_config
    assert again.top_k == 7 and again.depth_decoder_config == {"top_k": 9}


def test_temp_of_a_file_is_read_as_temperature(with_head, tmp_path, caplog):
    """At both levels, on load; what is saved then says temperature."""
    with_head.save_pretrained(tmp_path)
    written = {"do_sample": True, "temp": 0.5, "depth_decoder_config": {"temp": 0.7, "top_k": 9}}
    (tmp_path / "generation_config.json").write_text(json.dumps(written))
    config = FlaxToyWithHead.from_pretrained(tmp_path).generation_config
    assert config.temperature == 0.5 and not hasattr(config, "temp")
    assert config.depth_decoder_config == {"temperature": 0.7, "top_k": 9}
    for name in ("temp", "depth_decoder_temp"):
        assert f"`{name}` in a generation configuration is read as" in caplog.text
    FlaxToyWithHead.from_pretrained(tmp_path).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["temperature"] == 0.5 and saved["depth_decoder_config"] == {"temperature": 0.7, "top_k": 9}
    assert "temp" not in saved


@pytest.mark.parametrize("options", [{}, {"to_pt": True}, {"safe_serialization": False}])
def test_params_that_would_not_load_are_not_saved(with_head, tmp_path, options):
    """All of them are told, and the checkpoint that is there stays."""
    with_head.save_pretrained(tmp_path, **options)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refused(params):
        with pytest.raises(ValueError, match="params would not load again") as error:
            with_head.save_pretrained(tmp_path, params=params, **options)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        return str(error.value)

    message = refused(jax_utils.replicate(with_head.params))
    assert "lm_head/kernel has the shape (1, 3, 5) instead of (3, 5)" in message and "unreplicate(params)" in message
    flat = flatten_dict(with_head.params)
    flat["lm_head", "kernel"] = flat["lm_head", "kernel"].astype(jnp.int8)
    flat["lm_head", "lora_a"] = jnp.zeros((3, 2))
    flat["model", "layer0", "kernel"] = jnp.zeros((2, 3))
    flat["model", "layer1", "kernel"] = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    del flat["model", "top", "heads", "0", "kernel"]
    message = refused(unflatten_dict(flat))
    assert "model/top/heads/0/kernel is missing" in message
    assert "lm_head/kernel is int8 instead of floating-point" in message
    assert "lm_head/lora_a is no parameter of the model" in message
    assert "model/layer0/kernel has the shape (2, 3) instead of (64, 64)" in message
    assert "model/layer1/kernel is no array with values, but a ShapeDtypeStruct" in message
    assert "params_shape_tree" in message and "unreplicate" not in message
    many = {**with_head.params, "lora": {str(number): jnp.zeros(1) for number in range(30)}}
    assert "; and 22 more. " in refused(many)
    with pytest.raises(ValueError, match=r"but a .*Tracer"):
        jax.jit(lambda params: with_head.save_pretrained(tmp_path, params=params, **options))(with_head.params)


def test_saving_is_refused(with_head, tmp_path):
    with pytest.raises(ValueError, match="to_pt=True needs safe_serialization=True"):
        with_head.save_pretrained(tmp_path, safe_serialization=False, to_pt=True)
    with pytest.raises(ValueError, match="model/embed/embedding"):
        with_head.save_pretrained(tmp_path, params={"lm_head": with_head.params["lm_head"]})
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        with_head.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="repo_id"):
        with_head.save_pretrained(tmp_path, repo_id="x")
    with pytest.raises(ValueError, match="max_shard_size=0"):
        with_head.save_pretrained(tmp_path, max_shard_size=0)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("options", [{}, {"to_pt": True}, {"safe_serialization": False}])
@pytest.mark.parametrize("max_shard_size", ["5GB", "2KB"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_format_goes_there_and_back(with_head, tmp_path, options, max_shard_size, dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), with_head.params)
    with_head.save_pretrained(tmp_path, params=params, max_shard_size=max_shard_size, **options)
    assert bool(list(tmp_path.glob("*.index.json"))) == (max_shard_size == "2KB")
    again = FlaxToyWithHead.from_pretrained(tmp_path, verify=True)
    assert same(again.params, params) and again.dtype == dtype
    # over itself, changed, in the same format
    with_head.save_pretrained(tmp_path, params=jax.tree.map(lambda leaf: leaf * 2, again.params), **options)
    assert same(FlaxToyWithHead.from_pretrained(tmp_path).params, jax.tree.map(lambda leaf: leaf * 2, params))


@pytest.mark.parametrize("to_pt", [True, False])
def test_the_other_layout_stays_with_its_configuration(with_head, tmp_path, to_pt):
    """Both share config.json: beside weights of another configuration nothing is written."""
    with_head.save_pretrained(tmp_path, to_pt=not to_pt)
    other = FlaxToyWithHead(tiny_moshi_config(), seed=5)
    other.save_pretrained(tmp_path, to_pt=to_pt)
    for model, from_pt in ((other, to_pt), (with_head, not to_pt)):
        assert same(FlaxToyWithHead.from_pretrained(tmp_path, from_pt=from_pt).params, model.params)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"weights of another configuration.*save to another directory"):
        FlaxToyWithHead(tiny_moshi_config(sliding_window=7)).save_pretrained(tmp_path, to_pt=to_pt)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_reads_what_old_transformers_wrote(with_head, tmp_path):
    """Before version 5, msgpack with nested keys, and shards of flat ones listed with slashes."""
    with_head.save_pretrained(tmp_path)
    weights = tmp_path / "flax_model.safetensors"
    flat = flatten_dict(jax.tree.map(np.asarray, with_head.params), sep="/")
    weights.unlink()
    (tmp_path / "flax_model.msgpack").write_bytes(to_bytes(with_head.params))
    assert same(FlaxToyWithHead.from_pretrained(tmp_path).params, with_head.params)
    (tmp_path / "flax_model.msgpack").unlink()
    names = [f"flax_model-0000{number}-of-00002.msgpack" for number in (1, 2)]
    weight_map = {path: names[index % 2] for index, path in enumerate(flat)}
    for name in names:
        shard = {tuple(path.split("/")): flat[path] for path in flat if weight_map[path] == name}
        (tmp_path / name).write_bytes(to_bytes(unflatten_dict(shard)))
    (tmp_path / "flax_model.msgpack.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same(FlaxToyWithHead.from_pretrained(tmp_path).params, with_head.params)
    (tmp_path / "flax_model.msgpack.index.json").unlink()
    dotted = {path.replace("/", "."): leaf for path, leaf in flat.items()}
    save_file(dotted, tmp_path / "model.safetensors", {"format": "flax"})
    assert same(FlaxToyWithHead.from_pretrained(tmp_path).params, with_head.params)


def test_integers_are_no_weights(pt_folder):
    change(pt_folder, lambda tensors: tensors.update({"lm_head.weight": np.ones((5, 3), np.int32)}))
    with pytest.raises(ValueError, match=r"lm_head\.weight must be floating-point, but is int32 in the file"):
        FlaxToyWithHead.from_pretrained(pt_folder)


def test_verify_finds_damage(with_head, tmp_path):
    with_head.save_pretrained(tmp_path)
    weights = tmp_path / "flax_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 16
    weights.write_bytes(content)
    FlaxToyWithHead.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"flax_model\.safetensors is damaged: .*checksum"):
        FlaxToyWithHead.from_pretrained(tmp_path, verify=True)


def test_a_part_reads_only_its_tensors(with_head, tmp_path, monkeypatch):
    with_head.save_pretrained(tmp_path, to_pt=True)
    read = []
    monkeypatch.setattr(TensorFile, "__getitem__", lambda self, key: (read.append(key), self._tensors[key])[1])
    FlaxToy.from_pretrained(tmp_path)
    assert read and all(key.startswith("model.") for key in read)


def test_without_init_nothing_is_allocated(config):
    before = {id(array) for array in jax.live_arrays()}
    model = FlaxToyWithHead(config, _do_init=False)
    shapes = jax.eval_shape(lambda key: model.init_weights(key), jax.random.key(0))
    assert jax.tree.structure(shapes) == jax.tree.structure(model.params_shape_tree)
    created = [array for array in jax.live_arrays() if id(array) not in before]
    assert sum(array.nbytes for array in created) <= 16, "no more than random keys"


# The shapes of the parameters


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_shapes_are_those_of_the_whole_trace(seed: int, gradient_checkpointing: bool):
    draw = np.random.default_rng(seed)
    config = tiny_moshi_config(
        num_hidden_layers=int(draw.integers(1, 5)),
        num_key_value_heads=int(draw.choice([1, 2, 4])),
        num_codebooks=int(draw.integers(2, 6)),
        depth_decoder_config={"num_hidden_layers": int(draw.integers(1, 4)), "ffn_dim": int(draw.choice([64, 72]))},
        audio_encoder_config={
            "num_hidden_layers": int(draw.integers(1, 4)),
            "num_residual_layers": int(draw.integers(1, 3)),
            "num_semantic_quantizers": int(draw.integers(1, 3)),
        },
    )
    model = FlaxMoshiForConditionalGeneration(config, _do_init=False, gradient_checkpointing=gradient_checkpointing)
    traced = 0

    def init(rng):
        nonlocal traced
        traced += 1
        return model._random_params(rng)

    assert model.params_shape_tree == jax.eval_shape(init, model.key) and traced == 1


class Counted(nn.Module):
    """Has parameters of its own, in children, and in one that ``setup`` makes."""

    features: int
    note: Callable[[str], None]

    def setup(self):
        self.bias = self.param("bias", nn.initializers.zeros, (self.features,))
        self.dense = Inner(self.features, self.note)

    def __call__(self, x):
        return self.dense(x) + self.bias


class Inner(nn.Module):
    features: int
    note: Callable[[str], None]

    @nn.compact
    def __call__(self, x, wide: bool = False):
        self.note("/".join(self.path))
        features = self.features * 2 if wide else self.features
        return nn.Dense(features, name="wide" if wide else "dense")(x)


class Stack(nn.Module):
    note: Callable[[str], None]

    @nn.compact
    def __call__(self, x):
        shared = Inner(4, self.note, name="shared")
        x = shared(shared(x))
        for index in range(3):
            x = Counted(4, self.note, name=f"counted{index}")(x)
        x = Inner(6, self.note, name="other_fields")(x)
        x = Inner(6, self.note, name="other_inputs")(x)
        x = Inner(6, self.note, name="other_arguments")(x, True)
        return Inner(6, self.note, name="other_arguments_too")(x[:, :6], wide=True)


def test_only_the_first_of_equal_calls_is_traced():
    traced = []

    def init():
        return Stack(traced.append).init(jax.random.key(0), jnp.zeros((2, 4)))["params"]

    shapes = param_shapes(init)
    few = traced.copy()
    traced.clear()
    assert shapes == jax.eval_shape(init)
    other = ["other_fields", "other_inputs", "other_arguments", "other_arguments_too"]
    assert few == ["shared", "shared", *other]
    assert traced == ["shared", "shared", *(f"counted{index}/dense" for index in range(3)), *other]
