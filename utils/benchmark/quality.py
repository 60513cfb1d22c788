"""What quantized weights change in what a trained model says, by the embedded converser.

The float32 model answers spoken questions, live and greedy. Then every width hears the same dialogues, with the words
and codes of the float32 model as their past: how often it would choose the same text token and codes next, and
the perplexity of what was chosen, relative to float32. Last it answers the questions itself: how many answers are the
same, and how many are right. ::

    python utils/benchmark/quality.py --questions 64 --output quality.md

Voices have to be installed (``make voices``). Nothing is timed, so the machine may be busy.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).parents[2]))

from utils.benchmark.generate import report_to

WIDTHS: dict[str, Any] = {
    "bfloat16": None,
    "int8": {"kind": "int8"},
    "int4, groups of 32": {"kind": "int4"},
    "int4, groups of 16": {"kind": "int4", "group_size": 16},
    "int4, groups of 32, offsets": {"kind": "int4", "offsets": True},
    "nf4, groups of 32": {"kind": "nf4"},
}
"""Width -> fields of ``QuantizationConfig``."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=64, help="that are asked, held out of training, known voices")
    parser.add_argument("--threads", type=int, default=2, help="threads")
    parser.add_argument("--output", type=Path, help="markdown file to write")
    return parser.parse_args(arguments)


def answered(model: Any, users: Any) -> tuple[Any, Any]:
    """Text ids ``(rows, frames)`` and codes ``(rows, codebooks, frames)`` of live answers; -1 before the first."""
    import jax
    import numpy as np

    stream = model.streaming(batch_size=len(users))
    state, frames = stream.init(jax.random.key(0)), []
    for start in range(0, users.shape[1], stream.frame_size):
        state, made = stream.step(state, users[:, None, start : start + stream.frame_size])
        frames.append((np.asarray(made.text_ids), np.asarray(made.audio_codes)))
    return np.stack([text for text, _ in frames], axis=1), np.stack([codes for _, codes in frames], axis=2)


def next_logits(model: Any, text: Any, codes: Any, user_codes: Any) -> tuple[Any, Any]:
    """Those of every next text token and code, after the same past: ``(rows, frames - 1, vocab)`` and ``(rows,
    frames - 1, codebooks, entries)``."""
    import numpy as np

    delayed = []
    for each in (codes, user_codes):
        first, others = each[:, :1], each[:, 1:]
        start = np.full_like(others[:, :, :1], model.config.audio_vocab_size)
        delayed.append(np.concatenate([first, np.concatenate([start, others[:, :, :-1]], axis=2)], axis=1))
    outputs = model(
        input_ids=text,
        moshi_audio_codes=delayed[0],
        user_audio_codes=delayed[1],
        text_labels=text,
        audio_labels=codes,
    )
    frames = text.shape[1] - 1
    return tuple(np.asarray(each, np.float32)[:, :frames] for each in (outputs.logits, outputs.audio_logits))


def measure(options: argparse.Namespace) -> str:
    """The table, as markdown."""
    import jax.numpy as jnp
    import numpy as np
    from examples.converse.evaluate import held_out_questions
    from scipy.special import log_softmax

    from transformers_moshi_flax import FlaxMoshiForConditionalGeneration, MoshiProcessor, QuantizationConfig
    from transformers_moshi_flax.cli.checkpoints import EMBEDDED_MODEL
    from transformers_moshi_flax.cli.transcript import joined, timed_words

    def load(fields: dict[str, Any] | None, dtype: Any = jnp.float32) -> Any:
        config = QuantizationConfig(**fields, skip=["audio_encoder"]) if fields else None
        return FlaxMoshiForConditionalGeneration.from_pretrained(EMBEDDED_MODEL, dtype=dtype, quantization=config)

    exact, tokenizer = load(None), MoshiProcessor.from_pretrained(EMBEDDED_MODEL).tokenizer
    size = exact.config.audio_encoder_config.frame_size
    asked, users = held_out_questions(options.questions, 7, False)
    users = np.pad(users, ((0, 0), (0, -users.shape[1] % size)))

    def answers(text: Any) -> list[str]:
        return [joined(timed_words(row, tokenizer, 12.5)) for row in text]

    text, codes = answered(exact, users)
    spoken, valid = answers(text), (text >= 0).all(axis=0)
    user_codes = np.asarray(exact.audio_encoder.encode(users[:, None]).audio_codes)
    past = text[:, valid], codes[:, :, valid], user_codes[:, :, : int(valid.sum())]
    wanted = past[0][:, 1:], np.moveaxis(past[1], 1, 2)[:, 1:]
    # a code of the last codebooks is heard a frame later than it is chosen
    wanted = wanted[0], np.concatenate([wanted[1][:, :, :1], np.moveaxis(past[1], 1, 2)[:, :-1, 1:]], axis=2)
    theirs = next_logits(exact, *past)

    def perplexity(logits: Any, ids: Any) -> float:
        chosen = np.take_along_axis(log_softmax(logits, axis=-1), ids[..., None], axis=-1)
        return float(np.exp(-chosen.mean()))

    def right(said: list[str]) -> str:
        return f"{sum(each == one.exchange.answer for each, one in zip(said, asked))} of {len(asked)}"

    lines = [
        "| width | same text token | same codes | perplexity of text | of codes | same answer | right |",
        "|---|---|---|---|---|---|---|",
        f"| float32 | | | {perplexity(theirs[0], wanted[0]):.4f} | {perplexity(theirs[1], wanted[1]):.4f} | "
        f"| {right(spoken)} |",
    ]
    for width, fields in WIDTHS.items():
        model = load(fields, jnp.float32 if fields else jnp.bfloat16)
        ours = next_logits(model, *past)
        same = [float((one.argmax(-1) == other.argmax(-1)).mean()) for one, other in zip(ours, theirs)]
        more = [perplexity(one, ids) / perplexity(other, ids) - 1 for one, other, ids in zip(ours, theirs, wanted)]
        said = answers(answered(model, users)[0])
        alike = sum(one == other for one, other in zip(said, spoken))
        lines.append(
            f"| {width} | {same[0]:.2%} | {same[1]:.2%} | {more[0]:+.2%} | {more[1]:+.2%} | {alike} of {len(said)} | "
            f"{right(said)} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    report_to(parse_arguments(arguments), measure)


if __name__ == "__main__":
    main()
