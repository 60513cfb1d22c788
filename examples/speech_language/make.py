"""Makes what a small speech-language model learns from, spoken on the spot: which colour was named, and who speaks.

    python examples/speech_language/make.py outputs/speech_language
    moshi-flax train examples/speech_language/train.yaml
    cd outputs/speech_language
    python ../../examples/speech_language/answer.py run/export sentences.jsonl

Needs ``libflite1`` and ``espeak-ng`` (see ``examples/converse/voices.py``). Writes ``model/`` (configuration and
processor, for random weights), recordings, and examples: ``train.jsonl``, ``sentences.jsonl`` (sentences that are not
in it, by the voices that are) and ``voice.jsonl`` (a voice that is not in it; its colours alone).
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import soundfile
import soxr
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast, WhisperConfig, WhisperFeatureExtractor

from transformers_moshi_flax import SpeechLanguageConfig, SpeechLanguageProcessor

sys.path.insert(0, str(Path(__file__).parents[1] / "converse"))
from voices import SAMPLING_RATE, Voice

VOICES = {"anna": "flite:slt", "rob": "flite:rms", "max": "espeak:en-us+m3", "fay": "espeak:en-us+f2"}
STRANGER = "flite:kal16"
COLOURS = ("red", "green", "blue", "black", "white", "yellow")
THINGS = ("ball", "house", "car", "hat", "dog", "door")
PLACES = ("here", "there", "mine", "new")
SECONDS, FRAMES = 2, 100
"""That the encoder hears at once."""

WORDS = ("</s>", *VOICES, *COLOURS, "which", "colour", "who", "speaks")


def make_model(folder: Path) -> None:
    """Configuration and processor."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<audio>"]})
    sizes = {"d_model": 96, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 192}
    text = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = SpeechLanguageConfig(
        audio_config=WhisperConfig(**sizes, max_source_positions=FRAMES),
        text_config=LlamaConfig(
            **text, vocab_size=len(tokenizer), num_key_value_heads=4, max_position_embeddings=64, eos_token_id=0
        ),
        audio_token_id=tokenizer.convert_tokens_to_ids("<audio>"),
        stack_factor=5,
    )
    config.save_pretrained(folder)
    SpeechLanguageProcessor.for_model(config, WhisperFeatureExtractor(), tokenizer).save_pretrained(folder)


def main(folder: Path) -> None:
    make_model(folder / "model")
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    sentences = [*itertools.product(COLOURS, THINGS, PLACES)]
    random.shuffle(sentences)
    held_out = {tuple(sentence) for sentence in sentences[: len(sentences) // 5]}
    lines: dict[str, list[dict[str, str]]] = {"train": [], "sentences": [], "voice": []}
    for number, (colour, thing, place) in enumerate(map(tuple, sentences)):
        for name, voice in {**VOICES, "": STRANGER}.items():
            is_held = (colour, thing, place) in held_out
            if not name and not is_held:
                continue
            spoken = Voice(voice, rate=random.uniform(0.9, 1.2), pitch=random.uniform(0.95, 1.05))
            audio = soxr.resample(spoken(f"the {colour} {thing} is {place}").audio, SAMPLING_RATE, 16_000)
            path = f"audio/{number}-{name or 'stranger'}.wav"
            soundfile.write(folder / path, audio[: SECONDS * 16_000], 16_000)
            kind = "train" if not is_held else "sentences" if name else "voice"
            lines[kind].append({"audio": path, "prompt": "<audio> which colour", "answer": colour})
            if name:
                lines[kind].append({"audio": path, "prompt": "<audio> who speaks", "answer": name})
    for kind, found in lines.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
        print(f"{kind}.jsonl: {len(found)} examples")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
