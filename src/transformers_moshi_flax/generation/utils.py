"""``FlaxGenerationMixin``: text generation as one compiled program, prefill and time loop included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from transformers import GenerationConfig

from ..input_checks import check_ids, check_mask, check_rank, is_traced
from ..modeling_flax_outputs import FlaxModelOutput
from .configuration import merge_generation_config, resolve_plan
from .programs import Program
from .sampling import row_keys, select_token


@flax.struct.dataclass
class FlaxGreedySearchOutput(FlaxModelOutput):
    """``sequences``: prompt and generated ids, ``(batch, length)`` int32."""

    sequences: jax.Array | None = None


@flax.struct.dataclass
class FlaxSampleOutput(FlaxModelOutput):
    """``sequences``: prompt and sampled ids, ``(batch, length)`` int32."""

    sequences: jax.Array | None = None


def cut(array: jax.Array, length: int) -> jax.Array:
    """The first ``length`` entries of the last axis, cut on the host: XLA would compile a program for each length."""
    return array if array.shape[-1] == length else jnp.asarray(np.asarray(array)[..., :length])


def is_in(tokens: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    """Which tokens are among ``ids``."""
    found = jnp.zeros(tokens.shape, dtype=bool)
    for token in ids:
        found |= tokens == token
    return found


def fold_step(keys: jax.Array, step: Any) -> jax.Array:
    """The keys of one step. Steps count from the first generated token, so that padding does not change them."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, step)


class FlaxGenerationMixin:
    """``generate`` for models whose call takes ``input_ids`` and a cache of ``init_cache``.

    The compiled programs are kept on the model, one per shapes and options; generation itself keeps nothing there.
    """

    _generates = True

    def compiled(self, function: Callable, **static: Any) -> Program:
        """The program of ``function(module, ..., **static)``, made once per model and static options."""
        programs = self.__dict__.setdefault("_programs", {})
        key = (function, id(self.module), *sorted(static.items()))
        if key not in programs:
            module = self.module

            def program(*args):
                return function(module, *args, **static)

            program.__name__ = function.__name__
            # the module is kept with its program, so that its id is not used again
            programs[key] = (Program(program), module)
        return programs[key][0]

    def generate(
        self,
        input_ids: ArrayLike | None = None,
        generation_config: GenerationConfig | None = None,
        prng_key: jax.Array | None = None,
        trace: bool = True,
        params: Any | None = None,
        logits_processor: Callable | list[Callable] | None = None,
        **kwargs: Any,
    ) -> FlaxGreedySearchOutput | FlaxSampleOutput:
        """Generates text ids, greedily or by sampling.

        Prefill and loop are one XLA program, compiled once per shapes and options. Inside ``jax.jit`` the sequences
        have ``max_length`` columns; called eagerly they are cut after the longest row.

        Args:
            input_ids: the prompt, ``(batch, length)``, left-padded if rows differ.
            generation_config: options; what is None in it comes from the model's ``generation_config``.
            prng_key: a key, or one per row, for sampling (default: ``jax.random.key(0)``). A row's result depends on
                its own key only.
            trace: False runs without compilation, for debugging.
            params: the parameters (default: the model's own).
            logits_processor: ``processor(sequences, scores, length) -> scores`` or a list of such, applied to the
                scores of each step before sampling; ``sequences`` is ``(batch, max_length)`` with ``length`` columns
                in use.
            **kwargs: fields of ``GenerationConfig`` and ``attention_mask`` ``(batch, length)``. Without a mask,
                ``pad_token_id`` in the prompt is masked unless it is also an end or the start token.

        Raises:
            ValueError: for unknown or unsupported options (named), a wrong shape, ids outside the vocabulary.
        """
        if input_ids is None:
            raise ValueError("`input_ids` is missing: pass the prompt's ids, (batch, length).")
        check_rank("input_ids", input_ids, ("batch", "length"))
        batch_size, length = np.shape(input_ids)
        if length == 0:
            raise ValueError("`input_ids` is empty: pass at least one token, such as the start token `vocab_size`.")
        vocab_size = self.config.vocab_size
        check_ids("input_ids", input_ids, vocab_size + 1)
        config, inputs = merge_generation_config(
            self.generation_config, generation_config, kwargs, extra=("attention_mask",)
        )
        input_ids = jnp.asarray(input_ids).astype(jnp.int32)
        attention_mask = inputs.get("attention_mask")
        if attention_mask is not None:
            check_mask("attention_mask", attention_mask, batch_size, (length,))
            attention_mask = jnp.asarray(attention_mask).astype(bool)
        else:
            attention_mask = jnp.ones(input_ids.shape, dtype=bool)
            pad, eos = config.pad_token_id, config.eos_token_id
            if pad is not None and pad != vocab_size and pad not in (eos if isinstance(eos, list | tuple) else [eos]):
                attention_mask = input_ids != pad
        plan = resolve_plan(config, length, vocab_size, batch_size, attention_mask, logits_processor=logits_processor)
        keys = row_keys(jax.random.key(0) if prng_key is None else prng_key, batch_size)
        program = self.compiled(
            generate_text,
            make_cache=self.init_cache,
            max_length=plan.max_length,
            eos_token_ids=plan.eos_token_ids,
            pad_token_id=plan.pad_token_id,
        )
        params = self.params if params is None else params
        with jax.disable_jit(not trace):
            sequences, ends = program(params, input_ids, attention_mask, keys, plan.sampling)
        if not is_traced(sequences) and plan.eos_token_ids:
            sequences = cut(sequences, int(ends.max()))
        output_class = FlaxSampleOutput if plan.sampling.do_sample else FlaxGreedySearchOutput
        return output_class(sequences=sequences)


