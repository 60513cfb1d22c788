"""Kyutai's weights in int8, in both directions, against the ``moshi`` package: same codes, same logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from safetensors.torch import load_file, save_file

from tests.torch_oracle import assert_close
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration, QuantizationConfig
from transformers_moshi_flax.models.moshi import kyutai_flax_moshi as of_moshi
from transformers_moshi_flax.models.moshi.kyutai_flax_moshi import find_kyutai_files

pytest.importorskip("moshi.models", reason="Kyutai's `moshi` package, the oracle, is not installed")
from moshi.models import loaders
from moshi.utils.compile import no_compile

from tests.models.moshi.test_kyutai import (
    TINY_LM,
    TINY_MIMI,
    Checkpoint,
    assert_logits_are_equal,
    assert_same_bits,
    edit_config,
    make_checkpoint,
    published,
)

Moshi = FlaxMoshiForConditionalGeneration
Q8 = QuantizationConfig("int8", skip=["audio_encoder"])
State = dict[str, torch.Tensor]
HEAD = "text_linear.weight"


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """The oracle without its compiler, and without gradients."""
    with no_compile(), torch.no_grad():
        yield


def quantized(lm: Any) -> tuple[State, State]:
    """The state of a model in int8, and that of the floats which it stands for."""
    linear = {f"{name}.weight" for name, each in lm.named_modules() if isinstance(each, torch.nn.Linear)}
    codes, floats = {}, {}
    for key, tensor in lm.state_dict().items():
        codes[key] = floats[key] = tensor
        if key in linear:
            largest = tensor.abs().amax(1)
            codes[key], codes[f"{key}_scb"] = (127 * tensor / largest[:, None]).round().to(torch.int8), largest
            floats[key] = (codes[key].double() * largest[:, None].double() / 127).float()
    return codes, floats


def fused(state: State) -> State:
    """The names of the published floats, those of the scales as well."""
    scales = {key.removesuffix("_scb"): tensor for key, tensor in state.items() if key.endswith("_scb")}
    others = {key: tensor for key, tensor in state.items() if not key.endswith("_scb")}
    return {**published(others), **{f"{key}_scb": tensor for key, tensor in published(scales).items()}}


def fused_otherwise(state: State) -> State:
    return {key.replace("in_proj_weight", "in_proj.weight"): tensor for key, tensor in fused(state).items()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: Any) -> Checkpoint:
    """A checkpoint in int8, with the model of the floats that it stands for. Not to be changed."""
    made = make_checkpoint(tmp_path_factory.mktemp("kyutai") / "source", TINY_LM, TINY_MIMI, seed=5)
    codes, floats = quantized(made.lm)
    made.lm.load_state_dict(floats)
    save_file(fused(codes), made.directory / "moshi.safetensors")
    edit_config(made.directory, quantize=True)
    return made


@pytest.fixture
def copied(tiny: Checkpoint, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to change."""
    return Path(shutil.copytree(tiny.directory, tmp_path / "copied"))


def change(folder: Path, edit: Callable[[State], Any]) -> None:
    tensors = load_file(folder / "moshi.safetensors")
    edit(tensors)
    save_file(tensors, folder / "moshi.safetensors")


@pytest.fixture(scope="module")
def model(tiny: Checkpoint) -> Moshi:
    return Moshi.from_kyutai(tiny.directory, verify=True)


# ------------------------------------------------------------------------------------------------------------- reading


def test_logits_are_those_of_the_floats(tiny: Checkpoint, model: Moshi) -> None:
    assert model.quantization == Q8
    assert_logits_are_equal(tiny.lm, model)


def test_codes_are_copied(tiny: Checkpoint, model: Moshi) -> None:
    """All linear layers of the language model, and no other leaf."""
    tensors, leaves = load_file(tiny.directory / "moshi.safetensors"), flatten_dict(model.params, sep="/")
    np.testing.assert_array_equal(leaves["decoder/lm_head/kernel_int8"], tensors[HEAD].numpy().T)
    np.testing.assert_array_equal(leaves["decoder/lm_head/scales"], tensors[f"{HEAD}_scb"].numpy()[None] / 127)
    kernels = {path for path, leaf in leaves.items() if path.endswith("/kernel") and leaf.ndim == 2}
    assert kernels and all(path.startswith("audio_encoder/") for path in kernels)
    ours = sum(leaf.size for path, leaf in leaves.items() if path.endswith("/kernel_int8"))
    assert ours == sum(tensor.numel() for tensor in tensors.values() if tensor.dtype == torch.int8)
    for codebook in range(TINY_LM["n_q"]):
        np.testing.assert_array_equal(leaves[f"embed_tokens/{codebook}/embedding"], tensors[f"emb.{codebook}.weight"])


