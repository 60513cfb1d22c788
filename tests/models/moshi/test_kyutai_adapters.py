"""Kyutai's adapters in both directions, against the ``moshi`` package: same logits, same bits, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from safetensors.torch import load_file, save_file

from tests.configs import tiny_mimi_config
from tests.hub_server import UPLOAD_WARNING, hub_server
from tests.models.moshi.test_kyutai import (
    OTHER_LM,
    OTHER_MIMI,
    TINY_LM,
    TINY_MIMI,
    Checkpoint,
    assert_logits_are_equal,
    edit_config,
    make_checkpoint,
)
from tests.torch_oracle import assert_close
from transformers_moshi_flax import FlaxMimiModel, FlaxMoshiForConditionalGeneration, LoraConfig
from transformers_moshi_flax.adapters.files import CONFIG, KYUTAI_CONFIG, KYUTAI_WEIGHTS, WEIGHTS

pytest.importorskip("moshi.models", reason="Kyutai's `moshi` package, the oracle, is not installed")
from moshi.models import loaders
from moshi.utils.compile import no_compile

pytestmark = pytest.mark.filterwarnings(UPLOAD_WARNING)

Moshi = FlaxMoshiForConditionalGeneration

LM = r"(decoder|depth_decoder)\..*"
"""All that Kyutai's adapters can change."""


@pytest.fixture(scope="module", params=[(TINY_LM, TINY_MIMI), (OTHER_LM, OTHER_MIMI)], ids=["tiny", "other"])
def either(request: Any, tmp_path_factory: Any) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("base") / "base", *request.param, seed=7)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: Any) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("base") / "base", TINY_LM, TINY_MIMI, seed=3)


@pytest.fixture
def model(tiny: Checkpoint) -> Moshi:
    return Moshi.from_kyutai(tiny.directory)


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """The oracle without its compiler, and without gradients."""
    with no_compile(), torch.no_grad():
        yield


def train(base: Checkpoint, folder: Path, also: tuple[str, ...] = (), dtype: torch.dtype = torch.float32) -> Path:
    """An adapter as ``moshi-finetune`` leaves it: the package's own layers, drawn anew, and the tables ``also``."""
    lm = loaders.get_lora_moshi(
        copy.deepcopy(base.lm), None, lora_rank=3, lora_scaling=0.7, dtype=torch.float32, fuse_lora=False
    )
    generator = torch.Generator().manual_seed(11)
    states = {
        key: (tensor.shape[-1] ** -0.5 * torch.randn(tensor.shape, generator=generator)).to(dtype)
        for key, tensor in lm.state_dict().items()
        if "lora" in key or key.startswith(also)
    }
    folder.mkdir(parents=True)
    save_file(states, folder / KYUTAI_WEIGHTS)
    shutil.copy(base.directory / "config.json", folder)
    edit_config(folder, lora=True, lora_rank=3, lora_scaling=0.7)
    return folder


def their_model(base: Checkpoint, adapter: Path, fuse_lora: bool = False) -> Any:
    """The model with an adapter, by the package's own way of loading it."""
    info = loaders.CheckpointInfo.from_hf_repo(
        "none",
        moshi_weights=base.directory / "moshi.safetensors",
        mimi_weights=base.directory / "mimi.safetensors",
        tokenizer=base.directory / "text.model",
        mimi_config_path=base.directory / "mimi.json",
        config_path=adapter / KYUTAI_CONFIG,
        lora_weights=adapter / KYUTAI_WEIGHTS,
    )
    return info.get_moshi(dtype=torch.float32, fuse_lora=fuse_lora)


def rank_of(adapter: Path) -> int:
    return json.loads((adapter / KYUTAI_CONFIG).read_text())["lora_rank"]


def assert_differ(changed: Any, base: Any) -> None:
    """The adapter has an effect on text and on all codebooks."""
    frames = torch.randint(0, 32, (1, base.num_codebooks, 6), generator=torch.Generator().manual_seed(0))
    before, after = base(frames), changed(frames)
    logits = [(before.text_logits, after.text_logits), *zip(before.logits.unbind(1), after.logits.unbind(1))]
    assert all((first - second).nan_to_num().abs().max() > 1e-2 for first, second in logits)


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    written, expected = load_file(ours / KYUTAI_WEIGHTS), load_file(theirs / KYUTAI_WEIGHTS)
    assert written.keys() == expected.keys()
    for key, tensor in expected.items():
        assert tensor.dtype == written[key].dtype and torch.equal(tensor, written[key]), key


