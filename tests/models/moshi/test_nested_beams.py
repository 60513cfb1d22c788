"""Beam search over text and audio against a search in plain NumPy, with lists and passes over whole dialogues."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import MoshiForConditionalGeneration

from tests.configs import tiny_moshi_config
from tests.torch_oracle import make_pair
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
from transformers_moshi_flax.generation.sampling import Sampling, select_token
from transformers_moshi_flax.models.moshi.generation_flax_moshi import encode_audio

VOCAB, AUDIO_VOCAB = 17, 16
BATCH, FRAMES = 2, 24
TEMPERATURE = 0.8
# what programs are compiled for: the model, number of beams, early_stopping, and whether codes are drawn
PROGRAMS: list[tuple[dict[str, Any], int, bool | str, bool]] = [
    ({"num_codebooks": 3, "num_key_value_heads": 1}, 3, False, False),
    ({"num_codebooks": 2, "sliding_window": 6}, 2, "never", True),
]


def make_model(directory: Any, **overrides: Any) -> Any:
    config = tiny_moshi_config(
        vocab_size=VOCAB,
        audio_vocab_size=AUDIO_VOCAB,
        hidden_size=16,
        num_hidden_layers=1,
        depth_decoder_config={"hidden_size": 16, "num_hidden_layers": 1},
        audio_encoder_config={"num_hidden_layers": 1, "num_quantizers": 3},
        **overrides,
    )
    return make_pair(MoshiForConditionalGeneration, FlaxMoshiForConditionalGeneration, config, directory, seed=1).ours


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """Text ids, delayed codes of the same columns, sum of log-probabilities, and which beam each id continued."""

    tokens: list[int]
    codes: list[np.ndarray]
    score: float = 0.0
    beams: tuple[int, ...] = ()


class Oracle:
    """The model without any cache, and a beam search over it in lists."""

    def __init__(self, model: Any, sampling: Sampling, keys: jax.Array):
        self.config = model.config
        self.keys = keys
        self.select = jax.jit(
            lambda logits, ids, codebook, key: select_token(
                logits[None], ids, 1 + codebook, key[None], 1 + codebook, sampling
            )[0]
        )
        self.hear = jax.jit(
            lambda ids, user, moshi: model(input_ids=ids, user_audio_codes=user, moshi_audio_codes=moshi)
        )
        self.depth = jax.jit(
            lambda ids, hidden: model.module.apply(
                {"params": model.params}, ids, hidden, method=lambda module, *args: module.depth_decoder(*args).logits
            )
        )
        silence = jnp.zeros((1, 1, model.config.audio_encoder_config.frame_size))
        self.blank = np.asarray(model.compiled(encode_audio)(model.params, silence))[0]

    def continue_all(self, hypotheses: list[Hypothesis], user: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities of the next ids and hidden states, from a pass over ``rows`` rows, filled up."""
        length = len(hypotheses[0].tokens)
        ids = np.zeros((rows, FRAMES), np.int32)
        moshi = np.zeros((rows, self.config.num_codebooks, FRAMES), np.int32)
        for row, hypothesis in enumerate(hypotheses):
            ids[row, :length] = hypothesis.tokens
            moshi[row, :, :length] = np.stack(hypothesis.codes, axis=1)
        outputs = self.hear(ids, np.repeat(user[None], rows, 0), moshi)
        logits = np.asarray(outputs.logits, np.float64)[: len(hypotheses), length - 1]
        largest = logits.max(-1, keepdims=True)
        log_probs = logits - largest - np.log(np.exp(logits - largest).sum(-1, keepdims=True))
        return log_probs, np.asarray(outputs.last_hidden_state)[:, length - 1]

    def codes_of(self, hidden: np.ndarray, token: int, fixed: np.ndarray | None, key: jax.Array) -> np.ndarray:
        """The codes of one frame; ``fixed`` are those of the delayed codebooks if they are known."""
        ids = np.zeros((1, self.config.num_codebooks + 1), np.int32)
        ids[0, 0] = token
        for codebook in range(self.config.num_codebooks):
            logits = np.asarray(self.depth(ids[:, :-1], hidden[None, None]))[0, codebook]
            ids[0, codebook + 1] = self.select(logits, ids, np.int32(codebook), key)
        codes = ids[0, 1:]
        if fixed is not None:
            codes[1:] = fixed
        return codes

    def delayed(self, codes: np.ndarray) -> np.ndarray:
        """Undelayed codes ``(codebooks, frames)`` as the columns of inputs, one frame more."""
        columns = np.full((codes.shape[0], codes.shape[1] + 1), AUDIO_VOCAB, np.int32)
        columns[0, :-1] = codes[0]
        columns[1:, 1:] = codes[1:]
        return columns

    def search(
        self, row: int, prompt: dict[str, np.ndarray], num_beams: int, early_stopping: Any, options: dict[str, Any]
    ) -> list[tuple[float, Hypothesis]]:
        """The ``num_beams`` best hypotheses of one row with their scores, from a prompt without its padding."""
        start = np.full((self.config.num_codebooks, 1), AUDIO_VOCAB, np.int32)
        prompt = {
            name: stream[row, ..., np.argmax(prompt["attention_mask"][row]) :] for name, stream in prompt.items()
        }
        ids = [VOCAB, *prompt["input_ids"]]
        length, limit = len(ids), len(ids) + options["max_new_tokens"]
        heard = np.concatenate([start, prompt["user_audio_codes"], np.repeat(self.blank, FRAMES, 1)], axis=1)
        user = self.delayed(heard)[:, :FRAMES]
        moshi = self.delayed(np.concatenate([start, prompt["moshi_audio_codes"]], axis=1))
        ends = set(options["eos_token_id"])
        kept = max(2, 1 + len(ends)) * num_beams
        penalty = options["length_penalty"]

        running = [Hypothesis(ids, list(moshi[:, :length].T))]
        ended: list[tuple[float, Hypothesis]] = []
        while True:
            position = len(running[0].tokens)
            fixed = moshi[1:, length] if position == length else None
            log_probs, hidden = self.continue_all(running, user, num_beams)
            candidates = [
                (hypothesis.score + log_probs[beam, token], beam, token)
                for beam, hypothesis in enumerate(running)
                for token in range(VOCAB)
            ]
            candidates = sorted(candidates, reverse=True)[:kept]

            step_key = jax.random.fold_in(jax.random.fold_in(self.keys[row], position - length), 1)

            def grown(
                number: int,
                candidate: tuple,
                running: Any = running,
                hidden: Any = hidden,
                fixed: Any = fixed,
                step_key: Any = step_key,
            ) -> Hypothesis:
                score, beam, token = candidate
                parent = running[beam]
                return Hypothesis(
                    [*parent.tokens, token],
                    [*parent.codes, self.codes_of(hidden[beam], token, fixed, jax.random.fold_in(step_key, number))],
                    score,
                    (*parent.beams, row * num_beams + beam),
                )

            going_on = []
            for rank, candidate in enumerate(candidates):
                if candidate[2] in ends or position + 1 == limit:
                    if rank < num_beams:
                        score = candidate[0] / (position + 1 - length) ** penalty
                        ended = sorted([*ended, (score, grown(num_beams + rank, candidate))], key=lambda one: -one[0])[
                            :num_beams
                        ]
                elif len(going_on) < num_beams:
                    going_on.append(candidate)
            if not going_on:
                return ended
            if len(ended) == num_beams:
                best = limit - length if early_stopping == "never" and penalty > 0 else position + 1 - length
                if early_stopping is True or going_on[0][0] / best**penalty <= ended[-1][0]:
                    return ended
            running = [grown(number, candidate) for number, candidate in enumerate(going_on)]


