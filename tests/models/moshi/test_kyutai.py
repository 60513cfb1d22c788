"""Kyutai's own files in both directions, against the ``moshi`` package: same logits, codes and audio, same bits."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from safetensors.torch import load_file, save_file
from transformers import MimiConfig

from tests.configs import tiny_moshi_config
from tests.torch_oracle import assert_close
from transformers_moshi_flax import FlaxMimiModel, FlaxMoshiForConditionalGeneration, MoshiProcessor
from transformers_moshi_flax.checkpoints.files import CheckpointNotFoundError
from transformers_moshi_flax.models.mimi import kyutai_flax_mimi as of_mimi
from transformers_moshi_flax.models.moshi import kyutai_config_flax_moshi as of_config
from transformers_moshi_flax.models.moshi import kyutai_flax_moshi as of_moshi
from transformers_moshi_flax.models.moshi.kyutai_flax_moshi import find_kyutai_files

pytest.importorskip("moshi.models", reason="Kyutai's `moshi` package, the oracle, is not installed")
from moshi.models import LMModel, loaders
from moshi.modules.gating import make_gating
from moshi.modules.transformer import StreamingTransformer, StreamingTransformerLayer
from moshi.utils.compile import no_compile

Moshi = FlaxMoshiForConditionalGeneration

TINY_LM: dict[str, Any] = {
    "dim": 40,
    "text_card": 50,
    "existing_text_padding_id": 3,
    "n_q": 6,
    "dep_q": 3,
    "card": 32,
    "num_heads": 4,
    "num_layers": 2,
    "hidden_scale": 4.125,
    "causal": True,
    "layer_scale": None,
    "context": 5,
    "max_period": 100,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
    "depformer_dim": 24,
    "depformer_dim_feedforward": 99,
    "depformer_num_heads": 2,
    "depformer_num_layers": 3,
    "depformer_layer_scale": None,
    "depformer_multi_linear": True,
    "depformer_context": 3,
    "depformer_max_period": 10000,
    "depformer_gating": "silu",
    "depformer_pos_emb": "none",
    "depformer_weights_per_step": True,
    "delays": [0, 0, 1, 1, 0, 1, 1],
}
# Halves of the layout, other sizes, grouped heads, defaults of the backbone taken over by the depth decoder.
OTHER_LM = {
    **TINY_LM,
    "positional_embedding": "rope_concat",
    "kv_repeat": 2,
    "hidden_scale": 4,
    "gating": "gelu",
    "n_q": 4,
    "dep_q": 2,
    "delays": [0, 0, 1, 0, 1],
    "depformer_weights_per_step_schedule": [0, 1],
    "depformer_dim_feedforward": [90, 90],
}
for _name in ("depformer_num_layers", "depformer_gating", "existing_text_padding_id"):
    del OTHER_LM[_name]

TINY_MIMI: dict[str, Any] = {
    "sample_rate": 24000,
    "channels": 1,
    "frame_rate": 1500.0,
    "seanet": {**loaders._seanet_kwargs, "dimension": 32, "n_filters": 4, "ratios": [4, 2]},
    "quantizer": {"dimension": 12, "n_q": 5, "bins": 32, "input_dimension": 32, "output_dimension": 32},
    "transformer": {
        **loaders._transformer_kwargs,
        "d_model": 32,
        "num_heads": 4,
        "num_layers": 2,
        "context": 6,
        "max_period": 50,
        "dim_feedforward": 48,
        "input_dimension": 32,
        "output_dimensions": [32],
    },
}
OTHER_MIMI = {
    **TINY_MIMI,
    "seanet": {**TINY_MIMI["seanet"], "n_residual_layers": 2, "ratios": [2, 2, 2]},
    "quantizer": {**TINY_MIMI["quantizer"], "n_q_semantic": 2},
    "transformer": {**TINY_MIMI["transformer"], "kv_repeat": 2},
}


def draw(module: torch.nn.Module, seed: int) -> None:
    """Draw every weight and buffer so that a wrong or forgotten one shows, in place."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, std: float, mean: float = 0.0) -> torch.Tensor:
        return mean + std * torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            leaf = name.split(".")[-1]
            if leaf in ("alpha", "scale") or (leaf == "weight" and "norm" in name):
                tensor.copy_(normal(tensor, 0.3, mean=1.0))
            elif leaf == "bias":
                tensor.copy_(normal(tensor, 0.3))
            elif leaf == "cluster_usage":
                tensor.copy_(0.5 + 1.5 * torch.rand(tensor.shape, generator=generator))
            elif leaf == "_initialized":
                tensor.fill_(1.0)
            elif leaf == "embedding_sum" or "emb." in name:
                tensor.copy_(normal(tensor, 1.0))
            else:
                tensor.copy_(normal(tensor, tensor[0].numel() ** -0.5))


