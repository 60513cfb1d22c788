"""The public Moshi models: arguments, checks and outputs as in ``transformers``, around the linen modules.

``layers_flax_moshi.py`` has the parts, ``modules_flax_moshi.py`` the modules, ``generation_flax_moshi.py`` the frame
step of ``generate``, ``streaming_flax_moshi.py`` the endless dialogue.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from transformers import GenerationConfig, MoshiConfig
from transformers.models.moshi.configuration_moshi import MoshiDepthConfig

from ...former_names import accept_former_names
from ...generation import FlaxGenerationMixin
from ...generation.arrays import cut, on_device, on_one_device, padded, turned
from ...generation.buckets import bucket
from ...generation.configuration import (
    merge_generation_config,
    padding_lengths,
    resolve_max_length,
    resolve_plan,
)
from ...generation.utils import capacity_of, check_forced, check_watching, one_token
from ...input_checks import (
    check_audio,
    check_ids,
    check_left_padding,
    check_mask,
    check_rank,
    check_sizes,
    is_traced,
    is_tracing,
    refuse_params,
)
from ...modeling_flax_outputs import FlaxBaseModelOutputWithPast, FlaxCausalLMOutputWithPast
from ...modeling_flax_utils import FlaxPreTrainedModel
from ...nn.cache import LinearCache, NoCache, StaticCache
from ..mimi.checkpoint_flax_mimi import CODEBOOKS
from ..mimi.modeling_flax_mimi import FlaxMimiModel
from ..mimi.streaming_flax_mimi import is_causal
from ..mimi.topology import encoded_length, samples_per_frame
from .calls import in_bucket
from .checkpoint_flax_moshi import MOSHI_RULES
from .delay_pattern import apply_delay_pattern_mask, build_delay_pattern_mask
from .embeddings_flax_moshi import FlaxMoshiEmbeddingsMixin
from .generation_flax_moshi import (
    FlaxMoshiGenerateOutput,
    FrameDecoder,
    TextDecoder,
    after_padding,
    decode_audio,
    decoded_frames,
    encode_audio,
    finish_audio,
    frame_inputs,
    lay_out_prompt,
    leading_starts,
    new_audio_codes,
    resolve_depth_sampling,
    with_start_first,
)
from .kyutai_flax_moshi import KyutaiCheckpointMixin
from .layers_flax_moshi import IGNORE_INDEX
from .modules_flax_moshi import (
    FlaxMoshiConditionalGenerationOutputWithPast,
    FlaxMoshiDepthDecoderModule,
    FlaxMoshiDepthDecoderOutputWithPast,
    FlaxMoshiForCausalLMModule,
    FlaxMoshiForConditionalGenerationModule,
    FlaxMoshiModule,
    FlaxMoshiUnconditionalInput,
)
from .streaming_flax_moshi import FlaxMoshiStream


class FlaxMoshiPreTrainedModel(FlaxMoshiEmbeddingsMixin):
    """What the Moshi classes share: the call around ``module.apply`` and the cache."""

    config_class = MoshiConfig
    base_model_prefix = "model"
    checkpoint_rules = MOSHI_RULES
    checkpoint_series = (CODEBOOKS,)
    cache_class = LinearCache
    rounds_lengths = True

    def init_cache(self, batch_size: int, max_length: int) -> LinearCache | StaticCache:
        """An empty static cache for ``max_length`` frames, to be passed as ``cache``.

        Raises:
            ValueError: if either size is no whole number of at least 1.
        """
        check_sizes(batch_size=batch_size, max_length=max_length)
        return self.cache_class.create(self.config, batch_size, max_length, self.dtype)

    def _cache_for(self, cache, use_cache: bool | None, batch_size: int, max_length: int):
        """``use_cache=True`` without a cache starts one for the whole context of the configuration."""
        if cache is None and use_cache:
            return self.init_cache(batch_size, max_length)
        return cache

    def _finish(self, outputs, use_cache, output_attentions, output_hidden_states, return_dict):
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

    def _apply(self, params, dropout_rng, train: bool, output_attentions: bool | None, **inputs):
        """Runs the module with ``params`` (default: the model's own)."""
        inputs["output_attentions"] = bool(
            self.config.output_attentions if output_attentions is None else output_attentions
        )
        if train and dropout_rng is None and self.config.attention_dropout > 0:
            raise ValueError(
                "`train=True` with `attention_dropout` > 0 needs `dropout_rng`: pass a key of `jax.random.key`."
            )
        rngs = {} if dropout_rng is None else {"dropout": dropout_rng}
        params = self.whole_params(params)

        def run(inputs: dict[str, Any]) -> Any:
            return self.module.apply({"params": params}, **inputs, deterministic=not train, rngs=rngs)

        # operation by operation, every new length would compile programs
        if self.rounds_lengths and not train and not is_tracing(params, inputs) and on_one_device(params, inputs):
            return in_bucket(run, inputs)
        return run(inputs)


def check_cache_kind(cache) -> None:
    """Raises ``ValueError`` for what is no cache at all."""
    if not isinstance(cache, LinearCache | StaticCache | None):
        raise ValueError(f"`cache` must be a cache of `init_cache`, but is a {type(cache).__name__}.")


def check_cache(cache, config, batch_size: int, length: int) -> None:
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


def check_decoder_inputs(config, cache, input_ids, inputs_embeds, attention_mask, position_ids) -> tuple[int, int]:
    """Checks what the backbone is called with; returns batch size and frames."""
    refuse_params(attention_mask=attention_mask, position_ids=position_ids, cache=cache)
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
    if input_ids is not None:
        check_rank("input_ids", input_ids, ("batch", "frames"))
        check_ids("input_ids", input_ids, config.vocab_size + 1)
        batch_size, length = np.shape(input_ids)
    else:
        batch_size, length = check_embeds(inputs_embeds, config)
    check_cache(cache, config, batch_size, length)
    if attention_mask is not None:
        check_mask("attention_mask", attention_mask, batch_size, mask_lengths(length, cache))
    if position_ids is not None and np.shape(position_ids) not in ((batch_size, length), (1, length)):
        raise ValueError(
            f"`position_ids` must have the shape ({batch_size}, {length}), but has the shape {np.shape(position_ids)}."
        )
    return batch_size, length


def check_embeds(inputs_embeds, config) -> tuple[int, int]:
    check_rank("inputs_embeds", inputs_embeds, ("batch", "frames", "hidden_size"))
    if inputs_embeds.shape[-1] != config.hidden_size:
        raise ValueError(
            f"`inputs_embeds` must have {config.hidden_size} features (`hidden_size`), but has "
            f"{inputs_embeds.shape[-1]}."
        )
    return inputs_embeds.shape[:2]


def mask_lengths(length: int, cache) -> tuple[int, ...]:
    return (length,) if cache is None else (length, cache.max_length)


def as_int32(ids):
    """On the device; without a program for every shape, which ``jnp.asarray`` may compile."""
    return ids if ids is None else ids.astype(jnp.int32) if isinstance(ids, jax.Array) else on_device(ids, np.int32)


def as_array(array):
    return array if array is None or isinstance(array, jax.Array) else on_device(array)


class FlaxMoshiModel(FlaxMoshiPreTrainedModel):
    """The backbone without a head; upstream ``MoshiModel``."""

    module_class = FlaxMoshiModule
    input_tables = ("embed_tokens/embedding",)
    checkpoint_prefixes = ("", "model.", "decoder.model.")

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
        """Runs the backbone.

        Args:
            input_ids: text ids in ``[0, vocab_size]``; ``vocab_size`` is the start token.
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
        config = self.config
        batch_size, length = check_decoder_inputs(
            config, cache, input_ids, inputs_embeds, attention_mask, position_ids
        )
        cache = self._cache_for(cache, use_cache, batch_size, max(length, config.max_position_embeddings))
        outputs = self._apply(
            params,
            dropout_rng,
            train,
            output_attentions,
            input_ids=as_int32(input_ids),
            attention_mask=as_array(attention_mask),
            position_ids=as_int32(position_ids),
            cache=cache,
            inputs_embeds=as_array(inputs_embeds),
        )
        return self._finish(outputs, use_cache, output_attentions, output_hidden_states, return_dict)


class FlaxMoshiForCausalLM(FlaxGenerationMixin, FlaxMoshiPreTrainedModel):
    """The backbone with the text head, usable for text alone; upstream ``MoshiForCausalLM``."""

    module_class = FlaxMoshiForCausalLMModule
    checkpoint_prefixes = ("", "decoder.")
    input_tables = ("model/embed_tokens/embedding",)
    output_table = "lm_head/kernel"

    def _part_classes(self) -> dict[str, tuple[type[FlaxPreTrainedModel], Any]]:
        return {"model": (FlaxMoshiModel, self.config)}

    @property
    def model(self) -> FlaxMoshiModel:
        """The backbone as a model of its own, on the same parameters."""
        return self._part("model")

    def make_decoder(self) -> TextDecoder:
        return TextDecoder(self.module)

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
        """Runs backbone and head. Arguments and errors as :meth:`FlaxMoshiModel.__call__`, and:

        Args:
            labels: ids in ``[0, vocab_size)``, or -100 to ignore; shifted inside, so pass ``input_ids``.
            logits_to_keep: logits and ``last_hidden_state`` of the last frames only, 0 for all. Not with ``labels``.
        """
        config = self.config
        batch_size, length = check_decoder_inputs(
            config, cache, input_ids, inputs_embeds, attention_mask, position_ids
        )
        if labels is not None:
            check_labels("labels", labels, (batch_size, length), config.vocab_size)
            if logits_to_keep:
                raise ValueError("`logits_to_keep` cannot be used with `labels`, which need all logits.")
        if logits_to_keep < 0:
            raise ValueError(f"`logits_to_keep` must not be negative, but is {logits_to_keep}.")
        cache = self._cache_for(cache, use_cache, batch_size, max(length, config.max_position_embeddings))
        outputs = self._apply(
            params,
            dropout_rng,
            train,
            output_attentions,
            input_ids=as_int32(input_ids),
            attention_mask=as_array(attention_mask),
            position_ids=as_int32(position_ids),
            cache=cache,
            inputs_embeds=as_array(inputs_embeds),
            labels=as_int32(labels),
            logits_to_keep=logits_to_keep,
        )
        return self._finish(outputs, use_cache, output_attentions, output_hidden_states, return_dict)


def check_labels(name: str, labels, shape: tuple[int, ...], size: int) -> None:
    if np.shape(labels) != shape:
        raise ValueError(f"`{name}` must have the shape {shape}, but has the shape {np.shape(labels)}.")
    check_ids(name, labels, size, allowed=(IGNORE_INDEX,), remedy=f"Use {IGNORE_INDEX} for labels to ignore.")


class FlaxMoshiDepthDecoder(FlaxMoshiPreTrainedModel):
    """The decoder over the codebooks of one frame; upstream ``MoshiDepthDecoder``."""

    config_class = MoshiDepthConfig
    base_model_prefix = ""
    module_class = FlaxMoshiDepthDecoderModule
    checkpoint_prefixes = ("", "depth_decoder.")
    input_tables = ("text_embed_tokens/embedding",)
    cache_class = StaticCache
    rounds_lengths = False  # there are as many as codebooks

    def dummy_inputs(self, input_shape: tuple[int, ...]) -> dict[str, Any]:
        batch_size, num_codebooks = input_shape[0], self.config.num_codebooks
        return {
            "input_ids": jnp.zeros((batch_size, num_codebooks), dtype=jnp.int32),
            "last_hidden_state": jnp.zeros((batch_size, 1, self.config.input_size)),
        }

    @accept_former_names
    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        last_hidden_state: ArrayLike | None = None,
        attention_mask: Any | None = None,
        cache: StaticCache | None = None,
        inputs_embeds: ArrayLike | None = None,
        use_cache: bool | None = None,
        position_ids: Any | None = None,
        labels: ArrayLike | None = None,
        params: Any | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> FlaxMoshiDepthDecoderOutputWithPast | tuple[Any, ...]:
        """Runs the depth decoder over the codebooks of frames, one frame a row.

        Args:
            input_ids: the text token of the frame, then the codes of its codebooks 0, 1, …; ``(batch, codebooks)``
                with at most ``num_codebooks`` columns. -100 gives a zero embedding.
            last_hidden_state: the backbone's hidden state of the frame before, ``(batch, 1, input_size)``, or one per
                position.
            attention_mask: 1 for positions to attend; always causal, with or without it.
            cache: a cache of ``init_cache(batch_size, num_codebooks)``.
            inputs_embeds: instead of ``input_ids``.
            use_cache: True without ``cache`` starts a cache of ``num_codebooks`` positions.
            position_ids: which codebook each position is, known at trace time (default: counted from the cache's
                length).
            labels: the code that each position predicts; -100 and ``audio_vocab_size`` are ignored. Not shifted.
            params, dropout_rng, train, output_attentions, output_hidden_states, return_dict: as
                :meth:`FlaxMoshiModel.__call__`.

        Raises:
            ValueError: for wrong shapes, ids outside the vocabularies, more positions than codebooks.
        """
        config = self.config
        refuse_params(attention_mask=attention_mask, cache=cache, position_ids=position_ids, labels=labels)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        if last_hidden_state is None:
            raise ValueError("`last_hidden_state` is missing: pass the backbone's hidden state of the frame before.")
        check_rank("last_hidden_state", last_hidden_state, ("batch", "1 or codebooks", "input_size"))
        if last_hidden_state.shape[-1] != config.input_size:
            raise ValueError(
                f"`last_hidden_state` must have {config.input_size} features (`input_size`), but has "
                f"{last_hidden_state.shape[-1]}."
            )
        given = input_ids if inputs_embeds is None else inputs_embeds
        axes = ("batch", "codebooks") if inputs_embeds is None else ("batch", "codebooks", "hidden_size")
        check_rank("input_ids" if inputs_embeds is None else "inputs_embeds", given, axes)
        batch_size, length = np.shape(given)[:2]
        check_cache_kind(cache)
        past = (NoCache() if cache is None else cache).length
        if past + length > config.num_codebooks:
            raise ValueError(
                f"`{'input_ids' if inputs_embeds is None else 'inputs_embeds'}` has {length} positions after {past} "
                f"cached ones, but a frame has only {config.num_codebooks} (`num_codebooks`)."
            )
        check_cache(cache, config, batch_size, length)
        codebooks = tuple(range(past, past + length))
        if position_ids is not None:
            if is_traced(position_ids):
                raise ValueError("`position_ids` selects the codebooks' weights: it must be known at trace time.")
            rows = np.asarray(position_ids).reshape(-1, length)
            codebooks = tuple(int(index) for index in rows[0])
            if (rows != rows[0]).any() or min(codebooks) < 0 or max(codebooks) >= config.num_codebooks:
                raise ValueError(
                    f"`position_ids` must be the same codebooks in [0, {config.num_codebooks}) for every row, but is "
                    f"{np.asarray(position_ids).tolist()}."
                )
        if input_ids is not None:
            for column, codebook in enumerate(codebooks):
                size = config.audio_vocab_size + 1 if codebook else config.vocab_size + 1
                check_ids("input_ids", input_ids[:, column], size, allowed=(IGNORE_INDEX,))
        if labels is not None:
            check_labels("labels", labels, (batch_size, length), config.audio_vocab_size + 1)
        if attention_mask is not None:
            check_mask("attention_mask", attention_mask, batch_size, mask_lengths(length, cache))
        outputs = self._apply(
            params,
            dropout_rng,
            train,
            output_attentions,
            input_ids=as_int32(input_ids),
            last_hidden_state=jnp.asarray(last_hidden_state),
            attention_mask=as_array(attention_mask),
            cache=self._cache_for(cache, use_cache, batch_size, config.num_codebooks),
            inputs_embeds=as_array(inputs_embeds),
            position_ids=codebooks,
            labels=as_int32(labels),
        )
        return self._finish(outputs, use_cache, output_attentions, output_hidden_states, return_dict)


class FlaxMoshiForConditionalGeneration(FlaxGenerationMixin, KyutaiCheckpointMixin, FlaxMoshiPreTrainedModel):
    """The whole of Moshi, speech and text in and out; upstream ``MoshiForConditionalGeneration``."""

    base_model_prefix = ""
    module_class = FlaxMoshiForConditionalGenerationModule
    input_tables = ("decoder/model/embed_tokens/embedding", "depth_decoder/text_embed_tokens/embedding")
    output_table = "decoder/lm_head/kernel"

    def __init__(self, config: MoshiConfig, *args, **kwargs):
        if config.audio_encoder_config is None or config.depth_decoder_config is None:
            raise ValueError(
                "`config` lacks `audio_encoder_config` or `depth_decoder_config`: give both, or use "
                "FlaxMoshiForCausalLM."
            )
        available = config.audio_encoder_config.num_quantizers
        if config.num_codebooks > available:
            raise ValueError(
                f"`num_codebooks` is {config.num_codebooks}, but the audio encoder has only {available} "
                "(`num_quantizers`): lower it."
            )
        super().__init__(config, *args, **kwargs)

    def dummy_inputs(self, input_shape: tuple[int, ...]) -> dict[str, Any]:
        batch_size = input_shape[0]
        text = jnp.zeros((batch_size, 2), dtype=jnp.int32)
        codes = jnp.zeros((batch_size, self.config.num_codebooks, 2), dtype=jnp.int32)
        return {
            "input_ids": text,
            "user_audio_codes": codes,
            "moshi_audio_codes": codes,
            "text_labels": text,
            "audio_labels": codes,
        }

    # Parts, as upstream has them: each a model of its own on the same parameters, made once

    def _part_classes(self) -> dict[str, tuple[type[FlaxPreTrainedModel], Any]]:
        config = self.config
        return {
            "audio_encoder": (FlaxMimiModel, config.audio_encoder_config),
            "decoder": (FlaxMoshiForCausalLM, config),
            "depth_decoder": (FlaxMoshiDepthDecoder, config.depth_decoder_config),
        }

    @property
    def audio_encoder(self) -> FlaxMimiModel:
        """Mimi."""
        return self._part("audio_encoder")

    @property
    def decoder(self) -> FlaxMoshiForCausalLM:
        """The backbone with the head for text."""
        return self._part("decoder")

    @property
    def depth_decoder(self) -> FlaxMoshiDepthDecoder:
        """The decoder over the codebooks of a frame."""
        return self._part("depth_decoder")

    def get_depth_decoder(self) -> FlaxMoshiDepthDecoder:
        """:attr:`depth_decoder`."""
        return self.depth_decoder

    @property
    def num_codebooks(self) -> int:
        """Of Moshi, and of the user: those that are heard and said, of Mimi's."""
        return self.config.num_codebooks

    def freeze_audio_encoder(self, mask: dict | None = None) -> dict:
        """A tree of booleans for optax (``optax.masked``, ``multi_transform``): False for the audio encoder's leaves.

        Args:
            mask: a mask to freeze further (default: everything trains).
        """
        return self._freeze("audio_encoder", mask)

    def freeze_depth_decoder(self, mask: dict | None = None) -> dict:
        """As :meth:`freeze_audio_encoder`, for the depth decoder."""
        return self._freeze("depth_decoder", mask)

    def _freeze(self, part: str, mask: dict | None) -> dict:
        if mask is None:
            mask = jax.tree.map(lambda _: True, self.params_shape_tree)
        return {**mask, part: jax.tree.map(lambda _: False, mask[part])}

    def get_unconditional_inputs(self, num_samples: int = 1) -> FlaxMoshiUnconditionalInput:
        """The start frame of ``num_samples`` rows, to generate from nothing.

        Raises:
            ValueError: if ``num_samples`` is below 1.
        """
        check_sizes(num_samples=num_samples)
        codes = jnp.full((num_samples, self.config.num_codebooks, 1), self.config.audio_vocab_size, dtype=jnp.int32)
        return FlaxMoshiUnconditionalInput(
            input_ids=jnp.full((num_samples, 1), self.config.vocab_size, dtype=jnp.int32),
            user_audio_codes=codes,
            moshi_audio_codes=codes,
            attention_mask=jnp.ones((num_samples, 1), dtype=jnp.int32),
        )

    @staticmethod
    def build_delay_pattern_mask(
        input_ids: ArrayLike, bos_token_id: int, pad_token_id: int, max_length: int
    ) -> tuple[jax.Array, jax.Array]:
        """See :func:`~transformers_moshi_flax.models.moshi.delay_pattern.build_delay_pattern_mask`."""
        return build_delay_pattern_mask(jnp.asarray(input_ids), bos_token_id, pad_token_id, max_length)

    @staticmethod
    def apply_delay_pattern_mask(input_ids: ArrayLike, decoder_pad_token_mask: ArrayLike) -> jax.Array:
        """See :func:`~transformers_moshi_flax.models.moshi.delay_pattern.apply_delay_pattern_mask`."""
        return apply_delay_pattern_mask(jnp.asarray(input_ids), jnp.asarray(decoder_pad_token_mask))

    # ------------------------------------------------------------------------------------------------ inputs

    def _check_audio(self, name: str, codes, input_values) -> None:
        """Checks one audio stream, as codes ``{name}_audio_codes`` or as waveform ``{name}_input_values``."""
        config = self.config
        if codes is not None:
            check_rank(f"{name}_audio_codes", codes, ("batch", "num_codebooks", "frames"))
            if np.shape(codes)[1] != config.num_codebooks or np.shape(codes)[2] == 0:
                raise ValueError(
                    f"`{name}_audio_codes` must have {config.num_codebooks} codebooks (`num_codebooks`) and at least "
                    f"one frame, but has the shape {np.shape(codes)}."
                )
            check_ids(f"{name}_audio_codes", codes, config.audio_vocab_size + 1)
        elif input_values is not None:
            shape = {"batch": None, "channels": config.audio_encoder_config.audio_channels, "samples": None}
            check_audio(f"{name}_input_values", input_values, shape)

    def _audio_streams(self, **streams: Any) -> dict[str, Any]:
        """The streams that count, by argument: codes have priority over waveforms."""
        given = {name: stream for name, stream in streams.items() if stream is not None}
        return {
            name: stream
            for name, stream in given.items()
            if name.endswith("codes") or name.replace("input_values", "audio_codes") not in given
        }

    def _frames(self, name: str, stream) -> int:
        """Frames of one audio stream, the last one padded."""
        size = samples_per_frame(self.config.audio_encoder_config) if name.endswith("values") else 1
        return -(-np.shape(stream)[-1] // size)

    def _check_streams(
        self, streams: dict[str, Any], reference: str, batch_size: int, length: int, user_may_go_on: bool = False
    ) -> None:
        """Raises ``ValueError`` for the first stream that does not fit ``reference``, naming it."""
        for name, stream in streams.items():
            if np.shape(stream)[0] != batch_size:
                raise ValueError(
                    f"`{name}` has a batch of {np.shape(stream)[0]}, but `{reference}` has {batch_size}: make them "
                    "equal."
                )
            frames = self._frames(name, stream)
            goes_on = user_may_go_on and name.startswith("user")
            if frames < length or (frames > length and not goes_on):
                raise ValueError(
                    f"`{name}` has {frames} frames, but `{reference}` has {length}: pad the shorter one (a frame is "
                    f"{samples_per_frame(self.config.audio_encoder_config)} samples)."
                )

    @accept_former_names
    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        user_input_values: ArrayLike | None = None,
        user_audio_codes: ArrayLike | None = None,
        moshi_input_values: ArrayLike | None = None,
        moshi_audio_codes: ArrayLike | None = None,
        cache: LinearCache | None = None,
        inputs_embeds: ArrayLike | None = None,
        text_labels: ArrayLike | None = None,
        audio_labels: ArrayLike | None = None,
        use_cache: bool | None = None,
        params: Any | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        audio_encoder_padding_mask: ArrayLike | None = None,
    ) -> FlaxMoshiConditionalGenerationOutputWithPast | tuple[Any, ...]:
        """Runs the backbone over frames of three streams and, with labels, the losses of text and audio.

        The input codes are delayed already (``build_delay_pattern_mask``); ``audio_labels`` are not.

        Args:
            input_ids: text ids in ``[0, vocab_size]``, ``(batch, frames)``.
            attention_mask: 1 for frames to attend, 0 for padding, ``(batch, frames)``; masked frames are left out of
                the losses.
            user_input_values, moshi_input_values: waveforms, ``(batch, 1, samples)`` at 24 kHz in [-1, 1].
            user_audio_codes, moshi_audio_codes: codes in ``[0, audio_vocab_size]``, ``(batch, num_codebooks,
                frames)``; they have priority over the waveforms.
            cache: a cache of ``init_cache``.
            inputs_embeds: instead of all streams, ``(batch, frames, hidden_size)``.
            text_labels: ids in ``[0, vocab_size)`` or -100, ``(batch, frames)``; shifted inside.
            audio_labels: codes in ``[0, audio_vocab_size]`` or -100, ``(batch, num_codebooks, frames)``; delayed and
                shifted inside. They need ``text_labels``, which start each frame's codes.
            use_cache, params, dropout_rng, train, output_attentions, output_hidden_states, return_dict: as
                :meth:`FlaxMoshiModel.__call__`.
            audio_encoder_padding_mask: 1 for samples, 0 for padding on the right, ``(batch, samples)``, for the
                encoding of the waveforms.

        Raises:
            ValueError: no input, streams of different length, ids outside a vocabulary, audio that is empty, not
                finite or of the wrong rank, more frames than the cache has room for.
        """
        config = self.config
        refuse_params(attention_mask=attention_mask, cache=cache, text_labels=text_labels, audio_labels=audio_labels)
        streams = (input_ids, user_input_values, user_audio_codes, moshi_input_values, moshi_audio_codes)
        if inputs_embeds is None and all(stream is None for stream in streams):
            raise ValueError(
                "Pass at least one of `input_ids`, `user_input_values`, `user_audio_codes`, `moshi_input_values`, "
                "`moshi_audio_codes` and `inputs_embeds`."
            )
        if inputs_embeds is None:
            self._check_audio("user", user_audio_codes, user_input_values)
            self._check_audio("moshi", moshi_audio_codes, moshi_input_values)
            audio = self._audio_streams(
                user_input_values=user_input_values,
                user_audio_codes=user_audio_codes,
                moshi_input_values=moshi_input_values,
                moshi_audio_codes=moshi_audio_codes,
            )
            if input_ids is not None:
                check_rank("input_ids", input_ids, ("batch", "frames"))
                check_ids("input_ids", input_ids, config.vocab_size + 1)
                reference, (batch_size, length) = "input_ids", np.shape(input_ids)
            else:
                reference, stream = next(iter(audio.items()))
                batch_size, length = np.shape(stream)[0], self._frames(reference, stream)
            self._check_streams(audio, reference, batch_size, length)
        else:
            batch_size, length = check_embeds(inputs_embeds, config)
        check_cache(cache, config, batch_size, length)
        if attention_mask is not None:
            check_mask("attention_mask", attention_mask, batch_size, mask_lengths(length, cache))
        if text_labels is not None:
            check_labels("text_labels", text_labels, (batch_size, length), config.vocab_size)
        if audio_labels is not None:
            if text_labels is None:
                raise ValueError("`audio_labels` need `text_labels`: the text token starts each frame's codes.")
            shape = (batch_size, config.num_codebooks, length)
            check_labels("audio_labels", audio_labels, shape, config.audio_vocab_size + 1)
        if text_labels is not None and length < 2:
            raise ValueError("`text_labels` need at least 2 frames: each frame predicts the next.")
        if audio_encoder_padding_mask is not None:
            waveforms = [x for x in (user_input_values, moshi_input_values) if x is not None]
            if inputs_embeds is not None or not waveforms:
                raise ValueError(
                    "`audio_encoder_padding_mask` has no effect without waveforms to encode: leave it out."
                )
            for waveform in waveforms:
                check_mask("audio_encoder_padding_mask", audio_encoder_padding_mask, batch_size, waveform.shape[-1:])
            audio_encoder_padding_mask = as_array(audio_encoder_padding_mask).astype(bool)
        if inputs_embeds is None:
            given = (attention_mask, length, cache, params, audio_encoder_padding_mask)
            user_audio_codes = self._codes_of(user_audio_codes, user_input_values, *given)
            moshi_audio_codes = self._codes_of(moshi_audio_codes, moshi_input_values, *given)
        cache = self._cache_for(cache, use_cache, batch_size, max(length, config.max_position_embeddings))
        outputs = self._apply(
            params,
            dropout_rng,
            train,
            output_attentions,
            input_ids=as_int32(input_ids),
            attention_mask=as_array(attention_mask),
            user_audio_codes=as_int32(user_audio_codes),
            moshi_audio_codes=as_int32(moshi_audio_codes),
            cache=cache,
            inputs_embeds=as_array(inputs_embeds),
            text_labels=as_int32(text_labels),
            audio_labels=as_int32(audio_labels),
        )
        return self._finish(outputs, use_cache, output_attentions, output_hidden_states, return_dict)

    # -------------------------------------------------------------------------------------------- generation

    def generate(
        self,
        input_ids: ArrayLike | None = None,
        user_input_values: ArrayLike | None = None,
        user_audio_codes: ArrayLike | None = None,
        moshi_input_values: ArrayLike | None = None,
        moshi_audio_codes: ArrayLike | None = None,
        inputs_embeds: ArrayLike | None = None,
        return_audio_waveforms: bool = True,
        return_audio_codes: bool | None = None,
        concat_unconditional_inputs: bool = True,
        generation_config: GenerationConfig | None = None,
        prng_key: jax.Array | None = None,
        params: Any | None = None,
        forced_text_ids: ArrayLike | None = None,
        forced_audio_codes: ArrayLike | None = None,
        streamer: Any | None = None,
        **kwargs: Any,
    ) -> FlaxMoshiGenerateOutput:
        """Generates text and audio, frame by frame; ``docs/architecture.md`` has the diagram.

        The prompt is one XLA program, time loop and codebook loop another. They are compiled once per batch size,
        capacity (prompt and new frames, rounded up) and kind of options, and kept on the model; audio is encoded
        before and decoded after them. Inside ``jax.jit`` outputs keep the full length; called eagerly they are cut
        after the longest row.

        Args:
            input_ids: text ids of the prompt, ``(batch, frames)``. Without any input the start frame is the prompt.
            user_input_values, moshi_input_values: waveforms of the prompt, ``(batch, 1, samples)`` at 24 kHz.
            user_audio_codes, moshi_audio_codes: or their codes, ``(batch, num_codebooks, frames)``, undelayed. The
                user's stream may be longer than the prompt and is then heard while Moshi speaks; after its end there
                is silence.
            inputs_embeds: the prompt's embeddings, ``(batch, frames, hidden_size)``, instead of those of the streams;
                the streams are still needed for the codes. Sequences then begin with ``input_ids`` if they are given,
                and with the generated tokens otherwise.
            return_audio_waveforms: decode the audio.
            return_audio_codes: return the codes.
            concat_unconditional_inputs: put the start frame before the prompt.
            generation_config: options; what is None in it comes from the model's ``generation_config``.
            prng_key: a key, or one per row, for sampling (default: ``jax.random.key(0)``).
            params: the parameters (default: the model's own).
            forced_text_ids: what Moshi is to say, ``(batch, frames)`` for the new frames from the first on, at most
                all of them; -1 where the model chooses.
            forced_audio_codes: likewise its undelayed codes, ``(batch, num_codebooks, frames)``.
            streamer: an object with ``put`` and ``end``, as ``transformers.TextStreamer``, that gets the text ids of
                the prompt and then of every new frame ``(batch,)`` while generation goes on; if it has
                ``put_audio_codes``, that gets the undelayed codes ``(batch, num_codebooks, frames)`` of new frames.
                Not under ``jax.jit``.
            **kwargs: fields of ``GenerationConfig`` for the text (``max_new_tokens``, ``do_sample``, ``temperature``,
                ``top_k``, ``top_p``, ``eos_token_id``, …), with the prefix ``depth_decoder_`` for the audio;
                ``attention_mask`` ``(batch, frames)``; ``stop_lengths`` ``(batch,)``, after how many new frames each
                row ends at the latest; ``logits_processor`` for the text, ``processor(sequences, scores, length) ->
                scores`` or a list of such. ``max_length`` counts the prompt and the start frame.

        Returns:
            ``sequences`` have the prompt (after the start frame, if it is concatenated) and the new tokens.
            ``audio_codes`` and ``audio_sequences`` have the prompt's frames and one less than the new tokens; before
            a row that was padded they have the codes that were given for the padding (where waveforms were given, they
            mean nothing), and silence. All lengths count the padding.

        Raises:
            ValueError: unknown or unsupported options (named); streams that are missing, of different length or batch
                size; ids outside a vocabulary; start codes behind other ones in Moshi's prompt; audio that is empty or
                not finite.
        """
        config = self.config
        depth_kwargs = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("depth_decoder_")}
        # `depth_decoder_config` is a field of the generation configuration, not an option of the depth decoder
        if "depth_decoder_config" in depth_kwargs:
            kwargs["depth_decoder_config"] = depth_kwargs.pop("depth_decoder_config")
        extra = ("attention_mask", "stop_lengths", "logits_processor")
        options, inputs = merge_generation_config(self.generation_defaults(), generation_config, kwargs, extra)
        depth_sampling = resolve_depth_sampling(
            getattr(options, "depth_decoder_config", None), depth_kwargs, config.num_codebooks, config.audio_vocab_size
        )
        attention_mask = inputs.get("attention_mask")

        given = {
            "`input_ids` or `inputs_embeds`": input_ids is not None or inputs_embeds is not None,
            "`user_input_values` or `user_audio_codes`": user_input_values is not None or user_audio_codes is not None,
            "`moshi_input_values` or `moshi_audio_codes`": moshi_input_values is not None
            or moshi_audio_codes is not None,
        }
        if not any(given.values()):
            start = self.get_unconditional_inputs()
            input_ids, user_audio_codes, moshi_audio_codes = (
                start.input_ids,
                start.user_audio_codes,
                start.moshi_audio_codes,
            )
            concat_unconditional_inputs = False
        elif not all(given.values()):
            missing = " and ".join(name for name, there in given.items() if not there)
            size = samples_per_frame(config.audio_encoder_config)
            raise ValueError(
                f"Pass {missing} as well, or no input at all (see `get_unconditional_inputs`). What is not said is "
                f"silence: zeros of the shape (batch, {config.audio_encoder_config.audio_channels}, frames * {size}) "
                "as `_input_values`; for text, the id of padding in every frame. `MoshiProcessor` fills in both."
            )

        self._check_audio("user", user_audio_codes, user_input_values)
        self._check_audio("moshi", moshi_audio_codes, moshi_input_values)
        batch_size, length = self._check_prompt(input_ids, inputs_embeds)
        text_name = "input_ids" if inputs_embeds is None else "inputs_embeds"
        audio = self._audio_streams(
            user_input_values=user_input_values,
            user_audio_codes=user_audio_codes,
            moshi_input_values=moshi_input_values,
            moshi_audio_codes=moshi_audio_codes,
        )
        self._check_streams(audio, text_name, batch_size, length, user_may_go_on=True)
        if attention_mask is not None:
            check_mask("attention_mask", attention_mask, batch_size, (length,))
            check_left_padding("attention_mask", attention_mask)
        if moshi_audio_codes is not None:
            check_start_codes("moshi_audio_codes", moshi_audio_codes, attention_mask, config.audio_vocab_size)
        concat_unconditional_inputs = concat_unconditional_inputs and inputs_embeds is None
        prompt_shape = (batch_size, length)
        length += int(concat_unconditional_inputs)
        plan = resolve_plan(
            options,
            length,
            config.vocab_size,
            batch_size,
            attention_mask,
            inputs.get("stop_lengths"),
            inputs.get("logits_processor"),
        )
        self._check_forced(forced_text_ids, forced_audio_codes, batch_size, plan.max_length - length)
        operands = (prng_key, plan.sampling, depth_sampling, attention_mask, forced_text_ids, forced_audio_codes)
        traced = is_tracing(input_ids, inputs_embeds, audio, params, operands)
        check_watching(plan, streamer, traced)
        if return_audio_waveforms and config.audio_encoder_config.decoder_config is None:
            raise ValueError(
                "`return_audio_waveforms=True` needs the audio decoder, which this configuration has dropped: pass "
                "`return_audio_waveforms=False`."
            )

        params = self.whole_params(params)
        padding = None
        if attention_mask is not None and (traced or not np.all(attention_mask)):
            padding = padding_lengths(attention_mask, prompt_shape[1])
        if user_audio_codes is None:
            user_audio_codes = self._encode(params, user_input_values, padding)
        if moshi_audio_codes is None:
            moshi_audio_codes = self._encode(params, moshi_input_values, padding)
        codec = config.audio_encoder_config
        silence = np.zeros((1, codec.audio_channels, samples_per_frame(codec)), dtype=self.dtype)
        blank_codes = self.compiled(encode_audio, quickly=True)(params, silence)

        # on the host if that is possible: XLA would compile a program for every length of every stream
        xp = jnp if traced else np
        text_prompt, given_codes = input_ids is not None, moshi_audio_codes
        input_ids, user_audio_codes, moshi_audio_codes, laid_out_mask = lay_out_prompt(
            # without a text no id of the vocabulary, so that no processor of logits takes it for a part of the history
            input_ids if text_prompt else np.full(prompt_shape, config.vocab_size),
            user_audio_codes,
            moshi_audio_codes,
            np.ones(prompt_shape) if attention_mask is None else attention_mask,
            start_token=config.vocab_size if concat_unconditional_inputs else None,
            start_code=config.audio_vocab_size,
        )

        capacity = capacity_of(plan, traced)
        request = self.make_request(
            plan,
            input_ids,
            laid_out_mask,
            prng_key,
            capacity,
            forced_text_ids,
            streams=frame_inputs(
                user_audio_codes,
                moshi_audio_codes,
                blank_codes,
                inputs_embeds,
                forced_audio_codes,
                capacity=capacity,
                start_code=config.audio_vocab_size,
            ),
            depth_sampling=depth_sampling,
        )
        state, more = self.decode(
            plan,
            request,
            length,
            params,
            streamer=streamer,
            audio_codes=partial(new_audio_codes, filler=config.audio_vocab_size),
        )
        copies = plan.num_return_sequences
        starts = xp.repeat(leading_starts(moshi_audio_codes, config.audio_vocab_size), copies)
        codes, audio_lengths = self.compiled(finish_audio)(state.streams, state.lengths, starts)
        sequences, lengths = state.sequences, state.lengths
        if padding is not None:
            padding = xp.repeat(xp.asarray(padding), copies)
        frames, length_decoded = plan.max_length - 1 - int(concat_unconditional_inputs), codes.shape[-1]
        if not traced:
            frames = int(np.max(np.asarray(audio_lengths) + (0 if padding is None else padding)))
            length_decoded = next(size for size in decoded_frames(codes.shape[-1]) if size >= frames)
            sequences, codes = cut(sequences, int(lengths.max())), cut(codes, length_decoded)
        if concat_unconditional_inputs and attention_mask is not None:
            sequences = with_start_first(sequences, attention_mask, config.vocab_size)
        audio = None
        if return_audio_waveforms:
            audio = self.compiled(decode_audio)(params, codes, audio_lengths)
            audio = cut(audio, audio.shape[-1] // codes.shape[-1] * frames)
        codes = cut(codes, frames)
        if padding is not None:
            codes, audio = after_padding(codes, audio, padding, given_codes)
            audio_lengths = on_device(xp.asarray(audio_lengths) + padding)
        if not text_prompt:
            sequences, lengths = on_device(xp.asarray(sequences)[:, length:]), lengths - length
        return FlaxMoshiGenerateOutput(
            audio_sequences=audio,
            sequences=sequences,
            audio_codes=codes if return_audio_codes else None,
            sequence_lengths=lengths,
            audio_lengths=audio_lengths,
            **more,
        )

    def warmup(
        self,
        batch_size: int = 1,
        prompt_frames: int = 0,
        max_new_tokens: int | None = None,
        waveforms: bool = True,
        **options: Any,
    ) -> None:
        """Compiles the programs that :meth:`generate` will need, ahead of time.

        Args:
            batch_size: rows of the prompt; 1 without a prompt.
            prompt_frames: its frames, 0 to generate from nothing; other lengths of the same buckets share the
                programs.
            max_new_tokens: as of :meth:`generate`; ``max_length`` among the options does as well.
            waveforms: whether the user's and Moshi's streams of the prompt come as waveforms, not as codes.
            **options: the other options of the calls to come. Only their kinds matter, not their numbers.

        Raises:
            ValueError: as :meth:`generate`, or a size is too small.
        """
        check_sizes(batch_size=batch_size)
        config = self.config
        prompt: dict[str, Any] = {}
        if prompt_frames:
            check_sizes(prompt_frames=prompt_frames)
            prompt["input_ids"] = np.full((batch_size, prompt_frames), config.vocab_size)
            codec = config.audio_encoder_config
            samples = np.zeros(
                (batch_size, codec.audio_channels, prompt_frames * samples_per_frame(codec)), np.float32
            )
            codes = np.zeros((batch_size, config.num_codebooks, prompt_frames), dtype=np.int32)
            name, stream = ("input_values", samples) if waveforms else ("audio_codes", codes)
            prompt |= {f"user_{name}": stream, f"moshi_{name}": stream}
        elif batch_size > 1:
            raise ValueError(
                f"`batch_size` is {batch_size}, but without a prompt there is one row: set `prompt_frames`."
            )
        options = one_token(options, batch_size, max_new_tokens)
        params = self.whole_params(options.get("params"))
        outputs = self.generate(**prompt, **options)
        if prompt and waveforms:
            self._encode(params, samples[..., 1:])  # a recording may end within a frame
        if outputs.audio_sequences is not None:
            # rows may end early, and waveforms are decoded in several lengths
            started = not prompt or options.get("concat_unconditional_inputs", True)
            given = {name: options[name] for name in ("max_new_tokens", "max_length") if name in options}
            merged, _ = merge_generation_config(self.generation_defaults(), options.get("generation_config"), given)
            capacity = bucket(resolve_max_length(vars(merged), prompt_frames + int(started)))
            for frames in decoded_frames(capacity - 1):
                codes = np.zeros((len(outputs.sequences), config.num_codebooks, frames), dtype=np.int32)
                self.compiled(decode_audio)(params, on_device(codes), outputs.audio_lengths)
        jax.block_until_ready(outputs)

    def streaming(
        self,
        batch_size: int = 1,
        generation_config: GenerationConfig | None = None,
        params: Any | None = None,
        mesh: jax.sharding.Mesh | None = None,
        ignore_first_user_frame: bool = False,
        return_audio_waveforms: bool = True,
        **kwargs: Any,
    ) -> FlaxMoshiStream:
        """Endless dialogues, 80 ms at a time; see
        :class:`~transformers_moshi_flax.models.moshi.streaming_flax_moshi.FlaxMoshiStream`."""
        return FlaxMoshiStream(
            self,
            batch_size,
            generation_config,
            params,
            mesh,
            ignore_first_user_frame,
            return_audio_waveforms,
            **kwargs,
        )

    def _codes_of(self, codes, values, attention_mask, length: int, cache, params, mask):
        """The codes of a stream of a call of ``length`` frames, whose padding ``attention_mask`` tells."""
        if codes is not None or values is None:
            return codes
        padding = None
        if attention_mask is not None:
            if np.shape(attention_mask)[1] != length:  # of all slots of the cache
                if is_traced(attention_mask, cache.length):
                    attention_mask = jax.lax.dynamic_slice_in_dim(attention_mask, cache.length, length, axis=1)
                else:
                    attention_mask = cut(as_array(attention_mask), length, 1, int(cache.length))
            if is_traced(attention_mask) or not np.all(attention_mask):
                padding = padding_lengths(attention_mask, length)
        return self._encode(self.whole_params(params), values, padding, mask)

    def _encode(self, params, values, padding=None, mask=None):
        """The codes of waveforms, each row's as if it were alone; the waveforms are padded to a bucket.

        Args:
            params: of the whole model.
            values: ``(batch, channels, samples)``.
            padding: frames before each row's first one, ``(batch,)``. Codes of padding mean nothing.
            mask: ``(batch, samples)``, of which False is padding behind a row.
        """
        codec = self.config.audio_encoder_config
        size, samples = samples_per_frame(codec), np.shape(values)[-1]
        frames = encoded_length(codec, samples)
        # leaving out what follows takes as long again, and whole frames of a causal codec do not hear it
        lengths = None
        if samples % size or not is_causal(codec) or mask is not None:
            xp = jnp if is_traced(padding, mask) else np
            column = xp.arange(samples)
            counts = xp.ones((np.shape(values)[0], samples), bool) if mask is None else xp.asarray(mask)
            if padding is not None:
                counts = counts & (column >= xp.asarray(padding)[:, None] * size)
            lengths = on_device(counts.sum(axis=1, dtype=np.int32))
        if padding is not None:
            values = turned(values, padding * size)
        if not is_traced(values):
            values = padded(values, bucket(frames) * size, 0.0)
        elif padding is None and mask is None:
            lengths = None  # all of it counts, to its end
        codes = self.compiled(encode_audio)(params, values, lengths)
        codes = (codes if is_traced(codes) else np.asarray(codes))[..., :frames]
        return codes if padding is None else turned(codes, -padding)

    def _check_forced(self, text_ids, audio_codes, batch_size: int, new_frames: int) -> None:
        """Checks what is to be said in the new frames."""
        config = self.config
        if text_ids is not None:
            axes = {"batch": batch_size}
            check_forced("forced_text_ids", text_ids, axes, new_frames, config.vocab_size)
        if audio_codes is not None:
            axes = {"batch": batch_size, "num_codebooks": config.num_codebooks}
            check_forced("forced_audio_codes", audio_codes, axes, new_frames, config.audio_vocab_size)

    def _check_prompt(self, input_ids, inputs_embeds) -> tuple[int, int]:
        """Batch size and frames of the prompt."""
        if input_ids is not None:
            check_rank("input_ids", input_ids, ("batch", "frames"))
            check_ids("input_ids", input_ids, self.config.vocab_size + 1)
        if inputs_embeds is None:
            batch_size, length = np.shape(input_ids)
        else:
            batch_size, length = check_embeds(inputs_embeds, self.config)
            if input_ids is not None and np.shape(input_ids) != (batch_size, length):
                raise ValueError(
                    f"`input_ids` must have one id per frame of `inputs_embeds`, ({batch_size}, {length}), but has "
                    f"the shape {np.shape(input_ids)}."
                )
        if length == 0:
            raise ValueError("The prompt is empty: pass at least one frame, or no input at all.")
        return batch_size, length

    def make_decoder(self) -> FrameDecoder:
        return FrameDecoder(self.module)


def check_start_codes(name: str, codes, attention_mask, start_code: int) -> None:
    """Raises ``ValueError`` for start codes anywhere but in the frames that a row begins with, padding left out."""
    if is_traced(codes, attention_mask):
        return
    starts = np.asarray(codes) == start_code
    counts = np.ones(starts.shape[::2], bool) if attention_mask is None else np.asarray(attention_mask) != 0
    leading = np.logical_and.accumulate(starts.all(axis=1) | ~counts, axis=-1)
    wrong = np.argwhere(starts.any(axis=1) & counts & ~leading)
    if wrong.size:
        row, frame = wrong[0]
        raise ValueError(
            f"`{name}` has the start code {start_code} in frame {frame} of row {row}, behind other codes: no sound "
            "belongs to it; leave such frames out."
        )
