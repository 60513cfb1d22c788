"""Moshi in Kyutai's own files: which they are, how their tensors map to the parameter tree, and back.

A checkpoint is a directory or a Hub repository with the language model, Mimi, the text tokenizer and a ``config.json``
that names them; without ``config.json`` they have the names of the published moshiko and moshika. Our tree is written
the same way, for the ``moshi`` package and what else reads its files.
"""

from __future__ import annotations

import dataclasses
import filecmp
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Set
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike
from transformers import MoshiConfig

from ...checkpoints.configs import override_config
from ...checkpoints.files import CheckpointNotFoundError, Source
from ...checkpoints.fitting import Weights
from ...checkpoints.formats import open_kyutai, open_safetensors
from ...checkpoints.keywords import understood
from ...checkpoints.recognising import no_model
from ...checkpoints.rules import IDENTITY, REVERSED, SCALE, ReadResult, Rule, read_slots, table_slots, table_tensors
from ...checkpoints.writing import (
    TEMPORARY,
    atomic_file,
    check_gguf,
    lock_folder,
    write_gguf,
    write_safetensors,
    write_text,
)
from ...modeling_flax_utils import FlaxPreTrainedModel, check_dtypes
from ...nn.linear import CODES
from ...quantization.config import QuantizationConfig
from ...quantization.tree import quantized_layers
from ..mimi.kyutai_flax_mimi import (
    CODEBOOKS,
    KYUTAI_MIMI,
    attention_rules,
    kyutai_mimi_rules,
    mimi_config_from_kyutai,
    mimi_config_to_kyutai,
)
from .kyutai_config_flax_moshi import (
    KYUTAI_MOSHI,
    generation_config_from_kyutai,
    made_whole,
    moshi_config_from_kyutai,
    moshi_config_to_kyutai,
)
from .kyutai_quantized_flax_moshi import Q8, language_model_tensors, own_steps, q8_tensors, quantized_rules
from .kyutai_steps_flax_moshi import CANDLE_GRIDS, MLX_GRIDS, candle_tensors, check_widths, mlx_tensors

logger = logging.getLogger(__name__)

MOSHI_NAME = "model.safetensors"
MOSHI_Q8_NAME = "model.q8.safetensors"
QUANTIZED_NAMES = (MOSHI_Q8_NAME, "model.q4.safetensors", "model.q8.gguf")
"""Of quantized weights, as they are published."""
PACKAGES = {"moshi": {MOSHI_Q8_NAME: Q8}, "mlx": MLX_GRIDS, "candle": CANDLE_GRIDS}
"""Packages that files are written for -> what they call weights that are quantized, and how these are."""
_OF_STEPS = {"mlx": mlx_tensors, "candle": candle_tensors}
"""Those that have a transformer for each step of the depth decoder -> what makes their tensors."""
MIMI_NAME = "tokenizer-e351c8d8-checkpoint125.safetensors"
TOKENIZER_NAME = "tokenizer_spm_32k_3.model"
MIMI_CONFIG_NAME = "mimi_config.json"


@dataclasses.dataclass(frozen=True)
class KyutaiFiles:
    """A checkpoint in Kyutai's format.

    Attributes:
        name: as the user gave it.
        is_on_hub: whether that is an id on the Hub.
        config: content of ``config.json``, that of moshiko if there is none.
        told: whether there is one.
        mimi_config: configuration of the audio codec.
        moshi_weights, mimi_weights: the weight files.
        tokenizer: the SentencePiece model of the text, None if the checkpoint has none.
    """

    name: str
    is_on_hub: bool
    config: Mapping[str, Any]
    told: bool
    mimi_config: Mapping[str, Any]
    moshi_weights: Path
    mimi_weights: Path
    tokenizer: Path | None


