"""A small Moshi with random weights, as upstream wrote it (``utils/build_assets.py``): for tests of everything that
does not depend on what is said. Unlike the embedded one, it never falls silent."""

from __future__ import annotations

from pathlib import Path

RANDOM_MODEL = Path(__file__).parent / "assets" / "moshi-tiny-random"
RANDOM_MODEL_CLIP = RANDOM_MODEL.parent / "user.flac"
"""A few seconds of speech, which the codes of the model were chosen for."""
