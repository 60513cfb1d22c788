"""Models with adapters: what they add, switching, merging, rows of their own, and generation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.configs import tiny_moshi_config
from tests.dialogues import spoken_codes
from tests.torch_oracle import assert_close
from transformers_moshi_flax import FlaxMoshiForCausalLM, FlaxMoshiForConditionalGeneration, LoraConfig
from transformers_moshi_flax.models.moshi.layers_flax_moshi import FlaxMoshiFlexibleLinear

Model = FlaxMoshiForConditionalGeneration
FRAMES = 5


def drawn(seed: int = 0, **fields: Any) -> LoraConfig:
    """An adapter that changes something."""
    return LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "init_lora_weights": False, **fields}
    )


@pytest.fixture(scope="module")
def base() -> Model:
    model = Model(tiny_moshi_config(), seed=1)
    # upstream draws the layers of single codebooks with a deviation of 1, which makes much of a rounding error
    flat = flatten_dict(model.params["depth_decoder"])
    scaled = {path: leaf / leaf.shape[0] ** 0.5 if path[-1] == "kernel" else leaf for path, leaf in flat.items()}
    model.params = {**model.params, "depth_decoder": unflatten_dict(scaled)}
    return model


@pytest.fixture
def model(base: Model) -> Model:
    """Without adapters, with parameters of the module's model; its compiled programs are kept."""
    for name in ("_adapters", "_active", "_adapted", "_before_merge"):
        vars(base).pop(name, None)
    base._adapters_enabled = True
    return base


def inputs(model: Model, rows: int = 2) -> dict[str, np.ndarray]:
    rng, config = np.random.default_rng(0), model.config
    codes = rng.integers(0, config.audio_vocab_size, (2, rows, config.num_codebooks, FRAMES)).astype(np.int32)
    ids = rng.integers(0, config.vocab_size, (rows, FRAMES)).astype(np.int32)
    labels = {"text_labels": ids, "audio_labels": codes[1]}
    return {"input_ids": ids, "user_audio_codes": codes[0], "moshi_audio_codes": codes[1], **labels}


def outputs(model: Model, **more: Any) -> tuple[np.ndarray, np.ndarray]:
    found = model(**inputs(model), **more)
    return np.asarray(found.logits), np.asarray(found.audio_logits)


def same(ours: tuple[np.ndarray, ...], theirs: tuple[np.ndarray, ...]) -> bool:
    return all(map(np.array_equal, ours, theirs))


def test_a_new_adapter_changes_nothing(model: Model) -> None:
    before = outputs(model)
    model.add_adapter(LoraConfig(target_modules="all-linear"))
    assert same(outputs(model), before)
    assert model.active_adapters() == ["default"]


@pytest.mark.parametrize("rank", [1, 4])
def test_what_it_adds(model: Model, rank: int) -> None:
    """The model with kernels ``W + scaling A B``, by NumPy."""
    model.add_adapter(drawn(r=rank), "a", seed=2)
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(model.params, sep="/").items()}
    leaves = {path: np.asarray(leaf) for path, leaf in model.adapter_leaves().items()}
    for path in [path for path in leaves if path.endswith("/lora_A")]:
        layer = path.removesuffix("/lora_A")
        delta = leaves[path].astype(np.float64) @ leaves[f"{layer}/lora_B"].astype(np.float64)
        flat[f"{layer}/kernel"] = (flat[f"{layer}/kernel"] + 5 / rank * delta).astype(np.float32)
    expected = outputs(model, params=unflatten_dict(flat, sep="/"))
    found = outputs(model)
    for ours, theirs in zip(found, expected):
        assert_close(ours, theirs, 1e-5)
    assert not same(found, outputs(model, params=model.params))


def test_switching(model: Model) -> None:
    plain = outputs(model)
    model.add_adapter(drawn(), "a", seed=2)
    first = outputs(model)
    model.add_adapter(drawn(r=2, target_modules=["fc1", "fc2"], exclude_modules=r"audio_encoder\..*"), "b", seed=3)
    second = outputs(model)
    assert not same(first, second)
    model.set_adapter("a")
    assert same(outputs(model), first)
    model.set_adapter(["a", "b"])
    both = outputs(model)
    merged = model.adapted_params()
    assert same(outputs(model, params=merged), both) and not same(both, first)
    model.disable_adapters()
    assert same(outputs(model), plain) and model.active_adapters() == []
    model.enable_adapters()
    assert same(outputs(model), both)
    model.delete_adapter("a")
    assert model.active_adapters() == ["b"] and list(model.peft_config) == ["b"]
    assert same(outputs(model), second)
    model.delete_adapter("b")
    assert same(outputs(model), plain)
    with pytest.raises(ValueError, match="the model has no adapter"):
        model.active_adapters()


