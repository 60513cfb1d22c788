"""Proof that training works: a small Moshi learns twenty spoken dialogues by heart, and then says its part.

Everything is made on the spot and goes the way of a real run: recordings, ``moshi-flax prepare``, ``moshi-flax
train``, the exported checkpoint, ``generate`` with the user heard live from the first frame on. ::

    python examples/overfit.py outputs/overfit

Needs ``pip install "transformers-moshi-flax[train]" espeakng-loader`` and an empty directory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
from jaxtyping import Int
from transformers import MoshiConfig

from dialogues import SCRIPT, make_dialogues
from small_model import fit_codebooks, make_small_model
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration, MoshiProcessor
from transformers_moshi_flax.checkpoints.configs import load_config
from transformers_moshi_flax.checkpoints.files import Source
from transformers_moshi_flax.cli import main as moshi_flax
from transformers_moshi_flax.training.data.prepared import Conversation, open_dataset

CONFIGURATION = Path(__file__).with_suffix(".yaml")
PAD = 3


def command(*arguments: str | Path) -> None:
    """Runs ``moshi-flax``; SystemExit if that fails."""
    try:
        moshi_flax([str(argument) for argument in arguments])
    except SystemExit as end:
        if end.code:
            raise


def make_model(directory: Path, manifest: Path) -> None:
    """Writes a small model for these recordings to ``directory``."""
    model, processor = make_small_model([sentence for exchange in SCRIPT for sentence in exchange])
    recordings = [json.loads(line)["path"] for line in manifest.read_text("utf-8").splitlines()]
    voices = [
        channel for path in recordings for channel in soundfile.read(manifest.parent / path, dtype="float32")[0].T
    ]
    fit_codebooks(model, voices)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def entries_used(checkpoint: Path, conversations: Sequence[Conversation]) -> list[float]:
    """Of each codebook the share of its entries that occur in the conversations."""
    config = load_config(MoshiConfig, Source.locate(checkpoint))
    streams = [[talk.moshi_audio_tokens, talk.user_audio_tokens] for talk in conversations]
    codes = np.concatenate([codes for pair in streams for codes in pair], axis=1)
    return [len(np.unique(row)) / config.audio_vocab_size for row in codes]


def speak(
    checkpoint: Path, conversations: Sequence[Conversation]
) -> tuple[list[str], Int[np.ndarray, "conversations codebooks frames"]]:
    """What the model says to the users of ``conversations``, greedily, from nothing but the start frame.

    Returns:
        Its words and its codes, for each conversation.
    """
    model = FlaxMoshiForConditionalGeneration.from_pretrained(checkpoint)
    processor = MoshiProcessor.from_pretrained(checkpoint)
    start = model.get_unconditional_inputs(len(conversations))
    frames = max(conversation.frames for conversation in conversations)
    shape = (len(conversations), model.config.num_codebooks, frames)
    # what comes after a conversation does not change what was said in it
    user = np.zeros(shape, np.int32)
    for row, conversation in zip(user, conversations):
        row[:, : conversation.frames] = conversation.user_audio_tokens
    spoken = model.generate(
        start.input_ids,
        user_audio_codes=np.concatenate([np.asarray(start.user_audio_codes), user], axis=-1),
        moshi_audio_codes=start.moshi_audio_codes,
        concat_unconditional_inputs=False,
        # the codes of a frame take one more step than its text
        max_new_tokens=frames + 1,
        do_sample=False,
        depth_decoder_do_sample=False,
        return_audio_codes=True,
        return_audio_waveforms=False,
    )
    texts = [
        processor.decode(row[1 : conversation.frames + 1]).strip()
        for row, conversation in zip(np.asarray(spoken.sequences), conversations)
    ]
    return texts, np.asarray(spoken.audio_codes)


def measure(checkpoint: Path, dataset: Path) -> dict[str, object]:
    """What was learned.

    Returns:
        ``codebook_entries_used``: see :func:`entries_used`; ``replies``: what was said; ``exact_replies``: how many of
        them are the script's, letter by letter; ``codes_matched``: the share of Moshi's codes that are those of the
        recordings; ``speech_matched``: the same from the frame before its first word on.
    """
    # in the order of the script
    conversations = sorted(open_dataset(dataset), key=lambda conversation: conversation.id)
    replies, codes = speak(checkpoint, conversations)
    matched, speech = [], []
    for conversation, spoken in zip(conversations, codes):
        equal = spoken[:, : conversation.frames] == conversation.moshi_audio_tokens
        begin = int(np.argmax(conversation.moshi_text_tokens != PAD))
        matched.append(equal.ravel())
        speech.append(equal[:, begin:].ravel())
    return {
        "codebook_entries_used": entries_used(checkpoint, conversations),
        "replies": replies,
        "exact_replies": sum(reply == answer for reply, (_, answer) in zip(replies, SCRIPT, strict=True)),
        "codes_matched": float(np.concatenate(matched).mean()),
        "speech_matched": float(np.concatenate(speech).mean()),
    }


def main(directory: Path) -> dict[str, object]:
    """The whole way; its figures, which are also in ``figures.json``."""
    dialogues, model, prepared, run = (directory / name for name in ("dialogues", "model", "prepared", "run"))
    manifest = make_dialogues(dialogues)
    make_model(model, manifest)
    command("prepare", manifest, prepared, "--model", model, "--batch-size", "20")
    places = {"model.path": model, "data.train": prepared, "data.evaluation": prepared, "run.output_dir": run}
    command("train", CONFIGURATION, *(f"--set={key}={path}" for key, path in places.items()))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [line for line in lines if line["split"] == "evaluation"][-1]
    figures = {name: losses[name] for name in ("text_loss", "audio_loss")} | measure(run / "export", prepared)
    (directory / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/overfit.py DIRECTORY")
    print(json.dumps(main(Path(sys.argv[1])), indent=2))
