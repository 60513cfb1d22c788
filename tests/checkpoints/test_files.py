"""Finding, opening and refusing checkpoint files."""

import json
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.numpy import save_file

from transformers_moshi_flax.checkpoints import formats, writing
from transformers_moshi_flax.checkpoints.files import (
    FLAX_WEIGHTS,
    LAYOUTS,
    PT_INDEX,
    PT_WEIGHTS,
    CheckpointNotFoundError,
    Source,
)

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, ml_dtypes.bfloat16)}


def _write(path, layout="pt", tensors=TENSORS):
    save_file(tensors, path, metadata=None if layout is None else {"format": layout})


def test_directory_file_and_hub_id_are_told_apart(tmp_path):
    _write(tmp_path / "weights.safetensors")
    assert Source.locate(tmp_path).folder == tmp_path
    assert Source.locate(tmp_path / "weights.safetensors").file == tmp_path / "weights.safetensors"
    hub = Source.locate("someone/a-model", revision="main")
    assert hub.folder is None and hub.hub == {"subfolder": "", "revision": "main"}
    for name in (tmp_path / "nothing", "./nothing", "a/b/c", "~/nothing-there", ""):
        with pytest.raises(CheckpointNotFoundError, match="neither a directory nor a file"):
            Source.locate(name)
    (tmp_path / "sub").mkdir()
    assert Source.locate(tmp_path, "sub").folder == tmp_path / "sub"
    with pytest.raises(ValueError, match="subfolder='other'"):
        Source.locate(tmp_path, "other")
    with pytest.raises(ValueError, match="subfolder='sub'"):
        Source.locate(tmp_path / "weights.safetensors", "sub")


def test_not_found_is_an_os_error_as_in_transformers(tmp_path):
    with pytest.raises(OSError, match="has no weights"):
        Source.locate(tmp_path).weights()


@pytest.mark.parametrize("layout, expected", [("pt", "pt"), (None, "pt"), ("flax", "flax")])
def test_layout_comes_from_the_metadata(tmp_path, layout, expected):
    _write(tmp_path / PT_WEIGHTS, layout)
    found, tensors = Source.locate(tmp_path).weights()
    assert found == expected
    assert dict(tensors.items()).keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        assert tensors[key].dtype == tensor.dtype and tensors[key].tobytes() == tensor.tobytes()
    with pytest.raises(ValueError, match="from_pt="):
        Source.locate(tmp_path).weights(from_pt=expected == "flax")
    with pytest.raises(ValueError, match="from_pt="):
        Source.locate(tmp_path / PT_WEIGHTS).weights(from_pt=expected == "flax")


def test_of_two_layouts_flax_is_first_unless_told(tmp_path):
    _write(tmp_path / PT_WEIGHTS)
    _write(tmp_path / FLAX_WEIGHTS, "flax")
    source = Source.locate(tmp_path)
    assert [source.weights(from_pt)[0] for from_pt in (None, False, True)] == ["flax", "flax", "pt"]


def test_other_frameworks_are_refused(tmp_path):
    _write(tmp_path / PT_WEIGHTS, "mlx")
    with pytest.raises(ValueError, match="'mlx'"):
        Source.locate(tmp_path).weights()


def test_pickles_are_opened_on_demand_only(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({key: torch.tensor(value.astype(np.float32)) for key, value in TENSORS.items()}, path)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin \(a pickle: opened with from_pt=True only\)"):
        Source.locate(tmp_path).weights()
    with pytest.raises(ValueError, match="is a pickle: pass from_pt=True"):
        Source.locate(path).weights()
    for source in (tmp_path, path):
        layout, tensors = Source.locate(source).weights(from_pt=True)
        assert layout == "pt" and {key: value.tolist() for key, value in tensors.items()} == {
            key: value.astype(np.float32).tolist() for key, value in TENSORS.items()
        }
    torch.save({"a": torch.ones(3, dtype=torch.bfloat16)}, path)
    assert Source.locate(path).weights(from_pt=True)[1]["a"].dtype == ml_dtypes.bfloat16


def test_pickles_run_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "owned").touch, ()

    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read as a PyTorch pickle"):
        Source.locate(tmp_path).weights(from_pt=True)
    assert not (tmp_path / "owned").exists()


def test_pickles_need_torch(tmp_path, monkeypatch):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"install the extra .*transformers-moshi-flax\[torch\]"):
        Source.locate(tmp_path).weights(from_pt=True)


