"""Weights for Kyutai's other packages, which have a transformer for each step of the depth decoder.

MLX's are built here by their definition, and made by the package itself where it is installed; GGUF is made by the
``gguf`` package. What is read is compared with the floats that the codes stand for.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from tests.torch_oracle import assert_close
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration, QuantizationConfig

pytest.importorskip("moshi.models", reason="Kyutai's `moshi` package, the oracle, is not installed")
from moshi.utils.compile import no_compile

from tests.models.moshi.test_kyutai import (
    TINY_LM,
    TINY_MIMI,
    Checkpoint,
    assert_logits_are_equal,
    assert_same_bits,
    edit_config,
    make_checkpoint,
)

Moshi = FlaxMoshiForConditionalGeneration
Tensors = dict[str, np.ndarray]

# widths that groups of 32 divide
LM = {**TINY_LM, "dim": 64, "hidden_scale": 3, "depformer_dim": 32, "depformer_dim_feedforward": 96}


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """The oracle without its compiler, and without gradients."""
    with no_compile(), torch.no_grad():
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: Any) -> Checkpoint:
    """A checkpoint of floats. Not to be changed."""
    return make_checkpoint(tmp_path_factory.mktemp("kyutai") / "source", LM, TINY_MIMI, seed=11)


@pytest.fixture
def folder(source: Checkpoint, tmp_path: Path) -> Path:
    """The same with the weights of the language model to come."""
    copy = Path(shutil.copytree(source.directory, tmp_path / "copied"))
    (copy / "moshi.safetensors").unlink()
    return copy


def states(lm: Any) -> Tensors:
    return {key: tensor.numpy() for key, tensor in lm.state_dict().items()}


def names_of(key: str, mlx: bool) -> list[str]:
    """What a tensor of the ``moshi`` package is called: one of the depth decoder's norms once for each step."""
    slices = "depformer.slices" if mlx else "depformer"
    fused = "in_proj.weight" if mlx else "in_proj_weight"
    key = (
        re.sub(r"self_attn\.in_projs\.0\.weight", f"self_attn.{fused}", key) if key.startswith("transformer") else key
    )
    key = key.replace("out_projs.0.", "out_proj.") if key.startswith("transformer") else key
    if key.startswith("emb."):
        return [f"audio_{key}".replace("audio_emb", "audio_embs") if mlx else key]
    if key == "depformer_text_emb.weight":
        return [f"{slices}.0.emb.weight"]
    if match := re.fullmatch(r"depformer_emb\.(\d+)\.weight", key):
        return [f"{slices}.{int(match[1]) + 1}.emb.weight"]
    for theirs, ours in (("linear_in", "depformer_in"), ("linear_out", "linears")):
        if match := re.fullmatch(rf"{ours}\.(\d+)\.weight", key):
            return [f"{slices}.{match[1]}.{theirs}.weight"]
    if not key.startswith("depformer.layers"):
        return [key.replace(".alpha", ".weight") if mlx else key]
    layer, rest = re.fullmatch(r"depformer\.(layers\.\d+)\.(.*)", key).groups()
    if rest.endswith("alpha"):
        rest = rest.replace(".alpha", ".weight") if mlx else rest
        return [f"{slices}.{step}.transformer.{layer}.{rest}" for step in range(LM["dep_q"])]
    step = re.search(r"\.(\d+)\.", rest)[1]
    rest = rest.replace(f"in_projs.{step}.weight", fused).replace(f"out_projs.{step}", "out_proj")
    return [f"{slices}.{step}.transformer.{layer}.{rest.replace(f'gating.{step}', 'gating')}"]


