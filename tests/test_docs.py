"""What the pages promise is there: the tests that they name, the files that they link to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_difference_has_its_test():
    rows = re.findall(r"^\|.*\| ([^|]+) \|$", (ROOT / "docs" / "differences.md").read_text("utf-8"), re.M)
    named = [row for row in rows if row not in ("test", "---")]
    assert len(named) > 10
    for row in named:
        test, _, file = row.replace("`", "").partition(" in ")
        folder = ROOT if file.startswith("tests/") else ROOT / "tests" / "models" / "moshi"
        source = (folder / (file or "test_differences.py")).read_text("utf-8")
        assert re.search(rf"^ *(def|class) {test}\b", source, re.M), (
            f"docs/differences.md names {row}, which is missing"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
