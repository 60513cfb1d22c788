"""What the decoders share: their inputs, their caches, and the call around ``module.apply``.

:class:`FlaxDecoderModel` is the base of all of them; :class:`FlaxTextModel` and :class:`FlaxTextForCausalLM` are those
of text, without and with a head.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from .former_names import accept_former_names
from .generation import FlaxGenerationMixin
from .generation.arrays import on_device, on_one_device
from .generation.calls import in_bucket
from .generation.text import TextDecoder
from .input_checks import Input, check_inputs, check_sizes, is_traced, is_tracing, refuse_params
from .modeling_flax_outputs import FlaxBaseModelOutputWithPast, FlaxCausalLMOutputWithPast
from .modeling_flax_utils import FlaxPreTrainedModel
from .nn.cache import LinearCache, StaticCache
from .nn.embedding import IGNORE_INDEX
from .nn.linear import dropout_rngs

BATCH_FRAMES: dict[str, None] = {"batch": None, "frames": None}
IGNORED: dict[str, Any] = {"allowed": (IGNORE_INDEX,), "remedy": f"Use {IGNORE_INDEX} for labels to ignore."}


def text_inputs(config: Any, ids: int, slots: int | None = None) -> dict[str, Input]:
    """The inputs of a decoder of text, with and without a head.

    Args:
        config: of the model.
        ids: how many ids there are.
        slots: of the cache, if there is one.
    """
    return {
        "input_ids": Input(BATCH_FRAMES, "ids", ids, may_be_empty=True),
        "inputs_embeds": embeddings(config, may_be_empty=True),
        "attention_mask": mask(slots),
        "position_ids": Input({"batch": (None, 1), "frames": None}, "ids", may_be_empty=True),
        "labels": Input(BATCH_FRAMES, "ids", config.vocab_size, **IGNORED),
    }


def embeddings(config: Any, may_be_empty: bool = False) -> Input:
    """In the place of ids."""
    return Input({**BATCH_FRAMES, "hidden_size": config.hidden_size}, "floats", may_be_empty=may_be_empty)


def mask(slots: int | None) -> Input:
    """Of the frames of a call, or of all slots of its cache."""
    return Input({"batch": None, "frames": (None, slots) if slots else None}, "mask", may_be_empty=True)


def check_cache_kind(cache: Any) -> None:
    """Raises ``ValueError`` for what is no cache at all."""
    refuse_params(cache=cache)
    if not isinstance(cache, LinearCache | StaticCache | None):
        raise ValueError(f"`cache` must be a cache of `init_cache`, but is a {type(cache).__name__}.")


def check_cache(cache: Any, config: Any, batch_size: int, length: int) -> None:
    """Raises ``ValueError`` if a call of ``length`` frames does not fit into the cache."""
    check_cache_kind(cache)
    if cache is None:
        return
    if len(cache.keys) != config.num_hidden_layers or cache.mask.shape[0] != batch_size:
        raise ValueError(
            f"`cache` is a cache of {len(cache.keys)} layers for a batch of {cache.mask.shape[0]}, but "
            f"the model has {config.num_hidden_layers} and the batch is {batch_size}: make one with `init_cache`."
        )
    if not is_traced(cache.length) and int(cache.length) + length > cache.max_length:
        raise ValueError(
            f"`cache` has {cache.max_length} slots, {int(cache.length)} of them used, and cannot take "
            f"{length} more frames: make a larger one with `init_cache(batch_size, max_length)`."
        )


def check_decoder_inputs(config: Any, ids: int, cache: Any, given: dict[str, Any]) -> tuple[int, int]:
    """Checks what a decoder of text, of so many ids, is called with; returns batch size and frames."""
    check_cache_kind(cache)
    if (given["input_ids"] is None) == (given["inputs_embeds"] is None):
        raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
    sizes = check_inputs(text_inputs(config, ids, None if cache is None else cache.max_length), given)
    check_cache(cache, config, sizes["batch"], sizes["frames"])
    return sizes["batch"], sizes["frames"]


def as_int32(ids: Any) -> Any:
    """On the device; without a program for every shape, which ``jnp.asarray`` may compile."""
    return ids if ids is None else ids.astype(jnp.int32) if isinstance(ids, jax.Array) else on_device(ids, np.int32)


def as_array(array: Any) -> Any:
    return array if array is None or isinstance(array, jax.Array) else on_device(array)


class FlaxDecoderModel(FlaxPreTrainedModel):
    """A model of decoder layers.

    Class attributes that a model sets:
        cache_class: of the cache that it is called with.
        rounds_lengths: whether an eager call may have more frames behind its own, to be cut off again.
        extra_input_ids: how many ids behind the vocabulary are known as inputs, such as that of a start token.
    """

    cache_class: ClassVar[type[LinearCache | StaticCache]] = LinearCache
    rounds_lengths: Any = True
    extra_input_ids: Any = 0

    @property
    def text_config(self) -> Any:
        """The configuration of the layers of the decoder, also where there is more to the model."""
        return self.config

    @property
    def cache_sizes(self) -> Any:
        """What has the sizes of a cache: ``num_hidden_layers``, ``num_key_value_heads`` and ``head_dim``."""
        return self.text_config

    def init_cache(self, batch_size: int, max_length: int) -> LinearCache | StaticCache:
        """An empty static cache for ``max_length`` frames, to be passed as ``cache``.

        Raises:
            ValueError: if either size is no whole number of at least 1.
        """
        check_sizes(batch_size=batch_size, max_length=max_length)
        return self.cache_class.create(self.cache_sizes, batch_size, max_length, self.dtype)

    def _cache_for(self, cache: Any, use_cache: bool | None, batch_size: int, max_length: int) -> Any:
        """``use_cache=True`` without a cache starts one for the whole context of the configuration."""
        if cache is None and use_cache:
            return self.init_cache(batch_size, max_length)
        return cache

    def _finish(
        self,
        outputs: Any,
        use_cache: bool | None,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
        return_dict: bool | None,
    ) -> Any:
        """Leaves out what was not asked for."""
        config = self.config
        asked = {
            "attentions": config.output_attentions if output_attentions is None else output_attentions,
            "hidden_states": config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            "cache": use_cache is not False,
        }
        dropped = {
            field: None
            for field in vars(outputs)
            for name, wanted in asked.items()
            if field in (name, f"depth_{name}") and not wanted
        }
        outputs = outputs.replace(**dropped)
        return_dict = config.return_dict if return_dict is None else return_dict
        return outputs if return_dict else outputs.to_tuple()

    def _apply(
        self,
        params: Any,
        dropout_rng: jax.Array | None,
        train: bool,
        output_attentions: bool | None,
        batch_size: int,
        **inputs: Any,
    ) -> Any:
        """Runs the module with ``params`` (default: the model's own)."""
        inputs["output_attentions"] = bool(
            self.config.output_attentions if output_attentions is None else output_attentions
        )
        if train and dropout_rng is None:
            if self.text_config.attention_dropout > 0:
                raise ValueError(
                    "`train=True` with `attention_dropout` > 0 needs `dropout_rng`: pass a key of `jax.random.key`."
                )
            if params is None and self.adapters_drop():
                raise ValueError(
                    "`train=True` with an adapter's `lora_dropout` > 0 needs `dropout_rng`: pass a key of "
                    "`jax.random.key`."
                )
        rngs = dropout_rngs(dropout_rng) if train and dropout_rng is not None else {}
        params = self.whole_params(params, batch_size)

        def run(inputs: dict[str, Any]) -> Any:
            return self.module.apply({"params": params}, **inputs, deterministic=not train, rngs=rngs)

        # operation by operation, every new length would compile programs
        if self.rounds_lengths and not train and not is_tracing(params, inputs) and on_one_device(params, inputs):
            return in_bucket(run, inputs)
        return run(inputs)


class FlaxTextModel(FlaxDecoderModel):
    """A decoder of text without a head."""

    def dummy_inputs(self, input_shape: tuple[int, ...]) -> dict[str, Any]:
        return {"input_ids": jnp.zeros(input_shape, dtype=jnp.int32)}

    @accept_former_names
    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: Any | None = None,
        position_ids: ArrayLike | None = None,
        cache: LinearCache | None = None,
        inputs_embeds: ArrayLike | None = None,
        use_cache: bool | None = None,
        params: Any | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> FlaxBaseModelOutputWithPast | tuple[Any, ...]:
        """Runs the decoder.

        Args:
            input_ids: ids of the vocabulary, ``(batch, frames)``; of Moshi also ``vocab_size``, the start token.
            attention_mask: 1 for frames to attend, 0 for padding; ``(batch, frames)`` for this call's frames, or
                ``(batch, max_length)`` for all slots of the cache.
            position_ids: positions of the rotary embedding; by default the frames are counted from the cache's length.
            cache: a cache of :meth:`init_cache`; it is returned updated, never changed in place. Its former name is
                ``past_key_values``.
            inputs_embeds: instead of ``input_ids``.
            use_cache: True without ``cache`` starts a cache of ``max_position_embeddings`` frames; False
                does not return the cache.
            params: the parameters (default: the model's own).
            dropout_rng: key of the dropout, needed with ``train=True`` where ``attention_dropout`` > 0.
            train: applies dropout.
            output_attentions, output_hidden_states, return_dict: as in ``transformers``.

        Raises:
            ValueError: for wrong shapes, ids outside the vocabulary (where the ids are traced: only under
                ``checkify``, otherwise JAX clamps them) and more frames than the cache has room for.
        """
        config = self.text_config
        given = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        batch_size, length = check_decoder_inputs(config, config.vocab_size + self.extra_input_ids, cache, given)
        cache = self._cache_for(cache, use_cache, batch_size, max(length, config.max_position_embeddings))
        outputs = self._apply(
            params,
            dropout_rng,
            train,
            output_attentions,
            batch_size,
            input_ids=as_int32(input_ids),
            attention_mask=as_array(attention_mask),
            position_ids=as_int32(position_ids),
            cache=cache,
            inputs_embeds=as_array(inputs_embeds),
        )
        return self._finish(outputs, use_cache, output_attentions, output_hidden_states, return_dict)


class FlaxTextForCausalLM(FlaxGenerationMixin, FlaxDecoderModel):
    """A decoder of text with a head."""

    def make_decoder(self) -> TextDecoder:
        return TextDecoder(self.module, self.cache_sizes)

    def dummy_inputs(self, input_shape: tuple[int, ...]) -> dict[str, Any]:
        return {"input_ids": jnp.zeros(input_shape, dtype=jnp.int32)}

    @accept_former_names
    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: Any | None = None,
        position_ids: ArrayLike | None = None,
        cache: LinearCache | None = None,
        inputs_embeds: ArrayLike | None = None,
        use_cache: bool | None = None,
        labels: ArrayLike | None = None,
        logits_to_keep: int = 0,
        params: Any | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> FlaxCausalLMOutputWithPast | tuple[Any, ...]:
        """Runs decoder and head. Arguments and errors as :meth:`FlaxTextModel.__call__`, and:

        Args:
            labels: ids in ``[0, vocab_size)``, or -100 to ignore; shifted inside, so pass ``input_ids``.
            logits_to_keep: logits and ``last_hidden_state`` of the last frames only, 0 for all. Not with ``labels``.
        """
        config = self.text_config
        given = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "labels": labels,
        }
        batch_size, length = check_decoder_inputs(config, config.vocab_size + self.extra_input_ids, cache, given)
        if labels is not None and logits_to_keep:
            raise ValueError("`logits_to_keep` cannot be used with `labels`, which need all logits.")
        if logits_to_keep < 0:
            raise ValueError(f"`logits_to_keep` must not be negative, but is {logits_to_keep}.")
        cache = self._cache_for(cache, use_cache, batch_size, max(length, config.max_position_embeddings))
        outputs = self._apply(
            params,
            dropout_rng,
            train,
            output_attentions,
            batch_size,
            input_ids=as_int32(input_ids),
            attention_mask=as_array(attention_mask),
            position_ids=as_int32(position_ids),
            cache=cache,
            inputs_embeds=as_array(inputs_embeds),
            labels=as_int32(labels),
            logits_to_keep=logits_to_keep,
        )
        return self._finish(outputs, use_cache, output_attentions, output_hidden_states, return_dict)