def published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of a model as the published files have it: the projections of all codebooks in one tensor.

    Written apart from the package's table, so that the two check each other.
    """
    joined: dict[str, list[torch.Tensor]] = {}
    for key, tensor in state.items():
        head, _, tail = key.partition("_projs.")
        name = f"{head}_proj_weight" if head.endswith(".in") else f"{head}_proj.weight"
        joined.setdefault(name if tail else key, []).append(tensor)
    return {key: torch.cat(tensors) if len(tensors) > 1 else tensors[0] for key, tensors in joined.items()}


@dataclasses.dataclass
class Checkpoint:
    """A checkpoint that the oracle made, and its models."""

    directory: Path
    lm: Any
    mimi: Any


def make_checkpoint(directory: Path, lm_kwargs: dict[str, Any], mimi_kwargs: dict[str, Any], seed: int) -> Checkpoint:
    directory.mkdir()
    lm = loaders.get_moshi_lm(None, lm_kwargs, dtype=torch.float32)
    mimi = loaders.get_mimi(None, mimi_kwargs, num_codebooks=lm_kwargs["dep_q"])
    draw(lm, seed)
    draw(mimi, seed + 1)
    save_file(published(lm.state_dict()), directory / "moshi.safetensors")
    save_file(published(mimi.state_dict()), directory / "mimi.safetensors")
    (directory / "mimi.json").write_text(json.dumps(mimi_kwargs))
    (directory / "text.model").write_bytes(b"not read by us")
    names = {
        "moshi_name": "moshi.safetensors",
        "mimi_name": "mimi.safetensors",
        "mimi_config_name": "mimi.json",
        "tokenizer_name": "text.model",
    }
    (directory / "config.json").write_text(json.dumps({**names, **lm_kwargs}))
    return Checkpoint(directory, lm, mimi)


@pytest.fixture(scope="module", params=[(TINY_LM, TINY_MIMI), (OTHER_LM, OTHER_MIMI)], ids=["tiny", "other"])
def checkpoint(request: Any, tmp_path_factory: Any) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("kyutai") / "source", *request.param, seed=7)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: Any) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("kyutai") / "source", TINY_LM, TINY_MIMI, seed=3)


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Moshi:
    return Moshi.from_kyutai(checkpoint.directory)


@pytest.fixture
def copied(tiny: Checkpoint, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to damage."""
    return Path(shutil.copytree(tiny.directory, tmp_path / "copied"))


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """The oracle without its compiler, and without gradients."""
    with no_compile(), torch.no_grad():
        yield


def edit_config(directory: Path, name: str = "config.json", **changes: Any) -> None:
    values = json.loads((directory / name).read_text())
    (directory / name).write_text(json.dumps({**values, **changes}))


# ------------------------------------------------------------------------------------------------------- equivalence


def test_logits_are_equal(checkpoint: Checkpoint, model: Moshi) -> None:
    assert_logits_are_equal(checkpoint.lm, model)


def assert_logits_are_equal(lm: Any, model: Moshi) -> None:
    """Teacher forcing over more frames than the context; the oracle applies the delays itself."""
    frames, rng = 9, np.random.default_rng(0)
    audio = rng.integers(0, lm.card, (2, lm.n_q, frames))
    text = rng.integers(0, lm.text_card, (2, 1, frames))
    theirs = lm(torch.tensor(np.concatenate([text, audio], axis=1)))

    # Ours takes the start frame and delayed codes as inputs, undelayed ones as labels.
    codes = np.concatenate([np.full((2, lm.n_q, 1), lm.card), audio], axis=-1)
    inputs = codes.copy()
    for row, delay in enumerate(lm.delays[1:]):
        if delay:
            inputs[:, row, 1:], inputs[:, row, 0] = codes[:, row, :-1], lm.card
    text = np.concatenate([np.full((2, 1), lm.text_card), text[:, 0]], axis=-1)
    ours = jax.jit(lambda params, **given: model(params=params, **given))(
        model.adapted_params(),
        input_ids=text,
        moshi_audio_codes=inputs[:, : lm.dep_q],
        user_audio_codes=inputs[:, lm.dep_q :],
        text_labels=np.where(text == lm.text_card, 0, text),
        audio_labels=codes[:, : lm.dep_q],
    )
    assert_close(ours.logits[:, :-1], theirs.text_logits[:, 0], 1e-5, "text")
    for row, delay in enumerate(lm.delays[1 : 1 + lm.dep_q]):
        valid = frames - delay
        assert theirs.mask[:, row, :valid].all()
        assert_close(ours.audio_logits[:, delay:, row], theirs.logits[:, row, :valid], 1e-5, f"codebook {row}")