def draw_case(seed: int, config: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A prompt, with a live user and in part left-padded, and options under which rows end at different times."""
    rng = np.random.default_rng(seed)
    frames, new = int(rng.integers(2, 6)), int(rng.integers(3, 14))
    heard = frames + int(rng.integers(0, new + 1))
    mask = np.ones((BATCH, frames), np.int32)
    mask[seed % BATCH, : rng.integers(0, frames)] = 0
    prompt = {
        "input_ids": rng.integers(0, VOCAB, (BATCH, frames)),
        "user_audio_codes": rng.integers(0, AUDIO_VOCAB, (BATCH, config.num_codebooks, heard)),
        "moshi_audio_codes": rng.integers(0, AUDIO_VOCAB, (BATCH, config.num_codebooks, frames)),
        "attention_mask": mask,
    }
    options = {
        "max_new_tokens": new,
        "length_penalty": float(rng.choice([-1.0, 0.0, 0.7, 1.0, 2.5])),
        "eos_token_id": [int(token) for token in rng.choice(VOCAB, rng.integers(0, 4), replace=False)],
    }
    return {name: value.astype(np.int32) for name, value in prompt.items()}, options


@pytest.mark.parametrize(("overrides", "num_beams", "early_stopping", "do_sample"), PROGRAMS)
def test_plain_search(
    overrides: dict[str, Any], num_beams: int, early_stopping: bool | str, do_sample: bool, tmp_path: Any
) -> None:
    """Rows are searched one by one there, so this also shows that they do not depend on each other."""
    model = make_model(tmp_path, **overrides)
    sampling = Sampling(temperature=jnp.float32(TEMPERATURE), do_sample=True) if do_sample else Sampling()
    keys = jax.random.split(jax.random.key(6), BATCH)
    oracle = Oracle(model, sampling, keys)
    lengths, wins = set(), 0
    for seed in range(7):
        prompt, options = draw_case(seed, model.config)
        returned = num_beams if seed % 2 else 1
        output = model.generate(
            **prompt,
            **{**options, "eos_token_id": options["eos_token_id"] or None},
            num_beams=num_beams,
            early_stopping=early_stopping,
            num_return_sequences=returned,
            pad_token_id=VOCAB,
            do_sample=False,
            depth_decoder_do_sample=do_sample,
            **({"depth_decoder_temperature": TEMPERATURE, "depth_decoder_top_k": 0} if do_sample else {}),
            prng_key=keys,
            return_audio_codes=True,
            return_audio_waveforms=False,
        )
        # to the host at once: cutting on the device compiles a program for every length
        actual = types.SimpleNamespace(**jax.tree.map(np.asarray, dict(output.items())))
        begin = 1 + prompt["input_ids"].shape[1]
        for row in range(BATCH):
            expected = oracle.search(row, prompt, num_beams, early_stopping, options)[:returned]
            padding = int(np.argmax(prompt["attention_mask"][row]))
            for rank, (score, best) in enumerate(expected):
                where, end = row * returned + rank, padding + len(best.tokens)
                assert actual.sequence_lengths[where] == end
                np.testing.assert_array_equal(actual.sequences[where, 1 + padding : end], best.tokens[1:])
                assert actual.sequences[where, 0] == best.tokens[0]
                assert (actual.sequences[where, end:] == VOCAB).all()
                np.testing.assert_allclose(actual.sequences_scores[where], score, rtol=1e-5, atol=1e-5)
                np.testing.assert_array_equal(actual.beam_indices[where, : end - begin], best.beams)
                assert (actual.beam_indices[where, end - begin :] == -1).all()
                codes = np.stack(best.codes, axis=1)
                audio = np.concatenate([codes[:1, 1:-1], codes[1:, 2:]])
                frames = end - 2
                assert actual.audio_lengths[where] == frames
                np.testing.assert_array_equal(actual.audio_codes[where, :, padding:frames], audio)
                assert (actual.audio_codes[where, :, frames:] == AUDIO_VOCAB).all()
                lengths.add(end - begin)
            wins += expected[0][1].beams[-1] % num_beams != 0
        reached = int(actual.sequence_lengths.max())
        assert actual.sequences.shape == (BATCH * returned, reached)
        assert actual.audio_codes.shape[2] == actual.audio_lengths.max()
    assert len(lengths) > 4, "all hypotheses have the same few lengths: nothing ends early"
    assert wins > 0, "the best beam is always the first one: nothing is reordered"
