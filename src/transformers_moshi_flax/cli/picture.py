"""A picture of a dialogue: what both sides sound like, and the words above, on one time axis."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from transformers_moshi_flax.cli.errors import UserMistake, as_mistake
from transformers_moshi_flax.cli.live import check_file
from transformers_moshi_flax.cli.transcript import Timed, subtitles

PICTURE_OUT = (".png",)
"""What a picture can be written as."""

SIDES = ("Moshi", "user")
"""Of the channels, from the left."""

_COLOURS = ("#2a78c2", "#d9722e")
_POINTS = 4000
"""Most columns of a waveform: a picture has no more."""


def check_picture(picture: Path | None, user_audio: Path, overwrite: bool) -> None:
    """Raises :class:`UserMistake` if ``--picture`` is given and cannot be drawn, or written there."""
    if picture is None:
        return
    check_file("--picture", picture, PICTURE_OUT, user_audio, overwrite)
    if importlib.util.find_spec("matplotlib") is None:
        raise UserMistake('--picture: needs matplotlib: run `pip install "transformers-moshi-flax[picture]"`')


def write_picture(
    path: Path, channels: Float[np.ndarray, "samples 2"], rate: int, words: Mapping[str, Sequence[Timed]]
) -> None:
    """Write a PNG, atomically.

    Args:
        path: of the file.
        channels: Moshi's and the user's samples.
        rate: in hertz.
        words: of each side, as far as they are known.

    Raises:
        UserMistake: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from transformers_moshi_flax.checkpoints.writing import atomic_file

    seconds = len(channels) / rate
    figure = Figure(figsize=(min(max(8.0, 0.9 * seconds), 40.0), 3.6), dpi=110, layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for side, axis, samples, colour in zip(SIDES, axes, channels.T, _COLOURS):
        times, low, high = _outline(samples, rate)
        axis.fill_between(times, low, high, color=colour, linewidth=0.4, edgecolor=colour)
        axis.set_ylim(-1, 1.5)
        axis.set_yticks([])
        axis.set_ylabel(side)
        axis.spines[["top", "right", "left"]].set_visible(False)
        for line in subtitles(list(words.get(side, ())), seconds):
            axis.text(line.start, 1.15, line.text, fontsize=8, va="bottom", clip_on=True)
    axes[-1].set_xlim(0, max(seconds, 1 / rate))
    axes[-1].set_xlabel("seconds")
    with as_mistake(f"--picture: cannot write {str(path)!r}", OSError), atomic_file(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def _outline(
    samples: Float[np.ndarray, "samples"], rate: int
) -> tuple[Float[np.ndarray, "points"], Float[np.ndarray, "points"], Float[np.ndarray, "points"]]:
    """Times, and the lowest and the highest sample from each to the next, as shares of the loudest."""
    block = max(1, -(-len(samples) // _POINTS))
    padded = np.pad(samples, (0, -len(samples) % block)).reshape(-1, block)
    scale = max(float(np.abs(samples).max(initial=0.0)), 1e-3)
    return np.arange(len(padded)) * block / rate, padded.min(axis=1) / scale, padded.max(axis=1) / scale
