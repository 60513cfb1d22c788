"""Leaves on their devices: exact, of their own memory, in slices, and without a second copy of the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from transformers import MoshiConfig

from transformers_moshi_flax.checkpoints.loading import Transfers, main_dtype, to_device

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("source", [np.float32, ml_dtypes.bfloat16, np.int32, np.bool_])
def test_values_are_exact(dtype: type | None, source: type):
    array = (np.arange(24) % 5 * 0.4).astype(source).reshape(2, 3, 4)
    for leaf in (array, array.transpose(2, 1, 0), array[1], array[1].T, array[:, :, 0], array[0, 0, 1:2].reshape(())):
        result = to_device(leaf, dtype)
        target = dtype if dtype is not None and jnp.issubdtype(source, jnp.floating) else source
        assert result.dtype == target
        np.testing.assert_array_equal(np.asarray(result), leaf.astype(target))


def test_arrays_do_not_depend_on_the_file(tmp_path: Path):
    np.ones((1024, 512), np.float32).tofile(tmp_path / "data")
    mapped = np.memmap(tmp_path / "data", np.float32, "r+", shape=(1024, 512))
    leaves = [np.asarray(leaf) for leaf in (mapped, mapped.T, mapped[:2], mapped[0, :16])]
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays = [to_device(leaf, None, sharding) for leaf in leaves for sharding in (None, whole)]
    mapped[:] = 2
    assert all((array == 1).all() for array in arrays)


def test_double_is_never_cut_in_silence():
    with pytest.raises(ValueError, match="float64: enable jax_enable_x64 or pass dtype"):
        to_device(np.ones(3), None)
    assert to_device(np.ones(3), jnp.float32).dtype == jnp.float32


def test_transfers_follow_the_settings_of_the_caller():
    with jax.enable_x64(True), Transfers() as transfers:
        leaf = np.arange(4.0).reshape(2, 2).T
        started = [transfers.start(to_device, leaf, dtype, None) for dtype in (None, jnp.bfloat16)]
        double, half = (transfer.result() for transfer in started)
        assert double.dtype == jnp.float64 and half.dtype == jnp.bfloat16
        assert (double == np.array([[0, 2], [1, 3]])).all()
    with Transfers() as transfers, pytest.raises(ValueError, match="float64: enable jax_enable_x64"):
        transfers.start(to_device, np.ones(3), None, None).result()


def test_main_dtype_is_that_of_most_numbers():
    params = {("a",): np.ones(3, np.float32), ("b",): np.ones(9, np.float16), ("c",): np.ones(99, np.int32)}
    assert main_dtype(params | {("b", "scales"): np.ones(99, np.float32)}) == np.float16
    assert main_dtype({}) == np.float32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 MB in the layout of PyTorch, the largest tensor a sixth of it."""
    torch = pytest.importorskip("torch")
    from transformers import MoshiForCausalLM

    folder = tmp_path_factory.mktemp("200MB")
    config = MoshiConfig(
        vocab_size=8000, hidden_size=1024, num_hidden_layers=3, num_attention_heads=8, ffn_dim=4096, head_dim=128
    )
    with torch.device("meta"):
        model = MoshiForCausalLM(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


def taken_by(checkpoint: Path, *options: str) -> dict[str, float]:
    """What loading takes in a fresh process."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.checkpoints.measure_loading", str(checkpoint), *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_second_copy_in_memory(checkpoint: Path, dtype: str):
    taken = taken_by(checkpoint, dtype)
    size = (checkpoint / "model.safetensors").stat().st_size
    assert size > 190e6
    assert taken["parameters"] == pytest.approx(size * (1 if dtype == "float32" else 0.5), rel=0.01)
    # the bound of a 2 GB checkpoint leaves 200 MB for programs and buffers; here they would hide a second copy
    assert taken["peak"] <= 1.15 * taken["parameters"] + 60e6, taken


def test_never_all_floats_of_what_is_quantized(checkpoint: Path):
    """The floats of the two layers that are read at a time, twice each, come on top of what stays."""
    taken = taken_by(checkpoint, "bfloat16", "int4")
    size = (checkpoint / "model.safetensors").stat().st_size
    embedding, head = 8001 * 1024, 8000 * 1024
    layers = size / 4 - embedding - head
    assert taken["parameters"] == pytest.approx(2 * embedding + (layers + head) * (1 / 2 + 4 / 32), rel=0.01)
    assert taken["peak"] <= 1.15 * taken["parameters"] + 2 * 2 * 4 * head + 20e6, taken
