"""Moshi as an endless dialogue, 80 ms at a time, many dialogues at once.

A stream has a number of slots, the rows of its batch. Each holds a dialogue of its own age, which never ends and takes
no more memory with time. All of it is in a :class:`StreamState`; a step takes one and returns the next.

A step is Mimi's encoder on the user's audio, one frame of Moshi, Mimi's decoder on Moshi's audio: one compiled
program, or four, one after another, where that is quicker. A frame is made as by ``generate``; which
frames meet in it is drawn in ``docs/streaming.md``.

``stream_state.py`` has the state, ``stream_options.py`` the options, ``stream_files.py`` what is written of a state.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int
from transformers import GenerationConfig

from ...checkpoints.formats import open_safetensors
from ...checkpoints.verifying import file_checksums, refuse_damage
from ...checkpoints.writing import write_safetensors
from ...generation.arrays import on_device, on_host, padded
from ...generation.decoding import UNFORCED, Chosen, last_logits
from ...generation.sampling import Sampling, row_keys, select_token
from ...input_checks import check_ids, check_input, check_sizes, is_traced, is_tracing, is_whole
from ...modeling_flax_outputs import FlaxCausalLMOutputWithPast, FlaxModelOutput
from ...nn.linear import ROWS
from ...ops.dispatch import steps_in_several_programs
from ..mimi.modules_flax_mimi import STEP_PARTS, parts_of
from ..mimi.quantizer_flax_mimi import prepared_for_frames
from ..mimi.streaming_flax_mimi import (
    FlaxMimiDecoderState,
    FlaxMimiEncoderState,
    seanet_histories,
)
from ..mimi.topology import samples_per_frame
from .frame_flax_moshi import frame_step
from .generation_flax_moshi import DEPTH_PREFIX, FrameDecoder
from .inputs_flax_moshi import require_waveforms, step_inputs
from .prompt_flax_moshi import MoshiPrompt
from .prompt_state import (
    ADOPT,
    CHUNK,
    PromptState,
    empty_cache,
    prefill,
    prompt_capacity,
    prompt_columns,
    prompt_embeds,
)
from .stream_files import ORIGIN, STATE_FORMAT, TEXT_IDS, digest, named_leaves, origin_tensor, with_leaves
from .stream_options import checked_numbers, resolve_stream_sampling
from .stream_state import CONFIGURE, PUT, REKEY, RESTART, TAKE, DialogueState, StreamState, empty_state, fold_rows

NOT_VALID = -1
"""Stands for ids and codes in frames that are not valid, where a slot has none."""


@dataclasses.dataclass
class FlaxMoshiFrame(FlaxModelOutput):
    """What a step returns: Moshi's side of the 80 ms whose user's side was passed.

    Attributes:
        audio: ``(batch, channels, frame_size)`` float32, silent where the frame is not valid; None with
            ``return_audio_waveforms=False``.
        audio_codes: its codes, undelayed, ``(batch, codebooks)`` int32, -1 where the frame is not valid.
        text_ids: its text token, ``(batch,)`` int32, -1 where the frame is not valid.
        valid: whether the slot has a frame: it is active, and the delay of its first frame has passed; ``(batch,)``.
        text_logits: of the text token that this step chose, the next frame's, ``(batch, vocab_size)``.
        last_hidden_state: of the backbone in this step, ``(batch, hidden_size)``.
    """

    # Any: callers map them to NumPy
    audio: Any = None
    audio_codes: Any = None
    text_ids: Any = None
    valid: Any = None
    text_logits: Any = None
    last_hidden_state: Any = None


def next_frame(
    decoder: FrameDecoder,
    params: Any,
    samplings: tuple[Sampling, Sampling],
    state: DialogueState,
    user_codes: Int[Array, "batch codebooks"],
    active: Bool[Array, "batch"],
    forced_ids: Int[Array, "batch"],
    forced_codes: Int[Array, "batch codebooks"],
) -> tuple[DialogueState, FlaxMoshiFrame]:
    """Runs one step: hears the user's frame, chooses the next text token and codes.

    Position 0 of a dialogue is the start frame, in which nothing is heard or said. Position ``k + 1`` has the text
    token and semantic codes of frame ``k`` and, delayed, the other codes of frame ``k - 1``; so what is chosen there
    completes frame ``k``, which is returned.

    Args:
        decoder: the model.
        params: its parameters.
        samplings: how text and codes are chosen; the numbers come from the state.
        state: the state so far.
        user_codes: the frame that is heard, undelayed.
        active: slots that take part; the others keep their state.
        forced_ids, forced_codes: text and undelayed codes of the frame after the one that is returned, ``UNFORCED``
            where they are to be chosen.
    """
    start_code = decoder.module.config.audio_vocab_size
    first = state.cache.length == 0
    # ids out of range become NaN, which would stay in the ring
    user_codes = jnp.where(active[:, None], user_codes, 0)
    forced_ids = jnp.where(active, forced_ids, UNFORCED)
    forced_codes = jnp.where(active[:, None], forced_codes, UNFORCED)

    def delayed(now: Int[Array, "batch codebooks"], before: Int[Array, "batch codebooks"]):
        return jnp.concatenate([now[:, :1], before[:, 1:]], axis=1)

    heard = jnp.where(first[:, None], start_code, delayed(user_codes, state.user_codes))
    keys = fold_rows(state.keys, state.steps)
    sampling, depth_sampling = with_numbers(samplings, state.numbers)

    def choose(outputs: FlaxCausalLMOutputWithPast) -> Chosen:
        text_ids = select_token(last_logits(outputs), state.text_ids[:, None], 0, keys, 0, sampling)
        return Chosen(jnp.where(forced_ids == UNFORCED, text_ids, forced_ids), keys)

    outputs, chosen, audio_codes = frame_step(
        decoder.module,
        params,
        text_ids=state.text_ids[:, None],
        user_codes=heard[..., None],
        moshi_codes=state.audio_codes[..., None],
        cache=state.cache,
        choose=choose,
        depth_sampling=depth_sampling,
        fixed_codes=delayed(forced_codes, jnp.where(first[:, None], start_code, state.forced_codes)),
        attention_mask=active[:, None],
    )

    assert outputs.last_hidden_state is not None
    valid = active & ~first
    frame = FlaxMoshiFrame(
        audio_codes=jnp.where(valid[:, None], delayed(state.audio_codes, audio_codes), NOT_VALID),
        text_ids=jnp.where(valid, state.text_ids, NOT_VALID),
        valid=valid,
        text_logits=last_logits(outputs),
        last_hidden_state=outputs.last_hidden_state[:, -1],
    )
    after = {
        "text_ids": chosen.tokens,
        "audio_codes": audio_codes,
        "user_codes": jnp.where(first[:, None], start_code, user_codes),
        "forced_codes": forced_codes,
        "steps": state.steps + jnp.uint32(1),
    }
    kept = {
        name: jnp.where(active.reshape(-1, *[1] * (new.ndim - 1)), new, getattr(state, name))
        for name, new in after.items()
    }
    return state.replace(cache=outputs.cache, **kept), frame


def with_numbers(samplings: tuple[Sampling, Sampling], numbers: dict[str, Any]) -> tuple[Sampling, Sampling]:
    """The samplings of text and codes with the numbers of the slots."""
    depth = {name.removeprefix(DEPTH_PREFIX): number for name, number in numbers.items() if DEPTH_PREFIX in name}
    text = {name: number for name, number in numbers.items() if DEPTH_PREFIX not in name}
    return samplings[0].replace(**text), samplings[1].replace(**depth)


def convolve_frame(
    decoder: FrameDecoder,
    params: Any,
    histories: tuple[Array, ...],
    cache_length: Int[Array, "batch"],
    audio: Float[Array, "batch channels samples"],
    active: Bool[Array, "batch"],
) -> tuple[tuple[Array, ...], Float[Array, "batch steps hidden_size"]]:
    """SEANet's features of a frame, and what its convolutions remember."""
    module = decoder.module
    return module.apply({"params": params}, histories, cache_length, audio, active, method=module.convolve_audio_step)


