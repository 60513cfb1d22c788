"""Build ``moshi-tiny-random`` under ``tests/assets``: a small **random** Moshi checkpoint.

Run it only to rebuild it (needs the ``torch`` extra and ``espeak-ng``)::

    python utils/build_assets.py

The checkpoint is written by ``transformers`` itself, in the layout of the published ones, so that reading it takes the
same path as reading a trained one. Nothing in it is trained. Two things are set by hand on top of the random draw:

* Mimi's codebooks. Upstream initialises them to zero, and every code would then be 0. Here each codebook is drawn with
  the mean and spread of the residuals that reach it when the clip is encoded, so that the codes vary.
* The scale of Mimi's last convolution, so that decoded codes are audible.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    EncodecFeatureExtractor,
    GenerationConfig,
    MimiConfig,
    MoshiConfig,
    MoshiForConditionalGeneration,
    PreTrainedTokenizerFast,
)

CHECKPOINT = Path(__file__).resolve().parents[1] / "tests" / "assets" / "moshi-tiny-random"
CLIP_TEXT = "Hello! Could you tell me how the weather is today, and whether I should take an umbrella?"
SAMPLING_RATE = 24_000
SEED = 0
TARGET_RMS = 0.08
MAX_BYTES = 3_000_000

# Moshi's text stream: 0 ends a run of padding, 3 is the padding between words.
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>"]
TEXT_VOCAB = 384
CORPUS = """
Good morning, how did you sleep? I slept well, thank you, and you?
The train to the coast leaves at half past seven from the third platform.
Could you speak a little slower, please? I am still learning the language.
What would you like to drink: tea, coffee, or only a glass of water?
My sister plays the violin, and my brother builds small wooden boats.
It has been raining since Monday, but tomorrow the sun should come back.
If you listen closely, you can hear the birds over the noise of the street.
She opened the window, looked at the garden and began to laugh.
We walked along the river until the lights of the town were far behind us.
That is a very good question; let me think about it for a moment.
There are eleven apples, twenty pears and forty cherries in the basket.
Nobody knew why the old clock in the hall had stopped at midnight.
Please remember to lock the door and switch off the lamp before you go.
The story begins in a village between the mountains and a quiet lake.
I would rather stay at home tonight, read a book and cook some soup.
You are right, of course. What happened next? Did they find the key?
Her voice was warm and clear, and everyone in the room fell silent.
He asked for the way to the museum, and I showed it to him on the map.
Sorry, I did not catch that. Would you mind saying it again?
Yes, exactly! No, not at all. Well, maybe. Hmm, I am not so sure.
"""


def render_clip() -> np.ndarray:
    """Speak ``CLIP_TEXT`` with espeak-ng: ``(samples,)`` float32, 24 kHz, in [-1, 1]."""
    wav = subprocess.run(
        ["espeak-ng", "-v", "en", "-s", "160", "--stdout", CLIP_TEXT], check=True, capture_output=True
    )
    audio, rate = soundfile.read(io.BytesIO(wav.stdout), dtype="float32")
    return soxr.resample(audio, rate, SAMPLING_RATE).astype(np.float32)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A small unigram tokenizer of ``TEXT_VOCAB`` pieces with Moshi's special ids."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=TEXT_VOCAB,
        special_tokens=SPECIAL_TOKENS,
        unk_token="<unk>",
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.strip().splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def make_config(text_vocab: int) -> MoshiConfig:
    """The true frame (1920 samples at 24 kHz) and the true topology, with very narrow layers."""
    mimi = MimiConfig(
        num_filters=4,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        codebook_size=128,
        codebook_dim=16,
        vector_quantization_hidden_dimension=16,
        num_quantizers=8,
        upsample_groups=32,
    )
    return MoshiConfig(
        vocab_size=text_vocab,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=256,
        max_position_embeddings=512,
        sliding_window=512,
        num_codebooks=8,
        initializer_range=0.1,
        audio_encoder_config=mimi.to_dict(),
        depth_decoder_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "initializer_range": 0.1,
        },
    )


def make_generation_config(config: MoshiConfig) -> GenerationConfig:
    """The sampling defaults of the published checkpoints."""
    return GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_k=25,
        bos_token_id=config.vocab_size,
        pad_token_id=config.vocab_size,
        depth_decoder_config={
            "do_sample": True,
            "temperature": 0.8,
            "top_k": min(250, config.audio_vocab_size),
            "min_length": config.num_codebooks + 1,
            "max_length": config.num_codebooks + 1,
            "cache_implementation": "static",
        },
    )


@torch.no_grad()
def draw_codebooks(mimi: torch.nn.Module, audio: torch.Tensor) -> None:
    """Draw every codebook around the residuals of ``audio (1, 1, samples)`` that it has to quantize."""
    latents = {}
    quantizer = mimi.quantizer
    original = quantizer.encode
    quantizer.encode = lambda x, *args: (latents.update(x=x), original(x, *args))[1]
    try:
        mimi.encode(audio)
    finally:
        quantizer.encode = original
    for half in (quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer):
        residual = half.input_proj(latents["x"]) if half.input_proj is not None else latents["x"]
        for layer in half.layers:
            book = layer.codebook
            mean, std = residual.mean(dim=(0, 2)), residual.std(dim=(0, 2))
            centroids = mean + std * torch.randn(book.codebook_size, len(mean))
            # the file holds sums and counts, and counts that differ show whether a reader divides by them
            usage = 0.5 + torch.rand(book.codebook_size)
            book.cluster_usage.copy_(usage)
            book.embed_sum.copy_(centroids * usage[:, None])
            book._embed = None
            residual = residual - layer.decode(layer.encode(residual))


@torch.no_grad()
def set_loudness(mimi: torch.nn.Module, codes: torch.Tensor) -> None:
    """Scale the last convolution so that ``codes`` decode to audio of ``TARGET_RMS`` around zero."""
    last = [m for m in mimi.decoder.modules() if isinstance(m, torch.nn.Conv1d)][-1]
    audio = mimi.decode(codes).audio_values
    last.bias -= audio.mean()
    factor = TARGET_RMS / (audio - audio.mean()).pow(2).mean().sqrt()
    last.weight *= factor
    last.bias *= factor


def report(model: MoshiForConditionalGeneration, audio: torch.Tensor) -> None:
    """Print what the random model makes of the clip, so that a degenerate draw is seen."""
    codes = model.audio_encoder.encode(audio, num_quantizers=model.config.num_codebooks).audio_codes
    used = [len(row.unique()) for row in codes[0]]
    decoded = model.audio_encoder.decode(torch.randint(0, 128, codes.shape)).audio_values
    print(f"clip: {audio.shape[-1] / SAMPLING_RATE:.2f} s, {codes.shape[-1]} frames; entries used a codebook: {used}")
    print(f"drawn codes decode to rms {decoded.pow(2).mean().sqrt():.3f}, peak {decoded.abs().max():.3f}")
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}")


def main() -> None:
    if shutil.which("espeak-ng") is None:
        sys.exit("espeak-ng is needed to render the clip: install it (apt-get install espeak-ng)")
    torch.manual_seed(SEED)
    clip = io.BytesIO()
    soundfile.write(clip, render_clip(), SAMPLING_RATE, format="WAV", subtype="PCM_16")
    clip.seek(0)
    audio = torch.from_numpy(soundfile.read(clip, dtype="float32")[0])[None, None]

    tokenizer = train_tokenizer()
    config = make_config(len(tokenizer))
    model = MoshiForConditionalGeneration(config).eval()
    draw_codebooks(model.audio_encoder, audio)
    with torch.no_grad():
        set_loudness(model.audio_encoder, torch.randint(0, 128, (1, config.num_codebooks, 100)))
        report(model, audio)

    shutil.rmtree(CHECKPOINT, ignore_errors=True)
    model.generation_config = make_generation_config(config)
    model.save_pretrained(CHECKPOINT)
    tokenizer.save_pretrained(CHECKPOINT)
    EncodecFeatureExtractor(feature_size=1, sampling_rate=SAMPLING_RATE).save_pretrained(CHECKPOINT)
    (CHECKPOINT / "README.md").write_text(
        "# moshi-tiny-random\n\nRandom weights, not trained: built by `utils/build_assets.py` to exercise the whole "
        "path from a PyTorch-layout\ncheckpoint to a WAV. What it says is noise.\n"
    )
    (CHECKPOINT / "model.safetensors").chmod(0o644)
    size = sum(path.stat().st_size for path in CHECKPOINT.iterdir())
    print(json.dumps({path.name: path.stat().st_size for path in sorted(CHECKPOINT.iterdir())}, indent=1))
    if size > MAX_BYTES:
        sys.exit(f"the checkpoint has {size:,} bytes, more than the {MAX_BYTES:,} allowed: narrow the layers")


if __name__ == "__main__":
    main()
