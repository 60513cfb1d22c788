"""``moshi-flax convert``: there and back is the same file; what lies beside the weights comes along."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tests.hub_server import UPLOAD_WARNING, hub_server
from tests.models.llama.pairs import tiny_pair
from tests.random_model import RANDOM_MODEL
from transformers_moshi_flax.cli import main


def test_there_and_back(moshi_flax, tmp_path: Path):
    size = ("--max-shard-size", "1MB")
    assert moshi_flax("convert", RANDOM_MODEL, tmp_path / "flax", *size).code == 0
    assert moshi_flax("convert", tmp_path / "flax", tmp_path / "pt", "--to", "pt", *size).code == 0
    for folder, stem in (("flax", "flax_model"), ("pt", "model")):
        assert (tmp_path / folder / f"{stem}.safetensors.index.json").exists()
        shards = list((tmp_path / folder).glob("*.safetensors"))
        assert len(shards) == 3 and all(shard.stat().st_size < 1_050_000 for shard in shards)
        written = json.loads((tmp_path / folder / "generation_config.json").read_text())
        assert written["depth_decoder_config"]["top_k"] == 128
    before = load_file(RANDOM_MODEL / "model.safetensors")
    after = {key: value for shard in shards for key, value in load_file(shard).items()}
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype
        np.testing.assert_array_equal(value, after[key], err_msg=key)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (tmp_path / "pt" / name).read_bytes() == (RANDOM_MODEL / name).read_bytes()


def test_upstream_loads_the_result(moshi_flax, moshi: dict, tmp_path: Path):
    from transformers import MoshiForConditionalGeneration

    assert moshi_flax("convert", moshi["flax"], tmp_path / "pt", "--to", "pt").code == 0
    _, info = MoshiForConditionalGeneration.from_pretrained(tmp_path / "pt", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_dtype(moshi_flax, layouts: dict, tmp_path: Path):
    assert moshi_flax("convert", layouts["pt"], tmp_path / "half", "--to", "pt", "--dtype", "float16").code == 0
    assert {str(value.dtype) for value in load_file(tmp_path / "half" / "model.safetensors").values()} == {"float16"}


@pytest.fixture
def both(layouts: dict, tmp_path: Path) -> Path:
    """A directory with a Mimi in both layouts, the one in Flax layout twice the other."""
    folder = tmp_path / "both"
    shutil.copytree(layouts["pt"], folder)
    doubled = {key: 2 * value for key, value in load_file(layouts["file"]).items()}
    save_file(doubled, folder / "flax_model.safetensors", metadata={"format": "flax"})
    return folder


@pytest.mark.parametrize(("option", "factor"), [((), 2), (("--from", "flax"), 2), (("--from", "pt"), 1)])
def test_from(moshi_flax, layouts: dict, both: Path, tmp_path: Path, option: tuple, factor: int):
    assert moshi_flax("convert", both, tmp_path / "new", *option).code == 0
    before, after = load_file(layouts["file"]), load_file(tmp_path / "new" / "flax_model.safetensors")
    for key, value in before.items():
        np.testing.assert_array_equal(factor * value, after[key], err_msg=key)


def test_from_insists(moshi_flax, layouts: dict, tmp_path: Path):
    result = moshi_flax("convert", layouts["upstream"], tmp_path / "new", "--from", "flax")
    assert result.code == 2 and "SRC" in result.err and "Flax layout" in result.err
    assert not (tmp_path / "new").exists()


def test_pickles_need_from_pt(moshi_flax, layouts: dict, tmp_path: Path):
    import torch

    source = tmp_path / "pickle"
    source.mkdir()
    shutil.copy(layouts["upstream"] / "config.json", source)
    weights = load_file(layouts["upstream"] / "model.safetensors")
    torch.save({key: torch.from_numpy(value) for key, value in weights.items()}, source / "pytorch_model.bin")
    assert moshi_flax("convert", source, tmp_path / "new", "--to", "pt").code == 2
    assert moshi_flax("convert", source, tmp_path / "new", "--to", "pt", "--from", "pt").code == 0
    after = load_file(tmp_path / "new" / "model.safetensors")
    for key, value in weights.items():
        np.testing.assert_array_equal(value, after[key], err_msg=key)


def test_single_file(moshi_flax, layouts: dict, tmp_path: Path):
    assert moshi_flax("convert", layouts["file"], tmp_path / "new", "--to", "pt").code == 0
    before, after = (load_file(path / "model.safetensors") for path in (layouts["pt"], tmp_path / "new"))
    assert before.keys() == after.keys()


def test_single_file_is_not_overwritten(moshi_flax, layouts: dict, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(layouts["flax"], folder)
    result = moshi_flax("convert", folder / "flax_model.safetensors", folder, "--to", "pt", "--overwrite")
    assert result.code == 2 and "DST" in result.err
    assert (folder / "flax_model.safetensors").exists()


@pytest.fixture
def mimi(layouts: dict, tmp_path: Path) -> Path:
    """A Mimi in PyTorch layout with a file beside it that is taken along, and one that is not."""
    folder = tmp_path / "source" / "mimi"
    shutil.copytree(layouts["upstream"], folder)
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "training.log").write_text("loss 1.0")
    return folder


@pytest.mark.filterwarnings(UPLOAD_WARNING)
def test_push_to_hub(moshi_flax, mimi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    destination = tmp_path / "pt"
    destination.mkdir()
    (destination / "notes.txt").write_text("mine")
    options = ("--to", "pt", "--max-shard-size", "40KB", "--overwrite", "--push-to-hub", "someone/new")
    with hub_server() as hub, hub.client(tmp_path / "home"), monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", hub.token)
        result = moshi_flax("convert", mimi, destination, *options)
        assert result.code == 0, result.err
        assert f"{hub.endpoint}/someone/new/commit/" in result.err
        files = hub.files("someone/new")
    shards = {name for name in files if name.endswith(".safetensors")}
    assert len(shards) == 5
    others = {"config.json", "model.safetensors.index.json", "preprocessor_config.json", "README.md"}
    assert files.keys() == shards | others
    assert b'MimiModel.from_pretrained("someone/new")' in files["README.md"]


@pytest.mark.filterwarnings(UPLOAD_WARNING)
def test_push_to_a_private_repository(moshi_flax, mimi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with hub_server() as hub, hub.client(tmp_path / "home"), monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", hub.token)
        api = HfApi(token=hub.token)
        api.create_repo("someone/public")
        result = moshi_flax("convert", mimi, tmp_path / "new", "--push-to-hub", "someone/public", "--private")
        assert result.code == 2 and "'someone/public' is public" in result.err and result.err.count("\n") == 1
        assert not hub.files("someone/public") and not (tmp_path / "new").exists()
        result = moshi_flax("convert", mimi, tmp_path / "new", "--push-to-hub", "someone/secret", "--private")
        assert result.code == 0 and hub.repos["someone/secret"].private
    result = moshi_flax("convert", mimi, tmp_path / "newer", "--private")
    assert result.code == 2 and "--private: no effect without --push-to-hub" in result.err


def test_refused_upload_is_one_line(moshi_flax, layouts: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(self, *args: object, **options: object) -> None:
        raise HfHubHTTPError.__bases__[0]("no such host")

    monkeypatch.setattr(HfApi, "repo_info", refuse)
    result = moshi_flax("convert", layouts["pt"], tmp_path / "new", "--push-to-hub", "someone/new")
    assert result.code == 2 and "is written" in result.err and "no such host" in result.err
    assert (tmp_path / "new" / "flax_model.safetensors").exists()


def test_unreachable_hub_is_one_line(moshi_flax, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object, **options: object) -> None:
        raise HfHubHTTPError.__bases__[0]("no such host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    for command in (("convert", "someone/model", tmp_path / "new"), ("inspect", "someone/model")):
        result = moshi_flax(*command)
        assert result.code == 2 and result.err.count("\n") == 1 and "no such host" in result.err


@pytest.mark.parametrize("there", [True, False])
def test_failed_write_leaves_the_destination_alone(
    moshi_flax, mimi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
):
    destination = tmp_path / "target" / "model"
    if there:
        shutil.copytree(mimi, destination)
        (destination / "preprocessor_config.json").write_text("another one")
    before = {path: path.read_bytes() for path in destination.glob("*")}

    def full(*args: object, **options: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("transformers_moshi_flax.checkpoints.writing.save_file", full)
    result = moshi_flax("convert", mimi, destination, "--overwrite")
    assert result.code == 2 and "DST" in result.err and "No space left" in result.err
    assert {path: path.read_bytes() for path in destination.glob("*")} == before
    assert list(destination.parent.iterdir()) == ([destination] if there else [])


def test_overwrite_leaves_no_weights_of_the_other_layout(moshi_flax, mimi: Path, tmp_path: Path):
    destination = tmp_path / "target" / "model"
    shutil.copytree(mimi, destination)
    (destination / "notes.txt").write_text("mine")
    (destination / "preprocessor_config.json").write_text("another one")
    for layout, weights in (("flax", "flax_model.safetensors"), ("pt", "model.safetensors")):
        result = moshi_flax("convert", mimi, destination, "--overwrite", "--to", layout)
        assert result.code == 0 and result.err.count("\n") == 1
        assert [path.name for path in destination.glob("*.safetensors")] == [weights]
        assert (destination / "notes.txt").read_text() == "mine"
        assert (destination / "preprocessor_config.json").read_text() == "{}"
    assert list(destination.parent.iterdir()) == [destination]


KILLED = """
import os, signal, sys
from transformers_moshi_flax.checkpoints import replacing
from transformers_moshi_flax.cli import main

