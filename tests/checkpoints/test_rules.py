"""The checkpoint table in both directions, on toy trees."""

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_moshi_flax.checkpoints.rules import (
    Rule,
    choose_renaming,
    flax_slots,
    flax_tensors,
    read_params,
    table_slots,
    table_tensors,
)

RULES = (
    Rule(r"(.*)/linear/(?P<codebook>\d+)/kernel", r"\1/linear/weight", "transpose"),
    Rule(r"(.*)/fc/(?P<codebook>\d+)/kernel", r"\1/fc/weight", "transpose", squeeze_single=True),
    Rule(r"(.*)/conv/kernel", r"\1/conv/weight", "conv"),
    Rule(r"(.*)/kernel", r"\1/weight", "transpose"),
    Rule(r"(.*)/(?:scale|embedding)", r"\1/weight"),
    Rule(r"(.*)/bias", r"\1/bias"),
)


def to_pt_state(params: dict, rules: tuple[Rule, ...]) -> dict[str, np.ndarray]:
    return {tensor.key: tensor.build() for tensor in table_tensors(params, rules)}


def to_flax_state(params: dict) -> dict[str, np.ndarray]:
    return {tensor.key: tensor.build() for tensor in flax_tensors(params)}


DTYPES = [np.float32, np.float16, np.float64, ml_dtypes.bfloat16]


def _state(codebooks: int, dtype: type, seed: int = 0) -> dict[str, np.ndarray]:
    """A file with a tensor of every kind, sizes all different; bit patterns drawn, NaNs and denormals included."""
    shapes = {
        "body.linear.weight": (codebooks, 3, 5),
        "body.fc.weight": (codebooks, 7, 2) if codebooks > 1 else (7, 2),
        "body.conv.weight": (8, 2, 5),
        "body.conv.bias": (8,),
        "body.layers.11.norm.weight": (9,),
        "embed.0.weight": (5, 4),
        "head.weight": (3, 4),
    }
    rng = np.random.default_rng(seed)
    width = np.dtype(dtype).itemsize
    return {
        key: rng.integers(0, 256, (*shape[:-1], shape[-1] * width), np.uint8).view(dtype)
        for key, shape in shapes.items()
    }


def _template(codebooks: int) -> dict:
    def leaf(*shape: int) -> np.ndarray:
        return np.empty(shape)

    numbers = [str(index) for index in range(codebooks)]
    return {
        "body": {
            "linear": {number: {"kernel": leaf(5, 3)} for number in numbers},
            "fc": {number: {"kernel": leaf(2, 7)} for number in numbers},
            "conv": {"kernel": leaf(5, 2, 8), "bias": leaf(8)},
            "layers": {"11": {"norm": {"scale": leaf(9)}}},
        },
        "embed": {"0": {"embedding": leaf(5, 4)}},
        "head": {"kernel": leaf(4, 3)},
    }


