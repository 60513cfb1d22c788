"""What is accepted as a description of an adapter, and which layers it means."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.configs import tiny_moshi_config
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
from transformers_moshi_flax.adapters.config import LoraConfig
from transformers_moshi_flax.adapters.targets import Linear, linear_layers, saved_whole, targeted


@pytest.fixture(scope="module")
def model() -> FlaxMoshiForConditionalGeneration:
    return FlaxMoshiForConditionalGeneration(tiny_moshi_config(), _do_init=False)


@pytest.fixture(scope="module")
def layers(model: FlaxMoshiForConditionalGeneration) -> dict[str, Linear]:
    return linear_layers(model.params_shape_tree, model.checkpoint_rules)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "`r` must be a whole number, at least 1, but is 0"),
        ({"r": True}, "`r` must be"),
        ({"lora_alpha": math.nan}, "`lora_alpha` must be a finite number"),
        ({"lora_dropout": 1.0}, "`lora_dropout` must be at least 0 and below 1"),
        ({"scaling": 2.0, "use_rslora": True}, "`scaling` says it all"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` must be True, False or 'gaussian'"),
        ({"rank_pattern": {"fc1": 0}}, r"`rank_pattern\['fc1'\]`"),
        ({"target_modules": "(fc1"}, "is no regular expression"),
        ({"target_modules": None}, "`target_modules` names no layer"),
        ({"r": -1, "lora_dropout": -0.5}, "`r` must .*; `lora_dropout` must"),
    ],
)
def test_bad_values_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**{"target_modules": ["fc1"], **fields})


def test_ranks_and_scalings() -> None:
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", rank_pattern={"fc1": 2}, alpha_pattern={r"layers\.0\..*fc1": 8}
    )
    names = ("decoder.model.layers.0.mlp.fc1", "decoder.model.layers.1.mlp.fc1", "decoder.model.layers.1.mlp.fc2")
    assert [config.rank_of(name) for name in names] == [2, 2, 4]
    assert [config.scaling_of(name) for name in names] == [4, 3, 1.5]
    rooted = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_rslora=True)
    assert rooted.scaling_of("x") == 3
    assert LoraConfig(r=4, scaling=0.7, target_modules="all-linear").scaling_of("x") == 0.7


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({"target_modules": ["fc1"]}, 4),
        ({"target_modules": ["q_proj.linear", "v_proj.linear"]}, 8),
        ({"target_modules": ["decoder.lm_head"]}, 1),
        ({"target_modules": r"depth_decoder\..*(fc1|fc2)"}, 4),
        ({"target_modules": "all-linear"}, 12 + 13),
        ({"target_modules": "all-linear", "exclude_modules": ["input_projections", "fc1"]}, 10 + 10),
        ({"target_parameters": ["mlp.fc1.weight"]}, 4),
    ],
)
def test_targets_by_pefts_rules(layers: dict[str, Linear], fields: dict[str, Any], number: int) -> None:
    config = LoraConfig(**fields)
    # Mimi's layers have the same last names, and are meant where they are named
    found = [layer for layer in targeted(config, layers) if not layer.name.startswith("audio_encoder")]
    assert len(found) == number
    assert all(layer.by_codebook == layer.name.startswith("depth_decoder") for layer in found)
    assert all(len(layer.paths) == (4 if layer.by_codebook else 1) for layer in found)


def test_all_linear_leaves_out_mimi_and_heads(layers: dict[str, Linear]) -> None:
    names = [layer.name for layer in targeted(LoraConfig(target_modules="all-linear"), layers)]
    assert not any(name.startswith("audio_encoder") or "lm_head" in name for name in names)
    assert "audio_encoder.encoder_transformer.layers.0.mlp.fc1" in layers


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_modules": ["q_prj.linear"]},
            "'q_prj.linear' is no layer of the model; did you mean 'q_proj.linear'",
        ),
        ({"target_modules": ["fc1", "nothing_like_it"]}, "'nothing_like_it' is no layer of the model; there are "),
        ({"target_modules": "fc1"}, "`target_modules`='fc1' matches no layer, such as"),
        ({"target_modules": ["lm_head"], "exclude_modules": ["lm_head"]}, "leaves no layer"),
        ({"target_parameters": ["fc1"]}, "`target_parameters`: 'fc1' is no layer"),
    ],
)
def test_targets_that_match_nothing(layers: dict[str, Linear], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        targeted(LoraConfig(**fields), layers)


def test_modules_that_are_saved_whole(model: FlaxMoshiForConditionalGeneration) -> None:
    config = LoraConfig(modules_to_save=["decoder.lm_head", "decoder.model.embed_tokens"])
    found = saved_whole(config, model.params_shape_tree, model.checkpoint_rules)
    assert sorted(found) == ["decoder/lm_head/kernel", "decoder/model/embed_tokens/embedding"]
    with pytest.raises(ValueError, match="`modules_to_save`: 'lm_haed' is no layer"):
        saved_whole(LoraConfig(modules_to_save=["lm_haed"]), model.params_shape_tree, model.checkpoint_rules)


def test_from_the_fields_of_a_file() -> None:
    config = LoraConfig(r=3, lora_alpha=9, target_modules=["fc1"], rank_pattern={"fc1": 5})
    again = LoraConfig.from_dict({**config.to_dict(), "use_dora": False, "megatron_config": None, "eva_config": None})
    assert again == config
    given = LoraConfig(r=4, scaling=0.5, target_modules=["fc1"], rank_pattern={"fc2": 8})
    told = LoraConfig.from_dict(given.to_dict())
    assert (told.scaling_of("fc1"), told.scaling_of("a.fc2")) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "`use_dora`=True: here it is always False"),
        ({"peft_type": "LOHA"}, "`peft_type`='LOHA'"),
        ({"bias": "all"}, "`bias`='all'"),
        ({"layers_to_transform": [1]}, "`layers_to_transform`=.* is no option here"),
        ({"lora_alhpa": 3}, "did you mean 'lora_alpha'"),
    ],
)
def test_fields_of_a_file_that_are_no_options(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig.from_dict({"r": 4, "target_modules": ["fc1"], **fields})
