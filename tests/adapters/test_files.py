"""Adapters' files, with PEFT itself as the oracle in both directions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.numpy import load_file, save_file
from transformers import MoshiForConditionalGeneration

from tests.configs import tiny_moshi_config
from tests.hub_server import UPLOAD_WARNING, hub_server
from tests.torch_oracle import assert_close, randomize
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration, LoraConfig
from transformers_moshi_flax.adapters.files import CONFIG, WEIGHTS
from transformers_moshi_flax.checkpoints.files import CheckpointNotFoundError

peft = pytest.importorskip("peft", reason="PEFT, the oracle of its own format, is not installed")

pytestmark = [
    pytest.mark.filterwarnings(UPLOAD_WARNING),
    # it looks for modules that patterns match, and not for parameters, to which it applies them all the same
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    # PEFT asks transformers by a name that it is about to drop
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

Model = FlaxMoshiForConditionalGeneration
FRAMES = 5

CONFIGS: dict[str, dict[str, Any]] = {
    "all": {"target_modules": "all-linear"},
    "dropout": {"target_modules": "all-linear", "lora_dropout": 0.2},
    "backbone": {"r": 2, "target_modules": r"decoder\.model\..*(q_proj|v_proj)\.linear", "use_rslora": True},
    "codebooks": {"target_parameters": ["mlp.fc1.weight", "depth_decoder.lm_heads.weight"], "exclude_modules": None},
    "ranks": {
        "target_modules": "all-linear",
        "rank_pattern": {"fc1": 5, "fc2.weight": 2},
        "alpha_pattern": {"layers.1.mlp.fc2": 1, "fc2.weight": 3},
    },
    "whole": {
        "target_modules": ["q_proj.linear"],
        "modules_to_save": ["decoder.lm_head", "decoder.model.embed_tokens"],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the base model."""
    folder = tmp_path_factory.mktemp("base")
    randomize(MoshiForConditionalGeneration(tiny_moshi_config())).save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder: Path) -> Model:
    return Model.from_pretrained(folder)


def adapter(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 5, "init_lora_weights": False, **fields})


def inputs(config: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, config.audio_vocab_size, (2, 2, config.num_codebooks, FRAMES))
    return {
        "input_ids": rng.integers(0, config.vocab_size, (2, FRAMES)),
        "user_audio_codes": codes[0],
        "moshi_audio_codes": codes[1],
    }


def of_torch(model: Any, config: Any) -> list[np.ndarray]:
    """Text logits and hidden states of the backbone, and logits of the depth decoder."""
    given = {name: torch.from_numpy(array) for name, array in inputs(config).items()}
    ids = given["moshi_audio_codes"][:, :, 0]
    with torch.no_grad():
        found = model(**given)
        hidden = found.last_hidden_state[:, :1]
        text = given["input_ids"][:, :1]
        depth = model.depth_decoder(input_ids=torch.cat([text, ids[:, :-1]], 1), last_hidden_state=hidden)
    return [each.numpy() for each in (found.logits, found.last_hidden_state, depth.logits)]