def encode_frame(
    decoder: FrameDecoder,
    params: Any,
    state: FlaxMimiEncoderState,
    features: Float[Array, "batch steps hidden_size"],
    active: Bool[Array, "batch"],
) -> tuple[FlaxMimiEncoderState, Int[Array, "batch codebooks"]]:
    """The codes of a frame with these features; the states lack the histories of SEANet."""
    module = decoder.module
    state, codes = module.apply({"params": params}, state, features, active, method=module.encode_features_step)
    return state, codes[..., 0]


def decode_frame(
    decoder: FrameDecoder,
    params: Any,
    state: FlaxMimiDecoderState,
    audio_codes: Int[Array, "batch codebooks"],
    valid: Bool[Array, "batch"],
) -> tuple[FlaxMimiDecoderState, Float[Array, "batch channels samples"]]:
    """The waveform of a frame; slots without one stand still and are silent."""
    module = decoder.module
    codes = jnp.where(valid[:, None], audio_codes, 0)[..., None]
    state, audio = module.apply({"params": params}, state, codes, valid, method=module.decode_audio_step)
    return state, jnp.where(valid[:, None, None], audio, 0).astype(jnp.float32)


def whole_step(
    decoder: FrameDecoder,
    parts: dict[str, Any],
    samplings: tuple[Sampling, Sampling],
    state: StreamState,
    heard: Array,
    active: Bool[Array, "batch"],
    forced_ids: Int[Array, "batch"],
    forced_codes: Int[Array, "batch codebooks"],
) -> tuple[StreamState, FlaxMoshiFrame]:
    """A step as one program; what is ``heard`` is audio of three axes, or codes of two."""
    if heard.ndim == 3:
        assert state.encoder is not None
        count = seanet_histories(decoder.module.config.audio_encoder_config)
        before, rest = state.encoder.histories[:count], state.encoder.histories[count:]
        convolved, features = convolve_frame(
            decoder, parts["convolve"], before, state.encoder.cache.length, heard, active
        )
        encoder, heard = encode_frame(
            decoder, parts["encode"], state.encoder.replace(histories=rest), features, active
        )
        state = state.replace(encoder=encoder.replace(histories=(*convolved, *encoder.histories)))
    dialogue, frame = next_frame(
        decoder, parts["frame"], samplings, state.dialogue, heard, active, forced_ids, forced_codes
    )
    state = state.replace(dialogue=dialogue)
    if state.decoder is not None:
        decoded, audio = decode_frame(decoder, parts["decode"], state.decoder, frame.audio_codes, frame.valid)
        state, frame = state.replace(decoder=decoded), frame.replace(audio=audio)
    return state, frame


