"""The time spent on compiling is told from the time spent on running."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from transformers_moshi_flax.cli.timing import compilation_time, covered


def test_first_call_compiles_and_second_does_not():
    function = jax.jit(lambda x: jnp.tanh(x @ x).sum())
    x = jnp.ones((7, 7))
    seconds = []
    for _ in range(2):
        with compilation_time() as compilation:
            function(x).block_until_ready()
        seconds.append(compilation.seconds)
    assert seconds[0] > 0
    assert seconds[1] == 0


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], 0.0),
        ([(0.0, 1.0), (2.0, 4.0)], 3.0),
        ([(0.0, 4.0), (1.0, 2.0)], 4.0),
        ([(1.0, 3.0), (0.0, 2.0)], 3.0),
        ([(0.0, 1.0), (1.0, 2.0)], 2.0),
    ],
)
def test_nested_spans_count_once(spans: list, expected: float):
    assert covered(spans) == expected
