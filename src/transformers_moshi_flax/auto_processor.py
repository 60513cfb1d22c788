"""``transformers.AutoProcessor`` learns of ``MoshiProcessor``, but not before somebody imports it.

To import it along with this package would take seconds, so a finder on ``sys.meta_path`` waits for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO_PROCESSOR = "transformers.models.auto.processing_auto"


def register_moshi_processor(module: ModuleType) -> None:
    """``AutoProcessor`` of ``module`` gives a ``MoshiProcessor`` for Moshi's checkpoints."""
    from transformers import MoshiConfig

    processor_class = importlib.import_module(__name__.rpartition(".")[0]).MoshiProcessor
    module.AutoProcessor.register(MoshiConfig, processor_class, exist_ok=True)


class WaitForAutoProcessor:
    """A finder of ``sys.meta_path`` that finds nothing itself, but registers the processor once its module is run."""

    def __init__(self) -> None:
        self._found = False

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != AUTO_PROCESSOR or self._found:
            return None
        self._found = True  # the other finders are asked now
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            register_moshi_processor(module)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def make_known() -> None:
    """Registers the processor, now or as soon as ``AutoProcessor`` is imported."""
    if AUTO_PROCESSOR in sys.modules:
        register_moshi_processor(sys.modules[AUTO_PROCESSOR])
    else:
        sys.meta_path.insert(0, WaitForAutoProcessor())