def test_codes_and_audio_are_equal(checkpoint: Checkpoint, model: Moshi) -> None:
    config, mimi = model.config, checkpoint.mimi
    wave = 9 * np.random.default_rng(1).standard_normal((2, 1, 12 * mimi.frame_size)).astype(np.float32)
    codes = mimi.encode(torch.tensor(wave)).numpy()
    # more codebooks than the model of the language hears
    mimi.set_num_codebooks(config.audio_encoder_config.num_quantizers)
    all_codes = mimi.encode(torch.tensor(wave))
    audio = mimi.decode(all_codes)

    module, params = model.module, {"params": model.params}
    assert len(np.unique(codes)) > 8
    encode = jax.jit(partial(module.apply, method="encode_audio"))
    np.testing.assert_array_equal(encode(params, wave), codes)
    decode = jax.jit(partial(module.apply, method="decode_audio"))
    assert_close(decode(params, all_codes.numpy().astype(np.int32)), audio, 1e-4)


# ----------------------------------------------------------------------------------------------------------- writing


def test_the_package_loads_what_we_write(checkpoint: Checkpoint, model: Moshi, tmp_path: Path) -> None:
    model.save_kyutai(tmp_path, tokenizer=find_kyutai_files(checkpoint.directory).tokenizer)
    info = loaders.CheckpointInfo.from_hf_repo(
        "none",
        config_path=tmp_path / "config.json",
        moshi_weights=tmp_path / "model.safetensors",
        mimi_weights=tmp_path / "tokenizer-e351c8d8-checkpoint125.safetensors",
        mimi_config_path=tmp_path / "mimi_config.json",
        tokenizer=tmp_path / "text.model",
    )
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["moshi_name"] == "model.safetensors"
    assert written["mimi_name"] == info.mimi_weights.name
    assert written["mimi_config_name"] == "mimi_config.json"
    assert written["tokenizer_name"] == "text.model"
    assert info.tokenizer.read_bytes() == (checkpoint.directory / "text.model").read_bytes()

    lm, mimi = info.get_moshi(dtype=torch.float32), info.get_mimi()
    frames = torch.randint(0, 32, (1, lm.num_codebooks, 6), generator=torch.Generator().manual_seed(0))
    if "rope_concat" in checkpoint.lm.transformer.positional_embedding:
        # the rows of queries and keys have been brought into the order that the format usually has
        assert_close(lm(frames).text_logits, checkpoint.lm(frames).text_logits, 1e-5)
    else:
        assert torch.equal(lm(frames).text_logits, checkpoint.lm(frames).text_logits)
    mask = lm(frames).mask
    assert_close(lm(frames).logits[mask], checkpoint.lm(frames).logits[mask], 1e-5)
    codes = torch.randint(0, 32, (1, mimi.num_codebooks, 4), generator=torch.Generator().manual_seed(0))
    assert mimi.num_codebooks == model.config.num_codebooks
    assert torch.equal(mimi.decode(codes), checkpoint.mimi.decode(codes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_exact(tiny: Checkpoint, copied: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    for name in ("moshi.safetensors", "mimi.safetensors"):
        save_file({key: value.to(dtype) for key, value in load_file(copied / name).items()}, copied / name)
    model, params = Moshi.from_kyutai(copied, _do_init=False)
    assert model.dtype == jnp.dtype(str(dtype).removeprefix("torch."))
    assert model.name_or_path == str(copied) and model.hub_id is None
    model.save_kyutai(tmp_path / "back", params)
    for before, after in (("moshi", of_moshi.MOSHI_NAME), ("mimi", of_moshi.MIMI_NAME)):
        theirs, ours = load_file(copied / f"{before}.safetensors"), load_file(tmp_path / "back" / after)
        assert theirs.keys() == ours.keys()
        for key, tensor in theirs.items():
            assert tensor.dtype == ours[key].dtype and torch.equal(tensor, ours[key]), key
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: written[name] for name in TINY_LM} == TINY_LM
    assert json.loads((tmp_path / "back" / "mimi_config.json").read_text()) == TINY_MIMI


def test_there_and_back_of_a_model_of_ours(tmp_path: Path) -> None:
    config = tiny_moshi_config(ffn_dim=142, depth_decoder_config={"ffn_dim": 62})
    model, rng = Moshi(config, _do_init=False), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), model.params_shape_tree)
    model.save_kyutai(tmp_path, params)
    again, read = Moshi.from_kyutai(tmp_path, _do_init=False)
    # the window of the depth decoder is wider than a frame, which says nothing
    config.depth_decoder_config.sliding_window = config.num_codebooks
    names = ("vocab_size", "hidden_size", "ffn_dim", "num_key_value_heads", "sliding_window", "num_codebooks")
    for ours, back in (
        (config, again.config),
        (config.depth_decoder_config, again.config.depth_decoder_config),
    ):
        assert [getattr(ours, name) for name in names] == [getattr(back, name) for name in names]
    assert_same_bits(read, params)


