"""The folder of a page: whole or not at all, with the checksums of all its files; and ONNX Runtime from npm."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.random_model import RANDOM_MODEL
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
from transformers_moshi_flax.export import export_web, onnxruntime_web, web
from transformers_moshi_flax.export.onnxruntime_web import FILES, PACKAGE, VERSION, copy_runtime
from transformers_moshi_flax.runtime.manifest import read_manifest


@pytest.fixture(scope="module")
def model() -> FlaxMoshiForConditionalGeneration:
    return FlaxMoshiForConditionalGeneration.from_pretrained(RANDOM_MODEL, dtype=jnp.float32)


def integrity(path: Path) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()}"


def test_every_file_has_its_checksum(
    model: Any, npm_package: Path, random_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exported(model: Any, folder: Path, *args: Any, **options: Any) -> dict[str, Any]:
        assert options == {"batch_size": 1, "context": 8}
        shutil.copytree(random_export, folder)
        return read_manifest(folder)

    monkeypatch.setattr(web, "export_onnx", exported)
    page = tmp_path / "page"
    question = np.array([0, 0.5, -1, 1], np.float32)
    manifest = export_web(model, page, RANDOM_MODEL, npm_package, "</script>", question, context=8)
    files = {path.relative_to(page).as_posix() for path in page.rglob("*") if path.is_file()}
    line, _, worker = (page / "service_worker.js").read_text("utf-8").partition(";\n")
    kept = json.loads(line.removeprefix("const SITE = "))["files"]
    assert set(kept) == files - {"service_worker.js"} and "SITE.files" in worker
    assert all(integrity(page / name) == digest for name, digest in kept.items())

    index = (page / "index.html").read_text("utf-8")
    told = re.search('id="site">(.*?)</script>', index)
    assert told is not None
    site = json.loads(told[1])
    assert site["notice"] == "</script>" and site["question"] == {"file": "question.pcm", "silence": 50}
    wasm = f"{PACKAGE}/ort-wasm-simd-threaded.wasm"
    assert site["runtime"]["file"] == wasm
    assert site["runtime"]["sha256"] == hashlib.sha256((page / wasm).read_bytes()).hexdigest()
    of_model = {f"model/{name}" for name in manifest["files"]}
    assert set(site["code"]) == files - of_model - {wasm, "index.html", "service_worker.js"}
    assert re.search('src="boot.js[?][0-9a-f]{8}" integrity="(.*?)"', index)[1] == kept["boot.js"]
    np.testing.assert_array_equal(np.fromfile(page / "question.pcm", "<i2"), [0, 16384, -32768, 32767])
    assert "MIT License" in (page / PACKAGE / "LICENSE").read_text()


def test_what_is_refused_leaves_nothing(
    model: Any, npm_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page"
    with pytest.raises(ValueError, match="not empty"):
        export_web(model, npm_package)
    with pytest.raises(ValueError, match="batch_size"):
        export_web(model, page, batch_size=2)
    with pytest.raises(ValueError, match="temperatur"):
        export_web(model, page, onnxruntime_web=npm_package, temperatur=1.0)
    monkeypatch.setattr(web, "RATE", 48_000)
    with pytest.raises(ValueError, match="1920 samples at 24000 Hz"):
        export_web(model, page)
    assert [path.name for path in tmp_path.iterdir()] == ["node_modules"]


def test_another_package_is_refused(npm_package: Path, tmp_path: Path) -> None:
    for described, words in (
        ({"name": PACKAGE, "version": "1.2.3"}, f"{PACKAGE} 1.2.3"),
        ({"name": "another", "version": VERSION}, "another"),
    ):
        (npm_package / "package.json").write_text(json.dumps(described))
        with pytest.raises(ValueError, match=f"which is {words}"):
            copy_runtime(tmp_path, npm_package)
    with pytest.raises(ValueError, match="no package"):
        copy_runtime(tmp_path, tmp_path)


def test_damaged_files_of_the_package_are_refused(npm_package: Path, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    copy_runtime(tmp_path / "place", npm_package)
    assert {path.name for path in (tmp_path / "place").iterdir()} == set(FILES)
    (npm_package / "dist" / "ort.wasm.min.mjs").write_text("damaged")
    with pytest.raises(ValueError, match=r"ort\.wasm\.min\.mjs' is missing or damaged"):
        copy_runtime(tmp_path / "place", npm_package)


def test_npm_is_asked(npm_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "package.tgz"
    with tarfile.open(archive, "w:gz") as opened:
        opened.add(npm_package, "package")
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    monkeypatch.setenv("PATH", str(npm.parent), prepend=":")
    (place := tmp_path / "place").mkdir()

    npm.write_text(f'#!/bin/sh\n[ "$2" = {PACKAGE}@{VERSION} ] && cp {archive} "$6"\n')
    npm.chmod(0o755)
    with pytest.raises(ValueError, match="another checksum than was published"):
        copy_runtime(place)
    digest = hashlib.sha512(archive.read_bytes()).digest()
    monkeypatch.setattr(onnxruntime_web, "INTEGRITY", base64.b64encode(digest).decode())
    copy_runtime(place)
    assert (place / "ort.wasm.min.mjs").read_text() == "ort.wasm.min.mjs"

    npm.write_text("#!/bin/sh\necho no such host >&2\nexit 1\n")
    with pytest.raises(ValueError, match=r"no such host.*onnxruntime_web"):
        copy_runtime(place)
    monkeypatch.setenv("PATH", str(place))
    with pytest.raises(ValueError, match="npm is not installed"):
        copy_runtime(place)
