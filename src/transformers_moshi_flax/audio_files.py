"""Audio files, read to their end in bounded memory, whatever their headers say of their length.

libsndfile stops where a header says that the audio ends, or where it guesses so: an MP3 without a count of its frames
is cut short, of joined files the first is heard alone, what a recorder could not finish is empty. So each kind is
handed to it as *parts*, views of the file that end where their audio ends and promise what is there. What cannot be
had is told in a warning that names the file.
"""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float32

from .input_checks import check_samples

Block = Float32[np.ndarray, "samples channels"]

BLOCK_SAMPLES = 2**18
"""Of all channels together."""

LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000
"""Hertz; other rates are a broken header, and would be resampled to anything."""

_UNKNOWN = 0x7FFF0000
"""From here on, the length of a chunk is what programs write that do not know it."""

_UNKNOWN_SAMPLES = 2**40
"""From here on, the number of samples is what libsndfile says that does not know it."""


@dataclass
class Part:
    """Pieces of a file, or bytes in place of them, that make one stream.

    Attributes:
        pieces: ``(start, end)`` in the file, or bytes.
        declared: how many samples the file says that it has, if it says so.
        counted: the same, if its last frame says so too.
        promised: how many times as much it says that it has as is there.
        seekable: whether its places in time are right.
    """

    pieces: list[tuple[int, int] | bytes]
    declared: int | None = None
    counted: int | None = None
    promised: float = 1.0
    seekable: bool = True

    def of_length(self, samples: int | None) -> list[tuple[int, int] | bytes]:
        """The pieces, with a header that says how many samples there are, where the kind wants that for seeking."""
        header = self.pieces[0]
        if samples is None or not isinstance(header, bytes) or not header.startswith(b"fLaC"):
            return self.pieces
        return [_flac_header(header, samples), *self.pieces[1:]]


@dataclass
class Layout:
    """What a look through a file has found.

    Attributes:
        parts: one after another; None for the file as it is.
        problems: what is wrong with it, for warnings.
    """

    parts: list[Part] | None = None
    problems: list[str] = field(default_factory=list)


