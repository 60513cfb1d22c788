"""The options that ``generate`` and ``converse`` share, and how those of sampling become arguments of the model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from transformers_moshi_flax.cli.checkpoints import Dtype
from transformers_moshi_flax.cli.errors import UserMistake

Model = Annotated[
    str | None, typer.Option(help="Checkpoint directory or Hub id. Default: the embedded one, a small demo model.")
]
UserAudio = Annotated[
    Path | None, typer.Option(help="What the user says: WAV or FLAC, any rate. Default: an embedded dialogue.")
]
Temperature = Annotated[float | None, typer.Option(min=0, help="Of the text; 0 is greedy.")]
TopK = Annotated[int | None, typer.Option(min=1, max=2**31 - 1, help="Of the text.")]
TopP = Annotated[float | None, typer.Option(min=0, max=1, help="Of the text; above 0.")]
DepthTemperature = Annotated[float | None, typer.Option(min=0, help="Of the audio; 0 is greedy.")]
DepthTopK = Annotated[int | None, typer.Option(min=1, max=2**31 - 1, help="Of the audio.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the sampling.")]
DtypeOption = Annotated[
    Dtype | None, typer.Option("--dtype", help="Default: the checkpoint's; of the embedded one float32.")
]


def sampling_options(
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    depth_temperature: float | None,
    depth_top_k: int | None,
) -> dict[str, Any]:
    """The sampling options as arguments of ``generate``; what was not given is left to the generation config.

    Raises:
        UserMistake: a value is not finite or out of range, or has no effect because its stream is greedy.
    """
    for option, value in (("temperature", temperature), ("depth-temperature", depth_temperature)):
        if value is not None and not math.isfinite(value):
            raise UserMistake(f"--{option}: {value} is no temperature; give a finite number, 0 for greedy")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserMistake(f"--top-p: {top_p} is not in (0, 1]; give a probability above 0")
    options: dict[str, Any] = {}
    streams = (
        ("", {"temperature": temperature, "top_k": top_k, "top_p": top_p}),
        ("depth_decoder_", {"temperature": depth_temperature, "top_k": depth_top_k}),
    )
    for prefix, values in streams:
        given = {name: value for name, value in values.items() if value is not None}
        flag = "--depth-" if prefix else "--"
        if given.get("temperature") == 0:
            if len(given) > 1:
                others = ", ".join(flag + name.replace("_", "-") for name in given if name != "temperature")
                raise UserMistake(f"{others}: no effect with {flag}temperature 0 (greedy); leave one out")
            options[f"{prefix}do_sample"] = False
        elif given:
            options[f"{prefix}do_sample"] = True
            options |= {f"{prefix}{name}": value for name, value in given.items()}
    return options