def affine(matrix: np.ndarray, bits: int, group: int, dtype: Any) -> tuple[Tensors, np.ndarray]:
    """What MLX keeps of a matrix, and the floats that it stands for."""
    rows, columns = matrix.shape
    grouped = matrix.reshape(rows, -1, group).astype(np.float64)
    biases = grouped.min(axis=2).astype(dtype).astype(np.float64)
    scales = ((grouped.max(axis=2) - grouped.min(axis=2)) / (2**bits - 1)).astype(dtype).astype(np.float64)
    codes = np.clip(np.rint((grouped - biases[..., None]) / scales[..., None]), 0, 2**bits - 1)
    words = codes.reshape(rows, -1, 32 // bits).astype(np.uint64)
    packed = sum(words[..., place] << np.uint64(bits * place) for place in range(32 // bits))
    kept = {"weight": packed.astype(np.uint32), "scales": scales.astype(dtype), "biases": biases.astype(dtype)}
    return kept, (codes * scales[..., None] + biases[..., None]).reshape(rows, columns)


def mlx_file(lm: Any, bits: int, group: int, dtype: Any = np.float32) -> tuple[Tensors, Tensors]:
    """The tensors of a file, and the floats that they stand for under the names of the ``moshi`` package."""
    tensors, floats = {}, {}
    for key, value in states(lm).items():
        floats[key] = value
        if value.ndim == 3:
            tensors |= dict.fromkeys(names_of(key, True), value[0, 0].astype(dtype))
            floats[key] = value.astype(dtype).astype(np.float32)
            continue
        (name,) = names_of(key, True)
        kept, floats[key] = affine(value, bits, group, dtype)
        tensors |= {f"{name.removesuffix('weight')}{part}": each for part, each in kept.items()}
    return tensors, floats


def gguf_file(lm: Any, path: Path, kinds: dict[str, str] | None = None) -> Tensors:
    """Write the file; returns the floats that it stands for. ``kinds`` says for some names of what type they are."""
    gguf = pytest.importorskip("gguf", reason="makes GGUF, and reads it")
    writer, floats = gguf.GGUFWriter(path, "moshi"), {}
    for key, value in states(lm).items():
        for name in names_of(key, False):
            kind = gguf.GGMLQuantizationType[(kinds or {}).get(name, "F32" if value.ndim == 3 else "Q8_0")]
            data = gguf.quants.quantize(value, kind)
            floats[key] = gguf.quants.dequantize(data, kind)
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    edit_config(path.parent, moshi_name=path.name)
    return floats


def assert_stands_for(model: Moshi, floats: Tensors, source: Checkpoint, tmp_path: Path, tolerance: float) -> None:
    """Its dequantized parameters are the floats, as they are read in the format of the ``moshi`` package."""
    plain = Path(shutil.copytree(source.directory, tmp_path / "floats"))
    save_file({key: np.asarray(value, np.float32) for key, value in floats.items()}, plain / "moshi.safetensors")
    expected = flatten_dict(Moshi.from_kyutai(plain).params, sep="/")
    found = flatten_dict(model.dequantize(jnp.float32).params, sep="/")
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, atol=tolerance * np.abs(leaf).max(), err_msg=path)


# ----------------------------------------------------------------------------------------------------------------- MLX


@pytest.mark.parametrize(("bits", "group", "dtype"), [(4, 32, np.float32), (8, 16, ml_dtypes.bfloat16)])
def test_mlx(source: Checkpoint, folder: Path, tmp_path: Path, bits: int, group: int, dtype: Any) -> None:
    tensors, floats = mlx_file(source.lm, bits, group, dtype)
    save_file(tensors, folder / "moshi.safetensors")
    model = Moshi.from_kyutai(folder, verify=True)
    assert model.quantization == QuantizationConfig(bits=bits, group_size=group, skip=["audio_encoder"], offsets=True)
    head, kind = model.params["decoder"]["lm_head"], f"kernel_int{bits}"
    theirs = tensors["text_linear.weight"].view(np.uint8).T
    np.testing.assert_array_equal(head[kind], theirs if bits == 4 else theirs.astype(np.int16) - 128)
    np.testing.assert_array_equal(head["scales"], tensors["text_linear.scales"].astype(np.float32).T)
    if dtype != np.float32:
        offsets = tensors["text_linear.biases"].astype(float) + 2 ** (bits - 1) * tensors["text_linear.scales"].astype(
            float
        )
        np.testing.assert_array_equal(head["offsets"], offsets.T)
    else:
        lm = copy.deepcopy(source.lm)
        lm.load_state_dict({key: torch.tensor(value) for key, value in floats.items()})
        assert_logits_are_equal(lm, model)
    assert_stands_for(model, floats, source, tmp_path, 1e-6)


def test_mlx_that_is_not_quantized(source: Checkpoint, folder: Path) -> None:
    tensors = {}
    for key, value in states(source.lm).items():
        tensors |= dict.fromkeys(names_of(key, True), value[0, 0] if value.ndim == 3 else value)
    save_file(tensors, folder / "moshi.safetensors")
    model = Moshi.from_kyutai(folder)
    assert model.quantization is None
    assert_same_bits(model.params, Moshi.from_kyutai(source.directory).params)


HEAD = "text_linear"


def make_floats(tensors: Tensors, layer: str) -> None:
    for part in ("weight", "scales", "biases"):
        del tensors[f"{layer}.{part}"]
    tensors[f"{layer}.weight"] = np.ones((32, 64), np.float32)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda all: all.pop(f"{HEAD}.scales"), f"{HEAD}.weight is quantized, but there is no {HEAD}.scales"),
        (lambda all: all.pop("text_emb.biases"), "text_emb.weight is quantized, but there is no text_emb.biases"),
        (lambda all: all.pop("text_emb.weight"), "has text_emb.(scales|biases), but no codes that it belongs to"),
        (lambda all: all.update({"text_emb.weight": np.ones((51, 64), np.float32)}), "has text_emb.*, but no codes"),
        (
            lambda all: all.update({"text_emb.scales": all["text_emb.scales"][:, :1]}),
            r"text_emb.scales is float32 \(51, 1\), .* wants floats \(51, 2\)",
        ),
        (
            lambda all: all.update({"text_emb.biases": all["text_emb.biases"].astype(np.int32)}),
            r"text_emb.biases is int32 \(51, 2\), .* wants floats",
        ),
        (
            lambda all: all.update({f"{HEAD}.weight": all[f"{HEAD}.weight"][:, :6]}),
            rf"{HEAD}.weight has codes of 3 bits in groups of 32; 4 and 8 bits are read",
        ),
        (
            lambda all: all.update({"audio_embs.1.weight": all["audio_embs.1.weight"][:, :6]}),
            r"audio_embs.1.scales is float32 \(33, 2\), but audio_embs.1.weight \(33, 6\)",
        ),
        (
            lambda all: make_floats(all, "depformer.slices.1.linear_in"),
            "depformer_in.1.weight is not quantized, as other linear layers",
        ),
        (
            lambda all: all.update({"depformer.slices.2.transformer.layers.1.norm2.weight": np.ones(32, np.float32)}),
            "slices.2.transformer.layers.1.norm2.weight is not equal to .*slices.0.transformer.layers.1.norm2.weight",
        ),
        (lambda all: all.pop("depformer.slices.2.linear_out.weight"), "no codes that it belongs to"),
    ],
)
def test_damaged_mlx(source: Checkpoint, folder: Path, edit: Callable[[Tensors], Any], message: str) -> None:
    tensors, _ = mlx_file(source.lm, 4, 32)
    edit(tensors)
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / "moshi.safetensors")
    with pytest.raises(ValueError, match=message):
        Moshi.from_kyutai(folder)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 64)])
