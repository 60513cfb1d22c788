"""The joined model: checks, calls, generation and parts around ``modules_flax_speech_language.py``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int
from transformers import GenerationConfig, PreTrainedConfig, VoxtralConfig

from ...adapters.lora import check_trained, with_leaves
from ...checkpoints.configs import did_you_mean, load_config, override_config
from ...checkpoints.files import Source
from ...former_names import accept_former_names
from ...generation.arrays import cut, on_device, padded
from ...generation.buckets import small_bucket
from ...input_checks import Input, check_ids, check_inputs, is_traced
from ...modeling_flax_decoder import FlaxTextForCausalLM
from ...modeling_flax_encoder import FlaxEncoderModel
from ...modeling_flax_outputs import FlaxCausalLMOutputWithPast
from ...modeling_flax_utils import FlaxPreTrainedModel
from ...nn.cache import LinearCache
from ...nn.linear import dropout_rngs
from ...quantization.tree import is_quantized
from ..llama import FlaxLlamaForCausalLM, LlamaTextDecoder
from ..llama.fields_flax_llama import LlamaFields, fields_of
from .checkpoint_flax_speech_language import SPEECH_LANGUAGE_RULES
from .configuration_speech_language import ProjectorFields, SpeechLanguageConfig, check_config, projector_of
from .modules_flax_speech_language import FlaxSpeechLanguageModule, FlaxSpeechLanguageProjector
from .towers import TOWERS, Tower, tower_of

AUDIO_TOWER, PROJECTOR, LANGUAGE_MODEL = "audio_tower", "multi_modal_projector", "language_model"
PARTS = (AUDIO_TOWER, PROJECTOR, LANGUAGE_MODEL)
"""Of the parameters, in upstream's names."""

UNTRAINED = ("audio_tower/embed_positions/embedding",)
"""Whisper's table of sines."""


def check_places(ids: np.ndarray, audio_token_id: int, counts: np.ndarray) -> None:
    """Raises ``ValueError`` unless the audio tokens of a batch are as many as the recordings have, each of them within
    a row."""
    found = (ids == audio_token_id).sum(axis=1)
    remedy = "let SpeechLanguageProcessor write them"
    if found.sum() != counts.sum():
        raise ValueError(
            f"`input_ids` has {found.sum()} audio tokens (id {audio_token_id}), but the {len(counts)} recordings make "
            f"{counts.sum()}: {remedy}."
        )
    ends = {0, *np.cumsum(counts).tolist()}
    split = [row for row, end in enumerate(np.cumsum(found).tolist()) if end not in ends]
    if split:
        raise ValueError(
            f"the audio tokens of `input_ids` (id {audio_token_id}) in row {split[0]} end within a recording; in turn "
            f"they make {counts.tolist()}: {remedy}."
        )