def dying(*paths):
    os.kill(os.getpid(), signal.SIGKILL)

replacing.os.rename = dying
main(sys.argv[1:])
"""


def test_killed_before_all_is_written(mimi: Path, layouts: dict, tmp_path: Path):
    """What was there is there, tokenizer and all; the next time, nothing is left of either."""
    destination = tmp_path / "target" / "model"
    shutil.copytree(layouts["flax"], destination)
    (destination / "preprocessor_config.json").write_text("another one")
    (destination / "vocab.json").write_text("of another one")
    (destination / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in destination.iterdir()}
    options = ["convert", str(mimi), str(destination), "--to", "pt", "--overwrite"]
    assert subprocess.run([sys.executable, "-c", KILLED, *options], timeout=300).returncode == -signal.SIGKILL
    assert {path: path.read_bytes() for path in destination.iterdir()} == before
    (left,) = [path for path in destination.parent.iterdir() if path != destination]
    assert {"model.safetensors", "preprocessor_config.json"} < {path.name for path in (left / "new").iterdir()}
    with pytest.raises(SystemExit, match=r"^0$"):
        main(options)
    assert list(destination.parent.iterdir()) == [destination]
    names = {"config.json", "model.safetensors", "notes.txt", "preprocessor_config.json"}
    assert {path.name for path in destination.iterdir()} == names
    assert (destination / "preprocessor_config.json").read_text() == "{}"


def test_into_the_current_directory(moshi_flax, mimi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    destination = tmp_path / "here"
    shutil.copytree(mimi, destination)
    monkeypatch.chdir(destination)
    assert moshi_flax("convert", mimi, ".", "--overwrite").code == 0
    names = {"config.json", "flax_model.safetensors", "preprocessor_config.json", "training.log"}
    assert {path.name for path in Path.cwd().iterdir()} == names


def test_broken_weights_leave_the_destination_alone(moshi_flax, tmp_path: Path):
    broken = tmp_path / "broken"
    shutil.copytree(RANDOM_MODEL, broken)
    (broken / "model.safetensors").write_bytes((RANDOM_MODEL / "model.safetensors").read_bytes()[:1000])
    result = moshi_flax("convert", broken, tmp_path / "new")
    assert result.code == 2 and result.err.count("\n") == 1 and "SRC" in result.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("architecture", ["MimiModel", None])
def test_mimi_alone(moshi_flax, tmp_path: Path, architecture: str | None):
    config = json.loads((RANDOM_MODEL / "config.json").read_text())["audio_encoder_config"]
    source = tmp_path / "mimi"
    source.mkdir()
    weights = load_file(RANDOM_MODEL / "model.safetensors")
    prefix = "audio_encoder."
    mimi = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    save_file(mimi, source / "model.safetensors", metadata={"format": "pt"})
    config["architectures"] = [architecture] if architecture else None
    (source / "config.json").write_text(json.dumps(config))
    result = moshi_flax("convert", source, tmp_path / "flax")
    assert result.code == 0, result.err
    assert "FlaxMimiModel" in result.err


def test_quantize(moshi_flax, moshi: dict, tmp_path: Path):
    """To int8 and to floats again; no option is needed to run it, ``inspect`` and ``verify`` tell what it is."""
    result = moshi_flax("convert", moshi["pt"], tmp_path / "int8", "--quantize", "int8")
    assert result.code == 0 and "Flax layout, int8 (8 bits, a scale for each output)" in result.err
    shown = moshi_flax("inspect", tmp_path / "int8")
    assert shown.code == 0 and "93 layers, int8 (8 bits, a scale for each output)" in " ".join(shown.out.split())
    report = json.loads(moshi_flax("inspect", tmp_path / "int8", "--json").out)
    quantization = {"kind": "int8", "bits": 8, "group_size": None, "skip": [], "offsets": False}
    quantization |= {
        "double_quantization": False,
        "layers": 93,
        "bits_per_weight": report["quantization"]["bits_per_weight"],
    }
    assert report["quantization"] == quantization and report["fits"] is True
    assert json.loads(moshi_flax("inspect", moshi["pt"], "--json").out)["quantization"] is None

    assert moshi_flax("convert", moshi["flax"], tmp_path / "again", "--quantize", "int8").code == 0
    assert moshi_flax("verify", tmp_path / "int8", tmp_path / "again").code == 0
    tensors = load_file(tmp_path / "again" / "flax_model.safetensors")
    tensors["decoder.lm_head.kernel_int8"][0, 0] ^= 1
    save_file(tensors, tmp_path / "again" / "flax_model.safetensors", metadata={"format": "flax"})
    found = json.loads(moshi_flax("verify", tmp_path / "int8", tmp_path / "again", "--no-outputs", "--json").out)
    assert [difference["path"] for difference in found["differences"]] == ["decoder/lm_head/kernel_int8"]

    assert moshi_flax("convert", tmp_path / "int8", tmp_path / "pt", "--to", "pt", "--quantize", "none").code == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (moshi["pt"], tmp_path / "pt"))
    assert before.keys() == after.keys()
    key = "decoder.lm_head.weight"
    steps = np.abs(before[key]).max(axis=1, keepdims=True) / 127
    assert (np.abs(before[key] - after[key]) <= 0.501 * steps).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quantize", "int8", "--to", "pt"), "--quantize int8: not with --to pt"),
        (("--quantize", "nf4"), "`group_size`=32 does not divide the inputs of"),
        (("--quantize", "none"), "the weights of this model are not quantized"),
        (("--quantize", "int3"), "int3"),
    ],
)
def test_quantize_is_refused(moshi_flax, moshi: dict, tmp_path: Path, options: tuple, message: str):
    result = moshi_flax("convert", moshi["flax"], tmp_path / "new", *options)
    assert result.code == 2 and message in " ".join(result.err.split())
    assert not (tmp_path / "new").exists()


def test_quantized_weights_in_other_layouts(moshi_flax, moshi: dict, tmp_path: Path):
    assert moshi_flax("convert", moshi["flax"], tmp_path / "int8", "--quantize", "int8").code == 0
    for options in (("--to", "pt"), ("--to", "kyutai"), ("--quantize", "int8")):
        result = moshi_flax("convert", tmp_path / "int8", tmp_path / "new", *options)
        assert result.code == 2 and "the weights are quantized" in " ".join(result.err.split())


def test_candle(moshi_flax, tmp_path: Path):
    result = moshi_flax("convert", RANDOM_MODEL, tmp_path / "candle", "--to", "candle", "--quantize", "int8")
    assert result.code == 0 and "in Kyutai's candle layout, int8 (8 bits, groups of 32" in " ".join(result.err.split())
    assert (tmp_path / "candle" / "model.q8.gguf").read_bytes().startswith(b"GGUF")
    assert moshi_flax("convert", tmp_path / "candle", tmp_path / "flax", "--from", "kyutai").code == 0
    assert json.loads((tmp_path / "flax" / "config.json").read_text())["quantization_config"]["group_size"] == 32
    result = moshi_flax("convert", RANDOM_MODEL, tmp_path / "nf4", "--to", "candle", "--quantize", "nf4")
    assert result.code == 2 and "--quantize nf4: not with --to candle" in " ".join(result.err.split())


def test_double_quantization(moshi_flax, tmp_path: Path):
    """Told by ``inspect`` with what it takes, kept by another conversion, and compared."""
    options = ("--quantize", "nf4", "--double-quantization")
    folders = plain, double, again = [tmp_path / name for name in ("plain", "double", "again")]
    for source, target, chosen in (
        (RANDOM_MODEL, plain, options[:2]),
        (RANDOM_MODEL, double, options),
        (double, again, ()),
    ):
        assert moshi_flax("convert", source, target, *chosen).code == 0
    told = [json.loads(moshi_flax("inspect", each, "--json").out)["quantization"] for each in folders]
    assert [each["double_quantization"] for each in told] == [False, True, True]
    # of narrow layers: 4 bits of a code; of 32 of them 32, or 8 and, of at most 256 outputs, 32 bits of their step
    assert told[0]["bits_per_weight"] == 5 and 4.25 < told[1]["bits_per_weight"] < 4.5
    text = " ".join(moshi_flax("inspect", double).out.split())
    assert f"nf4 (4 bits, groups of 32 with scales in 8 bits), {told[1]['bits_per_weight']} bits a weight" in text
    assert moshi_flax("verify", double, again, "--no-outputs").code == 0
    tensors = load_file(again / "flax_model.safetensors")
    tensors["decoder.lm_head.scales_int8"][0, 0] ^= 1
    save_file(tensors, again / "flax_model.safetensors", metadata={"format": "flax"})
    found = json.loads(moshi_flax("verify", double, again, "--no-outputs", "--json").out)
    assert [difference["path"] for difference in found["differences"]] == ["decoder/lm_head/scales_int8"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--double-quantization: the scales of groups; give --quantize int4 or nf4"),
        (("--quantize", "int8"), "--double-quantization: the scales of groups; give --quantize int4 or nf4"),
        (("--quantize", "int4", "--to", "mlx"), "--double-quantization: not with --to mlx"),
    ],
)
def test_double_quantization_of_nothing(moshi_flax, tmp_path: Path, options: tuple, message: str):
    result = moshi_flax("convert", RANDOM_MODEL, tmp_path / "new", "--double-quantization", *options)
    assert result.code == 2 and message in " ".join(result.err.split())
    assert not (tmp_path / "new").exists()


def test_candle_without_the_package(moshi_flax, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Before the source is looked at."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    options = ("--to", "candle", "--quantize", "int8")
    result = moshi_flax("convert", "nowhere", tmp_path / "new", *options)
    assert result.code == 2 and "--to candle: model.q8.gguf is a GGUF file, which is w" in " ".join(result.err.split())
    assert not (tmp_path / "new").exists()


def test_a_quantized_checkpoint_runs_without_an_option(moshi_flax, tmp_path: Path):
    assert moshi_flax("convert", RANDOM_MODEL, tmp_path / "int8", "--quantize", "int8").code == 0
    greedy = ("--max-new-frames", 3, "--temperature", 0, "--depth-temperature", 0)
    result = moshi_flax("generate", "--model", tmp_path / "int8", "--output", tmp_path / "reply.wav", *greedy)
    assert result.code == 0, result.err
    record = json.loads((tmp_path / "reply.json").read_text("utf-8"))
    assert len(record["text_ids"]) == 3 and np.array(record["audio_codes"]).shape == (8, 2)


def test_a_language_model_there_and_back(moshi_flax, tmp_path: Path):
    """One class reads all of them; upstream's name of the model stays."""
    tiny_pair("qwen3", tmp_path / "pt")
    for source, made, to in (("pt", "flax", "flax"), ("flax", "back", "pt")):
        result = moshi_flax("convert", tmp_path / source, tmp_path / made, "--to", to)
        assert result.code == 0, result.err
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("pt", "back"))
    assert before.keys() == after.keys()
    assert all(after[key].tobytes() == value.tobytes() for key, value in before.items())
    result = moshi_flax("inspect", tmp_path / "flax", "--json")
    told = json.loads(result.out)
    assert result.code == 0 and told["fits"] is True
    assert json.loads((tmp_path / "flax/config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
