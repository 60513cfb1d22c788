"""Every field of ``GenerationConfig`` has its effect on the plan or raises, naming itself."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import GenerationConfig

from tests.configs import tiny_moshi_config
from transformers_moshi_flax import FlaxMoshiForCausalLM, FlaxMoshiForConditionalGeneration
from transformers_moshi_flax import generation as ours
from transformers_moshi_flax.generation.configuration import (
    DEFAULT_NEW_TOKENS,
    DEFAULTS,
    SUPPORTED_FIELDS,
    UNSUPPORTED_FIELDS,
    Plan,
    load_generation_config,
    merge_generation_config,
    resolve_nested_sampling,
    resolve_plan,
)
from transformers_moshi_flax.generation.sampling import Sampling

PROMPT, VOCAB, BATCH = 4, 50, 2


def plan(default: dict[str, Any] | None = None, given: dict[str, Any] | None = None, **kwargs: Any) -> Plan:
    call = {
        name: kwargs.pop(name) for name in ("stop_lengths", "logits_processor", "attention_mask") if name in kwargs
    }
    given_config = None if given is None else GenerationConfig(**given)
    config, _ = merge_generation_config(GenerationConfig(**(default or {})), given_config, kwargs)
    return resolve_plan(config, PROMPT, VOCAB, BATCH, **call)


def nested(**values: Any) -> Sampling:
    return resolve_nested_sampling(values, "depth_decoder_", 9, 32)


def test_every_field_is_classified() -> None:
    known = {*SUPPORTED_FIELDS, *UNSUPPORTED_FIELDS}
    fields = {name for name in {*GenerationConfig().to_dict(), *vars(GenerationConfig())} if not name.startswith("_")}
    assert fields - known == set(), "transformers has new fields: give them an effect or refuse them"
    # gone since transformers 4.57, and Moshi's own
    assert known - fields == {"return_legacy_cache", "forced_decoder_ids", "depth_decoder_config"}
    assert not {*SUPPORTED_FIELDS} & {*UNSUPPORTED_FIELDS}


@pytest.mark.parametrize("name", UNSUPPORTED_FIELDS)
def test_without_an_effect(name: str) -> None:
    for neutral in (None, *UNSUPPORTED_FIELDS[name]):
        plan(**{name: neutral})
        nested(**{name: neutral})
    with pytest.raises(ValueError, match=f"`{name}=.* not supported .*leave it unset"):
        plan(**{name: 7})
    with pytest.raises(ValueError, match=f"`depth_decoder_{name}=.* not supported"):
        nested(**{name: 7})


def test_defaults_are_those_of_upstream() -> None:
    defaults = GenerationConfig._get_default_generation_params()
    assert {name: defaults[name] for name in DEFAULTS} == DEFAULTS
    assert defaults["max_length"] == DEFAULT_NEW_TOKENS
    for name, neutral in UNSUPPORTED_FIELDS.items():
        assert defaults.get(name) is None or defaults[name] in neutral
    unset = plan()
    assert unset.max_length == PROMPT + 20 and not unset.sampling.do_sample and not unset.sampling.processors
    sampled = plan(do_sample=True).sampling
    assert int(sampled.top_k) == 50 and sampled.top_k_bound == 64 and float(sampled.temperature) == 1
    assert [sampled.top_p, sampled.min_p, sampled.typical_p, sampled.epsilon_cutoff, sampled.eta_cutoff] == [None] * 5


@pytest.mark.parametrize("field", ["cache_implementation", "compile_config", "disable_compile", "max_cache_len"])
def test_fields_of_the_runtime_are_accepted(field: str) -> None:
    assert plan(**{field: "static"}) is not None and nested(**{field: "static"}) is not None
    assert plan(use_cache=False).max_length == plan(use_cache=True).max_length


def test_filters_and_outputs() -> None:
    numbers = {"temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.8}
    numbers |= {"epsilon_cutoff": 0.01, "eta_cutoff": 0.02}
    sampled = plan(do_sample=True, top_k=70, renormalize_logits=True, **numbers).sampling
    for name, number in numbers.items():
        assert float(getattr(sampled, name)) == np.float32(number)
    assert int(sampled.top_k) == 70 and sampled.top_k_bound == 128 and sampled.renormalize
    neutral = plan(do_sample=True, top_k=0, top_p=1.0, typical_p=1.0, epsilon_cutoff=0.0, eta_cutoff=0.0).sampling
    assert jax.tree.leaves(neutral) == [1.0]
    for name in ("output_scores", "output_logits", "output_hidden_states", "output_attentions"):
        assert getattr(plan(**{name: True}), name) and not getattr(plan(), name)
    assert plan(max_time=2).max_time == 2.0 and plan().max_time is None


# the field, and what comes of it where `eos_token_id` is set
PROCESSORS: dict[str, tuple[Any, type]] = {
    "sequence_bias": ({(1, 2): 1.0}, ours.FlaxSequenceBiasLogitsProcessor),
    "repetition_penalty": (1.5, ours.FlaxRepetitionPenaltyLogitsProcessor),
    "no_repeat_ngram_size": (2, ours.FlaxNoRepeatNGramLogitsProcessor),
    "bad_words_ids": ([[1, 2]], ours.FlaxNoBadWordsLogitsProcessor),
    "min_length": (6, ours.FlaxMinLengthLogitsProcessor),
    "min_new_tokens": (6, ours.FlaxMinNewTokensLengthLogitsProcessor),
    "forced_bos_token_id": (1, ours.FlaxForcedBOSTokenLogitsProcessor),
    "forced_eos_token_id": (1, ours.FlaxForcedEOSTokenLogitsProcessor),
    "remove_invalid_values": (True, ours.FlaxInfNanRemoveLogitsProcessor),
    "exponential_decay_length_penalty": ((1, 1.2), ours.FlaxExponentialDecayLengthPenalty),
    "suppress_tokens": ([3], ours.FlaxSuppressTokensLogitsProcessor),
    "begin_suppress_tokens": ([3], ours.FlaxSuppressTokensAtBeginLogitsProcessor),
}
NEUTRAL = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0}


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors(name: str) -> None:
    value, cls = PROCESSORS[name]
    processors = plan(**{name: value}, eos_token_id=5).sampling.processors
    assert [type(processor) for processor in processors] == [cls]
    assert plan(**{name: NEUTRAL.get(name)}, eos_token_id=5).sampling.processors == []
    if name.startswith("min_") or name == "exponential_decay_length_penalty":
        return  # these need an end, and codes have none
    assert [type(processor) for processor in nested(**{name: value}).processors] == [cls]


def test_padding_is_not_repeated() -> None:
    mask = jnp.array([[0, 0, 1], [1, 1, 1]])
    penalty = plan(repetition_penalty=2.0, attention_mask=mask).sampling.processors[0]
    np.testing.assert_array_equal(penalty.prompt_ignore_length, [3, 1])  # the mask lacks the start frame
    # without a mask it is an operand too, so that one compiles nothing
    np.testing.assert_array_equal(plan(repetition_penalty=2.0).sampling.processors[0].prompt_ignore_length, [0, 0])


class TestLengths:
    def test_prompt_is_counted(self) -> None:
        assert plan(max_length=30).max_length == 30
        assert plan(max_new_tokens=30).max_length == 34
        least = plan(min_length=6, eos_token_id=1).sampling.processors[0]
        assert int(least.min_length) == 6
        least = plan(min_new_tokens=6, eos_token_id=1).sampling.processors[0]
        assert (int(least.min_new_tokens), int(least.prompt_length_to_skip)) == (6, PROMPT)

    def test_the_later_one_is_meant(self) -> None:
        default = {"max_new_tokens": 7, "min_new_tokens": 2, "eos_token_id": 1}
        assert plan(default).max_length == 11
        assert plan(default, {"max_length": 9}).max_length == 9
        assert plan(default, {"max_length": 9}, max_new_tokens=3).max_length == 7
        assert plan(default, max_length=8).max_length == 8
        assert int(plan(default, min_length=5).sampling.processors[0].min_length) == 5
        assert plan({"max_length": 9}, max_new_tokens=1).max_length == 5

    def test_stop_lengths(self) -> None:
        stop = plan(max_new_tokens=9, stop_lengths=[3, 9]).stop_lengths
        assert stop.dtype == jnp.int32
        np.testing.assert_array_equal(stop, [7, 13])
        assert plan().stop_lengths is None
        traced = jax.jit(lambda lengths: plan(stop_lengths=lengths).stop_lengths)(jnp.array([1, 2]))
        np.testing.assert_array_equal(traced, [5, 6])


def test_tokens() -> None:
    ends = plan(eos_token_id=[3, 5])
    assert ends.eos_token_ids == (3, 5) and ends.pad_token_id == 3
    assert plan(eos_token_id=3, pad_token_id=VOCAB).pad_token_id == VOCAB
    assert plan().eos_token_ids == () and plan().pad_token_id == 0


def test_beams() -> None:
    beams = plan(
        num_beams=4, num_return_sequences=2, length_penalty=-1, early_stopping="never", do_sample=True, top_k=1
    )
    assert (beams.num_beams, beams.num_return_sequences, beams.length_penalty) == (4, 2, -1.0)
    assert beams.early_stopping == "never" and plan().early_stopping is False
    # upstream keeps one more than there are ends, so that a beam can go on
    assert beams.sampling.min_tokens_to_keep == 2 and int(beams.sampling.top_k) == 2
    assert plan(num_beams=2, do_sample=True, eos_token_id=[1, 2]).sampling.min_tokens_to_keep == 3
    assert plan(num_return_sequences=3, do_sample=True).num_return_sequences == 3


def test_logits_processors_of_the_call() -> None:
    custom = ours.FlaxSuppressTokensLogitsProcessor([7])

    def function(input_ids: Any, scores: Any, cur_len: Any) -> Any:
        return scores

    both = plan(suppress_tokens=[3], logits_processor=[custom, function]).sampling.processors
    assert both == [custom, function]
    assert plan(logits_processor=function).sampling.processors == [function]


def test_a_model_without_a_configuration() -> None:
    config, _ = merge_generation_config(None, None, {"max_new_tokens": 3})
    assert resolve_plan(config, PROMPT, VOCAB, BATCH).max_length == PROMPT + 3


def test_traced_numbers() -> None:
    def temperature_of(number: jax.Array) -> jax.Array:
        resolved = plan(
            num_beams=2,
            length_penalty=number,
            do_sample=True,
            temperature=number,
            top_p=number,
            repetition_penalty=number,
        )
        options = resolved.sampling
        return options.temperature + options.top_p + options.processors[0].penalty + resolved.length_penalty

    assert float(jax.jit(temperature_of)(0.5)) == 2.0
    with pytest.raises(ValueError, match=r"`depth_decoder_length_penalty=.* is not supported"):
        jax.jit(lambda number: nested(length_penalty=number).temperature)(0.5)


TRACED = {
    "top_k": 5,
    "do_sample": True,
    "num_beams": 2,
    "early_stopping": True,
    "max_new_tokens": 2,
    "min_length": 2,
    "max_time": 3.0,
    "eos_token_id": 5,
    "pad_token_id": 5,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": np.array([1, 2]),
    "forced_eos_token_id": 2,
    "output_scores": True,
}


@pytest.mark.parametrize("name", TRACED)
def test_traced_where_the_program_depends_on_it(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` is traced, but must be known.*pass its value.*`static_argnames`"):
        jax.jit(lambda value: plan(**{name: value}).eos_token_ids)(TRACED[name])
    with pytest.raises(ValueError, match=f"`depth_decoder_{name}` is traced"):
        jax.jit(lambda value: nested(**{name: value}).temperature)(TRACED[name])


@pytest.mark.parametrize(
    "name, wrap",
    [
        ("eos_token_id", lambda value: [1, value]),
        ("sequence_bias", lambda value: {(1,): value}),
        ("sequence_bias", lambda value: [[[1], value]]),
        ("exponential_decay_length_penalty", lambda value: (1, value)),
    ],
)
def test_traced_inside_of_a_value(name: str, wrap: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}` is traced"):
        jax.jit(lambda value: plan(**{name: wrap(value)}).eos_token_ids)(2.0)


def test_temp_is_temperature(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert float(plan({"temp": 0.7, "do_sample": True}).sampling.temperature) == np.float32(0.7)
        assert float(plan(given={"temp": 0.6, "do_sample": True}).sampling.temperature) == np.float32(0.6)
        assert float(nested(temp=0.8, do_sample=True).temperature) == np.float32(0.8)
        assert float(nested(temp=0.8, temperature=0.5, do_sample=True).temperature) == 0.5
    assert "`temp` in a generation configuration is read as `temperature`" in caplog.text
    assert "`depth_decoder_temp`" in caplog.text


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"do_sample": 1}, "`do_sample` must be True or False, but is 1"),
    ({"temperature": 0.0}, "`temperature` must be a number above 0 .*do_sample=False.*but is 0.0"),
    ({"top_k": 1.5}, "`top_k` must be a whole number"),
    ({"top_p": 0.0}, "`top_p` must be"),
    ({"min_p": 2}, "`min_p` must be"),
    ({"typical_p": "0.5"}, "`typical_p` must be"),
    ({"epsilon_cutoff": 1.0}, "`epsilon_cutoff` must be"),
    ({"eta_cutoff": -1.0}, "`eta_cutoff` must be"),
    ({"repetition_penalty": 0}, "`repetition_penalty` must be"),
    ({"no_repeat_ngram_size": -1}, "`no_repeat_ngram_size` must be"),
    ({"bad_words_ids": []}, "`bad_words_ids` must be"),
    ({"bad_words_ids": [[VOCAB]]}, r"`bad_words_ids` must be .*\[0, 50\)"),
    ({"sequence_bias": {(1,): None}}, "`sequence_bias` must be"),
    ({"sequence_bias": [[[VOCAB], 1.0]]}, r"`sequence_bias` must be .*\[0, 50\)"),
    ({"suppress_tokens": [VOCAB]}, r"`suppress_tokens` must be .*\[0, 50\)"),
    ({"forced_bos_token_id": -1}, "`forced_bos_token_id` must be"),
    ({"forced_eos_token_id": 3, "suppress_tokens": [2, 3]}, "`forced_eos_token_id` is 3.*`suppress_tokens`"),
    ({"remove_invalid_values": "yes"}, "`remove_invalid_values` must be"),
    ({"exponential_decay_length_penalty": (1, 1.1)}, "`exponential_decay_length_penalty`.*set `eos_token_id`"),
    (
        {"exponential_decay_length_penalty": 1.1, "eos_token_id": 1},
        "`exponential_decay_length_penalty` must be a p",
    ),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be"),
    ({"max_length": PROMPT}, "`max_length` is 4, .*raise it or use `max_new_tokens`"),
    ({"max_length": 9, "min_length": 10, "eos_token_id": 1}, "`min_length` is 10.*lower it or raise"),
    ({"max_new_tokens": 3, "min_new_tokens": 4, "eos_token_id": 1}, "`min_new_tokens` is 4.*lower it or raise"),
    ({"max_time": 0}, "`max_time` must be"),
    ({"eos_token_id": VOCAB + 1}, "`eos_token_id` must be"),
    ({"eos_token_id": [1, None]}, "`eos_token_id` must be"),
    ({"pad_token_id": -1}, "`pad_token_id` must be"),
    ({"num_beams": 0}, "`num_beams` must be"),
    ({"num_return_sequences": 2}, "`num_return_sequences` is 2, but greedy .*`do_sample=True`"),
    ({"num_return_sequences": 3, "num_beams": 2}, "`num_return_sequences` is 3, .*raise `num_beams`"),
    ({"length_penalty": float("inf")}, "`length_penalty` must be"),
    ({"early_stopping": "always"}, "`early_stopping` must be"),
    ({"output_scores": 3}, "`output_scores` must be"),
    ({"stop_lengths": [1]}, r"`stop_lengths` must be one whole number per row, \(2,\), but has the shape \(1,\)"),
    ({"stop_lengths": [1.0, 2.0]}, "`stop_lengths` must be one whole number per row"),
    ({"stop_lengths": [0, 2]}, r"`stop_lengths` must be in \[1, 20\].*has 0.*`max_new_tokens`"),
    ({"stop_lengths": [1, 21]}, r"`stop_lengths` must be in \[1, 20\].*has 21"),
    ({"logits_processor": [3]}, "`logits_processor` must be a function"),
    ({"num_beam": 2}, "no argument `num_beam`. Did you mean `num_beams`?"),
    *(({"top_k": k}, "`top_k` must be a whole number below 2") for k in (2**31, float("nan"), float("inf"), 10**12)),
    *(({"temperature": t}, r"`temperature` must be .* \[1e-30, 1e30\]") for t in (1e-45, 9e-31, 1e39, float("nan"))),
    ({"repetition_penalty": 1e-45}, r"`repetition_penalty` must be .* \[1e-30, 1e30\]"),
    ({"max_new_tokens": 2**31}, r"`max_new_tokens` must be .* below 2\*\*31, but is 2147483648"),
    ({"sequence_bias": {(1,): float("nan")}}, "`sequence_bias` must be made of biases that are finite, or -inf"),
    ({"sequence_bias": [[[1], 1e39]]}, "`sequence_bias` must be made of biases that are finite, or -inf"),
    ({"suppress_tokens": range(VOCAB)}, "No token is left by `suppress_tokens`, which forbid all 50: allow at least"),
    ({"begin_suppress_tokens": [*range(VOCAB)]}, "No token is left by `begin_suppress_tokens`,"),
    (
        {"suppress_tokens": [*range(2, VOCAB)], "bad_words_ids": [[1]], "sequence_bias": {(0,): float("-inf")}},
        "No token is left by `sequence_bias` and `bad_words_ids` and `suppress_tokens`,",
    ),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**options)


def test_a_token_is_left() -> None:
    """One is enough; words of several tokens and ends among the words leave theirs."""
    forbidden = {"suppress_tokens": [*range(2, VOCAB)], "sequence_bias": {(0,): float("-inf"), (1,): -9.0}}
    assert plan(**forbidden, bad_words_ids=[[1, 1], [1]], eos_token_id=1).eos_token_ids == (1,)


# what it lacks, the value, and the values that are not worth a warning
WITHOUT_EFFECT: dict[str, tuple[str, Any, list[Any]]] = {
    "temperature": ("do_sample=True", 0.5, [1.0, 1]),
    "top_k": ("do_sample=True", 1, [0, 50]),
    "top_p": ("do_sample=True", 0.5, [1.0]),
    "min_p": ("do_sample=True", 0.5, [0]),
    "typical_p": ("do_sample=True", 0.5, [1.0]),
    "epsilon_cutoff": ("do_sample=True", 0.1, [0.0]),
    "eta_cutoff": ("do_sample=True", 0.1, [0.0]),
    "length_penalty": ("num_beams", 2.0, [1.0]),
    "early_stopping": ("num_beams", True, [False]),
    "min_length": ("eos_token_id", 5, [0]),
    "min_new_tokens": ("eos_token_id", 1, [0]),
}


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_keywords_without_an_effect_warn(name: str) -> None:
    remedy, value, neutral = WITHOUT_EFFECT[name]
    with pytest.warns(UserWarning, match=f"^`{name}={value}` has no effect .*: set `{remedy}`, or leave it out"):
        plan(**{name: value})
    for quiet in (None, *neutral):
        plan(**{name: quiet})
    # as upstream, what stands in a configuration is not meant for this call alone
    plan({name: value})
    plan(given={name: value})
    plan(**{name: value}, do_sample=True, num_beams=2, eos_token_id=0)
    plan({"do_sample": True, "num_beams": 2, "eos_token_id": [3]}, **{name: value})


def test_the_warning_points_to_the_caller() -> None:
    script = (
        "import sys, warnings\n"
        "from transformers import GenerationConfig\n"
        "from transformers_moshi_flax.generation.configuration import merge_generation_config\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    merge_generation_config(GenerationConfig(), None, {'top_k': 3})\n"
        "print(caught[0].filename, caught[0].lineno)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert done.stdout == "<string> 6\n", done.stderr


NESTED_WRONG: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 2}, "`depth_decoder_num_beams=2` is not supported"),
    ({"num_return_sequences": 2}, "`depth_decoder_num_return_sequences=2`"),
    ({"output_scores": True}, "`depth_decoder_output_scores=True`"),
    ({"max_time": 1.0}, "`depth_decoder_max_time=1.0`"),
    ({"eos_token_id": 3}, "`depth_decoder_eos_token_id=3`"),
    ({"pad_token_id": 3}, "`depth_decoder_pad_token_id=3`"),
    ({"max_new_tokens": 3}, "`depth_decoder_max_new_tokens=3`"),
    ({"max_length": 8}, "`depth_decoder_max_length` must be 9"),
    ({"temprature": 1.0}, "`depth_decoder_temprature=1.0`"),
    ({"do_sample": True, "top_p": 3}, "`depth_decoder_top_p` must be"),
    ({"suppress_tokens": [32]}, r"`depth_decoder_suppress_tokens` must be .*\[0, 32\)"),
    ({"bad_words_ids": [[]]}, "`depth_decoder_bad_words_ids` must be"),
    ({"top_k": 2**31}, "`depth_decoder_top_k` must be a whole number below"),
    ({"temperature": 1e-45}, "`depth_decoder_temperature` must be"),
    ({"sequence_bias": {(1,): float("nan")}}, "`depth_decoder_sequence_bias` must be made of biases"),
    ({"suppress_tokens": [*range(32)]}, "No token is left by `depth_decoder_suppress_tokens`, which forbid all 32"),
]


@pytest.mark.parametrize(("options", "message"), NESTED_WRONG, ids=lambda value: str(value)[:40])
def test_wrong_values_of_the_inner_decoder(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nested(**options)


def test_neutral_values_of_the_inner_decoder() -> None:
    neutral = {"num_beams": 1, "length_penalty": 1.0, "early_stopping": False, "output_scores": False, "max_length": 9}
    assert nested(**neutral, min_length=9, num_return_sequences=1, eos_token_id=None, use_cache=True) is not None


def model_of(loaded: dict[str, Any] | None = None, **before: Any) -> Any:
    """A model without parameters, with what its generation_config.json says, if it has one."""
    config = tiny_moshi_config(num_hidden_layers=1)
    for name, value in before.items():
        setattr(config, name, value)
    model = FlaxMoshiForCausalLM(config, _do_init=False)
    if loaded is not None:
        model.generation_config = load_generation_config(loaded)
    return model


class TestFieldsInTheModelsConfiguration:
    """Where scripts for older versions set them, after the model was made."""

    def test_they_count_and_warn(self) -> None:
        for loaded in (None, {"do_sample": False, "temperature": 0.5}):
            model = model_of(loaded, **({"eos_token_id": 7} if loaded is None else {}))
            assert model.generation_defaults() is model.generation_config
            model.config.max_length = 6
            model.config.eos_token_id = [5, 6]
            model.config.forced_eos_token_id = 5
            with pytest.warns(UserWarning) as told:
                found = model.generation_defaults()
            assert (found.max_length, found.eos_token_id, found.forced_eos_token_id) == (6, [5, 6], 5)
            assert model.generation_config.max_length != 6
            messages = {str(warning.message) for warning in told}
            assert "`model.config.max_length = 6` counts for `generate`, which is deprecated: set " in " ".join(
                messages
            )
            assert len(messages) == 3 and "`model.generation_config.max_length`" in " ".join(messages)

    def test_unset(self) -> None:
        model = model_of(eos_token_id=7, suppress_tokens=[3, 4])
        model.config.suppress_tokens = np.array([3, 4])  # the same
        assert model.generation_defaults() is model.generation_config
        model.config.eos_token_id = None
        with pytest.warns(UserWarning, match=r"`model\.config\.eos_token_id = None` counts"):
            assert model.generation_defaults().eos_token_id is None

    def test_without_a_generation_configuration(self) -> None:
        model = model_of()
        model.generation_config = None
        assert model.generation_defaults() is None
        model.config.max_length = 6
        with pytest.warns(UserWarning, match=r"`model\.config\.max_length = 6` counts"):
            assert model.generation_defaults().max_length == 6

    def test_what_the_generation_configuration_says_stays(self) -> None:
        model = model_of({"max_length": 9, "do_sample": True})
        model.config.max_length = 6
        with pytest.warns(UserWarning, match=r"`model\.config\.max_length = 6` has no effect .* is 9: set that"):
            assert model.generation_defaults().max_length == 9
        # set in both places, as some scripts do
        model.config.max_length = model.generation_config.max_length = 12
        assert model.generation_defaults().max_length == 12

    def test_what_the_model_was_made_with(self) -> None:
        """Is in its generation configuration already, unless the checkpoint has one, which counts."""
        assert model_of(max_length=8).generation_defaults().max_length == 8
        loaded = model_of({"max_length": 9}, max_length=8)
        assert loaded.generation_defaults().max_length == 9

    def test_of_the_parts(self) -> None:
        """The depth decoder's count as its options of `generate`; the audio encoder has none."""
        config = tiny_moshi_config(num_hidden_layers=1)
        model = FlaxMoshiForConditionalGeneration(config, _do_init=False)
        model.generation_config.depth_decoder_config = {"do_sample": True, "top_k": 9}
        model.config.depth_decoder_config.temperature = 0.5
        model.config.depth_decoder_config.top_k = 3
        model.config.audio_encoder_config.top_k = 4
        with pytest.warns(UserWarning) as told:
            found = model.generation_defaults()
        assert found.depth_decoder_config == {"do_sample": True, "top_k": 9, "temperature": 0.5}
        assert model.generation_config.depth_decoder_config == {"do_sample": True, "top_k": 9}
        place = "`model.generation_config.depth_decoder_config"
        assert [str(warning.message) for warning in told] == [
            "`model.config.audio_encoder_config.top_k = 4` has no effect, as the audio encoder does not generate: "
            "take it back.",
            f"`model.config.depth_decoder_config.temperature = 0.5` counts for `generate`, which is deprecated: set "
            f"{place}['temperature']`.",
            f"`model.config.depth_decoder_config.top_k = 3` has no effect on `generate`, as {place}['top_k']` is 9: "
            "set that.",
        ]
        model.config.audio_encoder_config.top_k = model.config.depth_decoder_config.temperature = None
        model.generation_config.depth_decoder_config = GenerationConfig(do_sample=True)
        with pytest.warns(UserWarning, match=r"depth_decoder_config\.top_k = 3` counts"):
            assert model.generation_defaults().depth_decoder_config["top_k"] == 3
        with pytest.warns(UserWarning), pytest.raises(ValueError, match="`depth_decoder_top_k`"):
            model.config.depth_decoder_config.top_k = -1
            model.generate(np.ones((1, 2), np.int32))

    def test_arguments_of_the_call_come_first(self) -> None:
        ids, models = np.ones((1, 2), np.int32), []
        for model_class in (FlaxMoshiForCausalLM, FlaxMoshiForConditionalGeneration):
            models.append(model_class(tiny_moshi_config(num_hidden_layers=1), _do_init=False))
            models[-1].config.num_beams = 0
        causal, nested_model = models
        calls = (lambda: nested_model.generate(ids), lambda: causal.generate(ids), lambda: nested_model.streaming(1))
        with pytest.warns(UserWarning, match=r"model\.config\.num_beams") as told:
            for call in calls:
                with pytest.raises(ValueError, match="num_beams"):
                    call()
            config, _ = merge_generation_config(causal.generation_defaults(), GenerationConfig(num_beams=2), {})
        assert len(told) == 4 and config.num_beams == 2
