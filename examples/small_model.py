"""A small Moshi with random weights whose Mimi has codebooks fitted to recordings.

Frames are real ones (1920 samples at 24 kHz). The weights of Mimi's encoder stay random, as a random encoder's latents
tell sounds apart well enough; upstream's codebooks, though, begin as zeros, and every code would be 0. So each
codebook gets the centroids that k-means finds among the residuals that reach it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float
from scipy.cluster.vq import kmeans2
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import EncodecFeatureExtractor, MoshiConfig, PreTrainedTokenizerFast

from transformers_moshi_flax import FlaxMimiEncoderModel, FlaxMoshiForConditionalGeneration, MoshiProcessor

# ids 0 and 3 are Moshi's end-of-padding and padding
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>"]
CODEBOOKS, ENTRIES = 4, 128


def make_tokenizer(sentences: Iterable[str], pieces: int = 160) -> PreTrainedTokenizerFast:
    """A tokenizer of at most ``pieces`` word pieces, among them the frequent words of ``sentences``."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=pieces, special_tokens=SPECIAL_TOKENS, show_progress=False)
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def small_config(vocab_size: int) -> MoshiConfig:
    """Backbone of 128 x 2, depth decoder of 64 x 2, four codebooks of 128 entries."""
    return MoshiConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=512,
        max_position_embeddings=128,
        sliding_window=128,
        num_codebooks=CODEBOOKS,
        audio_vocab_size=ENTRIES,
        initializer_range=0.06,
        audio_encoder_config={
            "model_type": "mimi",
            "num_filters": 4,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "codebook_size": ENTRIES,
            "codebook_dim": 16,
            "vector_quantization_hidden_dimension": 16,
            "num_quantizers": CODEBOOKS,
            "upsample_groups": 32,
        },
        depth_decoder_config={
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 256,
            "initializer_range": 0.06,
            "max_position_embeddings": CODEBOOKS + 1,
            "sliding_window": CODEBOOKS + 1,
        },
    )


def make_small_model(sentences: Iterable[str]) -> tuple[FlaxMoshiForConditionalGeneration, MoshiProcessor]:
    """The model with random weights and empty codebooks, and a processor whose tokenizer knows ``sentences``."""
    tokenizer = make_tokenizer(sentences)
    config = small_config(len(tokenizer))
    # the default generator's programs, one per shape, take XLA most of a minute
    with jax.default_prng_impl("rbg"):
        model = FlaxMoshiForConditionalGeneration(config)
    # upstream draws the layers of single codebooks with a deviation of 1, with which a loss begins in the thousands
    depth = flatten_dict(model.params["depth_decoder"])
    scaled = {path: leaf / math.sqrt(leaf.shape[0]) if path[-1] == "kernel" else leaf for path, leaf in depth.items()}
    model.params["depth_decoder"] = unflatten_dict(scaled)
    codec = config.audio_encoder_config
    extractor = EncodecFeatureExtractor(feature_size=1, sampling_rate=codec.sampling_rate)
    return model, MoshiProcessor(extractor, tokenizer, frame_size=codec.frame_size)


def fit_codebooks(
    model: FlaxMoshiForConditionalGeneration, voices: Sequence[Float[np.ndarray, "samples"]], seed: int = 0
) -> None:
    """Fits every codebook of the model's Mimi to ``voices``, stage by stage, in place.

    Args:
        model: its parameters are changed.
        voices: recordings in whole frames.
        seed: of k-means.
    """
    config = model.config.audio_encoder_config
    frames = [len(voice) // config.frame_size for voice in voices]
    audio = np.zeros((len(voices), 1, max(frames) * config.frame_size), np.float32)
    for row, voice in zip(audio, voices):
        row[0, : len(voice)] = voice
    mimi = model.params["audio_encoder"]
    latents = FlaxMimiEncoderModel(config.encoder_config, _do_init=False)(audio, params=mimi).latents
    # causal: a row's own frames do not hear the silence after them
    latents = np.concatenate([row.T[:count] for row, count in zip(np.asarray(latents), frames)])

    quantizer = mimi["quantizer"]
    for half in ("semantic_residual_vector_quantizer", "acoustic_residual_vector_quantizer"):
        residual = latents @ np.asarray(quantizer[half]["input_proj"]["kernel"])[0]
        stages = quantizer[half]["layers"]
        for stage in sorted(stages, key=int):
            codebook = stages[stage]["codebook"]
            centroids, codes = kmeans2(residual, config.codebook_size, minit="++", rng=seed, missing="warn")
            codebook["embed_sum"] = jnp.asarray(centroids, jnp.float32)
            residual = residual - centroids[codes]
