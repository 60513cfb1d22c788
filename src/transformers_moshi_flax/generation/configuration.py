"""What ``generate`` is asked for: ``GenerationConfig`` and keyword arguments, checked and resolved.

A field has its effect or raises, naming itself. Where it lacks another one (a temperature without sampling) it is
accepted, as upstream does, and a keyword of the call warns. Fields that only choose the PyTorch runtime (the cache's
class, ``torch.compile``) have nothing to choose here and are accepted, since the published generation configurations
set them. Fields that are unset take upstream's defaults, ``GenerationConfig._get_default_generation_params()``.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
import logging
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import GenerationConfig

from ..input_checks import is_traced, is_whole
from .arrays import on_device
from .logits_process import (
    PENALTIES,
    TEMPERATURES,
    WHOLE_LIMIT,
    FlaxExponentialDecayLengthPenalty,
    FlaxForcedBOSTokenLogitsProcessor,
    FlaxForcedEOSTokenLogitsProcessor,
    FlaxInfNanRemoveLogitsProcessor,
    FlaxLogitsProcessorList,
    FlaxMinLengthLogitsProcessor,
    FlaxMinNewTokensLengthLogitsProcessor,
    FlaxNoBadWordsLogitsProcessor,
    FlaxNoRepeatNGramLogitsProcessor,
    FlaxRepetitionPenaltyLogitsProcessor,
    FlaxSequenceBiasLogitsProcessor,
    FlaxSuppressTokensAtBeginLogitsProcessor,
    FlaxSuppressTokensLogitsProcessor,
    bad_words,
    biased_sequences,
    decay,
    is_divisor,
    is_real,
    token_list,
    top_k_bound,
)
from .sampling import Sampling

logger = logging.getLogger(__name__)

SAMPLING_FIELDS = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "renormalize_logits",
)
# what the logits processors before sampling are made of
PROCESSOR_FIELDS = (
    "sequence_bias",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "remove_invalid_values",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
)
LENGTH_FIELDS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time")
BEAM_FIELDS = ("num_beams", "num_return_sequences", "length_penalty", "early_stopping")
OUTPUT_FIELDS = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")
TOKEN_FIELDS = ("eos_token_id", "pad_token_id", "bos_token_id")
# chosen by upstream's runtime, without a counterpart in one compiled program
RUNTIME_FIELDS = (
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "return_legacy_cache",
    "prefill_chunk_size",
    "compile_config",
    "disable_compile",
    "use_cache",
)
# results are always objects, so asking for one changes nothing
RESULT_FIELDS = ("return_dict_in_generate",)
METADATA_FIELDS = ("transformers_version", "depth_decoder_config")
SUPPORTED_FIELDS = (
    *SAMPLING_FIELDS, *PROCESSOR_FIELDS, *LENGTH_FIELDS, *BEAM_FIELDS, *OUTPUT_FIELDS, *TOKEN_FIELDS,
    *RUNTIME_FIELDS, *RESULT_FIELDS, *METADATA_FIELDS,
)  # fmt: skip
# fields without an effect here, and besides None the values that ask for none
UNSUPPORTED_FIELDS: dict[str, tuple[Any, ...]] = {
    "stop_strings": (),
    "top_h": (),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "token_healing": (False,),
    "low_memory": (False,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "constraints": (),
    "force_words_ids": (),
    "forced_decoder_ids": (),
    "decoder_start_token_id": (),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "continuous_batching_config": (),
    # assisted decoding; its numbers are set by default and mean nothing without it
    "use_mtp": (False,),
    "is_assistant": (False,),
    "num_assistant_tokens": (20,),
    "num_assistant_tokens_schedule": ("constant",),
    "assistant_confidence_threshold": (0.4,),
    "assistant_early_exit": (),
    "assistant_lookbehind": (10,),
    "target_lookbehind": (10,),
    "assistant_ensemble_weight": (),
    "prompt_lookup_num_tokens": (),
    "max_matching_ngram_size": (),
    "speculation_type": (),
}
# fields that `generate` of older versions read from the model's configuration, if they were set there
MODEL_CONFIG_FIELDS = (
    *SAMPLING_FIELDS, *PROCESSOR_FIELDS, *LENGTH_FIELDS, *BEAM_FIELDS, "output_scores", "output_logits",
    *TOKEN_FIELDS, *UNSUPPORTED_FIELDS,
)  # fmt: skip
MODEL_CONFIG_PARTS = ("depth_decoder_config", "audio_encoder_config")
# numbers that programs take as arguments, so that they may be traced; everything else decides what a program is
OPERANDS = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "length_penalty",
)
DEFAULTS: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "num_beams": 1,
    "num_return_sequences": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
}
DEFAULT_NEW_TOKENS = 20
# values that change nothing, of the fields that mean nothing without sampling, without beams and without an end
NEUTRAL_WITHOUT_SAMPLING = {
    "temperature": (1,),
    "top_k": (0, DEFAULTS["top_k"]),
    "top_p": (1,),
    "min_p": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}
NEUTRAL_WITHOUT_BEAMS = {"length_penalty": (1,), "early_stopping": (False,)}
NEUTRAL_WITHOUT_END = {"min_length": (0,), "min_new_tokens": (0,)}


def whole_from(minimum: int) -> tuple[Callable[[Any], bool], str]:
    rule = f"a whole number of at least {minimum} and below 2**31"
    return lambda value: is_whole(value) and minimum <= value < WHOLE_LIMIT, rule


def real_that(good: Callable[[Any], bool], rule: str) -> tuple[Callable[[Any], bool], str]:
    # the values of tracers are not known
    return lambda value: is_real(value) and (is_traced(value) or bool(good(value))), f"a number {rule}"


BOOLEAN = (lambda value: isinstance(value, bool | np.bool_), "True or False")
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "do_sample": BOOLEAN,
    "temperature": real_that(is_divisor, TEMPERATURES),
    "top_k": (
        lambda k: is_real(k) and bool(0 <= k < WHOLE_LIMIT and int(k) == k),
        "a whole number below 2**31, 0 for no limit",
    ),
    "top_p": real_that(lambda p: 0 < p <= 1, "in (0, 1], 1 for no limit"),
    "min_p": real_that(lambda p: 0 <= p <= 1, "in [0, 1]"),
    "typical_p": real_that(lambda p: 0 < p <= 1, "in (0, 1], 1 for no limit"),
    "epsilon_cutoff": real_that(lambda e: 0 <= e < 1, "in [0, 1), 0 for no limit"),
    "eta_cutoff": real_that(lambda e: 0 <= e < 1, "in [0, 1), 0 for no limit"),
    "renormalize_logits": BOOLEAN,
    "repetition_penalty": real_that(is_divisor, PENALTIES),
    "no_repeat_ngram_size": whole_from(0),
    "remove_invalid_values": BOOLEAN,
    "max_length": whole_from(1),
    "max_new_tokens": whole_from(1),
    "min_length": whole_from(0),
    "min_new_tokens": whole_from(0),
    "max_time": real_that(lambda seconds: seconds > 0, "of seconds above 0"),
    "num_beams": whole_from(1),
    "num_return_sequences": whole_from(1),
    "length_penalty": real_that(np.isfinite, "that is finite"),
    "early_stopping": (lambda e: isinstance(e, bool) or e == "never", 'True, False or "never"'),
    **dict.fromkeys(OUTPUT_FIELDS, BOOLEAN),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The resolved options of one ``generate`` call.

    Attributes:
        sampling: how tokens are chosen.
        max_length: length of the sequences, prompt included.
        eos_token_ids: what ends a row.
        pad_token_id: what follows the end of a row.
        stop_lengths: the length, prompt included, at which each row ends at the latest, ``(batch,)`` int32, or None.
        max_time: seconds after which generation ends, or None.
        num_beams: 1 for no beam search.
        num_return_sequences: results for each row of the prompt; at most ``num_beams`` if there are beams.
        length_penalty: exponent of the length by which beam search divides the sum of log-probabilities.
        early_stopping: when beam search ends: True, False or "never".
        output_scores: return the processed scores of each step.
        output_logits: return the logits of each step.
        output_hidden_states: return the hidden states of each step.
        output_attentions: return the attentions of each step.
    """

    sampling: Sampling
    max_length: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    stop_lengths: jax.Array | None = None
    max_time: float | None = None
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float | jax.Array = 1.0
    early_stopping: bool | str = False
    output_scores: bool = False
    output_logits: bool = False
    output_hidden_states: bool = False
    output_attentions: bool = False


