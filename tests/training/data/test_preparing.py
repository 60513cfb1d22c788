"""Recordings become the codes of the whole recording and their words; what cannot be used is skipped and reported; and
an interruption at any point costs a shard at most."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.configs import tiny_mimi_config, tiny_moshi_config
from tests.random_model import RANDOM_MODEL
from tests.training.data.test_prepared import assert_same
from transformers_moshi_flax import FlaxMimiModel, audio_files
from transformers_moshi_flax.checkpoints import writing
from transformers_moshi_flax.checkpoints.formats import open_safetensors
from transformers_moshi_flax.training.data import preparing
from transformers_moshi_flax.training.data.prepared import Conversation, open_dataset
from transformers_moshi_flax.training.data.preparing import NoMainSpeaker, Report, SettingsDiffer, prepare
from transformers_moshi_flax.training.data.recordings import BadRecording, read_blocks

RATE, FRAME, CODEBOOKS, SLOTS = 24_000, 16, 4, 3
BLOCK = 25 * FRAME
PAD, YOU, TO = 3, 17, 18
CONFIG = tiny_moshi_config(vocab_size=270)


@pytest.fixture(scope="module")
def mimi(tmp_path_factory: pytest.TempPathFactory) -> FlaxMimiModel:
    """With weights that hide nothing."""
    from transformers import MimiModel

    from tests.torch_oracle import randomize

    folder = tmp_path_factory.mktemp("mimi")
    randomize(MimiModel(tiny_mimi_config())).save_pretrained(folder)
    return FlaxMimiModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(RANDOM_MODEL)


@pytest.fixture
def run(mimi: FlaxMimiModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Callable[..., Report]:
    """``prepare`` with the tiny models, always of the same batch, so that one program serves all tests."""

    def call(out: Path = tmp_path / "out", manifest: Path = tmp_path / "all.jsonl", **options: Any) -> Report:
        options = {"config": CONFIG, "recordings_per_shard": 2, "workers": 2, **options}
        return prepare(manifest, out, mimi=mimi, tokenizer=tokenizer, batch_size=SLOTS, **options)

    return call


def words_at(*places: tuple[str, float, str]) -> dict[str, Any]:
    return {"alignments": [[word, [start, start + 0.001], speaker] for word, start, speaker in places]}


def record(folder: Path, samples: dict[str, int], rate: int = RATE) -> dict[str, np.ndarray]:
    """Recordings of these lengths in stereo noise, with two words each, and their manifest."""
    rng = np.random.default_rng(0)
    made = {}
    for name, length in samples.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        made[name] = rng.uniform(-0.5, 0.5, (length, 2)).astype(np.float32)
        soundfile.write(path, made[name], rate, subtype="FLOAT")
        words = words_at(("you", 0.0, "SPEAKER_MAIN"), ("to", 0.0, "SPEAKER_2"))
        path.with_suffix(".json").write_text(json.dumps(words))
    (folder / "all.jsonl").write_text("".join(json.dumps({"path": name, "duration": 1.0}) + "\n" for name in samples))
    return made


LENGTHS = {
    "a.wav": 3 * BLOCK + 5,
    "b/b.wav": 1,
    "c.wav": BLOCK,
    "d.wav": BLOCK + 1,
    "e.wav": FRAME,
    "f.wav": 5 * BLOCK - 7,
    "g.wav": 40,
}


def contents(out: Path) -> dict[str, Any]:
    """What is in a folder but for the report; safetensors writes the metadata of a file in any order."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".safetensors"}
    del found["report.json"]
    for path in out.glob("*.safetensors"):
        file = open_safetensors(path)
        found[path.name] = file.metadata, {key: (array.dtype, array.tolist()) for key, array in file.items()}
    return found