def test_the_mlx_package_computes_the_same(folder: Path, bits: int, group: int) -> None:
    """Its own file, of widths that it takes; with the frames within the context, which is one longer there."""
    pytest.importorskip("moshi_mlx", reason="Kyutai's package for MLX, the oracle, is not installed")
    import mlx.core as mx
    import mlx.nn
    from mlx.utils import tree_flatten
    from moshi_mlx.models.lm import Lm, LmConfig

    sizes = {"dim": 256, "hidden_scale": 4.125, "depformer_dim": 64, "depformer_dim_feedforward": 192, "context": 20}
    values = {**LM, **sizes, "num_layers": 1}
    theirs, draw = Lm(LmConfig.from_config_dict(values)), np.random.default_rng(0)
    drawn = {}
    for name, value in tree_flatten(theirs.parameters()):
        scale = 1 if "emb" in name else value.shape[-1] ** -0.5
        drawn[name] = draw.standard_normal(value.shape).astype(np.float32) * scale
        if "norm" in name:  # the same for all steps
            drawn[name] = drawn.get(re.sub(r"slices\.\d+", "slices.0", name), 1 + drawn[name])
    theirs.load_weights([(name, mx.array(value)) for name, value in drawn.items()])
    mlx.nn.quantize(theirs, bits=bits, group_size=group)
    theirs.save_weights(str(folder / "moshi.safetensors"))
    edit_config(folder, **values)
    ours = Moshi.from_kyutai(folder)

    frames, delays = 5, values["delays"][1:]
    text, audio = draw.integers(0, 50, (1, frames)), draw.integers(0, 32, (6, frames))
    inputs = theirs.text_emb(mx.array(text)) + sum(
        emb(mx.array(row))[None] for emb, row in zip(theirs.audio_embs, audio)
    )
    hidden = [theirs.transformer(inputs[:, t : t + 1], cache=theirs.transformer_cache) for t in range(frames)]
    hidden = theirs.out_norm(mx.concatenate(hidden, axis=1))
    found = jax.jit(lambda params, **given: ours(params=params, **given))(
        ours.params,
        input_ids=text,
        moshi_audio_codes=audio[None, :3],
        user_audio_codes=audio[None, 3:],
        text_labels=text,
        audio_labels=audio[None, :3],
    )
    assert_close(found.logits, np.array(theirs.text_linear(hidden)), 1e-5)
    for frame in range(1, frames):
        for cache in theirs.depformer_cache:
            cache.reset()
        token = text[:, frame : frame + 1]
        for step, each in enumerate(theirs.depformer.slices):
            x = each.linear_in(hidden[:, frame - 1 : frame]) + each.emb(mx.array(token))
            logits = each.linear_out(each.transformer(x, cache=theirs.depformer_cache))
            assert_close(found.audio_logits[0, frame - 1, step], np.array(logits)[0, 0], 1e-5)
            token = audio[None, step, frame - delays[step] : frame - delays[step] + 1]


