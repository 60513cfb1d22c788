"""Dialogues on onnxruntime: those of JAX, in a process without it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from tests.random_model import RANDOM_MODEL
from tests.torch_oracle import assert_close
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration, MoshiProcessor
from transformers_moshi_flax.runtime import BadExport, OnnxMoshi
from transformers_moshi_flax.runtime.command import main
from transformers_moshi_flax.runtime.random_numbers import UniformNumbers

BLOCKED = ("jax", "jaxlib", "flax", "transformers", "torch")

SCRIPT = f"""
import sys
sys.modules.update(dict.fromkeys({BLOCKED!r}))
import numpy as np
from transformers_moshi_flax.runtime import OnnxMoshi
model = OnnxMoshi(sys.argv[1], threads=1)
stream = model.streaming(seed=3)
frames = [stream.step(np.zeros((2, 1, model.frame_size), np.float32)) for _ in range(2)]
print(model.text(np.array([frame.text_ids[0] for frame in frames])), frames[1].audio_codes.tolist())
"""


@pytest.fixture(scope="module")
def exported(random_export: Path) -> OnnxMoshi:
    return OnnxMoshi(random_export, threads=1)


def test_the_dialogues_of_jax(exported: OnnxMoshi) -> None:
    """Two that draw: text, codes, logits and sound, with other numbers of sampling and forced tokens on the way."""
    model = FlaxMoshiForConditionalGeneration.from_pretrained(RANDOM_MODEL, dtype=jnp.float32)
    ours = model.streaming(2, temperature=0.9, top_k=40)
    state, theirs = ours.init(jax.random.key(7)), exported.streaming(7, temperature=0.9, top_k=40)
    random = np.random.default_rng(0)
    expected, actual = [], []
    for step in range(24):
        audio = random.uniform(-0.3, 0.3, (2, 1, ours.frame_size)).astype(np.float32)
        forced = {} if step != 5 else {"forced_text_ids": np.array([11, -1])}
        forced |= (
            {}
            if step != 9
            else {"forced_audio_codes": np.array([[3] * ours.num_codebooks, [-1] * ours.num_codebooks])}
        )
        state, frame = ours.step(state, audio, **forced)
        expected.append(frame)
        actual.append(theirs.step(audio, **forced))
    for name in ("text_ids", "audio_codes"):
        one, other = (np.stack([np.asarray(getattr(frame, name)) for frame in side]) for side in (expected, actual))
        np.testing.assert_array_equal(other, one, err_msg=name)
    for name in ("text_logits", "audio"):
        one, other = (np.stack([np.asarray(getattr(frame, name)) for frame in side]) for side in (expected, actual))
        assert_close(other, one, 1e-5, name)
    assert len(np.unique(one)) > 100


def test_the_draws_are_those_of_jax() -> None:
    draws = [
        {"input": "a", "stream": 0, "part": None, "count": 5},
        {"input": "b", "stream": 3, "part": 1, "count": 2},
    ]
    numbers = UniformNumbers(draws, rows=2, seed=2**40 + 5).of_step(4)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.wrap_key_data(jnp.array([2**8, 5], jnp.uint32), impl="threefry2x32"), jnp.arange(2)
    )
    for row in range(2):
        key = jax.random.fold_in(keys[row], 4)
        np.testing.assert_array_equal(numbers["a"][row], jax.random.uniform(jax.random.fold_in(key, 0), (5,)))
        half = jax.random.split(jax.random.fold_in(key, 3))[1]
        np.testing.assert_array_equal(numbers["b"][row], jax.random.uniform(half, (2,)))


def test_without_jax(random_export: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, random_export], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[[" in done.stdout


def test_text_is_that_of_the_tokenizer(exported: OnnxMoshi) -> None:
    tokenizer = MoshiProcessor.from_pretrained(RANDOM_MODEL).tokenizer
    ids = np.arange(4, 40)
    assert exported.text(ids) == tokenizer.decode(ids).strip()
    assert exported.text(np.array([0, 3, -1, 10**6])) == "" and exported.piece(3) == ""
    pieces = [exported.piece(int(number)) for number in ids]
    assert any(piece.startswith(" ") for piece in pieces)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [({"top_p": 0.5}, "without `top_p`"), ({"top_k": 1000}, r"\[1, 64\]"), ({"temperature": 0}, "above 0")],
)
def test_wrong_numbers(exported: OnnxMoshi, numbers: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        exported.streaming(**numbers)


def test_wrong_frames(exported: OnnxMoshi, unchecked_types: None) -> None:
    stream = exported.streaming()
    shape = (2, 1, exported.frame_size)
    for audio in (np.zeros((1, 1, exported.frame_size)), np.full(shape, np.nan)):
        with pytest.raises(ValueError, match="audio"):
            stream.step(audio)
    with pytest.raises(ValueError, match="forced_text_ids"):
        stream.step(np.zeros(shape, np.float32), forced_text_ids=np.array([10**6, 0]))
    with pytest.raises(ValueError, match="use `streaming`"):
        exported.converse(np.zeros(100, np.float32))


@pytest.mark.parametrize("spoiled", ["moshi_step.onnx.data", "mimi_encode_step.onnx", "tokenizer.json"])
def test_tampered_files_are_refused(random_export: Path, tmp_path: Path, spoiled: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(random_export, copy)
    content = bytearray((copy / spoiled).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / spoiled).write_bytes(content)
    with pytest.raises(BadExport, match=spoiled):
        OnnxMoshi(copy)
    (copy / spoiled).unlink()
    with pytest.raises(BadExport, match="missing"):
        OnnxMoshi(copy)


def test_what_is_no_export(random_export: Path, tmp_path: Path) -> None:
    with pytest.raises(BadExport, match=r"no moshi_export\.json"):
        OnnxMoshi(tmp_path)
    manifest = json.loads((random_export / "moshi_export.json").read_text("utf-8"))
    for text, words in (
        ("{", "damaged"),
        ("[]", "no manifest"),
        (json.dumps({**manifest, "format_version": 99}), "format version 99"),
    ):
        (tmp_path / "moshi_export.json").write_text(text)
        with pytest.raises(BadExport, match=words):
            OnnxMoshi(tmp_path)
    with pytest.raises(ValueError, match="NoSuchProvider"):
        OnnxMoshi(random_export, providers=["NoSuchProvider"])


def test_mistakes_on_the_command_line(random_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recording = tmp_path / "user.wav"
    soundfile.write(recording, np.zeros(8_000), 8_000)
    for args, words in (
        ([random_export, recording], "8000 Hz"),
        ([tmp_path, recording], "no moshi_export.json"),
        ([random_export, tmp_path / "missing.wav"], "missing.wav"),
        ([random_export, recording, "-o", tmp_path / "a.mp3"], ".mp3"),
        ([random_export, recording, "-o", recording], "there already"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["converse", *map(str, args)])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and words in err and err.count("\n") == 1
