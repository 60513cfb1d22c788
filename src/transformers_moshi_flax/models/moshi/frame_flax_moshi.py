"""One frame of Moshi: what was said and heard goes in, the next text token and codes come out.

::

    text, Moshi's codes, user's codes of frame t --> backbone --> hidden state --> text token t+1
                                                                       |                |
                                                                       +--> depth decoder: codes 0, 1, … of t+1

:func:`frame_step` is the only place where a frame is made: ``generate``, its beams and dialogues call it, and differ
in their cache and in how they choose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from ...generation.decoding import UNFORCED, Chosen
from ...generation.sampling import Sampling, select_token
from ...modeling_flax_outputs import FlaxCausalLMOutputWithPast
from ...nn.cache import Cache, StaticCache


def frame_step(
    module: Any,
    params: Any,
    text_ids: Int[Array, "batch 1"],
    user_codes: Int[Array, "batch codebooks 1"],
    moshi_codes: Int[Array, "batch codebooks 1"],
    cache: Cache,
    choose: Callable[[FlaxCausalLMOutputWithPast], Chosen],
    depth_sampling: Sampling,
    fixed_codes: Int[Array, "batch codebooks"],
    attention_mask: Shaped[Array, "batch 1"] | None = None,
    inputs_embeds: tuple[Float[Array, "batch 1 hidden"], Bool[Array, "1 1 1"]] | None = None,
    output_attentions: bool = False,
) -> tuple[FlaxCausalLMOutputWithPast, Chosen, Int[Array, "*sets batch codebooks"]]:
    """Runs a frame and makes the next one.

    Args:
        module: a ``FlaxMoshiForConditionalGenerationModule``.
        params: its parameters.
        text_ids, user_codes, moshi_codes, attention_mask, inputs_embeds, output_attentions: as of ``module.listen``.
        cache: of the backbone.
        choose: from the backbone's outputs to the text token of the next frame.
        depth_sampling: how its codes are chosen.
        fixed_codes: its codes as far as they are not to be chosen, else ``UNFORCED``.

    Returns:
        The backbone's outputs with the updated cache, what was chosen, and the codes, one set for each set of tokens.
    """
    outputs = module.apply(
        {"params": params},
        text_ids,
        user_codes,
        moshi_codes,
        cache,
        attention_mask,
        inputs_embeds,
        output_attentions,
        method=module.listen,
    )
    chosen = choose(outputs)
    hidden_state = outputs.last_hidden_state[:, -1]
    if chosen.parents is None:
        codes = choose_codes(module, params, hidden_state, chosen.tokens, chosen.keys, depth_sampling, fixed_codes)
        return outputs, chosen, codes

    def codes_of_set(number: Int[Array, ""], codes: Array) -> Array:
        states = hidden_state[chosen.parents[number]]
        chosen_codes = choose_codes(
            module, params, states, chosen.tokens[number], chosen.keys[number], depth_sampling, fixed_codes
        )
        return lax.dynamic_update_index_in_dim(codes, chosen_codes, number, axis=0)

    # a loop, so that the depth decoder is compiled once and not run for sets that are not needed
    codes = jnp.zeros((*chosen.tokens.shape, fixed_codes.shape[-1]), dtype=jnp.int32)
    return outputs, chosen, lax.fori_loop(0, chosen.sets, codes_of_set, codes)


def choose_codes(
    module: Any,
    params: Any,
    hidden_state: Float[Array, "batch hidden"],
    text_ids: Int[Array, "batch"],
    keys: Key[Array, "batch"],
    sampling: Sampling,
    fixed_codes: Int[Array, "batch codebooks"],
) -> Int[Array, "batch codebooks"]:
    """Chooses the codes of a frame, one codebook after another, as far as they are not fixed but ``UNFORCED``.

    The loop is unrolled: each codebook has its own weights, and reading them by a loop index would copy them.
    """
    config = module.config.depth_decoder_config
    cache = StaticCache.create(config, hidden_state.shape[0], config.num_codebooks, module.dtype)
    history = text_ids[:, None]
    for codebook in range(module.config.num_codebooks):
        outputs = module.apply(
            {"params": params}, history[:, -1:], hidden_state[:, None], cache, method=module.next_codebook
        )
        cache = outputs.cache
        code = select_token(outputs.logits[:, -1], history, 1 + codebook, keys, 1 + codebook, sampling)
        code = jnp.where(fixed_codes[:, codebook] == UNFORCED, code, fixed_codes[:, codebook])
        history = jnp.concatenate([history, code[:, None]], axis=1)
    return history[:, 1:]
