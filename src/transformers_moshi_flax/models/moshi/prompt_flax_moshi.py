"""What a dialogue begins from: frames of text, Moshi's voice and the user's that are given, not chosen.

A persona is such a prompt: a voice, as Moshi's codes, and a description, as text that Moshi is made to think, one
piece a frame. The order of its parts, and the codes that stand for an idle user, are those of PersonaPlex.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Int32
from transformers import MoshiConfig

from ...checkpoints.formats import open_pickle, open_safetensors
from ...checkpoints.verifying import refuse_damage
from ...checkpoints.writing import write_safetensors
from ...generation.arrays import cut, on_host
from ...input_checks import check_ids, check_input, is_traced
from ..mimi.topology import samples_per_frame
from .inputs_flax_moshi import conversation_inputs
from .kyutai_config_flax_moshi import TEXT_PAD
from .preparing_flax_moshi import encode

PROMPT_FORMAT = "moshi-prompt"
STREAMS = ("text_ids", "moshi_codes", "user_codes")

PAUSE_FRAMES = 6
"""Of silence after the voice and after the text: half a second."""

SYSTEM = "<system>"
"""Stands before and behind the text of a persona."""

PERSONAPLEX_RING = 4
"""Positions in the ring of a packaged voice."""

SETTLED_FRAMES = 25
"""After so many frames of silence, Mimi's codes no longer tell that there was a beginning."""