# --------------------------------------------------------------------------------------------------------- equivalence


@pytest.mark.parametrize(
    "also", [(), ("emb.", "text_emb.", "depformer_emb.", "depformer_text_emb.")], ids=["", "embed"]
)
def test_an_adapter_of_the_package_is_read_and_written_to_the_bit(
    either: Checkpoint, also: tuple[str, ...], tmp_path: Path
) -> None:
    adapter = train(either, tmp_path / "adapter", also)
    model = Moshi.from_kyutai(either.directory)
    model.load_adapter(adapter)
    theirs = their_model(either, adapter)
    assert_logits_are_equal(theirs, model)
    assert_differ(theirs, either.lm)
    model.save_adapter(tmp_path / "back", format="kyutai")
    if "rope_concat" in either.lm.transformer.positional_embedding:
        return  # rows of queries and keys come in the order that the format usually has
    assert_same_tensors(tmp_path / "back", adapter)
    values = json.loads((tmp_path / "back" / KYUTAI_CONFIG).read_text())
    assert (values["lora"], values["lora_rank"], values["lora_scaling"]) == (True, 3, 0.7)


OURS: dict[str, tuple[dict[str, Any], int]] = {
    # queries, keys and values have an A of their own: three times the rank
    "all": ({"r": 2, "target_modules": LM}, 6),
    "values": ({"r": 2, "target_modules": ["decoder.model.layers.1.self_attn.v_proj.linear"]}, 2),
    "ranks": (
        {
            "r": 2,
            "target_modules": r"(decoder|depth_decoder)\..*(q_proj|k_proj|fc1|lm_head).*",
            "rank_pattern": {"k_proj.linear": 3, "lm_head": 4},
            "alpha_pattern": {"fc1": 3, "fc1.weight": 7},
            "lora_dropout": 0.1,
        },
        5,
    ),
    "whole": (
        {
            "r": 2,
            "target_modules": ["decoder.lm_head"],
            "modules_to_save": ["decoder.lm_head", "embed_tokens.1", "decoder.model.layers.0.self_attn.q_proj.linear"],
        },
        2,
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_the_package_loads_what_we_write(name: str, tiny: Checkpoint, model: Moshi, tmp_path: Path) -> None:
    fields, rank = OURS[name]
    model.add_adapter(LoraConfig(**{"lora_alpha": 5, "init_lora_weights": False, **fields}))
    leaves = model.adapter_leaves()
    model.set_adapter_leaves({path: leaf if "lora" in path else 1.5 * leaf for path, leaf in leaves.items()})
    model.save_adapter(tmp_path, format="kyutai")
    assert rank_of(tmp_path) == rank
    theirs = their_model(tiny, tmp_path, fuse_lora=name == "all")
    assert_logits_are_equal(theirs, model)
    assert_differ(theirs, tiny.lm)
    again = Moshi.from_kyutai(tiny.directory)
    again.load_adapter(tmp_path)
    assert again.peft_config["default"].lora_dropout == fields.get("lora_dropout", 0)
    again.save_adapter(tmp_path / "again", format="kyutai")
    assert_same_tensors(tmp_path / "again", tmp_path)
    model.merge_adapter()
    again.merge_adapter()
    merged = flatten_dict(again.params, sep="/")
    for path, leaf in flatten_dict(model.params, sep="/").items():
        assert_close(leaf, merged[path], 1e-6, path)


def test_from_kyutai_to_peft_and_back_is_exact(tiny: Checkpoint, model: Moshi, tmp_path: Path) -> None:
    """In bfloat16, as ``moshi-finetune`` writes, and with one table, whose name means the depth decoder's too."""
    adapter = train(tiny, tmp_path / "theirs", ("emb.0.",), torch.bfloat16)
    model.load_adapter(adapter)
    assert model.peft_config["default"].modules_to_save == ["embed_tokens.0"]
    model.save_adapter(tmp_path / "peft")
    other = Moshi.from_kyutai(tiny.directory)
    other.load_adapter(tmp_path / "peft")
    ours, theirs = model.adapter_leaves(), other.adapter_leaves()
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert leaf.dtype == theirs[path].dtype
        np.testing.assert_array_equal(leaf, theirs[path])
    other.save_adapter(tmp_path / "back", format="kyutai")
    written, expected = load_file(tmp_path / "back" / KYUTAI_WEIGHTS), load_file(adapter / KYUTAI_WEIGHTS)
    assert written.keys() - expected.keys() == {"depformer_emb.0.weight"}
    for key, tensor in expected.items():
        assert torch.equal(tensor, written[key]), key


def test_older_names(tiny: Checkpoint, model: Moshi, tmp_path: Path) -> None:
    """Projections of all codebooks in one tensor, which the package reads as well."""
    adapter = train(tiny, tmp_path / "adapter")
    joined: dict[str, list[torch.Tensor]] = {}
    for key, tensor in load_file(adapter / KYUTAI_WEIGHTS).items():
        head, _, tail = key.partition("_projs.")
        joined.setdefault(f"{head}_proj.{tail.partition('.')[2]}" if tail else key, []).append(tensor)
    (tmp_path / "older").mkdir()
    shutil.copy(adapter / KYUTAI_CONFIG, tmp_path / "older")
    save_file({key: torch.cat(tensors) for key, tensors in joined.items()}, tmp_path / "older" / KYUTAI_WEIGHTS)
    frames = torch.randint(0, 32, (1, tiny.lm.num_codebooks, 6), generator=torch.Generator().manual_seed(0))
    logits = [their_model(tiny, each)(frames).text_logits for each in (adapter, tmp_path / "older")]
    assert torch.equal(*logits)
    model.load_adapter(tmp_path / "older")
    model.save_adapter(tmp_path / "back", format="kyutai")
    assert_same_tensors(tmp_path / "back", adapter)


# -------------------------------------------------------------------------------------------------------------- places


def test_a_file_a_folder_and_the_hub(tiny: Checkpoint, model: Moshi, tmp_path: Path) -> None:
    adapter = train(tiny, tmp_path / "adapter")
    model.load_adapter(adapter / KYUTAI_WEIGHTS, "file")
    (adapter / KYUTAI_WEIGHTS).rename(adapter / "mine.safetensors")
    edit_config(adapter, lora_name="mine.safetensors")
    model.load_adapter(adapter, "named")
    with hub_server() as hub, hub.client(tmp_path / "home"):
        model.peft_config["named"].base_model_name_or_path = "tester/base"
        model.push_adapter_to_hub("tester/adapter", format="kyutai", token=hub.token)
        model.load_adapter("tester/adapter", "hub")
    expected = model.adapter_leaves("file")
    for name in ("named", "hub"):
        for path, leaf in model.adapter_leaves(name).items():
            np.testing.assert_array_equal(leaf, expected[path])


def test_one_format_replaces_the_other(model: Moshi, tmp_path: Path) -> None:
    model.add_adapter(LoraConfig(r=1, target_modules=["decoder.lm_head"]))
    (tmp_path / "notes.txt").write_text("mine")
    for format, files in (("kyutai", {KYUTAI_WEIGHTS, KYUTAI_CONFIG}), ("peft", {WEIGHTS, CONFIG})) * 2:
        model.save_adapter(tmp_path, format=format)
        assert {path.name for path in tmp_path.iterdir()} == {*files, "README.md", "notes.txt"}
    assert "in PEFT's format" in (tmp_path / "README.md").read_text()


def test_the_configuration_of_a_model_is_kept(model: Moshi, tmp_path: Path) -> None:
    model.add_adapter(LoraConfig(r=1, target_modules=["decoder.lm_head"]))
    (tmp_path / KYUTAI_CONFIG).write_text('{"model_type": "moshi"}')
    with pytest.raises(ValueError, match=r"has a config.json that is no adapter's: save the adapter into another"):
        model.save_adapter(tmp_path, format="kyutai")
    model.save_adapter(tmp_path)
    assert (tmp_path / KYUTAI_CONFIG).read_text() == '{"model_type": "moshi"}'


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_cannot_be_written_or_read(trained: Path, model: Moshi, tmp_path: Path) -> None:
    model.add_adapter(LoraConfig(r=1, target_modules=["encoder_transformer.layers.0.mlp.fc1"]))
    with pytest.raises(ValueError, match=r"changes Mimi .*save it in PEFT's format"):
        model.save_adapter(tmp_path / "a", format="kyutai")
    with pytest.raises(ValueError, match="format='candle' is none of 'peft', 'kyutai'"):
        model.save_adapter(tmp_path / "a", format="candle")
    mimi = FlaxMimiModel(tiny_mimi_config())
    mimi.add_adapter(LoraConfig(r=1, target_modules=["fc1"]))
    with pytest.raises(ValueError, match="of the whole of Moshi: take FlaxMoshiForConditionalGeneration"):
        mimi.save_adapter(tmp_path / "a", format="kyutai")
    with pytest.raises(ValueError, match="an adapter of Kyutai's, which is of the whole of Moshi"):
        mimi.load_adapter(trained, "b")
    assert not (tmp_path / "a").exists()


def change(adapter: Path, **tensors: torch.Tensor | None) -> None:
    kept = load_file(adapter / KYUTAI_WEIGHTS) | tensors
    save_file({key: tensor for key, tensor in kept.items() if tensor is not None}, adapter / KYUTAI_WEIGHTS)


def cut(adapter: Path) -> None:
    content = (adapter / KYUTAI_WEIGHTS).read_bytes()
    (adapter / KYUTAI_WEIGHTS).write_bytes(content[: len(content) // 2])


HEAD = "text_linear.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / KYUTAI_CONFIG).unlink(), "has no config.json, so it is no adapter in Kyutai's format"),
        (lambda path: (path / KYUTAI_CONFIG).write_text("{"), "config.json cannot be read"),
        (lambda path: (path / KYUTAI_WEIGHTS).unlink(), "has no lora.safetensors"),
        (cut, "damaged, incomplete or of another format"),
        (lambda path: edit_config(path, lora=False), r"of no adapter \(lora=False\).*moshi-finetune wrote"),
        (
            lambda path: edit_config(path, lora_rank=4),
            r"lora_rank=4 .*_A.weight has the shape \(3, 40\), not \(4, 40\)",
        ),
        (lambda path: edit_config(path, lora_rank=0), "lora_rank=0 .* must be a whole number, at least 1"),
        (lambda path: edit_config(path, lora_scaling="2"), "lora_scaling='2' .* must be a finite number"),
        (lambda path: edit_config(path, lora_name="../lora.safetensors"), "lora_name='../lora.safetensors'"),
        (lambda path: edit_config(path, num_heads=2), "for another model than this, of num_attention_heads=2, not 4"),
        (lambda path: edit_config(path, depformer_num_layers=2), "depth_decoder_config.num_hidden_layers=2, not 3"),
        (lambda path: edit_config(path, max_period=1000), "rope_theta=1000, not 100"),
        (lambda path: edit_config(path, norm_emb=True), "for another model than this: .*norm_emb"),
        (lambda path: change(path, **{HEAD: None}), f"lacks 1 of the 102 matrices, .*: {HEAD}"),
        (lambda path: change(path, **{HEAD: torch.zeros(3, 39)}), r"text_linear.*\(3, 39\), not \(3, 40\)"),
        (lambda path: change(path, **{HEAD: torch.full((3, 40), torch.nan)}), "120 of its 120 numbers .* not finite"),
        (lambda path: change(path, **{HEAD: torch.zeros(3, 40, dtype=torch.int8)}), f"{HEAD} are not floating-point"),
        (lambda path: change(path, extra=torch.zeros(2)), "has tensors that the model has no place for: extra"),
        (lambda path: change(path, **{"emb.0.weight": torch.zeros(9, 40)}), r"emb.0.weight has the shape \(9, 40\)"),
    ],
)
def test_damage_is_told(
    trained: Path, unloaded: Moshi, damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(trained, tmp_path / "adapter"))
    damage(adapter)
    with pytest.raises(ValueError, match=message):
        unloaded.load_adapter(adapter)
    assert not unloaded.peft_config


@pytest.fixture(scope="module")
def trained(tiny: Checkpoint, tmp_path_factory: Any) -> Path:
    return train(tiny, tmp_path_factory.mktemp("trained") / "adapter")


@pytest.fixture(scope="module")
def unloaded(tiny: Checkpoint) -> Moshi:
    return Moshi.from_kyutai(tiny.directory)


def test_other_weights_are_refused(model: Moshi, tmp_path: Path) -> None:
    """Which is known of what we wrote; and checksums tell of a flipped bit."""
    model.add_adapter(LoraConfig(r=1, target_modules=["decoder.lm_head"]))
    model.save_adapter(tmp_path, format="kyutai")
    other = Moshi(model.config, seed=9)
    with pytest.raises(ValueError, match=r"was made for other weights than these: .*verify_base=False"):
        other.load_adapter(tmp_path)
    other.load_adapter(tmp_path, verify_base=False)
    content = bytearray((tmp_path / KYUTAI_WEIGHTS).read_bytes())
    content[-5] ^= 255
    (tmp_path / KYUTAI_WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        model.load_adapter(tmp_path, "again")