def of_flax(model: Model) -> list[Any]:
    given = {name: array.astype(np.int32) for name, array in inputs(model.config).items()}
    found = model(**given)
    ids = np.concatenate([given["input_ids"][:, :1], given["moshi_audio_codes"][:, :-1, 0]], 1)
    depth = model.depth_decoder(ids, found.last_hidden_state[:, :1])
    return [found.logits, found.last_hidden_state, depth.logits]


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_loads_what_we_write_and_we_what_peft_writes(
    name: str, folder: Path, model: Model, tmp_path: Path
) -> None:
    fields = CONFIGS[name]
    codec = r"audio_encoder\..*" if "exclude_modules" not in fields else fields["exclude_modules"]
    if isinstance(fields.get("target_modules"), list) or fields.get("target_parameters"):
        fields = {**fields, "exclude_modules": codec}
    if name == "codebooks":
        fields = {**fields, "exclude_modules": r"(audio_encoder|decoder)\..*"}
    model.add_adapter(adapter(**fields))
    if name == "whole":
        leaves = model.adapter_leaves()
        model.set_adapter_leaves({path: leaf * 1.5 if "lora" not in path else leaf for path, leaf in leaves.items()})
    expected = of_flax(model)
    model.save_adapter(tmp_path / "ours")
    base = MoshiForConditionalGeneration.from_pretrained(folder).eval()
    plain = of_torch(base, model.config)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")).eval()
    found = of_torch(theirs, model.config)
    for ours, other in zip(expected, found):
        assert_close(ours, other, 1e-5, name)
    assert any(not np.allclose(before, after, atol=1e-3) for before, after in zip(plain, found))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model.load_adapter(tmp_path / "theirs", "again")
    for ours, other in zip(of_flax(model), expected):
        np.testing.assert_array_equal(ours, other)
    written, rewritten = (load_file(tmp_path / each / WEIGHTS) for each in ("ours", "theirs"))
    assert written.keys() == rewritten.keys()
    for key, tensor in written.items():
        np.testing.assert_array_equal(tensor, rewritten[key])


