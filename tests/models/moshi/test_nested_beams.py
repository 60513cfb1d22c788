"""Beam search over text and audio against a search in plain NumPy, with lists and passes over whole dialogues."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import MoshiForConditionalGeneration

from tests.configs import tiny_moshi_config
from tests.torch_oracle import make_pair
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration

VOCAB, AUDIO_VOCAB = 17, 16
BATCH, FRAMES = 2, 24
CONFIGS: dict[str, dict[str, Any]] = {
    "three codebooks": {"num_codebooks": 3, "num_key_value_heads": 1},
    "one layer": {"num_codebooks": 2, "num_hidden_layers": 1, "sliding_window": 6},
}
# number of beams and early_stopping are what programs are compiled for
PROGRAMS = [("three codebooks", 3, False), ("three codebooks", 2, True), ("one layer", 4, "never")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    models = {}
    for name, overrides in CONFIGS.items():
        config = tiny_moshi_config(
            vocab_size=VOCAB,
            audio_vocab_size=AUDIO_VOCAB,
            hidden_size=16,
            depth_decoder_config={"hidden_size": 16, "num_hidden_layers": 1},
            audio_encoder_config={"num_hidden_layers": 1, "num_quantizers": 3},
            **overrides,
        )
        directory = tmp_path_factory.mktemp("model")
        pair = make_pair(MoshiForConditionalGeneration, FlaxMoshiForConditionalGeneration, config, directory, seed=1)
        models[name] = pair.ours
    return models


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """Text ids, delayed codes of the same columns, sum of log-probabilities, and which beam each id continued."""

    tokens: list[int]
    codes: list[np.ndarray]
    score: float = 0.0
    beams: tuple[int, ...] = ()


class Oracle:
    """The model without any cache, and a beam search over it in lists."""

    def __init__(self, model: Any):
        self.config = model.config
        self.hear = jax.jit(
            lambda ids, user, moshi, mask: model(
                input_ids=ids, user_audio_codes=user, moshi_audio_codes=moshi, attention_mask=mask
            )
        )
        self.depth = jax.jit(
            lambda ids, hidden: model.module.apply(
                {"params": model.params}, ids, hidden, method=lambda module, *args: module.depth_decoder(*args).logits
            )
        )
        silence = jnp.zeros((1, 1, model.config.audio_encoder_config.frame_size))
        codes = model.module.apply({"params": model.params}, silence, method=model.module.encode_audio)
        self.blank = np.asarray(codes)[0]

    def continue_all(
        self, hypotheses: list[Hypothesis], user: np.ndarray, mask: np.ndarray, rows: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities of the next ids and hidden states, from a pass over ``rows`` rows, filled up."""
        length = len(hypotheses[0].tokens)
        ids = np.zeros((rows, FRAMES), np.int32)
        moshi = np.zeros((rows, self.config.num_codebooks, FRAMES), np.int32)
        for row, hypothesis in enumerate(hypotheses):
            ids[row, :length] = hypothesis.tokens
            moshi[row, :, :length] = np.stack(hypothesis.codes, axis=1)
        outputs = self.hear(ids, np.repeat(user[None], rows, 0), moshi, np.repeat(mask[None], rows, 0))
        logits = np.asarray(outputs.logits, np.float64)[: len(hypotheses), length - 1]
        largest = logits.max(-1, keepdims=True)
        log_probs = logits - largest - np.log(np.exp(logits - largest).sum(-1, keepdims=True))
        return log_probs, np.asarray(outputs.last_hidden_state)[:, length - 1]

    def codes_of(self, hidden: np.ndarray, token: int, fixed: np.ndarray | None) -> np.ndarray:
        """The codes of one frame, greedily; ``fixed`` are those of the delayed codebooks if they are known."""
        ids = np.zeros((1, self.config.num_codebooks), np.int32)
        ids[0, 0] = token
        codes = np.zeros(self.config.num_codebooks, np.int32)
        for codebook in range(self.config.num_codebooks):
            codes[codebook] = np.asarray(self.depth(ids, hidden[None, None]))[0, codebook].argmax()
            if codebook + 1 < self.config.num_codebooks:
                ids[0, codebook + 1] = codes[codebook]
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
        """The ``num_beams`` best hypotheses of one row with their scores."""
        start = np.full((self.config.num_codebooks, 1), AUDIO_VOCAB, np.int32)
        ids = [VOCAB, *prompt["input_ids"][row]]
        length, limit = len(ids), len(ids) + options["max_new_tokens"]
        mask = np.ones(FRAMES, np.int32)
        mask[1:length] = prompt["attention_mask"][row]
        heard = np.concatenate([start, prompt["user_audio_codes"][row], np.repeat(self.blank, FRAMES, 1)], axis=1)
        user = self.delayed(heard)[:, :FRAMES]
        moshi = self.delayed(np.concatenate([start, prompt["moshi_audio_codes"][row]], axis=1))
        ends = set(options["eos_token_id"])
        kept = max(2, 1 + len(ends)) * num_beams
        penalty = options["length_penalty"]

        running = [Hypothesis(ids, list(moshi[:, :length].T))]
        ended: list[tuple[float, Hypothesis]] = []
        while True:
            position = len(running[0].tokens)
            fixed = moshi[1:, length] if position == length else None
            log_probs, hidden = self.continue_all(running, user, mask, num_beams)
            candidates = [
                (hypothesis.score + log_probs[beam, token], beam, token)
                for beam, hypothesis in enumerate(running)
                for token in range(VOCAB)
            ]
            candidates = sorted(candidates, reverse=True)[:kept]

            def grown(
                score: float, beam: int, token: int, running: Any = running, hidden: Any = hidden, fixed: Any = fixed
            ) -> Hypothesis:
                parent = running[beam]
                return Hypothesis(
                    [*parent.tokens, token],
                    [*parent.codes, self.codes_of(hidden[beam], token, fixed)],
                    score,
                    (*parent.beams, row * num_beams + beam),
                )

            going_on = []
            for rank, candidate in enumerate(candidates):
                if candidate[2] in ends or position + 1 == limit:
                    if rank < num_beams:
                        score = candidate[0] / (position + 1 - length) ** penalty
                        ended = sorted([*ended, (score, grown(*candidate))], key=lambda one: -one[0])[:num_beams]
                elif len(going_on) < num_beams:
                    going_on.append(candidate)
            if not going_on:
                return ended
            if len(ended) == num_beams:
                best = limit - length if early_stopping == "never" and penalty > 0 else position + 1 - length
                if early_stopping is True or going_on[0][0] / best**penalty <= ended[-1][0]:
                    return ended
            running = [grown(*candidate) for candidate in going_on]


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