def assert_same_bits(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    before, after = flatten_dict(expected, sep="/"), flatten_dict(ours, sep="/")
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        np.testing.assert_array_equal(np.asarray(after[path]), np.asarray(leaf), err_msg=path)


def test_files_with_a_tensor_per_codebook_are_read(tiny: Checkpoint, copied: Path) -> None:
    save_file(dict(tiny.lm.state_dict()), copied / "moshi.safetensors")
    save_file(dict(tiny.mimi.state_dict()), copied / "mimi.safetensors")
    assert any("in_projs.2" in key for key in tiny.lm.state_dict())
    _, apart = Moshi.from_kyutai(copied, _do_init=False)
    _, joined = Moshi.from_kyutai(tiny.directory, _do_init=False)
    assert_same_bits(apart, joined)


def test_dtypes(tiny: Checkpoint) -> None:
    model, params = Moshi.from_kyutai(tiny.directory, jnp.bfloat16, param_dtype=jnp.float32, _do_init=False)
    assert model.dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    with pytest.raises(ValueError, match=r"param_dtype must be a floating dtype"):
        Moshi.from_kyutai(tiny.directory, param_dtype=jnp.int8)


# ------------------------------------------------------------------------------------------------------ configuration


def test_constants_are_the_packages() -> None:
    assert of_config.KYUTAI_MOSHI == loaders._lm_kwargs
    assert of_mimi.KYUTAI_MIMI == loaders._mimi_config
    assert (of_moshi.MOSHI_NAME, of_moshi.MIMI_NAME, of_moshi.TOKENIZER_NAME) == (
        loaders.MOSHI_NAME,
        loaders.MIMI_NAME,
        loaders.TEXT_TOKENIZER_NAME,
    )


def test_every_argument_of_the_package_is_known() -> None:
    """Each argument is read, refused or known to change nothing, and the defaults are the package's."""
    known = {*of_config._ONLY, *of_config._INTEGERS, *of_config._NUMBERS, *of_config._FREE}
    made_of_others = {"self", "kwargs", "device", "dtype", "condition_provider"}
    arguments = inspect.signature(LMModel.__init__).parameters
    assert set(arguments) - known <= made_of_others
    for name, value in of_config._DEFAULTS.items():
        signatures = (
            arguments,
            *(inspect.signature(c).parameters for c in (StreamingTransformer, StreamingTransformerLayer)),
        )
        assert value == next(signature[name].default for signature in signatures if name in signature), name
    of_layers = {
        name
        for layer in (StreamingTransformer, StreamingTransformerLayer)
        for name in inspect.signature(layer).parameters
    }
    internal = {
        *("d_model", "dim_feedforward", "layer_class", "checkpointing", "kwargs", "device", "dtype"),
        *("rope", "weights_per_step", "weights_per_step_schedule", "activation"),
    }
    assert of_layers - known <= internal
    tables = (of_mimi._ONLY, of_mimi._INTEGERS, of_mimi._NUMBERS, of_mimi._FREE)
    of_codec = {name for table in tables for name in table["transformer"]}
    assert of_layers - of_codec <= internal


def test_moshiko_without_config(tmp_path: Path) -> None:
    for name in (of_moshi.MOSHI_NAME, of_moshi.MIMI_NAME):
        save_file({"x": torch.zeros(1)}, tmp_path / name)
    files = find_kyutai_files(tmp_path)
    assert files.tokenizer is None
    config = of_moshi.kyutai_config(files)
    depth = config.depth_decoder_config
    # of the published conversion
    assert (config.hidden_size, config.num_hidden_layers, config.ffn_dim, config.vocab_size) == (
        4096,
        32,
        22528,
        32000,
    )
    assert (depth.hidden_size, depth.num_hidden_layers, depth.ffn_dim, depth.input_size) == (1024, 6, 5632, 4096)
    assert (config.num_codebooks, config.audio_vocab_size, config.sliding_window) == (8, 2048, 3000)
    assert (depth.max_position_embeddings, depth.sliding_window, depth.num_codebooks) == (9, 8, 8)
    assert config.rope_parameters["rope_theta"] == 10000
    ours = {name: value for name, value in config.audio_encoder_config.to_dict().items() if name != "architectures"}
    default = MimiConfig().to_dict()
    assert {name: (value, default.get(name)) for name, value in ours.items() if value != default.get(name)} == {}
    assert of_mimi.mimi_config_to_kyutai(MimiConfig()) == loaders._mimi_config
    assert of_config.moshi_config_to_kyutai(config) == loaders._lm_kwargs


@pytest.mark.parametrize("dim", [2, 4, 8, 24, 64, 1024])
def test_width_of_the_mlp(dim: int) -> None:
    for feedforward in (3, 4 * dim - 1, 4 * dim, 4 * dim + 1, 99, int(4.125 * dim)):
        if 2 * feedforward // 3 == 0:
            continue
        ffn_dim = of_config._ffn_dim(dim, feedforward)
        assert ffn_dim == make_gating("silu", dim, feedforward, device="meta").linear_in.out_features
        again = of_config._feedforward(dim, ffn_dim)
        assert make_gating("silu", dim, again, device="meta").linear_in.out_features == ffn_dim
        assert int(of_config._hidden_scale(dim, again) * dim) == again


def test_width_without_a_dim_feedforward() -> None:
    """4·dim stands for another width in that format, and no other number gives this one."""
    with pytest.raises(ValueError, match=r"cannot express ffn_dim=74 with hidden_size=14"):
        of_config._feedforward(14, 74)


def test_sampling_is_kyutais(copied: Path) -> None:
    edit_config(copied, lm_gen_config={"temp": 0.6, "top_k_text": 9})
    model, _ = Moshi.from_kyutai(copied, _do_init=False)
    config = model.generation_config
    assert (config.do_sample, config.temperature, config.top_k) == (True, 0.7, 9)
    assert config.depth_decoder_config == {"do_sample": True, "temperature": 0.6, "top_k": 250}
    edit_config(copied, lm_gen_config={"use_sampling": False})
    model, _ = Moshi.from_kyutai(copied, _do_init=False)
    assert model.generation_config.do_sample is False
    assert model.generation_config.depth_decoder_config == {"do_sample": False}
    edit_config(copied, lm_gen_config={"cfg_coef": 3.0})
    with pytest.raises(ValueError, match=r"lm_gen_config has \{'cfg_coef': 3.0\}"):
        Moshi.from_kyutai(copied)
    edit_config(copied, lm_gen_config=[0.8])
    with pytest.raises(ValueError, match=r"lm_gen_config must be an object.*got \[0.8\]"):
        Moshi.from_kyutai(copied)


# ---------------------------------------------------------------------------------------------------------- refusals

REFUSED: dict[str, Any] = {
    "model_type": "hibiki",
    "n_q": 7,
    "dep_q": 0,
    "delays": [0, 0, 2, 2, 0, 2, 2],
    "card": 64,
    "text_card": "50",
    "text_card_out": 51,
    "num_heads": 3,
    "num_layers": None,
    "hidden_scale": "4",
    "max_period": -1,
    "context": None,
    "kv_repeat": 3,
    "gating": "none",
    "norm": "layer_norm",
    "norm_emb": True,
    "bias_proj": True,
    "layer_scale": 0.1,
    "causal": False,
    "positional_embedding": "sin",
    "cross_attention": True,
    "skip_self_attn": True,
    "demux_second_stream": True,
    "demux_second_text_stream": True,
    "conditioners": {"description": {"type": "lut"}},
    "fuser": {"sum": ["description"]},
    "lora": True,
    "lora_name": "lora.safetensors",
    "extra_heads_num_heads": 4,
    "existing_text_padding_id": 4,
    "existing_text_end_padding_id": 1,
    "depformer_multi_linear": False,
    "depformer_weights_per_step": False,
    "depformer_weights_per_step_schedule": [0, 1, 1],
    "depformer_low_rank_embeddings": 8,
    "depformer_pos_emb": "sin",
    "depformer_norm": "rms_norm_f32",
    "depformer_layer_scale": 0.1,
    "depformer_num_heads": 0,
    "depformer_gating": "softsign",
    "depformer_dim_feedforward": [99, 99, 66],
    "depformer_kv_repeat": 4,
    "depformer_skip_self_attn": True,
    "depformer_cross_attention": True,
    "tts_config": {"multistream": True},
    "stt_config": {"audio_delay_seconds": 0.5},
    "hiden_scale": 4,
}


@pytest.mark.parametrize("field", REFUSED)
def test_arguments_that_cannot_be_expressed(copied: Path, field: str) -> None:
    edit_config(copied, **{field: REFUSED[field]})
    with pytest.raises(ValueError) as raised:
        Moshi.from_kyutai(copied)
    assert f"{field}={REFUSED[field]!r}" in str(raised.value)
    assert str(copied) in str(raised.value)


def test_all_arguments_are_listed(copied: Path) -> None:
    """Those that have one value only, and those that disagree."""
    edit_config(copied, lora=True, causal=False, delays=[0] * 7)
    with pytest.raises(ValueError, match=r"cannot be expressed") as raised:
        Moshi.from_kyutai(copied)
    assert all(part in str(raised.value) for part in ("lora=True", "causal=False", "delays=[0, 0, 0, 0, 0, 0, 0]"))


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("", "sample_rate", 0),
        ("", "frame_rate", 750),
        ("", "channels", 2),
        ("", "resample_method", "interpolate"),
        ("seanet", "activation", "ReLU"),
        ("seanet", "norm", "weight_norm"),
        ("seanet", "causal", False),
        ("seanet", "pad_mode", "replicate"),
        ("seanet", "true_skip", False),
        ("seanet", "n_filters", "4"),
        ("seanet", "ratios", "42"),
        ("seanet", "ratios", [4, 0]),
        ("quantizer", "input_dimension", 16),
        ("quantizer", "bins", None),
        ("transformer", "d_model", 16),
        ("transformer", "num_heads", 3),
        ("transformer", "kv_repeat", 3),
        ("transformer", "gating", "silu"),
        ("transformer", "norm", "rms_norm"),
        ("transformer", "layer_scale", None),
        ("transformer", "max_period", "10000"),
        ("transformer", "context", None),
        ("transformer", "positional_embedding", "none"),
        ("transformer", "output_dimensions", [32, 32]),
        ("transformer", "cross_attention", True),
    ],
)
def test_mimis_that_cannot_be_expressed(copied: Path, part: str, field: str, value: Any) -> None:
    changes = {part: {**TINY_MIMI[part], field: value}} if part else {field: value}
    edit_config(copied, "mimi.json", **changes)
    name = f"{part}.{field}={value!r}" if part else f"{field}={value!r}"
    with pytest.raises(ValueError) as raised:
        Moshi.from_kyutai(copied)
    assert name in str(raised.value)


