"""Every language model against upstream's with the same weights, which went through real files."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.configs import LLAMAS, tiny_llama_config
from tests.models.llama.pairs import draw_batch, pair_of, tiny_pair
from tests.torch_oracle import Pair, assert_close

LENGTH = 12


@pytest.fixture(scope="module", params=LLAMAS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return tiny_pair(request.param, tmp_path_factory.mktemp(request.param))


def assert_same_outputs(pair: Pair, ids: np.ndarray, tol: float) -> None:
    """Logits, loss, hidden states and attentions of a call without padding."""
    labels = np.where(np.arange(ids.shape[1]) % 5 == 3, -100, ids)
    asked = {"output_hidden_states": True, "output_attentions": True}
    tensors = {"input_ids": torch.tensor(ids).long(), "labels": torch.tensor(labels).long()}
    theirs = pair.upstream(**tensors, **asked)
    # one program is compiled sooner than all operations of these shapes
    ours = jax.jit(lambda ids, labels: pair.ours(ids, labels=labels, **asked))(ids, labels)
    for name in ("logits", "hidden_states", "attentions", "loss"):
        assert_close(ours[name], theirs[name], tol, name)


def test_equals_upstream(pair: Pair):
    """Sliding windows are shorter than the text."""
    assert_same_outputs(pair, draw_batch(pair.ours.config.vocab_size, (LENGTH, LENGTH)).ids, 1e-5)


def logits_of(pair: Pair, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(lambda ids, mask: pair.ours(ids, mask).logits)(ids, mask))


def test_padded_and_cached(pair: Pair):
    """Rows with padding before them, at once and step by step."""
    batch = draw_batch(pair.ours.config.vocab_size, (LENGTH, 7, 9))
    at_once = logits_of(pair, batch.ids, batch.mask)
    theirs = pair.upstream(**batch.for_torch).logits.numpy()
    assert_close(at_once[batch.counts], theirs[batch.counts], 1e-5)
    step = jax.jit(lambda ids, mask, cache: pair.ours(ids, mask, cache=cache))
    cache, pieces = pair.ours.init_cache(3, LENGTH + 2), []
    for begin, end in ((0, 9), *((at, at + 1) for at in range(9, LENGTH))):
        outputs = step(batch.ids[:, begin:end], batch.mask[:, begin:end], cache)
        cache = outputs.cache
        pieces.append(outputs.logits)
    assert_close(np.concatenate(pieces, axis=1)[batch.counts], theirs[batch.counts], 1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_padded_row_is_the_row_alone(model_type: str, tmp_path):
    pair = tiny_pair(model_type, tmp_path)
    batch = draw_batch(99, (LENGTH, 7))
    alone = logits_of(pair, batch.ids[1:, -7:], batch.mask[1:, -7:])
    assert_close(logits_of(pair, batch.ids, batch.mask)[1, -7:], alone[0], 1e-5)


@pytest.mark.parametrize("model_type", LLAMAS)
def test_equals_upstream_in_double(model_type: str, x64: None, tmp_path):
    """The odd hidden size shows where upstream's constants are rounded."""
    pair = tiny_pair(model_type, tmp_path, "float64", num_hidden_layers=2, layer_types=None)
    assert_same_outputs(pair, draw_batch(99, (8,)).ids, 1e-10)


@st.composite
def configs(draw: st.DrawFn) -> Any:
    """What all models have, and what only some have."""
    model_type = draw(st.sampled_from(LLAMAS))
    heads = draw(st.sampled_from((1, 2, 6)))
    head_dim = draw(st.sampled_from((4, 10)))
    fields = {
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([n for n in (1, 2, 3, 6) if heads % n == 0])),
        "hidden_size": heads * head_dim,
        "intermediate_size": draw(st.sampled_from((3, 50))),
        "num_hidden_layers": draw(st.sampled_from((1, 2))),
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from((1e-6, 1e-2))),
        "initializer_range": 0.5,
    }
    if model_type == "qwen2":
        fields |= {"max_window_layers": draw(st.sampled_from((0, 1)))}
    else:
        fields |= {"head_dim": head_dim if model_type == "helium" else draw(st.sampled_from((head_dim, 6)))}
    if model_type in ("llama", "qwen3", "gemma2", "gemma3_text", "helium"):
        fields |= {"attention_bias": draw(st.booleans())}
    if model_type in ("llama", "helium"):
        fields |= {"mlp_bias": draw(st.booleans())}
    if model_type.startswith("gemma"):
        fields |= {"layer_types": None, "query_pre_attn_scalar": draw(st.sampled_from((1, 7)))}
        fields |= {"final_logit_softcapping": draw(st.sampled_from((None, 3.0)))}
    else:
        fields |= {"hidden_act": draw(st.sampled_from(("silu", "gelu", "relu")))}
    if model_type == "mistral":
        fields |= {"sliding_window": draw(st.sampled_from((None, 1, 4)))}
    return tiny_llama_config(model_type, **fields)


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(config=configs(), seed=st.integers(0, 9))
def test_drawn_configurations(tmp_path_factory: pytest.TempPathFactory, config: Any, seed: int):
    pair = pair_of(config, tmp_path_factory.mktemp("drawn"), seed=seed)
    assert_same_outputs(pair, draw_batch(config.vocab_size, (9, 9), seed).ids, 1e-5)


def test_gradients(tmp_path):
    """Of all parameters, also of a table that is embeddings and head at once."""
    pair = tiny_pair("gemma3_text", tmp_path)
    ids = draw_batch(99, (9, 9)).ids
    tensor = torch.tensor(ids).long()
    pair.theirs(input_ids=tensor, labels=tensor).loss.backward()
    gradients = jax.jit(jax.grad(lambda params: pair.ours(ids, labels=ids, params=params).loss))(pair.ours.params)
    theirs = dict(pair.theirs.named_parameters())
    table = gradients["model"]["embed_tokens"]["embedding"]
    assert_close(table, theirs["model.embed_tokens.weight"].grad, 1e-5)
    layer = gradients["model"]["layers"]["1"]
    names = ("self_attn.q_proj", "self_attn.k_norm", "mlp.down_proj", "post_feedforward_layernorm")
    for name in names:
        leaf = layer
        for part in name.split("."):
            leaf = leaf[part]
        grad = theirs[f"model.layers.1.{name}.weight"].grad
        assert_close(*((leaf["kernel"], grad.T) if "kernel" in leaf else (leaf["scale"], grad)), 1e-5, name)


def test_bfloat16_stays_close(tmp_path):
    pair = tiny_pair("qwen3", tmp_path)
    ids = draw_batch(99, (9,)).ids
    exact = np.asarray(pair.ours(ids).logits)
    half = type(pair.ours).from_pretrained(pair.directory, dtype=jnp.bfloat16)
    logits = half(ids).logits
    assert logits.dtype == jnp.bfloat16
    assert_close(np.asarray(logits, np.float32), exact, 0.05)