def test_several_add_up(model: Model) -> None:
    model.add_adapter(drawn(), "a", seed=2)
    model.add_adapter(drawn(r=2, scaling=0.3), "b", seed=3)
    model.set_adapter(["a", "b"])
    together = outputs(model)
    model.merge_adapter(["a", "b"])
    for ours, theirs in zip(outputs(model), together):
        assert_close(ours, theirs, 1e-5)
    model.unmerge_adapter()


def test_merged_equals_unmerged_and_comes_apart_to_the_bit(model: Model) -> None:
    before = jax.tree.map(np.asarray, model.params)
    model.add_adapter(drawn(modules_to_save=["decoder.lm_head"]), seed=2)
    leaves = model.adapter_leaves()
    model.set_adapter_leaves({**leaves, "decoder/lm_head/kernel": leaves["decoder/lm_head/kernel"] * 2})
    expected = outputs(model)
    model.merge_adapter()
    for ours, theirs in zip(outputs(model), expected):
        assert_close(ours, theirs, 1e-5)
    for call in (model.merge_adapter, lambda: model.add_adapter(drawn(), "c"), lambda: model.set_adapter("default")):
        with pytest.raises(ValueError, match="unmerge_adapter first"):
            call()
    model.unmerge_adapter()
    jax.tree.map(np.testing.assert_array_equal, before, model.params)
    assert same(outputs(model), expected)


def test_an_adapter_for_each_row(model: Model) -> None:
    plain = outputs(model)
    model.add_adapter(drawn(), "a", seed=2)
    first = outputs(model)
    model.add_adapter(drawn(r=2, target_modules=["fc1"], exclude_modules=r"audio_encoder\..*"), "b", seed=3)
    second = outputs(model)
    for names, parts in (
        (["a", "b"], (first, second)),
        (["b", None], (second, plain)),
        (["__base__", "a"], (plain, first)),
    ):
        found = outputs(model, params=model.adapted_params(adapter_names=names))
        for row, (logits, audio_logits) in enumerate(parts):
            assert_close(found[0][row], logits[row], 1e-5, f"{names}")
            assert_close(found[1][row], audio_logits[row], 1e-5, f"{names}")
    assert model.adapted_params(adapter_names=[None, None]) is model.params
    model.add_adapter(drawn(modules_to_save=["decoder.lm_head"]), "c")
    with pytest.raises(ValueError, match="`modules_to_save`"):
        model.adapted_params(adapter_names=["a", "c"])


def greedy(model: Model, **more: Any) -> np.ndarray:
    prompt = {name: array for name, array in inputs(model).items() if "labels" not in name}
    options = {"max_new_tokens": 6, "do_sample": False, "return_audio_waveforms": False, "return_audio_codes": True}
    found = model.generate(**prompt, **options, **more)
    return np.concatenate([np.asarray(found.sequences).ravel(), np.asarray(found.audio_codes).ravel()])


def test_generation(model: Model) -> None:
    """What is generated with an adapter is what the merged model generates, in each row with its own."""
    plain = greedy(model)
    model.add_adapter(drawn(), "a", seed=2)
    found = greedy(model)
    model.merge_adapter()
    np.testing.assert_array_equal(greedy(model), found)
    assert not np.array_equal(found, plain)
    model.unmerge_adapter()
    rows = greedy(model, params=model.adapted_params(adapter_names=["a", None]))
    sequences = rows[: 2 * (FRAMES + 1 + 6)].reshape(2, -1)
    np.testing.assert_array_equal(sequences[0], found[: sequences.size].reshape(2, -1)[0])
    np.testing.assert_array_equal(sequences[1], plain[: sequences.size].reshape(2, -1)[1])


def test_beams_have_the_adapter_of_their_row(model: Model) -> None:
    ids = inputs(model)["input_ids"]
    model.add_adapter(drawn(), "a", seed=2)

    def beams(**more: Any) -> np.ndarray:
        return np.asarray(
            model.decoder.generate(ids, max_new_tokens=5, num_beams=3, do_sample=False, **more).sequences
        )

    adapted = beams()
    model.disable_adapters()
    plain = beams()
    assert not np.array_equal(adapted[0], plain[0]) and not np.array_equal(adapted[1], plain[1])
    for names, expected in ((["a", None], (adapted[0], plain[1])), ([None, "a"], (plain[0], adapted[1]))):
        rows = beams(params=model.adapted_params(adapter_names=names)["decoder"])
        for found, alone in zip(rows, expected):
            np.testing.assert_array_equal(found, alone)


