"""Outputs: ``ModelOutput`` of ``transformers``, and pytrees."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, ModelOutput
from transformers.models.mimi import modeling_mimi
from transformers.models.moshi import modeling_moshi

from transformers_moshi_flax.generation import utils as generation
from transformers_moshi_flax.modeling_flax_outputs import (
    FlaxBaseModelOutputWithPast,
    FlaxCausalLMOutputWithPast,
    FlaxModelOutput,
)
from transformers_moshi_flax.models.mimi import modeling_flax_mimi as mimi
from transformers_moshi_flax.models.moshi import generation_flax_moshi, modules_flax_moshi, streaming_flax_moshi


def output(**more: Any) -> FlaxCausalLMOutputWithPast:
    states = (jnp.zeros((1, 2)), jnp.ones((1, 2)))
    return FlaxCausalLMOutputWithPast(**{"logits": jnp.arange(3.0), "hidden_states": states, **more})


def all_outputs() -> list[type]:
    modules = (generation, mimi, generation_flax_moshi, modules_flax_moshi, streaming_flax_moshi)
    found = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    return sorted((kind for kind in found if issubclass(kind, FlaxModelOutput)), key=lambda kind: kind.__name__)


def test_access() -> None:
    out = output(loss=jnp.ones(()))
    assert isinstance(out, ModelOutput) and isinstance(out, dict)
    assert list(out) == list(out.keys()) == ["loss", "logits", "hidden_states"] and len(out) == 3
    assert out["logits"] is out.logits is out[1] is out.to_tuple()[1] is out[:2][1] is out.get("logits")
    assert out.attentions is None and "attentions" not in out and out.get("attentions", 5) == 5
    with pytest.raises(KeyError):
        out["attentions"]
    with pytest.raises(IndexError):
        out[3]
    with pytest.raises(AttributeError, match=r"FlaxCausalLMOutputWithPast.*'last_hidden_stat'"):
        _ = out.last_hidden_stat
    loss, logits = out.to_tuple()[:2]
    assert loss is out.loss and logits is out.logits
    assert dict(out) == {**out} == dict(out.items()) and dict(**out).keys() == out.keys()
    assert [value is out[name] for name, value in zip(out, out.values())] == [True] * 3
    assert bool(out) and not FlaxModelOutput() and not isinstance(out, tuple)


def test_both_names_of_a_cache() -> None:
    out = output(cache=5)
    assert out.past_key_values == out["past_key_values"] == out.get("past_key_values") == out.cache == 5
    assert "past_key_values" in out and list(out) == ["logits", "cache", "hidden_states"]
    out["past_key_values"] = 6
    assert out.cache == 6
    assert not hasattr(FlaxModelOutput(), "past_key_values") and not hasattr(out, "cache_params")


def test_changes() -> None:
    out = output()
    out.update(loss=1.0)
    out.update({"attentions": (2.0,)})
    out |= {"cache": 3}
    assert list(out) == ["loss", "logits", "cache", "hidden_states", "attentions"] and out[0] == 1.0
    out["loss"] = None
    out.attentions = None
    assert list(out) == ["logits", "cache", "hidden_states"] and len(out.to_tuple()) == 3
    other = out.replace(cache=None, logits=7)
    assert (other.logits, other.cache, other["logits"]) == (7, None, 7) and out.cache == 3
    assert type(out | {"more": 4}) is dict and (out | {"more": 4})["more"] == 4 and ({"more": 4} | out)["cache"] == 3
    for name in ("no_field", "to_tuple"):
        with pytest.raises(KeyError, match="logits"):
            out[name] = 1
        with pytest.raises(KeyError, match=name):
            out.update({name: 1})
    with pytest.raises(TypeError, match="no_field"):
        out.replace(no_field=1)
    # as upstream's
    for change in (lambda: out.pop("cache"), lambda: out.setdefault("loss", 1), out.clear, out.popitem):
        with pytest.raises(TypeError, match="None"):
            change()
    with pytest.raises(TypeError, match="None"):
        del out["cache"]
    assert list(out) == ["logits", "cache", "hidden_states"]


@pytest.mark.parametrize("first", [jnp.ones(3), (jnp.ones(3),), [("a", jnp.ones(3))], {"a": jnp.ones(3)}, object()])
def test_only_the_first_field(first: Any) -> None:
    """``ModelOutput`` takes some of these apart; inside of transformations any object may stand for a value."""

    @dataclasses.dataclass
    class Only(FlaxModelOutput):
        first: Any = None
        second: Any = None

    out = Only(first)
    assert out.first is first is out["first"] and list(out) == ["first"]
    leaves, structure = jax.tree.flatten(out)
    again = jax.tree.unflatten(structure, leaves)
    assert type(again) is Only and list(again) == ["first"] and again.second is None


def test_transformations() -> None:
    out = output()
    doubled = jax.tree.map(lambda leaf: 2 * leaf, out)
    assert type(doubled) is type(out) and list(doubled) == list(out)
    np.testing.assert_array_equal(doubled["logits"], 2 * out.logits)
    assert [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(out)] == [
        ".logits",
        ".hidden_states[0]",
        ".hidden_states[1]",
    ]
    np.testing.assert_array_equal(jax.jit(lambda out: out.replace(loss=out.logits.sum()))(out)["loss"], 3)
    mapped = jax.vmap(lambda x: FlaxBaseModelOutputWithPast(x))(jnp.ones((2, 3)))
    assert mapped.last_hidden_state.shape == (2, 3) and list(mapped) == ["last_hidden_state"]
    grads = jax.grad(lambda out: (out.logits**2).sum())(out)
    np.testing.assert_array_equal(grads.logits, 2 * out.logits)
    last, all_ = lax.scan(lambda out, _: (out.replace(logits=out[0] + 1), out), out, None, length=3)
    np.testing.assert_array_equal(last.logits, out.logits + 3)
    assert all_.logits.shape == (3, 3) and list(last) == list(out)
    assert jax.eval_shape(lambda: out)["logits"].shape == (3,)
    assert jax.tree.structure(out) == jax.tree.structure(output()) != jax.tree.structure(output(loss=1.0))


def test_copies() -> None:
    out = output(cache=[1])
    for other in (copy.copy(out), out.copy(), copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
        assert type(other) is type(out) and list(other) == list(out) and other.cache == [1]
        other.loss = 1.0
    assert "loss" not in out and copy.copy(out).cache is out.cache is not copy.deepcopy(out).cache
    assert repr(output(logits=1, hidden_states=None)).startswith("FlaxCausalLMOutputWithPast(loss=None, logits=1,")


@pytest.mark.parametrize("kind", all_outputs(), ids=lambda kind: kind.__name__)
def test_every_output(kind: type) -> None:
    names = [field.name for field in dataclasses.fields(kind)]
    out = jax.tree.unflatten(jax.tree.structure(kind(), is_leaf=lambda leaf: leaf is None), range(len(names)))
    assert issubclass(kind, ModelOutput) and type(out) is kind
    assert list(out) == names and out.to_tuple() == (*range(len(names)),)
    assert jax.tree.leaves(out) == [*range(len(names))]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (FlaxBaseModelOutputWithPast, BaseModelOutputWithPast),
        (FlaxCausalLMOutputWithPast, modeling_moshi.MoshiCausalLMOutputWithPast),
        (modules_flax_moshi.FlaxMoshiDepthDecoderOutputWithPast, CausalLMOutputWithPast),
        (modules_flax_moshi.FlaxMoshiUnconditionalInput, modeling_moshi.MoshiUnconditionalInput),
        (mimi.FlaxMimiOutput, modeling_mimi.MimiOutput),
    ],
    ids=lambda kind: kind.__name__,
)
def test_positions_are_upstreams(ours: type, theirs: type) -> None:
    """In the order of upstream's, which may have fields that ours has not; ours may have more at the end."""
    ours, theirs = ([field.name for field in dataclasses.fields(kind)] for kind in (ours, theirs))
    shared = [name for name in theirs if name in ours]
    assert ours[: len(shared)] == shared and shared


def test_torch_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from transformers_moshi_flax.modeling_flax_outputs import FlaxCausalLMOutputWithPast\n"
        "out = FlaxCausalLMOutputWithPast(logits=(1, 2))\n"
        "out.loss, out.past_key_values, out.update(cache=3), repr(out), dict(out), out.replace(loss=1)\n"
        "print('torch' in sys.modules, out.logits)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "False (1, 2)", done.stderr
