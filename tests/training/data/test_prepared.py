"""What is written is read, what is damaged is refused, and arrays by sample serve as well."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from transformers_moshi_flax.training.data.prepared import (
    INDEX,
    SETTINGS,
    SHARDS,
    Conversation,
    PreparedDataset,
    contents_of,
    open_dataset,
    read_contents,
    write_index,
    write_shard,
)

CODEBOOKS = 3


def sample(frames: int, seed: int = 0, user_text: bool = True, codebooks: int = CODEBOOKS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([seed, frames])
    arrays = {
        "moshi_text_tokens": rng.integers(0, 60, frames),
        "moshi_audio_tokens": rng.integers(0, 32, (codebooks, frames)),
        "user_audio_tokens": rng.integers(0, 32, (codebooks, frames)),
    }
    return arrays | ({"user_text_tokens": rng.integers(0, 60, frames)} if user_text else {})


def assert_same(conversation: Conversation, arrays: dict[str, np.ndarray]) -> None:
    found = conversation.arrays()
    assert found.keys() == arrays.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)


SAMPLES = {"a/b.wav": sample(5), "c.wav": sample(9, 1, user_text=False), "d.wav": sample(2, 2)}


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Two shards, of two conversations and of one."""
    conversations = [(Conversation.from_arrays(name, arrays), {"remarks": {}}) for name, arrays in SAMPLES.items()]
    write_shard(tmp_path, 0, conversations[:2], [{"path": "bad.wav", "reason": "empty"}], np.int16)
    write_shard(tmp_path, 1, conversations[2:], [], np.int16)
    write_index(tmp_path, {"num_codebooks": CODEBOOKS}, 2)
    return tmp_path


def check(dataset: PreparedDataset, names: list[str]) -> None:
    assert dataset.ids == names and len(dataset) == 3
    assert dataset.lengths.tolist() == [5, 9, 2]
    assert dataset.without_user_text == [names[1]]
    for conversation, name, arrays in zip(dataset, names, SAMPLES.values(), strict=True):
        assert conversation.id == name
        assert_same(conversation, arrays)
    assert_same(dataset[-1], list(SAMPLES.values())[-1])


def test_shards(prepared: Path) -> None:
    dataset = open_dataset(prepared)
    check(dataset, list(SAMPLES))
    assert dataset[0].moshi_audio_tokens.dtype == np.int16
    assert dataset.settings == {"num_codebooks": CODEBOOKS}
    check(pickle.loads(pickle.dumps(dataset)), list(SAMPLES))
    assert read_contents(prepared, 0)["skipped"] == [{"path": "bad.wav", "reason": "empty"}]
    assert read_contents(prepared, 2) is None


def test_folders_of_samples(tmp_path: Path) -> None:
    for number, arrays in enumerate(SAMPLES.values()):
        np.savez(tmp_path / f"{number}.npz", **arrays)
    check(open_dataset(str(tmp_path)), ["0.npz", "1.npz", "2.npz"])
    (tmp_path / "1.npz").unlink()
    safetensors.numpy.save_file(list(SAMPLES.values())[1], tmp_path / "1.safetensors")
    dataset = open_dataset(tmp_path)
    check(dataset, ["0.npz", "1.safetensors", "2.npz"])
    changed = list(SAMPLES.values())[2]
    np.savez(tmp_path / "2.npz", **{**changed, "moshi_text_tokens": changed["moshi_text_tokens"] ^ 1})
    assert open_dataset(tmp_path).fingerprint != dataset.fingerprint


def test_samples_in_memory() -> None:
    dataset = open_dataset(list(SAMPLES.values()))
    check(dataset, ["sample 0", "sample 1", "sample 2"])
    changed = [*SAMPLES.values()]
    changed[1] = {**changed[1], "moshi_text_tokens": changed[1]["moshi_text_tokens"] ^ 1}
    assert open_dataset(changed).fingerprint != dataset.fingerprint


