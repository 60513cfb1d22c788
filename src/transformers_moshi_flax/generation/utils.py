"""``FlaxGenerationMixin``: what ``generate`` of all models does around the compiled programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from transformers import GenerationConfig

from ..input_checks import (
    AnyArray,
    Input,
    check_ids,
    check_input,
    check_inputs,
    check_left_padding,
    check_sizes,
    is_traced,
    is_tracing,
    is_whole,
)
from ..modeling_flax_outputs import FlaxModelOutput
from .arrays import cut, on_device, on_host, padded
from .beam_search import advance_beams, finish_beams, start_beams
from .buckets import bucket, prefill_chunk
from .configuration import Plan, merge_generation_config, resolve_plan
from .decoding import UNFORCED, Decoder, Request, State, advance, repeat, start
from .programs import Program
from .recording import FRAME_NAMES, STEP_NAMES, Recording, unrolled
from .running import run
from .sampling import default_key, row_keys


@dataclasses.dataclass
class FlaxGreedySearchOutput(FlaxModelOutput):
    """Output of greedy search.

    Attributes:
        sequences: prompt and generated ids, ``(batch, length)`` int32.
        scores, logits: processed and raw logits of every new token, each ``(batch, vocab_size)``.
        attentions, hidden_states: of every new token, tuples over the layers; the first those of the whole prompt.
    """

    sequences: jax.Array | None = None
    scores: tuple[jax.Array, ...] | None = None
    logits: tuple[jax.Array, ...] | None = None
    attentions: tuple[tuple[jax.Array, ...], ...] | None = None
    hidden_states: tuple[tuple[jax.Array, ...], ...] | None = None


@dataclasses.dataclass
class FlaxSampleOutput(FlaxGreedySearchOutput):
    """Output of sampling, ``(batch * num_return_sequences, ...)``; the rest as :class:`FlaxGreedySearchOutput`."""


@dataclasses.dataclass
class FlaxBeamSearchOutput(FlaxGreedySearchOutput):
    """Output of beam search, ``(batch * num_return_sequences, ...)``, the best hypothesis of each row first.

    ``scores`` (processed log-probabilities), ``logits``, ``attentions`` and ``hidden_states`` are those of the
    ``batch * num_beams`` running beams in every step that was made.

    Attributes:
        sequences_scores: sums of log-probabilities divided by ``new tokens ** length_penalty``.
        beam_indices: which beam (``row * num_beams + beam``) every new token continued, -1 after the end.
    """

    sequences_scores: jax.Array | None = None
    beam_indices: jax.Array | None = None


@dataclasses.dataclass
class FlaxBeamSampleOutput(FlaxBeamSearchOutput):
    """Output of beam search with sampling; as :class:`FlaxBeamSearchOutput`."""


OUTPUTS = {
    (False, False): FlaxGreedySearchOutput,
    (False, True): FlaxSampleOutput,
    (True, False): FlaxBeamSearchOutput,
    (True, True): FlaxBeamSampleOutput,
}
"""The class of outputs by whether there are beams and whether tokens are drawn."""


class FlaxGenerationMixin:
    """``generate`` for models with a :class:`~transformers_moshi_flax.generation.decoding.Decoder`.

    The compiled programs are kept on the model, one per shapes and static options; generation itself keeps nothing
    there.
    """

    # of the model
    config: Any
    module: Any
    extra_input_ids: Any
    text_config: Any
    generation_defaults: Callable[..., GenerationConfig | None]
    whole_params: Callable[..., Any]
    _compiled: Callable[[], dict[Any, Any]]

    _generates = True

    def make_decoder(self) -> Decoder:
        """The decoder of the model's present module."""
        raise NotImplementedError(f"{type(self).__name__} must define make_decoder")

    def compiled(
        self, function: Callable, donated: tuple[int, ...] = (), /, *, unoptimized: bool = False, **static: Any
    ) -> Program:
        """The program of ``function(decoder, ..., **static)``, made once per model and static options.

        ``donated`` are positions among the arguments after the decoder; for ``unoptimized`` see :class:`Program`.
        """
        programs = self._compiled()
        key = (function, unoptimized, *sorted(static.items()))
        if key not in programs:
            if Decoder not in programs:  # of the present module, as they are
                programs[Decoder] = self.make_decoder()
            decoder = programs[Decoder]

            def program(*args):
                return function(decoder, *args, **static)

            program.__name__ = function.__name__
            programs[key] = Program(program, donated, unoptimized)
        return programs[key]

    def generate(
        self,
        input_ids: ArrayLike | None = None,
        generation_config: GenerationConfig | None = None,
        prng_key: jax.Array | None = None,
        trace: bool = True,
        params: Any | None = None,
        logits_processor: Callable | list[Callable] | None = None,
        streamer: Any | None = None,
        forced_text_ids: ArrayLike | None = None,
        **kwargs: Any,
    ) -> FlaxGreedySearchOutput | FlaxSampleOutput:
        """Generates text ids: greedily, by sampling, or with beams.

        Prompt and loop are two XLA programs, compiled once per batch size, capacity (prompt and new tokens, rounded
        up) and kind of options; numbers among the options compile nothing. Inside ``jax.jit`` the sequences have
        ``max_length`` tokens; called eagerly they are cut after the longest row.

        Args:
            input_ids: the prompt, ``(batch, length)``, left-padded if rows differ.
            generation_config: options; what is None in it comes from the model's ``generation_config``.
            prng_key: a key, or one per row, for sampling (default: ``jax.random.key(0)``). A row's result depends on
                its own key only.
            trace: False runs without compilation, for debugging.
            params: the parameters (default: the model's own).
            logits_processor: ``processor(sequences, scores, length) -> scores`` or a list of such, applied to the
                scores of each step before sampling; ``sequences`` has ``length`` tokens in use.
            streamer: an object with ``put`` and ``end``, as ``transformers.TextStreamer``, that gets the ids of the
                prompt and then of every new step ``(batch,)`` while generation goes on. Not under ``jax.jit``.
            forced_text_ids: the new tokens from the first on, ``(batch, tokens)``, at most all of them; -1 where the
                model chooses.
            **kwargs: fields of ``GenerationConfig``, ``attention_mask`` ``(batch, length)``, and ``stop_lengths``
                ``(batch,)``, after how many new tokens each row ends at the latest. Without a mask, ``pad_token_id``
                in the prompt is masked unless it is also an end or the start token. ``inputs_embeds``
                ``(batch, length, hidden_size)`` are the prompt's embeddings, in the place of those of the ids:
                sequences then begin with ``input_ids`` if they are given, and with the new tokens otherwise.
                ``logits_to_keep`` is taken as upstream does: logits of the last token are all that is ever needed.

        Raises:
            ValueError: for unknown or unsupported options (named), a wrong shape, ids outside the vocabulary.
        """
        given = {"input_ids": input_ids, "forced_text_ids": forced_text_ids}
        prepared = self._prepare(given, generation_config, prng_key, params, logits_processor, streamer, kwargs)
        with jax.disable_jit(not trace):
            state, found = self.decode(prepared)
        return self._finish_text(prepared, state, found)

    def _prepare(
        self,
        given: dict[str, Any],
        generation_config: GenerationConfig | None,
        prng_key: jax.Array | None,
        params: Any | None,
        logits_processor: Callable | list[Callable] | None,
        streamer: Any | None,
        kwargs: dict[str, Any],
    ) -> Prepared:
        """What :meth:`generate` is called with, checked and on the device."""
        config, inputs = merge_generation_config(self.generation_defaults(), generation_config, kwargs, TEXT_INPUTS)
        given = on_host({**given, **inputs})
        batch_size, length = check_prompt(self.text_config, self.text_config.vocab_size + self.extra_input_ids, given)
        input_ids, inputs_embeds = given["input_ids"], given.get("inputs_embeds")
        attention_mask = text_mask(config, given, batch_size, length, self.text_config.vocab_size)
        if input_ids is None:
            # no id of the vocabulary, so that no processor of logits takes it for a part of the history
            input_ids = np.full((batch_size, length), self.text_config.vocab_size)
        plan = resolve_plan(
            config,
            length,
            self.text_config.vocab_size,
            batch_size,
            attention_mask,
            given.get("stop_lengths"),
            logits_processor,
        )
        forced = {"forced_text_ids": forced_input(self.text_config.vocab_size, {}, plan.max_length - length)}
        check_inputs(forced, given, {"batch": batch_size})
        traced = is_tracing(input_ids, inputs_embeds, attention_mask, params, prng_key, plan.sampling, given)
        check_watching(plan, streamer, traced)
        capacity = capacity_of(plan, traced)
        request = self.make_request(
            plan,
            input_ids,
            attention_mask,
            prng_key,
            capacity,
            given["forced_text_ids"],
            streams=None if inputs_embeds is None else on_device(padded(inputs_embeds, capacity, 0, axis=1)),
        )
        has_text = given["input_ids"] is not None
        return Prepared(
            plan, request, length, self.whole_params(params, batch_size), has_text=has_text, streamer=streamer
        )

    def _finish_text(self, prepared: Prepared, state: State, found: dict[str, Any]) -> Any:
        """The outputs of :meth:`generate`, cut after the longest row."""
        plan, begin = prepared.plan, 0 if prepared.has_text else prepared.prompt_length
        reached = fetch(prepared, state)
        return OUTPUTS[plan.num_beams > 1, plan.sampling.do_sample](
            sequences=cut(state.sequences, reached.length - begin, start=begin),
            **further_outputs(prepared, state, found, reached),
        )

    def compute_transition_scores(
        self,
        sequences: ArrayLike,
        scores: tuple[ArrayLike, ...],
        beam_indices: ArrayLike | None = None,
        normalize_logits: bool = False,
    ) -> jax.Array:
        """The scores of the tokens that were generated, from what ``generate`` returned.

        Args:
            sequences: ``(batch, length)``, with or without the prompt.
            scores: ``output_scores=True`` (or ``output_logits=True``) returns them: for each new token,
                ``(batch * num_beams, vocab_size)``.
            beam_indices: those of beam search, ``(batch, new tokens)``, -1 after the end.
            normalize_logits: make log-probabilities of them first.

        Returns:
            ``(batch, new tokens)``; of beam search, as many as the longest hypothesis has, and 0 after the end.

        Raises:
            ValueError: shapes that do not belong together, tokens outside the vocabulary.
        """
        if not isinstance(scores, list | tuple) or not scores:
            raise ValueError("`scores` must be a tuple with an array for each new token: generate with output_scores")
        check_input("sequences", sequences, Input({"batch": None, "length": None}, "ids"))
        xp = jnp if is_traced(sequences, beam_indices, *scores) else np
        stacked: Any = xp.stack([xp.asarray(each) for each in scores], axis=1)  # [rows, steps, vocab]
        ids: Any = xp.asarray(sequences)
        beams: Any = xp.broadcast_to(xp.arange(len(stacked))[:, None], stacked.shape[:2])
        if beam_indices is not None:
            beams = xp.asarray(beam_indices)
        ended = beams < 0
        steps = beams.shape[1] if xp is jnp else int((~ended).sum(axis=-1).max())
        beams, ended = beams[:, :steps], ended[:, :steps]
        if beams.shape[0] != len(ids) or steps > min(stacked.shape[1], ids.shape[1]):
            raise ValueError(
                f"`sequences` of the shape {ids.shape}, {stacked.shape[1]} `scores` and `beam_indices` for "
                f"{beams.shape[0]} rows do not belong together: pass those of one call of `generate`"
            )
        tokens = ids[:, ids.shape[1] - steps :]
        if xp is np:
            check_ids("sequences", np.where(ended, 0, tokens), stacked.shape[-1])
        if normalize_logits:
            stacked = jax.nn.log_softmax(jnp.asarray(stacked), axis=-1)
        rows = xp.where(ended, 0, beams)
        chosen = stacked[rows, xp.arange(steps)[None], xp.where(ended, 0, tokens)]
        return jnp.where(ended, jnp.zeros((), chosen.dtype), chosen)

    def warmup(
        self, batch_size: int = 1, prompt_length: int = 1, max_new_tokens: int | None = None, **options: Any
    ) -> None:
        """Compiles the programs that ``generate`` will need, ahead of time.

        Args:
            batch_size: rows of the prompt.
            prompt_length: its tokens; other lengths of the same buckets share the programs.
            max_new_tokens: as of :meth:`generate`; ``max_length`` among the options does as well.
            **options: the other options of the calls to come. Only their kinds matter, not their numbers.

        Raises:
            ValueError: as :meth:`generate`, or a size is below 1.
        """
        check_sizes(batch_size=batch_size, prompt_length=prompt_length)
        ids = np.zeros((batch_size, prompt_length), dtype=np.int32)
        options = {"attention_mask": np.ones_like(ids), **options}
        options = one_token(options, batch_size, max_new_tokens)
        jax.block_until_ready(self.generate(ids, **options))

    def make_request(
        self,
        plan: Plan,
        input_ids: AnyArray,
        attention_mask: AnyArray,
        prng_key: jax.Array | None,
        capacity: int,
        forced_text_ids: ArrayLike | None = None,
        prompt_length: int | None = None,
        **extra: Any,
    ) -> Request:
        """The operands of the programs; ids and mask are padded to ``capacity``, or have room for so much already and
        are a prompt of ``prompt_length``."""
        batch_size, length = np.shape(input_ids)
        length = length if prompt_length is None else prompt_length
        forced_ids = None
        if forced_text_ids is not None:
            xp = jnp if is_traced(forced_text_ids) else np
            prompt = np.full((batch_size, length), UNFORCED, dtype=np.int32)
            forced_ids = xp.concatenate([prompt, xp.asarray(forced_text_ids).astype(np.int32)], axis=1)
            forced_ids = on_device(padded(forced_ids, capacity, UNFORCED), np.int32)
        limits = np.full((batch_size,), plan.max_length) if plan.stop_lengths is None else plan.stop_lengths
        return Request(
            input_ids=on_device(padded(input_ids, capacity, plan.pad_token_id), np.int32),
            attention_mask=on_device(padded(attention_mask, capacity, fill=True), bool),
            prompt_length=on_device(length, np.int32),
            limits=on_device(limits, np.int32),
            keys=row_keys(default_key() if prng_key is None else prng_key, batch_size),
            sampling=plan.sampling,
            eos_token_ids=on_device(end_tokens(plan.eos_token_ids), np.int32),
            pad_token_id=on_device(plan.pad_token_id, np.int32),
            forced_ids=forced_ids,
            **extra,
        )

    def decode(self, prepared: Prepared) -> tuple[State, dict[str, jax.Array]]:
        """Runs the programs of a request; returns the last state and what a search found beside it."""
        plan, request, params = prepared.plan, prepared.request, prepared.params
        prompt_length = prepared.prompt_length
        traced = is_tracing(request, params)
        names = tuple(name for name in (*STEP_NAMES, *FRAME_NAMES) if getattr(plan, f"output_{name}"))
        recording = Recording(names, bucket(plan.max_length - prompt_length) if names else 0)
        chunk = prompt_length - 1 if traced else prefill_chunk(prompt_length - 1)
        chunk = min(chunk, request.input_ids.shape[1])
        state = self.compiled(start, chunk=chunk, recording=recording)(params, request)
        if plan.num_beams > 1:
            return self._decode_beams(prepared, state, recording)
        if plan.num_return_sequences > 1:
            request, state = self.compiled(repeat, copies=plan.num_return_sequences)(request, state)
        program = self.compiled(advance, (2,), recording=recording)
        state = run(
            lambda state, until: program(params, request, state, on_device(until, np.int32)),
            state,
            prompt_length,
            plan.max_length,
            prepared.streamer,
            plan.max_time,
            prepared.audio_codes,
        )
        return state, {}

    def _decode_beams(
        self, prepared: Prepared, state: State, recording: Recording
    ) -> tuple[State, dict[str, jax.Array]]:
        """Beam search from the state after the prompt on; returns as :meth:`decode` does."""
        plan, params = prepared.plan, prepared.params
        length_penalty = on_device(plan.length_penalty, np.float32)
        request, state = start_beams(prepared.request, state, num_beams=plan.num_beams)
        program = self.compiled(advance_beams, (3,), early_stopping=plan.early_stopping, recording=recording)
        state = run(
            lambda state, until: program(params, request, length_penalty, state, on_device(until, np.int32)),
            state,
            prepared.prompt_length,
            plan.max_length,
            max_time=plan.max_time,
        )
        state, scores, beam_indices = finish_beams(
            request, length_penalty, state, num_return_sequences=plan.num_return_sequences
        )
        return state, {"sequences_scores": scores, "beam_indices": beam_indices}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A call of ``generate`` that has been checked: what the programs need, all of it on the device.

    Attributes:
        plan: its options.
        request: the operands of the programs.
        prompt_length: steps of the prompt.
        params: the parameters.
        has_text: whether the ids of the prompt were given, and are to be returned.
        streamer: who gets the tokens meanwhile, or None.
        audio_codes: for a streamer that takes them, the codes of a range of steps of a state.
    """

    plan: Plan
    request: Request
    prompt_length: int
    params: Any
    _: dataclasses.KW_ONLY
    has_text: bool
    streamer: Any = None
    audio_codes: Callable | None = None


class Reached(NamedTuple):
    """How far generation came.

    Attributes:
        length: of the longest sequence.
        steps: at which the search ended, those of the prompt included.
        frames: of audio in the longest row.
    """

    length: int
    steps: int
    frames: int = 0


def fetch(prepared: Prepared, state: State, audio_lengths: jax.Array | None = None) -> Reached:
    """How far generation came: all that the host has to know of it, in one transfer. Under ``jax.jit``, the most."""
    if is_traced(state.lengths):
        return Reached(prepared.plan.max_length, prepared.plan.max_length)
    lengths, position, frames = jax.device_get((state.lengths, state.position, audio_lengths))
    return Reached(int(lengths.max()), int(position), 0 if frames is None else int(frames.max()))


def further_outputs(prepared: Prepared, state: State, found: dict[str, jax.Array], reached: Reached) -> dict[str, Any]:
    """The fields of outputs beside tokens and audio."""
    begin = prepared.prompt_length
    if "beam_indices" in found:
        found = {**found, "beam_indices": cut(found["beam_indices"], reached.length - begin)}
    # of beams, those of every step that was made; a hypothesis may have ended before
    end = reached.steps if prepared.plan.num_beams > 1 else reached.length
    return {**found, **unrolled(state.records, begin, end)}


TEXT_INPUTS = ("attention_mask", "stop_lengths", "inputs_embeds", "logits_to_keep")
"""Arguments of a prompt of text that are no fields of a generation configuration."""


def check_prompt(config: Any, ids: int, given: dict[str, Any]) -> tuple[int, int]:
    """Batch size and length of a prompt of text; ValueError if it has a wrong shape, is empty or has other than the
    first ``ids`` ids."""
    if given["input_ids"] is None and given.get("inputs_embeds") is None:
        raise ValueError("`input_ids` is missing: pass the prompt's ids, (batch, length), or `inputs_embeds`.")
    keep = given.get("logits_to_keep")
    if keep is not None and (not is_whole(keep) or keep < 0):
        raise ValueError(f"`logits_to_keep` must be a whole number of at least 0, but is {keep!r}.")
    axes = {"batch": None, "tokens": None}
    table = {
        "input_ids": Input(axes, "ids", ids),
        "inputs_embeds": Input({**axes, "hidden_size": config.hidden_size}, "floats"),
        "attention_mask": Input(axes, "mask"),
    }
    sizes = check_inputs(table, given)
    return sizes["batch"], sizes["tokens"]


def text_mask(config: GenerationConfig, given: dict[str, Any], batch_size: int, length: int, start: int) -> AnyArray:
    """The mask of a prompt of text that was given, or that of its ids of padding.

    Args:
        config: has the padding, and the ends and the ``start`` token, which are none.
        given: the prompt.
    """
    input_ids, mask = given["input_ids"], given.get("attention_mask")
    if mask is not None:
        check_left_padding("attention_mask", mask)
        return mask
    pad, eos = config.pad_token_id, config.eos_token_id
    unmasked = pad is None or pad == start or pad in (eos if isinstance(eos, list | tuple) else [eos])
    if unmasked or input_ids is None:
        return np.ones((batch_size, length), dtype=bool)
    # on the host where the values are known, inside of jax.jit too
    mask = (input_ids if is_traced(input_ids) else np.asarray(input_ids)) != pad
    otherwise = ", or pass an `attention_mask` if it is part of the text"
    check_left_padding("input_ids", mask, f"`pad_token_id` = {pad}", otherwise)
    return mask


def check_watching(plan: Plan, streamer: Any, traced: bool) -> None:
    """Raises ``ValueError`` if generation cannot be run in pieces as ``streamer`` or ``max_time`` want it."""
    if traced:
        for name, value in (("streamer", streamer), ("max_time", plan.max_time)):
            if value is not None:
                raise ValueError(f"`{name}` cannot be used inside of `jax.jit`: call `generate` eagerly.")
    if streamer is None:
        return
    for method in ("put", "end"):
        if not callable(getattr(streamer, method, None)):
            raise ValueError(
                f"`streamer` must have a method `{method}`, as transformers' streamers, but is {streamer!r}."
            )
    if plan.num_beams > 1:
        raise ValueError(
            f"`streamer` cannot be used with `num_beams={plan.num_beams}`, as no token is final before the end: "
            "leave one of them out."
        )


def forced_input(vocab_size: int, axes: dict[str, int], new_tokens: int) -> Input:
    """Tokens that are not to be chosen: for some of the new ones, from the first on.

    Args:
        vocab_size: of their ids.
        axes: between that of the rows and that of the new tokens.
        new_tokens: how many there will be.
    """
    return Input(
        {"batch": None, **axes, "new tokens": range(1, new_tokens + 1)},
        "ids",
        vocab_size,
        allowed=(UNFORCED,),
        hint="pass fewer or raise `max_new_tokens`",
        remedy=f"{UNFORCED} leaves the choice to the model.",
    )


def end_tokens(ids: tuple[int, ...]) -> np.ndarray:
    """``ids`` with -1, which is no token, behind them, so that requests of few or no ends share programs."""
    return np.array([*ids, *[-1] * (-len(ids) % 4 if ids else 4)])


def one_token(options: dict[str, Any], batch_size: int, max_new_tokens: int | None) -> dict[str, Any]:
    """Options of a call that compiles what the given ones need and generates one token only."""
    options = {"stop_lengths": np.ones(batch_size, dtype=np.int32), **options}
    return options if max_new_tokens is None else {**options, "max_new_tokens": max_new_tokens}


def capacity_of(plan: Plan, traced: bool) -> int:
    """Columns of the programs: a bucket, so that they are shared; exactly what is needed inside another program."""
    return plan.max_length if traced else bucket(plan.max_length)
