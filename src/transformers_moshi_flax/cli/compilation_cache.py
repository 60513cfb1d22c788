"""Compiled programs are kept between runs of the command line, by JAX's persistent compilation cache.

JAX neither replaces an entry that a killed run or a full disk has cut off, nor writes any beside one without a time
where the cache has a limit, and warns of each at every start. So the folder is put in order before JAX opens it, and
what goes wrong later is one line.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import Any

from transformers_moshi_flax.checkpoints.writing import write_text
from transformers_moshi_flax.cli.errors import one_line

CHECKED = ".checked.json"
"""Which entries were found whole: name -> size and time of the last change."""

_ENTRY, _TIME = "-cache", "-atime"
_ZSTD = b"\x28\xb5\x2f\xfd"
_PROBLEM = "persistent compilation cache entry"
"""What JAX's warnings about the cache have in common."""


def use_compilation_cache() -> None:
    """Keeps programs in a folder of the Hugging Face cache, unless ``JAX_COMPILATION_CACHE_DIR`` names another.

    ``JAX_ENABLE_COMPILATION_CACHE=false`` turns it off. Whatever is wrong with the folder costs a line at most.
    """
    import jax
    from huggingface_hub.constants import HF_HOME

    settings: Any = jax.config  # whose attributes no type checker sees
    if not settings.jax_enable_compilation_cache:
        return
    if settings.jax_compilation_cache_dir is None:
        # programs that are compressed by one package cannot be read where it is not installed
        name = "compiled" if _zstd() is None else "compiled-zstd"
        jax.config.update("jax_compilation_cache_dir", str(Path(HF_HOME) / "transformers_moshi_flax" / name))
    tell_once()
    place = settings.jax_compilation_cache_dir
    if "://" in place:
        return
    folder = Path(place)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tidy(folder, limited=settings.jax_compilation_cache_max_size != -1)
    except OSError as error:
        _tell(f"compiled programs are not kept: {error}; JAX_COMPILATION_CACHE_DIR names another folder")
        if not folder.is_dir():
            jax.config.update("jax_enable_compilation_cache", False)
            return
        # what is there is read all the same; a limit would write even then
        jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
        jax.config.update("jax_compilation_cache_max_size", -1)


def tidy(folder: Path, limited: bool = False) -> None:
    """Remove damaged entries, so that they are written anew.

    An entry that another process is just writing may be among them: it is then written at that one's next start.

    Args:
        folder: of JAX's cache.
        limited: it has a limit, for which each entry must have a time.

    Raises:
        OSError: the folder cannot be written.
    """
    with tempfile.TemporaryFile(dir=folder):
        pass  # a folder without one damaged entry may not be writable either
    before = _checked(folder)
    whole: dict[str, list[int]] = {}
    for path in folder.glob(f"*{_ENTRY}"):
        with contextlib.suppress(FileNotFoundError):  # of another process that tidies
            status = path.stat()
            known = [status.st_size, status.st_mtime_ns]
            if before.get(path.name) == known or is_whole(path):
                whole[path.name] = known
                time = path.with_name(path.name.removesuffix(_ENTRY) + _TIME)
                if limited and not (time.exists() and time.stat().st_size == 8):
                    time.write_bytes(status.st_mtime_ns.to_bytes(8, "little"))
            else:
                path.unlink()
    for path in folder.glob(f"*{_TIME}"):
        if path.name.removesuffix(_TIME) + _ENTRY not in whole:
            path.unlink(missing_ok=True)
    if whole != before:
        write_text(folder / CHECKED, json.dumps(whole))


def is_whole(path: Path) -> bool:
    """Whether an entry can be uncompressed; one by zstd that this Python cannot read is somebody else's."""
    content = path.read_bytes()
    try:
        if content[:4] == _ZSTD:
            uncompress = _zstd()
            return uncompress is None or bool(uncompress(content))
        return bool(zlib.decompress(content))
    except Exception:  # zlib.error, and those of either package for zstd
        return False


def _zstd() -> Any:
    """The decompression that JAX uses where it has one."""
    with contextlib.suppress(ImportError):
        from compression import zstd

        return zstd.decompress
    with contextlib.suppress(ImportError):
        import zstandard

        return zstandard.ZstdDecompressor().decompress
    return None


def _checked(folder: Path) -> dict[str, list[int]]:
    try:
        values = json.loads((folder / CHECKED).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def tell_once() -> None:
    """Show the first of JAX's warnings about the cache as one line, and no other."""
    show = warnings.showwarning
    told: list[Any] = []

    def showwarning(message: Any, category: Any, *where: Any, **options: Any) -> None:
        if _PROBLEM not in str(message):
            show(message, category, *where, **options)
        elif not told:
            told.append(message)
            _tell(f"a compiled program could not be kept or read: {str(message).rpartition(': ')[2]}")

    warnings.showwarning = showwarning
    # else the same place is told once, whatever it says
    warnings.filterwarnings("always", message=f".*{_PROBLEM}")


def _tell(text: str) -> None:
    print(f"moshi-flax: {one_line(text):.200}", file=sys.stderr)
