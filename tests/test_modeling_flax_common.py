"""What every model class must do: the tests that the Flax common suite of ``transformers`` 4.57 had, as a mixin.

A test class of a model inherits :class:`FlaxModelTesterMixin` and lists its cases; each test then runs on each case.
The weights come from upstream's randomized PyTorch model through its real files.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file
from transformers.utils import ModelOutput

from transformers_moshi_flax import FlaxPreTrainedModel
from transformers_moshi_flax.former_names import FORMER_NAMES

from .torch_oracle import assert_close, randomize, save_upstream

EXTRA_ARGUMENTS = {"params", "dropout_rng", "train", "output_attentions", "output_hidden_states", "return_dict"}
"""What ours takes beyond upstream's ``forward`` (which has some of them in ``**kwargs``)."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One model class under test.

    Attributes:
        ours: the Flax class.
        upstream: the PyTorch class.
        config: makes the configuration.
        inputs: makes keyword arguments (NumPy arrays) for a configuration.
        differentiable: of the outputs, one that depends smoothly on parameters, or None.
        layers: hidden states by name of the output field -> (number of layers, width), as the configuration says.
        heads: attentions by name of the output field -> (number of layers, heads).
        not_ours: arguments of upstream's ``forward`` that ours does not take.
        only_ours: arguments that ours takes after upstream's.
    """

    ours: type[FlaxPreTrainedModel]
    upstream: type
    config: Callable[[], Any]
    inputs: Callable[[Any], dict[str, np.ndarray]]
    differentiable: str | None
    layers: Callable[[Any], dict[str, tuple[int, int]]] = lambda config: {}
    heads: Callable[[Any], dict[str, tuple[int, int]]] = lambda config: {}
    not_ours: frozenset[str] = frozenset()
    only_ours: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with upstream's weights: nobody may change it."""

    model: FlaxPreTrainedModel
    inputs: dict[str, np.ndarray]
    directory: Path

    def outputs(self, model: FlaxPreTrainedModel | None = None, **kwargs: Any) -> dict[str, Any]:
        """Everything that an eager call returns, by path."""
        return leaves((self.model if model is None else model)(**self.inputs, **kwargs))


