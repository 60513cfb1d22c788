"""Parameters on a mesh: the table, and loading and saving with it on eight host devices."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from tests.configs import tiny_moshi_config
from tests.random_model import RANDOM_MODEL
from transformers_moshi_flax import FlaxMoshiForCausalLM, FlaxMoshiForConditionalGeneration, QuantizationConfig
from transformers_moshi_flax.partitioning import PARTITION_RULES, param_shardings, resolve_shardings
from transformers_moshi_flax.quantization.tree import quantized_shapes


@pytest.fixture(scope="module")
def shapes() -> dict:
    return FlaxMoshiForConditionalGeneration(tiny_moshi_config(), _do_init=False).params_shape_tree


def one_device(*axes: str) -> Mesh:
    return Mesh(np.array(jax.devices()[:1]).reshape((1,) * len(axes)), axes)


def test_every_large_matrix_of_moshi_is_split(shapes: dict):
    flat = flatten_dict(param_shardings(one_device("data", "fsdp", "tensor"), shapes), sep="/")
    specs = {path: sharding.spec for path, sharding in flat.items()}
    assert specs["decoder/model/layers/0/self_attn/q_proj/linear/kernel"] == PartitionSpec("fsdp", "tensor")
    assert specs["depth_decoder/layers/1/mlp/fc2/3/kernel"] == PartitionSpec("tensor", "fsdp")
    assert specs["depth_decoder/layers/1/self_attn/o_proj/linear/2/kernel"] == PartitionSpec("tensor", "fsdp")
    assert specs["decoder/model/embed_tokens/embedding"] == PartitionSpec(None, ("fsdp", "tensor"))
    assert specs["audio_encoder/encoder_transformer/layers/0/mlp/fc1/kernel"] == PartitionSpec("fsdp", "tensor")
    whole = [
        path for path, spec in specs.items() if spec == PartitionSpec() and path.endswith(("kernel", "embedding"))
    ]
    assert all("conv" in path or ("_proj/" in path and "quantizer" in path) for path in whole), whole


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_codes_lie_as_kernels_do(shapes: dict, kind: str, double: bool):
    mesh = one_device("data", "fsdp", "tensor")
    floats = flatten_dict(param_shardings(mesh, shapes), sep="/")
    quantized = quantized_shapes(shapes, QuantizationConfig(kind, group_size=4, double_quantization=double), "")
    for path, sharding in flatten_dict(param_shardings(mesh, quantized), sep="/").items():
        if "/scales" in path:
            assert sharding.spec == PartitionSpec()
        else:
            assert sharding.spec == floats[path.replace(f"kernel_{kind}", "kernel")].spec


def test_every_rule_is_used(shapes: dict):
    used = set()
    for path in flatten_dict(shapes, sep="/"):
        used.add(next(index for index, (pattern, _) in enumerate(PARTITION_RULES) if re.fullmatch(pattern, path)))
    assert used == set(range(len(PARTITION_RULES)))


def test_other_axes_are_refused(shapes: dict):
    with pytest.raises(ValueError, match=r"the mesh has the axes \['model'\]; use 'data', 'fsdp' and 'tensor'"):
        param_shardings(one_device("data", "model"), shapes)


def test_what_sharding_may_be(shapes: dict):
    single = SingleDeviceSharding(jax.devices()[0])
    paths = set(flatten_dict(shapes, sep="/"))
    assert resolve_shardings(single, shapes) == dict.fromkeys(paths, single)
    mesh = one_device("fsdp")
    tree = param_shardings(mesh, shapes)
    assert resolve_shardings(mesh, shapes) == resolve_shardings(tree, shapes) == flatten_dict(tree, sep="/")
    with pytest.raises(ValueError, match="sharding must be a Mesh, a Sharding or a tree of them, got str"):
        resolve_shardings("fsdp", shapes)
    with pytest.raises(ValueError, match=r"sharding has no Sharding for .*decoder/lm_head/kernel"):
        resolve_shardings({"decoder": {"lm_head": {}}}, {"decoder": {"lm_head": {"kernel": jnp.zeros(3)}}})


def test_shardings_that_do_not_fit_are_all_told():
    shapes = {"a": jnp.zeros(4), "b": {"c": jnp.zeros((3, 4)), "d": jnp.zeros(2)}}
    sharding = NamedSharding(AbstractMesh((2,), ("fsdp",)), PartitionSpec(None, "fsdp"))
    with pytest.raises(ValueError, match=r"cannot split a of shape \(4,\) by .*; b/d of shape \(2,\) by ") as error:
        resolve_shardings(sharding, shapes)
    assert "b/c" not in str(error.value)
    with pytest.raises(ValueError, match=r"cannot split a of"):
        resolve_shardings(jax.tree.map(lambda _: sharding, shapes), shapes)
    with pytest.raises(ValueError, match=r" and 12 more\. Give"):
        resolve_shardings(sharding, {str(number): jnp.zeros(4) for number in range(20)})


ON_EIGHT_DEVICES = """
import sys
import jax, numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration as Moshi
from transformers_moshi_flax.partitioning import param_shardings

