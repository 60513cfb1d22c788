"""The implementations of the streaming benchmark, each doing one frame of 80 ms after the other from the same weights.

A side is made of a checkpoint. It codes audio (:meth:`StreamSide.codec`) and holds dialogues
(:meth:`StreamSide.dialogue`), both as runners: functions that take a frame of audio of every row, and tell how long
each part took until its result was there.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import jax
import numpy as np
import torch
from jaxtyping import Float

from transformers_moshi_flax import FlaxMimiModel, FlaxMoshiForConditionalGeneration
from transformers_moshi_flax.models.mimi.kyutai_flax_mimi import KYUTAI_MIMI
from transformers_moshi_flax.models.moshi.kyutai_flax_moshi import find_kyutai_files
from transformers_moshi_flax.models.moshi.streaming_flax_moshi import FlaxMoshiStream

from .checkpoints import FRAME_SIZE, Checkpoint
from .sides import Kyutai, Unsupported, require

ENCODE, MOSHI, DECODE, BOTH, STEP = "Mimi encode", "Moshi", "Mimi decode", "encode + decode", "step"
HOST, HANDOVER = "processor time of the calling thread", "until the first program is handed over"
GREEDY = {"do_sample": False, "depth_decoder_do_sample": False}

Frames = Float[np.ndarray, "batch channels samples"]
Runner = Callable[[Frames], dict[str, float]]
"""Does a frame; returns seconds by part."""


class StreamSide(Protocol):
    """An implementation. Its constructor takes a :class:`Checkpoint`, and raises :class:`Unsupported`.

    The state of a runner begins anew with its context, which frees it at the end.
    """

    name: str

    def codec(self, batch: int) -> AbstractContextManager[Runner]:
        """Encodes a frame to the codebooks that Moshi uses, and decodes the codes."""

    def dialogue(self, batch: int) -> AbstractContextManager[dict[str, Runner]]:
        """Runners by what is said of them behind the name of the side, none for a mere codec; all choose the most
        probable."""


class Stream:
    """This library."""

    name = "this library"

    def __init__(self, checkpoint: Checkpoint):
        self.model = FlaxMoshiForConditionalGeneration.from_pretrained(checkpoint.folder)
        self.mimi = FlaxMimiModel(checkpoint.config.audio_encoder_config, _do_init=False)
        self.streams: dict[int, FlaxMoshiStream] = {}

    def stream(self, batch: int) -> FlaxMoshiStream:
        """That of a batch: always the same, whose programs are compiled once."""
        if batch not in self.streams:
            self.streams[batch] = self.model.streaming(batch, **GREEDY)
        return self.streams[batch]

    @contextmanager
    def codec(self, batch: int) -> Iterator[Runner]:
        mimi, params = self.mimi, self.model.params["audio_encoder"]
        codebooks = self.model.config.num_codebooks
        encoder, decoder = mimi.init_encoder_state(batch), mimi.init_decoder_state(batch)

        def run(audio: Frames) -> dict[str, float]:
            nonlocal encoder, decoder
            begin = time.perf_counter()
            encoder, codes = mimi.encode_step(encoder, audio, num_quantizers=codebooks, params=params)
            codes.block_until_ready()
            middle = time.perf_counter()
            decoder, decoded = mimi.decode_step(decoder, codes, params=params)
            np.asarray(decoded)
            return parts_of(begin, middle, time.perf_counter())

        yield run

    @contextmanager
    def dialogue(self, batch: int) -> Iterator[dict[str, Runner]]:
        stream = self.stream(batch)
        # the same programs, each timed until its results are there
        parts: dict[str, float] = {}
        split = copy.copy(stream)
        for part, program in {ENCODE: "_hear", MOSHI: "_frame", DECODE: "_decode"}.items():
            setattr(split, program, timed(getattr(stream, program), part, parts))

        def whole() -> Runner:
            state, handed_over = stream.init(), 0.0
            watched = copy.copy(stream)

            def convolve(*args: Any) -> Any:
                nonlocal handed_over
                results = stream._convolve(*args)
                handed_over = time.perf_counter()
                return results

            watched._convolve = convolve

            def run(audio: Frames) -> dict[str, float]:
                nonlocal state
                begin, worked = time.perf_counter(), time.thread_time()
                state, frame = watched.step(state, audio)
                worked = time.thread_time() - worked
                np.asarray(frame.audio)
                return {STEP: time.perf_counter() - begin, HOST: worked, HANDOVER: handed_over - begin}

            return run

        def in_parts() -> Runner:
            state = stream.init()

            def run(audio: Frames) -> dict[str, float]:
                nonlocal state
                state, _ = split.step(state, audio)
                return dict(parts)

            return run

        yield {"": whole(), "in parts": in_parts()}


class KyutaiStream:
    """The package ``moshi``: ``MimiModel.streaming`` and ``LMGen.step``, eager."""

    name = "Kyutai's moshi"

    def __init__(self, checkpoint: Checkpoint):
        self.moshi = Kyutai(checkpoint).model
        from moshi.models import loaders

        files = find_kyutai_files(checkpoint.kyutai)
        mimi_config = json.loads(json.dumps(dict(files.mimi_config)))
        self.mimi = loaders.get_mimi(files.mimi_weights, mimi_config, num_codebooks=checkpoint.config.num_codebooks)

    @contextmanager
    def codec(self, batch: int) -> Iterator[Runner]:
        mimi = self.mimi

        @torch.inference_mode()
        def run(audio: Frames) -> dict[str, float]:
            begin = time.perf_counter()
            codes = mimi.encode(torch.from_numpy(audio))
            middle = time.perf_counter()
            mimi.decode(codes)
            return parts_of(begin, middle, time.perf_counter())

        with torch.inference_mode(), mimi.streaming(batch):
            yield run

    @contextmanager
    def dialogue(self, batch: int) -> Iterator[dict[str, Runner]]:
        from moshi.models import LMGen
        from moshi.utils.compile import no_compile

        mimi, generator = self.mimi, LMGen(self.moshi, use_sampling=False)

        @torch.inference_mode()
        def run(audio: Frames) -> dict[str, float]:
            times = [time.perf_counter()]
            codes = mimi.encode(torch.from_numpy(audio))
            times.append(time.perf_counter())
            tokens = generator.step(codes)
            times.append(time.perf_counter())
            if tokens is not None:  # None in the first steps, before the delay has passed
                mimi.decode(tokens[:, 1:])
            times.append(time.perf_counter())
            return {**dict(zip((ENCODE, MOSHI, DECODE), np.diff(times), strict=True)), STEP: times[-1] - times[0]}

        with no_compile(), torch.inference_mode(), mimi.streaming(batch), generator.streaming(batch):
            yield {"": run}


class RustyMimi:
    """``rustymimi``, the codec in Rust, whose threads are those of rayon: ``RAYON_NUM_THREADS``."""

    name = "rustymimi"

    def __init__(self, checkpoint: Checkpoint):
        require("rustymimi")
        self.files = find_kyutai_files(checkpoint.kyutai)
        if self.files.mimi_config != KYUTAI_MIMI:
            raise Unsupported("has the published architecture only")
        self.codebooks = checkpoint.config.num_codebooks

    @contextmanager
    def codec(self, batch: int) -> Iterator[Runner]:
        from rustymimi import Tokenizer

        # the batch is that of the first frame
        tokenizer = Tokenizer(str(self.files.mimi_weights), num_codebooks=self.codebooks)

        def run(audio: Frames) -> dict[str, float]:
            begin = time.perf_counter()
            codes = tokenizer.encode_step(audio)
            middle = time.perf_counter()
            tokenizer.decode_step(codes)
            return parts_of(begin, middle, time.perf_counter())

        yield run

    @contextmanager
    def dialogue(self, batch: int) -> Iterator[dict[str, Runner]]:
        yield {}


STREAM_SIDES: dict[str, type[StreamSide]] = {"ours": Stream, "kyutai": KyutaiStream, "rustymimi": RustyMimi}


def frames_of_noise(batch: int) -> Float[np.ndarray, "frames batch channels samples"]:
    """Some frames of audio, always the same."""
    return np.random.default_rng(0).normal(0, 0.1, (16, batch, 1, FRAME_SIZE)).astype(np.float32)


def parts_of(begin: float, middle: float, end: float) -> dict[str, float]:
    """Seconds of the parts of a codec's frame."""
    return {ENCODE: middle - begin, DECODE: end - middle, BOTH: end - begin}


def timed(program: Callable[..., Any], part: str, parts: dict[str, float]) -> Callable[..., Any]:
    """``program``, leaving in ``parts`` how long it took until its results were there."""

    def call(*args: Any) -> Any:
        begin = time.perf_counter()
        results = jax.block_until_ready(program(*args))
        parts[part] = time.perf_counter() - begin
        return results

    return call
