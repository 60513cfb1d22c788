"""The auto classes: a model class chosen by the ``model_type`` of a configuration, as in ``transformers``.

The classes of this package are imported when one of them is chosen.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from .checkpoints.configs import read_config
from .checkpoints.files import Source
from .checkpoints.keywords import one_token

PACKAGE = __name__.rpartition(".")[0]
_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")


class FlaxModelMapping(Mapping[type[PreTrainedConfig], type[Any]]):
    """Configuration classes and their model classes.

    Args:
        names: ``model_type`` -> the public name of a model class of this package.
    """

    def __init__(self, names: dict[str, str]):
        self._names = names
        self._registered: dict[type[PreTrainedConfig], type[Any]] = {}

    def register(self, config_class: type[PreTrainedConfig], model_class: type[Any], exist_ok: bool = False) -> None:
        """Adds a pair; ValueError if there is one already, unless ``exist_ok``."""
        if config_class in self and not exist_ok:
            raise ValueError(
                f"{config_class.__name__} is already the configuration of {self[config_class].__name__}: pass "
                "exist_ok=True to replace it"
            )
        self._registered[config_class] = model_class

    def of_model_type(self, model_type: str | None) -> type[Any] | None:
        """The model class that was registered last for a ``model_type``, that of this package, or None."""
        for config_class, model_class in reversed(self._registered.items()):
            if config_class.model_type == model_type:
                return model_class
        name = self._names.get(model_type or "")
        return None if name is None else getattr(importlib.import_module(PACKAGE), name)

    @property
    def model_types(self) -> list[str]:
        return sorted({*self._names, *(config_class.model_type for config_class in self._registered)})

    def _pairs(self) -> dict[type[PreTrainedConfig], type[Any]]:
        package = importlib.import_module(PACKAGE)
        ours = (getattr(package, name) for name in self._names.values())
        pairs = {config_class: model_class for model_class in ours for config_class in model_class.known_configs()}
        return {**pairs, **self._registered}

    def __getitem__(self, config_class: type[PreTrainedConfig]) -> type[Any]:
        return self._pairs()[config_class]

    def __iter__(self) -> Iterator[type[PreTrainedConfig]]:
        return iter(self._pairs())

    def __len__(self) -> int:
        return len(self._pairs())


LLAMAS = ("gemma2", "gemma3_text", "helium", "llama", "mistral", "qwen2", "qwen3")
"""The ``model_type`` of the language models that are one class here."""

FLAX_MODEL_MAPPING = FlaxModelMapping(
    {
        **dict.fromkeys(LLAMAS, "FlaxLlamaModel"),
        "hubert": "FlaxHubertModel",
        "mimi": "FlaxMimiModel",
        "mimi_decoder": "FlaxMimiDecoderModel",
        "mimi_encoder": "FlaxMimiEncoderModel",
        "moshi": "FlaxMoshiModel",
        "moshi_depth": "FlaxMoshiDepthDecoder",
        "voxtral_encoder": "FlaxWhisperEncoder",
        "wav2vec2": "FlaxWav2Vec2Model",
        "whisper": "FlaxWhisperEncoder",
    }
)
FLAX_MODEL_FOR_CAUSAL_LM_MAPPING = FlaxModelMapping(
    {**dict.fromkeys(LLAMAS, "FlaxLlamaForCausalLM"), "moshi": "FlaxMoshiForCausalLM"}
)
FLAX_MODEL_FOR_MULTIMODAL_LM_MAPPING = FlaxModelMapping(
    dict.fromkeys(("speech_language", "voxtral"), "FlaxSpeechLanguageModel")
)

FLAX_AUDIO_ENCODER_MAPPING = FlaxModelMapping(
    {"hubert": "FlaxHubertModel", "wav2vec2": "FlaxWav2Vec2Model", "whisper": "FlaxWhisperEncoder"}
)


class _FlaxAutoModelClass:
    """What the auto classes share."""

    _model_mapping: ClassVar[FlaxModelMapping]

    def __init__(self, *args: Any, **kwargs: Any):
        name = type(self).__name__
        raise OSError(f"{name} only chooses a class: call {name}.from_pretrained(...) or {name}.from_config(config)")

    @classmethod
    def from_config(cls, config: PreTrainedConfig, trust_remote_code: bool | None = None, **kwargs: Any) -> Any:
        """A model with random parameters.

        Args:
            config: decides on the class.
            trust_remote_code: as in :meth:`from_pretrained`, where ``config`` was loaded from there.
            **kwargs: of the class: ``input_shape``, ``seed``, ``dtype``, ``_do_init``, …

        Raises:
            ValueError: no class for this configuration, or what the class refuses.
        """
        own_code = getattr(config, "auto_map", None) or {}
        model_class = cls._own_class(own_code, config.name_or_path, config.model_type, trust_remote_code)
        if model_class is None:
            model_class = cls._model_mapping.get(type(config)) or cls._chosen(config.model_type, "the configuration")
        return model_class._from_config(config, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args: Any,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        trust_remote_code: bool | None = None,
        code_revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """A model from a checkpoint.

        Args:
            pretrained_model_name_or_path: a directory, a weight file or a Hub id.
            *model_args: of the class's ``from_pretrained``, such as ``dtype``.
            config: instead of the checkpoint's: a configuration, or where to load one. It decides on the class.
            trust_remote_code: True runs the code that lies beside the checkpoint, if its ``config.json`` names a class
                of its own in ``auto_map`` (:meth:`FlaxPreTrainedModel.register_for_auto_class`). None and False do so
                never.
            code_revision: of that code, if it lies in another repository.
            **kwargs: of the class's ``from_pretrained``.

        Raises:
            CheckpointNotFoundError: (an ``OSError`` and a ``ValueError``) a file is missing.
            ValueError: no class for this ``model_type``; a checkpoint that needs its own code, which is not trusted;
                and what the class refuses.
        """
        name = pretrained_model_name_or_path
        hub = {key: kwargs[key] for key in _HUB if key in kwargs}
        hub["token"] = one_token(kwargs.get("token"), kwargs.get("use_auth_token"))
        if isinstance(config, PreTrainedConfig):
            values, where = config.to_dict(), "the configuration"
        else:
            source = (
                Source.locate(name, kwargs.get("subfolder") or "", **hub)
                if config is None
                else Source.locate(config, **hub)
            )
            values, where = read_config(source, kwargs.get("from_pt")), repr(source.name)
        model_type, own_code = values.get("model_type"), values.get("auto_map") or {}
        model_class = cls._own_class(
            own_code, name, model_type, trust_remote_code, code_revision=code_revision, **hub
        ) or cls._chosen(model_type, where)
        if isinstance(config, PreTrainedConfig):
            model_class = cls._model_mapping.get(type(config), model_class)
        given = {} if config is None else {"config": config}
        return model_class.from_pretrained(name, *model_args, **given, **kwargs)

    @classmethod
    def register(cls, config_class: type[PreTrainedConfig], model_class: type[Any], exist_ok: bool = False) -> None:
        """Adds a class of one's own.

        Args:
            config_class: its ``model_type`` is what ``config.json`` says.
            model_class: a ``FlaxPreTrainedModel`` with this ``config_class``.
            exist_ok: replace what is there.

        Raises:
            ValueError: another ``config_class``, or there is a class already.
        """
        own = model_class.known_configs() if hasattr(model_class, "known_configs") else (config_class,)
        if config_class not in own:
            raise ValueError(
                f"{model_class.__name__} has the config_class {own[0].__name__}, not {config_class.__name__}: "
                "register it with its own"
            )
        cls._model_mapping.register(config_class, model_class, exist_ok)

    @classmethod
    def _chosen(cls, model_type: str | None, where: str) -> type[Any]:
        model_class = cls._model_mapping.of_model_type(model_type)
        if model_class is None:
            known = ", ".join(cls._model_mapping.model_types)
            raise ValueError(
                f"model_type={model_type!r} of {where} has no class in {cls.__name__}, which knows {known}: load the "
                "class that belongs to it, or register one"
            )
        return model_class

    @classmethod
    def _own_class(
        cls,
        auto_map: Mapping[str, str],
        name: str | os.PathLike,
        model_type: str | None,
        trust_remote_code: bool | None,
        **hub: Any,
    ) -> type[Any] | None:
        """The class that a checkpoint brings along, None if it has none or has one that need not be trusted."""
        reference = auto_map.get(cls.__name__)
        if reference is None:
            return None
        if not trust_remote_code:
            if cls._model_mapping.of_model_type(model_type) is not None:
                return None
            raise ValueError(
                f"{os.fspath(name)!r} needs code of its own, {reference}: read it, and pass trust_remote_code=True"
            )
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        model_class = get_class_from_dynamic_module(reference, name, **hub)
        model_class.register_for_auto_class(cls)
        return model_class


class FlaxAutoModel(_FlaxAutoModelClass):
    """The base model of a checkpoint: without a head, and the codec whole."""

    _model_mapping = FLAX_MODEL_MAPPING


class FlaxAutoModelForCausalLM(_FlaxAutoModelClass):
    """The model of a checkpoint with a head for text."""

    _model_mapping = FLAX_MODEL_FOR_CAUSAL_LM_MAPPING


class FlaxAutoModelForMultimodalLM(_FlaxAutoModelClass):
    """The model of a checkpoint that answers with text to text and recordings."""

    _model_mapping = FLAX_MODEL_FOR_MULTIMODAL_LM_MAPPING


class FlaxAutoAudioEncoder(_FlaxAutoModelClass):
    """The encoder of a checkpoint of audio, for :class:`FlaxAudioEncoder`."""

    _model_mapping = FLAX_AUDIO_ENCODER_MAPPING