@given(codebooks=st.integers(1, 12), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_both_directions_keep_every_bit(codebooks, dtype, seed):
    state = _state(codebooks, dtype, seed)
    params, missing, unexpected, mismatched = read_params(_template(codebooks), RULES, state)
    assert (missing, unexpected, mismatched) == ([], [], [])
    written = to_pt_state(params, RULES)
    assert set(written) == set(state)
    for key, tensor in state.items():
        assert written[key].dtype == tensor.dtype and written[key].shape == tensor.shape
        assert written[key].flags.c_contiguous
        assert written[key].tobytes() == tensor.tobytes(), key


def test_leaves_are_what_the_transforms_say():
    state = _state(3, np.float32)
    params, *_ = read_params(_template(3), RULES, state)
    for index in range(3):
        kernel = params["body"]["linear"][str(index)]["kernel"]
        assert kernel.tobytes() == np.ascontiguousarray(state["body.linear.weight"][index].T).tobytes()
    conv = params["body"]["conv"]["kernel"]
    # element [width, in, out] of ours is [out, in, width] of the file
    assert conv[4, 1, 6].tobytes() == state["body.conv.weight"][6, 1, 4].tobytes()


def test_a_single_codebook_may_come_with_or_without_its_axis():
    state = _state(1, np.float32)
    state["body.fc.weight"] = state["body.fc.weight"][None]
    state["body.linear.weight"] = state["body.linear.weight"][0]
    params, missing, _, mismatched = read_params(_template(1), RULES, state)
    assert (missing, mismatched) == ([], [])
    written = to_pt_state(params, RULES)
    assert written["body.fc.weight"].shape == (7, 2)
    assert written["body.linear.weight"].shape == (1, 3, 5)


def test_all_that_does_not_fit_is_told():
    state = _state(2, np.float32)
    del state["body.conv.bias"], state["body.fc.weight"]
    state["body.linear.weight"] = np.zeros((3, 3, 5), np.float32)
    state["embed.0.weight"] = np.zeros((4, 5), np.float32)
    state["body.surplus.weight"] = np.zeros(1, np.float32)
    params, missing, unexpected, mismatched = read_params(_template(2), RULES, state)
    assert sorted(missing) == ["body/conv/bias", "body/fc/0/kernel", "body/fc/1/kernel"]
    assert unexpected == ["body.surplus.weight"]
    assert sorted(mismatched) == [
        ("body.linear.weight", (3, 3, 5), (2, 3, 5)),
        ("embed.0.weight", (4, 5), (5, 4)),
    ]
    assert "embedding" not in flatten_dict(params, sep="/")


def test_each_tensor_is_fetched_once():
    class Counting(dict):
        fetched: list = []

        def __getitem__(self, key):
            self.fetched.append(key)
            return super().__getitem__(key)

    state = Counting(_state(8, np.float32))
    read_params(_template(8), RULES, state)
    assert sorted(state.fetched) == sorted(state)


def test_first_matching_rule_wins_and_none_is_an_error():
    rules = (Rule("a/kernel", "special"), Rule("(.*)/kernel", r"\1.weight"))
    assert [slot.key for slot in table_slots(["a/kernel", "b/kernel"], rules)] == ["special", "b.weight"]
    with pytest.raises(ValueError, match="'c/bias'"):
        table_slots(["c/bias"], rules)
    with pytest.raises(ValueError, match=r"transform.*'rotate'"):
        Rule("a", "a", "rotate")


def test_codebooks_must_be_numbered_without_gaps():
    with pytest.raises(ValueError, match=r"body\.linear\.weight.*\[0, 2\]"):
        table_slots(["body/linear/0/kernel", "body/linear/2/kernel"], RULES)
    with pytest.raises(ValueError, match=r"body\.linear\.weight"):
        to_pt_state(
            {"body": {"linear": {"0": {"kernel": np.zeros((2, 3))}, "1": {"kernel": np.zeros((2, 4))}}}}, RULES
        )


def test_renaming_finds_parts_and_bases():
    slots = flax_slots(["model/a", "model/b", "head"])

    def names(keys, **kwargs):
        prefix, rename = choose_renaming(slots, keys, **kwargs)
        return prefix, [rename(slot.key) for slot in slots]

    assert names(["model.a", "head"]) == ("", ["model.a", "model.b", "head"])
    whole = ["decoder.model.a", "decoder.model.b", "decoder.head", "a"]
    assert names(whole, prefixes=("", "decoder."), base_model_prefix="model") == (
        "decoder.",
        ["decoder.model.a", "decoder.model.b", "decoder.head"],
    )
    _, base = names(["a", "b", "head"], base_model_prefix="model")
    assert base[:2] == ["a", "b"] and base[2] not in ("head", "a", "b")
    with pytest.raises(ValueError, match=r"none of the file's 1 tensors.*'x'"):
        names(["x"], base_model_prefix="model")


def test_flax_layout_joins_paths_with_dots():
    params, *_ = read_params(_template(2), RULES, _state(2, ml_dtypes.bfloat16))
    state = to_flax_state(params)
    assert state["body.linear.1.kernel"].shape == (5, 3)
    assert state["body.linear.1.kernel"].flags.c_contiguous
    assert len(state) == len(flatten_dict(params))
