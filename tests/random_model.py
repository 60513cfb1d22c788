"""A small Moshi with random weights, as upstream wrote it (``utils/build_assets.py``): for tests of everything that
does not depend on what is said. It never falls silent."""

from __future__ import annotations

from pathlib import Path

RANDOM_MODEL = Path(__file__).parent / "assets" / "moshi-tiny-random"
