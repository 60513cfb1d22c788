"""Checksums find what opening does not: every flipped bit, and numbers that are not finite."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tests.checkpoints import saving
from transformers_moshi_flax.checkpoints.files import FLAX_INDEX, Source
from transformers_moshi_flax.checkpoints.formats import open_safetensors
from transformers_moshi_flax.checkpoints.verifying import refuse_damage, tensor_problems
from transformers_moshi_flax.checkpoints.writing import write_safetensors

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((3,), np.float16), "n": np.zeros((), bool)}


def problems(path: Path) -> dict[str, str]:
    return {key: problem for key, problem in tensor_problems(open_safetensors(path)) if problem}


def test_a_sound_file(tmp_path: Path):
    write_safetensors(tmp_path / "w", TENSORS, "pt")
    assert dict(tensor_problems(open_safetensors(tmp_path / "w"))) == dict.fromkeys(TENSORS)
    refuse_damage(open_safetensors(tmp_path / "w"))


@settings(deadline=None)
@given(st.data())
def test_every_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    path = tmp_path_factory.mktemp("bits") / "w"
    write_safetensors(path, TENSORS, "pt")
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    bit = data.draw(st.integers(8 * start, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    found = problems(path)
    assert len(found) == 1 and "the file is damaged" in next(iter(found.values()))
    with pytest.raises(ValueError, match=rf"is damaged: {next(iter(found))}: its bytes"):
        refuse_damage(open_safetensors(path))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(tmp_path: Path, value: float):
    save_file({**TENSORS, "c": np.array([1, value, value], np.float32)}, tmp_path / "w")  # no checksums either
    assert problems(tmp_path / "w") == {"c": "2 of its 3 numbers in w are not finite"}


def test_damaged_checksums(tmp_path: Path):
    for content in ("{", "[]"):
        save_file(TENSORS, tmp_path / "w", metadata={"checksums": content})
        with pytest.raises(ValueError, match="the checksums in the header are damaged"):
            problems(tmp_path / "w")


def test_tensors_that_went_missing(tmp_path: Path):
    write_safetensors(tmp_path / "w", TENSORS, "pt")
    content = (tmp_path / "w").read_bytes()
    (tmp_path / "w").write_bytes(content.replace(b'"a":{"dtype"', b'"x":{"dtype"'))
    assert problems(tmp_path / "w") == {"a": "it was written to w, but is not there: the file is damaged"}


def test_an_index_that_lost_tensors(tmp_path: Path):
    saving.save(tmp_path, 1, "sharded")
    index = tmp_path / FLAX_INDEX
    values = json.loads(index.read_text())
    shared = values["weight_map"]["layer.0.kernel"]
    for lost, found in (
        ({"layer.0.kernel"}, {"layer.0.kernel", index.name}),  # its shard has others
        ({key for key, name in values["weight_map"].items() if name == shared}, {index.name}),  # a whole shard
    ):
        kept = {key: name for key, name in values["weight_map"].items() if key not in lost}
        index.write_text(json.dumps({**values, "weight_map": kept}))
        _, tensors = Source.locate(tmp_path).weights()
        assert {key for key, problem in tensor_problems(tensors) if problem} == found
