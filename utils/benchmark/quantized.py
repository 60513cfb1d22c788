"""Frames per second, bytes and errors of float32, bfloat16 and quantized weights, in one run.

One random checkpoint (``--seed``) is loaded once a width. All widths generate the frames after the same random prompt,
greedy, batch 1, as ``generate.py`` times this library: they take turns ``--repeats`` times, so that noise hits all of
them, and the table has the least and the median of the runs.

Bytes are those of the weights that a frame must read: both decoders' parameters without embeddings. Temporaries are
what the compiled loop takes beside its arguments: with floats of the weights in them, they would be as large as these.

Errors are those of the backbone's hidden states on the prompt, relative to float32 (the norm of the difference over
the norm), behind the first layer and behind the last. Random weights have no outliers, and nothing to forget: what
they say of trained ones is the order of the widths at most.

Run it on an idle machine. ::

    python utils/benchmark/quantized.py --threads 2 --output quantized.md
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).parents[2]))

from utils.benchmark.generate import checked, report_to, take_turns
from utils.benchmark.settings import CONTEXTS, SIZES, Setting

if TYPE_CHECKING:
    import numpy as np
    from utils.benchmark.checkpoints import Prompt

WIDTHS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": {"kind": "int8"}},
    "int4": {"quantization": {"kind": "int4"}},
    "nf4": {"quantization": {"kind": "nf4"}},
    "nf4-double": {"quantization": {"kind": "nf4", "double_quantization": True}},
}
"""Width -> options of ``from_pretrained``; of ``quantization`` the fields of its ``QuantizationConfig``."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ends the program with a message for values that cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="68M", help="the model")
    parser.add_argument("--widths", nargs="+", choices=WIDTHS, default=list(WIDTHS), help="beside float32")
    parser.add_argument("--context", type=int, choices=CONTEXTS, default=CONTEXTS[0], help="frames of the prompt")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each width that count")
    parser.add_argument("--seconds", type=float, default=20.0, help="after which a width has two runs only")
    parser.add_argument("--threads", type=int, default=2, help="threads")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    parser.add_argument("--output", type=Path, help="markdown file to write")
    return checked(parser, parser.parse_args(arguments), repeats=1, threads=1)


def loading(width: str) -> dict[str, Any]:
    """The options of ``from_pretrained``."""
    from transformers_moshi_flax import QuantizationConfig

    options = dict(WIDTHS[width])
    if "quantization" in options:
        options["quantization"] = QuantizationConfig(**options["quantization"])
    return options


def read_bytes(model: Any) -> int:
    """Of the parameters that a frame reads."""
    from flax.traverse_util import flatten_dict

    flat = flatten_dict({part: model.params[part] for part in ("decoder", "depth_decoder")}, sep="/")
    return sum(leaf.nbytes for path, leaf in flat.items() if "embed_tokens" not in path)


def hidden_states(model: Any, prompt: Prompt) -> list[np.ndarray]:
    """Those of the backbone behind each of its layers, float32."""
    import numpy as np

    inputs = {"input_ids": prompt.text, "user_audio_codes": prompt.user, "moshi_audio_codes": prompt.moshi}
    found = model(**inputs, output_hidden_states=True).hidden_states
    return [np.asarray(each, np.float32) for each in found[1:]]


def measure(options: argparse.Namespace) -> str:
    """Measures what the options ask for; returns the report as markdown."""
    import numpy as np
    from utils.benchmark.checkpoints import draw_prompt, write_checkpoint
    from utils.benchmark.report import Measurement
    from utils.benchmark.sides import Ours

    setting, load = Setting(options.size, context=options.context), os.getloadavg()[0]
    widths = list(dict.fromkeys(["float32", *options.widths]))
    with tempfile.TemporaryDirectory(prefix="moshi-benchmark-") as folder, ExitStack() as stack:
        checkpoint = write_checkpoint(options.size, options.seed, Path(folder))
        prompt = draw_prompt(checkpoint, setting)
        sides = {width: Ours(checkpoint, **loading(width)) for width in widths}
        states = {width: hidden_states(side.model, prompt) for width, side in sides.items()}
        measurement = Measurement(setting, checkpoint.weight_bytes, checkpoint.cache_bytes(setting))
        runs = {width: stack.enter_context(side.prepared(setting, prompt)) for width, side in sides.items()}
        take_turns(runs, measurement, options)
    exact = states["float32"]
    whole = read_bytes(sides["float32"].model)
    lines = [
        f"{setting}; {options.threads} threads, {options.repeats} repeats, load average before {load:.2f}, after "
        f"{os.getloadavg()[0]:.2f}",
        "",
        "| width | ms a frame | median | frames/s | MB read | of float32 | MB temporary | error, first layer | last |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for width, side in sides.items():
        frames = [1e3 * run.seconds / setting.frames for run in measurement.runs[width]]
        least, size = min(frames), read_bytes(side.model)
        temporary = side.costs[setting][1].temporary_bytes
        errors = [np.linalg.norm(found - right) / np.linalg.norm(right) for found, right in zip(states[width], exact)]
        lines.append(
            f"| {width} | {least:.2f} | {statistics.median(frames):.2f} | {1e3 / least:.1f} | {size / 1e6:.1f} | "
            f"{size / whole:.3f} | {temporary / 1e6:.1f} | {errors[0]:.2g} | {errors[-1]:.2g} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    report_to(parse_arguments(arguments), measure)


if __name__ == "__main__":
    main()