def test_mimi_without_a_part(copied: Path) -> None:
    edit_config(copied, "mimi.json", quantizer=None)
    with pytest.raises(ValueError, match=r"Mimi lacks \['quantizer'\]"):
        Moshi.from_kyutai(copied)


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05"),
        ({"head_dim": 8}, "head_dim=8"),
        ({"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, "rope_type='linear'"),
        ({"depth_decoder_config": {"sliding_window": 2}}, "sliding_window=2"),
        ({"depth_decoder_config": {"head_dim": 4}}, "head_dim=4"),
        ({"audio_encoder_config": {"norm_eps": 1e-6}}, "norm_eps=1e-06"),
        ({"audio_encoder_config": {"upsample_groups": 16}}, "upsample_groups=16"),
        ({"audio_encoder_config": {"codebook_dim": 6}}, "codebook_dim=6"),
        ({"audio_encoder_config": {"decoder_config": None}}, "has dropped one"),
    ],
)
def test_configurations_that_the_format_cannot_express(tmp_path: Path, overrides: dict[str, Any], found: str) -> None:
    config = tiny_moshi_config(**overrides)
    with pytest.raises(ValueError) as raised:
        of_moshi.write_kyutai(config, {}, tmp_path / "out")
    assert found in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_bad_arguments_of_writing(tmp_path: Path) -> None:
    config = tiny_moshi_config()
    model, params = Moshi(config, _do_init=False), {"decoder": {}}
    with pytest.raises(ValueError, match=r"params lack \['audio_encoder', 'depth_decoder', 'embed_tokens'\]"):
        of_moshi.write_kyutai(config, params, tmp_path)
    with pytest.raises(ValueError, match=r"would not load again: audio_encoder/.* is missing; .* and \d+ more"):
        model.save_kyutai(tmp_path, params)
    whole = model.params_shape_tree
    with pytest.raises(ValueError, match=r"params would not load again: .* no array with values"):
        model.save_kyutai(tmp_path, whole)
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointNotFoundError, match=r"tokenizer='absent.model' is no file"):
        of_moshi.write_kyutai(config, whole, tmp_path, tokenizer="absent.model")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"is a file; give a directory"):
        of_moshi.write_kyutai(config, whole, tmp_path / "file")
    (tmp_path / "config.json").write_text(config.to_json_string())
    with pytest.raises(ValueError, match=r"holds a checkpoint of transformers; give another directory"):
        of_moshi.write_kyutai(config, whole, tmp_path)


