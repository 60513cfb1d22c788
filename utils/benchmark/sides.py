"""The implementations that are compared, each generating frames from the same weights and prompts.

A side is made of a checkpoint; :meth:`Side.prepared` runs the prompt of a setting and gives a function that generates
its timed frames, as often as wanted from the same context.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import GenerationConfig, MoshiForConditionalGeneration
from transformers.generation import StoppingCriteriaList

from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
from transformers_moshi_flax.generation import decoding
from transformers_moshi_flax.generation.arrays import on_device
from transformers_moshi_flax.generation.buckets import bucket, prefill_chunk
from transformers_moshi_flax.generation.configuration import resolve_plan
from transformers_moshi_flax.generation.recording import Recording
from transformers_moshi_flax.models.moshi.generation_flax_moshi import lay_out, resolve_depth_sampling
from transformers_moshi_flax.models.moshi.kyutai_config_flax_moshi import FILE_FIELDS
from transformers_moshi_flax.models.moshi.kyutai_flax_moshi import find_kyutai_files
from transformers_moshi_flax.models.moshi.preparing_flax_moshi import place_prompt

from .checkpoints import Checkpoint, Prompt
from .compilation import ProgramCost, compile_program
from .settings import Setting

DEFAULT_TOP_K = 50
"""Of ``GenerationConfig``, whose temperature is 1."""
CHUNK = 256
"""Frames of the prompt that the packages of Kyutai get at once."""


class Unsupported(Exception):
    """A side cannot run a setting; the message says why."""


class Run(NamedTuple):
    """Seconds of the timed frames, and their text tokens ``(batch, frames)``."""

    seconds: float
    text: np.ndarray


class Side(Protocol):
    """An implementation. Its constructor takes a :class:`Checkpoint`, and raises :class:`Unsupported`."""

    name: str

    def prepared(self, setting: Setting, prompt: Prompt) -> AbstractContextManager[Callable[[], Run]]:
        """Runs the prompt and warms up; what it holds is free at the end of the context.

        Raises:
            Unsupported: this setting cannot be run.
        """


class Ours:
    """This library: the two programs of ``generate``, of which the loop is timed; ``loading`` are options of
    ``from_pretrained``."""

    name = "this library"

    def __init__(self, checkpoint: Checkpoint, **loading: Any):
        self.model = FlaxMoshiForConditionalGeneration.from_pretrained(checkpoint.folder, **loading)
        self.costs: dict[Setting, tuple[ProgramCost, ProgramCost]] = {}

    @contextmanager
    def prepared(self, setting: Setting, prompt: Prompt) -> Iterator[Callable[[], Run]]:
        model, context, frames = self.model, setting.context, setting.frames
        config, params = model.config, model.params
        options = GenerationConfig(max_length=context + frames, do_sample=setting.sampled)
        plan = resolve_plan(options, context, config.vocab_size, setting.batch)
        capacity = bucket(max(context + frames, setting.capacity or 0))
        streams = {
            "input_ids": prompt.text,
            "user_audio_codes": prompt.user,
            "moshi_audio_codes": prompt.moshi,
        }
        placed = place_prompt(model, params, streams, None, None, plan, capacity)
        placed = placed.replace(blank_codes=on_device(prompt.silence[None, :, None], np.int32))
        input_ids, attention_mask, inputs, _ = model.compiled(lay_out, start_frame=False)(placed)
        request = model.make_request(
            plan,
            input_ids,
            attention_mask,
            None,
            capacity,
            prompt_length=context,
            streams=inputs,
            depth_sampling=resolve_depth_sampling(
                {"do_sample": setting.sampled}, {}, config.num_codebooks, config.audio_vocab_size
            ),
        )
        chunk = min(prefill_chunk(context - 1), capacity)
        start = model.compiled(decoding.start, chunk=chunk, recording=Recording())
        advance = model.compiled(decoding.advance, (2,), recording=Recording())
        start_cost = compile_program("start", start, params, request)
        state = jax.block_until_ready(start(params, request))
        until = jnp.int32(context + frames)
        self.costs[setting] = start_cost, compile_program("advance", advance, params, request, state, until)

        def run() -> Run:
            nonlocal state
            # the state that the prompt left, but for what is behind it, which is overwritten before it is read
            state = state.replace(
                position=jnp.int32(context),
                cache=state.cache.replace(length=jnp.int32(context - 1)),
                finished=jnp.zeros_like(state.finished),
            )
            jax.block_until_ready(state)
            begin = time.perf_counter()
            state = jax.block_until_ready(advance(params, request, state, until))
            seconds = time.perf_counter() - begin
            return Run(seconds, np.array(state.sequences[:, context : context + frames]))

        run()
        yield run


class Upstream:
    """``transformers``: whole calls of ``generate``; frames are timed from the first token on, after the prompt."""

    name = "upstream PyTorch"

    def __init__(self, checkpoint: Checkpoint):
        self.model = MoshiForConditionalGeneration.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()

    @contextmanager
    def prepared(self, setting: Setting, prompt: Prompt) -> Iterator[Callable[[], Run]]:
        self.generate(setting, prompt, 1, 3)
        yield lambda: self.generate(setting, prompt, setting.context, setting.frames)

    def generate(self, setting: Setting, prompt: Prompt, context: int, frames: int) -> Run:
        """Makes one token more than ``frames`` after ``context`` frames of the prompt: the first starts the clock."""
        times: list[float] = []

        def stamp(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

        with torch.inference_mode():
            outputs = self.model.generate(
                input_ids=torch.tensor(prompt.text[:, :context]),
                user_audio_codes=torch.tensor(prompt.user[:, :, :context]),
                moshi_audio_codes=torch.tensor(prompt.moshi[:, :, :context]),
                attention_mask=torch.ones(setting.batch, context, dtype=torch.long),
                concat_unconditional_inputs=False,
                return_audio_waveforms=False,
                return_audio_codes=True,
                max_new_tokens=frames + 1,
                do_sample=setting.sampled,
                depth_decoder_do_sample=setting.sampled,
                stopping_criteria=StoppingCriteriaList([stamp]),
            )
        if len(times) != frames + 1:
            raise RuntimeError(f"upstream made {len(times)} tokens instead of {frames + 1}")
        return Run(times[-1] - times[0], outputs.sequences[:, context : context + frames].numpy())


class Kyutai:
    """The package ``moshi``: ``LMGen.step``, eager. Its caches are rings of 3000 frames whatever their use."""

    name = "Kyutai's moshi"

    def __init__(self, checkpoint: Checkpoint):
        require("moshi")
        from moshi.models import loaders

        files = find_kyutai_files(checkpoint.kyutai)
        arguments = {name: value for name, value in files.config.items() if name not in (*FILE_FIELDS, "model_type")}
        self.model = loaders.get_moshi_lm(files.moshi_weights, arguments, dtype=torch.float32)

    @contextmanager
    def prepared(self, setting: Setting, prompt: Prompt) -> Iterator[Callable[[], Run]]:
        from moshi.models import LMGen
        from moshi.utils.compile import no_compile

        model, last = self.model, setting.context - 1
        delayed = torch.tensor(prompt.delayed(), dtype=torch.long)
        silence = torch.tensor(np.tile(prompt.silence[None, :, None], (setting.batch, 1, 1)), dtype=torch.long)
        heard = torch.tensor(prompt.user[:, :, -1:], dtype=torch.long)
        given = torch.tensor(prompt.moshi[:, 1:, last], dtype=torch.long)
        text: list[torch.Tensor] = []

        def force_delayed_codes(codes: torch.Tensor) -> None:
            # the delayed codes of the prompt's last frame are not to be chosen
            if len(text) == 1:
                codes[:, 1:] = given

        generator = LMGen(
            model,
            use_sampling=setting.sampled,
            temp=1.0,
            temp_text=1.0,
            top_k=DEFAULT_TOP_K,
            top_k_text=DEFAULT_TOP_K,
            on_text_hook=text.append,
            on_audio_hook=force_delayed_codes,
        )

        def rewind() -> None:
            text.clear()
            state = generator._streaming_state
            state.offsets.fill_(last)
            state.offset_cpu = last
            state.cache.fill_(model.ungenerated_token_id)
            state.cache[:, :, last % state.cache.shape[2]] = delayed[:, :, last]
            model.transformer._streaming_state.offsets.fill_(last)
            for layer in model.transformer.layers:
                attention = layer.self_attn._streaming_state
                attention.offset.fill_(last)
                attention.kv_cache.end_offset.fill_(last)
                attention.offset_cpu = layer._streaming_state.offset_cpu = last

        @torch.inference_mode()
        def run(frames: int = setting.frames) -> Run:
            rewind()
            begin = time.perf_counter()
            for frame in range(frames):
                generator.step(silence if frame else heard)
            return Run(time.perf_counter() - begin, torch.stack(text, dim=1).numpy())

        @torch.inference_mode()
        def prefill() -> None:
            for begin in range(0, last, CHUNK):
                model.forward_text(delayed[:, :, begin : min(begin + CHUNK, last)])

        with no_compile(), generator.streaming(setting.batch):
            prefill()
            run(2)
            yield run


class KyutaiMlx:
    """The package ``moshi_mlx``: ``LmGen.step``. Its attention over many frames is not causal, so that its prompt is
    run frame by frame where it is short, and a long one only fills the caches."""

    name = "Kyutai's moshi_mlx"

    def __init__(self, checkpoint: Checkpoint):
        require("moshi_mlx")
        import mlx.core as mx
        from moshi_mlx.models import Lm, LmConfig

        config = checkpoint.config
        for part in (config, config.depth_decoder_config):
            if part.ffn_dim != 2 * (11 * part.hidden_size // 4):
                raise Unsupported(
                    f"fixes the width of MLPs: {2 * (11 * part.hidden_size // 4)} for {part.hidden_size} dimensions, "
                    f"here {part.ffn_dim}"
                )
        files = find_kyutai_files(checkpoint.kyutai)
        lm_config = LmConfig.from_config_dict(json.loads(json.dumps(dict(files.config))))
        self.model = Lm(lm_config)
        self.model.load_pytorch_weights(str(files.moshi_weights), lm_config, strict=True)
        mx.eval(self.model.parameters())

    @contextmanager
    def prepared(self, setting: Setting, prompt: Prompt) -> Iterator[Callable[[], Run]]:
        import mlx.core as mx
        from moshi_mlx.models import LmGen
        from moshi_mlx.utils.sampling import Sampler

        if setting.batch > 1:
            raise Unsupported("its LmGen lays the codes of several rows out as one row")
        model, last = self.model, setting.context - 1
        caches = [cache.self_attn for cache in model.transformer_cache]
        delayed, undelayed = mx.array(prompt.delayed()), mx.array(prompt.undelayed())
        codebooks, given, silence = (
            prompt.moshi.shape[1],
            mx.array(prompt.moshi[0, 1:, last]),
            mx.array(prompt.silence),
        )
        length = CHUNK if setting.context > CHUNK // 4 else 1
        for cache in caches:
            cache.reset()
        for begin in range(0, last, length):
            ids = delayed[:, :, begin : min(begin + length, last)]
            inputs = model.text_emb(ids[:, 0])
            for stream, embedding in enumerate(model.audio_embs, start=1):
                inputs = inputs + embedding(ids[:, stream])
            mx.eval(model.transformer(inputs, cache=model.transformer_cache), [cache.state for cache in caches])
        kept = [dict(vars(cache)) for cache in caches]

        def run(frames: int = setting.frames) -> Run:
            for cache, values in zip(caches, kept, strict=True):
                vars(cache).update(values)
            samplers = [Sampler(temp=float(setting.sampled), top_k=DEFAULT_TOP_K) for _ in range(2)]
            generator = LmGen(model, setting.context + frames, *samplers)
            generator.step_idx = last
            # what a step generates stands one column earlier than its input here
            generator.gen_sequence[:, :, :last] = undelayed[:, :, 1:]
            mx.eval(generator.gen_sequence)
            text = []
            begin = time.perf_counter()
            for frame in range(frames):
                text.append(generator.step(silence)[0].item())
                if frame == 0:
                    generator.gen_sequence[0, 2 : 1 + codebooks, last - 1] = given
            mx.eval(generator.gen_sequence)
            return Run(time.perf_counter() - begin, np.array([text]))

        run(2)
        yield run


SIDES: dict[str, type[Side]] = {"ours": Ours, "upstream": Upstream, "kyutai": Kyutai, "mlx": KyutaiMlx}


def require(package: str) -> None:
    """Raises :class:`Unsupported` for a package that is not installed."""
    if find_spec(package) is None:
        raise Unsupported("not installed")
