"""A small Moshi with random weights, as upstream wrote it (``utils/build_assets.py``): for tests of everything that
does not depend on what is said. It never falls silent."""

from __future__ import annotations

from transformers_moshi_flax.cli.checkpoints import ASSETS

RANDOM_MODEL = ASSETS / "moshi-tiny-random"
