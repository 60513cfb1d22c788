"""Loss and gradients by an adapter's leaves, with PEFT on upstream's PyTorch model as the oracle."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import MoshiForConditionalGeneration

from tests.configs import tiny_moshi_config
from tests.models.moshi.test_losses import draw, upstream_losses
from tests.torch_oracle import Pair, assert_close, double_oracle, make_pair, numpy
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration, LoraConfig, QuantizationConfig
from transformers_moshi_flax.adapters.files import PREFIX, adapter_tensors
from transformers_moshi_flax.adapters.lora import Adapter

peft = pytest.importorskip("peft", reason="PEFT, the oracle, is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    # PEFT asks transformers by a name that it is about to drop
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TOLERANCE = {"float32": 1e-5, "float64": 1e-8}

CONFIG = LoraConfig(
    r=3,
    lora_alpha=5,
    # all linear layers but Mimi's: the heads, and what is one a codebook
    target_modules=r"(decoder|depth_decoder)\..*",
    rank_pattern={"fc1": 2, "fc2.weight": 4},
    alpha_pattern={"q_proj.linear": 7},
    modules_to_save=["decoder.model.embed_tokens"],
    init_lora_weights=False,
)


@pytest.fixture(scope="module", params=TOLERANCE)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Both models with the same adapter, theirs as PEFT trains it."""
    folder: Path = tmp_path_factory.mktemp("gradients")
    with jax.enable_x64(request.param == "float64"):
        pair = make_pair(
            MoshiForConditionalGeneration,
            FlaxMoshiForConditionalGeneration,
            tiny_moshi_config(),
            folder / "base",
            dtype=request.param,
            seed=2,
        )
        pair.ours.add_adapter(CONFIG)
        leaves = pair.ours.adapter_leaves()
        pair.ours.set_adapter_leaves({path: jnp.asarray(leaf, request.param) for path, leaf in leaves.items()})
        pair.ours.save_adapter(folder / "adapter")
        theirs = peft.PeftModel.from_pretrained(pair.theirs, str(folder / "adapter"), is_trainable=True).eval()
        yield Pair(theirs, pair.ours, folder, request.param)


@pytest.fixture(scope="module", params=["int8", "int4", "nf4"])
def quantized_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The same adapter beside our quantized weights, and beside theirs that are the floats these stand for."""
    folder: Path = tmp_path_factory.mktemp("quantized")
    ours = make_pair(
        MoshiForConditionalGeneration, FlaxMoshiForConditionalGeneration, tiny_moshi_config(), folder / "base", seed=2
    ).ours
    ours.quantize(QuantizationConfig(request.param, group_size=4))
    ours.add_adapter(dataclasses.replace(CONFIG))
    ours.save_adapter(folder / "adapter")
    ours.save_pretrained(folder / "codes")
    plain = FlaxMoshiForConditionalGeneration.from_pretrained(folder / "codes").dequantize()
    plain.save_pretrained(folder / "floats", to_pt=True)
    theirs = MoshiForConditionalGeneration.from_pretrained(folder / "floats", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(theirs, str(folder / "adapter"), is_trainable=True).eval()
    return Pair(theirs, ours, folder, "float32")


def test_beside_quantized_weights_they_are_pefts(quantized_pair: Pair) -> None:
    test_loss_and_gradients_are_pefts(quantized_pair)


def test_loss_and_gradients_are_pefts(pair: Pair) -> None:
    inputs, tol = draw(ignored=True, masked=True), TOLERANCE[pair.dtype]
    pair.theirs.zero_grad()
    if pair.dtype == "float64":
        with double_oracle():
            their_loss = sum(upstream_losses(pair.theirs, inputs)[:2])
            their_loss.backward()
    else:
        their_loss = sum(upstream_losses(pair.theirs, inputs)[:2])
        their_loss.backward()
    trained = {name: weight.grad for name, weight in pair.theirs.named_parameters() if weight.requires_grad}
    theirs = {name.replace(".modules_to_save", "").replace(".default", ""): grad for name, grad in trained.items()}

    def loss_of(leaves: dict[str, jax.Array], inputs: dict[str, jax.Array]) -> jax.Array:
        return pair.ours.module.apply({"params": pair.ours.with_adapter_leaves(leaves)}, **inputs).loss

    leaves = pair.ours.adapter_leaves()
    loss, gradients = jax.jit(jax.value_and_grad(loss_of))(leaves, inputs)
    assert_close(loss, their_loss, tol, "loss")
    layers = pair.ours._one_adapter(None).layers
    ours = adapter_tensors(Adapter(CONFIG, layers, gradients), pair.ours.checkpoint_rules)
    assert ours.keys() == theirs.keys()
    # two matrices of each linear layer but Mimi's, and the table
    assert len(ours) == 2 * (13 + 14) + 1 and f"{PREFIX}depth_decoder.lm_heads.lora_A.weight" in ours
    for key, gradient in theirs.items():
        assert np.any(numpy(gradient)), key
        assert_close(ours[key], gradient, tol, key)