@dataclass(frozen=True, eq=False)
class MoshiPrompt:
    """Frames that a dialogue begins with; all of them are forced.

    Prompts are put behind one another by ``+``.

    Args:
        text_ids: ``(frames,)`` integers in ``[0, vocab_size)``.
        moshi_codes, user_codes: undelayed, ``(codebooks, frames)`` integers in ``[0, audio_vocab_size)``.
        embeds: what the backbone is given in place of the streams, from the start frame on, for at most as many
            positions as there are frames, ``(positions, hidden_size)`` floats.

    Attributes:
        text_ids, moshi_codes, user_codes, embeds: the same, ids as int32, not to be written to.

    Raises:
        ValueError: another shape or dtype, streams of different lengths, no frame, ids below 0, embeddings that are
            not finite.
    """

    text_ids: Int32[np.ndarray, "frames"]
    moshi_codes: Int32[np.ndarray, "codebooks frames"]
    user_codes: Int32[np.ndarray, "codebooks frames"]
    embeds: Float[np.ndarray, "positions hidden_size"] | None

    def __init__(
        self, text_ids: ArrayLike, moshi_codes: ArrayLike, user_codes: ArrayLike, embeds: ArrayLike | None = None
    ):
        given = dict(zip(STREAMS, map(np.asarray, (text_ids, moshi_codes, user_codes))))
        for name, array in given.items():
            axes = ("frames",) if name == "text_ids" else ("codebooks", "frames")
            if array.ndim != len(axes):
                wanted = ", ".join(axes) + "," * (len(axes) == 1)
                raise ValueError(f"`{name}` must have the shape ({wanted}), but has the shape {array.shape}.")
            check_ids(name, array, 2**31)
        shapes = {name: array.shape for name, array in given.items()}
        if len({shape[-1] for shape in shapes.values()}) > 1 or shapes["moshi_codes"] != shapes["user_codes"]:
            raise ValueError(f"The streams of a prompt must have the same frames and codebooks, but have {shapes}.")
        if 0 in shapes["moshi_codes"]:
            raise ValueError(f"A prompt has at least one frame of one codebook, but the streams have {shapes}.")
        copies = {name: array.astype(np.int32) for name, array in given.items()}
        if embeds is not None:
            copies["embeds"] = _checked_embeds(np.array(embeds), given["text_ids"].size)
        for name in (*STREAMS, "embeds"):
            if name in copies:
                copies[name].flags.writeable = False
            object.__setattr__(self, name, copies.get(name))

    @property
    def frames(self) -> int:
        """How many there are."""
        return len(self.text_ids)

    def __add__(self, other: MoshiPrompt) -> MoshiPrompt:
        if not isinstance(other, MoshiPrompt):
            return NotImplemented
        pairs = [(getattr(self, name), getattr(other, name)) for name in STREAMS]
        books = [len(codes) for codes in pairs[1]]
        if books[0] != books[1]:
            raise ValueError(f"Prompts of {books[0]} and of {books[1]} codebooks cannot be put behind one another.")
        if other.embeds is not None:
            raise ValueError(
                "Embeddings have the start frame: a prompt that has some cannot stand behind another one."
            )
        text_ids, moshi_codes, user_codes = (np.concatenate(pair, axis=-1) for pair in pairs)
        return MoshiPrompt(text_ids, moshi_codes, user_codes, self.embeds)

    # -------------------------------------------------------------------------------------------- making one

    @classmethod
    def from_codes(cls, moshi_codes: ArrayLike, user_code: ArrayLike) -> MoshiPrompt:
        """Moshi says these codes, without words.

        Args:
            moshi_codes: ``(codebooks, frames)``, undelayed.
            user_code: of the user in every frame, ``(codebooks,)``.

        Raises:
            ValueError: as :class:`MoshiPrompt`.
        """
        codes = np.asarray(moshi_codes)
        return cls(np.full(codes.shape[-1:], TEXT_PAD), codes, _repeated("user_code", user_code, codes))

    @classmethod
    def from_text(cls, text_ids: ArrayLike, moshi_code: ArrayLike, user_code: ArrayLike) -> MoshiPrompt:
        """A piece of the text in every frame, in which nobody says anything.

        Args:
            text_ids: ``(frames,)``.
            moshi_code, user_code: of both voices in every frame, ``(codebooks,)``.

        Raises:
            ValueError: as :class:`MoshiPrompt`.
        """
        ids = np.asarray(text_ids)
        return cls(
            ids,
            _repeated("moshi_code", moshi_code, ids),
            _repeated("user_code", user_code, ids),
        )

    @classmethod
    def from_recording(cls, model: Any, audio: ArrayLike, params: Any | None = None) -> MoshiPrompt:
        """Moshi speaks as in a recording; the user is idle, as :class:`IdleCodes` has it.

        Args:
            model: a ``FlaxMoshiForConditionalGeneration`` with Mimi's encoder.
            audio: mono, ``(samples,)`` or ``(1, samples)``, floats in [-1, 1] at the model's rate. Silence fills the
                last frame. PersonaPlex's voices have a loudness of -24 LUFS.
            params: the parameters (default: the model's).

        Raises:
            ValueError: another shape or dtype, samples that are not finite or far beyond [-1, 1], none at all; a model
                without Mimi's encoder.
        """
        return cls.from_codes(voice_codes(model, audio, params), IdleCodes.of(model, params).user)

    @classmethod
    def of_persona(
        cls,
        idle: IdleCodes,
        voice: MoshiPrompt | None = None,
        text: str | None = None,
        tokenizer: Any | None = None,
    ) -> MoshiPrompt:
        """A persona in PersonaPlex's order: the voice, a pause, ``<system> TEXT <system>`` piece by piece, a pause.

        Args:
            idle: the codes of those who say nothing.
            voice: of :meth:`from_recording`, :meth:`from_codes` or a file; None leaves it and its pause out.
            text: who Moshi is; None or nothing but spaces leaves the text and its pause out.
            tokenizer: of the text.

        Raises:
            ValueError: neither voice nor text; text without a tokenizer; as :class:`MoshiPrompt`.
        """
        parts = []
        pause = cls.from_text(np.full(PAUSE_FRAMES, TEXT_PAD), idle.moshi, idle.user)
        if voice is not None:
            parts += [voice, pause]
        pieces = system_pieces(text, tokenizer)
        if pieces.size:
            parts += [cls.from_text(pieces, idle.moshi, idle.user), pause]
        if not parts:
            raise ValueError("A persona has a `voice`, a `text` or both: give one of them.")
        return sum(parts[1:], start=parts[0])

    # -------------------------------------------------------------------------------------------- files

    def save(self, path: str | os.PathLike) -> None:
        """Writes the prompt as a safetensors file, which is complete before it has its name.

        Raises:
            OSError: the file cannot be written.
        """
        tensors = {name: getattr(self, name) for name in STREAMS}
        if self.embeds is not None:
            tensors["embeds"] = self.embeds
        write_safetensors(Path(path), tensors, PROMPT_FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike) -> MoshiPrompt:
        """Reads a prompt of :meth:`save`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or no prompt.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"`path`: there is no file {path}.")
        file = open_safetensors(path)
        if not set(STREAMS) <= set(file):
            raise ValueError(f"`path`: {path} is no prompt, it lacks {sorted(set(STREAMS) - set(file))}.")
        refuse_damage(file)
        try:
            text_ids, moshi_codes, user_codes = (file[name] for name in STREAMS)
            return cls(text_ids, moshi_codes, user_codes, file.get("embeds"))
        except ValueError as error:
            raise ValueError(f"`path`: {path} is no good prompt: {error}") from error

    @classmethod
    def from_personaplex(cls, path: str | os.PathLike) -> MoshiPrompt:
        """A voice as PersonaPlex packages it, ``.pt``: to be written by :meth:`save` once, as PyTorch reads it.

        It has embeddings in place of codes, so it is good for that model alone, and ``generate`` cannot take it.

        Args:
            path: of a pickle with ``embeddings`` ``(positions, 1, 1, hidden_size)`` and ``cache``, ``(1, streams, 4)``
                integers: the ring of the last positions. Nothing but tensors is read.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged or something else, or PyTorch is not installed.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"`path`: there is no file {path}.")
        file = open_pickle(path)
        shapes = {name: file[name].shape for name in file}
        embeds, ring = shapes.get("embeddings", ()), shapes.get("cache", ())
        packaged = len(embeds) == 4 and embeds[0] > 1 and embeds[1:3] == (1, 1) and len(ring) == 3
        if not (packaged and ring[0] == 1 and ring[1] % 2 and ring[2] == PERSONAPLEX_RING):
            raise ValueError(f"`path`: {path} is no voice of PersonaPlex, its tensors are {shapes}.")
        frames, codebooks = embeds[0], ring[1] // 2
        # the last two positions that anything is read of; codes but for the semantic ones come one position later
        now, later = (file["cache"][0, :, (frames + more) % PERSONAPLEX_RING] for more in (0, 1))
        streams = np.zeros((ring[1], frames), now.dtype)
        streams[0] = TEXT_PAD
        semantic = [0, 1, 1 + codebooks]
        streams[:, -2:] = np.stack([now, later], axis=-1)
        streams[semantic, -1] = now[semantic]
        try:
            return cls(streams[0], streams[1 : 1 + codebooks], streams[1 + codebooks :], file["embeddings"][:, 0, 0])
        except ValueError as error:
            raise ValueError(f"`path`: {path} is no good voice: {error}") from error

    # -------------------------------------------------------------------------------------------- using it

    def check_for(self, config: MoshiConfig) -> None:
        """Raises ``ValueError`` unless a model of ``config`` can begin with it."""
        if len(self.moshi_codes) != config.num_codebooks:
            raise ValueError(
                f"`prompt` has {len(self.moshi_codes)} codebooks, but the model has {config.num_codebooks}: encode it "
                "for this model."
            )
        for name in STREAMS:
            size = config.vocab_size if name == "text_ids" else config.audio_vocab_size
            check_ids(f"prompt.{name}", getattr(self, name), size)
        if self.embeds is not None and self.embeds.shape[1] != config.hidden_size:
            raise ValueError(
                f"`prompt.embeds` are of the size {self.embeds.shape[1]}, but the model's of {config.hidden_size}: "
                "take a voice of this model."
            )


