"""``FlaxGenerationMixin``: what ``generate`` of all models does around the compiled programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from transformers import GenerationConfig

from ..input_checks import (
    check_ids,
    check_left_padding,
    check_mask,
    check_rank,
    check_sizes,
    is_traced,
    is_tracing,
    is_whole,
)
from ..modeling_flax_outputs import FlaxModelOutput
from .arrays import cut, on_device, padded
from .beam_search import advance_beams, finish_beams, start_beams
from .buckets import bucket, prefill_chunk
from .configuration import Plan, merge_generation_config, resolve_plan
from .decoding import FREE, Decoder, Request, State, advance, repeat, start
from .programs import Program
from .recording import FRAME_NAMES, STEP_NAMES, Recording, unrolled
from .running import run
from .sampling import row_keys


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

    _generates = True

    def make_decoder(self) -> Decoder:
        """The decoder of the model's present module."""
        raise NotImplementedError(f"{type(self).__name__} must define make_decoder")

    def compiled(
        self, function: Callable, donated: tuple[int, ...] = (), /, *, quickly: bool = False, **static: Any
    ) -> Program:
        """The program of ``function(decoder, ..., **static)``, made once per model and static options.

        ``donated`` are positions among the arguments after the decoder; for ``quickly`` see :class:`Program`.
        """
        if getattr(self, "_programs_of", None) is not self.module:
            self._programs_of, self._programs, self._decoder = self.module, {}, self.make_decoder()
        key = (function, quickly, *sorted(static.items()))
        if key not in self._programs:
            decoder = self._decoder

            def program(*args):
                return function(decoder, *args, **static)

            program.__name__ = function.__name__
            self._programs[key] = Program(program, donated, quickly)
        return self._programs[key]

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
        ``max_length`` columns; called eagerly they are cut after the longest row.

        Args:
            input_ids: the prompt, ``(batch, length)``, left-padded if rows differ.
            generation_config: options; what is None in it comes from the model's ``generation_config``.
            prng_key: a key, or one per row, for sampling (default: ``jax.random.key(0)``). A row's result depends on
                its own key only.
            trace: False runs without compilation, for debugging.
            params: the parameters (default: the model's own).
            logits_processor: ``processor(sequences, scores, length) -> scores`` or a list of such, applied to the
                scores of each step before sampling; ``sequences`` has ``length`` columns in use.
            streamer: an object with ``put`` and ``end``, as ``transformers.TextStreamer``, that gets the ids of the
                prompt and then of every new column ``(batch,)`` while generation goes on. Not under ``jax.jit``.
            forced_text_ids: the new tokens from the first on, ``(batch, tokens)``, at most all of them; -1 where the
                model chooses.
            **kwargs: fields of ``GenerationConfig``, ``attention_mask`` ``(batch, length)``, and ``stop_lengths``
                ``(batch,)``, after how many new tokens each row ends at the latest. Without a mask, ``pad_token_id``
                in the prompt is masked unless it is also an end or the start token. ``inputs_embeds``
                ``(batch, length, hidden_size)`` are the prompt's embeddings, in the place of those of the ids:
                sequences then begin with ``input_ids`` if they are given, and with the new tokens otherwise.
                ``logits_to_keep`` is taken as upstream does: logits of the last column are all that is ever needed.

        Raises:
            ValueError: for unknown or unsupported options (named), a wrong shape, ids outside the vocabulary.
        """
        config, inputs = merge_generation_config(self.generation_defaults(), generation_config, kwargs, TEXT_INPUTS)
        attention_mask, inputs_embeds = inputs.get("attention_mask"), inputs.get("inputs_embeds")
        vocab_size = self.config.vocab_size
        batch_size, length = check_prompt(self.config, input_ids, inputs_embeds, inputs.get("logits_to_keep"))
        text_prompt = input_ids is not None
        if attention_mask is not None:
            check_mask("attention_mask", attention_mask, batch_size, (length,))
            check_left_padding("attention_mask", attention_mask)
        else:
            pad, eos = config.pad_token_id, config.eos_token_id
            unmasked = pad is None or pad == vocab_size or pad in (eos if isinstance(eos, list | tuple) else [eos])
            if unmasked or not text_prompt:
                attention_mask = np.ones((batch_size, length), dtype=bool)
            else:
                # on the host where the values are known, inside of jax.jit too
                attention_mask = (input_ids if is_traced(input_ids) else np.asarray(input_ids)) != pad
            otherwise = ", or pass an `attention_mask` if it is part of the text"
            check_left_padding("input_ids", attention_mask, f"`pad_token_id` = {pad}", otherwise)
        if not text_prompt:
            # no id of the vocabulary, so that no processor of logits takes it for a part of the history
            input_ids = np.full((batch_size, length), vocab_size)
        plan = resolve_plan(
            config, length, vocab_size, batch_size, attention_mask, inputs.get("stop_lengths"), logits_processor
        )
        if forced_text_ids is not None:
            axes = {"batch": batch_size}
            check_forced("forced_text_ids", forced_text_ids, axes, plan.max_length - length, vocab_size)
        operands = (prng_key, plan.sampling, forced_text_ids)
        traced = is_tracing(input_ids, inputs_embeds, attention_mask, params, operands)
        check_watching(plan, streamer, traced)
        params = self.whole_params(params)
        capacity = capacity_of(plan, traced)
        streams = None if inputs_embeds is None else on_device(padded(inputs_embeds, capacity, 0, axis=1))
        request = self.make_request(
            plan, input_ids, attention_mask, prng_key, capacity, forced_text_ids, streams=streams
        )
        with jax.disable_jit(not trace):
            state, more = self.decode(plan, request, length, params, streamer)
        sequences = state.sequences
        if not is_traced(sequences):
            sequences = cut(sequences, int(state.lengths.max()))
        if not text_prompt:
            sequences = sequences[:, length:] if traced else on_device(np.asarray(sequences)[:, length:])
        return OUTPUTS[plan.num_beams > 1, plan.sampling.do_sample](sequences=sequences, **more)

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
        check_rank("sequences", sequences, ("batch", "length"))
        xp = jnp if is_traced(sequences, beam_indices, *scores) else np
        stacked = xp.stack([xp.asarray(each) for each in scores], axis=1)  # [rows, steps, vocab]
        sequences = xp.asarray(sequences)
        if beam_indices is None:
            beam_indices = xp.broadcast_to(xp.arange(len(stacked))[:, None], stacked.shape[:2])
        beam_indices = xp.asarray(beam_indices)
        ended = beam_indices < 0
        steps = beam_indices.shape[1] if xp is jnp else int((~ended).sum(axis=-1).max())
        beam_indices, ended = beam_indices[:, :steps], ended[:, :steps]
        if beam_indices.shape[0] != len(sequences) or steps > min(stacked.shape[1], sequences.shape[1]):
            raise ValueError(
                f"`sequences` of the shape {sequences.shape}, {stacked.shape[1]} `scores` and `beam_indices` for "
                f"{beam_indices.shape[0]} rows do not belong together: pass those of one call of `generate`"
            )
        tokens = sequences[:, sequences.shape[1] - steps :]
        if xp is np:
            check_ids("sequences", np.where(ended, 0, tokens), stacked.shape[-1])
        if normalize_logits:
            stacked = jax.nn.log_softmax(jnp.asarray(stacked), axis=-1)
        rows = xp.where(ended, 0, beam_indices)
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
        ids = np.full((batch_size, prompt_length), self.config.vocab_size)
        options = one_token(options, batch_size, max_new_tokens)
        jax.block_until_ready(self.generate(ids, **options))

    def make_request(
        self,
        plan: Plan,
        input_ids: ArrayLike,
        attention_mask: ArrayLike,
        prng_key: jax.Array | None,
        capacity: int,
        forced_text_ids: ArrayLike | None = None,
        **extra: Any,
    ) -> Request:
        """The operands of the programs; ids and mask are padded to ``capacity`` columns."""
        batch_size, length = np.shape(input_ids)
        forced_ids = None
        if forced_text_ids is not None:
            xp = jnp if is_traced(forced_text_ids) else np
            prompt = np.full((batch_size, length), FREE, dtype=np.int32)
            forced_ids = xp.concatenate([prompt, xp.asarray(forced_text_ids).astype(np.int32)], axis=1)
            forced_ids = on_device(padded(forced_ids, capacity, FREE), np.int32)
        limits = np.full((batch_size,), plan.max_length) if plan.stop_lengths is None else plan.stop_lengths
        return Request(
            input_ids=on_device(padded(input_ids, capacity, plan.pad_token_id), np.int32),
            attention_mask=on_device(padded(attention_mask, capacity, True), bool),
            prompt_length=on_device(length, np.int32),
            limits=on_device(limits, np.int32),
            keys=row_keys(jax.random.key(0) if prng_key is None else prng_key, batch_size),
            sampling=plan.sampling,
            eos_token_ids=on_device(end_tokens(plan.eos_token_ids), np.int32),
            pad_token_id=on_device(plan.pad_token_id, np.int32),
            forced_ids=forced_ids,
            **extra,
        )

    def decode(
        self,
        plan: Plan,
        request: Request,
        prompt_length: int,
        params: Any,
        streamer: Any | None = None,
        audio_codes: Callable | None = None,
    ) -> tuple[State, dict[str, Any]]:
        """Runs the programs of a request; returns the last state and the fields of outputs beside the tokens."""
        traced = is_tracing(request, params)
        new_tokens = plan.max_length - prompt_length
        names = tuple(name for name in (*STEP_NAMES, *FRAME_NAMES) if getattr(plan, f"output_{name}"))
        recording = Recording(names, bucket(new_tokens) if names else 0)
        chunk = prompt_length - 1 if traced else prefill_chunk(prompt_length - 1)
        chunk = min(chunk, request.input_ids.shape[1])
        state = self.compiled(start, chunk=chunk, recording=recording)(params, request)
        if plan.num_beams > 1:
            return self.decode_beams(plan, request, state, prompt_length, params, recording)
        if plan.num_return_sequences > 1:
            request, state = self.compiled(repeat, copies=plan.num_return_sequences)(request, state)
        program = self.compiled(advance, (2,), recording=recording)
        state = run(
            lambda state, until: program(params, request, state, on_device(until, np.int32)),
            state,
            prompt_length,
            plan.max_length,
            streamer,
            plan.max_time,
            audio_codes,
        )
        reached = plan.max_length if is_traced(state.lengths) else int(state.lengths.max())
        return state, dict(unrolled(state.records, prompt_length, reached))

    def decode_beams(
        self, plan: Plan, request: Request, state: State, prompt_length: int, params: Any, recording: Recording
    ) -> tuple[State, dict[str, Any]]:
        """Beam search from the state after the prompt on; returns as :meth:`decode` does."""
        length_penalty = on_device(plan.length_penalty, np.float32)
        request, state = start_beams(request, state, num_beams=plan.num_beams)
        program = self.compiled(advance_beams, (3,), early_stopping=plan.early_stopping, recording=recording)
        state = run(
            lambda state, until: program(params, request, length_penalty, state, on_device(until, np.int32)),
            state,
            prompt_length,
            plan.max_length,
            max_time=plan.max_time,
        )
        state, scores, beam_indices = finish_beams(
            request, length_penalty, state, num_return_sequences=plan.num_return_sequences
        )
        searched = reached = plan.max_length
        if not is_traced(scores):
            searched, reached = int(state.position), int(state.lengths.max())
        beam_indices = cut(beam_indices, reached - prompt_length)
        more = unrolled(state.records, prompt_length, searched)
        return state, {"sequences_scores": scores, "beam_indices": beam_indices, **more}


TEXT_INPUTS = ("attention_mask", "stop_lengths", "inputs_embeds", "logits_to_keep")
"""Arguments of a prompt of text that are no fields of a generation configuration."""


def check_prompt(config: Any, input_ids: Any, inputs_embeds: Any, logits_to_keep: Any) -> tuple[int, int]:
    """Batch size and length of a prompt of text; ValueError if it has a wrong shape, is empty or has unknown ids."""
    if input_ids is None and inputs_embeds is None:
        raise ValueError("`input_ids` is missing: pass the prompt's ids, (batch, length), or `inputs_embeds`.")
    if logits_to_keep is not None and (not is_whole(logits_to_keep) or logits_to_keep < 0):
        raise ValueError(f"`logits_to_keep` must be a whole number of at least 0, but is {logits_to_keep!r}.")
    shapes = {}
    if input_ids is not None:
        check_rank("input_ids", input_ids, ("batch", "length"))
        check_ids("input_ids", input_ids, config.vocab_size + 1)
        shapes["input_ids"] = np.shape(input_ids)
    if inputs_embeds is not None:
        check_rank("inputs_embeds", inputs_embeds, ("batch", "length", "hidden_size"))
        if np.shape(inputs_embeds)[2] != config.hidden_size:
            raise ValueError(
                f"`inputs_embeds` must have {config.hidden_size} features (`hidden_size`), but has "
                f"{np.shape(inputs_embeds)[2]}."
            )
        shapes["inputs_embeds"] = np.shape(inputs_embeds)[:2]
    name, (batch_size, length) = next(iter(shapes.items()))
    if length == 0:
        raise ValueError(f"`{name}` is empty: pass at least one token, such as the start token `vocab_size`.")
    if len({*shapes.values()}) > 1:
        raise ValueError(f"`input_ids` must have one id for each of `inputs_embeds`, but their shapes are {shapes}.")
    return batch_size, length


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


def check_forced(name: str, ids: ArrayLike, axes: dict[str, int], new_tokens: int, vocab_size: int) -> None:
    """Raises ``ValueError`` unless ``ids`` are of ``axes`` (name -> size) and at most all new tokens, -1 or known."""
    check_rank(name, ids, (*axes, "new tokens"))
    check_ids(name, ids, vocab_size, allowed=(FREE,), remedy="-1 leaves the choice to the model.")
    *leading, length = np.shape(ids)
    if leading != [*axes.values()] or not 0 < length <= new_tokens:
        raise ValueError(
            f"`{name}` must have the shape ({', '.join(map(str, axes.values()))}, 1 to {new_tokens} new tokens), but "
            f"has the shape {np.shape(ids)}: pass fewer or raise `max_new_tokens`."
        )


def end_tokens(ids: tuple[int, ...]) -> np.ndarray:
    """``ids`` with what is no token behind them, so that requests of few or no ends share programs."""
    return np.array([*ids, *[FREE] * (-len(ids) % 4 if ids else 4)])


def one_token(options: dict[str, Any], batch_size: int, max_new_tokens: int | None) -> dict[str, Any]:
    """Options of a call that compiles what the given ones need and generates one token only."""
    options = {"stop_lengths": np.ones(batch_size, dtype=np.int32), **options}
    return options if max_new_tokens is None else {**options, "max_new_tokens": max_new_tokens}


def capacity_of(plan: Plan, traced: bool) -> int:
    """Columns of the programs: a bucket, so that they are shared; exactly what is needed inside another program."""
    return plan.max_length if traced else bucket(plan.max_length)