def test_git_lfs_pointers_are_told(tmp_path):
    (tmp_path / PT_WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(ValueError, match=r"model\.safetensors is a git-LFS pointer.*git lfs pull"):
        Source.locate(tmp_path).weights()


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_truncated_file(tmp_path, keep):
    _write(tmp_path / PT_WEIGHTS)
    content = (tmp_path / PT_WEIGHTS).read_bytes()
    (tmp_path / PT_WEIGHTS).write_bytes(content[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        Source.locate(tmp_path).weights()


def test_shards(tmp_path):
    _write(tmp_path / "one.safetensors", tensors={"a": TENSORS["a"]})
    _write(tmp_path / "two.safetensors", tensors={"b": TENSORS["b"]})
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / PT_INDEX).write_text(json.dumps(index))
    layout, tensors = Source.locate(tmp_path).weights()
    assert layout == "pt" and set(tensors) == {"a", "b"} and tensors["b"].tobytes() == TENSORS["b"].tobytes()


@pytest.mark.parametrize(
    "name", ["../one.safetensors", "/etc/passwd", "x/one.safetensors", "..", "", "a\\b", "x" * 300]
)
def test_index_cannot_lead_out_of_the_directory(tmp_path, name):
    _write(tmp_path / "one.safetensors")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / PT_INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="not a plain file name"):
        Source.locate(tmp_path / "inner").weights()


def test_bad_index(tmp_path):
    _write(tmp_path / "one.safetensors")
    for content, message in [
        ("{", "no valid JSON"),
        ("[]", "JSON object"),
        ("{}", "weight_map"),
        ('{"weight_map": {"a": 1}}', "weight_map"),
        ('{"weight_map": {"a": "two.safetensors"}}', "not there"),
        ('{"weight_map": {"z": "one.safetensors"}}', r"\['z'\]"),
        ('{"weight_map": {"a": "one.safetensors", "a": "one.safetensors"}}', "'a' is there twice"),
    ]:
        (tmp_path / PT_INDEX).write_text(content)
        with pytest.raises(ValueError, match=message):
            Source.locate(tmp_path).weights()


def test_shards_that_disagree_with_the_index(tmp_path):
    _write(tmp_path / "one.safetensors")
    _write(tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / PT_INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lie in two of the files"):
        Source.locate(tmp_path).weights()


def test_links_out_of_the_directory(tmp_path):
    """Refused, but for the cache of the Hub, whose snapshots link to its blobs."""
    snapshot = tmp_path / "models--x--y" / "snapshots" / "0f"
    blobs = tmp_path / "models--x--y" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (snapshot / PT_INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, "one.safetensors")}))
    for target, good in ((blobs / "abc", True), (tmp_path / "elsewhere", False)):
        _write(target)
        (snapshot / "one.safetensors").unlink(missing_ok=True)
        (snapshot / "one.safetensors").symlink_to(target)
        if good:
            assert set(Source.locate(snapshot).weights()[1]) == set(TENSORS)
        else:
            with pytest.raises(ValueError, match="link out of the directory"):
                Source.locate(snapshot).weights()


def _files(kind):
    """A checkpoint of one file or of shards, by name."""
    if kind == "single":
        return {PT_WEIGHTS: None}
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    return {PT_INDEX: index, "one.safetensors": "a", "two.safetensors": "b"}


def _fill(folder, kind):
    folder.mkdir(parents=True)
    for name, content in _files(kind).items():
        if isinstance(content, dict):
            (folder / name).write_text(json.dumps(content))
        else:
            _write(folder / name, tensors=TENSORS if content is None else {content: TENSORS[content]})


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_links_that_users_make(tmp_path, kind):
    """A folder of links, to one place or several, and a cache that lies on several disks."""
    _fill(tmp_path / "there", kind)
    (tmp_path / "links").mkdir()
    (tmp_path / "disks" / "blobs").mkdir(parents=True)
    snapshot = tmp_path / "hub" / "models--x--y" / "snapshots" / "0f"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub" / "models--x--y" / "blobs").symlink_to(tmp_path / "disks" / "blobs")
    for number, path in enumerate((tmp_path / "there").iterdir()):
        disk = tmp_path / f"disk{number}"
        disk.mkdir()
        (disk / "file").write_bytes(path.read_bytes())
        (tmp_path / "links" / path.name).symlink_to(disk / "file")
        # a blob may be a link itself
        (tmp_path / "disks" / "blobs" / f"hash{number}").symlink_to(disk / "file")
        (snapshot / path.name).symlink_to(f"../../blobs/hash{number}")
    (tmp_path / "model").symlink_to(snapshot)
    for folder in (tmp_path / "links", snapshot, tmp_path / "model"):
        assert set(Source.locate(folder).weights()[1]) == set(TENSORS)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", FLAX_WEIGHTS])
