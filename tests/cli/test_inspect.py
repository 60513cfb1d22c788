"""``moshi-flax inspect``: every layout, what does not fit, and that no tensor is read."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.random_model import RANDOM_MODEL


def report_of(result, code: int = 0) -> dict:
    assert result.code == code, result.err
    return json.loads(result.out)


@pytest.mark.parametrize(
    ("name", "layout", "files", "checksums"),
    [
        ("upstream", "pt", 1, False),
        ("pt", "pt", 1, True),
        ("pt-shards", "pt", 5, True),
        ("flax", "flax", 1, True),
        ("flax-shards", "flax", 5, True),
        ("file", "flax", 1, True),
        ("msgpack", "flax", 1, False),
    ],
)
def test_every_layout(moshi_flax, layouts: dict, name: str, layout: str, files: int, checksums: bool):
    report = report_of(moshi_flax("inspect", layouts[name], "--json"))
    assert report["layout"] == layout and report["fits"] is True and report["class"] == "FlaxMimiModel"
    assert len(report["files"]) == files
    for file in report["files"]:
        assert file["checksums"] == (file["tensors"] if checksums else 0)
    # the same numbers however they are saved
    stored = load_file(layouts["upstream"] / "model.safetensors")
    assert report["numbers"] == sum(array.size for array in stored.values())
    assert report["bytes"] == sum(array.nbytes for array in stored.values()) == 4 * report["numbers"]
    assert report["dtypes"] == {"float32": report["numbers"]}
    assert sum(entry["bytes"] for entry in report["files"]) == report["bytes"]
    assert report["config"]["codebook_size"] == 32 and report["config"]["num_quantizers"] == 6
    if layout == "pt":
        found = {entry["name"]: tuple(entry["shape"]) for entry in report["tensors"]}
        assert found == {key: array.shape for key, array in stored.items()}


def test_tables(moshi_flax, layouts: dict):
    result = moshi_flax("inspect", layouts["flax"])
    assert result.code == 0 and result.err == ""
    for words in ("flax_model.safetensors", "codebook_size", "fits FlaxMimiModel", "(32, 12)", "(2 alike)"):
        assert words in result.out
    assert max(map(len, result.out.splitlines())) <= 119


def test_moshi_and_its_parts(moshi_flax):
    report = report_of(moshi_flax("inspect", RANDOM_MODEL, "--json", "--part", "depth_decoder/layers/0"))
    assert report["class"] == "FlaxMoshiForConditionalGeneration" and report["fits"] is True
    assert {entry["name"].rsplit(".", 3)[0] for entry in report["tensors"]} >= {"depth_decoder.layers.0.self_attn"}
    assert all(entry["name"].startswith("depth_decoder.layers.0.") for entry in report["tensors"])
    assert report["config"]["num_codebooks"] == 8 and report["config"]["depth_decoder.hidden_size"] == 32


def test_table_of_a_part(moshi_flax, layouts: dict):
    out = moshi_flax("inspect", layouts["pt"], "--part", "quantizer").out
    assert "embed_sum" in out and "decoder_transformer" not in out
    assert "fits FlaxMimiModel" in out


def test_part_that_is_not_there(moshi_flax):
    result = moshi_flax("inspect", RANDOM_MODEL, "--part", "depth")
    assert result.code == 2 and result.out == ""
    assert "--part" in result.err and "depth_decoder" in result.err


def damaged(layouts: dict, tmp_path: Path, change: Callable[[dict], None]) -> Path:
    """A copy of upstream's checkpoint whose tensors ``change`` has altered."""
    folder = tmp_path / "changed"
    shutil.copytree(layouts["upstream"], folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


DOWN, UP = "downsample.conv.weight", "upsample.conv.weight"


@pytest.mark.parametrize(
    ("change", "kind", "expected"),
    [
        (lambda t: t.pop(DOWN), "missing", ["downsample/conv/kernel"]),
        (lambda t: t.update({"encoder.layers.99.w": np.ones(2)}), "unexpected", ["encoder.layers.99.w"]),
        (
            lambda t: t.update({UP: np.ones((1, 2, 3), np.float32)}),
            "mismatched",
            [{"name": UP, "found": [1, 2, 3], "expected": [32, 1, 4]}],
        ),
        (lambda t: t.update({DOWN: t[DOWN].astype(np.int32)}), "not_floating", [{"name": DOWN, "found": "int32"}]),
    ],
    ids=["missing", "unexpected", "mismatched", "not floating"],
)
def test_misfits(moshi_flax, layouts: dict, tmp_path: Path, change: Callable, kind: str, expected: list):
    folder = damaged(layouts, tmp_path, change)
    report = report_of(moshi_flax("inspect", folder, "--json"), code=1)
    assert report["fits"] is False
    for name in ("missing", "unexpected", "mismatched", "not_floating"):
        assert report[name] == (expected if name == kind else [])
    result = moshi_flax("inspect", folder)
    assert result.code == 1 and "does not fit" in result.out
    entry = expected[0] if isinstance(expected[0], str) else expected[0]["name"]
    assert entry in result.out.split("does not fit")[1]


def test_another_model_fits_nowhere(moshi_flax, layouts: dict, tmp_path: Path):
    folder = damaged(layouts, tmp_path, lambda tensors: (tensors.clear(), tensors.update(a=np.ones(3))))
    report = report_of(moshi_flax("inspect", folder, "--json"), code=1)
    assert report["unexpected"] == ["a"] and "downsample/conv/kernel" in report["missing"]


def test_without_a_config_nothing_is_checked(moshi_flax, tmp_path: Path):
    save_file({"a.b": np.ones((2, 3), np.float16)}, tmp_path / "some.safetensors")
    report = report_of(moshi_flax("inspect", tmp_path / "some.safetensors", "--json"))
    assert report["fits"] is None and report["class"] is None and report["numbers"] == 6
    assert report["tensors"] == [
        {"name": "a.b", "shape": [2, 3], "dtype": "float16", "nbytes": 12, "file": "some.safetensors"}
    ]
    assert "no config.json" in moshi_flax("inspect", tmp_path / "some.safetensors").out


def test_kyutais_layout_is_told(moshi_flax, tmp_path: Path):
    save_file({"depformer_in.0.weight": np.ones((2, 3), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"dim": 4096}')
    report = report_of(moshi_flax("inspect", tmp_path, "--json"))
    assert report["layout"] == "kyutai" and report["fits"] is None


def test_truncated_file(moshi_flax, layouts: dict, tmp_path: Path):
    shutil.copytree(layouts["flax"], tmp_path / "cut")
    weights = tmp_path / "cut" / "flax_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    result = moshi_flax("inspect", tmp_path / "cut")
    assert result.code == 1 and result.err.count("\n") == 1 and "flax_model.safetensors" in result.err


def test_tensors_are_not_read(moshi_flax, tmp_path: Path):
    size = 20_000_000_000
    header = json.dumps({"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "large.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + size)  # a hole, which takes no room
    moshi_flax("inspect", RANDOM_MODEL, "--json")  # imports cost pages as well

    def pages() -> int:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_minflt + usage.ru_majflt

    before = pages()
    report = report_of(moshi_flax("inspect", path, "--json"))
    assert report["bytes"] == size
    assert (pages() - before) * resource.getpagesize() < size / 100


def test_hub_sends_headers_alone(layouts: dict, tmp_path: Path):
    """A server with the endpoints of the Hub, asked by the real client in a process of its own."""
    repositories = {"someone/shards": layouts["flax-shards"], "someone/single": layouts["upstream"]}
    sent: dict[str, int] = {}

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0].strip("/").removeprefix("api/models/")
            folder = repositories["/".join(path.split("/")[:2])]
            rest = "/".join(path.split("/")[2:])
            if rest == "tree/main":
                files = enumerate(sorted(folder.iterdir()))
                sizes = [{"path": f.name, "size": f.stat().st_size, "oid": f"{n:040x}"} for n, f in files]
                return self.reply(200, json.dumps([{"type": "file", **entry} for entry in sizes]).encode())
            file = folder / rest.removeprefix("resolve/main/")
            if not rest.startswith("resolve/main/") or not file.is_file():
                return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            content, span = file.read_bytes(), self.headers.get("Range")
            if span:
                first, last = span.removeprefix("bytes=").split("-")
                content = content[int(first) : int(last) + 1]
            if self.command == "GET":
                sent[f"{folder.name}/{file.name}"] = sent.get(f"{folder.name}/{file.name}", 0) + len(content)
            self.reply(206 if span else 200, content)

        def reply(self, code: int, content: bytes, headers: dict | None = None) -> None:
            self.send_response(code)
            about = {"X-Repo-Commit": "a" * 40, "ETag": f'"{self.path.split("/")[-1]}"', **(headers or {})}
            for name, value in (about | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        place = f"http://127.0.0.1:{server.server_port}"
        here = {"HF_ENDPOINT": place, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        program = textwrap.dedent("""
            import contextlib
            from transformers_moshi_flax.cli import main
            for name in ("shards", "single"):
                with contextlib.suppress(SystemExit):
                    main(["inspect", f"someone/{name}", "--json"])
        """)
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=os.environ | here, capture_output=True, text=True)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    shards, end = json.JSONDecoder().raw_decode(done.stdout)
    single = json.loads(done.stdout[end:])
    assert shards["fits"] is True and shards["layout"] == "flax" and len(shards["files"]) == 5
    assert all(file["checksums"] == file["tensors"] for file in shards["files"])
    assert single["fits"] is True and single["layout"] == "pt" and single["numbers"] == shards["numbers"]
    # the client asks for the first 100 kB of a file, in the hope that the header ends there
    assert sent["upstream/model.safetensors"] == 100_001 < single["bytes"]
    assert sent["upstream/config.json"] > 0
