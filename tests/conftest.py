"""Strict settings for all tests: warnings are errors, and the shapes and types in annotations are checked."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping

# Tiny models spend their time in LLVM, not in what it makes faster: each of these halves the compilation, the second
# that of large programs. Processes that tests start take them over, unless they are to run as those of users.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")

# Before anything imports the package, so that every annotated function checks its arguments and results.
_hook = jaxtyping.install_import_hook("transformers_moshi_flax", "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from tests.random_model import RANDOM_MODEL  # noqa: E402

torch.set_num_threads(1)
# On accelerators float32 products are rounded to TF32 or bfloat16 unless asked otherwise.
jax.config.update("jax_default_matmul_precision", "highest")

LEAST_SECONDS = 0.2
"""That a program takes to be compiled, to be kept."""

MOST_BYTES = 2**30
"""That are kept."""


def pytest_configure(config: pytest.Config) -> None:
    keep_programs(config)
    config.addinivalue_line("filterwarnings", "error")
    for line in (
        # a program that another process is just writing is compiled once more
        r"ignore:.*persistent compilation cache entry",
        # SWIG types of sentencepiece and others, seen by importlib itself
        r"ignore:builtin type .* has no __module__ attribute:DeprecationWarning",
        # torch's own jit helpers, imported by transformers on Python 3.12 and later
        r"ignore:.*torch\.jit.*:DeprecationWarning",
    ):
        config.addinivalue_line("filterwarnings", line)


def keep_programs(config: pytest.Config) -> None:
    """Compiles a program once, for all processes and for the runs to come; ``--cache-clear`` forgets them.

    Tests count programs that are compiled and those that are read alike.
    """
    from transformers_moshi_flax.cli.compilation_cache import tidy

    if not hasattr(config, "cache"):  # -p no:cacheprovider
        return
    kept, others = programs(config), programs(config, "-of-others")
    if not hasattr(config, "workerinput"):  # what a process that was killed has written in part is removed, once
        for folder in (kept, others):
            tidy(folder)
            if sum(path.stat().st_size for path in folder.iterdir()) > MOST_BYTES:
                shutil.rmtree(folder)  # most are of programs that nothing asks for any more
    jax.config.update("jax_compilation_cache_dir", str(kept))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)


def programs(config: pytest.Config, suffix: str = "") -> Path:
    """The folder of the programs that were compiled for this machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [f"flags: {platform.processor()}"]
    features = {line for line in lines if line.startswith(("flags", "Features"))}
    return config.cache.mkdir(f"programs-{zlib.crc32(repr(sorted(features)).encode()):08x}{suffix}")


@pytest.fixture(scope="session")
def keeping(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of the environment by which processes that tests start keep their programs, as tests do.

    Some are killed while they write: others warn of what they find then, and go on.
    """
    config = request.config
    folder = programs(config, "-of-others") if hasattr(config, "cache") else tmp_path_factory.mktemp("programs")
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(LEAST_SECONDS),
        "PYTHONWARNINGS": "ignore",
    }


@pytest.fixture(scope="session", autouse=True)
def equal_models_are_traced_once() -> None:
    """A process finds what the parameters of a class and configuration are, and how they are drawn, once."""
    from transformers_moshi_flax.input_checks import is_tracing
    from transformers_moshi_flax.modeling_flax_utils import FlaxPreTrainedModel

    known: dict[Any, Any] = {}

    def once(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(model: Any, *args: Any) -> Any:
            if is_tracing(args):
                return method(model, *args)
            shapes = [getattr(arg, "dtype", arg) for arg in args]
            fields = (model._module_kwargs, model.dtype, model.input_shape, model._name_in_whole, shapes)
            of_jax = (jax.config.jax_enable_x64, jax.config.jax_default_prng_impl)
            key = (method, type(model), model.module_class, model.config.to_json_string(False), repr((fields, of_jax)))
            if key not in known:
                known[key] = method(model, *args)
            return jax.tree.map(lambda leaf: leaf, known[key])  # dictionaries of its own

        return call

    for name in ("_float_shapes", "_drawing"):
        setattr(FlaxPreTrainedModel, name, once(getattr(FlaxPreTrainedModel, name)))


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 arrays in JAX while the test runs."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Annotations are not checked while the test runs: what users meet who pass something else."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def count_compilations() -> Iterator[Callable[[], int]]:
    """A function that tells how many programs XLA has compiled since it was last asked."""
    compiled: list[str] = []

    def listen(event: str, duration: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def count() -> int:
        number = len(compiled)
        compiled.clear()
        return number

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield count
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="session")
def random_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model as ONNX graphs of two dialogues that draw. Not to be changed."""
    from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
    from transformers_moshi_flax.export import export_onnx

    model = FlaxMoshiForConditionalGeneration.from_pretrained(RANDOM_MODEL, dtype=jax.numpy.float32)
    folder = tmp_path_factory.mktemp("export") / "random"
    export_onnx(model, folder, RANDOM_MODEL, batch_size=2)
    return folder


@pytest.fixture(scope="session")
def greedy_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model as ONNX graphs of one greedy dialogue that looks back eight frames. Not to be changed."""
    from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
    from transformers_moshi_flax.export import export_onnx

    model = FlaxMoshiForConditionalGeneration.from_pretrained(RANDOM_MODEL, dtype=jax.numpy.float32)
    folder = tmp_path_factory.mktemp("export") / "greedy"
    export_onnx(model, folder, RANDOM_MODEL, context=8, do_sample=False, depth_decoder_do_sample=False)
    return folder


@pytest.fixture(scope="session")
def runtime_for_web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a page needs of ONNX Runtime, from npm."""
    from transformers_moshi_flax.export.onnxruntime_web import copy_runtime

    folder = tmp_path_factory.mktemp("onnxruntime-web")
    try:
        copy_runtime(folder)
    except ValueError as error:
        pytest.skip(str(error))
    return folder


@pytest.fixture
def npm_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What passes for an installed onnxruntime-web, and is small."""
    from transformers_moshi_flax.export import onnxruntime_web

    package = tmp_path / "node_modules" / onnxruntime_web.PACKAGE
    (package / "dist").mkdir(parents=True)
    described = {"name": onnxruntime_web.PACKAGE, "version": onnxruntime_web.VERSION}
    (package / "package.json").write_text(json.dumps(described))
    for name in onnxruntime_web.FILES:
        (package / "dist" / name).write_text(name)
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in onnxruntime_web.FILES}
    monkeypatch.setattr(onnxruntime_web, "FILES", digests)
    return package