def find_kyutai_files(name_or_path: str | os.PathLike, **hub: Any) -> KyutaiFiles:
    """Find, or download, the files of a checkpoint as Kyutai's loader does.

    Args:
        name_or_path: a directory or a Hub id.
        **hub: ``revision``, ``token``, ``cache_dir``, ... as in ``transformers``.

    Raises:
        CheckpointNotFoundError: no such directory, or a file is not there.
        ValueError: the checkpoint is of ``transformers``, a weight file instead of its directory was given, or
            ``config.json`` names a file outside of the checkpoint.
    """
    source = Source.locate(name_or_path, **hub)
    if source.file is not None:
        raise ValueError(f"{source.name!r} is a file: give its directory, which has the codec and config.json as well")
    config = source.read_json("config.json")
    if config is None and (unseen := source.absence("config.json")):
        raise CheckpointNotFoundError(unseen)
    if known := no_model(source, config):
        raise CheckpointNotFoundError(f"{source.name!r} {known}")
    if config is not None and _is_of_transformers(config):
        raise ValueError(
            f"{source.name!r} is in the format of transformers, not in Kyutai's: load it with from_pretrained"
        )
    told, config = config is not None, config or KYUTAI_MOSHI

    def find(field: str, default: str) -> Path | None:
        return find_named_file(source, hub, field, config.get(field, default))

    def require(field: str, default: str, role: str, *other_defaults: str) -> Path:
        for name in (default, *other_defaults) if field not in config else (default,):
            if (path := find(field, name)) is not None:
                return path
        name = config.get(field, default)
        if unseen := source.absence(name):
            raise CheckpointNotFoundError(unseen)
        hint = f"set {field} in config.json to its name" if field in config else "add it"
        untold = "" if told else ", nor a config.json that names another"
        raise CheckpointNotFoundError(f"{source.name!r} has no {name!r} ({role}){untold}; {hint}")

    mimi_config = KYUTAI_MIMI
    if config.get("mimi_config_name") is not None:
        path = require("mimi_config_name", MIMI_CONFIG_NAME, "the configuration of Mimi")
        mimi_config = Source.locate(path.parent).read_json(path.name) or {}
    return KyutaiFiles(
        name=source.name,
        is_on_hub=source.folder is None,
        config=config,
        told=told,
        mimi_config=mimi_config,
        moshi_weights=require("moshi_name", MOSHI_NAME, "the weights of the language model", *QUANTIZED_NAMES),
        mimi_weights=require("mimi_name", MIMI_NAME, "the weights of Mimi"),
        tokenizer=find("tokenizer_name", TOKENIZER_NAME),
    )


def _is_of_transformers(config: Mapping[str, Any]) -> bool:
    return "audio_encoder_config" in config or "architectures" in config


def find_named_file(source: Source, hub: Mapping[str, Any], field: str, filename: Any) -> Path | None:
    """A file that ``config.json`` names: one of the checkpoint, or ``hf://owner/repository/path`` of another."""
    if isinstance(filename, str) and filename.startswith("hf://"):
        owner, repository, *parts = filename.removeprefix("hf://").split("/", 2)
        if parts:
            # The revision is the checkpoint's own.
            others = {name: value for name, value in hub.items() if name != "revision"}
            return Source.locate(f"{owner}/{repository}", **others).find(parts[0])
    # The configuration comes from strangers: a name must not lead out of the checkpoint.
    plain = isinstance(filename, str) and bool(filename) and "\\" not in filename and ":" not in filename
    if not plain or PurePosixPath(filename).is_absolute() or ".." in PurePosixPath(filename).parts:
        raise ValueError(
            f"config.json of {source.name!r} has {field}={filename!r}: give the name of a file of the checkpoint, or "
            "hf://owner/repository/path"
        )
    return source.find(filename)