class AudioFile:
    """A file that libsndfile knows, as blocks of samples.

    Args:
        path: of the file.
        longest: seconds; :meth:`blocks` refuses more.

    Attributes:
        sampling_rate: in hertz.
        channels: how many.
        problems: what cannot be had of it, as far as :meth:`blocks` has come.

    Raises:
        ValueError: no file, no audio, a rate that is none. Messages begin with the name.
    """

    def __init__(self, path: Path, longest: float = math.inf):
        import soundfile

        self.path, self._longest = path, longest
        self.problems: list[str] = []
        self._counts: list[int] | None = None
        if path.suffix.lower() == ".raw":
            raise ValueError(f"{self._name} does not say its rate and channels; give it as .wav or .flac")
        try:
            if not path.is_file():
                raise FileNotFoundError("there is no such file")
            with path.open("rb") as file:
                self._layout = _layout_of(file)
            with self._opened(self._parts[0]) as sound:
                self.sampling_rate, self.channels = sound.samplerate, sound.channels
        except (soundfile.SoundFileError, OSError) as error:
            raise self._unreadable(error) from error
        if not LOWEST_RATE <= self.sampling_rate <= HIGHEST_RATE:
            raise ValueError(f"{self._name} has the sampling rate {self.sampling_rate}: repair its header")

    @property
    def _name(self) -> str:
        return repr(str(self.path))

    @property
    def _parts(self) -> list[Part]:
        return self._layout.parts or [Part([(0, self.path.stat().st_size)])]

    @contextmanager
    def _opened(self, part: Part) -> Iterator[Any]:
        import soundfile

        class Sequential(soundfile.SoundFile):
            # soundfile seeks after every read where it can, which fails in files of unknown length
            def seekable(self) -> bool:
                return False

        with _View(self.path, part.pieces) as view, Sequential(view) as sound:
            yield sound

    def _unreadable(self, error: Exception) -> ValueError:
        return ValueError(f"{self._name} cannot be read as audio ({_reason(error)}); give a WAV or FLAC file")

    def _warn(self, problem: str) -> None:
        self.problems.append(problem)
        warnings.warn(f"{self._name} {problem}", stacklevel=4)

    def blocks(self, told: bool = True) -> Iterator[Block]:
        """All samples there are, float32, at most :data:`BLOCK_SAMPLES` at once.

        Args:
            told: whether what cannot be had is told in warnings.

        Raises:
            ValueError: samples that are not finite or far beyond [-1, 1]; parts of another rate or number of
                channels; nothing can be read; too long. Messages begin with the name.
        """
        import soundfile

        warn = self._warn if told else lambda problem: None
        for problem in self._layout.problems:
            warn(problem)
        length = 0
        counts: list[int] = []
        for part in self._parts:
            begin = length
            try:
                with self._opened(part) as sound:
                    found = (sound.samplerate, sound.channels)
                    if found != (self.sampling_rate, self.channels):
                        raise ValueError(
                            f"{self._name} goes on after {length / self.sampling_rate:.2f} s with {found[0]} Hz and "
                            f"{found[1]} channels instead of {self.sampling_rate} Hz and {self.channels}: give its "
                            "parts as files of their own"
                        )
                    declared = _promised(sound, part)
                    for block in self._read(sound):
                        check_samples(self._name, block)
                        length += len(block)
                        if length > self._longest * self.sampling_rate:
                            raise ValueError(f"{self._name} is longer than {self._longest:g} s; give a part of it")
                        yield block
            except (soundfile.SoundFileError, OSError) as error:
                if not length:
                    raise self._unreadable(error) from error
                warn(f"cannot be read beyond {length / self.sampling_rate:.2f} s ({_reason(error)})")
                counts.append(length - begin)
                continue
            counts.append(length - begin)
            if declared is not None and declared > length - begin:
                warn(
                    f"ends after {length / self.sampling_rate:.2f} s, but its header promises "
                    f"{declared / self.sampling_rate:.2f} s: it was cut off, or the header is wrong"
                )
        self._counts = counts

    def count(self) -> int:
        """How many samples :meth:`blocks` gives. All of the file is read only where its own count is not proved.

        Raises:
            ValueError: as :meth:`blocks`.
        """
        if self._counts is None:
            counts = [self._known_count(part) for part in self._parts]
            if any(count is None for count in counts):
                for _ in self.blocks():
                    pass
            else:
                for problem in self._layout.problems:
                    self._warn(problem)
                self._counts = [count for count in counts if count is not None]
        return sum(self._counts or ())

    def _known_count(self, part: Part) -> int | None:
        """What libsndfile says, if it finds the last of these samples, and none behind it."""
        import soundfile

        try:
            with self._opened_to_seek(part, part.counted) as sound:
                if (sound.samplerate, sound.channels) != (self.sampling_rate, self.channels):
                    return None
                if not (part.seekable and sound.seekable() and 0 < sound.frames < _UNKNOWN_SAMPLES):
                    return None
                if (_promised(sound, part) or 0) > sound.frames:
                    return None
                sound.seek(sound.frames - 1)
                return sound.frames if len(sound.read(2)) == 1 else None
        except (soundfile.SoundFileError, OSError):
            return None

    @contextmanager
    def _opened_to_seek(self, part: Part, samples: int | None) -> Iterator[Any]:
        import soundfile

        with _View(self.path, part.of_length(samples)) as view, soundfile.SoundFile(view) as sound:
            yield sound

    def read(self, start: int, stop: int) -> Block:
        """Samples from ``start`` to before ``stop``, float32, as many as there are, without decoding all before.

        In Ogg Vorbis, libsndfile finds a place no nearer than some hundreds of samples.

        Raises:
            ValueError: they cannot be read; as :meth:`count`.
        """
        import soundfile

        self.count()
        found, begin = [np.zeros((0, self.channels), np.float32)], 0
        for part, count in zip(self._parts, self._counts or ()):
            first, last = max(start - begin, 0), min(stop - begin, count)
            begin += count
            if first >= last:
                continue
            try:
                found.append(self._sought(part, count, first, last))
            except (soundfile.SoundFileError, OSError) as error:
                raise self._unreadable(error) from error
        return np.concatenate(found)

    def _sought(self, part: Part, count: int, first: int, last: int) -> Block:
        """Samples of a part, which is decoded from its beginning where it is damaged or cannot be sought in."""
        import soundfile

        if part.seekable:
            try:
                with self._opened_to_seek(part, count) as sound:
                    sound.seek(first)
                    return sound.read(last - first, dtype="float32", always_2d=True)
            except soundfile.SoundFileError:
                pass
        blocks, end = [], 0
        with self._opened(part) as sound:
            for block in self._read(sound):
                begin, end = end, end + len(block)
                blocks.append(block[max(first - begin, 0) : max(last - begin, 0)])
                if end >= last:
                    break
        return np.concatenate(blocks)

    def _read(self, sound: Any) -> Iterator[Block]:
        """What can be read before an error too; libsndfile's does not say how much it was."""
        import soundfile

        size = max(1, BLOCK_SAMPLES // self.channels)
        while True:
            block = np.full((size, self.channels), np.nan, np.float32)
            try:
                block = sound.read(size, dtype="float32", always_2d=True, out=block)
            except soundfile.SoundFileError:
                block = block[: int(np.isnan(block[:, -1]).argmax())]
                if len(block):
                    yield block
                raise
            if not len(block):
                return
            yield block


def _reason(error: Exception) -> str:
    """Of libsndfile's errors the words alone: the rest names an object in memory."""
    return str(getattr(error, "error_string", error)).strip().rstrip(".")


_PROMISE = r"^ *(?:data|SSND|Data Size|riff|Riff size)\s*:\s*(\d+) \(should be (\d+)\)"


def _promised(sound: Any, part: Part) -> int | None:
    """Samples that a header promises: libsndfile's words are ``data : 9 (should be 5)`` if they are not there."""
    if part.declared is not None:
        return part.declared
    if part.promised > 1:
        return int(sound.frames * part.promised)
    found = re.search(_PROMISE, sound.extra_info, re.MULTILINE)
    if found is None or int(found[1]) >= _UNKNOWN:
        return None
    return sound.frames * int(found[1]) // max(int(found[2]), 1)


class _View(io.RawIOBase):
    """Pieces of a file as a file, for libsndfile."""

    def __init__(self, path: Path, pieces: list[tuple[int, int] | bytes]):
        self._file = path.open("rb")
        self._pieces = pieces
        sizes = [len(piece) if isinstance(piece, bytes) else piece[1] - piece[0] for piece in pieces]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: int(self._ends[-1])}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        target, done = memoryview(buffer).cast("B"), 0
        index = int(np.searchsorted(self._ends, self._position, side="right"))
        while done < len(target) and index < len(self._pieces):
            piece, end = self._pieces[index], int(self._ends[index])
            wanted = min(len(target) - done, end - self._position)
            if isinstance(piece, bytes):
                start = len(piece) - (end - self._position)
                read = piece[start : start + wanted]
            else:
                self._file.seek(piece[1] - (end - self._position))
                read = self._file.read(wanted)
            target[done : done + len(read)] = read
            done += len(read)
            self._position += len(read)
            if len(read) < wanted:
                break  # the file has become shorter
            index += 1
        return done

    def close(self) -> None:
        self._file.close()
        super().close()