# ---------------------------------------------------------------------------------------------------------------- GGUF


def test_gguf(source: Checkpoint, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kinds = {"text_emb.weight": "F16", "emb.0.weight": "BF16", "emb.1.weight": "F32"}
    floats = gguf_file(source.lm, folder / "model.q8.gguf", kinds)
    model = Moshi.from_kyutai(folder, verify=True)
    assert model.quantization == QuantizationConfig("int8", group_size=32, skip=["audio_encoder"])
    assert model.params["decoder"]["lm_head"]["scales"].shape == (2, 50)
    assert not caplog.records
    half, _ = Moshi.from_kyutai(folder, jnp.bfloat16, _do_init=False)
    assert half.dtype == jnp.bfloat16 and "dtype=bfloat16 rounds them once more" in caplog.text
    assert_stands_for(model, floats, source, tmp_path, 1e-7)


@pytest.mark.parametrize("kept", [3, 40, 2_000, -1])
def test_gguf_that_is_cut_off(source: Checkpoint, folder: Path, kept: int) -> None:
    path = folder / "model.q8.gguf"
    gguf_file(source.lm, path)
    path.write_bytes(path.read_bytes()[: kept if kept > 0 else -2_000])
    with pytest.raises(
        ValueError, match=r"model\.q8\.gguf cannot be read as GGUF .*it is damaged, incomplete or of an"
    ):
        Moshi.from_kyutai(folder)


def test_gguf_with_tensors_in_one_place(source: Checkpoint, folder: Path) -> None:
    gguf_file(source.lm, folder / "model.q8.gguf")
    import gguf

    reader = gguf.GGUFReader(folder / "model.q8.gguf", "r+")
    first, second = reader.tensors[:2]
    second.field.parts[5][0] = first.field.parts[5][0]
    reader.data.flush()
    with pytest.raises(ValueError, match=rf"cannot be read as GGUF \(({first.name}|{second.name}) and .* overlap\)"):
        Moshi.from_kyutai(folder)


def test_gguf_of_other_types(source: Checkpoint, folder: Path) -> None:
    gguf_file(source.lm, folder / "model.q8.gguf", {"text_linear.weight": "Q4_0"})
    with pytest.raises(
        ValueError, match=r"types that are not read: text_linear\.weight \(Q4_0\); get a file of Q8_0,"
    ):
        Moshi.from_kyutai(folder)


def test_gguf_with_a_layer_of_floats(source: Checkpoint, folder: Path) -> None:
    gguf_file(source.lm, folder / "model.q8.gguf", {"depformer.1.linear_in.weight": "F16"})
    with pytest.raises(
        ValueError, match=r"depformer_in\.1\.weight is not quantized, as other linear layers of the fi"
    ):
        Moshi.from_kyutai(folder)


def test_gguf_without_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model.q8.gguf").write_bytes(b"GGUF")
    edit_config(folder, moshi_name="model.q8.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"is a GGUF file, .*\(pip install 'transformers-moshi-flax\[gguf\]'"):
        Moshi.from_kyutai(folder)


# ------------------------------------------------------------------------------------------------------- writing MLX's

# inner widths by the rule of `moshi_mlx`, which groups of 32 divide
WIDE = {**LM, "dim": 128, "hidden_scale": 4.125, "num_layers": 1}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: Any) -> Checkpoint:
    """A checkpoint of floats. Not to be changed."""
    return make_checkpoint(tmp_path_factory.mktemp("kyutai") / "wide", WIDE, TINY_MIMI, seed=12)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_mlx_there_and_back(wide: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: Any) -> None:
    """The layers to the bit; embeddings are quantized anew, which is told."""
    folder = Path(shutil.copytree(wide.directory, tmp_path / "copied"))
    theirs, _ = mlx_file(wide.lm, 4, 32, dtype)
    save_file(theirs, folder / "moshi.safetensors")
    model = Moshi.from_kyutai(folder)
    model.save_kyutai(tmp_path / "written", package="mlx")
    assert "moshi_mlx has quantized embeddings: they are rounded to int4 (4 bits, groups of 32 with off" in caplog.text
    ours = load_file(tmp_path / "written" / "model.q4.safetensors")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].shape == tensor.shape, key
        if "emb" not in key:
            # float32 rounds the way to the offset and back
            tolerance = 4e-6 if key.endswith("biases") and dtype is np.float32 else 0
            np.testing.assert_allclose(
                ours[key].astype(float), tensor.astype(float), rtol=0, atol=tolerance, err_msg=key
            )
    again = Moshi.from_kyutai(tmp_path / "written")
    assert again.quantization == model.quantization
    before, after = (flatten_dict(each.params, sep="/") for each in (model, again))
    for path, leaf in before.items():
        if "emb" in path:  # off by half a step at most
            steps = (leaf.max(axis=-1) - leaf.min(axis=-1)) / 15
            assert (np.abs(after[path] - leaf).max(axis=-1) <= 0.51 * steps + 1e-3).all(), path
        else:
            np.testing.assert_allclose(after[path], leaf, atol=1e-6 if path.endswith("offsets") else 0, err_msg=path)


@pytest.mark.parametrize("bits", [4, None])
def test_the_mlx_package_loads_what_is_written(wide: Checkpoint, tmp_path: Path, bits: int | None) -> None:
    pytest.importorskip("moshi_mlx", reason="Kyutai's package for MLX, the oracle, is not installed")
    import mlx.nn
    from mlx.utils import tree_flatten
    from moshi_mlx.models.lm import Lm, LmConfig

    quantization = bits and QuantizationConfig("int4", group_size=32, skip=["audio_encoder"], offsets=True)
    model = Moshi.from_kyutai(wide.directory, quantization=quantization)
    model.save_kyutai(tmp_path / "written", package="mlx")
    values = json.loads((tmp_path / "written" / "config.json").read_text())
    theirs = Lm(LmConfig.from_config_dict(values))
    if bits:
        mlx.nn.quantize(theirs, bits=4, group_size=32)
    theirs.load_weights(str(tmp_path / "written" / values["moshi_name"]), strict=True)
    expected = states(wide.lm)
    for path, module in tree_flatten(theirs.leaf_modules(), is_leaf=mlx.nn.Module.is_module):
        if "weight" not in module:  # rotary embeddings, and what does nothing
            continue
        (key,) = [key for key in expected if f"{path}.weight" in names_of(key, True)]
        parts = {name: np.array(value) for name, value in module.parameters().items()}
        if "scales" in parts:
            found = mlx.core.dequantize(module.weight, module.scales, module.biases, group_size=32, bits=4)
            steps = np.repeat(parts["scales"], 32, axis=1)
            assert (np.abs(np.array(found) - expected[key]) <= 0.51 * steps + 1e-6).all(), key
        else:
            np.testing.assert_array_equal(parts["weight"].reshape(expected[key].shape), expected[key], err_msg=key)


def test_what_mlx_cannot_express(source: Checkpoint, tmp_path: Path) -> None:
    model = Moshi.from_kyutai(source.directory)
    with pytest.raises(
        ValueError, match=r"moshi_mlx cannot express this configuration of Moshi: ffn_dim=256 \(only 352"
    ):
        model.save_kyutai(tmp_path / "new", package="mlx")
    with pytest.raises(ValueError, match=r"package='jax' must be one of 'moshi', 'mlx', 'candle'"):
        model.save_kyutai(tmp_path / "new", package="jax")
    model.quantize(QuantizationConfig("int4", group_size=16, skip=["audio_encoder"], offsets=True))
    with pytest.raises(
        ValueError, match=r"groups of 16 .* but 'mlx' has int4 \(4 bits, groups of 32 with off.*, or int8"
    ):
        model.save_kyutai(tmp_path / "new", package="mlx")
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------- writing candle's


def gguf_tensors(path: Path) -> Tensors:
    """The floats that a file stands for, as the ``gguf`` package reads them."""
    gguf = pytest.importorskip("gguf", reason="makes GGUF, and reads it")
    tensors = gguf.GGUFReader(path).tensors
    found = {each.name: gguf.quants.dequantize(each.data, each.tensor_type) for each in tensors}
    return {each.name: found[each.name].reshape(each.shape[::-1].tolist()) for each in tensors}


def test_candle_there_and_back(
    source: Checkpoint, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The layers to the bit; embeddings are quantized anew, which is told."""
    floats = gguf_file(source.lm, folder / "model.q8.gguf")
    model = Moshi.from_kyutai(folder)
    model.save_kyutai(tmp_path / "written", package="candle")
    assert "candle has quantized embeddings: they are rounded to int8 (8 bits, groups of 32)" in caplog.text
    assert "rounded to it" not in caplog.text  # the scales are those of the file
    ours, theirs = (gguf_tensors(each / "model.q8.gguf") for each in (tmp_path / "written", folder))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].shape == tensor.shape, key
        tolerance = 0.01 * np.abs(tensor).max() if "emb" in key else 0
        np.testing.assert_allclose(ours[key], tensor, rtol=0, atol=tolerance, err_msg=key)
    again = Moshi.from_kyutai(tmp_path / "written", verify=True)
    assert again.quantization == model.quantization
    assert_same_bits(again.params["depth_decoder"]["layers"], model.params["depth_decoder"]["layers"])
    assert_stands_for(model, floats, source, tmp_path, 1e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_candle_of_floats(source: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: Any) -> None:
    """Quantized here, scales are rounded to float16, which is told; floats are safetensors, as they are."""
    model = Moshi.from_kyutai(source.directory)
    model.params = model.to_bf16(model.params) if dtype == jnp.bfloat16 else model.params
    model.save_kyutai(tmp_path / "floats", package="candle")
    assert not caplog.records
    again = Moshi.from_kyutai(tmp_path / "floats")
    assert_same_bits(again.params, model.params)
    model.quantize(QuantizationConfig("int8", group_size=32, skip=["audio_encoder"]))
    model.save_kyutai(tmp_path / "quantized", package="candle")
    assert "candle has scales in float16: they are rounded to it" in caplog.text
    expected, found = (
        flatten_dict(each.dequantize(jnp.float32).params, sep="/")
        for each in (model, Moshi.from_kyutai(tmp_path / "quantized"))
    )
    for path, leaf in expected.items():
        tolerance = (0.01 if "emb" in path else 1e-3) * np.abs(np.asarray(leaf, np.float32)).max()
        np.testing.assert_allclose(np.asarray(found[path], np.float32), leaf, atol=tolerance, err_msg=path)


def test_candle_without_the_package(source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Moshi.from_kyutai(
        source.directory, quantization=QuantizationConfig("int8", group_size=32, skip=["audio_encoder"])
    )
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"model\.q8\.gguf is a GGUF file, which is written by the package gguf"):
        model.save_kyutai(tmp_path / "written", package="candle")
    assert not (tmp_path / "written").exists()
