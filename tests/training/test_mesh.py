"""The training step on meshes of eight host devices and of two processes, against one device."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from tests.training.examples import draw_batch, make_module, small_config
from transformers_moshi_flax.training.mesh import initialize_distributed, make_mesh, put_batch, state_shardings
from transformers_moshi_flax.training.optimizer import OptimizerConfig, make_optimizer
from transformers_moshi_flax.training.train_state import create_train_state, split_params

# What both programs run: a step in float64, of which Adam's first moment is the gradient (clipped, times 1 - b1).
STEP = """
import re, sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
from tests.training.examples import draw_batch, make_module, small_config
from transformers_moshi_flax.training.mesh import initialize_distributed, make_mesh, put_batch, put_state
from transformers_moshi_flax.training.mesh import state_shardings
from transformers_moshi_flax.training.objective import ObjectiveConfig
from transformers_moshi_flax.training.optimizer import OptimizerConfig, make_optimizer
from transformers_moshi_flax.training.scanned_layers import stack_layers
from transformers_moshi_flax.training.train_state import create_train_state, split_params
from transformers_moshi_flax.training.train_step import make_train_step

def setting(mesh, batch, accumulation_steps=1, looped=False, **config):
    config = small_config(vocab_size=64, **config)
    module, params = make_module(config, dtype=jnp.float64)
    if looped:
        module, params = module.clone(scan_layers=True, gradient_checkpointing=True), stack_layers(params)
    trainable, frozen = split_params(jax.tree.map(lambda leaf: leaf.astype(np.float64), params))
    optimizer, schedule = make_optimizer(OptimizerConfig(), 10, trainable)
    state = put_state(create_train_state(trainable, frozen, optimizer), mesh)
    shardings = state_shardings(mesh, state)
    step = make_train_step(module, ObjectiveConfig(), optimizer, schedule, accumulation_steps=accumulation_steps,
                           state_shardings=shardings)
    return step.lower(state, put_batch(batch, mesh)).compile(), state

def figures(state, metrics):
    adam = next(part for part in state.opt_state if hasattr(part, "mu"))
    moments = {"mu": adam.mu, "nu": adam.nu, "loss": metrics["loss"], "norm": metrics["grad_norm"]}
    flat = jax.tree_util.tree_flatten_with_path(moments)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}

def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        assert np.abs(leaf).max() > 0 or "q_proj" in path or "k_proj" in path, path
        np.testing.assert_allclose(actual[path], leaf, rtol=0, atol=1e-10 * np.abs(leaf).max() + 1e-20, err_msg=path)
"""

EIGHT_DEVICES = (
    STEP
    + """
# so many frames that gradients are wrong without `split_rows` around the loop of layers
batch = draw_batch(small_config(vocab_size=64), (12, 9, 2, 12, 0, 11, 5, 12), 12)

def run(*sizes, accumulation_steps=1, **config):
    mesh = make_mesh(*sizes)
    program, state = setting(mesh, batch, accumulation_steps, **config)
    arguments = {leaf.sharding for leaf in jax.tree.leaves(state.params)}
    state, metrics = program(state, put_batch(batch, mesh))
    expected = state_shardings(mesh, state)
    assert jax.tree.all(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, state, expected))
    return figures(state, metrics)

expected = run(1, 1, 1)
for sizes in ((1, 8, 1), (2, 2, 2), (8, 1, 1)):
    assert_equal(run(*sizes), expected)
looped = dict(looped=True, num_hidden_layers=2, depth_decoder_config=dict(num_hidden_layers=2))
expected = run(1, 1, 1, **looped)
assert_equal(run(2, 2, 2, accumulation_steps=2, **looped), expected)

try:
    put_batch({name: rows[:6] for name, rows in batch.items()}, make_mesh(2, 2, 2))
except ValueError as error:
    assert "`batch` has 6 rows, which are not divisible by `data` x `fsdp` = 2 x 2 = 4" in str(error), error
else:
    raise AssertionError("six rows were shared by four groups of devices")
"""
)

FSDP = (
    STEP
    + """
depth = dict(num_hidden_layers=4, ffn_dim=512)
config = dict(hidden_size=256, ffn_dim=1024, num_hidden_layers=4, num_codebooks=2, depth_decoder_config=depth)
batch = draw_batch(small_config(vocab_size=64, **config), (3,) * 8, 3)
program, state = setting(make_mesh(fsdp=8), batch, looped=True, **config)
text, memory = program.as_text(), program.memory_analysis()

def count(name):
    return len(re.findall(rf" {name}(?:-start)?\\(", text))