def kyutai_moshi_rules(config: MoshiConfig, interleaved: bool = True) -> tuple[Rule, ...]:
    """The table of the language model in Kyutai's files.

    Args:
        config: of the model.
        interleaved: the rotary embedding of the file turns neighbouring rows, as all published models do; False for
            ``positional_embedding="rope_concat"``, which turns the same rows as ours.
    """
    layer, their_layer = r"decoder/model/layers/(\d+)", r"transformer.layers.\1"
    depth, their_depth = r"depth_decoder/layers/(\d+)", r"depformer.layers.\1"
    return (
        Rule(r"embed_tokens/(\d+)/embedding", r"emb.\1.weight"),
        Rule(r"decoder/model/embed_tokens/embedding", r"text_emb.weight"),
        *attention_rules(f"{layer}/self_attn", f"{their_layer}.self_attn", config.head_dim if interleaved else None),
        Rule(f"{layer}/mlp/fc1/kernel", f"{their_layer}.gating.linear_in.weight", REVERSED),
        Rule(f"{layer}/mlp/fc2/kernel", f"{their_layer}.gating.linear_out.weight", REVERSED),
        Rule(f"{layer}/input_layernorm/scale", f"{their_layer}.norm1.alpha", SCALE),
        Rule(f"{layer}/post_attention_layernorm/scale", f"{their_layer}.norm2.alpha", SCALE),
        Rule(r"decoder/model/norm/scale", r"out_norm.alpha", SCALE),
        Rule(r"decoder/lm_head/kernel", r"text_linear.weight", REVERSED),
        Rule(r"depth_decoder/text_embed_tokens/embedding", r"depformer_text_emb.weight"),
        Rule(r"depth_decoder/embed_tokens/(\d+)/embedding", r"depformer_emb.\1.weight", IDENTITY),
        Rule(r"depth_decoder/input_projections/(\d+)/kernel", r"depformer_in.\1.weight", REVERSED),
        Rule(r"depth_decoder/lm_heads/(\d+)/kernel", r"linears.\1.weight", REVERSED),
        *attention_rules(f"{depth}/self_attn", f"{their_depth}.self_attn", None, per_codebook=True),
        Rule(rf"{depth}/mlp/fc1/(\d+)/kernel", rf"{their_depth}.gating.\2.linear_in.weight", REVERSED),
        Rule(rf"{depth}/mlp/fc2/(\d+)/kernel", rf"{their_depth}.gating.\2.linear_out.weight", REVERSED),
        Rule(f"{depth}/input_layernorm/scale", f"{their_depth}.norm1.alpha", SCALE),
        Rule(f"{depth}/post_attention_layernorm/scale", f"{their_depth}.norm2.alpha", SCALE),
    )


def kyutai_config(files: KyutaiFiles) -> MoshiConfig:
    """Our configuration for a checkpoint; ValueError listing the fields that it cannot express."""
    try:
        return moshi_config_from_kyutai(files.config, mimi_config_from_kyutai(files.mimi_config))
    except ValueError as error:
        raise ValueError(f"{files.name!r}: {error}") from error


def kyutai_weights(files: KyutaiFiles, config: MoshiConfig, dtype: DTypeLike | None = None) -> Weights:
    """The weights of a checkpoint.

    Args:
        files: from :func:`find_kyutai_files`.
        config: of the model, from :func:`kyutai_config`.
        dtype: that floats are to be cast to; one that rounds what codes stand for is told.

    Raises:
        ValueError: damaged files, or floats where ``config.json`` tells of quantized weights.
    """
    language_model = language_model_tensors(open_kyutai(files.moshi_weights))
    if others := made_whole(files.config)[1]:
        language_model = own_steps(language_model, config.num_codebooks, others)
    opened = (language_model.file, open_safetensors(files.mimi_weights))
    if files.config.get("quantize") and language_model.quantization is None:
        raise ValueError(
            f"config.json of {files.name!r} says quantize={files.config['quantize']!r}, but the weights in "
            f"{files.moshi_weights.name} are not quantized: take the config.json that belongs to them"
        )
    if language_model.dequantized and dtype is not None and jnp.finfo(dtype).bits < 32:
        logger.warning(
            f"the embeddings of {files.name!r}, which are quantized there, are floats here: dtype={jnp.dtype(dtype)} "
            "rounds them once more, float32 does not"
        )
    interleaved = files.config.get("positional_embedding") != "rope_concat"
    tables = (
        quantized_rules(kyutai_moshi_rules(config, interleaved)),
        kyutai_mimi_rules(config.audio_encoder_config),
    )

    def fit(model: FlaxPreTrainedModel, convert: Callable[[str, np.ndarray], Any]) -> tuple[ReadResult, list[str]]:
        moshi = dict(model.params_shape_tree)
        mimi = moshi.pop("audio_encoder")
        whole, surplus = ReadResult({}, [], [], [], []), []
        sources = (language_model, opened[1])
        for tree, rules, tensors, start in zip((moshi, mimi), tables, sources, ("", "audio_encoder/")):
            template = flatten_dict(tree, sep="/")
            slots = table_slots(template, rules)
            if tensors is language_model:
                language_model.refuse_floats(slots)
            found = read_slots(
                slots,
                template,
                tensors,
                convert=partial(lambda start, path, leaf: convert(start + path, leaf), start),
            )
            whole.params |= {start + path: leaf for path, leaf in found.params.items()}
            whole.missing += [start + path for path in found.missing]
            whole.unexpected += found.unexpected
            whole.mismatched += found.mismatched
            whole.not_floating += found.not_floating
            surplus += [key for key in found.unexpected if not re.search(CODEBOOKS, key)]
        return whole, surplus

    quantization = language_model.quantization
    quantized = None if quantization is None else quantization.to_dict()
    return Weights(files.name, files.is_on_hub, opened, fit, quantized)


