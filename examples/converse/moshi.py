"""The untrained Moshi of the converser: its configuration, its tokenizer, and the codec that has been trained. ::

python -m examples.converse.moshi CODEC DIRECTORY
"""

from __future__ import annotations

import argparse
import io
import math
import string
from pathlib import Path

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from sentencepiece import SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import EncodecFeatureExtractor, GenerationConfig, MimiConfig, MoshiConfig

from transformers_moshi_flax import FlaxMimiModel, FlaxMoshiForConditionalGeneration, MoshiProcessor
from transformers_moshi_flax.models.moshi.kyutai_tokenizer_moshi import sentencepiece_tokenizer

from .sentences import AGAIN, STOP, exchanges

WORD_START = "▁"
TOKENIZER = "tokenizer.model"
WORD_SCORE, LETTER_SCORE = -8.0, -12.0


def write_tokenizer(path: Path) -> None:
    """A SentencePiece model in which every word of the domain is one piece; others are spelled by letters and bytes.

    SentencePiece learns the special pieces and the letters, with Moshi's special ids; its other pieces are replaced by
    the words, since it would leave out rare ones.
    """
    texts = [text for each in exchanges() if not each.held_out for text in (each.question, each.answer)]
    words = sorted({word for text in (*texts, *AGAIN, *STOP) for word in text.split()})
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([*words, string.ascii_letters]),
        model_writer=written,
        model_type="unigram",
        normalization_rule_name="identity",
        vocab_size=2 * len(words),
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    model = ModelProto.FromString(written.getvalue())
    special = [piece for piece in model.pieces if piece.type != model.SentencePiece.NORMAL]
    learned = [piece.piece for piece in model.pieces if piece.type == model.SentencePiece.NORMAL]
    letters = sorted(piece for piece in learned if len(piece) == 1)
    pieces = [model.SentencePiece(piece=WORD_START + word, score=WORD_SCORE) for word in words]
    pieces += [model.SentencePiece(piece=letter, score=LETTER_SCORE) for letter in letters]
    del model.pieces[:]
    model.pieces.extend([*special, *pieces])
    model.trainer_spec.vocab_size = len(model.pieces)
    path.write_bytes(model.SerializeToString(deterministic=True))


def moshi_config(vocab_size: int, codec: MimiConfig) -> MoshiConfig:
    """A backbone of 192 x 6 that sees 16 s, and a depth decoder of 96 x 2."""
    codebooks = codec.num_quantizers
    return MoshiConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        ffn_dim=512,
        max_position_embeddings=200,
        sliding_window=200,
        num_codebooks=codebooks,
        audio_vocab_size=codec.codebook_size,
        initializer_range=0.05,
        audio_encoder_config=codec.to_dict(),
        depth_decoder_config={
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "ffn_dim": 128,
            "initializer_range": 0.05,
            "max_position_embeddings": codebooks + 1,
            "sliding_window": codebooks + 1,
        },
    )


def generation_config(config: MoshiConfig) -> GenerationConfig:
    """Greedy text, as there is one right answer; codes with a little freedom, as there are many ways to say it."""
    length = config.num_codebooks + 1
    return GenerationConfig(
        do_sample=False,
        bos_token_id=config.vocab_size,
        pad_token_id=config.vocab_size,
        depth_decoder_config={"do_sample": False, "min_length": length, "max_length": length},
    )


def write_moshi(codec_folder: Path, folder: Path, seed: int = 0) -> None:
    """Write the model with random weights and that codec to ``folder``."""
    codec = FlaxMimiModel.from_pretrained(codec_folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder / TOKENIZER)
    tokenizer = sentencepiece_tokenizer(folder / TOKENIZER)
    config = moshi_config(len(tokenizer), codec.config)
    with jax.default_prng_impl("rbg"):
        model = FlaxMoshiForConditionalGeneration(config, seed=seed)
    # upstream draws the layers of single codebooks with a deviation of 1
    depth = flatten_dict(model.params["depth_decoder"])
    depth = {path: leaf / math.sqrt(leaf.shape[0]) if path[-1] == "kernel" else leaf for path, leaf in depth.items()}
    model.params = {**model.params, "depth_decoder": unflatten_dict(depth), "audio_encoder": codec.params}
    model.generation_config = generation_config(config)
    extractor = EncodecFeatureExtractor(feature_size=1, sampling_rate=codec.config.sampling_rate)
    model.save_pretrained(folder)
    MoshiProcessor(extractor, tokenizer, frame_size=codec.config.frame_size).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codec", type=Path)
    parser.add_argument("directory", type=Path)
    given = parser.parse_args()
    write_moshi(given.codec, given.directory)


if __name__ == "__main__":
    main()
