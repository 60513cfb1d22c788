"""What a run is measured by: losses of held-out conversations, and dialogues that Moshi speaks with their users."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import soundfile
from jaxtyping import Float, Int

from ..checkpoints.writing import atomic_file, write_text
from ..generation.buckets import bucket
from ..models.mimi.topology import samples_per_frame
from ..models.moshi import FlaxMoshiForConditionalGeneration
from ..models.moshi.generation_flax_moshi import decode_audio
from ..models.moshi.kyutai_config_flax_moshi import TEXT_END_OF_PAD, TEXT_PAD
from .data.prepared import Conversation
from .objective import Objective


def evaluate(
    step: Callable[[Any, Any], Mapping[str, jax.Array]],
    state: Any,
    batches: Iterable[Mapping[str, Any]],
    objective: Objective,
) -> dict[str, float]:
    """The metrics of a whole split: every frame counts alike, in whatever batch it is.

    Args:
        step: see ``make_eval_step``.
        state: the train state.
        batches: of the split.
        objective: that the step was made with.

    Raises:
        ValueError: there are no batches.
    """
    total: Any = None
    for batch in batches:
        sums = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jax.device_get(step(state, batch)))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    if total is None:
        raise ValueError("`batches` are none; give a split with at least one conversation")
    total = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), total)
    return {name: float(value) for name, value in objective.metrics(total).items()}


@dataclasses.dataclass(frozen=True)
class Sample:
    """A dialogue of :func:`speak`.

    Attributes:
        voices: left Moshi, right the user, ``(samples, 2)`` float32.
        record: ``id`` and ``frames``; the ``text_ids`` of Moshi, one a frame, and those of the conversation
            (``reference_text_ids``), both as words too (``text``, ``reference_text``) if there is a tokenizer.
    """

    voices: Float[np.ndarray, "samples 2"]
    record: Mapping[str, Any]


def speak(
    model: FlaxMoshiForConditionalGeneration,
    params: Mapping[str, Any],
    conversations: Sequence[Conversation],
    max_frames: int,
    tokenizer: Any | None = None,
    seed: int = 0,
    heed: Callable[[], None] = lambda: None,
) -> list[Sample]:
    """Let Moshi speak with the users of conversations, who are heard live from the first frame on.

    With several processes all of them must call it alike, and all have the result.

    Args:
        model: without parameters; how text and codes are chosen is in its generation config.
        params: of the model, on whatever mesh.
        conversations: each of at least one frame.
        max_frames: the most that are spoken.
        tokenizer: of the model.
        seed: of the sampling.
        heed: called again and again; may raise. One process alone calls it every few frames, several before each
            conversation, as they must do so at the same places.
    """
    samples = []
    # beams have no frame that is final before their end
    watches = jax.process_count() == 1 and getattr(model.generation_config, "num_beams", None) in (None, 1)
    for conversation in conversations:
        heed()
        frames = min(conversation.frames, max_frames)
        user = conversation.user_audio_tokens[None, : model.config.num_codebooks, :frames].astype(np.int32)
        start = model.get_unconditional_inputs(1)
        spoken = model.generate(
            start.input_ids,
            user_audio_codes=np.concatenate([np.asarray(start.user_audio_codes), user], axis=-1),
            moshi_audio_codes=start.moshi_audio_codes,
            concat_unconditional_inputs=False,
            # the codes of a frame take one more step than its text
            max_new_tokens=frames + 1,
            prng_key=jax.random.key(seed),
            params=params,
            streamer=Heeding(heed) if watches else None,
        )
        text_ids = np.asarray(spoken.sequences)[0, 1 : frames + 1]
        record = {"id": conversation.id, "frames": frames}
        for name, ids in (("", text_ids), ("reference_", conversation.moshi_text_tokens[:frames])):
            record[f"{name}text_ids"] = ids.tolist()
            if tokenizer is not None:
                record[f"{name}text"] = words(ids, tokenizer)
        voice = np.asarray(spoken.audio_sequences, np.float32)[0, 0]
        heard = _decoded(model, params, user)
        # a reply that ends itself is shorter
        voices = np.stack([np.pad(voice, (0, len(heard) - len(voice))), heard], axis=-1)
        samples.append(Sample(voices, record))
    return samples


@dataclasses.dataclass(frozen=True)
class Heeding:
    """A streamer of ``generate`` that does something else: it calls ``heed``, which may raise."""

    heed: Callable[[], None]

    def put(self, value: np.ndarray) -> None:
        self.heed()

    def end(self) -> None:
        """Nothing is kept back."""


def write_samples(samples: Iterable[Sample], folder: Path, sampling_rate: int) -> None:
    """Write the voices of each sample as ``N.wav``, and its record as ``N.json``.

    Args:
        samples: of :func:`speak`.
        folder: made if it is not there.
        sampling_rate: of the voices, in hertz.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(samples):
        with atomic_file(folder / f"{number}.wav") as path:
            soundfile.write(path, sample.voices, sampling_rate, format="WAV")
        write_text(folder / f"{number}.json", json.dumps(sample.record, ensure_ascii=False) + "\n")


def _decoded(
    model: FlaxMoshiForConditionalGeneration, params: Mapping[str, Any], codes: Int[np.ndarray, "1 codebooks frames"]
) -> Float[np.ndarray, "samples"]:
    """The waveform of codes, by a program that serves all lengths of a bucket."""
    frames = codes.shape[-1]
    padding = ((0, 0), (0, 0), (0, bucket(frames) - frames))
    lengths = np.array([frames], np.int32)
    audio = model.compiled(decode_audio)(params, np.pad(codes, padding), lengths)
    return np.asarray(audio)[0, 0, : frames * samples_per_frame(model.config.audio_encoder_config)]


def words(text_ids: Int[np.ndarray, "frames"], tokenizer: Any) -> str:
    """What the text stream says, without padding."""
    known = [
        token
        for token in text_ids.tolist()
        if 0 <= token < len(tokenizer) and token not in (TEXT_PAD, TEXT_END_OF_PAD)
    ]
    return tokenizer.decode(known, skip_special_tokens=True).strip()