def test_what_is_no_file_is_not_passed_over(tmp_path, name):
    """A disk that is not there, for one: neither defaults nor other weights take the place of a file."""
    folder = tmp_path / "checkpoint"
    _fill(folder, "single")
    path = folder / name
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "disk" / name)
    read = Source.weights if name == FLAX_WEIGHTS else lambda source: source.read_json(name)
    with pytest.raises(CheckpointNotFoundError, match=rf"{name} is a link to '.*', where there is no file: bring"):
        read(Source.locate(folder))
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointNotFoundError, match=rf"{name} is no file; give the file"):
        read(Source.locate(folder))


@pytest.mark.parametrize("name", [PT_WEIGHTS, PT_INDEX])
def test_links_out_of_the_cache(tmp_path, name):
    """The file itself and the index as well as a shard."""
    _fill(tmp_path / "there", "single" if name == PT_WEIGHTS else "sharded")
    snapshot = tmp_path / "models--x--y" / "snapshots" / "0f"
    snapshot.mkdir(parents=True)
    (snapshot / name).symlink_to(tmp_path / "there" / name)
    with pytest.raises(ValueError, match="link out of the directory and of the cache"):
        Source.locate(snapshot).weights()


def test_use_safetensors(tmp_path, unchecked_types):
    torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin \(left out by use_safetensors=True\)"):
        Source.locate(tmp_path, use_safetensors=True).weights(from_pt=True)
    _write(tmp_path / PT_WEIGHTS)
    assert set(Source.locate(tmp_path, use_safetensors=True).weights(from_pt=True)[1]) == set(TENSORS)
    assert set(Source.locate(tmp_path, use_safetensors=False).weights(from_pt=True)[1]) == {"a"}
    with pytest.raises(ValueError, match=r"model\.safetensors \(left out by use_safetensors=False\)"):
        Source.locate(tmp_path, use_safetensors=False).weights()
    with pytest.raises(ValueError, match=r"use_safetensors=False, but .* is of another format"):
        Source.locate(tmp_path / PT_WEIGHTS, use_safetensors=False).weights()
    with pytest.raises(ValueError, match="use_safetensors='yes' must be"):
        Source.locate(tmp_path, use_safetensors="yes")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    writing.write_safetensors(path, TENSORS, "pt")
    before = path.read_bytes()

    def failing(tensors, name, metadata):
        name.write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(writing, "save_file", failing)
    with pytest.raises(OSError, match="disk full"):
        writing.write_safetensors(path, {}, "pt")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_file_is_complete_and_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")
    events = []
    sync = writing._sync
    replace = writing.os.replace
    monkeypatch.setattr(writing, "_sync", lambda target: (events.append(("sync", target.suffix)), sync(target)))

    def recording(source, target):
        assert path.read_text() == "old" and source.read_text() == "new"
        events.append(("replace", target.suffix))
        replace(source, target)

    monkeypatch.setattr(writing.os, "replace", recording)
    writing.write_text(path, "new")
    assert path.read_text() == "new"
    assert events == [("sync", ".tmp"), ("replace", ".txt"), ("sync", tmp_path.suffix)]


def test_written_files_follow_the_umask(tmp_path):
    writing.write_safetensors(tmp_path / "w", TENSORS, "flax")
    (tmp_path / "plain").touch()
    assert (tmp_path / "w").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert formats.open_safetensors(tmp_path / "w").metadata["format"] == "flax"


def test_memory_order_does_not_matter(tmp_path):
    array = np.arange(24.0, dtype=np.float32).reshape(2, 3, 4)
    tensors = {"t": array.transpose(2, 0, 1), "slice": array[:, :, 1:3], "fortran": np.asfortranarray(array)}
    writing.write_safetensors(tmp_path / "w", tensors, "pt")
    read = formats.open_safetensors(tmp_path / "w")
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(read[key], tensor)


def test_hub_files_come_through_its_client(tmp_path, monkeypatch):
    _write(tmp_path / PT_WEIGHTS)
    asked = []

    def download(name, filename, **kwargs):
        asked.append((name, filename, kwargs["revision"], kwargs["subfolder"]))
        if filename != PT_WEIGHTS:
            raise EntryNotFoundError(filename)
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    layout, tensors = Source.locate("someone/a-model", "inner", revision="v1").weights()
    assert layout == "pt" and set(tensors) == {"a", "b"}
    assert asked == [("someone/a-model", name, "v1", "inner") for name in (*LAYOUTS["flax"], PT_WEIGHTS)]
