"""Losses and their gradients against an independent construction from upstream's modules, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import MoshiForConditionalGeneration

from tests.configs import tiny_moshi_config
from tests.models.moshi.next_frames import depth_inputs, frame_pairs, next_labels, upstream_logits
from tests.torch_oracle import Pair, assert_close, block_params, double_oracle, make_pair, numpy
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration

BATCH, FRAMES, CODEBOOKS, AUDIO_VOCAB, TEXT_VOCAB = 2, 6, 4, 32, 60


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with jax.enable_x64(True):
        yield make_pair(
            MoshiForConditionalGeneration,
            FlaxMoshiForConditionalGeneration,
            tiny_moshi_config(),
            tmp_path_factory.mktemp("losses"),
            dtype="float64",
            seed=2,
        )


def draw(ignored: bool = False, masked: bool = False) -> dict[str, np.ndarray]:
    """Inputs with labels; ``ignored`` puts -100 among the labels, ``masked`` pads one row left and one right."""
    rng = np.random.default_rng(3)
    codes = (BATCH, CODEBOOKS, FRAMES)
    inputs = {
        "input_ids": rng.integers(0, TEXT_VOCAB, (BATCH, FRAMES)).astype(np.int32),
        "user_audio_codes": rng.integers(0, AUDIO_VOCAB, codes).astype(np.int32),
        "moshi_audio_codes": rng.integers(0, AUDIO_VOCAB, codes).astype(np.int32),
        "text_labels": rng.integers(0, TEXT_VOCAB, (BATCH, FRAMES)).astype(np.int32),
        "audio_labels": rng.integers(0, AUDIO_VOCAB, codes).astype(np.int32),
    }
    # A code that is padding is an input like any other, but no label.
    inputs["audio_labels"][1, 2, 3] = AUDIO_VOCAB
    if ignored:
        inputs["text_labels"][0, 2] = inputs["text_labels"][1, 4] = -100
        inputs["audio_labels"][0, 0, 3] = inputs["audio_labels"][0, 2, 1] = inputs["audio_labels"][1, :, 4] = -100
    if masked:
        inputs["attention_mask"] = np.ones((BATCH, FRAMES), np.int32)
        inputs["attention_mask"][0, :2] = 0
        inputs["attention_mask"][1, -1:] = 0
    return inputs


def upstream_losses(model: Any, inputs: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Text loss, depth loss and audio logits ``(pairs, codebooks, vocabulary)``, with gradients."""
    logits, audio_logits = upstream_logits(model, inputs)
    text, audio = next_labels(inputs, AUDIO_VOCAB)
    text_loss = functional.cross_entropy(logits, text, ignore_index=-100)
    depth_loss = functional.cross_entropy(audio_logits.flatten(0, 1), audio.flatten(), ignore_index=-100)
    return text_loss, depth_loss, audio_logits


VARIANTS = {
    "plain": {},
    "ignored": {"ignored": True},
    "masked": {"masked": True},
    "both": {"ignored": True, "masked": True},
}


