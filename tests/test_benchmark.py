"""The benchmarks on a tiny model: all sides run, and generate the same text; times are not judged."""

from __future__ import annotations

import gc
import json
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("moshi.models", reason="Kyutai's `moshi` package, one of the sides, is not installed")
from utils.benchmark import first_call, generate, limit, llama, quantized, steadiness, streaming, train, training_sides
from utils.benchmark.checkpoints import write_checkpoint
from utils.benchmark.settings import SIZES, SMALL_MIMI, Setting, Size, settings_of
from utils.benchmark.streams import HANDOVER, HOST

FRAMES = 6
TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 88,
    "num_codebooks": 3,
    "audio_encoder_config": {"model_type": "mimi", "codebook_size": 32, **SMALL_MIMI},
    "depth_decoder_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 88}
    | {"max_position_embeddings": 4, "sliding_window": 4},
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "tiny", Size(TINY, frames=FRAMES))
    monkeypatch.setattr(limit, "read_bandwidth", partial(limit.read_bandwidth, gigabytes=0.01, repeats=1))


def test_sides_agree(capsys: pytest.CaptureFixture) -> None:
    arguments = "--full --sizes tiny --sides ours upstream kyutai --batches 4 --contexts 16 --repeats 2 --threads 1"
    report = generate.measure(generate.parse_arguments(arguments.split()))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("|")]
    header = next(line for line in lines if "side" in line)
    runs = [
        dict(reversed([*zip(header, line, strict=True)]))
        for line in lines
        if line[0] == "tiny" and len(line) == len(header)
    ]
    sides = [run["side"].split(":")[0] for run in runs]
    assert sides == 2 * ["this library", "upstream PyTorch", "Kyutai's moshi", "limit"]
    assert [run["decoding"] for run in runs] == 4 * ["greedy"] + 4 * ["sampling"]
    assert [run["same text, frames"] for run in runs[:4]] == ["", str(FRAMES), str(FRAMES), ""]
    assert all(0 < float(run["ms a frame, min"]) <= float(run["median"]) for run in runs if run["runs"])
    # two programs of each setting
    assert sum(line[1] in ("start", "advance") for line in lines) == 4


def test_widths_of_weights() -> None:
    arguments = "--size tiny --widths bfloat16 int8 --repeats 2 --threads 1"
    report = quantized.measure(quantized.parse_arguments(arguments.split()))
    _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if "| 0." in line]
    assert [row[0] for row in rows] == ["bfloat16", "int8"]
    assert float(rows[0][5]) == 0.5 and 0.25 < float(rows[1][5]) < 0.4
    assert all(0 < float(error) < 0.05 for row in rows for error in row[-2:])


def test_what_a_frame_reads(tmp_path: Path) -> None:
    checkpoint = write_checkpoint("tiny", 0, tmp_path)
    backbone = 2 * (4 * 16 * 16 + 16 * 88 + 44 * 16 + 2 * 16) + 16 + 16 * 50
    depth = 3 * (4 * 16 * 16 + 16 * 88 + 44 * 16) + 2 * 16 + 3 * (16 * 16 + 16 * 32)
    assert checkpoint.weight_bytes == 4 * (backbone + depth)
    # keys and values of 2 layers of 16; the first timed frame reads 16 frames, the last one 21
    assert checkpoint.cache_bytes(Setting("tiny", batch=4)) == 2 * 4 * 4 * 2 * 16 * 18.5
    # no more than the window
    assert checkpoint.cache_bytes(Setting("tiny", context=3000)) == 2 * 4 * 2 * 16 * 3000


