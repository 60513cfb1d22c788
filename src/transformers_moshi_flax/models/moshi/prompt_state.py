"""Dialogues that have heard a prompt: the state that it leaves, made once and put into any number of slots."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from transformers import MoshiConfig

from ...generation.programs import Program
from ...nn.cache import LinearCache
from .delay_pattern import delay
from .generation_flax_moshi import FrameDecoder
from .prompt_flax_moshi import MoshiPrompt
from .stream_state import DialogueState

CHUNK = 64
"""Frames that are run at once. Dialogues that go on meanwhile wait for one chunk at most."""


class PromptState(flax.struct.PyTreeNode):
    """A dialogue before the last frame of its prompt, which is run where it begins, as it draws the first token.

    No key and no number of sampling is in it. All leaves have one row, but for the length of the cache.

    Attributes:
        cache: of the backbone, with the start frame and all frames of the prompt but the last.
        text_ids, audio_codes, user_codes, forced_codes, steps: as of :class:`DialogueState`.
        heard: the user's last frame, ``(1, codebooks)``.
        origin: tells the configuration that it belongs to.
    """

    # Any: under jax.eval_shape the leaves are shapes
    cache: LinearCache
    text_ids: Any
    audio_codes: Any
    user_codes: Any
    forced_codes: Any
    steps: Any
    heard: Any
    origin: str = flax.struct.field(pytree_node=False)


def prompt_capacity(frames: int) -> int:
    """Slots for a prompt of ``frames``: few sizes, as programs are compiled for each, and whole chunks."""
    return CHUNK * 2 ** (-(-frames // CHUNK) - 1).bit_length()


def prompt_columns(prompt: MoshiPrompt, config: MoshiConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Text, the user's codes and Moshi's, delayed, behind the start frame; each with an axis of one row in front."""

    def delayed(codes: np.ndarray) -> np.ndarray:
        start = np.full((1, len(codes), 1), config.audio_vocab_size, np.int32)
        return np.asarray(delay(np.concatenate([start, codes[None]], axis=-1), config.audio_vocab_size))

    text_ids = np.concatenate([[config.vocab_size], prompt.text_ids]).astype(np.int32)[None]
    return text_ids, delayed(prompt.user_codes), delayed(prompt.moshi_codes)


def prompt_embeds(prompt: MoshiPrompt, config: MoshiConfig, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """What stands for the columns of the first positions, and which these are, of all frames."""
    embeds = np.zeros((1, prompt.frames, config.hidden_size), dtype)
    embedded = np.zeros((1, prompt.frames, 1), bool)
    if prompt.embeds is not None:
        embeds[:, : len(prompt.embeds)] = prompt.embeds
        embedded[:, : len(prompt.embeds)] = True
    return embeds, embedded


def empty_cache(decoder: FrameDecoder, *, capacity: int) -> LinearCache:
    """Of one row."""
    return decoder.init_cache(1, capacity)


def prefill(
    decoder: FrameDecoder,
    params: Any,
    cache: LinearCache,
    text_ids: Int[Array, "1 frames"],
    user_codes: Int[Array, "1 codebooks frames"],
    moshi_codes: Int[Array, "1 codebooks frames"],
    embeds: Float[Array, "1 frames hidden_size"],
    embedded: Bool[Array, "1 frames 1"],
) -> LinearCache:
    """The cache with the next frames, whose codes are delayed; ``embeds`` stand for those that are ``embedded``."""
    module = decoder.module
    outputs = module.apply(
        {"params": params},
        text_ids,
        user_codes,
        moshi_codes,
        cache,
        inputs_embeds=(embeds, embedded),
        method=module.listen,
    )
    return outputs.cache


def adopt(dialogue: DialogueState, rows: Bool[Array, "batch"], prompt: PromptState) -> DialogueState:
    """With ``rows`` where the prompt has left off; their keys and numbers stay."""
    taken = {
        name: jnp.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, getattr(dialogue, name))
        for name, new in vars(prompt).items()
        if name in ("text_ids", "audio_codes", "user_codes", "forced_codes", "steps")
    }
    return dialogue.replace(cache=dialogue.cache.adopt(rows, prompt.cache), **taken)


ADOPT = Program(adopt, donated=(0,))