assert count("all-gather") > 0
assert count("reduce-scatter") > 0 or (count("all-reduce") > 0 and count("dynamic-slice") > 0)
whole = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
params = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
rest = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.frozen_params))
print(f"{whole=} {params=} {rest=} {memory.argument_size_in_bytes=} {memory.output_size_in_bytes=} "
      f"{memory.temp_size_in_bytes=}")
# norms are whole everywhere, and the batch is small
assert memory.argument_size_in_bytes - rest < 1.1 * whole / 8
assert memory.output_size_in_bytes - rest < 1.1 * whole / 8
# one layer at a time is whole
assert memory.temp_size_in_bytes < 0.75 * params
"""
)

TWO_PROCESSES = (
    STEP
    + """
address, processes, process = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    initialize_distributed(address, processes, process)
    assert jax.process_count() == processes and len(jax.devices()) == 2
batch = draw_batch(small_config(vocab_size=64), (4, 3, 2, 4), 4)
rows = {name: np.split(array, processes)[process] for name, array in batch.items()}
program, state = setting(make_mesh(fsdp=2), rows, 2)
state, metrics = program(state, put_batch(rows, make_mesh(fsdp=2)))
whole = jax.jit(lambda tree: tree, out_shardings=jax.sharding.NamedSharding(make_mesh(fsdp=2), jax.P()))
found = {path: np.asarray(leaf) for path, leaf in whole(figures(state, metrics)).items()}
if process == 0:
    np.savez(sys.argv[4], **found)
"""
)


def start(program: str, *arguments: str, devices: int) -> subprocess.Popen:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(*processes: subprocess.Popen) -> None:
    try:
        errors = [process.communicate(timeout=400)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(errors)


def test_loss_and_gradients_equal_one_device() -> None:
    finish(start(EIGHT_DEVICES, devices=8))


def test_fsdp_holds_an_eighth_of_everything() -> None:
    finish(start(FSDP, devices=8))


def test_two_processes_equal_one(tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    files = [str(tmp_path / name) for name in ("one.npz", "two.npz")]
    finish(start(TWO_PROCESSES, address, "1", "0", files[0], devices=2))
    finish(*(start(TWO_PROCESSES, address, "2", process, files[1], devices=1) for process in "01"))
    one, two = (dict(np.load(file)) for file in files)
    assert one.keys() == two.keys()
    for path, leaf in one.items():
        np.testing.assert_allclose(two[path], leaf, rtol=0, atol=1e-10 * np.abs(leaf).max() + 1e-20, err_msg=path)


def test_optimizer_lies_as_its_parameters() -> None:
    _, params = make_module(small_config())
    trainable, frozen = split_params(params)
    optimizer, _ = make_optimizer(OptimizerConfig(), 10, trainable)
    shapes = jax.eval_shape(lambda: create_train_state(trainable, frozen, optimizer))
    shardings = state_shardings(make_mesh(), shapes)
    adam = next(part for part in shardings.opt_state if isinstance(part, optax.ScaleByAdamState))
    assert adam.mu == adam.nu == shardings.params
    specs = {leaf.spec for leaf in jax.tree.leaves(adam.mu)}
    assert PartitionSpec(None, ("fsdp", "tensor")) in specs
    others = (shardings.step, shardings.rng, shardings.bad_steps, adam.count)
    assert {sharding.spec for sharding in others} == {PartitionSpec()}


def test_what_a_mesh_cannot_be() -> None:
    with pytest.raises(ValueError, match="`fsdp` must be at least 1, but is 0"):
        make_mesh(fsdp=0)
    many = len(jax.devices()) + 1
    with pytest.raises(ValueError, match=f"`data` x `fsdp` x `tensor` = 1 x {many} x 1 = {many} devices are wanted"):
        make_mesh(fsdp=many)


def test_a_batch_arrives_as_it_is() -> None:
    batch = draw_batch(small_config(), (2, 2, 2), 2)
    put = put_batch(batch, make_mesh())
    assert all((np.asarray(put[name]) == array).all() for name, array in batch.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, None, 0), "`process_id` is 0, but `num_processes` is missing"),
        (("localhost:1", None, None), "`coordinator_address` is 'localhost:1', but `num_processes` is missing"),
        (("localhost:1", 0, 0), "`num_processes` must be at least 1, but is 0"),
        ((None, 2, 0), "`num_processes` is 2, but `coordinator_address` is None and `process_id` is 0"),
        (("localhost:1", 2, 2), r"`process_id` must be in \[0, 2\), but is 2"),
    ],
)
def test_what_a_process_must_know(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        initialize_distributed(*arguments)


def test_a_process_alone_joins_nothing() -> None:
    initialize_distributed()
    assert jax.process_count() == 1
    assert jnp.zeros(()).is_fully_addressable