def test_codes_are_those_of_the_whole_recording(
    run: Callable[..., Report], mimi: FlaxMimiModel, tmp_path: Path
) -> None:
    made = record(tmp_path, LENGTHS)
    done = []
    report = run(advance=done.append)
    assert sum(done) == len(LENGTHS)
    dataset = open_dataset(tmp_path / "out")
    assert dataset.ids == list(LENGTHS) and report.conversations == len(LENGTHS) and not report.skipped
    for conversation, samples in zip(dataset, made.values()):
        frames = -(-len(samples) // FRAME)
        assert conversation.frames == frames
        # one length for all, so that one program is compiled: later samples change nothing
        audio = np.zeros((2, 1, 5 * BLOCK), np.float32)
        audio[:, 0, : len(samples)] = samples.T
        codes = np.asarray(mimi.encode(audio, num_quantizers=CODEBOOKS).audio_codes)[..., :frames]
        text = np.full(frames, PAD)
        text[0] = YOU
        user = np.full(frames, PAD)
        user[0] = TO
        assert_same(
            conversation,
            {
                "moshi_text_tokens": text,
                "user_text_tokens": user,
                "moshi_audio_tokens": codes[0],
                "user_audio_tokens": codes[1],
            },
        )
        assert conversation.moshi_audio_tokens.dtype == np.int16
    assert report.frames == int(dataset.lengths.sum())


def test_what_cannot_be_used_is_reported(
    run: Callable[..., Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, {f"{name}.wav": 200 for name in "abcdefghijklpqr"})
    long = f"{'m' * 300}.wav"
    with (tmp_path / "all.jsonl").open("a") as file:
        file.writelines(json.dumps({"path": path}) + "\n" for path in (long, "n.raw", "o\0.wav", "."))
    (tmp_path / "n.raw").write_bytes(bytes(800))
    (tmp_path / "a.wav").unlink()
    (tmp_path / "b.wav").write_bytes(b"no audio")
    soundfile.write(tmp_path / "c.wav", np.zeros(200), RATE)
    soundfile.write(tmp_path / "d.wav", np.zeros((0, 2)), RATE)
    # behind the first block, when the slot has begun
    monkeypatch.setattr(audio_files, "BLOCK_SAMPLES", 1000)
    broken = np.zeros((1200, 2), np.float32)
    broken[1100, 1] = np.nan
    soundfile.write(tmp_path / "e.wav", broken, RATE, subtype="FLOAT")
    loud = np.full((200, 2), 3e38, np.float32)
    soundfile.write(tmp_path / "p.wav", loud, RATE, subtype="FLOAT")
    # resampled, they would be infinite
    soundfile.write(tmp_path / "q.wav", loud * [[-1, 1]], RATE * 2 // 3, subtype="FLOAT")
    soundfile.write(tmp_path / "r.wav", loud / 3e37, RATE, subtype="FLOAT")  # as loud as 10: that can be
    (tmp_path / "f.json").unlink()
    (tmp_path / "g.json").write_text("{")
    (tmp_path / "h.json").write_text('{"word_segments": [], "segments": []}')
    (tmp_path / "i.json").write_text('{"alignments": [["you", [0, 1]]]}')
    strange = words_at(("you", 1.0, "SPEAKER_MAIN"), ("\u4e2d", 0.0, "SPEAKER_MAIN"), ("you to you", 0.008, "x"))
    strange["alignments"] += [["2016,", [None, None], "x"], ["or", [0.1, 0.2], None], ["", [0.1, 0.2], "x"]]
    (tmp_path / "k.json").write_text(json.dumps(strange))
    (tmp_path / "l.json").write_text('{"alignments": []}')
    report = run()
    reasons = {entry["path"]: entry["reason"] for entry in report.skipped}
    expected = {
        "a.wav": "no such file",
        "b.wav": "cannot be read as audio",
        "c.wav": "has 1 channels",
        "d.wav": "holds no samples",
        "e.wav": "NaN or infinite",
        "f.wav": "no f.json",
        "g.wav": "g.json: ",
        "h.wav": "has no `alignments`, but segments, word_segments; give them as a list of [word, [",
        "i.wav": "all are words without a speaker, the first is ['you', [0, 1]]",
        long: "File name too long",
        "n.raw": "does not say its rate",
        "p.wav": "samples of up to 3e+38, but must be in [-1, 1]: scale them",
        "q.wav": "samples of up to 3e+38",
        "o\0.wav": "no such file",
        ".": "no such file",
    }
    assert reasons.keys() == expected.keys()
    for path, reason in expected.items():
        assert reason in reasons[path], path
    assert report.remarks == {
        "k.wav": {
            "words without times": 1,
            "words without a speaker": 1,
            "entries that are no words": 1,
            "words outside of the recording, or that end before they start": 1,
            "pieces after its end": 2,
            "pieces unknown to the tokenizer": report.remarks["k.wav"]["pieces unknown to the tokenizer"],
        }
    }
    assert json.loads((tmp_path / "out" / "report.json").read_text())["skipped"] == report.skipped
    assert report.without_moshi == {"l.wav": {}}
    # "you" waits for the character of before it, and the other "you to you" has no room
    assert report.speakers == {"SPEAKER_MAIN": 4, "SPEAKER_2": 2, "x": 1}
    dataset = open_dataset(tmp_path / "out")
    assert dataset.ids == ["j.wav", "k.wav", "l.wav", "r.wav"]
    # nobody wrote down what the user says
    assert dataset.without_user_text == ["l.wav"]
    assert (dataset[2].moshi_text_tokens == PAD).all()


def test_late_text_is_counted(run: Callable[..., Report], tmp_path: Path) -> None:
    """Of the recordings alone and together, also where they were prepared before."""
    record(tmp_path, {"a.wav": 40 * FRAME, "b.wav": 40 * FRAME, "c.wav": 40 * FRAME})
    rate = RATE / FRAME
    in_time = [["you", [frame / rate, frame / rate], "SPEAKER_MAIN"] for frame in range(8)]
    at_once = [["you", [0.0, 0.1], "SPEAKER_MAIN"] for _ in range(16)]
    of_the_user = [["you", [0.0, 0.1], "x"], ["to", [0.0, 0.1], "x"]]
    for name, words in (("a", in_time), ("b", at_once), ("c", in_time + of_the_user)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"alignments": words}))
    for _ in range(2):
        report = run()
        assert report.lags == {
            "b.wav": {"pieces": 16, "late_pieces": 15, "largest_lag": 15 / rate},
            "c.wav": {"pieces": 10, "late_pieces": 1, "largest_lag": 1 / rate},
        }
        assert (report.pieces, report.late_pieces, report.largest_lag) == (34, 16, 15 / rate)
        told = json.loads((tmp_path / "out" / "report.json").read_text())
        assert (told["lags"], told["late_pieces"], told["largest_lag"]) == (report.lags, 16, 15 / rate)


@pytest.mark.filterwarnings("ignore:.*was cut off")
def test_missing_audio_is_counted(run: Callable[..., Report], tmp_path: Path) -> None:
    """Also where a recording was prepared before."""
    record(tmp_path, {"a.wav": 40 * FRAME, "b.wav": 40 * FRAME})
    content = (tmp_path / "b.wav").read_bytes()
    (tmp_path / "b.wav").write_bytes(content[: len(content) // 2])
    for _ in range(2):
        report = run()
        assert report.conversations == 2 and list(report.incomplete) == ["b.wav"]
        (problem,) = report.incomplete["b.wav"]
        assert problem.startswith("ends after ") and "it was cut off" in problem
        assert json.loads((tmp_path / "out" / "report.json").read_text())["incomplete"] == report.incomplete


@pytest.mark.parametrize("word", ["you", "to", "Hello,", "xyz"])
def test_words_without_a_space_before_them(tokenizer: PreTrainedTokenizerBase, word: str) -> None:
    fields = (tokenizer, 12.5, 270, 2048, PAD, 0, "SPEAKER_MAIN")
    spaced, bare = (
        tokenizer.convert_ids_to_tokens(preparing._Text(*fields, whitespace)._encode(word))
        for whitespace in (True, False)
    )
    assert "".join(spaced) == f"▁{word}" and "".join(bare) == word


def test_whitespace_is_a_setting(run: Callable[..., Report], tmp_path: Path) -> None:
    record(tmp_path, {"a.wav": 200})
    run()
    with pytest.raises(SettingsDiffer, match="whitespace_before_word"):
        run(whitespace_before_word=False)


def test_recordings_without_a_word_of_moshis(run: Callable[..., Report], tmp_path: Path) -> None:
    """Of all: told before any work, with the labels that there are. Of some: in the report."""
    record(tmp_path, {"a.wav": 40, "b.wav": 40, "c.wav": 40})
    (tmp_path / "a.json").write_text('{"alignments": []}')
    (tmp_path / "b.json").write_text(json.dumps(words_at(("you", 0.0, "SPEAKER_00"), ("to", 0.0, "SPEAKER_01"))))
    (tmp_path / "c.json").write_text(json.dumps(words_at(("you", 0.0, "SPEAKER_01"), ("to", 0.0, "SPEAKER_02"))))
    message = (
        r"no word of the recordings is of 'SPEAKER_MAIN', so that Moshi would never speak; their labels are "
        r"'SPEAKER_01' \(2 words\), 'SPEAKER_00' \(1 word\), 'SPEAKER_02' \(1 word\): name that of the left"
    )
    with pytest.raises(NoMainSpeaker, match=message):
        run(recordings_per_shard=1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.json"]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["speakers"]["SPEAKER_01"] == 2
    report = run(main_speaker="SPEAKER_00")
    assert report.without_moshi == {"a.wav": {}, "c.wav": {"SPEAKER_01": 1, "SPEAKER_02": 1}}
    assert report.speakers == {"SPEAKER_00": 1, "SPEAKER_01": 2, "SPEAKER_02": 1}
    dataset = open_dataset(tmp_path / "out")
    assert YOU in dataset[1].moshi_text_tokens and TO in dataset[1].user_text_tokens
    with pytest.raises(SettingsDiffer, match="another main_speaker"):
        run(main_speaker="SPEAKER_01")


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def test_interrupted_anywhere_and_resumed(
    run: Callable[..., Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before and after every file gets its name, then run again: the same in the end."""
    record(tmp_path, LENGTHS)
    whole = run(tmp_path / "whole")
    replace = os.replace
    steps = resumed = 0

    def interrupted(left: int, after: bool) -> bool:
        """Run with ``left`` renames granted; whether it came to the end."""

        def dying(source: Any, target: Any) -> None:
            nonlocal left
            if left == 0 and not after:
                raise Killed
            replace(source, target)
            left -= 1
            if left < 0:
                raise Killed

        monkeypatch.setattr(writing.os, "replace", dying)
        try:
            run(tmp_path / "out")
        except Killed:
            return False
        finally:
            monkeypatch.setattr(writing.os, "replace", replace)
        return True

    for after in (False, True):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        # one more rename is granted each time, so a run dies at another step
        for granted in (0, 1, 1, 0, 2):
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / ".shard-00000.safetensors.0.tmp").write_bytes(b"half")
            if interrupted(granted, after):
                break
            steps += 1
        report = run(tmp_path / "out")
        resumed += report.resumed
        assert report.conversations == whole.conversations
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert steps > 5 and resumed > 0


def test_finished_shards_are_not_redone(run: Callable[..., Report], tmp_path: Path) -> None:
    record(tmp_path, LENGTHS)
    out = tmp_path / "out"
    run()
    whole = contents(out)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    content = (out / "shard-00002.safetensors").read_bytes()
    (out / "shard-00002.safetensors").write_bytes(content[: len(content) // 2])
    report = run()
    assert report.resumed == len(LENGTHS) - 2
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    assert {name for name in times if times[name] != after[name]} == {"shard-00002.safetensors"}
    assert contents(out) == whole


def test_damaged_shards_are_redone(run: Callable[..., Report], tmp_path: Path) -> None:
    record(tmp_path, LENGTHS)
    out = tmp_path / "out"
    assert run().redone == {}
    whole = contents(out)
    path = out / "shard-00001.safetensors"
    for in_array in (True, False):  # or in what the shard says of itself
        content = bytearray(path.read_bytes())
        content[-1 if in_array else content.index(b"remarks")] ^= 1
        path.write_bytes(content)
        report = run()
        assert report.redone == {"shard-00001.safetensors": "it was damaged"}
        assert report.resumed == len(LENGTHS) - 2 and contents(out) == whole
    assert len(list(open_dataset(out))) == len(LENGTHS)


def test_mended_recordings_are_tried_again(run: Callable[..., Report], tmp_path: Path) -> None:
    made = record(tmp_path, {"a.wav": 40, "b.wav": 40, "c.wav": 40, "d.wav": 40})
    (tmp_path / "b.wav").unlink()
    words = (tmp_path / "d.json").read_bytes()
    (tmp_path / "d.json").write_text("{}")
    assert len(run().skipped) == 2
    report = run()
    assert report.resumed == 4 and not report.redone and len(report.skipped) == 2
    soundfile.write(tmp_path / "b.wav", made["b.wav"], RATE, subtype="FLOAT")
    report = run()
    assert report.redone == {"shard-00000.safetensors": "'b.wav' has changed since it was skipped"}
    assert report.resumed == 2 and [entry["path"] for entry in report.skipped] == ["d.wav"]
    (tmp_path / "d.json").write_bytes(words)
    assert not run().skipped and open_dataset(tmp_path / "out").ids == list(made)


def test_written_shards_are_freed(run: Callable[..., Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path, LENGTHS)
    write_shard, seen = preparing.write_shard, []

    def write(out: Path, number: int, conversations: list[tuple[Conversation, Any]], *rest: Any) -> None:
        assert [reference() for reference in seen] == [None] * len(seen)
        for conversation, _ in conversations:
            # and nothing larger is kept for it
            codes = conversation.moshi_audio_tokens
            assert codes.dtype == np.int16 and codes.base.nbytes == 2 * codes.nbytes
            seen.append(weakref.ref(conversation))
        write_shard(out, number, conversations, *rest)

    monkeypatch.setattr(preparing, "write_shard", write)
    run(recordings_per_shard=1)
    assert len(seen) == len(LENGTHS)


KILLED = """
import os, sys, time
from pathlib import Path
from transformers import AutoTokenizer, MoshiConfig
from transformers_moshi_flax import FlaxMimiModel, audio_files
from transformers_moshi_flax.training.data.preparing import prepare

folder, embedded = Path(sys.argv[1]), sys.argv[2]

def advance(done):
    print("done", flush=True)
    time.sleep(0.03)  # so that the end does not come before the signal

# imports are most of a start: a process a line
for _ in sys.stdin:
    if os.fork():
        print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
        continue
    print(os.getpid(), flush=True)
    mimi, config = FlaxMimiModel.from_pretrained(folder / "mimi"), MoshiConfig.from_pretrained(folder / "moshi")
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    prepare(folder / "all.jsonl", folder / "out", mimi=mimi, config=config, tokenizer=tokenizer, batch_size=3,
            recordings_per_shard=2, advance=advance)
"""


@pytest.mark.slow
def test_killed_for_real(
    run: Callable[..., Report], mimi: FlaxMimiModel, tmp_path: Path, keeping: dict[str, str]
) -> None:
    """SIGKILL in the midst of the work, more of it done each time."""
    record(tmp_path, {f"{number}.wav": 3000 for number in range(60)})
    mimi.save_pretrained(tmp_path / "mimi")
    CONFIG.save_pretrained(tmp_path / "moshi")
    whole = run(tmp_path / "whole")
    environment = os.environ | keeping
    shards = 0
    arguments = [sys.executable, "-c", KILLED, str(tmp_path), str(RANDOM_MODEL)]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as nursery:
        for lines in (7, 14):
            print("go", file=nursery.stdin, flush=True)
            process = int(nursery.stdout.readline())
            for _ in range(lines):
                assert nursery.stdout.readline() == "done\n"
            os.kill(process, signal.SIGKILL)
            while (line := nursery.stdout.readline()) == "done\n":
                pass
            assert int(line) == -signal.SIGKILL
            found = len(list((tmp_path / "out").glob("shard-*")))
            assert shards < found < 30
            shards = found
            with pytest.raises(ValueError, match="is not finished"):
                open_dataset(tmp_path / "out")
        nursery.stdin.close()
    report = run()
    assert report.resumed == 2 * shards and report.conversations == whole.conversations == 60
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_settings_are_refused(
    run: Callable[..., Report],
    mimi: FlaxMimiModel,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record(tmp_path, {"a.wav": 40})
    run()
    with pytest.raises(SettingsDiffer, match="another recordings_per_shard; give another folder"):
        run(recordings_per_shard=3)
    with pytest.raises(SettingsDiffer, match="another num_codebooks"):
        run(config=tiny_moshi_config(vocab_size=270, num_codebooks=3))
    with pytest.raises(SettingsDiffer, match="another codec"):
        params = mimi.params
        try:
            mimi.params = {**params, "downsample": {"conv": {"kernel": params["downsample"]["conv"]["kernel"] + 1}}}
            run()
        finally:
            mimi.params = params
    with monkeypatch.context() as changed, pytest.raises(SettingsDiffer, match="another codec"):
        changed.setattr(mimi.config, "sliding_window", 3)
        run()
    with monkeypatch.context() as changed, pytest.raises(SettingsDiffer, match="another tokenizer"):
        changed.setattr(tokenizer.backend_tokenizer, "normalizer", normalizers.Lowercase())
        run()
    with (tmp_path / "all.jsonl").open("a") as file:
        file.write('{"path": "b.wav"}\n')
    with pytest.raises(SettingsDiffer, match="another manifest"):
        run()
    (tmp_path / "out" / "settings.json").unlink()
    with pytest.raises(SettingsDiffer, match=r"has shards but no settings\.json"):
        run()


def test_two_at_once_are_refused(run: Callable[..., Report], tmp_path: Path) -> None:
    record(tmp_path, {"a.wav": 40})

    def again(done: int) -> None:
        with pytest.raises(ValueError, match="being prepared by another process"):
            run()

    run(advance=again)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "`workers` is 0"),
        ({"recordings_per_shard": 0}, "`recordings_per_shard` is 0"),
        (
            {"config": tiny_moshi_config(audio_vocab_size=16)},
            "`mimi` has 6 codebooks of 32 codes, but `config` wants 4",
        ),
    ],
)
def test_mistakes(run: Callable[..., Report], tmp_path: Path, options: dict[str, Any], message: str) -> None:
    record(tmp_path, {"a.wav": 40})
    with pytest.raises(ValueError, match=message):
        run(**options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no lines"),
        ('{"path": "a.wav"}\n\nno json', "line 3: must be a JSON object with a `path`"),
        ("{}", "line 1: must be a JSON object with a `path`"),
        ('{"path": 3}', "line 1: `path` must be the name of a file, got 3"),
        (r'{"path": "\ud800.wav"}', r"line 1: '\\ud800\.wav' is no text"),
        ('{"path": "a.wav"}\n{"path": "a.wav"}', r"line 2: 'a\.wav' is there twice"),
    ],
)
def test_bad_manifests(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "all.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        preparing.read_manifest(tmp_path / "all.jsonl")


def test_manifests_of_other_editors(tmp_path: Path) -> None:
    """A byte order mark, CR LF, and characters that end a line for Python alone."""
    text = '\ufeff{"path": "a.wav", "said": "one\u2028two\u0085three"}\r\n\r\n{"path": "b.wav"}\r\n'
    (tmp_path / "all.jsonl").write_bytes(text.encode())
    assert [item.id for item in preparing.read_manifest(tmp_path / "all.jsonl")] == ["a.wav", "b.wav"]


@pytest.mark.parametrize("rate", [8_000, 24_000, 44_100])
@pytest.mark.parametrize("seconds", [0.01, 10, 21])
def test_blocks_are_the_resampled_file(tmp_path: Path, rate: int, seconds: float) -> None:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (int(seconds * rate), 2)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    blocks = list(read_blocks(tmp_path / "a.wav", RATE, 10_007))
    assert [last for _, last in blocks] == [False] * (len(blocks) - 1) + [True]
    assert all(block.shape == (2, 10_007) for block, _ in blocks[:-1]) and 0 < blocks[-1][0].shape[1] <= 10_007
    expected = samples if rate == RATE else soxr.resample(samples, rate, RATE)
    np.testing.assert_allclose(np.concatenate([block for block, _ in blocks], axis=1).T, expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*was cut off")
def test_truncated_file(tmp_path: Path) -> None:
    """What is there is heard; a header alone holds nothing."""
    soundfile.write(tmp_path / "a.wav", np.zeros((1000, 2)), RATE)
    content = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(content[: 44 + 400])
    assert sum(block.shape[1] for block, _ in read_blocks(tmp_path / "a.wav", RATE, 64)) == 100
    (tmp_path / "a.wav").write_bytes(content[:44])
    with pytest.raises(BadRecording, match="holds no samples"):
        list(read_blocks(tmp_path / "a.wav", RATE, 64))
