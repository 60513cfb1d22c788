"""The rotary embedding of every kind, against upstream's and an exact construction."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.helium import modeling_helium
from transformers.models.llama import modeling_llama
from transformers.models.moshi import modeling_moshi

from tests.configs import tiny_llama_config, tiny_moshi_config
from tests.torch_oracle import TOLERANCE, assert_close, oracle_precision
from transformers_moshi_flax.ops.rotary import apply_rotary_pos_emb, rotary_embedding


@pytest.mark.parametrize("theta, head_dim", [(10000.0, 8), (100.0, 6)])
def test_equals_upstream(theta: float, head_dim: int):
    config = tiny_moshi_config(head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": theta})
    positions = np.array([[0, 1, 2, 3], [0, 7, 100, 2999]], np.int32)
    rng = np.random.default_rng(0)
    query, key = (rng.standard_normal((2, heads, 4, head_dim)).astype(np.float32) for heads in (4, 2))
    cos, sin = modeling_moshi.MoshiRotaryEmbedding(config)(torch.tensor(query), torch.tensor(positions).long())
    rotated = modeling_moshi.apply_rotary_pos_emb(torch.tensor(query), torch.tensor(key), cos, sin)
    angles = rotary_embedding(jnp.asarray(positions)[:, None], head_dim, config.rope_parameters, jnp.float32)
    assert_close([angle[:, 0] for angle in angles], (cos, sin), 1e-5)
    assert_close([apply_rotary_pos_emb(jnp.asarray(x), *angles) for x in (query, key)], rotated, 1e-5)


def test_frequencies_of_the_published_model():
    """Those of all 64 pairs are upstream's on whatever processor: at frame 3000 one bit is up to 1e-4 rad."""
    config = tiny_moshi_config(head_dim=128)
    expected = modeling_moshi.MoshiRotaryEmbedding(config).inv_freq.numpy()
    _, sin = rotary_embedding(jnp.asarray([2999]), 128, config.rope_parameters, jnp.float32)
    np.testing.assert_allclose(sin[0, :64], np.sin(np.float32(2999) * expected), rtol=0, atol=1e-6)


def test_angles_are_finer_in_double(x64: None):
    parameters = {"rope_type": "default", "rope_theta": 123.0}
    cos, sin = rotary_embedding(jnp.arange(400), 8, parameters, jnp.float64)
    angles = np.arange(400)[:, None] / 123.0 ** (np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(cos, np.cos(np.tile(angles, 2)), atol=1e-12)
    np.testing.assert_allclose(sin, np.sin(np.tile(angles, 2)), atol=1e-12)
    assert rotary_embedding(jnp.arange(4), 8, parameters, jnp.bfloat16)[0].dtype == jnp.bfloat16


SCALED = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 3.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "yarn with all": {
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "truncate": False,
    },
    "yarn with a factor": {"factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.7},
}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """In which upstream multiplies the length of a text by numbers."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("length", [20, 100])
def test_scaled_frequencies_equal_upstreams(name: str, dtype: str, length: int):
    parameters = {"rope_type": name.split()[0], "rope_theta": 500.0, **SCALED[name]}
    config = tiny_llama_config(head_dim=16, max_position_embeddings=32, rope_parameters=parameters)
    positions = np.arange(length)[None]
    with oracle_precision(dtype), jax.enable_x64(dtype == "float64"), default_dtype(getattr(torch, dtype)):
        rotary = modeling_llama.LlamaRotaryEmbedding(config)
        theirs = rotary(torch.zeros(1, dtype=getattr(torch, dtype)), torch.tensor(positions))
        ours = rotary_embedding(
            jnp.asarray(positions), 16, parameters, jnp.dtype(dtype), 32, jnp.asarray(positions.max() + 1)
        )
        assert_close(ours, theirs, TOLERANCE[dtype])


def test_neighbours_are_turned_together():
    config = tiny_llama_config("helium")
    query = np.random.default_rng(0).standard_normal((2, 4, 5, 12)).astype(np.float32)
    cos, sin = modeling_helium.HeliumRotaryEmbedding(config)(torch.tensor(query), torch.arange(5)[None])
    theirs, _ = modeling_helium.apply_rotary_pos_emb(torch.tensor(query), torch.tensor(query), cos, sin)
    angles = rotary_embedding(jnp.arange(5)[None, None], 12, config.rope_parameters, jnp.float32)
    assert_close(apply_rotary_pos_emb(jnp.asarray(query), *angles, interleaved=True), theirs, 1e-5)


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"rope_type": "longrope"}, r"rope_type='longrope'.*use one of 'default', 'dynamic'"),
        ({"rope_type": "linear"}, "rope_type='linear' has no 'factor': give a number"),
        ({"rope_type": "yarn", "factor": 2.0}, "has no 'original_max_position_embeddings'"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5.*leave it out"),
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type='dynamic', which needs a length"),
    ],
)
def test_what_is_refused(parameters: dict, message: str):
    with pytest.raises(ValueError, match=f"`rope_parameters`.*{message}"):
        rotary_embedding(jnp.arange(4), 8, {"rope_theta": 1e4, **parameters}, jnp.float32)


@pytest.mark.parametrize("begin", [0, 1_000_000, 2**32 - 40])
def test_unsigned_positions_never_wear_out(begin: int):
    """The angle between two positions is the same at the start, after a day, and where the count wraps around."""
    parameters = {"rope_type": "default", "rope_theta": 10000.0}
    positions = (np.arange(begin, begin + 80) % 2**32).astype(np.uint32)
    cos, sin = (np.asarray(x, np.float64) for x in rotary_embedding(jnp.asarray(positions), 8, parameters, "float32"))
    turned = (cos + 1j * sin)[:, :4] * (cos - 1j * sin)[:1, :4]
    angles = np.arange(80)[:, None] / 10000.0 ** (np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(turned, np.exp(1j * angles), atol=2e-6)


def test_unsigned_positions_in_double(x64: None):
    parameters = {"rope_type": "default", "rope_theta": 123.0}
    expected = rotary_embedding(jnp.arange(3000), 8, parameters, jnp.float64)
    actual = rotary_embedding(jnp.arange(3000, dtype=jnp.uint32), 8, parameters, jnp.float64)
    assert_close(actual, [np.asarray(x) for x in expected], 1e-11)
