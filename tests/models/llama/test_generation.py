"""Generation of the language models, beside upstream's."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.configs import LLAMAS
from tests.models.llama.pairs import draw_batch, tiny_pair
from tests.torch_oracle import Pair

LENGTHS = (9, 4, 7)


def upstreams(pair: Pair, batch, **options) -> np.ndarray:
    return pair.theirs.generate(**batch.for_torch, do_sample=False, pad_token_id=0, **options).numpy()


@pytest.mark.parametrize("model_type", LLAMAS)
def test_greedy_tokens_are_upstreams(model_type: str, tmp_path: Path):
    """Also far behind the window, and of rows with padding before them."""
    pair = tiny_pair(model_type, tmp_path)
    batch = draw_batch(99, LENGTHS)
    ours = pair.ours.generate(batch.ids, attention_mask=batch.mask, max_new_tokens=50).sequences
    np.testing.assert_array_equal(ours, upstreams(pair, batch, max_new_tokens=50))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return tiny_pair("gemma3_text", tmp_path_factory.mktemp("gemma"))


def test_beams_are_upstreams(gemma: Pair):
    batch = draw_batch(99, LENGTHS, seed=1)
    options = {"max_new_tokens": 10, "num_beams": 3}
    ours = gemma.ours.generate(batch.ids, attention_mask=batch.mask, **options).sequences
    np.testing.assert_array_equal(ours, upstreams(gemma, batch, **options))


def test_a_streamer_gets_every_token(gemma: Pair):
    class Streamer:
        def __init__(self):
            self.pieces, self.ended = [], False

        def put(self, tokens):
            self.pieces.append(np.atleast_2d(tokens.T).T)

        def end(self):
            self.ended = True

    batch, streamer = draw_batch(99, (5, 5)), Streamer()
    sequences = gemma.ours.generate(batch.ids, max_new_tokens=6, streamer=streamer).sequences
    prompt, *steps = streamer.pieces
    np.testing.assert_array_equal(np.concatenate([prompt, *steps], axis=1), sequences)
    assert streamer.ended and len(steps) == 6


def test_embeddings_equal_ids(gemma: Pair):
    """Those of Gemma are scaled before they are passed."""
    ids = draw_batch(99, (5,)).ids
    module, params = gemma.ours.module, gemma.ours.params
    embeds = module.apply({"params": params}, jnp.asarray(ids), method=module.embed)
    expected = gemma.ours.generate(ids, max_new_tokens=6).sequences[:, 5:]
    np.testing.assert_array_equal(gemma.ours.generate(inputs_embeds=embeds, max_new_tokens=6).sequences, expected)


def test_ids_behind_the_vocabulary(gemma: Pair):
    """There is no start token behind it, as Moshi has."""
    with pytest.raises(ValueError, match=r"`input_ids` has the id 99.*\[0, 99\)"):
        gemma.ours.generate(np.array([[1, 99]]), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"`input_ids` has the id 99.*\[0, 99\)"):
        gemma.ours(np.array([[1, 99]]))


def test_dynamic_frequencies(tmp_path: Path):
    """They grow with the prompt and then with every token; and a row is as long as it is, whatever its neighbours."""
    rope = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 100.0}
    pair = tiny_pair("llama", tmp_path, max_position_embeddings=16, rope_parameters=rope)
    batch = draw_batch(99, (24, 12))
    ours = np.asarray(pair.ours.generate(batch.ids, attention_mask=batch.mask, max_new_tokens=12).sequences)
    for row, length in enumerate((24, 12)):
        pair.theirs.model.rotary_emb.__init__(pair.theirs.config)  # it remembers the longest text
        alone = draw_batch(99, (length,))
        alone.ids[:] = batch.ids[row, -length:]
        np.testing.assert_array_equal(ours[row, -length - 12 :], upstreams(pair, alone, max_new_tokens=12)[0])
