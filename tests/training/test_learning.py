"""Training learns: the example of docs/training.md, as its reader runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "overfit.py"


@pytest.mark.slow
def test_a_small_moshi_learns_its_part_of_twenty_dialogues(tmp_path: Path):
    # without the settings for quick compilation: here the time goes into what is compiled
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text("utf-8"))
    assert len(figures["codebook_entries_used"]) == 4
    assert min(figures["codebook_entries_used"]) >= 0.25
    assert figures["text_loss"] < 0.1
    assert figures["exact_replies"] == len(figures["replies"]) == 20, figures["replies"]
    assert figures["codes_matched"] >= 0.95
    # most frames are silence before and after Moshi's words: those alone would be most of the way
    assert figures["speech_matched"] >= 0.95
