"""``moshi-flax generate`` with the embedded checkpoint: what it writes, and what its options do."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from transformers import AutoTokenizer

from tests.configs import tiny_moshi_config
from tests.random_model import RANDOM_MODEL
from transformers_moshi_flax.cli import checkpoints, generate
from transformers_moshi_flax.cli.audio import read_audio, write_audio
from transformers_moshi_flax.cli.checkpoints import Dtype
from transformers_moshi_flax.cli.generate import Speaker
from transformers_moshi_flax.cli.options import sampling_options

FRAME = 1920
CODEBOOKS = 8
# two sets of options, so that two programs are compiled for all tests of this file
GREEDY = ("--max-new-frames", 6, "--temperature", 0, "--depth-temperature", 0)
SAMPLING = ("--max-new-frames", 6, "--temperature", 0.9, "--top-k", 50, "--top-p", 0.95)
SAMPLING += ("--depth-temperature", 1.1, "--depth-top-k", 100)


@pytest.fixture(scope="module", autouse=True)
def one_model() -> None:
    """Load the embedded model once: its compiled programs then serve every test of this file."""
    import transformers_moshi_flax

    real = transformers_moshi_flax.FlaxMoshiForConditionalGeneration
    loaded = {}

    class Loaded:
        @classmethod
        def from_pretrained(cls, source: str, dtype=None):
            key = (source, dtype)
            if key not in loaded:
                loaded[key] = real.from_pretrained(source, dtype=dtype)
            return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers_moshi_flax, "FlaxMoshiForConditionalGeneration", Loaded, raising=False)
        yield


def read_json(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def test_writes_speech_and_transcript(moshi_flax, speech: Path, tmp_path: Path):
    output = tmp_path / "made" / "reply.wav"
    result = moshi_flax("generate", "--user-audio", speech, "--output", output, *GREEDY)
    assert result.code == 0, result.err
    assert checkpoints.NOTICE in result.err
    record = read_json(output.with_suffix(".json"))
    assert result.out.strip() == record["text"]
    assert len(record["text_ids"]) == 6
    codes = np.array(record["audio_codes"])
    assert codes.shape == (CODEBOOKS, 5)
    assert codes.min() >= 0 and codes.max() < 128
    audio, rate = soundfile.read(output)
    assert rate == 24_000 and len(audio) == 5 * FRAME
    assert record["seconds"] == pytest.approx(5 * 0.08)
    assert record["frames_per_second"] > 0
    assert 1e-3 < np.sqrt(np.mean(audio**2)) < 0.5


@pytest.mark.parametrize("options", [SAMPLING, GREEDY], ids=["sampling", "greedy"])
def test_seed_decides_unless_greedy(moshi_flax, speech: Path, tmp_path: Path, options: tuple):
    records = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        output = tmp_path / f"{name}.wav"
        result = moshi_flax("generate", "--user-audio", speech, "--output", output, "--seed", seed, *options)
        assert result.code == 0, result.err
        records.append(read_json(output.with_suffix(".json")))
    assert records[0]["text_ids"] == records[1]["text_ids"]
    assert records[0]["audio_codes"] == records[1]["audio_codes"]
    assert (records[0]["audio_codes"] == records[2]["audio_codes"]) == (options is GREEDY)


def test_text_prompt_too_long(moshi_flax, speech: Path, tmp_path: Path):
    args = (
        "generate",
        "--user-audio",
        speech,
        "--output",
        tmp_path / "reply.wav",
        "--text-prompt",
        "far too long " * 9,
    )
    result = moshi_flax(*args)
    assert result.code == 2
    assert result.err.count("\n") == 1 and "--text-prompt" in result.err and "14 frames" in result.err
    assert not (tmp_path / "reply.wav").exists()


def test_text_prompt_of_unknown_characters(moshi_flax, speech: Path, tmp_path: Path):
    args = ("generate", "--user-audio", speech, "--output", tmp_path / "reply.wav", "--text-prompt", "モシ")
    result = moshi_flax(*args)
    assert result.code == 2 and "--text-prompt" in result.err


def test_text_prompt_ends_the_prompt():
    tokenizer = AutoTokenizer.from_pretrained(RANDOM_MODEL)
    ids = Speaker("", None, tokenizer).prompt_ids(20, "Hello, I am")
    pieces = [token for token in ids[0] if token != 3]
    assert ids.shape == (1, 20)
    assert tokenizer.decode(pieces).strip() == "Hello, I am"
    assert ids[0, : 20 - len(pieces)].tolist() == [3] * (20 - len(pieces))


def test_text_prompt_alone_is_said_to_silence(moshi_flax, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer, heard = AutoTokenizer.from_pretrained(RANDOM_MODEL), []
    speaker = Speaker("", SimpleNamespace(config=tiny_moshi_config()), tokenizer)
    monkeypatch.setattr(Speaker, "load", lambda *_: speaker)
    monkeypatch.setattr(generate, "_turn", lambda speaker, samples, *rest: heard.append(samples))
    result = moshi_flax("generate", "--text-prompt", "Hello", "--output", tmp_path / "reply.wav")
    (samples,) = heard
    assert result.code == 0 and "the user is silent" in result.err
    assert samples.size == 16 * len(tokenizer.encode("Hello", add_special_tokens=False)) and not samples.any()
    assert speaker.prompt_ids(samples.size // 16, "Hello")[0, 0] != 3


def test_refusal_of_the_model_is_one_line(moshi_flax, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise ValueError("input_ids has 9 frames,\n  give 8")

    monkeypatch.setattr(Speaker.load(str(RANDOM_MODEL), None).model, "generate", refuse)
    result = moshi_flax("generate", "--user-audio", speech, "--output", tmp_path / "reply.wav")
    assert result.code == 2
    assert result.err == "moshi-flax: error: cannot generate: input_ids has 9 frames, give 8\n"


def test_interactive(moshi_flax, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = iter(["", str(speech), "missing.wav", "Hello", "quit", "not reached"])
    monkeypatch.setattr("builtins.input", lambda: next(lines))
    output = tmp_path / "reply.wav"
    result = moshi_flax("generate", "--user-audio", speech, "--output", output, "--interactive", *SAMPLING)
    assert result.code == 0, result.err
    assert sorted(path.name for path in tmp_path.glob("reply*.wav")) == ["reply-1.wav", "reply-3.wav"]
    assert read_json(tmp_path / "reply-3.json")["text_prompt"] == "Hello"
    assert "missing.wav" in result.err


def test_interactive_hears_silence_until_there_is_audio(
    moshi_flax, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lines, heard = iter(["Hello", str(speech), "Hello", "quit"]), []
    monkeypatch.setattr("builtins.input", lambda: next(lines))

    def turn(speaker, samples, prompt, *rest) -> bool:
        heard.append((prompt, samples))
        return True

    monkeypatch.setattr(generate, "_turn", turn)
    result = moshi_flax("generate", "--output", tmp_path / "reply.wav", "--interactive")
    assert result.code == 0 and "the user is silent while Moshi says the text prompt" in result.err
    assert [prompt for prompt, _ in heard] == ["Hello", None, "Hello"]
    assert not heard[0][1].any() and heard[1][1].any() and heard[2][1] is heard[1][1]


def test_end_of_input_ends_interactive(moshi_flax, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    result = moshi_flax("generate", "--output", tmp_path / "reply.wav", "--interactive")
    assert result.code == 0, result.err
    assert list(tmp_path.glob("reply*")) == []


@pytest.mark.parametrize(("args", "code"), [(["generate", "--help"], 0), (["generate", "--top-p", "2"], 2)])
def test_as_a_program(tmp_path: Path, args: list[str], code: int):
    # a whole run in a process of its own is in tests/test_package.py
    program = "from transformers_moshi_flax.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program, *args], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert ("--user-audio" in done.stdout) == (code == 0)


@pytest.mark.parametrize("dtype", list(Dtype))
def test_dtype(dtype: Dtype):
    model = Speaker.load(str(RANDOM_MODEL), dtype).model
    assert jnp.dtype(model.dtype).name == dtype.value
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {dtype.value}


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_audio_written_is_audio_read(tmp_path: Path, suffix: str):
    samples = np.random.default_rng(0).uniform(-1.2, 1.2, 1000).astype(np.float32)
    path = tmp_path / f"audio{suffix}"
    write_audio(path, samples, 24_000)
    # 16 bits, clipped rather than wrapped
    assert np.abs(read_audio(path, 24_000) - np.clip(samples, -1, 1)).max() <= 2**-15


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None,) * 5, {}),
        ((0.5, None, None, None, None), {"do_sample": True, "temperature": 0.5}),
        ((0.0, None, None, None, None), {"do_sample": False}),
        ((None, 4, 0.9, None, None), {"do_sample": True, "top_k": 4, "top_p": 0.9}),
        ((None, None, None, 0.0, None), {"depth_decoder_do_sample": False}),
        (
            (None, None, None, 0.7, 3),
            {"depth_decoder_do_sample": True, "depth_decoder_temperature": 0.7, "depth_decoder_top_k": 3},
        ),
    ],
)
def test_sampling_options(given: tuple, expected: dict):
    assert sampling_options(*given) == expected


@pytest.mark.parametrize("rate", [8_000, 22_050, 24_000, 44_100, 48_000])
@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_read_audio_resamples_to_mono(tmp_path: Path, rate: int, suffix: str):
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    path = tmp_path / f"tone{suffix}"
    soundfile.write(path, np.stack([0.5 * tone, 0.1 * tone], axis=1), rate)
    samples = read_audio(path, 24_000)
    assert samples.dtype == np.float32 and abs(len(samples) - 24_000) <= 1
    expected = 0.3 * np.sin(2 * np.pi * 440 * np.arange(len(samples)) / 24_000)
    assert np.abs(samples - expected)[500:-500].max() < 1e-3
