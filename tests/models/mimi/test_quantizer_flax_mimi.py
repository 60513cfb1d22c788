"""The residual quantizer against upstream's, and the choice of entries."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.mimi import modeling_mimi

from tests.configs import tiny_mimi_config
from tests.models.mimi.with_upstreams_weights import audio, double, last_to_first, run
from tests.torch_oracle import assert_close, double_oracle
from transformers_moshi_flax.models.mimi import quantizer_flax_mimi as flax_mimi


@pytest.mark.parametrize("inner", [12, 32])
def test_residual_quantizer(inner: int, x64: None):
    """With projections, and without where the inner dimension is that of the latents."""
    config = tiny_mimi_config(vector_quantization_hidden_dimension=inner, codebook_dim=inner)
    theirs = double(modeling_mimi.MimiResidualVectorQuantizer(config, 5))
    module = flax_mimi.FlaxMimiResidualVectorQuantizer(config, 5, jnp.float64)
    x = audio(2, 40, channels=32)
    with double_oracle():
        expected = theirs.encode(torch.tensor(x), 4).transpose(0, 1)
        decoded = theirs.decode(expected)
    codes = run(theirs, module, jnp.asarray(last_to_first(x)), 4, method="encode")
    assert len(np.unique(codes)) > 10
    np.testing.assert_array_equal(codes, expected)
    assert_close(last_to_first(run(theirs, module, codes, method="decode")), decoded, 1e-10)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_nearest_in_a_table_of_full_size(rows: int):
    rng = np.random.default_rng(0)
    total, usage = rng.standard_normal((2048, 256)), rng.uniform(0.5, 2, 2048)
    chosen = rng.integers(0, 2048, rows)
    x = (total / usage[:, None])[chosen] + 0.1 * rng.standard_normal((rows, 256))
    table = flax_mimi.Codebook(jnp.float32(total), jnp.float32(usage))
    assert jax.jit(table.nearest)(jnp.float32(x)).tolist() == chosen.tolist()


def test_nearest_takes_the_first_of_equal_entries():
    table = flax_mimi.Codebook(jnp.array([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), jnp.array([1, 2.0, 1, 1]))
    assert table.nearest(jnp.array([[0.9, 0.1], [0.5, 0.5]])).tolist() == [1, 1]


def test_distances_in_full_precision():
    """A TPU would round the factors of products to bfloat16, and choose other entries."""
    table = flax_mimi.Codebook(jnp.ones((4, 2)), jnp.ones(4))
    with jax.default_matmul_precision("default"):
        program = jax.jit(lambda x: table.nearest(x)).lower(jnp.ones((3, 2))).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 2 and all("precision = [HIGHEST, HIGHEST]" in line for line in products)
