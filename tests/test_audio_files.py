"""Audio files are read to their end, whatever their headers say; what cannot be had is told."""

from __future__ import annotations

import re
import struct
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile

from transformers_moshi_flax import audio_files
from transformers_moshi_flax.audio_files import AudioFile, mix_crops, read_mono
from transformers_moshi_flax.cli.audio import AUDIO_OUT, read_audio, write_audio
from transformers_moshi_flax.cli.errors import UserMistake
from transformers_moshi_flax.training.data.recordings import BadRecording, read_blocks

RATE, SAMPLES = 24_000, 100_000
NOISE = (0.1 * np.random.default_rng(0).standard_normal((SAMPLES, 2))).astype(np.float32)


def encoded(folder: Path, kind: str, samples: np.ndarray = NOISE, rate: int = RATE, **options: str) -> bytes:
    path = folder / "made"
    soundfile.write(path, samples, rate, format=kind, **options)
    return path.read_bytes()


def read(path: Path) -> tuple[np.ndarray, list[str]]:
    """All samples by :class:`AudioFile`, which are as many by every entry, and what is told."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        samples = np.concatenate(list(AudioFile(path).blocks()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = AudioFile(path)
        assert file.count() == len(samples)
        for start, stop in ((0, 7), (len(samples) // 3, len(samples) // 3 + 5000), (len(samples) - 50, SAMPLES**2)):
            found = file.read(start, stop)
            assert found.shape == samples[start:stop].shape
            if b"vorbis" not in path.read_bytes()[:100] or start == 0:
                np.testing.assert_allclose(found, samples[start:stop], atol=1e-6)
        assert len(read_audio(path, RATE)) == len(samples)
        assert sum(block.shape[1] for block, _ in read_blocks(path, RATE, 48_000)) == len(samples)
    return samples, [str(warning.message) for warning in told]


def check(path: Path, data: bytes, samples: int, *problems: str, tolerance: int = 0) -> None:
    path.write_bytes(data)
    found, told = read(path)
    assert abs(len(found) - samples) <= tolerance
    assert len(told) == len(problems)
    for warning, problem in zip(told, problems):
        assert str(path) in warning and problem in warning


# ---------------------------------------------------------------------------------------------------------------- FLAC


def with_length(flac: bytes, samples: int) -> bytes:
    data = bytearray(flac)
    data[21] = data[21] & 0xF0 | samples >> 32
    data[22:26] = struct.pack(">I", samples & 0xFFFFFFFF)
    return bytes(data)


def test_flac_that_does_not_know_its_length(tmp_path: Path) -> None:
    flac = encoded(tmp_path, "FLAC")
    check(tmp_path / "open.flac", with_length(flac, 0), SAMPLES)
    check(tmp_path / "short.flac", with_length(flac, 5_000), SAMPLES)
    check(tmp_path / "wrong.flac", with_length(flac, 2**36 - 1), SAMPLES, "ends after 4.17 s, but its header promises")
    np.testing.assert_array_equal(
        read(tmp_path / "open.flac")[0], soundfile.read(tmp_path / "made", dtype="float32")[0]
    )


def test_lengths_that_are_proved_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the last frame of a FLAC; other files than these are read to their end first."""
    for name, data in {
        "a.flac": encoded(tmp_path, "FLAC"),
        "b.flac": encoded(tmp_path, "FLAC", NOISE[: 3 * 4096]) + b"TAG".ljust(128),
        "c.flac": encoded(tmp_path, "FLAC") + encoded(tmp_path, "FLAC", NOISE[:300]),
        "d.wav": encoded(tmp_path, "WAV"),
        "e.ogg": encoded(tmp_path, "OGG"),
    }.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "open.flac").write_bytes(with_length(encoded(tmp_path, "FLAC"), 0))
    (tmp_path / "short.flac").write_bytes(with_length(encoded(tmp_path, "FLAC"), 4096))
    read_to_the_end = []
    blocks = AudioFile.blocks
    monkeypatch.setattr(AudioFile, "blocks", lambda self: (read_to_the_end.append(self.path.name), *blocks(self)))
    counts = [AudioFile(path).count() for path in sorted(tmp_path.glob("*.*"))]
    assert counts == [SAMPLES, 3 * 4096, SAMPLES + 300, SAMPLES, SAMPLES, SAMPLES, SAMPLES]
    assert read_to_the_end == ["open.flac", "short.flac"]