@pytest.mark.parametrize(("name", "num_beams", "early_stopping"), PROGRAMS)
def test_plain_search(models: dict[str, Any], name: str, num_beams: int, early_stopping: Any) -> None:
    model, config = models[name], models[name].config
    oracle = Oracle(model)
    lengths, wins = set(), 0
    for seed in range(8):
        prompt, options = draw_case(seed, config)
        returned = 1 + seed % num_beams
        actual = model.generate(
            **prompt,
            **{**options, "eos_token_id": options["eos_token_id"] or None},
            num_beams=num_beams,
            early_stopping=early_stopping,
            num_return_sequences=returned,
            pad_token_id=VOCAB,
            do_sample=False,
            return_audio_codes=True,
            return_audio_waveforms=False,
        )
        begin = 1 + prompt["input_ids"].shape[1]
        for row in range(BATCH):
            expected = oracle.search(row, prompt, num_beams, early_stopping, options)[:returned]
            for rank, (score, best) in enumerate(expected):
                where, end = row * returned + rank, len(best.tokens)
                assert actual.sequence_lengths[where] == end
                np.testing.assert_array_equal(actual.sequences[where, :end], best.tokens)
                assert (np.asarray(actual.sequences[where, end:]) == VOCAB).all()
                np.testing.assert_allclose(actual.sequences_scores[where], score, rtol=1e-5, atol=1e-5)
                np.testing.assert_array_equal(actual.beam_indices[where, : end - begin], best.beams)
                assert (np.asarray(actual.beam_indices[where, end - begin :]) == -1).all()
                codes = np.stack(best.codes, axis=1)
                audio = np.concatenate([codes[:1, 1:-1], codes[1:, 2:]])
                frames = end - 2
                assert actual.audio_lengths[where] == frames
                np.testing.assert_array_equal(actual.audio_codes[where, :, :frames], audio)
                assert (np.asarray(actual.audio_codes[where, :, frames:]) == AUDIO_VOCAB).all()
                lengths.add(end - begin)
            wins += expected[0][1].beams[-1] % num_beams != 0
        reached = int(np.asarray(actual.sequence_lengths).max())
        assert actual.sequences.shape == (BATCH * returned, reached)
        assert actual.audio_codes.shape[2] == reached - 2
    assert len(lengths) > 4, "all hypotheses have the same few lengths: nothing ends early"
    assert wins > 0, "the best beam is always the first one: nothing is reordered"