# ---------------------------------------------------------------------------------------------------------- containers


def _layout_of(file: BinaryIO) -> Layout:
    """Where the audio of a file is, for the kinds whose own words on it are not to be trusted."""
    size = file.seek(0, io.SEEK_END)
    start = _behind_id3(file, 0)
    head = _read_at(file, start, 12)
    if head[:4] == b"fLaC":
        return _flac(file, start, size)
    if head[:4] == b"OggS":
        return _ogg(file, start, size)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"FORM"):
        return _riff(file, size, head[:4])
    if head[:4] == b"caff":
        return _caf(file, size)
    if head[:4] == b"riff":
        return _w64(file, size)
    if head[:4] in (b".snd", b"dns."):
        return _au(file, size, ">" if head[:4] == b".snd" else "<")
    if head[:7] == b"NIST_1A":
        return _nist(file, size)
    if start or _MpegFrame.at(_read_at(file, start, 4)) or Path(file.name).suffix.lower() == ".mp3":
        return _mpeg(file, start, size)
    return Layout()


def _read_at(file: BinaryIO, position: int, size: int) -> bytes:
    file.seek(position)
    return file.read(size)


def _only_zeros(file: BinaryIO, position: int) -> bool:
    """Whether nothing else follows up to the end of the file."""
    file.seek(position)
    return not any(read.strip(b"\0") for read in iter(lambda: file.read(2**20), b""))