def test_another_number_of_rows_is_refused(model: Model) -> None:
    """Four rows would else be taken for two rows of two beams each."""
    model.add_adapter(drawn(), "a", seed=2)
    params = model.adapted_params(adapter_names=["a", None])
    four = {name: np.tile(array, (2,) + (1,) * (array.ndim - 1)) for name, array in inputs(model).items()}
    prompt = {name: array for name, array in four.items() if "labels" not in name}
    calls = (
        lambda: model(**four, params=params),
        lambda: model.generate(**prompt, max_new_tokens=2, params=params),
        lambda: model.streaming(4, params=params),
        lambda: model.decoder.generate(four["input_ids"], max_new_tokens=2, params=params["decoder"]),
        lambda: model.depth_decoder(
            np.zeros((4, 2), np.int32), np.zeros((4, 1, 64), np.float32), params=params["depth_decoder"]
        ),
    )
    for call in calls:
        with pytest.raises(ValueError, match="an adapter for each of 2 rows, but there are 4"):
            call()


def test_mimis_layers_cannot_be_one_rows_alone(model: Model) -> None:
    model.add_adapter(drawn(target_modules=["audio_encoder.encoder_transformer.layers.0.mlp.fc1"]), "a")
    with pytest.raises(ValueError, match="an adapter of an audio encoder's layers"):
        model.adapted_params(adapter_names=["a", None])


@pytest.mark.parametrize("several", [False, True])
def test_codebooks_that_are_known_when_it_runs(several: bool) -> None:
    """A traced index takes the adapter of its codebook, as one that is known before does."""
    layer = FlaxMoshiFlexibleLinear(6, 5, 3)
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.standard_normal((2, 3, 6)), jnp.float32)

    def leaf(*shape: int) -> jax.Array:
        return jnp.asarray(draw.standard_normal(shape), jnp.float32)

    numbers = (2,) if several else ()
    params = {
        str(index): {
            "kernel": leaf(6, 5),
            "lora_A": leaf(*numbers, 6, 2),
            "lora_B": leaf(*numbers, 2, 5),
            "lora_scaling": leaf(*numbers),
            **({"lora_rows": jnp.array([1, 0], jnp.int32)} if several else {}),
        }
        for index in range(3)
    }
    for chosen in ((0, 1, 2), (2, 0, 1), (1, 1, 1)):
        known = layer.apply({"params": params}, x, chosen)
        traced = jax.jit(lambda indices: layer.apply({"params": params}, x, indices))(jnp.array(chosen))
        assert_close(traced, known, 1e-5)


def test_a_switch_compiles_nothing(model: Model, count_compilations: Callable[[], int]) -> None:
    model.add_adapter(drawn(), "a", seed=2)
    model.add_adapter(drawn(), "b", seed=3)
    first = greedy(model)
    count_compilations()
    model.set_adapter("a")
    assert not np.array_equal(greedy(model), first)
    assert count_compilations() == 0


def test_streams(model: Model) -> None:
    model.add_adapter(drawn(), "a", seed=2)
    adapted = spoken_codes(model)
    model.merge_adapter()
    np.testing.assert_array_equal(spoken_codes(model), adapted)
    model.unmerge_adapter()
    model.disable_adapters()
    assert not np.array_equal(spoken_codes(model), adapted)


def test_parts_have_those_of_the_whole(model: Model) -> None:
    ids = np.array([[1, 2, 3]])
    plain = model.decoder(ids).logits
    model.add_adapter(drawn(), "a", seed=2)
    adapted = model.decoder(ids).logits
    assert not np.array_equal(plain, adapted)
    model.merge_adapter()
    assert_close(model.decoder(ids).logits, adapted, 1e-5)
    model.unmerge_adapter()


def test_a_model_of_text_alone() -> None:
    model = FlaxMoshiForCausalLM(tiny_moshi_config(), seed=2)
    ids = np.array([[1, 2, 3]])
    plain = model(ids).logits
    model.add_adapter(drawn())
    assert not np.array_equal(model(ids).logits, plain)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).sequences.shape == (1, 6)


def test_what_is_trained_is_counted(model: Model, capsys: pytest.CaptureFixture) -> None:
    total = model.num_parameters()
    assert model.num_parameters(only_trainable=True) == total
    model.add_adapter(drawn(r=2, target_modules=["decoder.lm_head"]))
    assert model.num_parameters(only_trainable=True) == 2 * (64 + 60) and model.num_parameters() == total
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: 248 || all params: {total + 248:,} || trainable%: ")


def test_dropout_needs_the_random_numbers_of_training(model: Model) -> None:
    plain = outputs(model)[0]
    model.add_adapter(drawn(lora_dropout=0.5, target_modules=["decoder.lm_head"]), seed=2)
    expected = outputs(model)[0]
    arguments = {name: jnp.asarray(array) for name, array in inputs(model).items()}
    call = jax.jit(lambda params, rngs: model.module.apply({"params": params}, **arguments, rngs=rngs).logits)

    def logits(rngs: Any) -> np.ndarray:
        return np.asarray(call(model.adapted_params(), rngs))

    assert_close(logits({}), expected, 1e-5)
    draws = [logits({"lora_dropout": jax.random.key(seed)}) for seed in range(400)]
    assert not np.array_equal(draws[0], draws[1])
    # what the adapter adds to the logits is their mean
    assert np.abs(np.mean(draws, axis=0) - expected).max() < 0.25 * np.abs(expected - plain).max()
    assert np.abs(draws[0] - expected).max() > 0.25 * np.abs(expected - plain).max()


