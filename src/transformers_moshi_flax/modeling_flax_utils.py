"""``FlaxPreTrainedModel``: what every model class shares, with the public API that it had in ``transformers`` 4.57.

A model object holds a configuration, a linen module and, unless told otherwise, the parameters. The parameters are a
plain nested dict with the names of the upstream checkpoint; the mathematics never reads them from the object, so they
can be passed in (``params=``) and transformed freely.

What departs from the old class: a table of rules instead of guessed names for PyTorch files; errors that list every
bad weight instead of warnings; atomic saving; ``dtype=None`` of ``from_pretrained`` follows the checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.extend.core import ClosedJaxpr, Var, jaxpr_as_fun
from jax.typing import DTypeLike
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from .adapters.lora import check_rows
from .adapters.model import FlaxAdapterMixin
from .checkpoints import rules as tables
from .checkpoints.configs import (
    check_config_sizes,
    describes,
    did_you_mean,
    known_values,
    load_config,
    override_config,
    refuse_to_replace_kyutais,
)
from .checkpoints.files import FLAX_MSGPACK, FLAX_WEIGHTS, LAYOUTS, PT_WEIGHTS, Source, entry_of, is_weights
from .checkpoints.fitting import Weights
from .checkpoints.formats import parse_json
from .checkpoints.keywords import one_name, one_token, understood
from .checkpoints.loading import Transfers, main_dtype, to_device
from .checkpoints.own_code import own_code
from .checkpoints.uploading import Repository, check_upload
from .checkpoints.verifying import refuse_damage
from .checkpoints.writing import save_checkpoint, shard_bytes, write_text
from .generation.configuration import fields_of_model_config, load_generation_config, with_model_config
from .input_checks import same_structure, shortened
from .model_card import check_card_fields, is_generated, model_card
from .modeling_flax_outputs import FlaxModelOutput
from .nn.linear import KERNEL, OF_GROUPS
from .param_shapes import param_shapes, refuse_unsavable
from .partitioning import resolve_shardings
from .quantization.config import QuantizationConfig
from .quantization.model import FlaxQuantizationMixin
from .quantization.tree import quantized, quantized_layers, quantized_leaves, quantized_shapes

logger = logging.get_logger(__name__)

Params = dict[str, Any] | FrozenDict


class FlaxPreTrainedModel(FlaxAdapterMixin, FlaxQuantizationMixin):
    """Base of the model classes.

    Class attributes that a model sets:
        config_class: the configuration class of ``transformers``.
        config_classes: all of them, where there are several.
        base_model_prefix: name of the base model in the parameter tree of a class with a head; what lies outside it is
            the head, which may be missing from a checkpoint.
        main_input_name: name of the first input.
        module_class: the linen module, with fields ``config``, ``dtype`` and ``gradient_checkpointing``.
        checkpoint_rules: the table of the PyTorch layout.
        checkpoint_prefixes: under which prefixes the model may lie in a checkpoint of a larger one.
        checkpoint_series: regular expressions of tensors that count up in a file, and of which a configuration may ask
            for the first ones alone.
        checkpoint_optional: regular expressions of paths that a checkpoint may lack, as only training needs them; they
            are drawn at random then.
        default_input_shape: shape of the dummy input for initialisation.
        pipeline_tag: what the Hub says that the model does.

    Args:
        config: an instance of ``config_class``.
        input_shape: shape for initialisation, ``default_input_shape`` if None. No parameter depends on it.
        seed: of the random parameters.
        dtype: of the computation. The parameters of a new model are float32 whatever it is.
        _do_init: False makes no parameters; they are kept outside and passed in.
        **kwargs: further fields of the module, such as ``gradient_checkpointing=True``.

    Raises:
        ValueError: a configuration of another class or with sizes that no model has, a dtype that is not floating, an
            unknown keyword.
    """

    config_class: ClassVar[type[PreTrainedConfig]]
    config_classes: ClassVar[tuple[type[PreTrainedConfig], ...]] = ()
    base_model_prefix: ClassVar[str] = ""
    main_input_name: ClassVar[str] = "input_ids"
    module_class: ClassVar[type[nn.Module]]
    checkpoint_rules: ClassVar[tuple[tables.Rule, ...]] = ()
    checkpoint_prefixes: ClassVar[tuple[str, ...]] = ("",)
    checkpoint_series: ClassVar[tuple[str, ...]] = ()
    checkpoint_optional: ClassVar[tuple[str, ...]] = ()
    default_input_shape: ClassVar[tuple[int, ...]] = (1, 1)
    pipeline_tag: ClassVar[str] = "audio-to-audio"
    _generates: ClassVar[bool] = False
    _auto_class: ClassVar[str | None] = None
    _kept_for_speed: ClassVar[tuple[str, ...]] = (
        "_programs_of",
        "_programs",
        "_norms",
        "_parts",
        "_adapted",
    )
    # of a part of a larger model: that one, and the name of its parameters there
    _whole: FlaxPreTrainedModel | None = None
    _name_in_whole: str = ""

    def __init__(
        self,
        config: PreTrainedConfig,
        input_shape: tuple[int, ...] | None = None,
        seed: int = 0,
        dtype: DTypeLike = jnp.float32,
        _do_init: bool = True,
        **kwargs: Any,
    ):
        if not isinstance(config, self.known_configs()):
            names = " or ".join(known.__name__ for known in self.known_configs())
            raise ValueError(f"config must be a {names}, got {type(config).__name__}")
        check_config_sizes(type(config), config.to_dict())
        for name in kwargs:
            if name not in self._module_fields():
                hint = did_you_mean(name, self._module_fields())
                raise ValueError(f"{type(self).__name__} has no keyword argument {name!r}{hint}")
        check_float_dtype("dtype", dtype)
        self._config = config
        self._module_kwargs = kwargs
        self.dtype = dtype
        self.input_shape = tuple(self.default_input_shape if input_shape is None else input_shape)
        self._seed = seed
        self._module = self._build_module()
        self.generation_config = GenerationConfig.from_model_config(config) if self.can_generate() else None
        self._fields_of_generation = fields_of_model_config(config)
        self._is_initialized = _do_init
        self._find_shapes()
        self.name_or_path: str | None = None
        self.hub_id: str | None = None
        if _do_init:
            self.params = self.init_weights(self.key, self.input_shape)

    def generation_defaults(self) -> GenerationConfig | None:
        """``generation_config``, with what has been set in ``config`` since the model was made; that warns."""
        return with_model_config(self.generation_config, self.config, self._fields_of_generation)

    # What a model class defines

    def dummy_inputs(self, input_shape: tuple[int, ...]) -> dict[str, Any]:
        """Keyword arguments for ``module.init`` that reach every parameter."""
        raise NotImplementedError(f"{type(self).__name__} must define dummy_inputs")

    # State

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled (``copy``, ``joblib``, Ray): all but the compiled programs, which belong to this
        process. Parameters that are spread over devices arrive whole on the default device; a part of a larger model
        arrives alone."""
        state = {name: value for name, value in vars(self).items() if name not in self._kept_for_speed}
        if self._whole is not None:
            state["_whole"] = None
            if self._is_initialized:
                state["_params"] = self.params
        return state

    def _part_classes(self) -> dict[str, tuple[type[FlaxPreTrainedModel], PreTrainedConfig]]:
        """The models that this one consists of: name in the parameter tree -> class and configuration."""
        return {}

    def _part(self, name: str) -> Any:
        """One of them as a model of its own, which shares the parameters: setting them in one sets them in the other.

        It is made once, and keeps its compiled programs.
        """
        parts = vars(self).setdefault("_parts", {})
        if name not in parts:
            model_class, config = self._class_of_part(name)
            part = model_class.__new__(model_class)
            part._whole, part._name_in_whole = self, name  # by which it knows its quantized layers
            model_class.__init__(part, config, dtype=self.dtype, _do_init=False, **self._module_kwargs)
            part._is_initialized = self._is_initialized
            parts[name] = part
        part = parts[name]
        if part.can_generate():
            part.generation_config = self.generation_config
        return part

    @property
    def base_model(self) -> FlaxPreTrainedModel:
        """The model without its head, or itself."""
        return self._part(self.base_model_prefix) if self.base_model_prefix in self._part_classes() else self

    def _rebuild(self, config: PreTrainedConfig) -> None:
        """Take on another configuration, of the same layers."""
        self._config = config
        self._module = self._build_module()
        self._find_shapes()
        for name, part in vars(self).get("_parts", {}).items():
            part._rebuild(self._class_of_part(name)[1])

    def _class_of_part(self, name: str) -> tuple[type[FlaxPreTrainedModel], PreTrainedConfig]:
        """As of :meth:`_part_classes`; the configuration tells how the whole is quantized."""
        model_class, config = self._part_classes()[name]
        if config is not self.config and (whole := self.quantization) is not None:
            config = override_config(config, {"quantization_config": whole.to_dict()})
        return model_class, config

    def _find_shapes(self) -> None:
        """What the parameters are by the configuration."""
        self._float_shape_tree = self._float_shapes()
        self._params_shape_tree = self._quantized_shapes()
        self._required_params = set(flatten_dict(self._params_shape_tree))

    def _float_shapes(self) -> dict[str, Any]:
        """Before quantization."""
        return param_shapes(lambda: self._random_params(jax.random.key(self._seed)))

    @classmethod
    def _module_fields(cls) -> set[str]:
        fields = {field.name for field in dataclasses.fields(cls.module_class)}
        # a model has the parameter tree of the files, which a module that scans its layers has not
        return fields - {"config", "dtype", "parent", "name", "scan_layers"}

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> FlaxPreTrainedModel:
        return cls(config, **kwargs)

    def _build_module(self) -> nn.Module:
        return self.module_class(config=self.config, dtype=self.dtype, **self._module_kwargs)

    @property
    def framework(self) -> str:
        """Always ``"flax"``."""
        return "flax"

    @property
    def config(self) -> PreTrainedConfig:
        return self._config

    @functools.cached_property
    def key(self) -> jax.Array:
        """The PRNG key that the random parameters are drawn from, of ``seed``."""
        return jax.random.key(self._seed)

    @property
    def module(self) -> nn.Module:
        return self._module

    @property
    def params(self) -> dict[str, Any]:
        """The parameters; ValueError if the model was made with ``_do_init=False``."""
        if not self._is_initialized:
            raise ValueError(
                "a model made with _do_init=False keeps no params: make them with init_weights or from_pretrained, "
                "keep them outside and pass them as params="
            )
        return self._params if self._whole is None else self._whole.params[self._name_in_whole]

    @params.setter
    def params(self, params: Params) -> None:
        if not self._is_initialized:
            raise ValueError("params cannot be set in a model made with _do_init=False: pass them as params=")
        params = unfreeze(self.whole_params(params))
        if self._whole is None:
            self._params = params
        else:
            self._whole.params = {**self._whole.params, self._name_in_whole: params}

    def whole_params(self, params: Any, rows: int | None = None) -> Any:
        """``params``, the model's own with its active adapters if None; ValueError if some of ``required_params`` are
        missing, or if they have an adapter for each row of a batch of another size than ``rows``."""
        if params is None:
            return self._params_in_use()
        if not isinstance(params, Mapping):
            raise ValueError(f"params must be a nested dict as model.params, but is {type(params).__name__}")
        flat = flatten_dict(params)
        missing = sorted("/".join(path) for path in self.required_params - set(flat))
        if missing:
            wrapped = " itself, without the level 'params'" if set(params) == {"params"} else ""
            names = shortened(missing, 5, ", ")
            raise ValueError(f"params lack {names}; give all of required_params, such as model.params{wrapped}")
        if rows is not None:
            check_rows(flat, rows)
        return params

    def _params_in_use(self) -> Any:
        """The model's own with its active adapters; a part has those of the whole."""
        return self.adapted_params() if self._whole is None else self._whole._params_in_use()[self._name_in_whole]

    def _savable_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        """The parameters to save, the model's own if None; ValueError if a file of them could not be loaded."""
        given: Any = self.params if params is None else params
        savable = unfreeze(given)  # leaves alone what is neither frozen nor a dict
        refuse_unsavable(savable, self.params_shape_tree)
        return savable

    @property
    def params_shape_tree(self) -> dict[str, Any]:
        """The tree with a ``jax.ShapeDtypeStruct`` for each parameter."""
        return self._params_shape_tree

    @property
    def required_params(self) -> set[tuple[str, ...]]:
        """Paths of all parameters, as tuples of names."""
        return self._required_params

    # Calls, for classes that compile them

    def _compiled(self) -> dict[Any, Any]:
        """The programs of the present module, which is rebuilt when gradient checkpointing is switched."""
        if getattr(self, "_programs_of", None) is not self.module:
            self._programs_of = self.module
            self._programs: dict[Any, Any] = {}
        return self._programs

    def _program(self, method: str, train: bool, **options: Any) -> Callable[[Any, Any, Any], Any]:
        """A method of the module as a program of parameters, random keys and inputs, kept for these options."""
        programs = self._compiled()
        key = (method, train, *sorted(options.items()))
        if key not in programs:
            module = self.module

            def program(params, rngs, inputs):
                return module.apply(
                    {"params": params}, **inputs, **options, deterministic=not train, rngs=rngs, method=method
                )

            programs[key] = jax.jit(program)
        return programs[key]

    def _flags(self, output_attentions: bool | None, output_hidden_states: bool | None) -> dict[str, bool]:
        """What is asked for besides, by a call or else by the configuration."""
        config = self.config
        return {
            "output_attentions": config.output_attentions if output_attentions is None else output_attentions,
            "output_hidden_states": (
                config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
        }

    def _returned(self, outputs: FlaxModelOutput, return_dict: bool | None) -> FlaxModelOutput | tuple:
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if return_dict else outputs.to_tuple()

    @classmethod
    def known_configs(cls) -> tuple[type[PreTrainedConfig], ...]:
        """The classes of the configurations that there are models of."""
        return cls.config_classes if cls.config_class in cls.config_classes else (cls.config_class,)

    @property
    def upstream_name(self) -> str:
        """The name of upstream's class of this model."""
        return type(self).__name__.removeprefix("Flax")

    @classmethod
    def can_generate(cls) -> bool:
        """Whether the class has ``generate``."""
        return cls._generates

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many numbers the parameters are, quantized or not, without adapters; with ``only_trainable`` those of
        the active adapters, where there are some."""
        if only_trainable and self.peft_config:
            return self.num_adapter_parameters()
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self._float_shape_tree))

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them; outputs stay the same."""
        self._set_gradient_checkpointing(value=True)

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations for the backward pass."""
        self._set_gradient_checkpointing(value=False)

    def _set_gradient_checkpointing(self, value: bool) -> None:
        self._module_kwargs = {**self._module_kwargs, "gradient_checkpointing": value}
        self._module = self._build_module()
        for part in vars(self).get("_parts", {}).values():
            part._set_gradient_checkpointing(value)

    # Parameters

    def _random_params(self, rng: jax.Array, input_shape: tuple[int, ...] | None = None) -> dict[str, Any]:
        params_rng, dropout_rng = jax.random.split(rng)
        inputs = self.dummy_inputs(self.input_shape if input_shape is None else tuple(input_shape))
        return self.module.init({"params": params_rng, "dropout": dropout_rng}, **inputs)["params"]

    def init_weights(
        self, rng: jax.Array, input_shape: tuple[int, ...] | None = None, params: Params | None = None
    ) -> dict[str, Any]:
        """Random float32 parameters, quantized where the configuration says so.

        Args:
            rng: a PRNG key.
            input_shape: of the dummy input, the model's own if None.
            params: leaves to keep; only those that are missing are drawn.

        Returns:
            The parameter tree.
        """
        drawn = self._drawing(rng, input_shape)(rng)
        if self.quantization is not None:
            drawn = quantized(drawn, self.quantization, self._prefix_in_whole)
        if params is None:
            return drawn
        kept = flatten_dict(unfreeze(params))
        return unflatten_dict({**{p: leaf for p, leaf in flatten_dict(drawn).items() if p not in kept}, **kept})

    def _drawing(self, rng: jax.Array, input_shape: tuple[int, ...] | None) -> Callable[[jax.Array], dict[str, Any]]:
        """What draws random float32 parameters from a key like ``rng``."""
        return _without_dead_code(lambda rng: self._random_params(rng, input_shape), rng)

    def to_bf16(self, params: Params, mask: Params | None = None) -> dict[str, Any]:
        """A copy of ``params`` with floating leaves in bfloat16, but for the scales of quantized layers.

        Args:
            params: a parameter tree.
            mask: a tree of booleans of the same structure; False leaves a leaf as it is.

        Raises:
            ValueError: ``mask`` has another structure.
        """
        return _cast(params, jnp.bfloat16, mask)

    def to_fp16(self, params: Params, mask: Params | None = None) -> dict[str, Any]:
        """As :meth:`to_bf16`, in float16."""
        return _cast(params, jnp.float16, mask)

    def to_fp32(self, params: Params, mask: Params | None = None) -> dict[str, Any]:
        """As :meth:`to_bf16`, in float32."""
        return _cast(params, jnp.float32, mask)

    # Files

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        dtype: Any = None,
        *,
        from_pt: bool | None = None,
        param_dtype: Any = None,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        use_safetensors: bool | None = None,
        revision: str = "main",
        subfolder: str | None = "",
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        generation_config: GenerationConfig | None = None,
        _do_init: bool = True,
        sharding: Any | None = None,
        verify: bool = False,
        quantization: QuantizationConfig | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make a model from a checkpoint.

        Args:
            pretrained_model_name_or_path: a directory, a weight file (its directory has the configuration), or a Hub
                id. ``name_or_path`` is its former name.
            dtype: of the computation and of the stored parameters. None, or ``"auto"``, follows the checkpoint:
                parameters stay as stored, and the dtype that most of them have is that of the computation.
            from_pt: True insists on the PyTorch layout, False on the Flax layout, None takes what is there (the Flax
                layout first).
            param_dtype: of the stored parameters, if it is to differ from ``dtype``.
            config: instead of the checkpoint's: a configuration, or where to load one.
            use_safetensors: True opens safetensors only, False the other formats only, None any.
            revision, subfolder, token, cache_dir, local_files_only, force_download: of the Hub, as in
                ``transformers``; ``subfolder`` also of a directory.
            ignore_mismatched_sizes: load what fits: weights of another shape are drawn at random, and weights that the
                configuration has no place for are left out.
            output_loading_info: also return what :class:`dict` of ``missing_keys``, ``unexpected_keys``,
                ``mismatched_keys`` and ``error_msgs`` was found.
            generation_config: instead of the checkpoint's; of classes that generate.
            _do_init: False returns ``(model, params)``, and the model keeps no parameters. A missing head is then
                missing from ``params``: ``model.init_weights(rng, params=params)`` completes it.
            sharding: where the parameters go: a ``Mesh`` (with the axes of ``partitioning.PARTITION_RULES``), one
                ``Sharding`` for all, or a tree of them. Each device's slice is read onto that device alone.
            verify: also read every tensor of the files beforehand, compare its checksum, if the file has one, and
                look for numbers that are not finite.
            quantization: ``"int8"``, ``"int4"``, ``"nf4"`` or a :class:`QuantizationConfig`: quantize the linear
                layers of a checkpoint of floats while it is read, leaf by leaf, from the values that it has. A
                quantized checkpoint loads as it is, without this option.
            **kwargs: ``seed``, ``input_shape``, fields of the module, or attributes of the configuration to change
                (of one of its parts by a dict, such as ``audio_encoder_config={"num_quantizers": 8}``). Keywords of
                ``transformers`` that ask for nothing here (``trust_remote_code=False``, ``device_map=None``,
                ``low_cpu_mem_usage``, ``torch_dtype``, ...) are taken as well; see :mod:`checkpoints.keywords`.

        Returns:
            The model; ``(model, params)`` with ``_do_init=False``; with ``output_loading_info`` these and the dict.

        Raises:
            CheckpointNotFoundError: (an ``OSError`` and a ``ValueError``) a file is missing.
            ValueError: damaged files, another model's checkpoint, weights that are missing, mismatched, too many or
                not floating-point, all of them listed; a mesh that does not fit; unknown keywords; a ``quantization``
                that is none, does not fit the layers, or of weights that are quantized already.
        """
        given = understood(dtype, param_dtype, token, kwargs)
        dtype, param_dtype, kwargs = given.dtype, given.param_dtype, given.rest
        name_or_path = one_name(pretrained_model_name_or_path, kwargs.pop("name_or_path", None))
        hub: dict[str, Any] = {
            "revision": revision,
            "token": given.token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "force_download": force_download,
        }
        check_dtypes(dtype, param_dtype)
        if not isinstance(config, PreTrainedConfig | str | os.PathLike | None):
            raise ValueError(
                f"config must be a configuration or where to load one, but is {config!r}; single fields are keyword "
                "arguments of their own"
            )
        if generation_config is not None and not (
            cls.can_generate() and isinstance(generation_config, GenerationConfig)
        ):
            raise ValueError(
                f"generation_config={generation_config!r:.80} cannot be that of a {cls.__name__}: give a "
                "transformers.GenerationConfig to a class that generates"
            )
        source = Source.locate(name_or_path, subfolder or "", use_safetensors=use_safetensors, **hub)
        if config is None:
            config = load_config(cls.known_configs(), source, from_pt)
        elif not isinstance(config, PreTrainedConfig):
            config = load_config(cls.known_configs(), Source.locate(config, **hub))
        model_kwargs, config_kwargs = cls._split_kwargs(config, kwargs)
        config = override_config(config, config_kwargs)

        asked = generation_config is None and cls.can_generate()
        if asked and (values := source.read_json("generation_config.json", from_pt)) is not None:
            generation_config = load_generation_config(values)
        elif asked and (unseen := source.absence("generation_config.json")):
            logger.warning(f"{unseen}. Until then, generate has the values of an empty one")
        return cls._from_weights(
            config,
            Weights.of(source, from_pt),
            dtype=dtype,
            param_dtype=param_dtype,
            generation_config=generation_config,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            output_loading_info=output_loading_info,
            _do_init=_do_init,
            sharding=sharding,
            verify=verify,
            quantization=quantization,
            **model_kwargs,
        )

    @classmethod
    def _from_weights(
        cls,
        config: PreTrainedConfig,
        weights: Weights,
        *,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike | None,
        generation_config: GenerationConfig | None,
        ignore_mismatched_sizes: bool,
        output_loading_info: bool,
        _do_init: bool,
        sharding: Any | None,
        verify: bool,
        quantization: QuantizationConfig | str | None,
        **model_kwargs: Any,
    ) -> Any:
        """Make a model of weights in any format; the rest as of :meth:`from_pretrained`."""
        config = weights.described(config)
        # float32 stands in until the weights are read: the shapes do not depend on it.
        model = cls(config, dtype=jnp.float32 if dtype is None else dtype, _do_init=False, **model_kwargs)
        chosen = None if quantization is None else model._checked_quantization(quantization)
        shapes = model.params_shape_tree
        if chosen is not None:
            shapes = quantized_shapes(shapes, chosen, model._prefix_in_whole)
        shardings = {} if sharding is None else resolve_shardings(sharding, shapes)
        if verify:
            for file in weights.files:
                refuse_damage(file)
        stored = param_dtype if param_dtype is not None else dtype
        loaded = _load(model, weights, stored, shardings, ignore_mismatched_sizes, chosen)
        if chosen is not None:
            model._rebuild(model._config_with(chosen))
        params = unflatten_dict(loaded.params, sep="/")
        model.name_or_path = weights.name
        model.hub_id = weights.name if weights.is_on_hub else None
        if dtype is None:
            model.dtype = main_dtype(flatten_dict(params))
            model._module = model._build_module()
        if generation_config is not None:
            model.generation_config = generation_config

        result: tuple[Any, ...] = (model, params)
        if _do_init:
            if len(loaded.params) < len(model.required_params):
                drawn = _cast(model.init_weights(model.key), model.dtype if stored is None else stored, None)
                placed = {
                    path: jax.device_put(leaf, shardings.get(path))
                    for path, leaf in flatten_dict(drawn, sep="/").items()
                    if path not in loaded.params
                }
                params = unflatten_dict({**placed, **loaded.params}, sep="/")
            model._is_initialized = True
            model.params = params
            result = (model,)
        if output_loading_info:
            result += (
                {
                    "missing_keys": loaded.missing,
                    "unexpected_keys": loaded.unexpected,
                    "mismatched_keys": loaded.mismatched,
                    "error_msgs": [],
                },
            )
        return result if len(result) > 1 else result[0]

    @classmethod
    def _split_kwargs(
        cls, config: PreTrainedConfig, kwargs: Mapping[str, Any], method: str = "from_pretrained"
    ) -> tuple[dict, dict]:
        of_model = {"seed", "input_shape"} | cls._module_fields()
        of_config = set(config.to_dict()) | set(getattr(config, "attribute_map", {}))
        of_call = set(_keywords_of(getattr(cls, method), "kwargs"))
        for name in kwargs:
            if name not in of_model | of_config:
                hint = did_you_mean(name, of_model | of_config | of_call)
                raise ValueError(f"{cls.__name__}.{method} has no keyword argument {name!r}{hint}")
        model_kwargs = {name: value for name, value in kwargs.items() if name in of_model}
        return model_kwargs, {name: value for name, value in kwargs.items() if name not in of_model}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        params: Params | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        token: str | bool | None = None,
        safe_serialization: bool = True,
        to_pt: bool = False,
        repo_id: str | None = None,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        use_auth_token: str | bool | None = None,
        **card: Any,
    ) -> None:
        """Write weights and configurations to a directory as one commit: a crash leaves the old checkpoint or this.

        Args:
            save_directory: made if it is not there. A checkpoint of this layout is replaced; it may be the one that
                the model came from. Weights in the other layout stay.
            params: the parameters to write, the model's own if None. Leaves are fetched from their devices file by
                file.
            push_to_hub: also upload what was written, with a model card (``README.md``). A card that somebody has
                written or edited, here or in the repository, is kept.
            max_shard_size: the most that a weight file may hold, a number of bytes or such as ``"5GB"``, ``"1.5GB"``
                (powers of 1000) or ``"2GiB"`` (of 1024); a larger model is written as shards with an index.
            token: for the upload.
            safe_serialization: False writes msgpack (``flax.serialization``), which has no checksums.
            to_pt: False writes ``flax_model.safetensors``, True the ``model.safetensors`` that the PyTorch classes of
                ``transformers`` load, which has no quantized weights.
            repo_id: where to upload to, the name of the directory if None.
            commit_message, commit_description, private, revision, create_pr, **card: of the upload, as in
                :meth:`push_to_hub`.
            use_auth_token: the former name of ``token``.

        Raises:
            ValueError: ``params`` that are incomplete, too many, of other shapes, not floating-point or no arrays, a
                file in place of the directory, ``to_pt`` without ``safe_serialization`` or of quantized weights,
                options of the upload without ``push_to_hub``, a ``max_shard_size`` that is none, a directory (or
                repository) with a checkpoint in Kyutai's format, or with weights in the other layout of another
                configuration, as all share ``config.json``.
            OSError: the directory cannot be written or the disk is full; the old checkpoint is untouched.
        """
        if to_pt and not safe_serialization:
            raise ValueError("to_pt=True needs safe_serialization=True: PyTorch checkpoints are safetensors")
        if to_pt:
            self._check_to_pt()
        upload: dict[str, Any] = {
            "private": private,
            "commit_message": commit_message,
            "commit_description": commit_description,
            "revision": revision,
            "create_pr": create_pr,
        }
        token = one_token(token, use_auth_token)
        if not push_to_hub:
            idle = [f"{name}={value!r}" for name, value in {"repo_id": repo_id, **upload, **card}.items() if value]
            if idle:
                raise ValueError(f"{', '.join(idle)} has no effect without push_to_hub=True")
        check_card_fields(card, _keywords_of(self.save_pretrained, "card"))
        check_upload(private=private, revision=revision)
        max_shard_bytes = shard_bytes(max_shard_size)
        params = self._savable_params(params)
        folder = Path(save_directory)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"save_directory={str(folder)!r} is a file; give a directory")
        replaced = known_values(lambda: Source.locate(folder).read_json("config.json")) if folder.is_dir() else {}
        refuse_to_replace_kyutais(f"save_directory={str(folder)!r}", replaced)
        layout, other_layout = ("pt", "flax") if to_pt else ("flax", "pt")
        beside = entry_of(folder, other_layout)
        if beside is not None and not describes(replaced, self.config):
            raise ValueError(
                f"save_directory={str(folder)!r} holds {beside.name}, weights of another configuration, which would "
                "lose theirs: save to another directory, or remove them"
            )
        tensors = tables.table_tensors(params, self.checkpoint_rules) if to_pt else tables.flax_tensors(params)
        auto_map, companions = own_code([self, self.config])
        companions["config.json"] = self._config_json(params, auto_map)
        if self.generation_config is not None:
            companions["generation_config.json"] = self.generation_config.to_json_string(use_diff=True)
        written = save_checkpoint(
            folder,
            layout=layout,
            entry=PT_WEIGHTS if to_pt else FLAX_WEIGHTS if safe_serialization else FLAX_MSGPACK,
            tensors=tensors,
            max_shard_bytes=max_shard_bytes,
            companions=companions,
            replaces=LAYOUTS[layout],
        )
        if to_pt and beside is not None:
            logger.warning(
                f"{folder} holds {beside.name}, which from_pretrained prefers: remove it, or load with from_pt=True"
            )
        if push_to_hub:
            self._upload(folder, written, repo_id or folder.resolve().name, params, card=card, token=token, **upload)

    def _check_to_pt(self) -> None:
        """ValueError if there is no PyTorch layout of this model."""
        self._refuse_quantized("to_pt=True")

    def push_to_hub(
        self,
        repo_id: str,
        params: Params | None = None,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        use_temp_dir: bool | None = None,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
        to_pt: bool = False,
        tags: Sequence[str] | None = None,
        use_auth_token: str | bool | None = None,
        **card: Any,
    ) -> Any:
        """Save to a temporary directory and upload it, with a model card, as one commit.

        What is pushed is what loads then: weights that the repository holds in any layout and format are removed in
        the same commit, but for PyTorch's of the same configuration. Other files stay.

        Args:
            repo_id: the repository, made if it is not there.
            params, max_shard_size, safe_serialization, to_pt: as in :meth:`save_pretrained`.
            commit_message, commit_description, token, create_pr: as in ``huggingface_hub``.
            private: True makes a repository that is not there a private one, and refuses one that is public.
            revision: the branch, made if it is not there.
            use_temp_dir: of ``transformers``; the files are saved to a temporary directory whatever it is.
            use_auth_token: the former name of ``token``.
            tags, **card: fields of the model card (:func:`~transformers_moshi_flax.model_card.model_card`):
                ``license``, ``language``, ``base_model``, ``tags``.

                A card of the repository that somebody has written or edited is kept.

        Returns:
            The ``CommitInfo`` of ``huggingface_hub``.

        Raises:
            ValueError: as :meth:`save_pretrained`; fields that the card does not have or the Hub refuses, and
                ``private`` for a public repository, before anything is made there.
        """
        card = card if tags is None else {**card, "tags": tags}
        check_card_fields(card, _keywords_of(self.push_to_hub, "card"))
        check_upload(private=private, revision=revision, use_temp_dir=use_temp_dir)
        token = one_token(token, use_auth_token)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            self.save_pretrained(
                folder, params, max_shard_size=max_shard_size, safe_serialization=safe_serialization, to_pt=to_pt
            )
            written = [path.name for path in folder.iterdir()]
            return self._upload(
                folder,
                written,
                repo_id,
                self.params if params is None else unfreeze(params),
                card=card,
                token=token,
                private=private,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )

    def _upload(
        self,
        folder: Path,
        written: list[str],
        repo_id: str,
        params: Params,
        card: Mapping[str, Any] | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> Any:
        """Upload what was written; the card is checked, and what is there looked at, before anything is made."""
        there = Repository.look_up(repo_id, token=token, private=private, revision=revision)
        replaced = known_values(lambda: parse_json(there.text("config.json") or "{}"))
        refuse_to_replace_kyutais(f"repo_id={repo_id!r}", replaced)
        names = [*written, "README.md"]
        readme = folder / "README.md"
        if not readme.exists() or is_generated(readme.read_text("utf-8", errors="replace")):
            write_text(readme, model_card(self, params, folder, written, there.name, **(card or {})))
            published = there.text("README.md")
            if published is not None and not is_generated(published):
                lacking = f", without {dict(card)}" if card else ""
                logger.warning(
                    f"{there.name!r} has a README.md that somebody has written or edited: it is kept as it "
                    f"is{lacking}; correct what it says of the weights, or remove it to get a new one"
                )
                names.remove("README.md")
        if "README.md" in names:
            there.check_card(readme.read_text("utf-8", errors="replace"))
        there = there.made(private=private, revision=revision)
        rivals = [name for name in there.filenames() if is_weights(name)]
        if any(is_weights(name, "flax") for name in written):
            # beside it, but only with their own configuration
            pt_weights = [name for name in rivals if is_weights(name, "pt")]
            if pt_weights and describes(replaced, self.config):
                rivals = [name for name in rivals if name not in pt_weights]
        return there.commit(
            folder,
            names,
            [name for name in rivals if name not in names],
            message=commit_message or f"Upload {type(self).__name__}",
            description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "FlaxAutoModel") -> None:
        """Saves the code of this class with its checkpoints, so that an auto class finds it there.

        It is for classes of one's own. Who loads such a checkpoint with ``trust_remote_code=True`` runs this code.

        Args:
            auto_class: of :mod:`transformers_moshi_flax.modeling_flax_auto`, or its name.

        Raises:
            ValueError: there is no such auto class.
        """
        from . import modeling_flax_auto  # only here: few need it

        name = auto_class if isinstance(auto_class, str) else auto_class.__name__
        if not name.startswith("FlaxAuto") or not hasattr(modeling_flax_auto, name):
            raise ValueError(f"auto_class={auto_class!r} is no auto class: give FlaxAutoModel or another one of them")
        cls._auto_class = name

    def _config_json(self, params: Params, auto_map: Mapping[str, str]) -> str:
        """The configuration as upstream writes it: architecture under its PyTorch name, dtype of the weights."""
        values = json.loads(self.config.to_json_string(use_diff=True))
        values["architectures"] = [self.upstream_name]
        values["dtype"] = main_dtype(flatten_dict(params)).name
        if auto_map:
            values["auto_map"] = {**values.get("auto_map", {}), **auto_map}
        return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _without_dead_code(
    function: Callable[[jax.Array], dict[str, Any]], rng: jax.Array
) -> Callable[[jax.Array], dict[str, Any]]:
    """What evaluates a function, operation by operation, skipping what its result does not depend on.

    Initialisation runs the forward pass on dummy inputs, which the parameters do not need. Compiling everything as one
    program would drop it as well, but takes much longer (random bits compile slowly) and is lost with the model, while
    single operations are compiled once per shape for all models of the process.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(rng)
    needed = {variable for variable in closed.jaxpr.outvars if isinstance(variable, Var)}
    kept = []
    for equation in reversed(closed.jaxpr.eqns):
        if any(variable in needed for variable in equation.outvars):
            kept.append(equation)
            needed.update(variable for variable in equation.invars if isinstance(variable, Var))
    lean = ClosedJaxpr(closed.jaxpr.replace(eqns=kept[::-1]), closed.consts)
    structure, evaluate = jax.tree.structure(shapes), jaxpr_as_fun(lean)
    return lambda rng: jax.tree.unflatten(structure, evaluate(rng))


def _load(
    model: FlaxPreTrainedModel,
    weights: Weights,
    dtype: DTypeLike | None,
    shardings: Mapping[str, jax.sharding.Sharding],
    ignore_mismatched_sizes: bool,
    quantization: QuantizationConfig | None,
) -> tables.ReadResult:
    """Read the leaves of a model, quantize them if that is asked for, and raise if the checkpoint does not fit it."""
    prefix = model._prefix_in_whole
    layers = {} if quantization is None else quantized_layers(model.params_shape_tree, quantization, prefix)

    def placed(path: str, leaf: np.ndarray) -> dict[str, jax.Array]:
        """The leaf where it is to lie, or those that stand for it, by path."""
        layer, _, name = path.rpartition("/")
        if quantization is None or name != KERNEL or layer not in layers:
            return {path: to_device(leaf, None if name in OF_GROUPS else dtype, shardings.get(path))}
        leaves = quantized_leaves(layer, to_device(leaf, jnp.float32), quantization, layers[layer])
        # finished, or the floats of several layers would be there at once
        return {own: jax.block_until_ready(jax.device_put(each, shardings.get(own))) for own, each in leaves.items()}

    with Transfers() as transfers:
        loaded, surplus = weights.fit(model, lambda path, leaf: transfers.start(placed, path, leaf))
        transferred = [transfer.result() for transfer in loaded.params.values()]
        loaded.params = {path: leaf for leaves in transferred for path, leaf in leaves.items()}
    name = weights.name
    base = model.base_model_prefix if model.base_model_prefix in model.params_shape_tree else ""
    paths = flatten_dict(model.params_shape_tree, sep="/")
    head = {path for path in paths if base and not path.startswith(f"{base}/")}
    new_head = bool(head) and head <= set(loaded.missing)
    missing = sorted(set(loaded.missing) - head) if new_head else loaded.missing
    drawn = [path for path in missing if any(re.fullmatch(each, path) for each in model.checkpoint_optional)]
    missing = [path for path in missing if path not in drawn]
    problems = [f"no weights for {missing}"] if missing else []
    problems += [f"{key} must be floating-point, but is {found} in the file" for key, found in loaded.not_floating]
    if not ignore_mismatched_sizes:
        problems += [f"{key} is {ours} by the config, {theirs} in the file" for key, theirs, ours in loaded.mismatched]
        problems += [f"the config has no place for {surplus}"] if surplus else []
    if problems:
        raise ValueError(
            f"{name!r} does not fit {type(model).__name__}: {'; '.join(problems)}. Use the config that belongs to the "
            "weights (ignore_mismatched_sizes=True loads what fits, missing weights excepted)"
        )
    class_name = type(model).__name__
    if new_head:
        logger.warning(f"{name!r} has no weights for {sorted(head)} of {class_name}: they are random, train them")
    if drawn:
        logger.warning(f"{name!r} has no weights for {drawn} of {class_name}, which only training needs: random")
    if loaded.mismatched:
        logger.warning(f"weights of other shapes in {name!r} are left out and drawn at random: {loaded.mismatched}")
    if surplus:
        logger.warning(f"weights of {name!r} that {class_name} has no place for are left out: {surplus}")
    return loaded


def _keywords_of(method: Callable[..., Any], *others: str) -> list[str]:
    """The keywords of a method but for those that are named."""
    return [name for name in inspect.signature(method).parameters if name not in others]


def check_dtypes(dtype: Any, param_dtype: Any) -> None:
    """ValueError for types that no model is loaded in."""
    for name, value in (("dtype", dtype), ("param_dtype", param_dtype)):
        if value is not None:
            check_float_dtype(name, value)


def check_float_dtype(name: str, dtype: Any) -> None:
    try:
        # nothing is computed in less than 16 bits
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating) and jnp.dtype(dtype).itemsize > 1
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(f"{name} must be a floating dtype of 16 bits or more, such as jnp.bfloat16, got {dtype!r}")
    if jnp.dtype(dtype) == jnp.float64 and jax.dtypes.canonicalize_dtype(jnp.float64) != jnp.float64:
        raise ValueError(f"{name} is float64, which JAX has only with jax_enable_x64: enable it or use jnp.float32")


def _cast(params: Params, dtype: DTypeLike, mask: Params | None) -> dict[str, Any]:
    params = unfreeze(params)

    def cast(path: Any, leaf: Any, chosen: bool = True) -> Any:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating) and path[-1].key not in OF_GROUPS
        return leaf.astype(dtype) if chosen and floating else leaf

    if mask is None:
        return jax.tree_util.tree_map_with_path(cast, params)
    mask = unfreeze(mask)
    if not same_structure(mask, params):
        raise ValueError("mask must be a tree of booleans with the structure of params")
    return jax.tree_util.tree_map_with_path(cast, params, mask)