def generate_text(
    module,
    params,
    input_ids,
    attention_mask,
    keys,
    sampling,
    *,
    make_cache: Callable,
    max_length: int,
    eos_token_ids: tuple[int, ...],
    pad_token_id: int,
) -> tuple[jax.Array, jax.Array]:
    """The program of ``generate``: the sequences ``(batch, max_length)`` and where each row ends, ``(batch,)``."""
    batch_size, prompt_length = input_ids.shape

    sequences = jnp.full((batch_size, max_length), pad_token_id, dtype=jnp.int32)
    sequences = lax.dynamic_update_slice_in_dim(sequences, input_ids, 0, axis=1)
    attended = jnp.ones((batch_size, max_length), dtype=bool)
    attended = lax.dynamic_update_slice_in_dim(attended, attention_mask, 0, axis=1)

    def feed(cache, ids, mask):
        return module.apply(
            {"params": params}, input_ids=ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1
        )

    # all tokens of the prompt but the last, which begins the loop; the last token of all is never fed
    cache = make_cache(batch_size, max_length - 1)
    if prompt_length > 1:
        cache = feed(cache, input_ids[:, :-1], attention_mask[:, :-1]).past_key_values

    def unfinished(state):
        position, _, _, _, finished = state
        return (position < max_length) & ~jnp.all(finished)

    def step(state):
        position, cache, sequences, ends, finished = state
        last, mask = (lax.dynamic_slice_in_dim(array, position - 1, 1, axis=1) for array in (sequences, attended))
        outputs = feed(cache, last, mask)
        step_keys = fold_step(keys, position - prompt_length)
        token = select_token(outputs.logits[:, -1], sequences, position, step_keys, 0, sampling)
        token = jnp.where(finished, pad_token_id, token)
        sequences = lax.dynamic_update_slice_in_dim(sequences, token[:, None], position, axis=1)
        ends = jnp.where(finished, ends, position + 1)
        return position + 1, outputs.past_key_values, sequences, ends, finished | is_in(token, eos_token_ids)

    ends, nobody = jnp.zeros((batch_size,), dtype=jnp.int32), jnp.zeros((batch_size,), dtype=bool)
    state = (jnp.int32(prompt_length), cache, sequences, ends, nobody)
    _, _, sequences, ends, _ = lax.while_loop(unfinished, step, state)
    return sequences, ends