def merge_generation_config(
    default: GenerationConfig | None,
    given: GenerationConfig | None,
    kwargs: dict[str, Any],
    extra: tuple[str, ...] = (),
) -> tuple[GenerationConfig, dict[str, Any]]:
    """Keyword arguments over ``given`` over the model's default. Keywords without an effect warn.

    Args:
        default: the model's generation configuration; without one every field is unset.
        given: the call's, or None.
        kwargs: keyword arguments of the call.
        extra: names of arguments among them that are no fields, which are returned apart.

    Raises:
        ValueError: for a keyword that is neither a field nor in ``extra``, with the nearest name; for a field that is
            set and has no effect here; for values out of range, or traced ones that must be known; for a ``given``
            that is no ``GenerationConfig``.
    """
    if given is not None and not isinstance(given, GenerationConfig):
        raise ValueError(
            f"`generation_config` must be a `transformers.GenerationConfig`, but is {given!r}: make one, or pass its "
            "fields as keywords."
        )
    config = GenerationConfig() if default is None else copy.deepcopy(default)
    if hasattr(config, "temp"):
        config.temperature = read_temp(vars(config)).get("temperature")
        del config.temp
    inputs = {name: kwargs[name] for name in extra if name in kwargs}
    kwargs = {name: value for name, value in kwargs.items() if name not in inputs}
    known = {*config.to_dict(), *vars(config), *SUPPORTED_FIELDS, *UNSUPPORTED_FIELDS}
    for name in kwargs:
        if name not in known or name.startswith("_"):
            near = difflib.get_close_matches(name, [*SUPPORTED_FIELDS, *extra], n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise ValueError(f"`generate` has no argument `{name}`.{hint}")
    values = {} if given is None else {name: value for name, value in given.to_dict().items() if value is not None}
    for layer in (read_temp(values), kwargs):
        # a length that is given later is meant, in whichever of the two ways it is given
        for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if layer.get(total) is not None and layer.get(new) is None:
                setattr(config, new, None)
        for name, value in layer.items():
            setattr(config, name, value)
    refuse_unsupported(vars(config))
    refuse_traced(vars(config))
    check_values(vars(config))
    warn_without_effect(kwargs, vars(config))
    return config, inputs


def fields_of_model_config(config: Any) -> dict[str, Any]:
    """The fields of generation that a model's configuration has, where scripts for older ``transformers`` set them.

    Returns:
        By their place, such as ``"top_k"`` and ``"depth_decoder_config.top_k"``.
    """
    found = {name: getattr(config, name, None) for name in MODEL_CONFIG_FIELDS}
    for part in MODEL_CONFIG_PARTS:
        part_config = getattr(config, part, None)
        found |= {f"{part}.{name}": getattr(part_config, name, None) for name in MODEL_CONFIG_FIELDS}
    return {name: copy.deepcopy(value) for name, value in found.items() if value is not None}


def with_model_config(
    default: GenerationConfig | None, config: Any, before: dict[str, Any]
) -> GenerationConfig | None:
    """The model's generation configuration, with what has been set in the model's configuration since.

    Setting it there is deprecated, and warns. It counts unless the generation configuration says something else than
    the model's configuration did, or it is of the audio encoder, which does not generate; that also warns.

    Args:
        default: the generation configuration, if there is one; it is not changed.
        config: the model's configuration.
        before: :func:`fields_of_model_config` when the model was made.
    """
    now = fields_of_model_config(config)
    merged = default
    for place in sorted(now.keys() | before.keys()):
        part, name = place.rpartition(".")[::2]
        value, old, given = now.get(place), before.get(place), _generation_field(default, part, name)
        if _equal(value, old) or _equal(value, given):
            continue
        there = f"{part}[{name!r}]" if part else name
        if part == "audio_encoder_config":
            told = "has no effect, as the audio encoder does not generate: take it back"
        elif _equal(given, old):
            if merged is default:
                merged = GenerationConfig() if default is None else copy.deepcopy(default)
            if part:
                setattr(merged, part, {**_nested(merged, part), name: value})
            else:
                setattr(merged, name, value)
            told = f"counts for `generate`, which is deprecated: set `model.generation_config.{there}`"
        else:
            told = f"has no effect on `generate`, as `model.generation_config.{there}` is {given!r}: set that"
        warnings.warn(f"`model.config.{place} = {value!r}` {told}.", stacklevel=callers_level())
    return merged


def _generation_field(config: GenerationConfig | None, part: str, name: str) -> Any:
    return _nested(config, part).get(name) if part else getattr(config, name, None)


def _nested(config: GenerationConfig | None, part: str) -> dict[str, Any]:
    """The configuration of a part in a generation configuration."""
    nested = getattr(config, part, None)
    return nested.to_dict() if isinstance(nested, GenerationConfig) else nested or {}


def _equal(one: Any, other: Any) -> bool:
    return bool(np.all(one == other))  # arrays say so entry by entry


def read_temp(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``values`` with ``temp`` as ``temperature``: the published conversion writes this name, which nothing reads."""
    if "temp" not in values:
        return values
    logger.warning(f"`{prefix}temp` in a generation configuration is read as `{prefix}temperature`")
    values = dict(values)
    temp = values.pop("temp")
    return {**values, "temperature": temp if values.get("temperature") is None else values["temperature"]}


def load_generation_config(values: dict[str, Any]) -> GenerationConfig:
    """What a ``generation_config.json`` says, with ``temp`` read, the depth decoder's too."""
    values, nested = read_temp(values), values.get("depth_decoder_config")
    if isinstance(nested, dict):
        values = {**values, "depth_decoder_config": read_temp(nested, "depth_decoder_")}
    return GenerationConfig.from_dict(values)


def refuse_unsupported(
    values: dict[str, Any], prefix: str = "", supported: tuple[str, ...] = SUPPORTED_FIELDS
) -> None:
    """Raises ``ValueError`` for the first field that is set and has no effect here."""
    for name, value in values.items():
        if name.startswith("_") or name in supported or value is None:
            continue
        # besides None these values ask for nothing
        neutral = isinstance(value, bool | int | float | str) and value in UNSUPPORTED_FIELDS.get(name, ())
        if not neutral:
            raise ValueError(f"`{prefix}{name}={value!r}` is not supported by `generate` here: leave it unset.")


def has_tracer(value: Any) -> bool:
    """Whether a field's value is traced, or a member of it."""
    if isinstance(value, dict):
        return has_tracer([*value.keys(), *value.values()])
    if isinstance(value, list | tuple | set):
        return any(has_tracer(member) for member in value)
    return is_traced(value)


def refuse_traced(values: dict[str, Any], prefix: str = "", operands: tuple[str, ...] = OPERANDS) -> None:
    """Raises ``ValueError`` for the first value that is traced and not one of ``operands``."""
    for name, value in values.items():
        # the options in there are checked as those of the depth decoder
        if name not in operands and name != "depth_decoder_config" and has_tracer(value):
            raise ValueError(
                f"`{prefix}{name}` is traced, but must be known before: pass its value, or make it static "
                "(`static_argnames` of `jax.jit`)."
            )


def check_values(values: dict[str, Any], prefix: str = "") -> None:
    """Raises ``ValueError`` for the first value out of range; names carry ``prefix``."""
    for name, (good, rule) in RULES.items():
        value = values.get(name)
        if value is not None and not good(value):
            raise ValueError(f"`{prefix}{name}` must be {rule}, but is {value!r}.")


def warn_without_effect(given: dict[str, Any], values: dict[str, Any], prefix: str = "") -> None:
    """Warns of what was ``given`` for a call and does nothing in it.

    Args:
        given: the arguments of the call, without ``prefix``.
        values: all fields, which have been checked.
        prefix: of the names.
    """
    ends = values.get("eos_token_id")
    for lacks, neutral, remedy in (
        (not values.get("do_sample"), NEUTRAL_WITHOUT_SAMPLING, "without sampling: set `{}do_sample=True`"),
        ((values.get("num_beams") or 1) == 1, NEUTRAL_WITHOUT_BEAMS, "with one beam: set `{}num_beams`"),
        (ends is None or np.size(ends) == 0, NEUTRAL_WITHOUT_END, "without an end: set `{}eos_token_id`"),
    ):
        for name in neutral if lacks else ():
            if active(given.get(name), *neutral[name]):
                warnings.warn(
                    f"`{prefix}{name}={given[name]!r}` has no effect {remedy.format(prefix)}, or leave it out.",
                    stacklevel=callers_level(),
                )


def callers_level() -> int:
    """``stacklevel`` by which a warning of the function that calls this one points to the first line of a user."""
    package = __name__.partition(".")[0]
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    return level


def active(value: Any, *neutral: Any) -> bool:
    """Whether an option is set to something else than its neutral values."""
    return value is not None and (is_traced(value) or value not in neutral)


def scalar(value: Any) -> jax.Array:
    return on_device(value, np.float32)


def resolve_sampling(
    values: dict[str, Any], processors: FlaxLogitsProcessorList | None = None, prefix: str = "", keep: int = 1
) -> Sampling:
    """The sampling options among ``values``; unset ones take upstream's defaults.

    Args:
        values: fields of a generation configuration.
        processors: what comes before sampling.
        prefix: of the names in errors.
        keep: tokens that every filter keeps.

    Raises:
        ValueError: for values out of range.
    """
    check_values(values, prefix)
    processors = FlaxLogitsProcessorList() if processors is None else processors
    renormalize = bool(values.get("renormalize_logits"))
    if not values.get("do_sample"):
        return Sampling(processors=processors, renormalize=renormalize)
    temperature, top_k = (
        DEFAULTS[name] if values.get(name) is None else values[name] for name in ("temperature", "top_k")
    )
    top_k = max(int(top_k), keep) if top_k else None
    neutral = {"top_p": (1,), "min_p": (), "typical_p": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,)}
    filters = {name: scalar(values[name]) for name, none in neutral.items() if active(values.get(name), *none)}
    return Sampling(
        processors=processors,
        temperature=scalar(temperature),
        top_k=None if top_k is None else on_device(top_k, np.int32),
        **filters,
        do_sample=True,
        top_k_bound=64 if top_k is None else top_k_bound(top_k),
        min_tokens_to_keep=keep,
        renormalize=renormalize,
    )


def resolve_processors(
    values: dict[str, Any],
    prompt_length: int,
    max_length: int,
    vocab_size: int,
    eos_token_ids: tuple[int, ...] = (),
    padding_lengths: jax.Array | None = None,
    prefix: str = "",
) -> FlaxLogitsProcessorList:
    """The processors that ``values`` ask for, in upstream's order.

    Args:
        values: fields of a generation configuration.
        prompt_length: tokens of the prompt.
        max_length: of the sequences, prompt included.
        vocab_size: number of scores.
        eos_token_ids: what ends a row.
        padding_lengths: leading tokens of each row that the repetition penalty leaves out, ``(batch,)``, or None.
        prefix: of the names in errors.

    Raises:
        ValueError: for values out of range, ids outside the vocabulary, options that need an end and have none, and
            options that leave no token.
    """
    check_values(values, prefix)

    def given(name: str) -> Any:
        return values.get(name)

    def ids(name: str) -> list[int]:
        return token_list(f"{prefix}{name}", values[name], vocab_size)

    check_forced_and_suppressed(values, prefix)
    processors = FlaxLogitsProcessorList()
    if given("sequence_bias") is not None:
        bias = biased_sequences(f"{prefix}sequence_bias", values["sequence_bias"], vocab_size)
        processors.append(FlaxSequenceBiasLogitsProcessor(bias))
    if active(given("repetition_penalty"), 1):
        processors.append(FlaxRepetitionPenaltyLogitsProcessor(values["repetition_penalty"], padding_lengths))
    if given("no_repeat_ngram_size"):
        processors.append(FlaxNoRepeatNGramLogitsProcessor(int(values["no_repeat_ngram_size"])))
    if given("bad_words_ids") is not None:
        words = bad_words(f"{prefix}bad_words_ids", values["bad_words_ids"], vocab_size)
        processors.append(FlaxNoBadWordsLogitsProcessor(words, eos_token_ids or None))
    if eos_token_ids and given("min_new_tokens"):
        processors.append(
            FlaxMinNewTokensLengthLogitsProcessor(prompt_length, values["min_new_tokens"], eos_token_ids)
        )
    elif eos_token_ids and given("min_length"):
        processors.append(FlaxMinLengthLogitsProcessor(values["min_length"], eos_token_ids))
    if given("forced_bos_token_id") is not None:
        processors.append(FlaxForcedBOSTokenLogitsProcessor(ids("forced_bos_token_id")))
    if given("forced_eos_token_id") is not None:
        processors.append(FlaxForcedEOSTokenLogitsProcessor(max_length, ids("forced_eos_token_id")))
    if given("remove_invalid_values"):
        processors.append(FlaxInfNanRemoveLogitsProcessor())
    if given("exponential_decay_length_penalty") is not None:
        name = "exponential_decay_length_penalty"
        decay(f"{prefix}{name}", values[name])
        if not eos_token_ids:
            raise ValueError(f"`{prefix}{name}` favours the end, but there is none: set `{prefix}eos_token_id`.")
        processors.append(FlaxExponentialDecayLengthPenalty(values[name], eos_token_ids, prompt_length))
    if given("suppress_tokens") is not None:
        processors.append(FlaxSuppressTokensLogitsProcessor(ids("suppress_tokens")))
    if given("begin_suppress_tokens") is not None:
        forced_first = prompt_length <= 1 and given("forced_bos_token_id") is not None
        begin = prompt_length + int(forced_first)
        processors.append(FlaxSuppressTokensAtBeginLogitsProcessor(ids("begin_suppress_tokens"), begin))
    check_tokens_left(values, vocab_size, eos_token_ids, prefix)
    return processors


def check_tokens_left(values: dict[str, Any], vocab_size: int, eos_token_ids: tuple[int, ...], prefix: str) -> None:
    """Raises ``ValueError`` if options, which have been checked each, forbid all tokens together."""
    biases = biased_sequences("sequence_bias", values["sequence_bias"]) if values.get("sequence_bias") else {}
    forbidden = {
        "sequence_bias": {sequence[0] for sequence, bias in biases.items() if len(sequence) == 1 and bias == -np.inf},
        "bad_words_ids": {word[0] for word in values.get("bad_words_ids") or () if len(word) == 1} - {*eos_token_ids},
    }
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        forbidden[name] = set() if values.get(name) is None else {*token_list(name, values[name])}
    if len(set().union(*forbidden.values())) == vocab_size:
        names = " and ".join(f"`{prefix}{name}`" for name, ids in forbidden.items() if ids)
        raise ValueError(f"No token is left by {names}, which forbid all {vocab_size}: allow at least one.")


def check_forced_and_suppressed(values: dict[str, Any], prefix: str = "") -> None:
    """Raises ``ValueError`` if a token is forced and suppressed, which would leave no token at all."""
    if values.get("suppress_tokens") is None:
        return
    suppressed = set(token_list(f"{prefix}suppress_tokens", values["suppress_tokens"]))
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        if values.get(name) is None:
            continue
        forced = set(token_list(f"{prefix}{name}", values[name]))
        if forced <= suppressed:
            raise ValueError(
                f"`{prefix}{name}` is {values[name]}, which `{prefix}suppress_tokens` forbids: remove it from one of "
                "the two."
            )


def resolve_plan(
    config: GenerationConfig,
    prompt_length: int,
    vocab_size: int,
    batch_size: int,
    attention_mask: Any = None,
    stop_lengths: Any = None,
    logits_processor: Any = None,
) -> Plan:
    """Resolves the options of the text stream.

    Args:
        config: of :func:`merge_generation_config`.
        prompt_length: tokens of the prompt.
        vocab_size: for the check of the token ids.
        batch_size: rows of the prompt.
        attention_mask: of the prompt, or of its last tokens, ``(batch, frames)``; the repetition penalty leaves out
            the padding before the first token. None if there is no padding.
        stop_lengths: new tokens after which each row ends at the latest, ``(batch,)``, or None.
        logits_processor: of the call, one or a list; after those of ``config``, in the place of one of the same class.

    Raises:
        ValueError: for values out of range, lengths that leave nothing to generate and ids outside the vocabulary.
    """
    values = {name: getattr(config, name, None) for name in (*SUPPORTED_FIELDS, *DEFAULTS)}
    max_length = resolve_max_length(values, prompt_length)
    eos = values["eos_token_id"]
    eos_token_ids = () if eos is None else tuple(token_list("eos_token_id", eos, vocab_size + 1))
    pad = values["pad_token_id"]
    if pad is not None and not (is_whole(pad) and 0 <= pad <= vocab_size):
        raise ValueError(f"`pad_token_id` must be in [0, {vocab_size}], but is {pad!r}.")
    num_beams, num_return_sequences = resolve_counts(values)
    mask = np.ones((batch_size, prompt_length)) if attention_mask is None else attention_mask
    padding = padding_lengths(mask, prompt_length)
    processors = resolve_processors(values, prompt_length, max_length, vocab_size, eos_token_ids, padding)
    keep = len(eos_token_ids) + 1 if eos_token_ids else 2
    length_penalty = or_default(values, "length_penalty")
    return Plan(
        sampling=resolve_sampling(
            values, with_custom(processors, logits_processor), keep=keep if num_beams > 1 else 1
        ),
        max_length=max_length,
        eos_token_ids=eos_token_ids,
        pad_token_id=int(pad) if pad is not None else (eos_token_ids[0] if eos_token_ids else 0),
        stop_lengths=resolve_stop_lengths(stop_lengths, batch_size, prompt_length, max_length),
        max_time=None if values["max_time"] is None else float(values["max_time"]),
        num_beams=num_beams,
        num_return_sequences=num_return_sequences,
        length_penalty=length_penalty if is_traced(length_penalty) else float(length_penalty),
        early_stopping=or_default(values, "early_stopping"),
        **{name: bool(values[name]) for name in OUTPUT_FIELDS},
    )


def or_default(values: dict[str, Any], name: str) -> Any:
    return DEFAULTS[name] if values[name] is None else values[name]


def resolve_max_length(values: dict[str, Any], prompt_length: int) -> int:
    """Tokens of the sequences, prompt included.

    Raises:
        ValueError: if nothing is left to generate, or less than the minimum.
    """
    if values["max_new_tokens"] is not None:
        max_length = prompt_length + int(values["max_new_tokens"])
    elif values["max_length"] is not None:
        max_length = int(values["max_length"])
        if max_length <= prompt_length:
            raise ValueError(
                f"`max_length` is {max_length}, but the prompt alone has {prompt_length} tokens: `max_length` counts "
                "the prompt; raise it or use `max_new_tokens`."
            )
    else:
        max_length = prompt_length + DEFAULT_NEW_TOKENS
    name = "min_length" if values["min_new_tokens"] is None else "min_new_tokens"
    least = int(values[name] or 0) + (prompt_length if name == "min_new_tokens" else 0)
    if least > max_length:
        raise ValueError(
            f"`{name}` is {values[name]}, but the sequences have only {max_length} tokens, {prompt_length} of them "
            "the prompt: lower it or raise `max_new_tokens`."
        )
    return max_length


def resolve_counts(values: dict[str, Any]) -> tuple[int, int]:
    """``num_beams`` and ``num_return_sequences``.

    Raises:
        ValueError: for more results than there are beams, or several of greedy search.
    """
    num_beams, num_return_sequences = (int(or_default(values, name)) for name in ("num_beams", "num_return_sequences"))
    if num_beams > 1 and num_return_sequences > num_beams:
        raise ValueError(
            f"`num_return_sequences` is {num_return_sequences}, but there are only {num_beams} beams: lower it or "
            "raise `num_beams`."
        )
    if num_beams == 1 and num_return_sequences > 1 and not values["do_sample"]:
        raise ValueError(
            f"`num_return_sequences` is {num_return_sequences}, but greedy search has one result: set "
            "`do_sample=True` or `num_beams`."
        )
    return num_beams, num_return_sequences


def padding_lengths(attention_mask: Any, prompt_length: int) -> jax.Array:
    """Columns of the prompt before the first one of each row that is attended, ``(batch,)``."""
    xp = jnp if is_traced(attention_mask) else np
    first = xp.argmax(xp.asarray(attention_mask) != 0, axis=-1)
    return on_device(first + prompt_length - np.shape(attention_mask)[1], np.int32)


def resolve_stop_lengths(stop_lengths: Any, batch_size: int, prompt_length: int, max_length: int) -> jax.Array | None:
    """Lengths with the prompt from numbers of new tokens; int32.

    Raises:
        ValueError: for a wrong shape, numbers that are not whole, below 1 or beyond the length of the sequences.
    """
    if stop_lengths is None:
        return None
    if not is_traced(stop_lengths):
        stop_lengths = np.asarray(stop_lengths)
    if stop_lengths.shape != (batch_size,) or not np.issubdtype(stop_lengths.dtype, np.integer):
        raise ValueError(
            f"`stop_lengths` must be one whole number per row, ({batch_size},), but has the shape "
            f"{stop_lengths.shape} and the dtype {stop_lengths.dtype}."
        )
    new_tokens = max_length - prompt_length
    if not is_traced(stop_lengths) and ((stop_lengths < 1) | (stop_lengths > new_tokens)).any():
        wrong = stop_lengths[(stop_lengths < 1) | (stop_lengths > new_tokens)][0]
        raise ValueError(
            f"`stop_lengths` must be in [1, {new_tokens}], the new tokens of a row, but has {wrong}: change it or "
            "`max_new_tokens`."
        )
    return on_device(stop_lengths + prompt_length, np.int32)


def with_custom(processors: FlaxLogitsProcessorList, custom: Any) -> FlaxLogitsProcessorList:
    """``processors`` and those of the call.

    Raises:
        ValueError: for what cannot be called so.
    """
    if custom is None:
        return processors
    custom = list(custom) if isinstance(custom, list | tuple) else [custom]
    for processor in custom:
        if not callable(processor) or not takes_three(processor):
            raise ValueError(
                f"`logits_processor` must be a function `(input_ids, scores, cur_len) -> scores` or a list of such, "
                f"but has {processor!r}."
            )
    return processors.merged_with(custom)


def takes_three(function: Callable) -> bool:
    """Whether a function can be called with three arguments, as far as it says."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # not written in Python
        return True
    try:
        signature.bind(None, None, None)
    except TypeError:
        return False
    return True


def resolve_nested_sampling(values: dict[str, Any], prefix: str, max_length: int, vocab_size: int) -> Sampling:
    """How an inner decoder chooses its tokens, of which it makes a fixed number after a prompt of one token.

    Args:
        values: fields of a generation configuration.
        prefix: of the names in errors.
        max_length: tokens in all; other lengths are refused.
        vocab_size: number of scores.

    Raises:
        ValueError: for fields without an effect here, such as those of beam search, and values out of range.
    """
    values = {name: value for name, value in values.items() if not name.startswith("_")}
    values = read_temp(values, prefix)
    refuse_traced(values, prefix)
    for name in ("min_length", "max_length"):
        if values.pop(name, None) not in (None, max_length):
            raise ValueError(f"`{prefix}{name}` must be {max_length} (the prompt and all new tokens).")
    for name in ("num_beams", "num_return_sequences", "length_penalty", "early_stopping"):
        if not active(values.get(name), DEFAULTS[name]):
            values.pop(name, None)
    values = {name: value for name, value in values.items() if not (name in OUTPUT_FIELDS and value is False)}
    supported = (*SAMPLING_FIELDS, *PROCESSOR_FIELDS, *RUNTIME_FIELDS, *RESULT_FIELDS, *METADATA_FIELDS)
    refuse_unsupported(values, prefix, supported)
    processors = resolve_processors(values, 1, max_length, vocab_size, prefix=prefix)
    return resolve_sampling(values, processors, prefix)
