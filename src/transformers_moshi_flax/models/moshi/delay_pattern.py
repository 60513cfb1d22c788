"""The acoustic delay: codebook 0 (semantic) is on time, all others come one frame later.

Pure functions over codes ``(batch, codebooks, frames)``; Moshi (Défossez et al., 2024), section 3.4.4; upstream's
``build_delay_pattern_mask`` and ``apply_delay_pattern_mask``.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


def build_delay_pattern_mask(
    input_ids: Int[Array, "batch codebooks frames"], bos_token_id: int, pad_token_id: int, max_length: int
) -> tuple[Int[Array, "batch codebooks kept"], Int[Array, "batch codebooks {max_length}"]]:
    """Delays the codes and lays out which positions are still to be predicted.

    Args:
        input_ids: codes of the prompt, undelayed.
        bos_token_id: fills frame 0 of the delayed codebooks.
        pad_token_id: fills the last frame of codebook 0, which nothing follows.
        max_length: frames of the mask, at least 1.

    Returns:
        The delayed codes, cut to ``min(frames, max_length - 1)`` frames, and the mask: -1 where a code is to be
        predicted, else the code that stands there.

    Raises:
        ValueError: if ``max_length`` is below 1.
    """
    if max_length < 1:
        raise ValueError(f"`max_length` must be at least 1, but is {max_length}.")
    batch_size, num_codebooks, frames = input_ids.shape
    kept = min(frames, max_length - 1)
    prompt = input_ids[:, :, :kept].astype(jnp.int32)
    mask = jnp.full((batch_size, num_codebooks, max_length), -1, dtype=jnp.int32)
    mask = mask.at[:, 0, :kept].set(prompt[:, 0])
    mask = mask.at[:, 1:, 1 : kept + 1].set(prompt[:, 1:])
    mask = mask.at[:, 1:, 0].set(bos_token_id)
    mask = mask.at[:, 0, -1].set(pad_token_id)
    return mask[:, :, :kept], mask


def apply_delay_pattern_mask(
    input_ids: Int[Array, "batch codebooks frames"], decoder_pad_token_mask: Int[Array, "batch codebooks length"]
) -> Int[Array, "batch codebooks frames"]:
    """Puts the fixed codes of the mask over ``input_ids``, which stay where the mask is -1."""
    mask = decoder_pad_token_mask[..., : input_ids.shape[-1]]
    return jnp.where(mask == -1, input_ids, mask)


def delay(
    codes: Int[Array | np.ndarray, "batch codebooks length"], start_code: int
) -> Int[Array | np.ndarray, "batch codebooks length"]:
    """Moves all codebooks but the first one frame to the right, ``start_code`` before them; NumPy stays NumPy."""
    xp = np if isinstance(codes, np.ndarray) else jnp
    first = xp.full((codes.shape[0], codes.shape[1] - 1, 1), start_code, dtype=codes.dtype)
    return xp.concatenate([codes[:, :1], xp.concatenate([first, codes[:, 1:, :-1]], axis=2)], axis=1)


def undelay(codes: Int[Array, "batch codebooks length"]) -> Int[Array, "batch codebooks length-1"]:
    """Brings the codebooks of one audio frame together again: the inverse of the delay."""
    return jnp.concatenate([codes[:, :1, :-1], codes[:, 1:, 1:]], axis=1)