def test_an_adapter_that_peft_has_made(folder: Path, model: Model, tmp_path: Path) -> None:
    """Its own targets: ends of names, and parameters of the layers that are one a codebook."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=r".*decoder\.model\.layers\.\d+\.(self_attn\.[qkvo]_proj\.linear|mlp\.fc[12])",
        target_parameters=["depth_decoder.layers.0.mlp.fc1.weight", "input_projections.weight"],
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    theirs = peft.get_peft_model(MoshiForConditionalGeneration.from_pretrained(folder).eval(), config)
    theirs.save_pretrained(str(tmp_path))
    model.load_adapter(tmp_path)
    for ours, other in zip(of_flax(model), of_torch(theirs, model.config)):
        assert_close(ours, other, 1e-5)


def test_there_and_back_is_exact(model: Model, folder: Path, tmp_path: Path) -> None:
    model.add_adapter(adapter(target_modules="all-linear", scaling=0.37, lora_dropout=0.1))
    model.save_adapter(tmp_path / "a")
    other = Model.from_pretrained(folder)
    other.load_adapter(tmp_path / "a", "b")
    assert other.peft_config["b"].lora_dropout == 0.1
    ours, theirs = model.adapter_leaves(), other.adapter_leaves("b")
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path])
    assert "LoRA adapter of" in (tmp_path / "a" / "README.md").read_text()
    assert other.peft_config["b"].base_model_name_or_path == str(folder)


def test_an_adapter_is_replaced_as_a_whole(model: Model, tmp_path: Path) -> None:
    model.add_adapter(adapter(target_modules=["decoder.lm_head"]), "a")
    model.save_adapter(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    model.add_adapter(adapter(r=2, target_modules=["decoder.lm_head"]), "b")
    model.save_adapter(tmp_path / "a")
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["r"] == 2
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"


@pytest.fixture
def written(model: Model, tmp_path: Path) -> Path:
    model.add_adapter(adapter(target_modules=["decoder.lm_head", "depth_decoder.lm_heads"]), "good")
    model.save_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(written: Path, **fields: Any) -> None:
    path = written / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


HEAD = "base_model.model.decoder.lm_head.lora_A.weight"


def replace_head(written: Path, tensor: np.ndarray | None) -> None:
    """Without checksums, which would tell of the change first."""
    kept = {**load_file(written / WEIGHTS), HEAD: tensor}
    save_file({key: each for key, each in kept.items() if each is not None}, written / WEIGHTS)


def cut(written: Path) -> None:
    content = (written / WEIGHTS).read_bytes()
    (written / WEIGHTS).write_bytes(content[: len(content) // 2])


def flip(written: Path) -> None:
    content = bytearray((written / WEIGHTS).read_bytes())
    content[-5] ^= 255
    (written / WEIGHTS).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / CONFIG).unlink(), "has no adapter_config.json, so it is no adapter"),
        (lambda path: (path / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
        (lambda path: (path / CONFIG).write_text("{"), "adapter_config.json cannot be read"),
        (cut, "damaged, incomplete or of another format"),
        (flip, "checksum"),
        (lambda path: change(path, r=4), r"has the shape \(3, 64\), but the model and `r`=4 want \(4, 64\)"),
        (lambda path: change(path, use_dora=True), "`use_dora`=True"),
        (lambda path: change(path, target_modules=["decoder.lm_haed"]), "does not fit the model: .*did you mean"),
        (lambda path: change(path, target_parameters=None), "has tensors that adapter_config.json has no place for"),
        (lambda path: replace_head(path, None), "lacks base_model.model.decoder.lm_head.lora_A.weight"),
        (
            lambda path: replace_head(path, np.full((3, 64), np.nan, np.float32)),
            "192 of its 192 numbers .* are not finite",
        ),
    ],
)
def test_damage_is_told(written: Path, folder: Path, damage: Any, message: str) -> None:
    damage(written)
    model = Model.from_pretrained(folder)
    with pytest.raises((ValueError, CheckpointNotFoundError), match=message):
        model.load_adapter(written)
    assert not model.peft_config


def test_other_weights_are_refused(written: Path, model: Model, folder: Path) -> None:
    other = Model(model.config, seed=9)
    with pytest.raises(ValueError, match=r"was made for other weights than these \(for .*base.*verify_base=False"):
        other.load_adapter(written)
    other.load_adapter(written, verify_base=False)
    half = Model.from_pretrained(folder, param_dtype="bfloat16")
    half.load_adapter(written)


def test_to_the_hub_and_back(model: Model, folder: Path, tmp_path: Path) -> None:
    model.add_adapter(adapter(target_modules="all-linear", base_model_name_or_path="tester/base"))
    expected = of_flax(model)
    with hub_server() as hub, hub.client(tmp_path / "home"):
        model.push_adapter_to_hub("tester/adapter", token=hub.token)
        files = HfApi().list_repo_files("tester/adapter")
        assert {CONFIG, WEIGHTS, "README.md"} <= set(files)
        other = Model.from_pretrained(folder)
        other.load_adapter("tester/adapter")
    for ours, theirs in zip(of_flax(other), expected):
        np.testing.assert_array_equal(ours, theirs)


def test_a_base_that_others_have_not_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outputs" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    model = Model.from_pretrained(folder)
    model.add_adapter(adapter(target_modules="all-linear"))
    with hub_server() as hub, hub.client(tmp_path / "home"):
        # where it was loaded from, a path that is none here, and one that looks like an id
        for base in (None, "./elsewhere", "outputs/model"):
            with pytest.raises(ValueError, match=r"is a directory, which others have not: pass base_model_"):
                model.push_adapter_to_hub("tester/adapter", token=hub.token, base_model_name_or_path=base)
        assert not HfApi().repo_exists("tester/adapter")
        model.push_adapter_to_hub("tester/adapter", token=hub.token, base_model_name_or_path="tester/base")
        read = Path(HfApi().hf_hub_download("tester/adapter", CONFIG)).read_text()
    assert json.loads(read)["base_model_name_or_path"] == "tester/base" and str(folder) not in read


def test_loading_needs_no_copy_of_the_folder(written: Path, folder: Path, tmp_path: Path) -> None:
    """The arrays are the model's own: what happens to the files later is of no concern."""
    model = Model.from_pretrained(folder)
    model.load_adapter(written)
    before = of_flax(model)
    shutil.rmtree(written)
    model.disable_adapters()
    model.enable_adapters()
    for ours, theirs in zip(of_flax(model), before):
        np.testing.assert_array_equal(ours, theirs)