def test_joined_flacs_and_one_cut_off(tmp_path: Path) -> None:
    flac = encoded(tmp_path, "FLAC")
    check(tmp_path / "two.flac", flac + flac, 2 * SAMPLES)
    tagged = b"ID3\x04\0\0\0\0\0\x05tag.." + flac
    check(tmp_path / "tagged.flac", tagged, SAMPLES)
    # the block that was cut is lost, no other
    check(tmp_path / "cut.flac", flac[: len(flac) // 2], SAMPLES // 2, "cannot be read beyond 2.0", tolerance=4096)


# ----------------------------------------------------------------------------------------------------------------- Ogg


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_chained_oggs(tmp_path: Path, subtype: str) -> None:
    ogg = encoded(tmp_path, "OGG", subtype=subtype)
    check(tmp_path / "one.ogg", ogg, SAMPLES)
    check(tmp_path / "three.ogg", 3 * ogg, 3 * SAMPLES)


def test_oggs_that_are_damaged(tmp_path: Path) -> None:
    ogg, other = encoded(tmp_path, "OGG"), encoded(tmp_path, "OGG", NOISE[:, :1], 16_000)
    path = tmp_path / "damaged.ogg"
    check(path, ogg + b"no page" + ogg, 2 * SAMPLES, "are no page")
    path.write_bytes(ogg[: len(ogg) // 2])
    samples, told = read(path)
    assert 0 < len(samples) < SAMPLES and len(told) == 1 and "ends in the middle of a page" in told[0]
    places = [match.start() for match in re.finditer(b"OggS", ogg)]
    for damaged in (ogg[: places[5]] + ogg[places[6] :], replaced(ogg, ogg[: places[5] + 200], b"damage")):
        path.write_bytes(damaged)
        samples, told = read(path)
        assert 0 < len(samples) < SAMPLES and len(told) == 1 and "lacks 1 of its pages" in told[0]
    path.write_bytes(ogg + other)
    with pytest.raises(
        ValueError, match=r"goes on after 4.17 s with 16000 Hz and 1 channels instead of 24000 Hz and 2"
    ):
        list(AudioFile(path).blocks())


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_oggs_that_were_never_finished(tmp_path: Path, subtype: str) -> None:
    """Whole pages, the last of which does not say that it is."""
    ogg = encoded(tmp_path, "OGG", subtype=subtype)
    path = tmp_path / "open.ogg"
    path.write_bytes(ogg[: ogg.rindex(b"OggS")])
    samples, told = read(path)
    assert SAMPLES // 2 < len(samples) < SAMPLES and len(told) == 1 and "a stream without an end" in told[0]


# ---------------------------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize("length", [0, 1000, 0xFFFFFFFF, 0x7FFFFFFF])
@pytest.mark.parametrize(
    ("kind", "order", "place", "number"),
    [
        ("WAV", "LITTLE", b"data", "<I"),
        ("WAV", "BIG", b"data", ">I"),
        ("AIFF", "BIG", b"SSND", ">I"),
        ("AU", "BIG", b".snd\0\0\0\x18", ">I"),
        ("AU", "LITTLE", b"dns.\x18\0\0\0", "<I"),
    ],
)
def test_files_that_were_never_finished(
    tmp_path: Path, kind: str, order: str, place: bytes, number: str, length: int
) -> None:
    data = encoded(tmp_path, kind, endian=order)
    check(tmp_path / "open", replaced(data, place, struct.pack(number, length)), SAMPLES)


@pytest.mark.parametrize("length", [0, 1000, 200_000])
def test_silence_is_no_end_of_what_was_never_finished(tmp_path: Path, length: int) -> None:
    """Neither at the beginning nor where the length says that the audio ends."""
    samples = NOISE.copy()
    samples[:1000] = samples[49_000:51_000] = 0
    for kind, number, place in (("WAV", "<I", b"data"), ("AU", ">I", b".snd\0\0\0\x18"), ("CAF", ">q", b"data")):
        data = replaced(encoded(tmp_path, kind, samples), place, struct.pack(number, length))
        check(tmp_path / f"open.{kind.lower()}", data, SAMPLES)


@pytest.mark.parametrize("length", [0, 1000, 2**64 - 1])
def test_lengths_of_64_bits_that_were_never_written(tmp_path: Path, length: int) -> None:
    rf64, caf = encoded(tmp_path, "RF64"), encoded(tmp_path, "CAF")
    place = rf64[: rf64.index(b"ds64") + 16]
    check(tmp_path / "open.rf64", replaced(rf64, place, struct.pack("<Q", length)), SAMPLES)
    check(tmp_path / "open.caf", replaced(caf, b"data", struct.pack(">Q", length)), SAMPLES)


def replaced(data: bytes, before: bytes, value: bytes) -> bytes:
    """With another value behind these bytes."""
    place = data.index(before) + len(before)
    return data[:place] + value + data[place + len(value) :]


def test_wav_with_chunks_behind_its_audio(tmp_path: Path) -> None:
    wav = encoded(tmp_path, "WAV")
    check(tmp_path / "list.wav", wav + b"LIST\x04\0\0\0INFO", SAMPLES)
    check(tmp_path / "zeros.wav", wav + bytes(64), SAMPLES)
    caf, w64 = encoded(tmp_path, "CAF"), encoded(tmp_path, "W64")
    check(tmp_path / "free.caf", caf + b"free" + struct.pack(">q", 4) + bytes(4), SAMPLES)
    check(
        tmp_path / "list.w64",
        w64 + b"list\x2f\x91\xcf\x11\xa5\xd6\x28\xdb" + bytes(4) + struct.pack("<q", 24),
        SAMPLES,
    )
    empty = encoded(tmp_path, "WAV", NOISE[:0])
    (tmp_path / "empty.wav").write_bytes(empty + b"LIST\x04\0\0\0INFO")
    with pytest.raises(UserMistake, match="holds no samples"):
        read_audio(tmp_path / "empty.wav", RATE)


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "AU", "W64", "RF64", "CAF", "NIST"])
def test_files_that_were_cut_off(tmp_path: Path, kind: str) -> None:
    data = encoded(tmp_path, kind)
    check(tmp_path / "whole", data, SAMPLES)
    check(tmp_path / "cut", data[: len(data) // 2 + 2000], SAMPLES // 2, "ends after 2.", tolerance=1000)
    with pytest.warns(UserWarning, match=r"but its header promises 4\.17 s"):
        AudioFile(tmp_path / "cut").count()


def test_files_that_libsndfile_cannot_seek_in(tmp_path: Path) -> None:
    path = tmp_path / "telephone.wav"
    path.write_bytes(encoded(tmp_path, "WAV", NOISE[:, 0], subtype="GSM610"))
    samples = np.concatenate(list(AudioFile(path).blocks()))
    assert SAMPLES <= len(samples) < SAMPLES + 640  # whole blocks of two frames
    np.testing.assert_array_equal(AudioFile(path).read(50_000, 51_000), samples[50_000:51_000])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("no audio")
    for path in ("text.wav", "missing.wav", "."):
        with pytest.raises(UserMistake, match=r"--user-audio: .*cannot be read as audio"):
            read_audio(tmp_path / path, RATE)
        with pytest.raises(BadRecording, match=r"^it cannot be read as audio"):
            next(read_blocks(tmp_path / path, RATE, 100))
    (tmp_path / "slow.wav").write_bytes(encoded(tmp_path, "WAV", rate=3))
    with pytest.raises(UserMistake, match="sampling rate 3"):
        read_audio(tmp_path / "slow.wav", RATE)
    soundfile.write(tmp_path / "loud.wav", 30_000 * NOISE, RATE, subtype="FLOAT")
    with pytest.raises(UserMistake, match=r"loud.wav' has samples of up to .*\[-1, 1\]: scale"):
        read_audio(tmp_path / "loud.wav", RATE)


# ---------------------------------------------------------------------------------------------------------------- MPEG


@pytest.mark.parametrize("rate", [24_000, 44_100])
@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
def test_mp3_without_a_count_of_its_frames(tmp_path: Path, rate: int, mode: str) -> None:
    seconds = 8
    sound = np.zeros((seconds * rate, 2), np.float32)
    sound[: 2 * rate] = np.random.default_rng(0).uniform(-0.5, 0.5, (2 * rate, 2))
    mp3 = encoded(tmp_path, "MP3", sound, rate, bitrate_mode=mode)
    bare = mp3[mp3.index(mp3[:2], 4) :]
    tag = b"ID3\x04\0\0\0\0\x01\0" + bytes(128)

    def length(data: bytes, *problems: str) -> float:
        path = tmp_path / "made.mp3"
        path.write_bytes(data)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            samples = sum(len(block) for block in AudioFile(path).blocks())
        assert len(told) == len(problems) and all(text in str(told[0].message) for text in problems)
        return samples / rate

    near = 0.15  # a decoder's delay
    assert length(mp3) == seconds
    assert abs(length(bare) - seconds) < near
    assert abs(length(mp3 + mp3) - 2 * seconds) < near
    assert abs(length(tag + bare + tag + mp3 + b"TAG" + bytes(125)) - 2 * seconds) < near
    assert abs(length(bare + b"\x11\x22" * 700 + mp3, "1400 bytes between its frames") - 2 * seconds) < near
    assert length(mp3[: len(mp3) // 2], "it was cut off") < seconds
    # what was caught in mid-stream, and a tag whose length is wrong
    assert abs(length(bytes(5000) + bare) - seconds) < near
    assert length(bytes(5000) + mp3) == length(tag[:6] + b"\x7f" * 4 + bytes(128) + mp3) == seconds


def test_mp3s_of_other_rates_joined(tmp_path: Path) -> None:
    path = tmp_path / "joined.mp3"
    path.write_bytes(encoded(tmp_path, "MP3") + encoded(tmp_path, "MP3", rate=16_000))
    with pytest.raises(ValueError, match=r"goes on after .* with 16000 Hz"):
        list(AudioFile(path).blocks())


# -------------------------------------------------------------------------------------------------------------- memory


def test_memory_does_not_grow_with_the_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio_files, "BLOCK_SAMPLES", 2**14)
    path = tmp_path / "long.flac"
    path.write_bytes(with_length(encoded(tmp_path, "FLAC", np.zeros((2**22, 2), np.float32)), 0))
    tracemalloc.start()
    total = sum(block.shape[1] for block, _ in read_blocks(path, RATE, 48_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 2**22 and peak < 8e6  # 34 MB in all


def test_recordings_that_are_too_long(tmp_path: Path) -> None:
    path = tmp_path / "long.flac"
    path.write_bytes(with_length(encoded(tmp_path, "FLAC"), 0))
    with pytest.raises(ValueError, match="is longer than 3 s"):
        read_mono(path, RATE, longest=3.0)
    assert len(read_mono(path, RATE, longest=5.0)) == SAMPLES


# ------------------------------------------------------------------------------------------------------------- downmix


def level(path: Path, channels: list[np.ndarray]) -> tuple[float, list[str]]:
    """Of the mix, in decibels of the first channel; and what is told."""
    soundfile.write(path, np.stack(channels, axis=1), RATE, format="WAVEX", subtype="PCM_24")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        mono = read_mono(path, RATE, longest=60.0)
    return 20 * float(np.log10(np.std(mono) / np.std(channels[0]))), [str(warning.message) for warning in told]


def test_channels_that_cancel(tmp_path: Path) -> None:
    path, voice, other = tmp_path / "mixed.wav", NOISE[:, 0], NOISE[:, 1]
    silence, half = np.zeros_like(voice), SAMPLES // 2
    turned = np.concatenate([voice[:half], -voice[half:]])
    for channels, decibels in (
        ([voice, voice], 0),
        ([voice, other], -3),
        ([voice, silence], 0),
        ([voice, silence, silence, silence, silence, silence], 0),
        ([voice, 0.2 * voice], -4.4),
    ):
        found, told = level(path, channels)
        assert abs(found - decibels) < 0.2 and not told
    for channels in ([voice, -voice], [voice, -0.95 * voice], [voice, turned], [voice, -0.5 * voice]):
        found, told = level(path, channels)
        assert abs(found) < 0.2
        assert len(told) == 1 and "mixed.wav" in told[0] and "of 2 is heard alone" in told[0]


def test_crops_whose_channels_cancel() -> None:
    voice = NOISE[:1000, 0]
    crops = np.stack([np.stack([voice, voice]), np.stack([-0.9 * voice, voice]), np.zeros((2, 1000), np.float32)])
    mixed = mix_crops(crops)
    np.testing.assert_array_equal(mixed, np.stack([voice, voice, 0 * voice]))


def test_silence_may_be_mixed(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silence.wav", np.zeros((100, 2)), RATE)
    assert not read_mono(tmp_path / "silence.wav", RATE, longest=1.0).any()


def test_warnings_are_notes_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    soundfile.write(tmp_path / "inverted.wav", np.stack([NOISE[:, 0], -NOISE[:, 0]], axis=1), RATE)
    read_audio(tmp_path / "inverted.wav", RATE)
    error = capsys.readouterr().err
    assert error.startswith("moshi-flax: warning: ") and "inverted.wav" in error and error.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------- out


@pytest.mark.parametrize("suffix", AUDIO_OUT)
@pytest.mark.parametrize("shape", [(0,), (0, 2)], ids=str)
def test_a_reply_of_nothing_is_a_file_that_opens(tmp_path: Path, suffix: str, shape: tuple[int, ...]) -> None:
    path = tmp_path / f"reply{suffix}"
    write_audio(path, np.zeros(shape, np.float32), RATE)
    samples, rate = soundfile.read(path, always_2d=True)
    assert rate == RATE and samples.shape[1] == (shape[1] if len(shape) == 2 else 1)
    assert len(samples) <= 1 and not samples.any()
