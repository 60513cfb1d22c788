"""What the subcommands share about checkpoints: the embedded one, opening one, its class, the dtype option."""

from __future__ import annotations

import dataclasses
import enum
from importlib import resources
from pathlib import Path
from typing import Any

from transformers_moshi_flax.cli.errors import UserMistake, as_mistake, hub_errors

ASSETS = Path(str(resources.files("transformers_moshi_flax") / "assets"))
EMBEDDED_MODEL = ASSETS / "moshi-converse"
EMBEDDED_QUESTION = ASSETS / "question.flac"
EMBEDDED_USER = ASSETS / "user.flac"
"""A single question, and a user who asks three and waits for the answers; what is said, with times, is beside them."""

NOTICE = "small demo model, synthetic voices"
"""What is said of the embedded checkpoint wherever it speaks."""

DEFAULT_ARCHITECTURES = {"moshi": "MoshiForConditionalGeneration", "mimi": "MimiModel"}
"""For checkpoints that do not say their architecture."""

KYUTAI_TENSORS = "depformer"
"""How names begin that only Kyutai's own layout of Moshi has."""


class Dtype(enum.StrEnum):
    """Types a model may be loaded in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"

    def to_jax(self) -> Any:
        """The type as ``jax.numpy`` has it."""
        import jax.numpy as jnp

        return getattr(jnp, self.value)


def source_of(model: str | None) -> str:
    """The checkpoint that ``--model`` names, or the embedded one."""
    return model or str(EMBEDDED_MODEL)


def is_embedded(source: str) -> bool:
    """Whether ``source`` is the embedded checkpoint."""
    return Path(source).resolve() == EMBEDDED_MODEL.resolve()


def name_of(source: str) -> str:
    """How files call a checkpoint: the embedded one by its name, without the folders above."""
    return EMBEDDED_MODEL.name if is_embedded(source) else source


def dtype_of(source: str, given: Dtype | None) -> Any:
    """In what ``--dtype`` has a checkpoint loaded; None is the checkpoint's own.

    The embedded one is stored in bfloat16 to be small, and computes in float32 as it has learned to.
    """
    if given is None and is_embedded(source):
        given = Dtype.float32
    return given and given.to_jax()


def load_with_tokenizer(model_class: type[Any], source: str, dtype: Dtype | None) -> tuple[Any, Any]:
    """The model of the checkpoint ``source`` and its tokenizer; PyTorch layout is converted in passing.

    Raises:
        UserMistake: weights or tokenizer are missing, broken, or do not fit the configuration.
    """
    from transformers import AutoTokenizer

    with as_mistake(f"--model: cannot load {source!r}", OSError, ValueError):
        model = model_class.from_pretrained(source, dtype=dtype_of(source, dtype))
    with as_mistake(f"--model: {source!r} has no tokenizer that can be read", OSError, ValueError):
        return model, AutoTokenizer.from_pretrained(source)


def with_notice(source: str, text: str) -> str:
    """``text``, and in brackets what is to be known of the embedded checkpoint, if it is that."""
    return f"{text} ({NOTICE})" if is_embedded(source) else text


def check_source(option: str, source: str, files: bool = False) -> None:
    """Make sure that ``source`` is a directory or may be an id on the Hub; with ``files`` a file will do too.

    Raises:
        UserMistake: it is neither.
    """
    path = Path(source)
    if path.is_dir() or (files and path.is_file()):
        return
    if path.exists():
        raise UserMistake(f"{option}: {source!r} is a file; give the directory of a checkpoint")
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserMistake(f"{option}: there is no directory {source!r}; give one, or an id on the Hub (owner/name)")


def read_config(option: str, source: str) -> dict:
    """The contents of ``config.json`` of a directory or Hub id.

    Raises:
        UserMistake: there is no such checkpoint, or its ``config.json`` is missing or cannot be read.
    """
    from transformers_moshi_flax.checkpoints import configs
    from transformers_moshi_flax.checkpoints.files import Source

    check_source(option, source)
    with as_mistake(f"{option}: cannot read the configuration of {source!r}", *hub_errors(), ValueError):
        return configs.read_config(Source.locate(source))


def find_config(option: str, source: str) -> dict | None:
    """As :func:`read_config`, of any format, also beside a weight file; None if there is no ``config.json``.

    Raises:
        UserMistake: it cannot be read, or the Hub could not be asked for it.
    """
    from transformers_moshi_flax.checkpoints.files import CheckpointNotFoundError, Source

    with as_mistake(f"{option}: cannot read the configuration of {source!r}", *hub_errors(), ValueError):
        place = Source.locate(source)
        config = place.read_json("config.json")
        if config is None and (unseen := place.absence("config.json")):
            raise CheckpointNotFoundError(unseen)
        return config


def flax_class(option: str, source: str, config: dict) -> type:
    """The class of this package for the architecture named in a checkpoint's ``config.json``.

    Raises:
        UserMistake: the architecture is none of ours.
    """
    import transformers_moshi_flax
    from transformers_moshi_flax.modeling_flax_auto import LLAMAS

    model_type = config.get("model_type", "")
    default = "LlamaForCausalLM" if model_type in LLAMAS else DEFAULT_ARCHITECTURES.get(model_type, "unknown")
    architectures = config.get("architectures") or [default]
    name = architectures[0].removeprefix("Flax")
    if model_type in LLAMAS:  # one class for all of them
        name = next((f"Llama{end}" for end in ("ForCausalLM", "Model") if name.endswith(end)), name)
    if f"Flax{name}" not in transformers_moshi_flax.__all__:
        raise UserMistake(
            f"{option}: {source!r} holds a {name} (model_type {config.get('model_type')!r}), which this package has "
            "not; give a checkpoint of Moshi, Mimi or a language model"
        )
    return getattr(transformers_moshi_flax, f"Flax{name}")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        name: as the user gave it.
        source: where its files lie.
        layout: ``"pt"`` or ``"flax"``.
        tensors: key -> array, read lazily; a ``TensorFile`` or ``ShardedFiles``.
        config: the contents of ``config.json``, or None.
    """

    name: str
    source: Any
    layout: str
    tensors: Any
    config: dict | None

    @property
    def files(self) -> tuple[Any, ...]:
        """The weight files, each a ``TensorFile``."""
        return getattr(self.tensors, "files", (self.tensors,))

    @property
    def is_kyutai(self) -> bool:
        """Whether it is in Kyutai's own layout of Moshi, which no model class reads as it is."""
        return any(name.startswith(KYUTAI_TENSORS) for name in self.tensors)

    def empty_model(self, option: str, model_class: type[Any]) -> Any:
        """A model of the class without parameters, by the checkpoint's configuration.

        Raises:
            UserMistake: the configuration does not make such a model.
        """
        from transformers_moshi_flax.checkpoints.configs import load_config

        with as_mistake(f"{option}: no {model_class.__name__} by the config of {self.name!r}", OSError, ValueError):
            return model_class(load_config(model_class.known_configs(), self.source), _do_init=False)