@pytest.mark.parametrize("renamed", [dict, fused_otherwise])
def test_names_of_other_releases(tiny: Checkpoint, copied: Path, model: Moshi, renamed: Callable) -> None:
    apart = {}
    for key, tensor in load_file(copied / "moshi.safetensors").items():
        projection = key.replace("_proj_weight", "_proj.weight")
        depth = key.startswith("depformer.layers.") and "_proj" in key
        parts = tensor.chunk(TINY_LM["dep_q"] if depth else 1)
        for index, part in enumerate(parts):
            apart[projection.replace("_proj.", f"_projs.{index}.")] = part.contiguous()
    save_file(renamed(apart), copied / "moshi.safetensors")
    assert_same_bits(Moshi.from_kyutai(copied).params, model.params)


def test_dtypes(copied: Path, model: Moshi) -> None:
    """The scales stay float32, and say nothing of what the others are."""
    floating = {torch.float32: torch.bfloat16}
    for name in ("moshi.safetensors", "mimi.safetensors"):
        tensors = load_file(copied / name)
        kept = {
            key: value if key.endswith("_scb") else value.to(floating.get(value.dtype, value.dtype))
            for key, value in tensors.items()
        }
        save_file(kept, copied / name)
    half = Moshi.from_kyutai(copied)
    assert half.dtype == jnp.bfloat16
    kinds = {path[-1]: leaf.dtype.name for path, leaf in flatten_dict(half.params["decoder"]).items()}
    assert kinds == {"kernel_int8": "int8", "scales": "float32", "scale": "bfloat16", "embedding": "bfloat16"}
    wide = Moshi.from_kyutai(copied, jnp.float32)
    assert_same_bits(wide.params["decoder"]["lm_head"], model.params["decoder"]["lm_head"])


def test_the_floats_of_it(tiny: Checkpoint, tmp_path: Path) -> None:
    """Dequantized, and written as floats that the package loads."""
    model = Moshi.from_kyutai(tiny.directory).dequantize()
    model.save_kyutai(tmp_path)
    assert "quantize" not in json.loads((tmp_path / "config.json").read_text())
    state = loaders.get_moshi_lm(tmp_path / of_moshi.MOSHI_NAME, TINY_LM, dtype=torch.float32).state_dict()
    for key, tensor in tiny.lm.state_dict().items():
        assert_close(state[key], tensor, 1e-6, key)


def test_without_a_config_json(copied: Path) -> None:
    """By the name that the published file has."""
    (copied / "config.json").unlink()
    (copied / "moshi.safetensors").rename(copied / of_moshi.MOSHI_Q8_NAME)
    (copied / "mimi.safetensors").rename(copied / of_moshi.MIMI_NAME)
    assert find_kyutai_files(copied).moshi_weights.name == of_moshi.MOSHI_Q8_NAME


# ------------------------------------------------------------------------------------------------------------- writing


