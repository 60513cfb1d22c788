"""A stream in NumPy for the tests of everything around it: what it says depends on all that its caller has said."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from transformers_moshi_flax.models.moshi.prompt_flax_moshi import MoshiPrompt

FRAME = 1920


class FakeStream:
    """Says what it hears, scaled by a number that depends on the key, and quieter or louder by what came before.

    Args:
        batch_size: slots.
    """

    sampling_rate, frame_size, frame_rate = 24_000, FRAME, 12.5
    return_audio_waveforms, channels = True, 1
    numbers = {"temperature": 0.7, "top_k": 25, "depth_decoder_temperature": 0.8, "depth_decoder_top_k": 250}

    def __init__(self, batch_size: int = 1):
        self.batch_size, self.warmed_for = batch_size, 0
        self.prefilled: list[MoshiPrompt] = []
        self.configured: list[tuple[list[int], dict[str, Any]]] = []

    def warmup(self, prompt_frames: int = 0) -> None:
        """There is nothing to compile."""
        self.warmed_for = prompt_frames

    def check_prompt(self, prompt: MoshiPrompt) -> None:
        if prompt.text_ids.max() >= 300:
            raise ValueError(f"`prompt.text_ids` has the id {prompt.text_ids.max()}")

    def prefill(self, prompt: MoshiPrompt, capacity: int) -> int:
        """The state is the sum of all that is in it."""
        assert prompt.frames <= capacity == self.warmed_for
        self.prefilled.append(prompt)
        return int(prompt.text_ids.sum() + prompt.moshi_codes.sum() + prompt.user_codes.sum())

    def check_numbers(self, **numbers: Any) -> None:
        for name, number in numbers.items():
            if not 0 < number <= 256:
                raise ValueError(f"`{name}` must be in (0, 256], but is {number}")

    def init(self, prng_key: Any = None) -> dict[str, np.ndarray]:
        return {name: np.zeros(self.batch_size) for name in ("age", "sum", "key")}

    def reset(
        self, state: dict[str, np.ndarray], rows: np.ndarray, prng_key: Any = None, prompt: int | None = None
    ) -> dict[str, np.ndarray]:
        keys = (np.asarray(prng_key).sum(axis=1) + (prompt or 0)) % 7
        return {name: np.where(rows, keys if name == "key" else 0, value) for name, value in state.items()}

    def configure(self, state: dict[str, np.ndarray], rows: np.ndarray, **numbers: Any) -> dict[str, np.ndarray]:
        self.configured.append((np.flatnonzero(rows).tolist(), numbers))
        return state

    def step(self, state: dict[str, np.ndarray], user_audio: np.ndarray, active: np.ndarray) -> tuple:
        loud = np.abs(user_audio[:, 0]).mean(axis=1)
        total = np.where(active, state["sum"] + loud, state["sum"])
        gain = 0.5 / (1 + total % 1) / (1 + state["key"])
        audio = (user_audio * gain[:, None, None]).astype(np.float32)
        ids = np.where(active, 4 + state["age"] % 200, -1).astype(np.int32)
        frame = SimpleNamespace(audio=audio, text_ids=ids, valid=active)
        return {"age": state["age"] + active, "sum": total, "key": state["key"]}, frame


def spoken_alone(said: np.ndarray, key: tuple[int, int] = (0, 0), prompt: int | None = None) -> np.ndarray:
    """What the stream says to ``(frames, FRAME)`` when nobody else is there, as int16."""
    from transformers_moshi_flax.models.moshi.pcm import from_float

    stream = FakeStream(1)
    state = stream.reset(stream.init(), np.ones(1, bool), np.array([key], np.uint32), prompt)
    audio = []
    for frame in said:
        state, reply = stream.step(state, frame[None, None], np.ones(1, bool))
        audio.append(from_float(reply.audio[0, 0], np.int16))
    return np.array(audio)