def test_saving_over_files_of_kyutai_is_refused(copied: Path) -> None:
    """Whatever they are called: config.json names them."""
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    model = Moshi.from_kyutai(copied)
    for to_pt in (False, True):
        with pytest.raises(ValueError, match=r"save_directory=.* holds a checkpoint in Kyutai's format"):
            model.save_pretrained(copied, to_pt=to_pt)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("moshi.safetensors", "has no 'moshi.safetensors' .the weights of the language model.; set moshi_name"),
        ("mimi.safetensors", "has no 'mimi.safetensors' .the weights of Mimi.; set mimi_name"),
        ("mimi.json", "has no 'mimi.json' .the configuration of Mimi.; set mimi_config_name"),
    ],
)
def test_missing_files_are_named(copied: Path, name: str, message: str) -> None:
    (copied / name).unlink()
    with pytest.raises(CheckpointNotFoundError, match=message):
        Moshi.from_kyutai(copied)


def test_a_directory_with_weights_of_another_type_only(tmp_path: Path) -> None:
    (tmp_path / "model.q4_k.gguf").touch()
    with pytest.raises(CheckpointNotFoundError, match=r"has no 'model.safetensors'.*q4_k\.gguf is of a type that is"):
        Moshi.from_kyutai(tmp_path)


def test_other_formats_are_told(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"moshi\.safetensors' is a file: give its directory"):
        Moshi.from_kyutai(copied / "moshi.safetensors")
    with pytest.raises(CheckpointNotFoundError, match=r"neither a directory nor a file"):
        Moshi.from_kyutai(tmp_path / "absent")
    (tmp_path / "config.json").write_text(tiny_moshi_config().to_json_string())
    with pytest.raises(ValueError, match=r"load it with from_pretrained"):
        Moshi.from_kyutai(tmp_path)


