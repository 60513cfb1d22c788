"""What the site takes from elsewhere: the public names of the package, and the changelog."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Puts the names in the place of ``{{ names of PACKAGE }}``, the changelog in that of ``{{ changelog }}``."""
    markdown = re.sub(r"\{\{ names of (\S+) \}\}", lambda match: _references(match[1]), markdown)
    return markdown.replace("{{ changelog }}", (ROOT / "CHANGELOG.md").read_text("utf-8"))


def _references(package: str) -> str:
    public = importlib.import_module(package)._PUBLIC
    return "\n\n".join(f"::: {package}.{module}.{name}" for module, names in public.items() for name in names)