def test_parts_are_views() -> None:
    conversation = Conversation.from_arrays("x", sample(5))
    part = conversation.part(1, 3)
    assert part.frames == 2 and np.shares_memory(part.moshi_audio_tokens, conversation.moshi_audio_tokens)
    np.testing.assert_array_equal(part.user_text_tokens, conversation.user_text_tokens[1:3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moshi_text_tokens": np.zeros(4, int)}, "`user_text_tokens` has 5 frames, but `moshi_text_tokens` has 4"),
        ({"moshi_text_tokens": np.zeros(5)}, "`moshi_text_tokens` must hold integers"),
        ({"moshi_text_tokens": np.zeros((1, 5), int)}, r"`moshi_text_tokens` must have the shape \(frames,\)"),
        ({"user_audio_tokens": np.zeros(5, int)}, r"`user_audio_tokens` must have the shape \(codebooks, frames\)"),
        (
            {"user_audio_tokens": np.zeros((2, 5), int)},
            "`moshi_audio_tokens` has 3 codebooks and `user_audio_tokens` 2",
        ),
        ({"moshi_text": np.zeros(5, int)}, "`moshi_text` is none of the arrays"),
    ],
)
def test_bad_samples(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"'sample 1': {message}"):
        open_dataset([sample(5), sample(5) | change])


def test_missing_array() -> None:
    arrays = sample(5)
    del arrays["moshi_audio_tokens"]
    with pytest.raises(ValueError, match="'sample 0': `moshi_audio_tokens` is missing"):
        open_dataset([arrays])


@pytest.mark.parametrize(
    ("key", "value"), [("user_text_tokens", 60), ("moshi_audio_tokens", 32), ("user_audio_tokens", -1)]
)
def test_ids_out_of_range(key: str, value: int) -> None:
    arrays = sample(5)
    arrays[key][..., 2] = value
    conversation = Conversation.from_arrays("x", arrays)
    with pytest.raises(ValueError, match=f"'x': `{key}` has the id {value}"):
        conversation.check_ids(60, 32)
    conversation.part(3, 5).check_ids(60, 32)


def test_flipped_bit(prepared: Path) -> None:
    path = prepared / "shard-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    dataset = open_dataset(prepared)
    damaged = []
    for index in range(3):
        try:
            dataset[index]
        except ValueError as error:
            damaged.append(str(error))
    assert len(damaged) == 1 and "is damaged; prepare the dataset anew" in damaged[0]


def test_places_that_are_no_dataset(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        open_dataset(prepared / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"no .npz or .safetensors"):
        open_dataset(empty)
    (prepared / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="has no 'shard-00001"):
        open_dataset(prepared)
    (prepared / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="is damaged"):
        open_dataset(prepared)
    (prepared / INDEX).write_text(json.dumps({"version": 2}))
    with pytest.raises(ValueError, match="of version 2"):
        open_dataset(prepared)
    (prepared / INDEX).unlink()
    (prepared / SETTINGS).write_text("{}")
    with pytest.raises(ValueError, match="is not finished"):
        open_dataset(prepared)
    (empty / "a.npz").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"'.*a\.npz' cannot be read"):
        open_dataset(empty)


def test_damaged_npz(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", **sample(400))
    whole = (tmp_path / "a.npz").read_bytes()
    np.save(tmp_path / "one.npy", np.zeros(3, int))
    overwritten = whole[:200] + bytes(200) + whole[400:]
    for content in (whole[: len(whole) // 2], overwritten, (tmp_path / "one.npy").read_bytes(), b"", b"PK\x03\x04"):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"'.*a\.npz' cannot be read as \.npz"):
            open_dataset(tmp_path)


def test_index_cannot_reach_outside(prepared: Path) -> None:
    index = json.loads((prepared / INDEX).read_text())
    index["conversations"][0]["shard"] = "../shard-00000.safetensors"
    (prepared / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="its index names"):
        open_dataset(prepared)


def test_files_changed_while_in_use(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **sample(5))
    dataset = open_dataset(tmp_path)
    np.savez(tmp_path / "a.npz", **sample(6))
    with pytest.raises(ValueError, match="has 6 frames, but had 5"):
        dataset[0]


def test_a_shard_that_is_not_whole_is_asked_for(tmp_path: Path) -> None:
    """Such as one that was damaged after it had been looked at."""
    for damage in (lambda path: None, lambda path: path.write_bytes(b"cut")):
        damage(tmp_path / SHARDS.format(0))
        with pytest.raises(ValueError, match=f"'{tmp_path}': shard 0 is not whole; prepare the dataset again"):
            contents_of(tmp_path, 0)