def _behind_id3(file: BinaryIO, position: int) -> int:
    """Where tags of ID3v2 end that begin here; those that end behind the file have a length that is wrong."""
    size = file.seek(0, io.SEEK_END)
    while (head := _read_at(file, position, 10))[:3] == b"ID3" and len(head) == 10:
        length = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        end = position + 10 + length + (10 if head[5] & 0x10 else 0)
        position = end if end <= size else position + 10
    return position


_FLAC_START = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")
"""Where a stream begins: its name, and the block that must come first."""


def _flac(file: BinaryIO, start: int, size: int) -> Layout:
    """Streams without their own word on their length, which libsndfile would take for an order."""
    starts = list(_find(file, _FLAC_START, 8, start))
    if not starts or starts[0] != start:
        return Layout()
    parts = []
    for begin, end in zip(starts, [*starts[1:], size]):
        info = _read_at(file, begin, 42)
        if len(info) < 42:
            continue
        declared = (info[21] & 0x0F) << 32 | int.from_bytes(info[22:26], "big")
        tail = _read_at(file, max(begin + 42, end - _FLAC_TAIL), min(_FLAC_TAIL, end - begin - 42))
        ends = _flac_ends(tail, int.from_bytes(info[8:10], "big"))
        counted = declared if declared and declared == max(ends, default=0) else None
        parts.append(Part([_flac_header(info, 0), (begin + 42, end)], declared or None, counted))
    return Layout(parts or None)


def _flac_header(info: bytes, samples: int) -> bytes:
    """The block that comes first, with another number of samples; 0 is for unknown."""
    return info[:21] + bytes([info[21] & 0xF0 | samples >> 32]) + (samples & 0xFFFFFFFF).to_bytes(4, "big") + info[26:]


_FLAC_TAIL = 2**18
"""Bytes, of more than a frame as a rule."""


def _flac_ends(tail: bytes, block_size: int) -> list[int]:
    """At which samples the frames end whose headers are in ``tail``: two bytes, checked by a CRC-8, look like one."""
    ends = []
    for match in re.finditer(rb"\xff[\xf8\xf9]", tail):
        header = tail[match.start() : match.start() + 16].ljust(16, b"\0")
        size, rate = header[2] >> 4, header[2] & 15
        ones = 8 - (header[4] ^ 0xFF).bit_length()  # of a number as in UTF-8, in 1 to 7 bytes
        if size == 0 or rate == 15 or header[3] >> 4 > 10 or header[3] & 1 or ones in (1, 8):
            continue
        place = 4 + max(ones, 1)
        number = header[4] & (0x7F >> ones)
        for byte in header[5:place]:
            number = number << 6 | byte & 0x3F
        if size in (6, 7):
            samples = int.from_bytes(header[place : place + size - 5], "big") + 1
            place += size - 5
        else:
            samples = 192 if size == 1 else 576 << size - 2 if size < 6 else 256 << size - 8
        place += {12: 1, 13: 2, 14: 2}.get(rate, 0)
        if place < 16 and _crc8(header[:place]) == header[place]:
            ends.append((number if header[1] & 1 else number * block_size) + samples)
    return ends


def _crc8(data: bytes) -> int:
    remainder = 0
    for byte in data:
        remainder ^= byte
        for _ in range(8):
            remainder = (remainder << 1 ^ (0x07 if remainder & 0x80 else 0)) & 0xFF
    return remainder


def _find(file: BinaryIO, pattern: re.Pattern[bytes], length: int, start: int) -> Iterator[int]:
    """Where a pattern of so many bytes stands from ``start`` on."""
    file.seek(start)
    before = b""
    position = start
    while read := file.read(2**20):
        data = before + read
        yield from (position - len(before) + match.start() for match in pattern.finditer(data))
        position += len(read)
        before = data[1 - length :]


@dataclass
class _OggStream:
    """One of the streams of an Ogg file, as far as it has been read.

    Attributes:
        number: of its last page.
        place: where that is.
        page: the same, as bytes, unless it says itself that it is the last.
    """

    number: int
    place: int
    page: bytes | None