def test_calls_that_train_drop_inputs_of_adapters(model: Model) -> None:
    model.add_adapter(drawn(lora_dropout=0.5), seed=2)
    key = jax.random.key(0)
    plain, trained = outputs(model, dropout_rng=key), outputs(model, dropout_rng=key, train=True)
    ids = np.array([[1, 2, 3]])
    parts = [np.asarray(model.decoder(ids, train=train, dropout_rng=key).logits) for train in (False, True)]
    assert same(plain, outputs(model))
    # far more than rounding
    assert min(np.abs(one - other).max() for one, other in (*zip(plain, trained), parts)) > 0.01
    for part in (model, model.decoder):
        given = inputs(model) if part is model else {"input_ids": ids}
        with pytest.raises(ValueError, match="`lora_dropout` > 0 needs `dropout_rng`"):
            part(**given, train=True)
    model.disable_adapters()
    outputs(model, train=True)


def test_gradients_are_those_of_the_kernels(model: Model) -> None:
    """By the chain rule: of ``W + s A B`` the gradient by A is ``s G Bᵀ``, that by B ``s Aᵀ G``."""
    model.add_adapter(
        drawn(target_modules=["decoder.model.layers.1.mlp.fc1", "depth_decoder.layers.0.mlp.fc2"]), seed=2
    )
    arguments = {name: jnp.asarray(array) for name, array in inputs(model).items()}

    def loss(params: Any) -> jax.Array:
        return model.module.apply({"params": params}, **arguments).loss

    leaves = model.adapter_leaves()
    found = jax.jit(jax.grad(lambda leaves: loss(model.with_adapter_leaves(leaves))))(leaves)
    assert found.keys() == leaves.keys() and len(found) == 2 * (1 + 4)
    by_kernel = flatten_dict(jax.jit(jax.grad(loss))(model.adapted_params()), sep="/")
    for path in [path for path in leaves if path.endswith("lora_A")]:
        layer = path.removesuffix("/lora_A")
        a, b, g = leaves[path], leaves[f"{layer}/lora_B"], by_kernel[f"{layer}/kernel"]
        assert_close(found[path], 5 / 3 * g @ b.T, 1e-5, path)
        assert_close(found[f"{layer}/lora_B"], 5 / 3 * a.T @ g, 1e-5, path)


def test_copies_and_pickles_have_them(model: Model) -> None:
    model.add_adapter(drawn(), "a", seed=2)
    expected = outputs(model)
    for other in (copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert other.active_adapters() == ["a"]
        assert same(outputs(other), expected)


def test_other_leaves(model: Model) -> None:
    model.add_adapter(LoraConfig(target_modules=["decoder.lm_head"]))
    leaves = model.adapter_leaves()
    with pytest.raises(ValueError, match="missing, too many, or of another shape"):
        model.set_adapter_leaves({})
    model.set_adapter_leaves(jax.tree.map(jnp.ones_like, leaves))
    assert (np.asarray(model.adapter_leaves()["decoder/lm_head/lora_B"]) == 1).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.add_adapter(drawn(), "a"), "'a' is taken or reserved"),
        (lambda model: model.add_adapter(drawn(), "__base__"), "is taken or reserved"),
        (lambda model: model.add_adapter({"r": 3}, "b"), "must be a LoraConfig, but is dict"),
        (lambda model: model.set_adapter("aa"), "there is no adapter 'aa'; did you mean 'a'"),
        (lambda model: model.delete_adapter(["a", "zebra"]), "there is no adapter 'zebra'"),
        (lambda model: model.adapted_params(adapter_names=["a", "x"]), "there is no adapter 'x'"),
        (lambda model: model.unmerge_adapter(), "no adapter is merged"),
    ],
)
def test_mistakes(model: Model, unchecked_types: None, call: Callable[[Model], Any], message: str) -> None:
    model.add_adapter(drawn(), "a")
    with pytest.raises(ValueError, match=message):
        call(model)
    assert model.active_adapters() == ["a"]


def test_saving_the_model_saves_it_without(model: Model, tmp_path: Path) -> None:
    plain = outputs(model)
    model.add_adapter(drawn(), "a", seed=2)
    model.save_pretrained(tmp_path)
    assert same(outputs(Model.from_pretrained(tmp_path)), plain)