@pytest.mark.parametrize("side", ["ours", "upstream"])
def test_first_call(side: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_checkpoint("tiny", 0, tmp_path)
    capsys.readouterr()
    first_call.main(side, str(tmp_path), 1, time.time())
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < report["until loaded"] < report["seconds"]
    assert report["peak_bytes"] > 1e8
    if side == "ours":
        assert report["XLA"] > 0 and report["tracing"] > 0 and report["lowering"] > 0


def test_grid() -> None:
    assert len(settings_of("523M", full=True)) == 3 * 4 * 2 + 1
    assert set(settings_of("523M", full=False)) <= set(settings_of("523M", full=True))
    assert settings_of("68M", full=False) == [Setting("68M")]


def test_arguments(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        generate.parse_arguments(["--threads", "9999"])
    assert "--threads must be at most" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        streaming.parse_arguments(["--steps", "1"])
    assert "--steps must be at least 2, but is 1" in capsys.readouterr().err


def test_streaming(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(steadiness, "WARM_UP", 2)
    monkeypatch.setattr(steadiness, "RESETS", 5)
    arguments = "--sizes tiny --batches 1 --rounds 2 --steps 3 --seconds 1000 --paced 2 --endurance 20 --threads 1"
    report = streaming.measure(streaming.parse_arguments(arguments.split()))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("|")]
    ours, in_parts, kyutai = "this library", "this library, in parts", "Kyutai's moshi"
    parts = ["Mimi encode", "Mimi decode", "encode + decode"]
    codec = [line for line in lines if line[0] == "1"]
    assert [line[1:3] for line in codec] == [[side, part] for side in (ours, kyutai) for part in parts]
    dialogue = [line for line in lines if line[:2] == ["tiny", "1"]]
    assert [line[2:4] for line in dialogue] == [
        *([ours, part] for part in ("step", HOST, HANDOVER)),
        *([in_parts, part] for part in ("Mimi encode", "Moshi", "Mimi decode")),
        *([kyutai, part] for part in ("Mimi encode", "Moshi", "Mimi decode", "step")),
    ]
    for counted, p50, p95, p99, most in [line[-7:-2] for line in codec + dialogue]:
        assert counted == "6"
        assert 0 < float(p50) <= float(p95) <= float(p99) <= float(most)
    assert all(float(line[-1]) > 0 for line in codec + dialogue if kyutai in line)
    assert [line[1:3] for line in lines if line[0] == "tiny" and len(line) == 9] == [[ours, "2"], [kyutai, "2"]]
    long = {line[0]: line[1] for line in lines if len(line) == 2}
    assert long["compilations"] == "0"
    assert len(set(long["JAX's arrays, number"].split(", "))) == 1
    assert "Missing: rustymimi, tiny: " in report


def test_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)

    def pass_time(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr(steadiness, "time", SimpleNamespace(perf_counter=lambda: clock.now, sleep=pass_time))
    durations = iter([0.25, 2.5, 0.25, 0.25, 0.25, 0.75])
    paced = steadiness.pace(lambda: pass_time(next(durations)), 6, period=1.0)
    # frame 1 is ready after 2.5 s; frames 2 and 3 wait for it: 1.75 s and 1.0 s
    assert paced.misses == 2
    assert paced.latency.most == 2500
    assert paced.latency.p50 == 1000
    assert clock.now == 5.75


def test_collections() -> None:
    with steadiness.collections() as collected:
        gc.collect(1)
    assert [generation for generation, _ in collected if generation == 1] == [1]
    assert all(seconds > 0 for _, seconds in collected)


def test_training(tmp_path: Path) -> None:
    train.write_weights("tiny", 0, tmp_path)
    sides = ("ours", "upstream")
    results = {side: [training_sides.measure_side(side, str(tmp_path), 2, FRAMES, 2)] for side in sides}
    ours, upstream = (results[side][0] for side in sides)
    assert ours.text_loss == pytest.approx(upstream.text_loss, rel=1e-5)
    assert len(ours.seconds) == len(ours.processor_seconds) == 2 and ours.step_bytes > 0
    header, _, *rows = train.speeds(results, 2 * FRAMES).splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["this library", "upstream PyTorch"]
    assert all(row.count("|") == header.count("|") for row in rows)


def test_language_models() -> None:
    arguments = "--size tiny --batches 2 --prompt 5 --new-tokens 4 --prefill 9 --repeats 2 --threads 1"
    report = llama.measure(llama.parse_arguments(arguments.split()))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if "| 2 |" in line]
    whats, sides = ("generation", "prefill"), ("this library", "upstream PyTorch")
    assert [(row[0], row[2]) for row in rows] == [(what, side) for what in whats for side in sides]
    assert [row[-1] for row in rows] == ["4 of 4"] * 2 + ["1 of 1"] * 2
    for row in rows:
        assert row[3] == "2" and 0 < float(row[4]) <= float(row[5]) and float(row[6]) > 0
        assert row[2] == "upstream PyTorch" or row[7:9] == ["1.00", "1.00"]
