"""Whether something is traced, told without looking at every array."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformers_moshi_flax.input_checks import is_tracing


def test_outside_of_jit_nothing_is_made(monkeypatch: pytest.MonkeyPatch):
    def refused(*_):
        raise AssertionError("an array was made to find out")

    monkeypatch.setattr(jnp, "zeros", refused)
    assert not is_tracing() and not is_tracing({"a": [np.ones(2)]}, 3)


def test_inside_of_jit_everything_is_traced():
    told = []
    jax.jit(lambda: told.append(is_tracing()))()
    jax.eval_shape(lambda x: told.append(is_tracing()), 1.0)
    assert told == [True, True] and not is_tracing()


@pytest.mark.parametrize("transformed", [jax.vmap, jax.grad])
def test_inside_of_other_transformations_their_arrays_are(transformed):
    told = []

    def function(x: jax.Array) -> jax.Array:
        told.extend([is_tracing(x), is_tracing(), is_tracing(np.ones(2))])
        return x

    transformed(function)(jnp.ones(2) if transformed is jax.vmap else 1.0)
    assert told == [True, False, False]


def test_imported_inside_of_jit():
    code = """
import jax
def function():
    from transformers_moshi_flax.input_checks import is_tracing
    assert is_tracing()
jax.jit(function)()
from transformers_moshi_flax.input_checks import is_tracing
assert not is_tracing()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