def test_what_is_written_is_what_was_read(tiny: Checkpoint, model: Moshi, tmp_path: Path) -> None:
    model.save_kyutai(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["quantize"] is True and written["moshi_name"] == of_moshi.MOSHI_Q8_NAME
    theirs, ours = load_file(tiny.directory / "moshi.safetensors"), load_file(tmp_path / of_moshi.MOSHI_Q8_NAME)
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        # of two magnitudes that make the same scale one is written
        tolerance = 2**-23 * tensor.abs() if key.endswith("_scb") else torch.zeros(1)
        assert ((ours[key].double() - tensor.double()).abs() <= tolerance).all(), key
    assert_same_bits(Moshi.from_kyutai(tmp_path).params, model.params)


def test_there_and_back_of_our_own_codes(tiny: Checkpoint, model: Moshi, tmp_path: Path) -> None:
    """And over floats that lie there, whose file goes."""
    floats = Moshi.from_kyutai(tiny.directory).dequantize()
    floats.save_kyutai(tmp_path)
    floats.quantize(Q8)
    floats.save_kyutai(tmp_path)
    assert not (tmp_path / of_moshi.MOSHI_NAME).exists() and (tmp_path / of_moshi.MOSHI_Q8_NAME).exists()
    before, after = (flatten_dict(each.params) for each in (floats, Moshi.from_kyutai(tmp_path)))
    for path, leaf in before.items():
        # not every scale is 1/127 of a float
        np.testing.assert_allclose(after[path], leaf, rtol=2**-22 if path[-1] == "scales" else 0)
    floats.dequantize().save_kyutai(tmp_path)
    assert not (tmp_path / of_moshi.MOSHI_Q8_NAME).exists() and len(list(tmp_path.iterdir())) == 4


def test_the_package_computes_with_what_we_write(tiny: Checkpoint, model: Moshi, tmp_path: Path) -> None:
    """It rounds the activations to int8 as well."""
    pytest.importorskip("bitsandbytes", reason="what the `moshi` package multiplies int8 with")
    model.save_kyutai(tmp_path)
    values = {**TINY_LM, "quantize": True}
    theirs = loaders.get_moshi_lm(tmp_path / of_moshi.MOSHI_Q8_NAME, values, dtype=torch.float32)
    frames = torch.randint(0, 32, (1, theirs.num_codebooks, 6), generator=torch.Generator().manual_seed(0))
    found, floats = theirs(frames), tiny.lm(frames)
    assert_close(found.text_logits.float(), floats.text_logits, 0.05)
    assert_close(found.logits[found.mask].float(), floats.logits[found.mask], 0.1)


@pytest.mark.parametrize(
    "quantization",
    [
        QuantizationConfig("int8"),
        QuantizationConfig("int8", group_size=2, skip=["audio_encoder"]),
        QuantizationConfig("int8", skip=["audio_encoder", "lm_head"]),
        QuantizationConfig("nf4", group_size=2, skip=["audio_encoder"]),
    ],
)
def test_other_grids_are_not_written(tiny: Checkpoint, tmp_path: Path, quantization: QuantizationConfig) -> None:
    model = Moshi.from_kyutai(tiny.directory).dequantize().quantize(quantization)
    with pytest.raises(ValueError, match=r"save_kyutai: the weights are quantized, .* but 'moshi' has int8 .*"):
        model.save_kyutai(tmp_path)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda all: all.pop(f"{HEAD}_scb"), f"{HEAD} is int8, but there is no {HEAD}_scb"),
        (lambda all: all.pop(HEAD), f"{HEAD}_scb, the scales of an int8 matrix, but {HEAD} is not there"),
        (lambda all: all.update({HEAD: all[HEAD].float()}), f"but {HEAD} is float32"),
        (lambda all: all.update({HEAD: all[HEAD][0]}), rf"but {HEAD} is int8 \(40,\)"),
        (lambda all: all.update({f"{HEAD}_scb": torch.ones(49)}), rf"{HEAD}_scb is float32 \(49,\), but the rows"),
        (lambda all: all.update({f"{HEAD}_scb": torch.ones(50, 1)}), rf"{HEAD}_scb is float32 \(50, 1\), but the"),
        (lambda all: all.update({f"{HEAD}_scb": torch.ones(50, dtype=torch.int8)}), f"{HEAD}_scb is int8"),
        (
            lambda all: all.update({HEAD: all[HEAD].float() * all.pop(f"{HEAD}_scb")[:, None]}),
            f"{HEAD} is not quantized, as other linear layers of the file are",
        ),
        (
            lambda all: all.update({HEAD: all[HEAD][:, :-1].contiguous()}),
            rf"{HEAD} is \(50, 40\) by the config, \(50, 39\) in the file",
        ),
    ],
)
def test_damaged_files(copied: Path, edit: Callable[[State], Any], message: str) -> None:
    change(copied, edit)
    with pytest.raises(ValueError, match=message):
        Moshi.from_kyutai(copied)


def test_scales_that_are_not_finite(copied: Path) -> None:
    change(copied, lambda all: all[f"{HEAD}_scb"].__setitem__(0, float("nan")))
    with pytest.raises(ValueError, match=f"{HEAD}_scb: 1 of its 50 numbers"):
        Moshi.from_kyutai(copied, verify=True)


def test_floats_by_the_name_of_int8(tiny: Checkpoint, copied: Path) -> None:
    save_file(published(tiny.lm.state_dict()), copied / "moshi.safetensors")
    with pytest.raises(ValueError, match=r"says quantize=True, but the weights in moshi\.safetensors are not quant"):
        Moshi.from_kyutai(copied)


def test_twice(copied: Path) -> None:
    with pytest.raises(ValueError, match=r"quantization='nf4', but the weights are quantized already, int8 "):
        Moshi.from_kyutai(copied, quantization="nf4")