@dataclass(frozen=True, eq=False)
class IdleCodes:
    """One frame of each voice while nobody says anything.

    Attributes:
        moshi: of Moshi, ``(codebooks,)``.
        user: of the user.
    """

    moshi: Int32[np.ndarray, "codebooks"]
    user: Int32[np.ndarray, "codebooks"]

    @classmethod
    def of(cls, model: Any, params: Any | None = None) -> IdleCodes:
        """Those that the model was trained with, where its configuration has them (``idle_codes``, as PersonaPlex's
        has: for the user a hum); else the codes of silence.

        Args:
            model: a ``FlaxMoshiForConditionalGeneration``.
            params: the parameters (default: the model's).

        Raises:
            ValueError: the configuration has none, and the model has no encoder.
        """
        published = getattr(model.config, "idle_codes", None)
        if published is not None:
            return cls(*(np.asarray(published[name], np.int32) for name in ("moshi", "user")))
        size = samples_per_frame(model.config.audio_encoder_config)
        silence = voice_codes(model, np.zeros(SETTLED_FRAMES * size, np.float32), params)[:, -1]
        return cls(silence, silence)


def voice_codes(model: Any, audio: ArrayLike, params: Any | None = None) -> Int32[np.ndarray, "codebooks frames"]:
    """The codes of a recording, whose last frame silence fills.

    Args:
        model, audio, params: as of :meth:`MoshiPrompt.from_recording`.

    Raises:
        ValueError: as there.
    """
    config = model.config
    if config.audio_encoder_config.encoder_config is None:
        raise ValueError("`audio` needs Mimi's encoder, which the model lacks: give codes.")
    samples = np.asarray(audio)
    samples = samples[None, None] if samples.ndim == 1 else samples[None]
    expected = conversation_inputs(config)["moshi_input_values"]
    check_input("audio", samples, expected)
    samples = np.pad(samples, ((0, 0), (0, 0), (0, -samples.shape[-1] % expected.frame_size)))
    codes, frames = encode(model, model.whole_params(params), samples.astype(model.dtype))
    return np.array(on_host(cut(codes, frames))[0], np.int32)


