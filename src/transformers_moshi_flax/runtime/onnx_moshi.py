"""Dialogues with an exported Moshi: Mimi's encoder, a frame of Moshi, Mimi's decoder, 80 ms after 80 ms."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from jaxtyping import Float, Int

from .manifest import NEXT, BadExport, check_files, read_manifest
from .random_numbers import UniformNumbers

PADDING = (0, 3)
"""Text ids that say nothing: 3 fills the frames without a new piece of a word, 0 announces the next word."""

WORD_START = "▁"
"""How a piece begins that begins a word."""

ENCODE, CONVERSE, DECODE = "mimi_encode_step", "moshi_step", "mimi_decode_step"


@dataclasses.dataclass(frozen=True)
class OnnxMoshiFrame:
    """Moshi's side of the 80 ms whose user's side was passed.

    Attributes:
        audio: ``(batch, channels, frame_size)`` float32.
        text_ids: its text token, ``(batch,)`` int32.
        audio_codes: its codes, undelayed, ``(batch, codebooks)`` int32.
        text_logits: of the text token that this step chose, the next frame's, ``(batch, vocab_size)`` float32.
    """

    audio: Float[np.ndarray, "batch channels frame_size"]
    text_ids: Int[np.ndarray, "batch"]
    audio_codes: Int[np.ndarray, "batch codebooks"]
    text_logits: Float[np.ndarray, "batch vocab"]


class OnnxMoshi:
    """A model that ``moshi-flax export onnx`` wrote.

    Args:
        folder: the export.
        providers: of onnxruntime, as its ``InferenceSession`` takes them (default: the CPU).
        threads: of every operator (default: onnxruntime's, one a core).

    Attributes:
        batch_size: dialogues at once.
        frame_size: samples of a frame.
        sampling_rate: samples a second.
        frame_rate: frames a second.
        channels: of the audio.
        num_codebooks: codes of a frame.
        vocab_size: of the text.
        numbers: of sampling, by name, as dialogues begin with; none where the export is greedy.
        manifest: all that is known of the export.

    Raises:
        BadExport: the folder is no export, of another version, or damaged.
        ValueError: a provider that this onnxruntime does not have.
    """

    def __init__(self, folder: str | os.PathLike, providers: Sequence[Any] | None = None, threads: int | None = None):
        self.folder = Path(folder)
        self.manifest = manifest = read_manifest(self.folder)
        check_files(self.folder, manifest)
        available = onnxruntime.get_available_providers()
        providers = ["CPUExecutionProvider"] if providers is None else list(providers)
        for provider in providers:
            name = provider if isinstance(provider, str) else provider[0]
            if name not in available:
                raise ValueError(f"`providers` names {name!r}, but this onnxruntime has {', '.join(available)}.")
        self.batch_size: int = manifest["batch_size"]
        self.frame_size: int = manifest["frame_size"]
        self.sampling_rate: int = manifest["sampling_rate"]
        self.frame_rate: float = manifest["frame_rate"]
        self.channels: int = manifest["channels"]
        self.num_codebooks: int = manifest["num_codebooks"]
        self.vocab_size: int = manifest["vocab_size"]
        self.numbers: dict[str, float | int] = dict(manifest["sampling"])
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        self.sessions = {
            name: onnxruntime.InferenceSession(self.folder / step["file"], options, providers=providers)
            for name, step in manifest["steps"].items()
        }

    def streaming(self, seed: int = 0, **numbers: float | int) -> OnnxMoshiStream:
        """Endless dialogues, ``batch_size`` of them.

        Args:
            seed: of what is drawn: the dialogues are those of JAX with ``jax.random.key(seed)``.
            **numbers: of sampling, others than :attr:`numbers`.

        Raises:
            ValueError: a number that the export does not have, or that is out of range.
        """
        return OnnxMoshiStream(self, seed, numbers)

    def converse(
        self, audio: Float[np.ndarray, "samples"], seed: int = 0, **numbers: float | int
    ) -> tuple[Float[np.ndarray, "samples"], Int[np.ndarray, "frames"]]:
        """Lets Moshi hear a recording, live; the last frame is filled up with silence.

        Args:
            audio: mono, floats in [-1, 1] at :attr:`sampling_rate`.
            seed, numbers: as of :meth:`streaming`.

        Returns:
            What Moshi says meanwhile, as long, and its text ids.

        Raises:
            ValueError: as :meth:`streaming`; an export of more than one dialogue or channel; another shape.
        """
        audio = np.asarray(audio, np.float32)
        if (self.batch_size, self.channels) != (1, 1) or audio.ndim != 1:
            raise ValueError(
                f"`audio` must be (samples,) for one dialogue and channel, but has the shape {audio.shape} for "
                f"{self.batch_size} and {self.channels}: use `streaming`."
            )
        stream = self.streaming(seed, **numbers)
        length = len(audio)
        frames = np.pad(audio, (0, -length % self.frame_size)).reshape(-1, 1, 1, self.frame_size)
        said = [stream.step(frame) for frame in frames]
        if not said:
            return audio, np.zeros(0, np.int32)
        sound = np.concatenate([frame.audio[0, 0] for frame in said])[:length]
        return sound, np.concatenate([frame.text_ids for frame in said])

    # -------------------------------------------------------------------------------------------------------- text

    @cached_property
    def tokenizer(self) -> Any:
        """The ``tokenizers.Tokenizer`` of the export.

        Raises:
            BadExport: it has none.
        """
        if "tokenizer.json" not in self.manifest["tokenizer"]:
            raise BadExport(f"{str(self.folder)!r} has no tokenizer.json, so its text ids cannot be read as text.")
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    @cached_property
    def _wordless(self) -> frozenset[int]:
        special = {number for number, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        return frozenset(special.union(PADDING))

    def text(self, text_ids: Int[np.ndarray, "frames"]) -> str:
        """What the text ids of a dialogue say."""
        return self.tokenizer.decode(
            [number for number in np.asarray(text_ids).tolist() if self._says(number)]
        ).strip()

    def piece(self, text_id: int) -> str:
        """The piece of a word that a text id is, with a space before it where a word begins; empty if it is none."""
        if not self._says(text_id):
            return ""
        return self.tokenizer.id_to_token(text_id).replace(WORD_START, " ")

    def _says(self, text_id: int) -> bool:
        return 0 <= text_id < self.tokenizer.get_vocab_size() and text_id not in self._wordless


class OnnxMoshiStream:
    """Dialogues that are held; made by :meth:`OnnxMoshi.streaming`."""

    def __init__(self, model: OnnxMoshi, seed: int, numbers: dict[str, float | int]):
        self.model = model
        rows, manifest = model.batch_size, model.manifest
        if not isinstance(seed, int | np.integer) or seed < 0:
            raise ValueError(f"`seed` must be a whole number of at least 0, but is {seed!r}.")
        self._steps = {name: _Step(model.sessions[name], step) for name, step in manifest["steps"].items()}
        self._uniforms = UniformNumbers(manifest["steps"][CONVERSE]["uniforms"], rows, int(seed))
        self._position = 0
        inputs = manifest["steps"][CONVERSE]["inputs"]
        self._numbers = {
            name: np.full((rows, 1), value, inputs[name]["dtype"])
            for name, value in {**model.numbers, **checked_numbers(model, numbers)}.items()
        }
        self._free = np.full((rows, model.num_codebooks), -1, np.int32)
        # the start frame, in which nothing is heard or said
        self._converse(np.zeros_like(self._free), self._free[:, 0], self._free)

    def step(
        self,
        audio: Float[np.ndarray, "batch channels frame_size"],
        forced_text_ids: Int[np.ndarray, "batch"] | None = None,
        forced_audio_codes: Int[np.ndarray, "batch codebooks"] | None = None,
    ) -> OnnxMoshiFrame:
        """Hears 80 ms of every user and says 80 ms to each.

        Args:
            audio: floats in [-1, 1].
            forced_text_ids: text tokens of the frame after the one that is returned, -1 where Moshi chooses.
            forced_audio_codes: its codes, undelayed, -1 where Moshi chooses.

        Raises:
            ValueError: another shape, or samples that are not finite.
        """
        model = self.model
        expected = (model.batch_size, model.channels, model.frame_size)
        audio = np.asarray(audio, np.float32)
        if audio.shape != expected or not np.isfinite(audio).all():
            raise ValueError(f"`audio` must be finite floats of the shape {expected}, but has {audio.shape}.")
        forced_ids = self._forced("forced_text_ids", forced_text_ids, self._free[:, 0], model.vocab_size)
        forced_codes = self._forced(
            "forced_audio_codes", forced_audio_codes, self._free, model.manifest["audio_vocab_size"]
        )
        heard = self._steps[ENCODE](audio=audio)["user_codes"]
        said = self._converse(heard, forced_ids, forced_codes)
        spoken = self._steps[DECODE](audio_codes=said["audio_codes"])["audio"]
        return OnnxMoshiFrame(spoken, said["text_ids"], said["audio_codes"], said["text_logits"])

    def _converse(self, user_codes: Any, forced_ids: Any, forced_codes: Any) -> dict[str, np.ndarray]:
        uniforms = self._uniforms.of_step(self._position)
        self._position += 1
        return self._steps[CONVERSE](
            user_codes=user_codes, forced_ids=forced_ids, forced_codes=forced_codes, **self._numbers, **uniforms
        )

    def _forced(self, name: str, given: Any, free: Int[np.ndarray, "..."], size: int) -> Int[np.ndarray, "..."]:
        if given is None:
            return free
        given = np.asarray(given)
        if given.shape != free.shape or given.dtype.kind not in "iu" or ((given < -1) | (given >= size)).any():
            raise ValueError(f"`{name}` must be integers in [-1, {size}) of the shape {free.shape}.")
        return given.astype(np.int32)


class _Step:
    """A graph with its state, whose memory is given to onnxruntime once.

    The state lies in two places, in turn read and written; what the graph only writes to, such as the caches of
    attention, is in one.
    """

    def __init__(self, session: Any, described: dict[str, Any]):
        self._session = session
        memory = onnxruntime.OrtValue.ortvalue_from_numpy
        filled = [
            {entry["name"]: np.full(entry["shape"], entry["initial"], entry["dtype"]) for entry in described["state"]}
            for _ in range(2)
        ]
        places = [{name: memory(array) for name, array in arrays.items()} for arrays in filled]
        for entry in described["state"]:
            if entry["in_place"]:
                places[1][entry["name"]] = places[0][entry["name"]]
        self._inputs = {
            name: memory(np.zeros(entry["shape"], entry["dtype"])) for name, entry in described["inputs"].items()
        }
        self._outputs = {
            name: memory(np.zeros(entry["shape"], entry["dtype"])) for name, entry in described["outputs"].items()
        }
        self._bindings = []
        for before, after in (places, places[::-1]):
            binding = session.io_binding()
            for name, value in {**before, **self._inputs}.items():
                binding.bind_ortvalue_input(name, value)
            for name, value in {**{NEXT + name: value for name, value in after.items()}, **self._outputs}.items():
                binding.bind_ortvalue_output(name, value)
            self._bindings.append(binding)
        self._places = places

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        for name, array in inputs.items():
            self._inputs[name].update_inplace(np.ascontiguousarray(array))
        self._session.run_with_iobinding(self._bindings[0])
        self._bindings.reverse()
        return {name: value.numpy().copy() for name, value in self._outputs.items()}


def checked_numbers(model: OnnxMoshi, numbers: dict[str, float | int]) -> dict[str, float | int]:
    """The numbers of sampling that are given.

    Raises:
        ValueError: one that the export does not have, or that is out of range.
    """
    bounds = model.manifest["bounds"]
    for name, number in numbers.items():
        if name not in model.numbers:
            has = ", ".join(f"`{other}`" for other in model.numbers) or "none, as it is greedy"
            raise ValueError(f"the export was made without `{name}`; its numbers are: {has}.")
        whole = isinstance(number, int | np.integer) and not isinstance(number, bool)
        if not (whole or isinstance(number, float | np.floating)) or not np.isfinite(number) or number <= 0:
            raise ValueError(f"`{name}` must be a number above 0, but is {number!r}.")
        if name in bounds and not (whole and number <= bounds[name]):
            raise ValueError(f"`{name}` must be a whole number in [1, {bounds[name]}], but is {number!r}.")
        if name.endswith("_p") and number > 1:
            raise ValueError(f"`{name}` must be in (0, 1], but is {number!r}.")
    return numbers