source, target = sys.argv[1:]
mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
plain = Moshi.from_pretrained(source)
split = Moshi.from_pretrained(source, sharding=mesh)
expected = flatten_dict(param_shardings(mesh, plain.params_shape_tree), sep="/")
for path, leaf in flatten_dict(split.params, sep="/").items():
    assert leaf.sharding == expected[path], path
    reference = np.asarray(flatten_dict(plain.params, sep="/")[path])
    for shard in leaf.addressable_shards:
        np.testing.assert_array_equal(shard.data, reference[shard.index])
name = "decoder/model/layers/0/mlp/fc1/kernel"
leaf = flatten_dict(split.params, sep="/")[name]
assert leaf.addressable_shards[0].data.size == leaf.size // 4, "each device holds its slice alone"
half = Moshi.from_pretrained(source, jax.numpy.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))
assert {str(leaf.dtype) for leaf in jax.tree.leaves(half.params)} >= {"bfloat16"}
split.save_pretrained(target, max_shard_size="500KB")
again = Moshi.from_pretrained(target)
assert jax.tree.all(jax.tree.map(lambda a, b: (np.asarray(a) == np.asarray(b)).all(), plain.params, again.params))
try:
    Moshi.from_pretrained(source, sharding=jax.make_mesh((5,), ("tensor",), devices=jax.devices()[:5]))
except ValueError as error:
    assert "not divisible by tensor = 5" in str(error), error
else:
    raise AssertionError("five devices divide nothing")
try:
    Moshi.from_pretrained(source, sharding=NamedSharding(mesh, PartitionSpec("tensor")))
except ValueError as error:
    assert "decoder/layers/0/conv/kernel of shape (7, 32, 64) by " in str(error), error
else:
    raise AssertionError("two devices do not divide an odd number")
"""


def test_loads_and_saves_on_eight_devices(tmp_path: Path):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ON_EIGHT_DEVICES, str(RANDOM_MODEL), str(tmp_path / "saved")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr


def test_a_mesh_of_the_callers_own_is_left_to_the_caller():
    """Axes that are explicit, or mapped over by ``shard_map``, are not the compiler's to split rows by."""
    model = FlaxMoshiForCausalLM(tiny_moshi_config())
    ids = jnp.ones((2, 3), jnp.int32)
    expected = model(ids).logits
    with jax.set_mesh(jax.make_mesh((1,), ("data",), (AxisType.Explicit,))):
        explicit = model(ids).logits
    mesh, rows = jax.make_mesh((1,), ("data",), (AxisType.Auto,)), PartitionSpec("data")
    mapped = jax.shard_map(lambda ids: model(ids).logits, mesh=mesh, in_specs=rows, out_specs=rows)(ids)
    for logits in (explicit, mapped):
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6)
