"""Compiled programs are kept between runs of the command line, by JAX's persistent compilation cache."""

from __future__ import annotations

from pathlib import Path


def use_compilation_cache() -> None:
    """Keeps programs in a folder of the Hugging Face cache, unless ``JAX_COMPILATION_CACHE_DIR`` names another.

    ``JAX_ENABLE_COMPILATION_CACHE=false`` turns it off.
    """
    import jax
    from huggingface_hub.constants import HF_HOME

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path(HF_HOME) / "transformers_moshi_flax" / "compiled"))
