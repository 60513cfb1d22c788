"""Strict settings for all tests: warnings are errors, and the shapes and types in annotations are checked."""

from __future__ import annotations

import hashlib
import json
import os
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


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error")
    for line in (
        # SWIG types of sentencepiece and others, seen by importlib itself
        r"ignore:builtin type .* has no __module__ attribute:DeprecationWarning",
        # torch's own jit helpers, imported by transformers on Python 3.12 and later
        r"ignore:.*torch\.jit.*:DeprecationWarning",
    ):
        config.addinivalue_line("filterwarnings", line)


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