def system_pieces(text: str | None, tokenizer: Any) -> Int[np.ndarray, "pieces"]:
    """The pieces of the text of a persona with what stands around it; none of nothing.

    Raises:
        ValueError: there is no tokenizer.
    """
    text = " ".join((text or "").split())
    if not text:
        return np.zeros(0, np.int32)
    if tokenizer is None:
        raise ValueError("`text` needs a `tokenizer`: give that of the model.")
    bare = text.removeprefix(SYSTEM).removesuffix(SYSTEM).strip()
    return np.asarray(tokenizer.encode(f"{SYSTEM} {bare} {SYSTEM}", add_special_tokens=False), np.int32)


def prompted_streams(
    model: Any,
    prompt: MoshiPrompt | Sequence[MoshiPrompt],
    streams: dict[str, Any],
    attention_mask: Any,
    params: Any | None,
) -> tuple[dict[str, Any], Int32[np.ndarray, "batch frames"]]:
    """What ``generate`` takes for a prompt: the streams, and which frames count.

    Args:
        model: a ``FlaxMoshiForConditionalGeneration``.
        prompt: of all rows, or one for each.
        streams: the other arguments of ``generate``, by name. The user's voice goes on behind the prompt.
        attention_mask, params: as of ``generate``.

    Raises:
        ValueError: streams beside the user's; a number of prompts other than the rows of the user; prompts that are
            not for this model.
    """
    there = {name: value for name, value in {**streams, "attention_mask": attention_mask}.items() if value is not None}
    if others := sorted(there.keys() - {"user_audio_codes", "user_input_values"}):
        raise ValueError(f"`prompt` has text and both voices: leave out `{others[0]}`.")
    config, user = model.config, there.get("user_audio_codes")
    table = conversation_inputs(config)
    if user is None and "user_input_values" in there:
        values = there["user_input_values"]
        check_input("user_input_values", values, table["user_input_values"])
        codes, frames = encode(model, model.whole_params(params), on_host(values))
        user = cut(codes, frames)
    if user is not None:
        check_input("user_audio_codes", user, table["user_audio_codes"])
    prompts = [prompt] * (1 if user is None else np.shape(user)[0]) if isinstance(prompt, MoshiPrompt) else [*prompt]
    for one in prompts:
        one.check_for(config)
        if one.embeds is not None:
            raise ValueError("`prompt` has embeddings in place of codes, which only streams take: give one of codes.")
    if not prompts or (user is not None and len(prompts) != np.shape(user)[0]):
        rows = "none" if user is None else np.shape(user)[0]
        raise ValueError(f"`prompt` has {len(prompts)} prompts, but the user has the rows {rows}: give one for each.")
    frames = max(one.frames for one in prompts)

    def before(name: str, filler: int) -> np.ndarray:
        arrays = [getattr(one, name) for one in prompts]
        lengths = [(0, 0)] * (arrays[0].ndim - 1)
        return np.stack([np.pad(a, [*lengths, (frames - a.shape[-1], 0)], constant_values=filler) for a in arrays])

    given = {"input_ids": before("text_ids", TEXT_PAD), "moshi_audio_codes": before("moshi_codes", 0)}
    heard = before("user_codes", 0)
    if user is not None:
        xp = jnp if is_traced(user) else np
        heard = xp.concatenate([heard, xp.asarray(on_host(user)).astype(np.int32)], axis=-1)
    mask = np.array([[frame >= frames - one.frames for frame in range(frames)] for one in prompts], np.int32)
    return {**dict.fromkeys(streams), **given, "user_audio_codes": heard}, mask


def _checked_embeds(embeds: np.ndarray, frames: int) -> np.ndarray:
    if embeds.ndim != 2 or not 0 < len(embeds) <= frames:
        raise ValueError(
            f"`embeds` must have the shape (1 to {frames}, hidden_size), but has the shape {embeds.shape}."
        )
    if not jnp.issubdtype(embeds.dtype, jnp.floating) or not np.isfinite(embeds.astype(np.float32)).all():
        raise ValueError(f"`embeds` must be finite floats, but has the dtype {embeds.dtype}, or some are not.")
    return embeds


def _repeated(name: str, code: ArrayLike, stream: np.ndarray) -> np.ndarray:
    """The code of one frame in each frame of a stream."""
    code = np.asarray(code)
    if code.ndim != 1:
        raise ValueError(f"`{name}` must be the codes of one frame, (codebooks,), but has the shape {code.shape}.")
    return np.repeat(code[:, None], stream.shape[-1] if stream.ndim else 1, axis=1)
