"""What is accepted as a description of quantized weights, and which layers it means."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.configs import tiny_moshi_config
from transformers_moshi_flax import FlaxMoshiDepthDecoder, FlaxMoshiForConditionalGeneration, QuantizationConfig
from transformers_moshi_flax.quantization.tree import check_skip, quantized_layers


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"kind": "int8"}, ("int8", 8, None)),
        ({"kind": "int4"}, ("int4", 4, 32)),
        ({"kind": "nf4"}, ("nf4", 4, 32)),
        ({"bits": 8}, ("int8", 8, None)),
        ({"bits": 4, "group_size": 64}, ("int4", 4, 64)),
        ({"bits": 4, "kind": "nf4"}, ("nf4", 4, 32)),
        ({"bits": 8, "group_size": 64, "offsets": True}, ("int8", 8, 64)),
        ({"kind": "nf4", "double_quantization": True}, ("nf4", 4, 32)),
        ({"kind": "int8", "group_size": 64, "double_quantization": True}, ("int8", 8, 64)),
    ],
)
def test_what_is_left_out_follows(fields: dict[str, Any], expected: tuple[Any, ...]) -> None:
    config = QuantizationConfig(**fields)
    assert (config.kind, config.bits, config.group_size) == expected
    again = QuantizationConfig.of_model(SimpleNamespace(quantization_config=config.to_dict()))
    assert again == config
    assert config.double_quantization == ("double_quantization" in config.to_dict())
    assert QuantizationConfig.of_model(SimpleNamespace()) is None


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "`kind` is missing; give one of 'int8', 'int4', 'nf4'"),
        ({"kind": "int3"}, "`kind`='int3' must be one of .*; did you mean 'int"),
        ({"kind": ["int8"]}, "`kind`=.* must be one of"),
        ({"bits": 3}, "`bits`=3 must be 8 or 4"),
        ({"bits": True}, "`bits`=True must be 8 or 4"),
        ({"bits": 8, "kind": "nf4"}, "`bits`=8, but `kind`='nf4' has 4; leave out `bits`"),
        ({"kind": "int4", "group_size": 0}, "`group_size`=0 must be a whole number, at least 1"),
        ({"kind": "int4", "group_size": 2.0}, "`group_size`=2.0 must be"),
        ({"kind": "nf4", "group_size": 7}, "`group_size`=7 must be even"),
        ({"kind": "int8", "skip": "lm_head"}, "`skip`='lm_head' must be a list"),
        ({"bits": 5, "group_size": -1}, "`bits`=5 .*; `group_size`=-1"),
        ({"kind": "nf4", "offsets": True}, "`offsets`=True, but the numbers of 'nf4' lie around zero"),
        ({"kind": "int4", "offsets": 1}, "`offsets`=1 must be True or False"),
        ({"kind": "int4", "double_quantization": 1}, "`double_quantization`=1 must be True or False"),
        ({"kind": "int4", "double_quantization": True, "offsets": True}, "`offsets` stay in 32 bits; leave out one"),
        ({"bits": 8, "double_quantization": True}, "'int8' has a scale for each output only; give a `group_size`"),
    ],
)
def test_bad_values_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizationConfig(**fields)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quant_method='bitsandbytes', which is not read"),
        ({"kind": "int8"}, "quant_method=None"),
        ({"quant_method": "transformers-moshi-flax", "kind": "int8", "grup_size": 3}, "did you mean 'group_size'"),
        ({"quant_method": "transformers-moshi-flax", "kind": "int9"}, "quantization_config: `kind`='int9'"),
    ],
)
def test_what_config_json_says_is_checked(values: Any, message: str) -> None:
    config = tiny_moshi_config()
    config.quantization_config = values
    with pytest.raises(ValueError, match=message):
        FlaxMoshiForConditionalGeneration(config, _do_init=False)


@pytest.fixture(scope="module")
def shapes() -> dict[str, Any]:
    return FlaxMoshiForConditionalGeneration(tiny_moshi_config(), _do_init=False).params_shape_tree


@pytest.mark.parametrize(
    ("skip", "number"),
    [
        ([], 93),  # 2 · 6 + 1 of the backbone, 4 · (2 · 6 + 2) of the depth decoder, 2 · 2 · 6 of Mimi
        (["audio_encoder"], 69),
        (["depth_decoder", "audio_encoder"], 13),
        (["lm_head"], 92),
        (["lm_heads"], 89),
        (["decoder.model.layers.0"], 87),
        (["mlp.fc1"], 79),
        (["depth_decoder.lm_heads.3"], 92),
    ],
)
def test_which_layers(shapes: dict[str, Any], skip: list[str], number: int) -> None:
    config = QuantizationConfig("int4", group_size=4, skip=skip)
    check_skip(shapes, config, "")
    assert len(quantized_layers(shapes, config, "")) == number


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        (["lm_haed"], "`skip`: 'lm_haed' is no module with linear layers; did you mean 'lm_head'"),
        (["embed_tokens"], "'embed_tokens' is no module with linear layers"),
        (["head"], "'head' is no module"),
        (["decoder", "depth_decoder", "audio_encoder"], "leaves no linear layer"),
    ],
)
def test_names_that_mean_nothing(shapes: dict[str, Any], skip: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_skip(shapes, QuantizationConfig("int8", skip=skip), "")


def test_a_part_alone_has_the_names_of_the_whole() -> None:
    depth = FlaxMoshiDepthDecoder(tiny_moshi_config().depth_decoder_config)
    depth.quantize(QuantizationConfig("int8", skip=["depth_decoder.layers.0"]))
    skipped = [path for path in depth.required_params if path[-1] == "kernel"]
    assert skipped and {path[:2] for path in skipped} == {("layers", "0")}


def test_groups_that_do_not_divide(shapes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"`group_size`=32 does not divide the inputs of .* \(\d+\).*`skip`"):
        quantized_layers(shapes, QuantizationConfig("nf4"), "")