def _ogg(file: BinaryIO, start: int, size: int) -> Layout:
    """The links of a chain: streams that begin after others have begun and gone on.

    A stream that its recorder did not come to end has no page that says so, without which libsndfile reads no Opus.
    """
    links: list[tuple[int, dict[bytes, _OggStream]]] = [(start, {})]
    layout = Layout()
    position, beginning, lost = start, True, 0
    while len(head := _read_at(file, position, 27)) == 27:
        if head[:4] != b"OggS":
            found = next(_find(file, re.compile(b"OggS"), 4, position), None)
            layout.problems.append(f"has bytes at {position} that are no page of an Ogg file: they are skipped")
            if found is None:
                break
            position = found
            continue
        table = file.read(head[26])
        page = head + table + file.read(sum(table))
        end = position + len(page)
        if len(table) < head[26] or len(page) < 27 + len(table) + sum(table):
            layout.problems.append("ends in the middle of a page: it was cut off")
            break
        if _ogg_checked(page) != page:  # libsndfile leaves it out
            position = end
            continue
        begins = bool(head[5] & 2)
        if begins and not beginning:
            links.append((position, {}))
        beginning = begins
        streams, serial, number = links[-1][1], head[14:18], int.from_bytes(head[18:22], "little")
        before = streams.get(serial)
        lost += 0 if before is None else max(0, number - before.number - 1)
        streams[serial] = _OggStream(number, position, None if head[5] & 4 else page)
        position = end
    if lost:
        layout.problems.append(f"lacks {lost} of its pages, or they are damaged: their audio is lost")
    elif not layout.problems and any(stream.page for _, streams in links for stream in streams.values()):
        layout.problems.append("has a stream without an end: it was cut off, or never finished")
    layout.parts = []
    for (begin, streams), (end, _) in zip(links, [*links[1:], (size, {})]):
        pieces: list[tuple[int, int] | bytes] = []
        for place, page in sorted((stream.place, stream.page) for stream in streams.values() if stream.page):
            ended = _ogg_checked(page[:5] + bytes([page[5] | 4]) + page[6:])
            pieces += [(begin, place), ended]
            begin = place + len(page)
        layout.parts.append(Part([*pieces, (begin, end)], seekable=not lost))
    return layout


_REVERSED = bytes(sum((byte >> bit & 1) << 7 - bit for bit in range(8)) for byte in range(256))