def leaves(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same_outputs(ours: dict[str, Any], theirs: dict[str, Any], tol: float) -> None:
    """``tol`` 0 asks for equal bits."""
    assert ours.keys() == theirs.keys() and ours
    for path, leaf in theirs.items():
        if tol and jnp.issubdtype(leaf.dtype, jnp.floating):
            assert_close(ours[path], leaf, tol, path)
        else:
            np.testing.assert_array_equal(np.asarray(ours[path]), np.asarray(leaf), err_msg=path)


def assert_same_params(ours: Any, theirs: Any) -> None:
    """Equal paths, dtypes and bits."""
    ours, theirs = flatten_dict(ours, sep="/"), flatten_dict(theirs, sep="/")
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        assert ours[path].dtype == leaf.dtype and ours[path].shape == leaf.shape, path
        assert np.asarray(ours[path]).tobytes() == np.asarray(leaf).tobytes(), path


def on_host(params: Any) -> Any:
    """NumPy leaves: what is done with them needs no compilation."""
    return jax.tree.map(np.asarray, params)


def dtypes(params: Any) -> set[str]:
    return {leaf.dtype.name for leaf in jax.tree.leaves(params)}


class FlaxModelTesterMixin:
    """Mixed into a ``Test...`` class with ``cases`` and, where there is one, ``base_and_head``."""

    cases: tuple[Case, ...] = ()
    base_and_head: tuple[Case, Case] | None = None
    _loaded: dict[Case, Loaded]

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls._loaded = {}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases, ids=[case.ours.__name__ for case in self.cases])

    @pytest.fixture
    def loaded(self, case: Case, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
        return self.load(case, tmp_path_factory)

    @pytest.fixture
    def base(self, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
        if self.base_and_head is None:
            pytest.skip("no class with a head on a base")
        return self.load(self.base_and_head[0], tmp_path_factory)

    @pytest.fixture
    def head(self, base: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
        return self.load(self.base_and_head[1], tmp_path_factory)

    @classmethod
    def load(cls, case: Case, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
        if case not in cls._loaded:
            directory = tmp_path_factory.mktemp(case.ours.__name__)
            config = case.config()
            save_upstream(randomize(case.upstream._from_config(config)), directory)
            model = case.ours.from_pretrained(directory)
            cls._loaded[case] = Loaded(model, case.inputs(model.config), directory)
        return cls._loaded[case]

    # Names

    def test_names(self, case: Case):
        name = case.ours.__name__
        assert name == "Flax" + case.upstream.__name__
        module = name.removesuffix("Model") + "Module" if name.endswith("Model") else name + "Module"
        assert case.ours.module_class.__name__ == module
        assert case.ours.config_class is case.upstream.config_class
        assert case.ours.main_input_name == case.upstream.main_input_name

    def test_arguments_are_upstreams_in_order(self, case: Case):
        theirs = [
            FORMER_NAMES.get(name, name)
            for name, parameter in inspect.signature(case.upstream.forward).parameters.items()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        theirs = [name for name in theirs if name not in EXTRA_ARGUMENTS | case.not_ours]
        ours = [name for name in inspect.signature(case.ours.__call__).parameters if name not in EXTRA_ARGUMENTS]
        assert ours == [*theirs, *case.only_ours]
        of_ours = set(inspect.signature(case.ours.__call__).parameters)
        assert {"params", "dropout_rng", "train", "return_dict"} <= of_ours
        assert next(name for name in theirs if name != "self") == case.ours.main_input_name

    # Making a model

    def test_new_params_are_float32_whatever_the_dtype(self, case: Case, loaded: Loaded):
        model = case.ours(loaded.model.config, dtype=jnp.bfloat16)
        assert dtypes(model.params) == {"float32"} and model.dtype == jnp.bfloat16 == model.module.dtype
        assert jax.tree.map(jnp.shape, model.params) == jax.tree.map(jnp.shape, model.params_shape_tree)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(on_host(model.params)))
        assert_same_params(case.ours(loaded.model.config, seed=0).params, model.params)
        other = model.init_weights(jax.random.key(1))
        pairs = zip(*(jax.tree.leaves(on_host(params)) for params in (other, model.params)))
        assert any((left != right).any() for left, right in pairs)

    def test_without_init(self, case: Case, loaded: Loaded):
        model = case.ours(loaded.model.config, _do_init=False)
        with pytest.raises(ValueError, match="_do_init=False"):
            model.params  # noqa: B018
        with pytest.raises(ValueError, match="_do_init=False"):
            model.params = loaded.model.params
        assert model.required_params == set(flatten_dict(loaded.model.params))
        assert jax.tree.structure(model.params_shape_tree) == jax.tree.structure(loaded.model.params)
        assert_same_outputs(loaded.outputs(model, params=loaded.model.params), loaded.outputs(), tol=0)

        model, params = case.ours.from_pretrained(loaded.directory, _do_init=False)
        assert_same_params(params, loaded.model.params)
        flat = flatten_dict(params)
        dropped = sorted(flat)[len(flat) // 2]
        completed = model.init_weights(
            model.key, params=unflatten_dict({k: v for k, v in flat.items() if k != dropped})
        )
        assert set(flatten_dict(completed)) == model.required_params
        assert all(flatten_dict(completed)[path] is leaf for path, leaf in flat.items() if path != dropped)

    def test_params_need_every_leaf(self, case: Case, loaded: Loaded):
        model, params = case.ours.from_pretrained(loaded.directory, _do_init=False)
        model._is_initialized = True
        model.params = params
        flat = flatten_dict(params)
        path = sorted(flat)[0]
        del flat[path]
        with pytest.raises(ValueError, match="/".join(path)):
            model.params = unflatten_dict(flat)
        assert_same_params(model.params, loaded.model.params)

    # Calling

    def test_eager_jit_and_tuple_agree(self, loaded: Loaded):
        model = loaded.model
        eager = model(**loaded.inputs, return_dict=True)
        jitted = jax.jit(lambda params: model(**loaded.inputs, params=params))(model.params)
        assert_same_outputs(leaves(eager), leaves(jitted), tol=1e-5)
        as_tuple = model(**loaded.inputs, return_dict=False)
        assert isinstance(as_tuple, tuple) and len(as_tuple) == len(eager.to_tuple())
        for ours, theirs in zip(leaves(as_tuple).values(), leaves(eager.to_tuple()).values(), strict=True):
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))

    def test_vmap_over_params(self, loaded: Loaded):
        model = loaded.model
        other = jax.tree.map(lambda leaf: leaf * np.float32(1.01), on_host(model.params))
        stacked = jax.tree.map(lambda *both: np.stack(both), on_host(model.params), other)
        mapped = leaves(jax.jit(jax.vmap(lambda params: model(**loaded.inputs, params=params)))(stacked))
        for index, params in enumerate((model.params, other)):
            single = loaded.outputs(params=params)
            # Codes are decisions, which a last bit may tip: what comes of them is left to the exact tests.
            if any(not jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in single.values()):
                single = {path: leaf for path, leaf in single.items() if leaf.dtype == jnp.int32}
                agree = [np.mean(np.asarray(mapped[path][index] == leaf)) for path, leaf in single.items()]
                assert min(agree) > 0.9
            else:
                assert_same_outputs({path: leaf[index] for path, leaf in mapped.items()}, single, tol=1e-5)

    def test_hidden_states_and_attentions(self, case: Case, loaded: Loaded):
        config = loaded.model.config
        states, attentions = case.layers(config), case.heads(config)
        if not states | attentions:
            pytest.skip("returns neither")
        plain = loaded.model(**loaded.inputs)
        with_states = loaded.model(**loaded.inputs, output_hidden_states=True)
        with_attentions = loaded.model(**loaded.inputs, output_attentions=True)
        assert set(with_states) - set(plain) == set(states)
        assert set(with_attentions) - set(plain) == set(attentions)
        for name, (layers, width) in states.items():
            assert [state.shape[-1] for state in with_states[name]] == [width] * (layers + 1)
        for name, (layers, heads) in attentions.items():
            assert [weights.shape[1] for weights in with_attentions[name]] == [heads] * layers
            for weights in with_attentions[name]:
                np.testing.assert_allclose(np.asarray(weights).sum(-1), 1, rtol=1e-5)

    def test_the_configuration_asks_for_what_is_returned(self, case: Case, loaded: Loaded):
        states, attentions = case.layers(loaded.model.config), case.heads(loaded.model.config)
        plain = set(loaded.model(**loaded.inputs))
        for field, names in (("output_hidden_states", states), ("output_attentions", attentions)):
            model, params = case.ours.from_pretrained(loaded.directory, _do_init=False, **{field: True})
            assert set(model(**loaded.inputs, params=params)) == plain | set(names)
            assert set(model(**loaded.inputs, params=params, **{field: False})) == plain
        model, params = case.ours.from_pretrained(loaded.directory, _do_init=False, return_dict=False)
        assert type(model(**loaded.inputs, params=params)) is tuple
        assert isinstance(model(**loaded.inputs, params=params, return_dict=True), ModelOutput)

    def test_gradient_checkpointing(self, case: Case, loaded: Loaded):
        if case.differentiable is None:
            pytest.skip("the output is not differentiable")

        def loss(params: Any, model: FlaxPreTrainedModel) -> jax.Array:
            output = model(**loaded.inputs, params=params)[case.differentiable]
            return jnp.sum(output * jnp.cos(jnp.arange(output.size, dtype=output.dtype)).reshape(output.shape))

        model, params = case.ours.from_pretrained(loaded.directory, _do_init=False)
        grad = jax.grad(loss)
        assert "remat" not in str(jax.make_jaxpr(lambda p: grad(p, model))(params))
        plain = jax.jit(lambda p: jax.value_and_grad(loss)(p, model))(params)
        model.enable_gradient_checkpointing()
        assert "remat" in str(jax.make_jaxpr(lambda p: grad(p, model))(params))
        checkpointed = jax.jit(lambda p: jax.value_and_grad(loss)(p, model))(params)
        assert_close(checkpointed[0], plain[0], 1e-5)
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain[1]))
        assert largest > 0
        for ours, theirs in zip(*map(jax.tree.leaves, (checkpointed[1], plain[1]))):
            np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=1e-5 * largest)
        model.disable_gradient_checkpointing()
        assert "remat" not in str(jax.make_jaxpr(lambda p: grad(p, model))(params))

    # Casts

    def test_casts(self, loaded: Loaded):
        model, params = loaded.model, on_host(loaded.model.params)
        for cast, name in ((model.to_bf16, "bfloat16"), (model.to_fp16, "float16")):
            lower = cast(params)
            assert dtypes(lower) == {name} and dtypes(model.to_fp32(lower)) == {"float32"}
        mask = unflatten_dict({path: path[-1] == "kernel" for path in flatten_dict(params)})
        for path, leaf in flatten_dict(model.to_bf16(params, mask)).items():
            assert leaf.dtype == (jnp.bfloat16 if path[-1] == "kernel" else jnp.float32)
        assert dtypes(params) == {"float32"}

    @pytest.mark.parametrize("name", ["bfloat16", "float16"])
    def test_half_precision_files(self, case: Case, loaded: Loaded, tmp_path: Path, name: str):
        model = loaded.model
        lower = (model.to_bf16 if name == "bfloat16" else model.to_fp16)(on_host(model.params))
        for to_pt in (True, False):
            model.save_pretrained(tmp_path / str(to_pt), params=lower, to_pt=to_pt)
            again = case.ours.from_pretrained(tmp_path / str(to_pt))
            assert again.dtype == jnp.dtype(name) == again.module.dtype
            assert_same_params(again.params, lower)
        wide = case.ours.from_pretrained(tmp_path / "True", dtype=jnp.float32)
        assert_same_params(wide.params, model.to_fp32(lower))
        assert wide.dtype == jnp.float32
        if name == "float16":
            return  # the same code again: bfloat16 shows that a call works
        outputs = loaded.outputs(again)
        assert name in {leaf.dtype.name for leaf in outputs.values()}
        assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in outputs.values())

    # Files

    def test_save_and_load(self, case: Case, loaded: Loaded, tmp_path: Path):
        before = loaded.outputs()
        loaded.model.save_pretrained(tmp_path)
        again, info = case.ours.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert_same_params(again.params, loaded.model.params)
        assert_same_outputs(loaded.outputs(again), before, tol=0)
        saved = json.loads((tmp_path / "config.json").read_text())
        original = json.loads((loaded.directory / "config.json").read_text())
        assert saved == original
        assert (tmp_path / "generation_config.json").exists() == case.ours.can_generate()

    def test_from_upstream_and_back(self, case: Case, loaded: Loaded, tmp_path: Path):
        original = load_file(loaded.directory / "model.safetensors")
        _, info = case.ours.from_pretrained(loaded.directory, from_pt=True, output_loading_info=True)
        assert not any(info.values())
        loaded.model.save_pretrained(tmp_path, to_pt=True)
        written = load_file(tmp_path / "model.safetensors")
        assert written.keys() == original.keys()
        for key, tensor in original.items():
            assert written[key].dtype == tensor.dtype and written[key].shape == tensor.shape, key
            assert written[key].tobytes() == tensor.tobytes(), key
        theirs, info = case.upstream.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        reference = dict(case.upstream.from_pretrained(loaded.directory).state_dict())
        for key, tensor in theirs.state_dict().items():
            assert (tensor == reference.pop(key)).all(), key
        assert not reference

    def test_files_that_do_not_fit(self, case: Case, loaded: Loaded, tmp_path: Path):
        tensors = load_file(loaded.directory / "model.safetensors")
        loaded.model.config.save_pretrained(tmp_path)
        keys = sorted(key for key in tensors if tensors[key].ndim > 1 and "lm_head" not in key)
        missing, mismatched, surplus = keys[0], keys[-1], keys[1] + "_too_much"
        tensors[surplus] = tensors[keys[1]]
        tensors[mismatched] = tensors[mismatched][..., :-1].copy()
        del tensors[missing]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError) as error:
            case.ours.from_pretrained(tmp_path)
        path = "/".join(missing.split(".")[:-1])
        assert "no weights for" in str(error.value) and path in str(error.value)
        assert f"{mismatched} is" in str(error.value) and surplus in str(error.value)

    def test_mismatched_shapes(self, case: Case, loaded: Loaded, tmp_path: Path):
        """Left out where that is asked for, and drawn at random."""
        tensors = load_file(loaded.directory / "model.safetensors")
        key = max(key for key in tensors if tensors[key].ndim == 2 and tensors[key].shape[0] > 1)
        tensors[key] = tensors[key][1:].copy()
        loaded.model.config.save_pretrained(tmp_path)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=re.escape(key)):
            case.ours.from_pretrained(tmp_path)
        model, info = case.ours.from_pretrained(tmp_path, ignore_mismatched_sizes=True, output_loading_info=True)
        assert [found for found, *_ in info["mismatched_keys"]] == [key]
        assert jax.tree.map(jnp.shape, model.params) == jax.tree.map(jnp.shape, loaded.model.params)
        assert all(np.isfinite(np.asarray(leaf)).all() for leaf in loaded.outputs(model).values())

    def test_shards(self, case: Case, loaded: Loaded, tmp_path: Path):
        for to_pt in (True, False):
            folder = tmp_path / str(to_pt)
            loaded.model.save_pretrained(folder, to_pt=to_pt, max_shard_size="10KB")
            index = next(folder.glob("*.safetensors.index.json"))
            assert len({*json.loads(index.read_text())["weight_map"].values()}) > 1
            assert_same_params(case.ours.from_pretrained(folder).params, loaded.model.params)

    # Base and head

    def test_base_takes_its_weights_from_a_file_with_head(self, base: Loaded, head: Loaded, tmp_path: Path):
        prefix = type(base.model).base_model_prefix
        for to_pt in (True, False):
            head.model.save_pretrained(tmp_path / str(to_pt), to_pt=to_pt)
            model = type(base.model).from_pretrained(tmp_path / str(to_pt))
            assert_same_params(model.params, head.model.params[prefix])

    def test_head_takes_a_base_file(self, base: Loaded, head: Loaded, tmp_path: Path):
        prefix = type(base.model).base_model_prefix
        for to_pt in (True, False):
            base.model.save_pretrained(tmp_path / str(to_pt), to_pt=to_pt)
            model, info = type(head.model).from_pretrained(tmp_path / str(to_pt), output_loading_info=True)
            assert_same_params(model.params[prefix], base.model.params)
            assert info["missing_keys"] and all(not path.startswith(f"{prefix}/") for path in info["missing_keys"])