def test_tensors_that_do_not_fit_are_listed(copied: Path) -> None:
    path = copied / "moshi.safetensors"
    tensors = load_file(path)
    renamed = {key.replace("out_norm.alpha", "final.alpha"): tensor for key, tensor in tensors.items()}
    del renamed["emb.3.weight"]
    save_file(renamed, path)
    with pytest.raises(ValueError, match=r"does not fit .* no place for \['final\.alpha'\]") as raised:
        Moshi.from_kyutai(copied)
    for name in ("decoder/model/norm/scale", "embed_tokens/3/embedding"):
        assert name in str(raised.value).split("no place")[0]
    tensors["emb.0.weight"] = torch.zeros(33, 41)
    tensors["text_linear.weight"] = torch.zeros(50, 40, dtype=torch.int8)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"text_linear\.weight must be floating-point, but is int8") as raised:
        Moshi.from_kyutai(copied)
    assert "emb.0.weight is (33, 40) by the config, (33, 41) in the file" in str(raised.value)


def test_loading_as_from_pretrained(copied: Path) -> None:
    """One path for all formats: the same options with the same effects."""
    whole = Moshi.from_kyutai(copied)
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"))
    model, params, info = Moshi.from_kyutai(
        copied, torch_dtype="bfloat16", sharding=mesh, verify=True, output_loading_info=True, _do_init=False
    )
    assert model.dtype == "bfloat16" and not any(info.values())
    leaves = jax.tree.leaves(params)
    assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"} and all(leaf.sharding.mesh == mesh for leaf in leaves)
    assert_same_bits(params, whole.to_bf16(whole.params))
    assert Moshi.from_kyutai(copied, gradient_checkpointing=True).module.gradient_checkpointing
    few = Moshi.from_kyutai(
        copied, audio_encoder_config={"num_quantizers": whole.config.num_codebooks}, _do_init=False
    )
    assert few[0].config.audio_encoder_config.num_quantizers == whole.config.num_codebooks
    with pytest.raises(ValueError, match=r"from_kyutai has no keyword argument 'shardings'; did you mean 'sharding'"):
        Moshi.from_kyutai(copied, shardings=mesh)