def write_kyutai(
    config: MoshiConfig,
    params: Mapping[str, Any],
    directory: str | os.PathLike,
    tokenizer: str | os.PathLike | None = None,
    package: str = "moshi",
) -> None:
    """Write a model in Kyutai's format; replacing ``config.json``, which names the files, is the one commit.

    The names are those of the published checkpoints, or new ones where such files are there already; files that only
    the replaced ``config.json`` named go at the end, as do those that a killed save left. Other savers of the
    directory wait. ``mimi_config.json`` is written if Mimi is not the published one. How to sample is not written:
    Kyutai's generation has its own defaults.

    Args:
        config: of the model.
        params: its parameter tree.
        directory: made if it is not there.
        tokenizer: a SentencePiece model to copy into it. Kyutai's loader wants one; without it, it must be told where
            to find another.
        package: that is to load it, ``"moshi"``, ``"mlx"`` or ``"candle"``.

    Raises:
        ValueError: there is no such package, the configuration cannot be expressed in its format, ``directory`` is a
            file or holds a checkpoint of ``transformers``, incomplete ``params``; ``gguf`` is not installed, which
            writes candle's quantized weights.
        CheckpointNotFoundError: ``tokenizer`` is no file.
        OSError: the directory cannot be written or the disk is full; the old checkpoint is untouched.
    """
    mimi = mimi_config_to_kyutai(config.audio_encoder_config)
    values = {"model_type": "moshi", **moshi_config_to_kyutai(config)}
    moshi_rules, mimi_rules = kyutai_moshi_rules(config), kyutai_mimi_rules(config.audio_encoder_config)
    if package == "mlx":
        check_widths(config, values["depformer_dim_feedforward"])
    name = _name_of_weights(params, package)
    values |= {"quantize": True} if name == MOSHI_Q8_NAME and package == "moshi" else {}
    folder = Path(directory)
    _check_parts(params, folder, tokenizer, name)
    folder.mkdir(parents=True, exist_ok=True)

    save_id = uuid.uuid4().hex[:8]
    written: list[Path] = []

    def free(name: str) -> Path:
        stem, suffix = name.split(".", 1)
        path = folder / (f"{stem}-{save_id}.{suffix}" if (folder / name).exists() else name)
        written.append(path)
        return path

    with lock_folder(folder):
        replaced = _config_of(folder)
        # Both formats call their files config.json and model.safetensors.
        if _is_of_transformers(replaced):
            raise ValueError(f"directory={str(folder)!r} holds a checkpoint of transformers; give another directory")
        kept = {Path(tokenizer).resolve().name} if tokenizer is not None else set()
        if replaced:  # else files of the usual names may be a checkpoint, as that of moshiko is published
            _clear(folder, _named_files(replaced) | kept)
        try:
            moshi = {part: tree for part, tree in params.items() if part != "audio_encoder"}
            tensors = _tensors_for(package, name, moshi, moshi_rules, config.num_codebooks)
            values["moshi_name"] = _write_weights(free(name), tensors)
            del tensors
            values["mimi_name"] = _write_weights(free(MIMI_NAME), _tensors(params["audio_encoder"], mimi_rules))
            if tokenizer is not None:
                values["tokenizer_name"] = Path(tokenizer).name
                there = folder / values["tokenizer_name"]
                if not (there.is_file() and filecmp.cmp(tokenizer, there, shallow=False)):
                    copy = free(values["tokenizer_name"])
                    values["tokenizer_name"] = copy.name
                    with atomic_file(copy) as temporary:
                        shutil.copyfile(tokenizer, temporary)
            if mimi != KYUTAI_MIMI:
                path = free(MIMI_CONFIG_NAME)
                values["mimi_config_name"] = path.name
                write_text(path, json.dumps(mimi, indent=2) + "\n")
            write_text(folder / "config.json", json.dumps(values, indent=2) + "\n")
        except BaseException:
            committed = _named_files(_config_of(folder))
            for path in written:
                if path.name not in committed:
                    path.unlink(missing_ok=True)
            raise
        for name in _named_files(replaced, tokenizer=False) - _named_files(values):
            (folder / name).unlink(missing_ok=True)
        _clear(folder, _named_files(values) | kept)


