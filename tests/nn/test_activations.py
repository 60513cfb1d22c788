"""Activations by name, against upstream's."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import activations as upstream

from tests.torch_oracle import assert_close
from transformers_moshi_flax.nn.activations import ACT2FN


@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_values_are_upstreams(name: str, x64: None):
    x = np.linspace(-8, 8, 101)
    assert_close(ACT2FN[name](jnp.asarray(x)), upstream.ACT2FN[name](torch.tensor(x)), 1e-10)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"`hidden_act` is 'swoosh'.*gelu.*silu"):
        ACT2FN["swoosh"]