class SharedProgram:
    """``program(traced, state, ...)`` for ``function(decoder, *shared, state, ...)``.

    The program is kept on the model, so that another stream compiles nothing. What is shared is flattened once, not in
    every step, and lies on every device of the mesh, over which the rest is spread. A copy of it compiles its own.

    Args:
        compiled: of the model.
        function: of the decoder and arrays.
        shared: its arguments after the decoder that are the same in every call.
        mesh: as of :class:`FlaxMoshiStream`.
    """

    def __init__(
        self, compiled: Callable[..., Any], function: Callable[..., Any], shared: tuple[Any, ...], mesh: Mesh | None
    ):
        self._made_of = (compiled, function, shared, mesh)
        leaves, structure = jax.tree.flatten(shared)
        self._leaves = tuple(leaves)
        self._call = compiled(on_mesh, (1,), function=function, structure=structure, mesh=mesh).call

    def __call__(self, traced: bool, *args: Any) -> Any:
        return self._call(traced, self._leaves, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedProgram, self._made_of


class FlaxMoshiStream:
    """Endless dialogues with a model; made by ``model.streaming``. It holds no state of theirs.

    Every method that takes a :class:`StreamState` and returns one consumes it: its memory becomes that of the result.
    Arguments are checked before that, so after an error the state is still good for the next frame. (:meth:`get_slot`
    and :meth:`save_state` leave it as it is.)

    Args:
        model: a ``FlaxMoshiForConditionalGeneration``.
        batch_size: slots.
        generation_config: how tokens are chosen; what is None in it comes from the model's. Lengths and ends of a
            configuration have no meaning in a stream.
        params: the parameters (default: the model's).
        mesh: devices with an axis ``data``, over which the slots are spread; ``batch_size`` must be a multiple.
        ignore_first_user_frame: begin a dialogue as Kyutai's ``LMGen`` does: the first step of a slot runs the start
            frame, so the user's frame that it is given is lost and it returns none. By default :meth:`init` and
            :meth:`reset` run the start frame.
        return_audio_waveforms: False leaves out Mimi's decoder, where the codes are enough.
        pin_prompt: whether dialogues remember all of their prompt for ever. The context then is the prompt and as many
            of the last frames as there is room for; by default it is the last frames, whatever they are.
        **kwargs: ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``typical_p``, ``epsilon_cutoff``,
            ``eta_cutoff``, ``suppress_tokens``, ``remove_invalid_values`` for the text, and with the prefix
            ``depth_decoder_`` these and all other processors for the codes of a frame. Numbers are those that slots
            begin with.

    Attributes:
        batch_size: slots.
        frame_size: samples of a frame.
        sampling_rate: samples a second.
        frame_rate: frames a second.
        num_codebooks: codes of a frame.
        samplings: how text and codes are chosen, but for the numbers.
        bounds: the largest ``top_k`` of either, by the names of :meth:`configure`.
        parts: the parameters of the programs that make up a step: ``convolve``, ``encode``, ``frame``, ``decode``.

    Raises:
        ValueError: unknown options, or options without an effect in a stream; a mesh that does not fit.
    """

    def __init__(
        self,
        model: Any,
        batch_size: int = 1,
        generation_config: GenerationConfig | None = None,
        params: Any | None = None,
        mesh: Mesh | None = None,
        ignore_first_user_frame: bool = False,
        return_audio_waveforms: bool = True,
        pin_prompt: bool = False,
        **kwargs: Any,
    ):
        check_sizes(batch_size=batch_size)
        config, codec = model.config, model.config.audio_encoder_config
        if return_audio_waveforms:
            require_waveforms(config)
        self.batch_size = batch_size
        self.frame_size = samples_per_frame(codec)
        self.sampling_rate = codec.sampling_rate
        self.frame_rate = codec.sampling_rate / self.frame_size
        self.num_codebooks = config.num_codebooks
        self.channels = codec.audio_channels
        self.mesh = checked_mesh(mesh, batch_size)
        self.ignore_first_user_frame = ignore_first_user_frame
        self.return_audio_waveforms = return_audio_waveforms
        self.pin_prompt = pin_prompt
        *self.samplings, self._numbers = resolve_stream_sampling(
            model.generation_defaults(), generation_config, kwargs, config
        )
        # looked up once: reading a configuration takes longer than all else in `step`
        self._inputs = step_inputs(config, batch_size)
        self._has_encoder = codec.encoder_config is not None
        self._config = config
        self._vocab_size, self._audio_vocab_size = config.vocab_size, config.audio_vocab_size
        self._dtype = model.dtype
        self.bounds = {
            f"{prefix}top_k": sampling.top_k_bound for prefix, sampling in zip(("", DEPTH_PREFIX), self.samplings)
        }
        kinds = ("pinned",) if pin_prompt else ()
        self._origin = digest(config, model.dtype, sorted(self._numbers), self.bounds, return_audio_waveforms, *kinds)
        self._compiled = model.compiled

        params = model.whole_params(params, batch_size)
        if self.mesh is not None:
            params = jax.device_put(params, NamedSharding(self.mesh, PartitionSpec()))
        codec_params = prepared_for_frames(params["audio_encoder"], codec, config.num_codebooks, model.dtype)
        dialogue = {name: part for name, part in params.items() if name != "audio_encoder"}
        rows = [leaf for path, leaf in flatten_dict(dialogue).items() if path[-1] == ROWS]
        self._adapted_by_slot = any(leaf.shape[0] > 1 for leaf in rows)
        self._seanet_histories = seanet_histories(codec)
        seanet, *others = STEP_PARTS["encode_step"]
        self.parts = parts = {
            "convolve": codec_part(codec_params, seanet),
            "encode": codec_part(codec_params, *others),
            "frame": dialogue,
            "decode": codec_part(codec_params, *STEP_PARTS["decode_step"]),
        }
        self._convolve = self._program(convolve_frame, parts["convolve"])
        self._encode = self._program(encode_frame, parts["encode"])
        self._frame = self._program(next_frame, dialogue, tuple(self.samplings))
        self._decode = self._program(decode_frame, parts["decode"])
        several = steps_in_several_programs()
        self._whole = None if several else self._program(whole_step, parts, tuple(self.samplings))
        free = np.full((batch_size, config.num_codebooks), UNFORCED, dtype=np.int32)
        self._all = self._on_devices(np.ones(batch_size, dtype=bool))
        self._free = tuple(self._on_devices(array) for array in (free[:, 0], free))
        self._blank = self._on_devices(np.zeros_like(free))
        self._starts = tuple(on_device(token, np.int32) for token in (config.vocab_size, config.audio_vocab_size))

    def _program(self, function: Callable[..., Any], *shared: Any) -> SharedProgram:
        return SharedProgram(self._compiled, function, shared, self.mesh)

    def __getstate__(self) -> dict[str, Any]:
        if self.mesh is not None:
            raise TypeError(
                "a stream on a mesh belongs to the devices of this process and cannot be copied or pickled: send the "
                "model, and call `streaming` where it arrives"
            )
        return vars(self)

    def _on_devices(self, array: np.ndarray) -> jax.Array:
        if self.mesh is None:
            return on_device(array)
        return jax.device_put(array, NamedSharding(self.mesh, PartitionSpec("data")))

    def _create(self, keys: jax.Array) -> StreamState:
        program = self._compiled(
            empty_state,
            with_encoder=self._has_encoder,
            with_decoder=self.return_audio_waveforms,
            dtype=jnp.dtype(self._dtype),
            pinned=self.pin_prompt,
            origin=self._origin,
            mesh=self.mesh,
        )
        return program(keys, self._numbers)

    # --------------------------------------------------------------------------------------------- dialogues

    def init(
        self,
        prng_key: jax.Array | None = None,
        forced_text_ids: ArrayLike | None = None,
        forced_audio_codes: ArrayLike | None = None,
        prompt: MoshiPrompt | PromptState | Sequence[MoshiPrompt | PromptState | None] | None = None,
    ) -> StreamState:
        """All slots at the beginning of a dialogue.

        Args:
            prng_key: a key, or one per slot, ``(batch,)`` (default: ``jax.random.key(0)``). What a slot draws depends
                on its own key only.
            forced_text_ids, forced_audio_codes: of the first frame (behind the prompt, where there is one), as in
                :meth:`step`.
            prompt: what dialogues begin from, or what :meth:`prefill` has made of it; one for all slots, or one per
                slot, None where there is none. A slot goes on as if each frame had been forced in a step of its own,
                but Mimi begins with the first frame behind the prompt, of which the first step hears the user's.

        Raises:
            ValueError: as :meth:`step` and :meth:`prefill`.
        """
        forced = self._checked_forced(forced_text_ids, forced_audio_codes, self._all)
        prompts = self._prompts_of(prompt, self._all)
        given = forced_text_ids is not None or forced_audio_codes is not None
        if self.ignore_first_user_frame and given and len(prompts) < self.batch_size:
            raise ValueError(
                "`forced_text_ids` and `forced_audio_codes` of the first frame go with the first step of a stream "
                "with `ignore_first_user_frame=True`: leave them out of `init`."
            )
        keys = row_keys(jax.random.key(0) if prng_key is None else prng_key, self.batch_size)
        return self._run_start(self._create(keys), self._all, forced, prompts)

    def reset(
        self,
        state: StreamState,
        rows: ArrayLike,
        prng_key: jax.Array | None = None,
        forced_text_ids: ArrayLike | None = None,
        forced_audio_codes: ArrayLike | None = None,
        prompt: MoshiPrompt | PromptState | Sequence[MoshiPrompt | PromptState | None] | None = None,
    ) -> StreamState:
        """Begins a new dialogue in some slots. The others do not change, and nothing is compiled.

        Args:
            state: the state, which is consumed.
            rows: which slots, ``(batch,)`` bool.
            prng_key: as in :meth:`init`; by default the key of each slot is folded with its age. The numbers of
                :meth:`configure` stay.
            forced_text_ids, forced_audio_codes: of the first frame, as in :meth:`init`.
            prompt: as in :meth:`init`; of other slots than ``rows`` it does not matter.

        Raises:
            ValueError: as :meth:`step` and :meth:`prefill`.
        """
        self._check_state(state)
        rows = self._checked("rows", rows)
        forced = self._checked_forced(forced_text_ids, forced_audio_codes, rows)
        prompts = self._prompts_of(prompt, rows)
        keys = None if prng_key is None else row_keys(prng_key, self.batch_size)
        state = RESTART(state, rows, *self._starts)
        if keys is not None:
            dialogue = REKEY(state.dialogue, rows, keys)
            state = state.replace(dialogue=dialogue)
        return self._run_start(state, rows, forced, prompts)

    def _run_start(
        self, state: StreamState, rows: ArrayLike, forced: tuple[Any, Any], prompts: dict[int, PromptState]
    ) -> StreamState:
        """Run the start frame, or the last one of a prompt."""
        heard = self._blank
        if prompts:
            states = {id(prompt): prompt for prompt in prompts.values()}
            frames = np.zeros((self.batch_size, self.num_codebooks), np.int32)
            for prompt in states.values():
                slots = np.array([prompts.get(slot) is prompt for slot in range(self.batch_size)])
                frames[slots] = on_host(prompt.heard)
                state = state.replace(dialogue=ADOPT(state.dialogue, self._on_devices(slots), prompt))
            heard = self._on_devices(frames)
        if self.ignore_first_user_frame:
            rows = self._on_devices(np.isin(np.arange(self.batch_size), [*prompts]))
            if not prompts:
                return state
        traced = is_traced(state.dialogue.text_ids, rows, *forced)
        dialogue, _ = self._frame(traced, state.dialogue, heard, rows, *forced)
        return state.replace(dialogue=dialogue)

    def prefill(self, prompt: MoshiPrompt, capacity: int = 1) -> PromptState:
        """What a prompt leaves behind, for the ``prompt`` of :meth:`init` and :meth:`reset`, any number of times.

        All its frames are run at once, in chunks of 64. Nothing is drawn, so it is good for every key and all numbers
        of sampling. It takes the memory of the keys and values of its frames, rounded up.

        Args:
            prompt: the frames.
            capacity: frames that there is room for at least. Programs are compiled for each capacity: 64, 128, 256, ….

        Raises:
            ValueError: other codebooks than the model's, ids out of range; with ``pin_prompt``, more frames than the
                context can keep; a different adapter in each slot; a ``capacity`` below 1; inside of ``jax.jit``.
        """
        self.check_prompt(prompt)
        check_sizes(capacity=capacity)
        if is_tracing():
            raise ValueError(
                "`prompt` is not run inside of `jax.jit`: call `prefill` before, and pass what it returns."
            )
        frames, capacity = prompt.frames, prompt_capacity(max(prompt.frames, capacity))
        columns = prompt_columns(prompt, self._config)
        embeds = prompt_embeds(prompt, self._config, self._dtype)
        cache = self._alone(self._compiled(empty_cache, capacity=capacity)())
        program = self._compiled(prefill, (1,))
        for begin in range(0, frames, CHUNK):
            end = min(begin + CHUNK, frames)
            chunk = [padded(column[..., begin:end], CHUNK, 0) for column in columns]
            chunk += [padded(part[:, begin:end], CHUNK, 0, axis=1) for part in embeds]
            cache = program(self.parts["frame"], cache, *map(self._alone, chunk))
            # so that those who use the device as well come in between
            jax.block_until_ready(cache)
        text_ids, _, moshi_codes = columns
        heard_before = columns[1][..., 0] if frames == 1 else prompt.user_codes[None, :, -2]
        small = {
            "text_ids": text_ids[:, -1],
            "audio_codes": moshi_codes[..., -1],
            "user_codes": heard_before,
            "forced_codes": prompt.moshi_codes[None, :, -1],
            "heard": prompt.user_codes[None, :, -1],
            "steps": np.array([frames], np.uint32),
        }
        return PromptState(
            cache=cache.replace(length=self._alone(np.int32(frames))),
            **{name: self._alone(array) for name, array in small.items()},
            origin=self._origin,
        )

    def check_prompt(self, prompt: MoshiPrompt) -> None:
        """Raises ``ValueError`` for a prompt that :meth:`prefill` would refuse."""
        if not isinstance(prompt, MoshiPrompt):
            raise ValueError(f"`prompt` must be a MoshiPrompt, but is {type(prompt).__name__}.")
        prompt.check_for(self._config)
        if self._adapted_by_slot:
            raise ValueError(
                "`prompt` is run for all slots alike, but each has an adapter of its own: force its frames in steps."
            )
        context = self._config.sliding_window
        if self.pin_prompt and prompt.frames > context - 2:
            raise ValueError(
                f"`prompt` has {prompt.frames} frames, but of the {context} frames of the context `pin_prompt=True` "
                f"can keep {context - 2} at most: shorten it."
            )

    def _alone(self, tree: Any) -> Any:
        """What belongs to no slot, where the programs want it: on every device."""
        if self.mesh is not None:
            return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))
        return jax.tree.map(on_device, tree)

    def _prompts_of(self, prompt: Any, rows: ArrayLike) -> dict[int, PromptState]:
        """What the slots among ``rows`` begin from, by slot; each prompt is prefilled once."""
        if prompt is None:
            return {}
        prompts = [prompt] * self.batch_size if isinstance(prompt, (MoshiPrompt, PromptState)) else [*prompt]
        if len(prompts) != self.batch_size:
            raise ValueError(f"`prompt` has {len(prompts)} prompts, but there are {self.batch_size} slots.")
        if is_traced(rows):
            raise ValueError("`rows` with a `prompt` must be known at trace time.")
        wanted = {slot: prompts[slot] for slot in np.flatnonzero(np.asarray(rows)).tolist()}
        made: dict[int, PromptState] = {}
        for one in wanted.values():
            if isinstance(one, PromptState):
                if one.origin != self._origin:
                    raise ValueError("`prompt` is of another configuration, dtype or kind of stream: prefill it anew.")
                made[id(one)] = one
            elif one is not None:
                made[id(one)] = made.get(id(one)) or self.prefill(one)
        return {slot: made[id(one)] for slot, one in wanted.items() if one is not None}

    def step(
        self,
        state: StreamState,
        user_audio: ArrayLike | None = None,
        user_audio_codes: ArrayLike | None = None,
        active: ArrayLike | None = None,
        forced_text_ids: ArrayLike | None = None,
        forced_audio_codes: ArrayLike | None = None,
    ) -> tuple[StreamState, FlaxMoshiFrame]:
        """Hears 80 ms of every user and says 80 ms to each.

        Args:
            state: the state, which is consumed.
            user_audio: ``(batch, channels, frame_size)`` floats in [-1, 1]; encoded by Mimi in a stream.
            user_audio_codes: instead of it, the codes of a frame, ``(batch, num_codebooks)`` in ``[0,
                audio_vocab_size)``. Mimi's encoder then stands still.
            active: slots that take part, ``(batch,)`` bool; all by default. The others rest as they are, and what is
                passed for them does not matter.
            forced_text_ids: text tokens of the frame after the one that is returned, ``(batch,)``, -1 where Moshi
                chooses.
            forced_audio_codes: its codes, undelayed, ``(batch, num_codebooks)``, -1 where Moshi chooses.

        Returns:
            The next state, and Moshi's frame.

        Raises:
            ValueError: no user's frame or two; a wrong shape or dtype; samples that are not finite; ids out of range;
                a state that was consumed, or is of another configuration or batch size. The state is not consumed.
        """
        self._check_state(state)
        if (user_audio is None) == (user_audio_codes is None):
            raise ValueError("Pass one of `user_audio` and `user_audio_codes` (silence is zeros of `user_audio`).")
        active = self._all if active is None else self._checked("active", active)
        forced = self._checked_forced(forced_text_ids, forced_audio_codes, active)
        if user_audio is not None and not self._has_encoder:
            raise ValueError("`user_audio` needs Mimi's encoder, which the model lacks: pass `user_audio_codes`.")
        name = "user_audio_codes" if user_audio is None else "user_audio"
        heard = self._checked(name, user_audio_codes if user_audio is None else user_audio, active)
        traced = is_traced(state.dialogue.text_ids, heard, active, *forced)
        if self._whole is not None:
            return self._whole(traced, state, heard, active, *forced)
        if user_audio is not None:
            assert state.encoder is not None
            encoder, heard = self._hear(traced, state.encoder, heard, active)
            state = state.replace(encoder=encoder)
        dialogue, frame = self._frame(traced, state.dialogue, heard, active, *forced)
        state = state.replace(dialogue=dialogue)
        if self.return_audio_waveforms:
            decoder, audio = self._decode(traced, state.decoder, frame.audio_codes, frame.valid)
            state, frame = state.replace(decoder=decoder), frame.replace(audio=audio)
        return state, frame

    def _hear(
        self, traced: bool, state: FlaxMimiEncoderState, audio: ArrayLike, active: ArrayLike
    ) -> tuple[FlaxMimiEncoderState, jax.Array]:
        """Mimi's encoder. Its convolutions have few arrays: they are begun early, and run while the rest is called."""
        count = self._seanet_histories
        convolved, features = self._convolve(traced, state.histories[:count], state.cache.length, audio, active)
        state, codes = self._encode(traced, state.replace(histories=state.histories[count:]), features, active)
        return state.replace(histories=(*convolved, *state.histories)), codes

    @property
    def numbers(self) -> dict[str, float | int]:
        """The numbers of sampling that slots begin with, by the names that :meth:`configure` takes."""
        return {name: number.item() for name, number in self._numbers.items()}

    def check_numbers(self, **numbers: Any) -> None:
        """Raises ``ValueError`` for what :meth:`configure` would refuse; nothing is changed."""
        checked_numbers(numbers, self._numbers, self.bounds, self.batch_size)

    def configure(self, state: StreamState, rows: ArrayLike | None = None, **numbers: Any) -> StreamState:
        """Sets the numbers of sampling for some slots; nothing is compiled.

        Args:
            state: the state, which is consumed.
            rows: which slots, ``(batch,)`` bool; all by default.
            **numbers: ``temperature``, ``top_k`` and the others that the stream was made with, also with the prefix
                ``depth_decoder_``; each a number, or one per slot.

        Raises:
            ValueError: numbers that the stream was made without or that are out of range, a ``top_k`` above the
                stream's bound (a power of two above the one that it was made with, at least 64).
        """
        self._check_state(state)
        rows = self._all if rows is None else self._checked("rows", rows)
        # all of them in any case, so that one program does for whatever is changed
        values = checked_numbers({**self._numbers, **numbers}, self._numbers, self.bounds, self.batch_size)
        changes = {name: (np.full(value.shape, name in numbers), value) for name, value in values.items()}
        return state.replace(dialogue=CONFIGURE(state.dialogue, rows, jax.tree.map(self._on_devices, changes)))

    def warmup(self, prompt_frames: int = 0) -> None:
        """Compiles everything that dialogues need, ahead of time.

        Args:
            prompt_frames: for prompts of the capacity that so many frames have; 0 if there are to be none.

        Raises:
            ValueError: ``prompt_frames`` is no whole number, or below 0.
        """
        if prompt_frames:
            check_sizes(prompt_frames=prompt_frames)
        state = self.init(jax.random.key(0))
        silence = np.zeros((self.batch_size, self.channels, self.frame_size), dtype=np.float32)
        if state.encoder is not None:
            state, _ = self.step(state, silence)
        state, _ = self.step(state, user_audio_codes=np.zeros((self.batch_size, self.num_codebooks), np.int32))
        state = self.reset(state, np.ones(self.batch_size, dtype=bool), jax.random.key(0))
        state = self.configure(state, **self._numbers)
        if prompt_frames:
            blank = np.zeros((self.num_codebooks, 1), np.int32)
            prompt = self.prefill(MoshiPrompt(blank[0], blank, blank), prompt_frames)
            state = self.reset(state, np.ones(self.batch_size, dtype=bool), jax.random.key(0), prompt=prompt)
        jax.block_until_ready(self.set_slot(state, 0, self.get_slot(state, 0)))

    # ---------------------------------------------------------------------------------------- state as data

    def get_slot(self, state: StreamState, slot: int | np.integer) -> StreamState:
        """The dialogue of one slot, as a state of batch 1. The given state is not consumed.

        Raises:
            ValueError: a slot that is not there; as :meth:`step` for the state.
        """
        self._check_state(state)
        return TAKE(state, on_device(self._checked_slot(slot), np.int32))

    def set_slot(self, state: StreamState, slot: int | np.integer, row: StreamState) -> StreamState:
        """Puts a dialogue of :meth:`get_slot` or :meth:`load_state` into a slot; ``state`` is consumed.

        Raises:
            ValueError: a slot that is not there, a ``row`` of more than one dialogue; as :meth:`step` for the states.
        """
        self._check_state(state)
        self._check_state(row, "row", batch_size=1)
        place = on_device(self._checked_slot(slot), np.int32)
        if row is state:
            return state
        if self.mesh is not None:
            row = jax.device_put(row, NamedSharding(self.mesh, PartitionSpec()))
        return PUT(state, place, row)

    def save_state(self, state: StreamState, path: str | os.PathLike) -> None:
        """Writes a state, of all slots or of one, as a safetensors file, which is complete before it has its name.

        The state is not consumed.

        Args:
            state: the state.
            path: the file, which is replaced if it is there; its folder must be there.

        Raises:
            ValueError: as :meth:`step` for the state; ``path`` is a folder.
            FileNotFoundError: the folder is not there.
            OSError: the file cannot be written.
        """
        self._check_state(state, batch_size=state.batch_size)
        path = Path(path)
        if path.is_dir():
            raise ValueError(f"`path` is {str(path)!r}, which is a folder: give the name of a file in it.")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"`path` is {str(path)!r}, but there is no folder {path.parent}: make it first.")
        tensors = {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}
        write_safetensors(path, {**tensors, ORIGIN: origin_tensor(self._origin)}, STATE_FORMAT)

    def load_state(self, path: str | os.PathLike, slot: int | np.integer | None = None) -> StreamState:
        """Reads a state of :meth:`save_state`; the dialogues go on as if they had not been interrupted.

        Args:
            path: the file.
            slot: read one slot of the file, whatever its batch size, for :meth:`set_slot`; by default all slots.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a file that is damaged or no state, a state of another configuration or batch size, a slot that
                is not in it.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"`path`: there is no file {path}.")
        file = open_safetensors(path)
        if file.metadata.get("format") != STATE_FORMAT or ORIGIN not in file:
            raise ValueError(f"`path`: {path} is no state of a stream (see `save_state`).")
        if set(file_checksums(file)) != set(file):
            raise ValueError(f"`path`: {path} is damaged, it lacks checksums: use another copy.")
        refuse_damage(file)
        if not np.array_equal(file[ORIGIN], origin_tensor(self._origin)):
            raise ValueError(
                f"`path`: {path} has a state of another configuration, dtype or kind of stream (which numbers it "
                "samples with, whether it returns waveforms): load it with a stream as the one that saved it."
            )
        text_ids = file.get(TEXT_IDS)
        batch_size = 0 if text_ids is None or text_ids.ndim != 1 else text_ids.shape[0]
        if slot is None and batch_size != self.batch_size:
            raise ValueError(
                f"`path`: {path} has a batch of {batch_size}, but the stream has {self.batch_size} slots: load single "
                "dialogues with `slot=` and put them in with `set_slot`."
            )
        if slot is not None:
            self._checked_slot(slot, batch_size, f"the file {path}")
        keys = jax.eval_shape(lambda: row_keys(jax.random.key(0), batch_size))
        expected = jax.eval_shape(self._create, keys)
        leaves = {}
        for name, shape in named_leaves(expected).items():
            array = file.get(name)
            if array is None or array.shape != shape.shape or array.dtype != shape.dtype:
                found = "is missing" if array is None else f"is {array.dtype} {array.shape}"
                raise ValueError(f"`path`: {path} does not fit: {name} {found}, not {shape.dtype} {shape.shape}.")
            count = shape.shape[0] // batch_size
            leaves[name] = np.array(array if slot is None else array[slot * count : (slot + 1) * count])
        self._refuse_senseless(path, leaves)
        placed = self._on_devices if slot is None else on_device
        return with_leaves(expected, {name: placed(leaf) for name, leaf in leaves.items()})

    def _refuse_senseless(self, path: Path, leaves: dict[str, np.ndarray]) -> None:
        """Raises ``ValueError`` for indices that JAX would clamp in silence."""
        codes = self._audio_vocab_size + 1
        sizes = {
            TEXT_IDS: self._vocab_size + 1,
            "dialogue.audio_codes": codes,
            "dialogue.user_codes": codes,
        }
        for part in ("dialogue", "encoder", "decoder"):
            if f"{part}.cache.slot" in leaves:
                slots = leaves[f"{part}.cache.keys.0"].shape[1]
                sizes |= {f"{part}.cache.slot": slots, f"{part}.cache.filled": slots + 1}
                if f"{part}.cache.pinned" in leaves:
                    sizes |= {f"{part}.cache.pinned": slots}
        for name, size in sizes.items():
            if ((leaves[name] < 0) | (leaves[name] >= size)).any():
                raise ValueError(f"`path`: {path} is no good state: {name} must be in [0, {size}).")
        numbers = {name: leaves[f"dialogue.numbers.{name}"][:, 0] for name in self._numbers}
        try:
            check_ids("forced_codes", leaves["dialogue.forced_codes"], self._audio_vocab_size, (UNFORCED,))
            checked_numbers(numbers, self._numbers, self.bounds, len(leaves[TEXT_IDS]))
        except ValueError as error:
            raise ValueError(f"`path`: {path} is no good state: {error}") from error

    # ----------------------------------------------------------------------------------------------- checks

    def _check_state(self, state: Any, name: str = "state", batch_size: int | None = None) -> None:
        if not isinstance(state, StreamState):
            raise ValueError(f"`{name}` must be a state of `init`, but is {type(state).__name__}.")
        if state.origin != self._origin:
            raise ValueError(
                f"`{name}` is of another configuration, dtype or kind of stream (which numbers it samples with, "
                "whether it returns waveforms): use a stream as the one that made it."
            )
        expected = self.batch_size if batch_size is None else batch_size
        if state.batch_size != expected:
            raise ValueError(f"`{name}` has a batch of {state.batch_size}, but {expected} is needed here.")
        text_ids = state.dialogue.text_ids
        if isinstance(text_ids, jax.Array) and not is_traced(text_ids) and text_ids.is_deleted():
            raise ValueError(f"`{name}` was consumed by an earlier call: go on with the state that this returned.")

    def _checked(self, name: str, value: ArrayLike | None, rows: Any = ...) -> ArrayLike:
        """``value`` as the programs want it; ValueError unless the table of inputs has it so, in the ``rows``."""
        expected = self._inputs[name]
        check_input(name, value, expected, rows=... if rows is self._all else rows)
        dtype = {"ids": np.int32, "audio": self._dtype}.get(expected.kind, np.bool_)
        array = value if is_traced(value) else np.asarray(value)
        if array.dtype != dtype:
            with np.errstate(over="ignore"):  # in slots that do not take part
                array = array.astype(dtype)
        return self._placed(array)

    def _placed(self, array: ArrayLike) -> ArrayLike:
        """A copy, as the caller may write the next frame over this one before it is heard, where the programs want it:
        elsewhere it would be another argument, for which they are compiled again.
        """
        if is_traced(array):
            return array
        array = np.array(array)
        return array if self.mesh is None else self._on_devices(array)

    def _checked_slot(self, slot: Any, slots: int | None = None, owner: str = "the stream") -> int:
        slots = self.batch_size if slots is None else slots
        if not is_whole(slot) or not 0 <= slot < slots:
            raise ValueError(f"`slot` is {slot!r}, but {owner} has the slots 0 to {slots - 1}.")
        return slot

    def _checked_forced(
        self, text_ids: ArrayLike | None, codes: ArrayLike | None, rows: ArrayLike
    ) -> tuple[ArrayLike, ArrayLike]:
        free_ids, free_codes = self._free
        return (
            free_ids if text_ids is None else self._checked("forced_text_ids", text_ids, rows),
            free_codes if codes is None else self._checked("forced_audio_codes", codes, rows),
        )


# ------------------------------------------------------------------------------------------------- making programs


def on_mesh(
    decoder: FrameDecoder, leaves: tuple[Array, ...], *args: Any, function: Any, structure: Any, mesh: Mesh | None
) -> Any:
    """``function(decoder, *shared, *args)`` on the slots of each device; ``leaves`` are those of what is shared."""

    def call(leaves: tuple[Array, ...], *args: Any) -> Any:
        return function(decoder, *jax.tree.unflatten(structure, leaves), *args)

    if mesh is None:
        return call(leaves, *args)
    row = PartitionSpec("data")
    specs = (PartitionSpec(), *[row] * len(args))
    return jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=row, check_vma=False)(leaves, *args)


def codec_part(params: dict[str, Any], *names: str) -> dict[str, Any]:
    """These parts of Mimi, as far as it has them, where the whole model has them."""
    return {"audio_encoder": parts_of(params, names)}


def checked_mesh(mesh: Mesh | None, batch_size: int) -> Mesh | None:
    """Raises ``ValueError`` unless the slots can be spread over the axis ``data`` alone."""
    if mesh is None:
        return None
    others = {name: size for name, size in mesh.shape.items() if name != "data" and size > 1}
    if "data" not in mesh.shape or others:
        raise ValueError(f"`mesh` must have the axis 'data' and no other larger than 1, but has {dict(mesh.shape)}.")
    if batch_size % mesh.shape["data"]:
        raise ValueError(
            f"`batch_size` is {batch_size}, but the axis 'data' of `mesh` has {mesh.shape['data']} devices: choose a "
            "multiple."
        )
    return mesh