def test_damage_is_found_where_it_is_looked_for(tmp_path: Path) -> None:
    Moshi(tiny_moshi_config(ffn_dim=142, depth_decoder_config={"ffn_dim": 62})).save_kyutai(tmp_path)
    path = tmp_path / of_moshi.MIMI_NAME
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    Moshi.from_kyutai(tmp_path, _do_init=False)
    with pytest.raises(ValueError, match=r"is damaged: .* checksum"):
        Moshi.from_kyutai(tmp_path, verify=True)


def test_fine_tunes_are_refused_by_what_they_are(copied: Path, tmp_path: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    edit_config(copied, dep_q=config["n_q"])
    with pytest.raises(
        ValueError, match=r"dep_q=\d+ \(it makes the user's stream as well; only Moshi's own"
    ) as raised:
        Moshi.from_kyutai(copied)
    assert "delays" not in str(raised.value)  # which are as they should be
    edit_config(copied, model_type="personaplex")
    with pytest.raises(ValueError, match=r"is in Kyutai's own format, which is loaded with from_kyutai"):
        Moshi.from_pretrained(copied)
    edit_config(copied, dep_q=config["dep_q"], model_type="moshi", lora=True)
    (copied / "moshi.safetensors").rename(copied / "lora.safetensors")
    (copied / "mimi.safetensors").rename(copied / of_moshi.MIMI_NAME)
    for load in (Moshi.from_kyutai, Moshi.from_pretrained):
        with pytest.raises(ValueError, match=r"holds a LoRA adapter of moshi-finetune, .*: load its base"):
            load(copied)


def test_a_fine_tune_without_its_config(tmp_path: Path) -> None:
    """It is no moshiko; the first thing that is wrong is not that tensors are missing."""
    model = Moshi(tiny_moshi_config())
    model.save_kyutai(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "params.json")
    with pytest.raises(ValueError, match=r"has no config\.json, which is needed for all but moshiko"):
        Moshi.from_kyutai(tmp_path)
    for load in (Moshi.from_pretrained, FlaxMimiModel.from_pretrained, MoshiProcessor.from_pretrained):
        with pytest.raises(OSError, match=r"it is in Kyutai's own format, which is loaded with from_kyutai"):
            load(tmp_path)
    with pytest.raises(ValueError, match=r"none of the file's .* Kyutai's own files, which are loaded with from_kyu"):
        Moshi.from_pretrained(tmp_path, config=model.config)
    with pytest.raises(ValueError, match=r"none of the file's .* Kyutai's own files, which are loaded with from_kyu"):
        FlaxMimiModel.from_pretrained(tmp_path / of_moshi.MIMI_NAME, config=model.config.audio_encoder_config)


@pytest.mark.parametrize("name", ["../moshi.safetensors", "/etc/hostname", "file://moshi.safetensors", "", 3, "a\\b"])
def test_names_do_not_lead_out_of_the_checkpoint(copied: Path, name: Any) -> None:
    edit_config(copied, moshi_name=name)
    with pytest.raises(ValueError, match=r"has moshi_name=.*give the name of a file of the checkpoint"):
        Moshi.from_kyutai(copied)


def test_files_of_other_repositories(copied: Path, monkeypatch: Any) -> None:
    asked = []

    def download(name: str, filename: str, **hub: Any) -> str:
        asked.append((name, filename, hub["token"], "revision" in hub))
        return str(copied / "moshi.safetensors")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    edit_config(copied, moshi_name="hf://kyutai/moshiko/weights/model.safetensors")
    files = find_kyutai_files(copied, token="secret", revision="v2")
    assert asked == [("kyutai/moshiko", "weights/model.safetensors", "secret", False)]
    assert files.moshi_weights == copied / "moshi.safetensors"


def test_config_json_commits(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving over a checkpoint leaves it whole until its config.json is replaced, and then nothing of it."""
    model = Moshi.from_kyutai(tiny.directory)
    model.save_kyutai(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = jax.tree.map(lambda leaf: leaf + 1 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, model.params)
    write_text = of_moshi.write_text

    def failing(path: Path, text: str) -> None:
        if path.name == "config.json":
            raise OSError("disk full")
        write_text(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(of_moshi, "write_text", failing)
        with pytest.raises(OSError, match="disk full"):
            model.save_kyutai(tmp_path, params=other)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), Moshi.from_kyutai(tmp_path).params, model.params))
    model.save_kyutai(tmp_path, params=other)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), Moshi.from_kyutai(tmp_path).params, other))
    assert len(list(tmp_path.iterdir())) == len(before)
