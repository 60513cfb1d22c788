"""A Mimi of fewer codebooks than its files have: the first ones, as each refines those before it."""

import jax
import numpy as np
import pytest

from tests.configs import tiny_mimi_config, tiny_moshi_config
from transformers_moshi_flax import FlaxMimiModel, FlaxMoshiForConditionalGeneration

KEPT = 3


@pytest.fixture(scope="module")
def mimi():
    return FlaxMimiModel(tiny_mimi_config(num_quantizers=5), seed=3)


@pytest.fixture(scope="module")
def moshi():
    # widths that Kyutai's rule for gated layers can express
    config = tiny_moshi_config(
        num_codebooks=KEPT,
        ffn_dim=142,
        depth_decoder_config={"ffn_dim": 62},
        audio_encoder_config={"num_quantizers": 5},
    )
    return FlaxMoshiForConditionalGeneration(config, seed=3)


def first(params):
    """The parameters of the first codebooks alone."""
    quantizer = params["quantizer"]
    acoustic = quantizer["acoustic_residual_vector_quantizer"]
    layers = {str(number): acoustic["layers"][str(number)] for number in range(KEPT - 1)}
    return {
        **params,
        "quantizer": {**quantizer, "acoustic_residual_vector_quantizer": {**acoustic, "layers": layers}},
    }


def same(left, right):
    return jax.tree.structure(left) == jax.tree.structure(right) and jax.tree.all(
        jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), left, right)
    )


@pytest.mark.parametrize("options", [{}, {"to_pt": True}, {"max_shard_size": "20KB"}, {"safe_serialization": False}])
def test_mimi(mimi, tmp_path, options):
    mimi.save_pretrained(tmp_path, **options)
    few, info = FlaxMimiModel.from_pretrained(tmp_path, num_quantizers=KEPT, output_loading_info=True)
    assert few.config.num_quantizers == KEPT and same(few.params, first(mimi.params))
    assert info["missing_keys"] == [] and len(info["unexpected_keys"]) == 6  # three tensors a codebook
    with pytest.raises(ValueError, match="no weights for"):
        FlaxMimiModel.from_pretrained(tmp_path, num_quantizers=6)


def test_their_codes_are_the_first(mimi, tmp_path):
    mimi.save_pretrained(tmp_path)
    few = FlaxMimiModel.from_pretrained(tmp_path, num_quantizers=KEPT)
    audio = np.random.default_rng(0).standard_normal((1, 1, 640), np.float32)
    np.testing.assert_array_equal(few.encode(audio).audio_codes, mimi.encode(audio).audio_codes[:, :KEPT])


def test_of_a_whole_moshi(moshi, tmp_path):
    moshi.save_pretrained(tmp_path)
    few = FlaxMoshiForConditionalGeneration.from_pretrained(tmp_path, audio_encoder_config={"num_quantizers": KEPT})
    assert few.config.audio_encoder_config.num_quantizers == KEPT
    assert same(few.params["audio_encoder"], first(moshi.params["audio_encoder"]))
    part = FlaxMimiModel.from_pretrained(tmp_path, num_quantizers=KEPT)
    assert same(part.params, first(moshi.params["audio_encoder"]))


def test_of_kyutais_files(moshi, tmp_path):
    import json

    moshi.save_kyutai(tmp_path)
    path = tmp_path / json.loads((tmp_path / "config.json").read_text())["mimi_config_name"]
    values = json.loads(path.read_text())
    values["quantizer"]["n_q"] = KEPT
    path.write_text(json.dumps(values))
    few = FlaxMoshiForConditionalGeneration.from_kyutai(tmp_path)
    assert same(few.params["audio_encoder"], first(moshi.params["audio_encoder"]))


def test_other_weights_are_not_left_out(mimi, tmp_path):
    mimi.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no place for"):
        FlaxMimiModel.from_pretrained(tmp_path, num_hidden_layers=1)