def _check_parts(params: Mapping[str, Any], folder: Path, tokenizer: str | os.PathLike | None, name: str) -> None:
    """Refuse what cannot be written, as a file of weights with that name."""
    lacking = sorted({"embed_tokens", "decoder", "depth_decoder", "audio_encoder"} - set(params))
    if lacking:
        raise ValueError(f"params lack {lacking}; give those of FlaxMoshiForConditionalGeneration")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"directory={str(folder)!r} is a file; give a directory")
    if tokenizer is not None and not Path(tokenizer).is_file():
        raise CheckpointNotFoundError(f"tokenizer={os.fspath(tokenizer)!r} is no file; give a SentencePiece model")
    if name.endswith(".gguf"):
        check_gguf(name)


def _tensors_for(
    package: str, name: str, moshi: Mapping[str, Any], rules: tuple[Rule, ...], num_codebooks: int
) -> dict[str, np.ndarray]:
    """Those of the file ``name``."""
    if package in _OF_STEPS:
        return _OF_STEPS[package](moshi, rules, num_codebooks)
    if name == MOSHI_NAME:
        return _tensors(moshi, rules)
    return q8_tensors(moshi, quantized_rules(rules))


def _name_of_weights(params: Mapping[str, Any], package: str) -> str:
    if package not in PACKAGES:
        raise ValueError(f"package={package!r} must be one of {', '.join(map(repr, PACKAGES))}")
    kinds = {path[-1] for path in flatten_dict(dict(params))} & {*CODES.values()}
    names = (name for name, grid in PACKAGES[package].items() if CODES[str(grid.kind)] in kinds)
    return next(names, MOSHI_NAME)


def _tensors(params: Mapping[str, Any], rules: tuple[Rule, ...]) -> dict[str, np.ndarray]:
    return {tensor.key: tensor.build() for tensor in table_tensors(params, rules)}


def _write_weights(path: Path, tensors: dict[str, np.ndarray]) -> str:
    if path.suffix == ".gguf":
        write_gguf(path, tensors)
    else:
        write_safetensors(path, tensors, "pt")
    return path.name


def _config_of(folder: Path) -> dict[str, Any]:
    return Source.locate(folder).read_json("config.json") or {}


def _named_files(config: Mapping[str, Any], tokenizer: bool = True) -> set[str]:
    """The files of the directory that a ``config.json`` names; none if there is no such file."""
    if not config:
        return set()
    defaults = {"moshi_name": MOSHI_NAME, "mimi_name": MIMI_NAME, "mimi_config_name": None}
    defaults |= {"tokenizer_name": TOKENIZER_NAME} if tokenizer else {}
    names = {config.get(field, default) for field, default in defaults.items()}
    return {name for name in names if isinstance(name, str) and Path(name).name == name}


def _clear(folder: Path, kept: Set[str]) -> None:
    """Remove what only a save that was killed can have left: files of our names that are not ``kept``."""
    for path in folder.iterdir():
        ours = path.match(TEMPORARY) or _OURS.fullmatch(path.name)
        if ours and path.name not in kept and path.is_file():
            path.unlink(missing_ok=True)


_ID = "-[0-9a-f]{8}"
_OURS = re.compile(
    rf"({Path(MOSHI_NAME).stem}({_ID})?(\.q[48])?|{Path(MIMI_NAME).stem}({_ID})?)\.(safetensors|gguf)"
    rf"|{Path(MIMI_CONFIG_NAME).stem}({_ID})?\.json|tokenizer.*{_ID}\.model"
)
"""Names that :func:`write_kyutai` gives."""