def _ogg_checked(page: bytes) -> bytes:
    """The page with the checksum that is right: a CRC-32 with the bits in another order than that of zlib."""
    data = page[:22] + bytes(4) + page[26:]
    remainder = zlib.crc32(data.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return page[:22] + remainder.to_bytes(4, "big").translate(_REVERSED) + page[26:]


@dataclass(frozen=True)
class _Chunks:
    """How a kind of container names its chunks and says how long they are.

    Attributes:
        head: name and length.
        align: chunks begin at multiples of this.
        counts_head: whether the length is that of the head, too.
    """

    head: struct.Struct
    align: int = 2
    counts_head: bool = False

    def walk(self, file: BinaryIO, position: int, size: int) -> Iterator[tuple[bytes, int, int]]:
        """Of chunks one after another: name, where the contents begin, and their length."""
        while position + self.head.size <= size:
            name, length = self.head.unpack(_read_at(file, position, self.head.size))
            length -= self.head.size * self.counts_head
            position += self.head.size
            yield name, position, length
            if length < 0:
                return
            position += length + -length % self.align

    def may_begin(self, file: BinaryIO, position: int, size: int) -> bool:
        """Whether a chunk may begin here: a name in letters, and a length that fits; or zeros, which some add.

        Eight zeros are not enough for that: recordings begin with silence, and have some in between.
        """
        if _only_zeros(file, position):
            return True
        name, begin, length = next(self.walk(file, position, size), (b"\0", 0, 0))
        return name[:4].isascii() and name[:4].decode().isprintable() and 0 <= length <= size - begin


def _replaced(size: int, position: int, value: bytes) -> list[tuple[int, int] | bytes]:
    """All of a file, with a value in place of what is there."""
    return [(0, position), value, (position + len(value), size)]


def _riff(file: BinaryIO, size: int, kind: bytes) -> Layout:
    """Audio to the end of the file where a recorder has not come to write its length (or could not, beyond 4 GiB)."""
    chunks = _Chunks(struct.Struct("<4sI" if kind in (b"RIFF", b"RF64") else ">4sI"))
    long = 0  # where RF64 has the length of its audio, in 64 bits
    for name, begin, length in chunks.walk(file, 12, size):
        if name == b"ds64":
            long = begin + 8
        if name not in (b"data", b"SSND"):
            continue
        place, value = begin - 4, b"\xff" * 4
        if long and length == 0xFFFFFFFF:
            place, value = long, struct.pack("<Q", size - begin)
            length = int.from_bytes(_read_at(file, long, 8), "little")
        ends = (begin + length + length % 2, begin + length)  # some leave out the byte that makes lengths even
        if size - 1 <= ends[0] < 2**63 or any(chunks.may_begin(file, end, size) for end in ends if end < size):
            break
        return Layout([Part(_replaced(size, place, value))])
    return Layout()


def _caf(file: BinaryIO, size: int) -> Layout:
    """Audio to the end of the file where its length is -1 or wrong, neither of which libsndfile reads."""
    chunks = _Chunks(struct.Struct(">4sq"), align=1)
    for name, begin, length in chunks.walk(file, 8, size):
        if name != b"data":
            continue
        there, end = size - begin, begin + length
        if length == there or (0 <= length < there and chunks.may_begin(file, end, size)):
            break
        promised = length / there if there < length < _UNKNOWN_SAMPLES else 1.0
        return Layout([Part(_replaced(size, begin - 8, struct.pack(">q", there)), promised=promised)])
    return Layout()


def _w64(file: BinaryIO, size: int) -> Layout:
    """Audio without the chunks behind it, which libsndfile takes for audio."""
    chunks = _Chunks(struct.Struct("<16sq"), align=8, counts_head=True)
    for name, begin, length in chunks.walk(file, 40, size):
        if name[:4] != b"data":
            continue
        end = begin + length + -length % 8
        if length >= 0 and end < size and chunks.may_begin(file, end, size):
            return Layout([Part([(0, begin + length)])])
        break
    return Layout()


def _au(file: BinaryIO, size: int, order: str) -> Layout:
    """Audio to the end of the file, or to zeros: nothing else may be behind the header."""
    begin, length = struct.unpack(f"{order}2I", _read_at(file, 4, 8).ljust(8, b"\0"))
    end = begin + length
    if (end >= size and length < _UNKNOWN) or (end < size and _only_zeros(file, end)):
        return Layout()
    return Layout([Part(_replaced(size, 8, b"\xff" * 4))])


def _nist(file: BinaryIO, size: int) -> Layout:
    """Its header's count of samples, which libsndfile does not look at."""
    count = re.search(rb"^sample_count -i (\d+)", _read_at(file, 0, 1024), re.MULTILINE)
    return Layout([Part([(0, size)], int(count[1]) if count else None)])


# ---------------------------------------------------------------------------------------------------------------- MPEG


@dataclass(frozen=True)
class _MpegFrame:
    """The header of a frame of MPEG audio, without which no decoder knows where the next one begins."""

    header: bytes
    version: int  # 3 is MPEG 1, 2 is MPEG 2, 0 is MPEG 2.5
    layer: int
    sampling_rate: int
    mono: bool
    size: int

    @classmethod
    def at(cls, header: bytes) -> _MpegFrame | None:
        """The frame that begins with these four bytes, if one does."""
        if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
            return None
        version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)
        bitrate, rate, padding = header[2] >> 4, header[2] >> 2 & 3, header[2] >> 1 & 1
        if version == 1 or layer == 4 or bitrate in (0, 15) or rate == 3:
            return None
        kilobits = _KILOBITS[version == 3, layer][bitrate - 1]
        sampling_rate = _RATES[rate] >> {3: 0, 2: 1, 0: 2}[version]
        if layer == 1:
            size = (12_000 * kilobits // sampling_rate + padding) * 4
        else:
            slots = 72_000 if layer == 3 and version != 3 else 144_000
            size = slots * kilobits // sampling_rate + padding
        return cls(header, version, layer, sampling_rate, header[3] >> 6 == 3, size)

    @property
    def kind(self) -> tuple[int, int, int, bool]:
        """What does not change within a stream."""
        return self.version, self.layer, self.sampling_rate, self.mono

    @property
    def samples(self) -> int:
        """Of a channel."""
        return {1: 384, 2: 1152, 3: 1152 if self.version == 3 else 576}[self.layer]

    @property
    def tag_place(self) -> int:
        """Where ``Xing`` stands in a frame that has no audio but counts the others: behind the side information."""
        return (
            4
            + {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}[self.version == 3, self.mono]
        )


_MPEG_START = 2**20
"""Bytes, in which the first frame must begin."""

_RATES = (44_100, 48_000, 32_000)
_KILOBITS = {
    (True, 1): tuple(range(32, 449, 32)),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""By whether it is MPEG 1, and the layer."""


class _Window:
    """A file read at rising positions, in large pieces."""

    def __init__(self, file: BinaryIO):
        self._file, self._start, self._data = file, 0, b""

    def get(self, position: int, length: int) -> bytes:
        begin = position - self._start
        if begin < 0 or begin + length > len(self._data):
            self._start, self._data = position, _read_at(self._file, position, max(length, 2**20))
            begin = 0
        return self._data[begin : begin + length]


def _mpeg(file: BinaryIO, start: int, size: int) -> Layout:
    """Frames without what stands between them, under a frame that counts them.

    A decoder guesses the length of a file without such a frame from the first bitrate, and ends at the count of the
    first of several.
    """
    window = _Window(file)
    parts: list[tuple[_MpegFrame, int, list[tuple[int, int]]]] = []
    counts: list[int | None] = []  # of the frames that count, None for one that does not tell
    position, skipped, trailing = start, 0, 0
    first = None  # where the first frame is
    while position < size and (parts or position < start + _MPEG_START):
        frame = _MpegFrame.at(window.get(position, 4))
        known = bool(parts) and trailing == 0 and frame is not None and frame.kind == parts[-1][0].kind
        if frame is None or not (known or _follows(window, frame, position, size)):
            after = _behind_tags(file, window, position, size)
            if after is None:  # to the next byte that may begin a frame
                ahead = window.get(position + 1, 4096)
                step = ahead.find(b"\xff") + 1 or len(ahead) + 1
                trailing, after = trailing + step, position + step
            position = after
            continue
        first = position if first is None else first
        skipped += trailing if parts else 0
        trailing = 0
        end = min(position + frame.size, size)
        tagged, count = _count_of(window.get(position, frame.tag_place + 12), frame)
        if tagged:
            counts.append(count)
        elif not parts or parts[-1][0].kind != frame.kind:
            parts.append((frame, 1, [(position, end)]))
        else:
            first_frame, number, runs = parts[-1]
            if runs[-1][1] == position:
                runs[-1] = (runs[-1][0], end)
            else:
                runs.append((position, end))
            parts[-1] = (first_frame, number + 1, runs)
        position = end
    if not parts:
        return Layout()
    layout = Layout()
    if skipped:
        layout.problems.append(f"has {skipped} bytes between its frames that are no audio: they are skipped")
    number = sum(count for _, count, _ in parts)
    if len(parts) == len(counts) == 1 and counts[0] is not None and counts[0] >= number and not skipped:
        if counts[0] > number + 2:  # some count themselves
            frame = parts[0][0]
            there, promised = (count * frame.samples / frame.sampling_rate for count in (number, counts[0]))
            layout.problems.append(f"ends after {there:.2f} s, but promises {promised:.2f} s: it was cut off")
        if first != start:
            layout.parts = [Part([(first or 0, size)])]
        return layout
    # the first frames may need what was before them
    layout.parts = [
        Part([_counting(frame, count), *runs], max(0, count - 4) * frame.samples) for frame, count, runs in parts
    ]
    return layout


def _follows(window: _Window, frame: _MpegFrame, position: int, size: int) -> bool:
    """Whether a frame is followed by another of its kind, or by the end: two bytes look like a header by chance."""
    after = _MpegFrame.at(window.get(position + frame.size, 4))
    return position + frame.size == size or (after is not None and after.kind == frame.kind)


def _behind_tags(file: BinaryIO, window: _Window, position: int, size: int) -> int | None:
    """The end of tags that begin here, or None."""
    head = window.get(position, 32)
    if head[:3] == b"ID3":
        return _behind_id3(file, position)
    if head[:3] == b"TAG" and position == size - 128:
        return size
    if head[:8] == b"APETAGEX" and len(head) == 32:
        length, flags = struct.unpack("<I", head[12:16])[0], struct.unpack("<I", head[20:24])[0]
        return position + 32 + (length if flags >> 29 & 1 else 0)
    return None


def _count_of(data: bytes, frame: _MpegFrame) -> tuple[bool, int | None]:
    """Whether this frame has no audio but counts the others, and how many there are."""
    place = frame.tag_place
    if frame.layer == 3 and data[place : place + 4] in (b"Xing", b"Info"):
        flags, count = struct.unpack(">II", data[place + 4 : place + 12].ljust(8, b"\0"))
        return True, count if flags & 1 else None
    return frame.layer == 3 and data[36:40] == b"VBRI", None


def _counting(frame: _MpegFrame, count: int) -> bytes:
    """A frame that counts ``count`` others, for layer 3; others need none, as theirs are all of one size."""
    if frame.layer != 3:
        return b""
    tag = b"Xing" + struct.pack(">II", 1, count)
    for bitrate in range(1, 15):  # the first that has room; the last one always has
        header = bytes([frame.header[0], frame.header[1] | 1, bitrate << 4 | frame.header[2] & 0x0C, frame.header[3]])
        made = _MpegFrame.at(header)
        if made is not None and made.size >= frame.tag_place + 12:
            return (header + bytes(frame.tag_place - 4) + tag).ljust(made.size, b"\0")
    return b""


# ------------------------------------------------------------------------------------------------------------- downmix


SILENT = 1e-4
"""A channel of less of the loudest one's power (40 dB) has no part in a mix."""

CANCELLED = 0.25
"""Channels cancel each other out where their mix has less of the power that it would have if they were independent."""

LOST = 0.05
"""The share of the power in seconds like that, beyond which channels are not mixed."""


def downmix(file: AudioFile) -> Callable[[Block], Float32[np.ndarray, "samples"]]:
    """How blocks of a file become mono: the mean of the channels that are not silent.

    Where they cancel each other out (one is the other inverted, for one), the loudest is heard alone, and a warning
    says so. The file is read once for that if it has more than one channel.
    """
    if file.channels == 1:
        return lambda block: block[:, 0]
    power, lost = np.zeros(file.channels), 0.0
    for block in file.blocks(told=False):
        for start in range(0, len(block), file.sampling_rate):
            second = block[start : start + file.sampling_rate].astype(np.float64)
            energies = np.square(second).sum(axis=0)
            power += energies
            if np.square(second.sum(axis=1)).sum() < CANCELLED * energies.sum():
                lost += energies.sum()
    loudest = int(power.argmax())
    heard = power > SILENT * power[loudest]
    if lost > LOST * power.sum():
        warnings.warn(
            f"{str(file.path)!r} has channels that cancel each other out when they are mixed: channel {loudest + 1} "
            f"of {file.channels} is heard alone",
            stacklevel=3,
        )
        return lambda block: block[:, loudest]
    return lambda block: block[:, heard].mean(axis=1) if heard.any() else block[:, 0]


def mix_crops(
    crops: Float32[np.ndarray, "rows channels samples"],
) -> Float32[np.ndarray, "rows samples"]:
    """The mean of the channels of each row, or the loudest alone where they cancel each other out."""
    energies = np.square(crops, dtype=np.float64).sum(axis=-1)
    cancelled = np.square(crops.sum(axis=1), dtype=np.float64).sum(axis=-1) < CANCELLED * energies.sum(axis=-1)
    loudest = crops[np.arange(len(crops)), energies.argmax(axis=-1)]
    return np.where(cancelled[:, None], loudest, crops.mean(axis=1))


def read_mono(path: Path, sampling_rate: int, longest: float) -> Float32[np.ndarray, "samples"]:
    """A file as mono at ``sampling_rate``; see :func:`downmix`. Resampling is soxr's high quality.

    Args:
        path: of the file.
        sampling_rate: in hertz.
        longest: seconds; more are refused.

    Raises:
        ValueError: as :class:`AudioFile`; it is empty, or longer. Messages begin with the name.
    """
    import soxr

    file = AudioFile(path, longest)
    mix = downmix(file)
    rate = file.sampling_rate
    resampler = None if rate == sampling_rate else soxr.ResampleStream(rate, sampling_rate, 1, dtype="float32")
    made, length = [], 0
    for block in file.blocks():
        length += len(block)
        mono = mix(block)
        made.append(mono if resampler is None else resampler.resample_chunk(mono))
    if not length:
        raise ValueError(f"{str(path)!r} holds no samples; give a file with at least one")
    if resampler is not None:
        made.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
    return np.ascontiguousarray(np.concatenate(made), dtype=np.float32)
