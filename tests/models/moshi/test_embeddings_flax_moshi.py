"""Parts of a model, its tables of text, another size of the vocabulary, and prompts of embeddings."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from transformers.models.moshi.modeling_moshi import MoshiForCausalLM

from tests.configs import tiny_mimi_config, tiny_moshi_config
from tests.torch_oracle import assert_close, randomize, save_upstream
from transformers_moshi_flax import (
    FlaxMimiModel,
    FlaxMoshiDepthDecoder,
    FlaxMoshiForCausalLM,
    FlaxMoshiForConditionalGeneration,
    FlaxMoshiModel,
)

VOCAB = 60
IDS = np.array([[1, 2, 3, VOCAB]])


@pytest.fixture
def moshi() -> FlaxMoshiForConditionalGeneration:
    return FlaxMoshiForConditionalGeneration(tiny_moshi_config())


@pytest.fixture
def text() -> FlaxMoshiForCausalLM:
    return FlaxMoshiForCausalLM(tiny_moshi_config())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[FlaxMoshiForCausalLM, Any]:
    folder = tmp_path_factory.mktemp("text")
    theirs = randomize(MoshiForCausalLM._from_config(tiny_moshi_config())).eval()
    save_upstream(theirs, folder)
    return FlaxMoshiForCausalLM.from_pretrained(folder), theirs


class TestParts:
    def test_share_parameters(self, moshi: FlaxMoshiForConditionalGeneration, tmp_path: Path) -> None:
        for name, kind in (
            ("audio_encoder", FlaxMimiModel),
            ("decoder", FlaxMoshiForCausalLM),
            ("depth_decoder", FlaxMoshiDepthDecoder),
        ):
            part = getattr(moshi, name)
            assert type(part) is kind and part is getattr(moshi, name) and part.params is moshi.params[name]
            # what is set in one is set in the other
            changed = jax.tree.map(lambda leaf: np.asarray(leaf) + 1, part.params)
            part.params = changed
            assert moshi.params[name] is part.params and part.params.keys() == changed.keys()
            moshi.params = {**moshi.params, name: changed}
            assert part.params is moshi.params[name]
        assert moshi.get_depth_decoder() is moshi.depth_decoder and moshi.num_codebooks == 4
        assert moshi.decoder.model.params is moshi.params["decoder"]["model"]
        assert moshi.decoder.base_model is moshi.decoder.model and moshi.base_model is moshi
        assert moshi.decoder.generation_config is moshi.generation_config
        # a part that is sent away goes alone
        alone = pickle.loads(pickle.dumps(moshi.decoder.model))
        alone.params = jax.tree.map(np.zeros_like, alone.params)
        assert np.any(moshi.decoder.model.params["norm"]["scale"])
        moshi.enable_gradient_checkpointing()
        assert moshi.decoder.model.module.gradient_checkpointing and moshi.depth_decoder.module.gradient_checkpointing
        moshi.decoder.save_pretrained(tmp_path)
        again = FlaxMoshiForCausalLM.from_pretrained(tmp_path)
        for path, leaf in flatten_dict(again.params).items():
            np.testing.assert_array_equal(leaf, flatten_dict(moshi.params["decoder"])[path])

    def test_are_usable(self, moshi: FlaxMoshiForConditionalGeneration, count_compilations: Any) -> None:
        audio = np.zeros((1, 1, 32), np.float32)
        codes = moshi.audio_encoder.encode(audio, num_quantizers=moshi.num_codebooks).audio_codes
        np.testing.assert_array_equal(codes, FlaxMimiModel.encode(moshi.audio_encoder, audio, None, 4).audio_codes)
        count_compilations()
        moshi.audio_encoder.encode(audio, num_quantizers=moshi.num_codebooks)
        assert count_compilations() == 0

    def test_of_a_model_without_parameters(self) -> None:
        model = FlaxMoshiForCausalLM(tiny_moshi_config(), _do_init=False)
        params = model.init_weights(jax.random.key(0))
        with pytest.raises(ValueError, match="_do_init=False"):
            model.model.params  # noqa: B018
        assert model.model(IDS, params=params["model"]).last_hidden_state.shape == (1, 4, 64)


class TestTables:
    def test_are_those_of_the_model(self, text: FlaxMoshiForCausalLM) -> None:
        table, head = text.get_input_embeddings(), text.get_output_embeddings()
        assert table.weight.shape == (table.num_embeddings, table.embedding_dim) == (VOCAB + 1, 64)
        assert head.weight.shape == (head.out_features, head.in_features) == (VOCAB, 64)
        hidden = text.model(inputs_embeds=table(IDS)).last_hidden_state
        assert_close(head(hidden), text(IDS).logits, 1e-6)
        assert not np.asarray(table(np.array([-100]))).any()
        with pytest.raises(ValueError, match="61"):
            table(np.array([VOCAB + 1]))
        assert text.model.get_output_embeddings() is None

    def test_are_set(self, text: FlaxMoshiForCausalLM) -> None:
        table, head = text.get_input_embeddings(), text.get_output_embeddings()
        text.set_input_embeddings(table.replace(weight=2 * table.weight))
        text.set_output_embeddings(3 * head.weight)
        np.testing.assert_array_equal(text.get_input_embeddings().weight, 2 * table.weight)
        np.testing.assert_array_equal(text.get_output_embeddings().kernel, 3 * head.kernel)
        text.set_output_embeddings(head)
        np.testing.assert_array_equal(text.get_output_embeddings().kernel, head.kernel)
        with pytest.raises(ValueError, match="resize_token_embeddings"):
            text.set_input_embeddings(table.weight[:-1])
        with pytest.raises(ValueError, match="no head"):
            text.model.set_output_embeddings(head)


class TestAnotherVocabulary:
    def test_of_text(self, text: FlaxMoshiForCausalLM, tmp_path: Path) -> None:
        given, logits, before = text.config, text(IDS).logits, text.get_input_embeddings().weight
        text.generation_config.pad_token_id = text.generation_config.eos_token_id = VOCAB
        table = text.resize_token_embeddings(70)
        assert table.weight.shape == (71, 64) and text.config.vocab_size == 70 and given.vocab_size == VOCAB
        assert text.generation_config.pad_token_id == text.generation_config.eos_token_id == 70
        # the start token has kept its row under its new id
        np.testing.assert_array_equal(table.weight[70], before[VOCAB])
        after = text(np.where(IDS == VOCAB, 70, IDS)).logits
        assert after.shape[-1] == 70
        assert_close(after[..., :VOCAB], logits, 1e-6)
        # new rows lie around the mean, with a share of 1e-9 of the covariance
        new = np.asarray(table.weight[VOCAB:70]) - np.asarray(before[:VOCAB]).mean(axis=0)
        assert 0 < np.std(new) < 1e-4 * np.std(before)
        text.save_pretrained(tmp_path)
        assert FlaxMoshiForCausalLM.from_pretrained(tmp_path).config.vocab_size == 70
        assert text.resize_token_embeddings().weight is not None and text.config.vocab_size == 70
        # back again
        assert text.resize_token_embeddings(VOCAB).weight.shape == before.shape
        np.testing.assert_array_equal(text.get_input_embeddings().weight, before)
        assert_close(text(IDS).logits, logits, 1e-6)

    def test_rounded_up_and_drawn(self, text: FlaxMoshiForCausalLM) -> None:
        table = text.resize_token_embeddings(100, pad_to_multiple_of=64, mean_resizing=False)
        assert text.config.vocab_size == 128 and table.weight.shape == (129, 64)
        assert abs(np.std(table.weight[VOCAB:128]) / text.config.initializer_range - 1) < 0.1
        assert text.model.config.vocab_size == 128 and text.model.params_shape_tree["embed_tokens"]

    def test_of_the_whole(self, moshi: FlaxMoshiForConditionalGeneration) -> None:
        depth, first = moshi.depth_decoder, np.asarray(moshi.params["depth_decoder"]["text_embed_tokens"]["embedding"])
        moshi.resize_token_embeddings(64)
        assert moshi.config.vocab_size == moshi.config.depth_decoder_config.vocab_size == 64
        assert depth.config.vocab_size == 64 and moshi.decoder.config.vocab_size == 64
        rows = np.asarray(depth.get_input_embeddings().weight)
        assert rows.shape == (65, 32)
        np.testing.assert_array_equal(rows[[0, 59, 64]], first[[0, 59, VOCAB]])
        out = moshi.generate(max_new_tokens=2, forced_text_ids=np.array([[63]]), return_audio_waveforms=False)
        assert out.sequences[0, 1] == 63

    def test_is_refused(self, text: FlaxMoshiForCausalLM, unchecked_types: None) -> None:
        for value in (0, 2.5, True):
            with pytest.raises(ValueError, match="new_num_tokens"):
                text.resize_token_embeddings(value)
        with pytest.raises(ValueError, match="pad_to_multiple_of"):
            text.resize_token_embeddings(70, pad_to_multiple_of=0)
        with pytest.raises(ValueError, match="part of a FlaxMoshiForCausalLM"):
            text.model.resize_token_embeddings(70)


class TestPromptsOfEmbeddings:
    def test_equal_those_of_ids(self, pair: tuple) -> None:
        ours, theirs = pair
        prompt = np.array([[5, 6, 7], [8, 9, 10]])
        embeds = ours.get_input_embeddings()(prompt)
        by_ids = ours.generate(prompt, max_new_tokens=4, logits_to_keep=1).sequences
        alone = ours.generate(inputs_embeds=embeds, max_new_tokens=4).sequences
        np.testing.assert_array_equal(alone, by_ids[:, 3:])
        both = ours.generate(prompt, inputs_embeds=embeds, max_new_tokens=4).sequences
        np.testing.assert_array_equal(both, by_ids)
        given = torch.tensor(np.asarray(embeds))
        expected = theirs.generate(inputs_embeds=given, max_new_tokens=4, do_sample=False, pad_token_id=0)
        np.testing.assert_array_equal(alone, expected.numpy())
        jitted = jax.jit(lambda embeds: ours.generate(inputs_embeds=embeds, max_new_tokens=4).sequences)(embeds)
        np.testing.assert_array_equal(jitted, alone)
        beams = ours.generate(inputs_embeds=embeds, max_new_tokens=4, num_beams=2).sequences
        np.testing.assert_array_equal(beams, ours.generate(prompt, max_new_tokens=4, num_beams=2).sequences[:, 3:])

    def test_wrong_ones(self, text: FlaxMoshiForCausalLM, unchecked_types: None) -> None:
        embeds = np.zeros((1, 2, 64), np.float32)
        for inputs, told in (
            ({}, "input_ids"),
            ({"inputs_embeds": embeds[..., 1:]}, r"shape \(batch, tokens, 64\)"),
            ({"inputs_embeds": embeds[:, :0]}, "empty"),
            ({"inputs_embeds": embeds, "input_ids": IDS}, r"shape \(1, 4, 64\)"),
            ({"input_ids": IDS, "logits_to_keep": -1}, "logits_to_keep"),
            ({"input_ids": text.params}, "params="),
        ):
            with pytest.raises(ValueError, match=told):
                text.generate(**inputs)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_transition_scores_are_upstreams(
    pair: tuple, options: dict[str, int], normalize: bool, unchecked_types: None
) -> None:
    ours, theirs = pair
    prompt = np.array([[5, 6, 7], [8, 9, 10]])
    more = {"max_new_tokens": 5, "output_scores": True, "eos_token_id": 11, "pad_token_id": 0, **options}
    out = ours.generate(prompt, **more)
    expected = theirs.generate(torch.tensor(prompt), return_dict_in_generate=True, do_sample=False, **more)
    np.testing.assert_array_equal(out.sequences, expected.sequences.numpy())
    indices = (out.beam_indices, expected.beam_indices) if options else (None, None)
    scores = ours.compute_transition_scores(out.sequences, out.scores, indices[0], normalize)
    wanted = theirs.compute_transition_scores(expected.sequences, expected.scores, indices[1], normalize)
    assert scores.shape == wanted.shape
    assert_close(scores, wanted.numpy(), 1e-5)
    if options and not normalize:
        lengths = (np.asarray(scores) < 0).sum(axis=1)
        assert_close(out.sequences_scores, np.asarray(scores).sum(axis=1) / lengths, 1e-5)
    with pytest.raises(ValueError, match="output_scores"):
        ours.compute_transition_scores(out.sequences, None)
    with pytest.raises(ValueError, match="belong together"):
        ours.compute_transition_scores(out.sequences[:1], out.scores, indices[0])


def test_parameters_in_anothers_place(text: FlaxMoshiForCausalLM, unchecked_types: None) -> None:
    """The former Flax models had ``params`` before the cache."""
    params = text.params
    for call, name in (
        (lambda: text(params), "input_ids"),
        (lambda: text(IDS, params), "attention_mask"),
        (lambda: text(IDS, None, None, params), "cache"),
        (lambda: FlaxMoshiModel.__call__(text.model, IDS, None, params), "position_ids"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` is a dictionary.*`params=...`"):
            call()
    with pytest.raises(ValueError, match="init_cache"):
        text(IDS, cache=5)
    mimi = FlaxMimiModel(tiny_mimi_config(), _do_init=False)
    for call in (mimi.encode, mimi):
        with pytest.raises(ValueError, match=r"`padding_mask` is a dictionary.*`params=...`"):
            call(np.zeros((1, 1, 1920), np.float32), params)


def test_padding_on_the_right_inside_of_jit(text: FlaxMoshiForCausalLM) -> None:
    """What a function closes over is known there."""
    prompt, mask = jax.numpy.array([[5, 6, 7]]), jax.numpy.array([[1, 1, 0]])
    with pytest.raises(ValueError, match="pad on the left"):
        jax.jit(lambda params: text.generate(prompt, attention_mask=mask, params=params))(text.params)
    with pytest.raises(ValueError, match="pad on the left"):
        jax.jit(lambda params: text.generate(prompt, pad_token_id=7, params=params, max_new_tokens=1))(text.params)