class KyutaiCheckpointMixin(FlaxPreTrainedModel):
    """Loading from and saving to Kyutai's own files, for the whole of Moshi."""

    @classmethod
    def from_kyutai(
        cls,
        name_or_path: str | os.PathLike,
        dtype: Any = None,
        *,
        param_dtype: Any = None,
        revision: str = "main",
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        _do_init: bool = True,
        sharding: Any | None = None,
        verify: bool = False,
        quantization: QuantizationConfig | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make a model from a checkpoint in Kyutai's format, such as ``kyutai/moshiko-pytorch-bf16``.

        It samples as Kyutai's generation does (``generation_config``). Weights that are quantized in the files
        (``kyutai/moshiko-pytorch-q8``) stay so: the model has quantized layers of the same codes. PersonaPlex's depth
        decoder guesses the user's codes as well: the steps of Moshi's own are loaded.

        Args:
            name_or_path: a directory or a Hub id.
            dtype, param_dtype, ignore_mismatched_sizes, output_loading_info, _do_init, sharding, verify, quantization:
                as of :meth:`from_pretrained`.
            revision, token, cache_dir, local_files_only, force_download: of the Hub, as in ``transformers``.
            **kwargs: ``seed``, ``input_shape``, fields of the module, or attributes of the configuration to change, as
                of :meth:`from_pretrained`.

        Returns:
            As :meth:`from_pretrained`.

        Raises:
            CheckpointNotFoundError: (an ``OSError`` and a ``ValueError``) a file is missing.
            ValueError: damaged files; arguments that this architecture cannot express, or weights that do not fit,
                all of them listed; unknown keywords.
        """
        given = understood(dtype, param_dtype, token, kwargs)
        check_dtypes(given.dtype, given.param_dtype)
        files = find_kyutai_files(
            name_or_path,
            revision=revision,
            token=given.token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        config = kyutai_config(files)
        model_kwargs, config_kwargs = cls._split_kwargs(config, given.rest, "from_kyutai")
        config = override_config(config, config_kwargs)
        try:
            return cls._from_weights(
                config,
                kyutai_weights(files, config, given.dtype if given.param_dtype is None else given.param_dtype),
                dtype=given.dtype,
                param_dtype=given.param_dtype,
                generation_config=generation_config_from_kyutai(files.config.get("lm_gen_config") or {}),
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                output_loading_info=output_loading_info,
                _do_init=_do_init,
                sharding=sharding,
                verify=verify,
                quantization=quantization,
                **model_kwargs,
            )
        except ValueError as error:
            if files.told or isinstance(error, OSError):
                raise
            raise ValueError(
                f"{files.name!r} has no config.json, which is needed for all but moshiko and moshika themselves: add "
                f"that of the model. As moshiko: {error}"
            ) from error

    def save_kyutai(
        self,
        directory: str | os.PathLike,
        params: Mapping[str, Any] | None = None,
        tokenizer: str | os.PathLike | None = None,
        package: str = "moshi",
    ) -> None:
        """Write the model in Kyutai's format, as :func:`write_kyutai` does.

        Weights may be quantized as the package has them: for ``moshi``
        ``QuantizationConfig("int8", skip=["audio_encoder"])``, for ``moshi_mlx``
        ``QuantizationConfig("int4", group_size=32, skip=["audio_encoder"], offsets=True)``, or ``"int8"`` and 64, for
        candle ``QuantizationConfig("int8", group_size=32, skip=["audio_encoder"])``, written by ``gguf`` (extra
        ``gguf``). Codes are copied; embeddings are quantized for MLX and candle, which rounds them.

        Args:
            directory: made if it is not there.
            params: the parameters to write, the model's own if None.
            tokenizer: a SentencePiece model to copy into it.
            package: of Kyutai's that is to load it, ``"moshi"``, ``"mlx"`` or ``"candle"``.

        Raises:
            ValueError: ``params`` that are incomplete, too many, of other shapes, not floating-point or no arrays; a
                configuration that the format cannot express; weights that are quantized in another way than the
                package has.
        """
        self._refuse_other_grids(package)
        write_kyutai(self.config, self._savable_params(params), directory, tokenizer, package)

    def _refuse_other_grids(self, package: str) -> None:
        quantization, shapes = self.quantization, self._float_shape_tree
        if quantization is None:
            return
        theirs = [*PACKAGES.get(package, {}).values()]
        for grid in theirs:
            alike = (quantization.kind, quantization.offsets) == (grid.kind, grid.offsets)
            alike &= not quantization.double_quantization
            if alike and quantized_layers(shapes, quantization, "") == quantized_layers(shapes, grid, ""):
                return
        listed = ", or ".join(map(str, theirs))
        raise ValueError(
            f"save_kyutai: the weights are quantized, {quantization}, but {package!r} has {listed} only; call "
            "dequantize() first (of files: moshi-flax convert SRC DST --quantize none), or load floats with such a "
            "QuantizationConfig"
        )
