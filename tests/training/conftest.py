"""Programs that several tests of training run are compiled once, in whatever process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled programs are kept, by all processes of this run of the tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module", autouse=True)
def programs_are_kept(compiled: Path) -> Iterator[None]:
    """For as long as the tests of a module run."""
    folder, least = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    jax.config.update(folder, str(compiled))
    jax.config.update(least, 0.1)
    compilation_cache.reset_cache()
    yield
    jax.config.update(folder, None)
    jax.config.update(least, 1.0)  # the default
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def keeping(compiled: Path) -> dict[str, str]:
    """Variables of the environment by which a process that a test starts keeps its programs there, too."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "PYTHONWARNINGS": "ignore",
    }
