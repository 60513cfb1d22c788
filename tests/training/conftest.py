"""Programs that several tests of training run are compiled once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this process keeps its programs. No other one writes there: JAX does so in place."""
    return tmp_path_factory.mktemp("compiled")


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
def keeping(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of the environment by which processes that tests start share their programs.

    Some are killed while they write: others warn of what they find then, and go on.
    """
    return {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled-by-others")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "PYTHONWARNINGS": "ignore",
    }