@pytest.fixture(scope="module", params=VARIANTS)
def inputs(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    return draw(**VARIANTS[request.param])


def test_losses_and_logits(pair: Pair, inputs: dict[str, np.ndarray]) -> None:
    with torch.no_grad(), double_oracle():
        text_loss, depth_loss, audio_logits = upstream_losses(pair.theirs, inputs)
    actual = pair.ours(**inputs)
    assert_close(actual.text_loss, text_loss, 1e-10, "text_loss")
    assert_close(actual.depth_loss, depth_loss, 1e-10, "depth_loss")
    assert_close(actual.loss, text_loss + depth_loss, 1e-10, "loss")
    assert actual.audio_logits.shape == (BATCH, FRAMES - 1, CODEBOOKS, AUDIO_VOCAB)
    rows, frames = np.array(frame_pairs(inputs)).T
    assert_close(actual.audio_logits[rows, frames], audio_logits, 1e-10, "audio_logits")


def test_text_loss_is_upstreams(pair: Pair) -> None:
    """The one loss that upstream computes right, with its own code."""
    inputs = draw(ignored=True)
    labels = inputs.pop("text_labels")
    del inputs["audio_labels"]
    expected = pair.upstream(
        **{name: torch.from_numpy(value).long() for name, value in inputs.items()},
        text_labels=torch.from_numpy(labels).long(),
    )
    actual = pair.ours(**inputs, text_labels=labels)
    assert_close(actual.loss, expected.loss, 1e-10)
    assert_close(actual.text_loss, expected.loss, 1e-10)
    assert actual.depth_loss is None and actual.audio_logits is None


def test_depth_decoder_on_ids_gives_the_same(pair: Pair) -> None:
    """The oracle above embeds by hand, for -100; without it, it must equal upstream's call with plain ids."""
    inputs = draw()
    tokens, (_, labels) = depth_inputs(inputs), next_labels(inputs, AUDIO_VOCAB)
    forward = {name: torch.from_numpy(value).long() for name, value in inputs.items() if "labels" not in name}
    with torch.no_grad(), double_oracle():
        hidden = pair.theirs(**forward).last_hidden_state
        direct = pair.theirs.depth_decoder(
            input_ids=tokens,
            last_hidden_state=torch.stack([hidden[row, t] for row, t in frame_pairs(inputs)])[:, None],
            attention_mask=torch.ones_like(tokens),
            labels=labels,
        )
    assert_close(pair.ours(**inputs).depth_loss, direct.loss, 1e-10)


def check_gradients(ours: dict[str, Any], model: Any, parts: tuple[str, ...]) -> None:
    """Every leaf of the named parts within 1e-8 of its own scale; what autograd never reached must be zero."""
    theirs = block_params(model, lambda weight: torch.zeros_like(weight) if weight.grad is None else weight.grad)
    for part in parts:
        our_leaves = dict(jax.tree_util.tree_leaves_with_path(ours[part]))
        their_leaves = dict(jax.tree_util.tree_leaves_with_path(theirs[part]))
        assert our_leaves.keys() == their_leaves.keys()
        for path, gradient in their_leaves.items():
            where = part + jax.tree_util.keystr(path)
            if not np.any(numpy(gradient)):
                assert not np.any(numpy(our_leaves[path])), where
            else:
                assert_close(our_leaves[path], gradient, 1e-8, where)


def test_gradients(pair: Pair, inputs: dict[str, np.ndarray]) -> None:
    """Of both losses with respect to every weight that they can reach; ``loss`` is their sum (above)."""
    parts = ("embed_tokens", "decoder", "depth_decoder")
    trainable = {part: pair.ours.params[part] for part in parts}

    @jax.jit
    def gradients(trainable: dict[str, Any]) -> dict[str, Any]:
        def both(trainable: dict[str, Any]) -> jax.Array:
            outputs = pair.ours(**inputs, params={**pair.ours.params, **trainable}, train=True)
            return jnp.stack([outputs.text_loss, outputs.depth_loss])

        return jax.jacrev(both)(trainable)

    ours = gradients(trainable)
    with double_oracle():
        *losses, _ = upstream_losses(pair.theirs, inputs)
        for index, loss in enumerate(losses):
            pair.theirs.zero_grad()
            loss.backward(retain_graph=True)
            check_gradients(jax.tree.map(lambda leaf, index=index: leaf[index], ours), pair.theirs, parts)
    reached = [any(bool(jnp.any(leaf[i])) for leaf in jax.tree.leaves(ours["depth_decoder"])) for i in (0, 1)]
    assert reached == [False, True]


def test_gradient_checkpointing_changes_nothing(pair: Pair) -> None:
    inputs = draw(ignored=True, masked=True)

    def gradients() -> dict[str, Any]:
        decoder = pair.ours.params["decoder"]
        return jax.jit(
            jax.grad(lambda decoder: pair.ours(**inputs, params={**pair.ours.params, "decoder": decoder}).loss)
        )(decoder)

    plain = gradients()
    pair.ours.enable_gradient_checkpointing()
    jax.tree.map(lambda a, b: assert_close(a, numpy(b), 1e-10), gradients(), plain)