class FlaxSpeechLanguageModel(FlaxTextForCausalLM):
    """An encoder of audio, a projector and a language model, which hears recordings where its text has audio tokens.

    The encoder is that of Whisper, Wav2Vec2, HuBERT or Mimi, the language model any of
    :class:`FlaxLlamaForCausalLM`. Upstream's ``VoxtralForConditionalGeneration`` is one of these, and loads from its
    files. A configuration that asks for what is not supported raises a ``ValueError`` that names field, value and
    remedy, before weights are read.

    Attributes:
        finetune: the parts of the parameters (:data:`PARTS`) that are trained (:meth:`trainable`), beside an adapter.
            It may be set; the projector alone at first.
    """

    config_class = SpeechLanguageConfig
    config_classes = (SpeechLanguageConfig, VoxtralConfig)
    module_class = FlaxSpeechLanguageModule
    checkpoint_rules = SPEECH_LANGUAGE_RULES
    checkpoint_optional = ("audio_tower/masked_spec_embed",)
    pipeline_tag = "audio-text-to-text"
    _finetune: tuple[str, ...] = (PROJECTOR,)

    # What the base class asks for

    @property
    def text_config(self) -> PreTrainedConfig:
        return self.config.text_config

    @property
    def cache_sizes(self) -> LlamaFields:
        return fields_of(self.text_config)

    @property
    def rounds_lengths(self) -> bool:
        return not fields_of(self.text_config).is_dynamic

    @property
    def extra_input_ids(self) -> int:
        """As many as there are up to the audio token, which may lie behind the vocabulary."""
        return max(0, self.config.audio_token_id + 1 - self.text_config.vocab_size)

    @property
    def upstream_name(self) -> str:
        is_voxtral = isinstance(self.config, VoxtralConfig)
        return "VoxtralForConditionalGeneration" if is_voxtral else super().upstream_name

    def make_decoder(self) -> LlamaTextDecoder:
        return LlamaTextDecoder(self.module, self.cache_sizes)

    # Parts

    @property
    def tower(self) -> Tower:
        """What the encoder takes."""
        return tower_of(self.config.audio_config)

    @property
    def projector(self) -> ProjectorFields:
        """What the projector is like."""
        return projector_of(self.config)

    def _part_classes(self) -> dict[str, tuple[type[FlaxPreTrainedModel], Any]]:
        return {
            AUDIO_TOWER: (self.tower.model_class, self.config.audio_config),
            LANGUAGE_MODEL: (FlaxLlamaForCausalLM, self.text_config),
        }

    @property
    def audio_tower(self) -> Any:
        """The encoder as a model of its own, on the same parameters."""
        return self._part(AUDIO_TOWER)

    @property
    def language_model(self) -> FlaxLlamaForCausalLM:
        """The language model as a model of its own, on the same parameters."""
        return self._part(LANGUAGE_MODEL)

    # Calls

    def get_audio_features(
        self,
        audio: ArrayLike,
        audio_attention_mask: ArrayLike | None = None,
        params: Any | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "recordings tokens hidden"], Int[Array, "recordings"]]:
        """The embeddings of recordings, and how many of each count; one program for each of the shapes.

        Args:
            audio: as ``input_features`` or ``input_values`` of :meth:`__call__`.
            audio_attention_mask, params, dropout_rng, train: as there.

        Raises:
            ValueError: as there.
        """
        self._checked_counts(audio, audio_attention_mask)
        self._check_rng(dropout_rng, train)
        return self._features(audio, audio_attention_mask, self.whole_params(params), dropout_rng, train)

    def _features(
        self, audio: Any, audio_attention_mask: Any, params: Any, dropout_rng: jax.Array | None, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """As :meth:`get_audio_features`, of what has been checked."""
        inputs = {"audio": on_device(audio)}
        if audio_attention_mask is not None:
            inputs["audio_attention_mask"] = on_device(audio_attention_mask)
        rngs = dropout_rngs(dropout_rng) if train and dropout_rng is not None else {}
        return self._program("audio_features", train)(params, rngs, inputs)

    def _check_rng(self, dropout_rng: jax.Array | None, train: bool) -> None:
        """ValueError if the encoder is to be trained with something random without a key."""
        if not train or dropout_rng is not None:
            return
        encoder, config = self.audio_tower, self.config.audio_config
        names = encoder._random_fields() if isinstance(encoder, FlaxEncoderModel) else ["attention_dropout"]
        random = [f"`audio_config.{name}`" for name in names if getattr(config, name)]
        random += ["an adapter's `lora_dropout`"] if self.adapters_drop() else []
        if random:
            raise ValueError(
                f"`train=True` with {', '.join(random)} > 0 needs `dropout_rng`: pass a key of `jax.random.key`."
            )

    def _checked_counts(self, audio: Any, mask: Any) -> np.ndarray | None:
        """Tokens of each recording, None where the mask is traced; ValueError for what is wrong with them."""
        tower = self.tower
        sizes = check_inputs(tower.inputs, {tower.input_name: audio, "audio_attention_mask": mask})
        if not is_traced(audio) and not np.isfinite(np.asarray(audio)).all():
            raise ValueError(f"`{tower.input_name}` has values that are NaN or infinite: repair the audio.")
        if is_traced(mask):
            return None
        steps = np.full(sizes["recordings"], np.shape(audio)[-1])
        if mask is not None:
            mask = np.asarray(mask).astype(np.int8)
            if (np.diff(mask, axis=1) > 0).any():
                raise ValueError("`audio_attention_mask` has padding before audio: pad on the right.")
            steps = mask.sum(axis=1, dtype=np.int64)
        frames = tower.frames(steps)
        if not frames.all():
            short = int(np.flatnonzero(frames == 0)[0])
            raise ValueError(f"`{tower.input_name}` has too little audio for a frame in recording {short}: give more.")
        return self.projector.tokens(frames)

    def _audio_of(self, input_features: Any, input_values: Any) -> Any:
        """The one that the encoder takes; ValueError for the other."""
        given = {"input_features": input_features, "input_values": input_values}
        audio = given.pop(self.tower.input_name)
        other, value = given.popitem()
        if value is not None:
            kind = self.config.audio_config.model_type
            raise ValueError(f"`{other}` is not what an encoder {kind!r} hears: give `{self.tower.input_name}`.")
        return audio

    def _embedded(
        self,
        input_ids: Any,
        inputs_embeds: Any,
        audio: Any,
        audio_attention_mask: Any,
        params: Any,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
    ) -> Any:
        """The embeddings of a text with recordings in it; None without recordings."""
        token = self.config.audio_token_id
        if audio is None:
            if audio_attention_mask is not None:
                raise ValueError("`audio_attention_mask` has no effect without audio: leave it out.")
            if inputs_embeds is None and input_ids is not None and not is_traced(input_ids):
                if (np.asarray(input_ids) == token).any():
                    raise ValueError(
                        f"`input_ids` has audio tokens (id {token}), but no recording is there: give "
                        f"`{self.tower.input_name}`."
                    )
            return None
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("audio needs `input_ids`, which say where it stands, and no `inputs_embeds`.")
        table = {"input_ids": Input({"batch": None, "tokens": None}, "ids")}
        check_inputs(table, {"input_ids": input_ids})
        check_ids("input_ids", input_ids, self.text_config.vocab_size, allowed=(token,))
        counts = self._checked_counts(audio, audio_attention_mask)
        if counts is not None and not is_traced(input_ids):
            check_places(np.asarray(input_ids), token, counts)
        params = self.whole_params(params)
        self._check_rng(dropout_rng, train)
        features, lengths = self._features(audio, audio_attention_mask, params, dropout_rng, train)
        length = np.shape(input_ids)[1]
        # few programs for many lengths
        ids = on_device(padded(input_ids, small_bucket(length), 0, axis=1), np.int32)
        return cut(self._scatter()(params, ids, features, lengths), length, 1)

    def _scatter(self) -> Callable[..., jax.Array]:
        """The program that puts recordings in their places."""
        programs, module = self._compiled(), self.module
        if check_places not in programs:

            def with_audio(params: Any, *inputs: Any) -> jax.Array:
                return module.apply({"params": params}, *inputs, method="with_audio")

            programs[check_places] = jax.jit(with_audio)
        return programs[check_places]

    @accept_former_names
    def __call__(  # type: ignore[override]  # upstream's order, with audio
        self,
        input_ids: ArrayLike | None = None,
        input_features: ArrayLike | None = None,
        attention_mask: Any | None = None,
        position_ids: ArrayLike | None = None,
        cache: LinearCache | None = None,
        inputs_embeds: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        input_values: ArrayLike | None = None,
        audio_attention_mask: ArrayLike | None = None,
        params: Any | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> FlaxCausalLMOutputWithPast | tuple[Any, ...]:
        """Runs encoder, projector and language model; :class:`SpeechLanguageProcessor` makes the inputs.

        Args:
            input_ids: ``(batch, tokens)``, in which ``audio_token_id`` stands as often as the recordings have tokens:
                recording after recording, row after row.
            input_features: what Whisper's encoder hears, a window of 30 s each, ``(recordings, num_mel_bins,
                2 * max_source_positions)``.
            input_values: what the others hear: ``(recordings, samples)``, for Mimi ``(recordings, channels,
                samples)``; padded on the right.
            audio_attention_mask: 1 for audio, 0 for padding behind it, ``(recordings, samples)``, or for Whisper
                ``(recordings, 2 * max_source_positions)``; what is padding has no token.
            attention_mask, position_ids, cache, inputs_embeds, labels, use_cache, logits_to_keep, params, dropout_rng,
                train, output_attentions, output_hidden_states, return_dict: as of the language model,
                :meth:`FlaxLlamaForCausalLM.__call__`. ``train`` is also for the encoder.

        Raises:
            ValueError: as of the language model; other audio than the encoder takes; as many audio tokens as there are
                not, or recordings without a place.
        """
        audio = self._audio_of(input_features, input_values)
        audio_rng = None if dropout_rng is None else jax.random.fold_in(dropout_rng, 2)
        embedded = self._embedded(input_ids, inputs_embeds, audio, audio_attention_mask, params, audio_rng, train)
        if embedded is not None:
            input_ids, inputs_embeds = None, embedded
        return super().__call__(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            inputs_embeds,
            use_cache,
            labels,
            logits_to_keep,
            params,
            dropout_rng,
            train,
            output_attentions,
            output_hidden_states,
            return_dict,
        )

    def generate(  # type: ignore[override]  # audio beside the rest
        self,
        input_ids: ArrayLike | None = None,
        generation_config: GenerationConfig | None = None,
        prng_key: jax.Array | None = None,
        trace: bool = True,
        params: Any | None = None,
        logits_processor: Callable | list[Callable] | None = None,
        streamer: Any | None = None,
        forced_text_ids: ArrayLike | None = None,
        input_features: ArrayLike | None = None,
        input_values: ArrayLike | None = None,
        audio_attention_mask: ArrayLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generates text after a prompt with recordings in it.

        The encoder is a program of its own, compiled for each of the shapes of audio; the rest, arguments and outputs
        are as of :meth:`FlaxGenerationMixin.generate`.

        Args:
            input_features, input_values, audio_attention_mask: as of :meth:`__call__`.

        Raises:
            ValueError: as there.
        """
        audio = self._audio_of(input_features, input_values)
        embedded = self._embedded(input_ids, kwargs.get("inputs_embeds"), audio, audio_attention_mask, params)
        if embedded is not None:
            kwargs["inputs_embeds"] = embedded
        return super().generate(
            input_ids,
            generation_config,
            prng_key,
            trace,
            params,
            logits_processor,
            streamer,
            forced_text_ids,
            **kwargs,
        )

    # What is trained

    @property
    def finetune(self) -> tuple[str, ...]:
        return self._finetune

    @finetune.setter
    def finetune(self, parts: Sequence[str]) -> None:
        self._finetune = self._checked_finetune(parts)

    def _checked_finetune(self, parts: Sequence[str]) -> tuple[str, ...]:
        if isinstance(parts, str) or not set(parts) <= set(PARTS):
            raise ValueError(f"`finetune` is {parts!r}, but must be a list of some of {', '.join(map(repr, PARTS))}.")
        for part in parts:
            if is_quantized(self.params_shape_tree[part]):
                raise ValueError(
                    f"`finetune` has {part!r}, whose weights are quantized and cannot be trained: quantize with "
                    f"skip=[{part!r}], or leave it out and add an adapter."
                )
        return tuple(part for part in PARTS if part in parts)

    def _own_trained(self) -> dict[str, Any]:
        """What is trained of the model's own parameters."""
        parts = self._checked_finetune(self.finetune)
        flat = flatten_dict({part: self.params[part] for part in parts}, sep="/")
        return {path: leaf for path, leaf in flat.items() if path not in UNTRAINED}

    def trainable(self) -> dict[str, Any]:
        """What is trained by "/"-joined path: the parts of ``finetune`` and the active adapter, where there is one.

        Raises:
            ValueError: a part of ``finetune`` is quantized.
        """
        return {**self._own_trained(), **(self.adapter_leaves() if self.peft_config else {})}

    def with_trainable(self, leaves: Mapping[str, Any], params: Mapping[str, Any] | None = None) -> Any:
        """Parameters whose :meth:`trainable` are these, which may be traced: for ``params=`` of a loss.

        Args:
            leaves: the paths and shapes of :meth:`trainable`.
            params: the others, the model's own if None. A program that is given them as an argument does not take
                them, and what follows from them, for constants.

        Raises:
            ValueError: other paths or shapes.
        """
        check_trained(self.trainable(), leaves)
        settings = self._one_adapter(None).leaves if self.peft_config else {}
        return with_leaves(self.params if params is None else params, {**settings, **leaves})

    def set_trainable(self, leaves: Mapping[str, Any]) -> None:
        """Other values for :meth:`trainable`; ValueError as of :meth:`with_trainable`."""
        check_trained(self.trainable(), leaves)
        of_adapter = self.adapter_leaves() if self.peft_config else {}
        self.params = with_leaves(self.params, {path: leaves[path] for path in leaves.keys() - of_adapter.keys()})
        if of_adapter:
            self.set_adapter_leaves({path: leaves[path] for path in of_adapter})

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many numbers the parameters are, without adapters, or how many are trained."""
        if only_trainable:
            return sum(int(np.prod(leaf.shape)) for leaf in self.trainable().values())
        return super().num_parameters()

    # Files

    def _check_to_pt(self) -> None:
        super()._check_to_pt()
        if not isinstance(self.config, VoxtralConfig):
            raise ValueError(
                "to_pt=True writes what upstream's class loads, which there is for 'voxtral' alone: save "
                "`audio_tower` and `language_model` on their own, or leave it out."
            )

    @classmethod
    def from_encoder_decoder_pretrained(
        cls,
        encoder_pretrained_model_name_or_path: str | os.PathLike,
        decoder_pretrained_model_name_or_path: str | os.PathLike,
        *,
        audio_token_id: int,
        finetune: Sequence[str] = (PROJECTOR,),
        dtype: Any = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> FlaxSpeechLanguageModel:
        """Joins two checkpoints; the projector between them is new and random.

        Args:
            encoder_pretrained_model_name_or_path: a directory or a Hub id of Whisper, Wav2Vec2, HuBERT or Mimi, or of
                Moshi or Voxtral, of which its encoder is taken.
            decoder_pretrained_model_name_or_path: that of a language model.
            audio_token_id: the token in whose place audio is heard: of a tokenizer that has ``<audio>``.
            finetune: the parts that are trained.
            dtype: of computation and parameters; that of the language model's files if None.
            seed: of the projector.
            **kwargs: fields of :class:`SpeechLanguageConfig`, such as ``stack_factor``, and, beginning with
                ``encoder_`` and ``decoder_``, what ``from_pretrained`` of these takes.

        Raises:
            ValueError: before weights are read: another ``model_type``, an unknown keyword, sizes that do not go
                together; and what ``from_pretrained`` refuses.
        """
        given = {
            side: {name.removeprefix(side): value for name, value in kwargs.items() if name.startswith(side)}
            for side in ("encoder_", "decoder_")
        }
        options = {name: value for name, value in kwargs.items() if not name.startswith(tuple(given))}
        known = SpeechLanguageConfig().to_dict().keys() - {"audio_config", "text_config", "model_type"}
        for name in options:
            if name not in known:
                raise ValueError(f"there is no keyword argument {name!r}{did_you_mean(name, known)}")
        for side, values in given.items():
            if "quantization" in values:
                raise ValueError(f"`{side}quantization`: join floats, and call `quantize` of the joined model.")
        kinds = (tuple(TOWERS), FlaxLlamaForCausalLM.known_configs())
        names = (encoder_pretrained_model_name_or_path, decoder_pretrained_model_name_or_path)
        configs = [
            part_of(name, known, values) for name, known, values in zip(names, kinds, given.values(), strict=True)
        ]
        config = SpeechLanguageConfig(
            audio_config=configs[0], text_config=configs[1], audio_token_id=audio_token_id, **options
        )
        check_config(config)
        decoder = FlaxLlamaForCausalLM.from_pretrained(names[1], dtype, config=configs[1], **given["decoder_"])
        encoder = tower_of(configs[0]).model_class.from_pretrained(
            names[0], decoder.dtype if dtype is None else dtype, config=configs[0], **given["encoder_"]
        )
        model = cls(config, dtype=decoder.dtype, seed=seed, _do_init=False)
        projector = new_projector(config, model.key)
        model._is_initialized = True
        model.params = {
            AUDIO_TOWER: encoder.params,
            PROJECTOR: jax.tree.map(lambda leaf: leaf.astype(decoder.dtype), projector),
            LANGUAGE_MODEL: decoder.params,
        }
        model.generation_config = decoder.generation_config
        model.finetune = finetune
        return model


def part_of(
    name: str | os.PathLike, known: tuple[type[PreTrainedConfig], ...], given: dict[str, Any]
) -> PreTrainedConfig:
    """The configuration of a part in a checkpoint; what ``given`` says of its fields is taken out of it."""
    where = ("revision", "token", "cache_dir", "local_files_only", "force_download")
    source = Source.locate(name, given.get("subfolder") or "", **{key: given[key] for key in where if key in given})
    config = given.pop("config", None) or load_config(known, source, given.get("from_pt"))
    fields = {key: given.pop(key) for key in list(given) if key in config.to_dict()}
    return override_config(config, fields)


def new_projector(config: Any, key: jax.Array) -> dict[str, Any]:
    """Random parameters of the projector."""
    fields = projector_of(config)
    module = FlaxSpeechLanguageProjector(fields)
    width = fields.stack_factor * config.audio_config.hidden_size
    return module.init(key, jnp.zeros((1, 1, width)))["params"]
