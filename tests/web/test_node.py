"""The module for browsers and Node, in a real Node on the WebAssembly of ONNX Runtime: the dialogues of Python's."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.torch_oracle import assert_close
from transformers_moshi_flax import __version__
from transformers_moshi_flax.export.web import WEB
from transformers_moshi_flax.runtime import OnnxMoshi
from transformers_moshi_flax.runtime.random_numbers import UniformNumbers

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="there is no Node")
MODULES = Path(str(WEB)) / "js"

Dialogues = Callable[..., dict[str, Any]]


@pytest.fixture
def dialogues(runtime_for_web: Path, tmp_path: Path) -> Dialogues:
    """Holds dialogues in Node, one for each dictionary of options."""

    def hold(export: Path, audio: np.ndarray, *options: dict[str, Any]) -> dict[str, Any]:
        recording = tmp_path / "audio.raw"
        recording.write_bytes(audio.astype(np.float32).tobytes())
        script = Path(__file__).with_name("dialogue.mjs")
        module = MODULES / "onnx_moshi.js"
        command = [NODE, script, runtime_for_web / "ort.wasm.min.mjs", module, export, recording, json.dumps(options)]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return hold


def audio_of(model: OnnxMoshi, frames: int) -> np.ndarray:
    shape = (frames, model.batch_size, model.channels, model.frame_size)
    return np.random.default_rng(0).uniform(-0.3, 0.3, shape).astype(np.float32)


def assert_the_same(frames: list[dict[str, Any]], expected: list[Any], model: OnnxMoshi) -> None:
    assert len(frames) == len(expected)
    ids = np.stack([frame.text_ids for frame in expected])
    codes = np.stack([frame.audio_codes for frame in expected])
    np.testing.assert_array_equal([frame["textIds"] for frame in frames], ids)
    np.testing.assert_array_equal([frame["audioCodes"] for frame in frames], codes.reshape(len(codes), -1))
    assert [frame["text"] for frame in frames] == [[model.piece(int(number)) for number in row] for row in ids]
    assert len(np.unique(codes)) > 10


def test_dialogues_that_draw(dialogues: Dialogues, random_export: Path) -> None:
    """Two of them: text, codes and sound, with other numbers of sampling and forced tokens on the way."""
    model = OnnxMoshi(random_export, threads=1)
    audio, seed, numbers = audio_of(model, 24), 2**40 + 5, {"temperature": 0.9, "top_k": 40}
    stream = model.streaming(seed, **numbers)
    codes = np.repeat([[3], [-1]], model.num_codebooks, axis=1)
    expected = []
    for step, frame in enumerate(audio):
        forced = {"forced_text_ids": np.array([11, -1])} if step == 5 else {}
        forced |= {"forced_audio_codes": codes} if step == 9 else {}
        expected.append(stream.step(frame, **forced))
    forced = {5: {"textIds": [11, -1]}, 9: {"audioCodes": codes.ravel().tolist()}}
    made = dialogues(random_export, audio, {"seed": seed, "numbers": numbers, "forced": forced})
    (said,) = made["dialogues"]
    assert_the_same(said["frames"], expected, model)
    sound = [np.frombuffer(base64.b64decode(frame["audio"]), np.float32) for frame in said["frames"]]
    assert_close(np.stack(sound), np.stack([frame.audio.ravel() for frame in expected]), 1e-5, "audio")
    total = sum(file["bytes"] for file in model.manifest["files"].values())
    assert made["progress"] == [total, total]


def test_a_greedy_dialogue(dialogues: Dialogues, greedy_export: Path) -> None:
    model = OnnxMoshi(greedy_export, threads=1)
    audio = audio_of(model, 24)
    stream = model.streaming()
    expected = [stream.step(frame) for frame in audio]
    for said in dialogues(greedy_export, audio, {}, {"seed": 1})["dialogues"]:
        assert_the_same(said["frames"], expected, model)


def test_the_draws_are_those_of_python() -> None:
    draws = [
        {"input": "a", "stream": 0, "part": None, "count": 5},
        {"input": "b", "stream": 3, "part": 1, "count": 2},
    ]
    script = f"""
        import {{ UniformNumbers }} from {json.dumps((MODULES / "random_numbers.js").as_uri())};
        const numbers = new UniformNumbers({json.dumps(draws)}, 2, {2**40 + 2**31 + 5}).ofStep(4);
        console.log(JSON.stringify(numbers, (_, value) => (ArrayBuffer.isView(value) ? [...value] : value)));
    """
    command = [str(NODE), "--input-type=module", "--eval", script]
    made = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    expected = UniformNumbers(draws, 2, 2**40 + 2**31 + 5).of_step(4)
    assert {name: np.float32(numbers).tolist() for name, numbers in made.items()} == {
        name: numbers.ravel().tolist() for name, numbers in expected.items()
    }


def test_characters_of_several_bytes() -> None:
    pieces = ["<unk>", "a", "b", "<pad>", "<0xE2>", "<0x82>", "<0xAC>", "▁c", "<s>"]
    added = [{"id": 8, "content": "<s>", "special": True}]
    for vocabulary in ([[piece, 0] for piece in pieces], {piece: number for number, piece in enumerate(pieces)}):
        script = f"""
            import {{ Tokenizer }} from {json.dumps((MODULES / "tokenizer.js").as_uri())};
            const described = {json.dumps({"model": {"vocab": vocabulary}, "added_tokens": added})};
            const words = new Tokenizer(described).words();
            console.log(JSON.stringify([4, 5, 6, 3, 7, 4, 1, 0, 8, -1, 99].map((id) => words.put(id))));
        """
        command = [str(NODE), "--input-type=module", "--eval", script]
        made = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert made == ["", "", "€", "", " c", "", "a", "", "", "", ""]


@pytest.mark.parametrize("spoiled", ["moshi_step.onnx.data", "mimi_encode_step.onnx", "tokenizer.json"])
def test_tampered_files_are_refused(dialogues: Dialogues, random_export: Path, tmp_path: Path, spoiled: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(random_export, copy)
    content = bytearray((copy / spoiled).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / spoiled).write_bytes(content)
    refused = dialogues(copy, np.zeros(0))["refused"]
    assert refused.startswith(f"BadExport: {spoiled} is damaged")


def test_what_is_wrong_is_said(dialogues: Dialogues, random_export: Path, tmp_path: Path) -> None:
    model = OnnxMoshi(random_export, threads=1)
    audio = audio_of(model, 1)
    mistakes = (
        ({"numbers": {"top_p": 0.5}}, "without `top_p`"),
        ({"numbers": {"top_k": 1000}}, "[1, 64]"),
        ({"numbers": {"temperature": 0}}, "above 0"),
        ({"seed": -1}, "`seed`"),
        ({"forced": [{"textIds": [10**6, 0]}]}, "`textIds`"),
    )
    made = dialogues(random_export, audio, *(options for options, _ in mistakes))["dialogues"]
    for said, (_, words) in zip(made, mistakes, strict=True):
        assert words in said["refused"]
    audio[0, 0, 0, 5] = np.nan
    assert "finite" in dialogues(random_export, audio, {})["dialogues"][0]["refused"]
    manifest = json.loads((random_export / "moshi_export.json").read_text("utf-8"))
    for text, words in (
        (None, "BadExport: The export lacks moshi_export.json"),
        ("{", "damaged"),
        ("[]", "no manifest"),
        (json.dumps({**manifest, "format_version": 99}), "format version 99"),
        (json.dumps({**manifest, "files": {}}), "no file mimi_decode_step.onnx"),
    ):
        if text is not None:
            (tmp_path / "moshi_export.json").write_text(text)
        assert words in dialogues(tmp_path, np.zeros(0))["refused"]


def test_the_package_for_npm() -> None:
    described = json.loads((MODULES / "package.json").read_text("utf-8"))
    assert described["version"] == __version__ and described["license"] == "Apache-2.0"
    assert (MODULES / described["exports"]).is_file()
