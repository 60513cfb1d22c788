"""The public Moshi models: arguments, checks and outputs as in ``transformers``, around the linen modules.

``layers_flax_moshi.py`` has the parts, ``modules_flax_moshi.py`` the modules, ``generation_flax_moshi.py`` the frame
step of ``generate``, ``streaming_flax_moshi.py`` the endless dialogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from transformers import GenerationConfig, MoshiConfig
from transformers.models.moshi.configuration_moshi import MoshiDepthConfig

from ...former_names import accept_former_names
from ...generation import FlaxGenerationMixin
from ...generation.arrays import cut, on_device, on_host
from ...generation.buckets import bucket
from ...generation.configuration import merge_generation_config, resolve_max_length
from ...generation.utils import one_token
from ...input_checks import (
    Input,
    check_ids,
    check_input,
    check_inputs,
    check_sizes,
    is_traced,
)
from ...modeling_flax_decoder import (
    FlaxDecoderModel,
    FlaxTextForCausalLM,
    FlaxTextModel,
    as_array,
    as_int32,
    check_cache,
    check_cache_kind,
)
from ...modeling_flax_embeddings import FlaxTextEmbeddingsMixin
from ...modeling_flax_utils import FlaxPreTrainedModel
from ...nn.cache import LinearCache, NoCache, StaticCache
from ...nn.embedding import IGNORE_INDEX
from ..mimi.checkpoint_flax_mimi import CODEBOOKS
from ..mimi.modeling_flax_mimi import FlaxMimiModel
from ..mimi.topology import samples_per_frame
from .checkpoint_flax_moshi import MOSHI_RULES
from .delay_pattern import apply_delay_pattern_mask, build_delay_pattern_mask
from .generation_flax_moshi import (
    FlaxMoshiGenerateOutput,
    FrameDecoder,
    decode_audio,
    decoded_frames,
)
from .inputs_flax_moshi import conversation_inputs, depth_inputs, streams_that_count
from .kyutai_adapter_flax_moshi import KyutaiAdapterMixin
from .modules_flax_moshi import (
    FlaxMoshiConditionalGenerationOutputWithPast,
    FlaxMoshiDepthDecoderModule,
    FlaxMoshiDepthDecoderOutputWithPast,
    FlaxMoshiForCausalLMModule,
    FlaxMoshiForConditionalGenerationModule,
    FlaxMoshiModule,
    FlaxMoshiUnconditionalInput,
)
from .preparing_flax_moshi import encode, finish, padding_before, prepare, start_of
from .prompt_flax_moshi import MoshiPrompt, prompted_streams
from .streaming_flax_moshi import FlaxMoshiStream


class FlaxMoshiPreTrainedModel(FlaxDecoderModel, FlaxTextEmbeddingsMixin):
    """What the Moshi classes share."""

    config_class = MoshiConfig
    base_model_prefix = "model"
    checkpoint_rules = MOSHI_RULES
    checkpoint_series = (CODEBOOKS,)
    extra_input_ids = 1

    def _fields_of_vocabulary(self, size: int) -> dict[str, Any]:
        fields = super()._fields_of_vocabulary(size)
        depth = getattr(self.config, "depth_decoder_config", None)
        return fields if depth is None else {**fields, "depth_decoder_config": {**depth.to_dict(), "vocab_size": size}}


def check_padding_of(waveforms: dict[str, Any], mask: Any) -> None:
    """Raises ``ValueError`` unless ``audio_encoder_padding_mask`` fits the waveforms that are to be encoded."""
    given = [waveform for waveform in waveforms.values() if waveform is not None]
    if not given:
        raise ValueError("`audio_encoder_padding_mask` has no effect without waveforms to encode: leave it out.")
    for waveform in given:
        batch_size, _, samples = np.shape(waveform)
        check_input("audio_encoder_padding_mask", mask, Input({"batch": batch_size, "samples": samples}, "mask"))


class FlaxMoshiModel(FlaxTextModel, FlaxMoshiPreTrainedModel):
    """The backbone without a head; upstream ``MoshiModel``."""

    module_class = FlaxMoshiModule
    input_tables = ("embed_tokens/embedding",)
    checkpoint_prefixes = ("", "model.", "decoder.model.")


class FlaxMoshiForCausalLM(FlaxTextForCausalLM, FlaxMoshiPreTrainedModel):
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


def check_depth_inputs(config: MoshiDepthConfig, cache: Any, given: dict[str, Any]) -> tuple[int, tuple[int, ...]]:
    """Checks what the depth decoder is called with; returns batch size and which codebooks its positions are."""
    name = "input_ids" if given["inputs_embeds"] is None else "inputs_embeds"
    if np.ndim(given["position_ids"]) == 1:
        given = {**given, "position_ids": given["position_ids"][None]}
    sizes = check_inputs(depth_inputs(config, None if cache is None else cache.max_length), given)
    batch_size, length = sizes["batch"], sizes["codebooks"]
    past = (NoCache() if cache is None else cache).length
    if past + length > config.num_codebooks:
        raise ValueError(
            f"`{name}` has {length} positions after {past} cached ones, but a frame has only {config.num_codebooks} "
            "(`num_codebooks`)."
        )
    check_cache(cache, config, batch_size, length)
    codebooks = tuple(range(past, past + length))
    if given["position_ids"] is not None:
        rows = np.asarray(given["position_ids"])
        codebooks = tuple(int(index) for index in rows[0])
        if (rows != rows[0]).any() or min(codebooks) < 0 or max(codebooks) >= config.num_codebooks:
            raise ValueError(
                f"`position_ids` must be the same codebooks in [0, {config.num_codebooks}) for every row, but is "
                f"{rows.tolist()}."
            )
    if given["input_ids"] is not None:
        for position, codebook in enumerate(codebooks):
            size = config.audio_vocab_size + 1 if codebook else config.vocab_size + 1
            check_ids("input_ids", given["input_ids"][:, position], size, allowed=(IGNORE_INDEX,))
    return batch_size, codebooks


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
                for at most ``num_codebooks`` codebooks. -100 gives a zero embedding.
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
        check_cache_kind(cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        if last_hidden_state is None:
            raise ValueError("`last_hidden_state` is missing: pass the backbone's hidden state of the frame before.")
        given = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "last_hidden_state": last_hidden_state,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "labels": labels,
        }
        batch_size, codebooks = check_depth_inputs(config, cache, given)
        outputs = self._apply(
            params,
            dropout_rng,
            train,
            output_attentions,
            batch_size,
            input_ids=as_int32(input_ids),
            last_hidden_state=jnp.asarray(last_hidden_state),
            attention_mask=as_array(attention_mask),
            cache=self._cache_for(cache, use_cache, batch_size, config.num_codebooks),
            inputs_embeds=as_array(inputs_embeds),
            position_ids=codebooks,
            labels=as_int32(labels),
        )
        return self._finish(outputs, use_cache, output_attentions, output_hidden_states, return_dict)


class FlaxMoshiForConditionalGeneration(FlaxGenerationMixin, KyutaiAdapterMixin, FlaxMoshiPreTrainedModel):
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
        frame = {name: on_device(array) for name, array in start_of(self.config, num_samples).items()}
        mask = on_device(np.ones((num_samples, 1), dtype=np.int32))
        return FlaxMoshiUnconditionalInput(**frame, attention_mask=mask)

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
        streams = {
            "input_ids": input_ids,
            "user_input_values": user_input_values,
            "user_audio_codes": user_audio_codes,
            "moshi_input_values": moshi_input_values,
            "moshi_audio_codes": moshi_audio_codes,
        }
        labels = {"text_labels": text_labels, "audio_labels": audio_labels}
        batch_size, length = self._check_call(streams, inputs_embeds, attention_mask, labels, cache)
        if audio_encoder_padding_mask is not None:
            waveforms = {} if inputs_embeds is not None else {"user": user_input_values, "moshi": moshi_input_values}
            check_padding_of(waveforms, audio_encoder_padding_mask)
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
            batch_size,
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

    def _check_call(
        self, streams: dict[str, Any], inputs_embeds: Any, attention_mask: Any, labels: dict[str, Any], cache: Any
    ) -> tuple[int, int]:
        """Rows and frames of a call; ValueError if something is wrong with it."""
        config = self.config
        check_cache_kind(cache)
        if inputs_embeds is not None:
            given = {"inputs_embeds": inputs_embeds}
        elif any(stream is not None for stream in streams.values()):
            given = streams_that_count(streams)
        else:
            raise ValueError(f"Pass at least one of {', '.join(f'`{name}`' for name in streams)} and `inputs_embeds`.")
        table = conversation_inputs(config, None if cache is None else cache.max_length)
        sizes = check_inputs(table, {**given, "attention_mask": attention_mask, **labels})
        batch_size, length = sizes["batch"], sizes["frames"]
        check_cache(cache, config, batch_size, length)
        if labels["text_labels"] is None and labels["audio_labels"] is not None:
            raise ValueError("`audio_labels` need `text_labels`: the text token starts each frame's codes.")
        if labels["text_labels"] is not None and length < 2:
            raise ValueError("`text_labels` need at least 2 frames: each frame predicts the next.")
        return batch_size, length

    # -------------------------------------------------------------------------------------------- generation

    def generate(  # type: ignore[override]  # upstream's order, with the streams of audio
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
        prompt: MoshiPrompt | Sequence[MoshiPrompt] | None = None,
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
            prompt: text and both voices of the prompt, for all rows or one for each; the user's stream then begins
                behind it, and the other streams are left out. Shorter prompts are padded on the left.
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
                not finite; a ``prompt`` beside other streams than the user's, or not for this model.
        """
        streams = {
            "input_ids": input_ids,
            "user_input_values": user_input_values,
            "user_audio_codes": user_audio_codes,
            "moshi_input_values": moshi_input_values,
            "moshi_audio_codes": moshi_audio_codes,
            "inputs_embeds": inputs_embeds,
        }
        if prompt is not None:
            streams, mask = prompted_streams(self, prompt, streams, kwargs.get("attention_mask"), params)
            kwargs = {**kwargs, "attention_mask": mask}
        prepared = prepare(
            self,
            streams,
            {"forced_text_ids": forced_text_ids, "forced_audio_codes": forced_audio_codes},
            generation_config,
            kwargs,
            prng_key=prng_key,
            params=params,
            streamer=streamer,
            start_frame=concat_unconditional_inputs,
            returns_waveforms=return_audio_waveforms,
            returns_codes=return_audio_codes,
        )
        state, found = self.decode(prepared)
        return finish(self, prepared, state, found)

    def warmup(  # type: ignore[override]  # a prompt is of frames
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
            encode(self, params, samples[..., 1:])  # a recording may end within a frame
        if outputs.audio_sequences is not None:
            # rows may end early, and waveforms are decoded in several lengths
            started = not prompt or options.get("concat_unconditional_inputs", True)
            given: dict[str, Any] = {
                name: options[name] for name in ("max_new_tokens", "max_length") if name in options
            }
            merged, _ = merge_generation_config(self.generation_defaults(), options.get("generation_config"), given)
            capacity = bucket(resolve_max_length(vars(merged), prompt_frames + int(started)))
            rows = outputs.audio_sequences.shape[0]
            made = on_device(np.zeros((rows, config.num_codebooks, capacity - 1), dtype=np.int32))
            for frames in decoded_frames(capacity - 1):
                program = self.compiled(decode_audio, frames=frames)
                program(params, made, outputs.audio_lengths, outputs.audio_lengths)
        jax.block_until_ready(outputs)

    def streaming(
        self,
        batch_size: int = 1,
        generation_config: GenerationConfig | None = None,
        params: Any | None = None,
        mesh: jax.sharding.Mesh | None = None,
        ignore_first_user_frame: bool = False,
        return_audio_waveforms: bool = True,
        pin_prompt: bool = False,
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
            pin_prompt,
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
            padding = padding_before(attention_mask)
        codes, frames = encode(self, self.whole_params(params), on_host(values), padding, mask)
        return cut(codes, frames)

    def make_decoder(self) -> FrameDecoder:
        return FrameDecoder(self.module)
