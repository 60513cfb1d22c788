"""What Moshi's models are called with, described once; ``input_checks.py`` compares every call with these tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.typing import ArrayLike
from transformers import MoshiConfig
from transformers.models.moshi.configuration_moshi import MoshiDepthConfig

from ...generation.decoding import UNFORCED
from ...input_checks import Input
from ...modeling_flax_decoder import BATCH_FRAMES, IGNORED, embeddings, mask
from ..mimi.topology import samples_per_frame

FORCED: dict[str, Any] = {"allowed": (UNFORCED,), "remedy": f"{UNFORCED} leaves the choice to the model."}

AUDIO = {"user_audio_codes": "user_input_values", "moshi_audio_codes": "moshi_input_values"}
"""The streams of audio as codes, which have priority, and as waveforms."""


def conversation_inputs(
    config: MoshiConfig, slots: int | None = None, user_may_go_on: bool = False
) -> dict[str, Input]:
    """Of the whole model: the text and the two voices.

    Args:
        config: of the model.
        slots: of the cache, if there is one.
        user_may_go_on: whether the user may be heard beyond the prompt.
    """
    codec = config.audio_encoder_config
    size = samples_per_frame(codec)
    codes = {"batch": None, "num_codebooks": config.num_codebooks, "frames": None}
    samples = {"batch": None, "channels": codec.audio_channels, "samples": None}
    hint = f"pad what is shorter (a frame is {size} samples)"
    voices = {}
    for name, more in (("user", user_may_go_on), ("moshi", False)):
        options: dict[str, Any] = {"may_go_on": more, "hint": hint}
        voices[f"{name}_audio_codes"] = Input(codes, "ids", config.audio_vocab_size + 1, **options)
        voices[f"{name}_input_values"] = Input(samples, "audio", frame_size=size, **options)
    return {
        "inputs_embeds": embeddings(config),
        "input_ids": Input(BATCH_FRAMES, "ids", config.vocab_size + 1, hint=hint),
        **voices,
        "attention_mask": mask(slots),
        "text_labels": Input(BATCH_FRAMES, "ids", config.vocab_size, **IGNORED),
        "audio_labels": Input(codes, "ids", config.audio_vocab_size + 1, **IGNORED),
    }


def depth_inputs(config: MoshiDepthConfig, slots: int | None = None) -> dict[str, Input]:
    """Of the depth decoder, but for the ids, whose vocabulary is another for each codebook."""
    batch_codebooks = {"batch": None, "codebooks": None}
    context = {"batch": None, "1 or codebooks": None, "input_size": config.input_size}
    known = "selects the codebooks' weights"
    return {
        "inputs_embeds": Input({**batch_codebooks, "hidden_size": config.hidden_size}, "floats"),
        "input_ids": Input(batch_codebooks, "ids"),
        "last_hidden_state": Input(context, "floats"),
        "attention_mask": Input({"batch": None, "codebooks": (None, slots) if slots else None}, "mask"),
        "position_ids": Input({"batch": (None, 1), "codebooks": None}, "ids", at_trace_time=known),
        "labels": Input(batch_codebooks, "ids", config.audio_vocab_size + 1, **IGNORED),
    }


def step_inputs(config: MoshiConfig, batch_size: int) -> dict[str, Input]:
    """Of a step of a dialogue: one frame of every slot."""
    codec = config.audio_encoder_config
    text: dict[str, Any] = {"axes": {"slots": batch_size}, "kind": "ids", "size": config.vocab_size}
    codes: dict[str, Any] = {
        "axes": {"slots": batch_size, "num_codebooks": config.num_codebooks},
        "kind": "ids",
        "size": config.audio_vocab_size,
        "called": "the codes of one frame",
    }
    samples = {"slots": batch_size, "channels": codec.audio_channels, "samples": samples_per_frame(codec)}
    slots = Input({"slots": batch_size}, "bools", called="booleans, one for each slot")
    return {
        "user_audio": Input(samples, "audio", hint="give one frame of every slot"),
        "user_audio_codes": Input(**codes),
        "active": slots,
        "rows": slots,
        "forced_text_ids": Input(**text, called="one token for each slot", **FORCED),
        "forced_audio_codes": Input(**codes, **FORCED),
    }


def streams_that_count(given: Mapping[str, ArrayLike | None]) -> dict[str, ArrayLike]:
    """The arguments without those that are None, and without waveforms whose codes are given too."""
    there = {name: value for name, value in given.items() if value is not None}
    return {name: value for name, value in there.items() if not any(AUDIO.get(codes) == name for codes in there)}


def require_waveforms(config: MoshiConfig) -> None:
    """Raises ``ValueError`` if the model cannot make waveforms."""
    if config.audio_encoder_config.decoder_config is None:
        raise ValueError(
            "`return_audio_waveforms=True` needs the audio decoder, which this configuration has dropped: pass "
            "`return_audio_waveforms=False`."
        )
