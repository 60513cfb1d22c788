"""Code of a user's class that goes along with its checkpoint, for the auto classes; as in ``transformers``."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)


def own_code(things: Iterable[Any]) -> tuple[dict[str, str], dict[str, str]]:
    """What a checkpoint needs for the classes that were registered for an auto class.

    Args:
        things: a model and its configuration, whose ``_auto_class`` says so.

    Returns:
        ``auto_map`` of ``config.json``, and the Python files, name -> content: those of the classes, and those that
        they import from beside them.
    """
    auto_map, files = {}, {}
    for thing in things:
        kind = type(thing)
        if getattr(kind, "_auto_class", None) is None:
            continue
        if kind.__module__ == "__main__":
            logger.warning(
                f"the code of {kind.__name__} is not saved, as it is in the program that runs: put it into a module"
            )
            continue
        from transformers.dynamic_module_utils import get_relative_import_files  # only here: few need it

        path = Path(inspect.getfile(kind))
        auto_map[kind._auto_class] = f"{path.stem}.{kind.__name__}"
        for file in (path, *map(Path, get_relative_import_files(path))):
            files[file.name] = file.read_text("utf-8")
    return auto_map, files
