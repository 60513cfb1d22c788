"""Recordings -> prepared dataset.

Every row of a batch is a stream of its own in Mimi's streaming encoder: a slot hears a recording block by block, and
goes on with the next recording while its neighbours are still at theirs. So there is one compiled program, no block is
padding but a recording's last, memory does not grow with the length, and the codes are those of the whole recording
(Mimi is causal).

The lines of the manifest are dealt to shards by their place. A shard is written, as one commit, when all its lines are
done; what was killed goes on with the shards that are not there. A shard that is damaged, or that skipped a recording
whose files have changed since, is made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Int
from transformers import MoshiConfig, PreTrainedTokenizerBase

from ...checkpoints.formats import parse_json
from ...checkpoints.writing import write_text
from ...models.mimi import FlaxMimiModel
from ...models.mimi.topology import samples_per_frame
from .alignment import MAIN_SPEAKER, AlignedText, Word, align_words, parse_words
from .prepared import (
    INDEX,
    SETTINGS,
    SHARDS,
    VERSION,
    Conversation,
    contents_of,
    is_whole,
    write_index,
    write_shard,
)
from .recordings import BadRecording, Block, Listed, read_blocks, words_path

REPORT = "report.json"

_BLOCK_FRAMES = 25
"""Heard at once; SEANet's first layers need 0.5 MB a frame and channel."""

_NOT_HEARD = ("decoder", "upsample")
"""Parts of Mimi that have no say in the codes."""


@dataclass(frozen=True)
class Report:
    """What has been prepared.

    Attributes:
        conversations: in the dataset.
        frames, seconds: of all of them.
        speakers: how many words each label has in the dataset.
        pieces, late_pieces: of the text; and how many of these stand behind their turn, as words before them had more
            pieces than frames.
        largest_lag: the most seconds that a piece is behind its turn.
        skipped: recordings that are not in it: ``path`` and ``reason``.
        incomplete: by path, recordings of which not all audio could be had, and why: they were cut off, are damaged
            in places, or have parts that cannot be read.
        remarks: for recordings that are in it, by path, how many words or pieces of them are not, and why.
        without_moshi: by path, recordings in which Moshi has no word, and how many words each other label has there.
        lags: by path, recordings with late pieces: ``pieces``, ``late_pieces`` and ``largest_lag``, as above.
        resumed: how many of the recordings were done by an earlier run.
        redone: shards of an earlier run that were made again, and why.
    """

    conversations: int = 0
    frames: int = 0
    seconds: float = 0.0
    speakers: dict[str, int] = field(default_factory=dict)
    pieces: int = 0
    late_pieces: int = 0
    largest_lag: float = 0.0
    skipped: list[dict[str, str]] = field(default_factory=list)
    incomplete: dict[str, list[str]] = field(default_factory=dict)
    remarks: dict[str, dict[str, int]] = field(default_factory=dict)
    without_moshi: dict[str, dict[str, int]] = field(default_factory=dict)
    lags: dict[str, dict[str, int | float]] = field(default_factory=dict)
    resumed: int = 0
    redone: dict[str, str] = field(default_factory=dict)


class UnusableFolder(ValueError):
    """The dataset cannot be made in this folder."""


class SettingsDiffer(UnusableFolder):
    """The folder holds what was made from something else."""


class NoMainSpeaker(ValueError):
    """The recordings have words, none of which is Moshi's."""


def prepare(
    manifest: Path,
    out: Path,
    *,
    mimi: FlaxMimiModel,
    config: MoshiConfig,
    tokenizer: PreTrainedTokenizerBase,
    pad_token_id: int = 3,
    end_of_pad_token_id: int = 0,
    main_speaker: str = MAIN_SPEAKER,
    whitespace_before_word: bool = True,
    batch_size: int = 8,
    workers: int = 4,
    recordings_per_shard: int = 64,
    advance: Callable[[int], None] = lambda done: None,
) -> Report:
    """Encode the recordings of a manifest; go on where an earlier call was interrupted.

    Shards that are there are read and compared with their checksums.

    Args:
        manifest: JSON lines, ``{"path": …}``, relative to the manifest; other keys are not looked at. Beside each
            stereo file (left Moshi, right user) a JSON of the same name has ``alignments``, a list of
            ``[word, [start, end], speaker]``. There is text of the user where there are words of other speakers than
            ``main_speaker``.
        out: folder of the dataset, made if it is not there.
        mimi: the codec, in float32.
        config: of the Moshi that is to be trained; its ``num_codebooks`` first codebooks are kept.
        tokenizer: of Moshi's text.
        pad_token_id, end_of_pad_token_id: of frames without a new piece, and of the last one before a word.
        main_speaker: the label of Moshi's words.
        whitespace_before_word: False for languages that are written without spaces, whose words are then encoded
            without the one that the tokenizer puts before a text.
        batch_size: recordings at once.
        workers: threads that read audio.
        recordings_per_shard: how many are done, or redone, at once.
        advance: told how many more recordings are done.

    Returns:
        What there is, and what was skipped; also written to ``report.json``.

    Raises:
        SettingsDiffer: ``out`` was begun with another model, manifest or number per shard.
        UnusableFolder: another process is at work on ``out``.
        NoMainSpeaker: the recordings have words, and none is of ``main_speaker``; told before any is encoded.
        ValueError: a manifest that is empty or no JSON lines; numbers below 1; a model whose codes or text do not fit
            ``config``.
        OSError: a place that cannot be read or written.
    """
    _check_numbers(batch_size=batch_size, workers=workers, recordings_per_shard=recordings_per_shard)
    listed = read_manifest(manifest)
    settings = _settings(
        manifest,
        mimi,
        config,
        tokenizer,
        pad_token_id,
        end_of_pad_token_id,
        main_speaker,
        whitespace_before_word,
        recordings_per_shard,
    )
    out.mkdir(parents=True, exist_ok=True)
    with _only_one(out):
        _check_main_speaker(out, listed, main_speaker)
        _check_settings(out, settings)
        shards = _in_shards(listed, recordings_per_shard)
        reasons = {number: _why_open(out, number, shard) for number, shard in enumerate(shards)}
        open_shards = {number: shard for number, shard in enumerate(shards) if reasons[number] is not None}
        redone = {SHARDS.format(number): reason for number, reason in reasons.items() if reason}
        if open_shards:
            (out / INDEX).unlink(missing_ok=True)  # it is of other shards
        resumed = len(listed) - sum(len(shard.listed) for shard in open_shards.values())
        advance(resumed)
        dtype = np.int16 if max(config.vocab_size, config.audio_vocab_size) <= 2**15 else np.int32
        encoder = _Encoder(mimi, config.num_codebooks, batch_size, dtype)
        text = _Text(
            tokenizer,
            encoder.frame_rate,
            config.vocab_size,
            config.audio_vocab_size,
            pad_token_id,
            end_of_pad_token_id,
            main_speaker,
            whitespace_before_word,
        )
        work = [(number, item) for number, shard in open_shards.items() for item in shard.listed]
        with ThreadPoolExecutor(workers) as pool, jax.default_matmul_precision("highest"):
            for number, item, files, heard in encoder.run(work, pool, standby=workers):
                shards[number].add(item, files, heard, text)
                advance(1)
                if shards[number].is_whole:
                    write_shard(out, number, *shards[number].contents(), dtype)
                    shards[number].forget()
        write_index(out, settings, len(shards))
        report = _report(out, len(shards), encoder.frame_rate, main_speaker, resumed, redone)
        write_text(out / REPORT, _as_json(report))
    return report


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"`{name}` is {value}, but must be at least 1")


def read_manifest(manifest: Path) -> list[Listed]:
    """The lines of a manifest.

    Raises:
        ValueError: a line that is no JSON object with a ``path``, a path that is there twice, or no lines.
        OSError: it cannot be read.
    """
    listed: dict[str, Listed] = {}
    # a text may have what else str.splitlines() takes for the end of a line
    for number, line in enumerate(manifest.read_text("utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            path = parse_json(line)["path"]
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{str(manifest)!r}, line {number}: must be a JSON object with a `path` ({error})"
            ) from error
        if not isinstance(path, str) or not path:
            raise ValueError(f"{str(manifest)!r}, line {number}: `path` must be the name of a file, got {path!r}")
        try:
            path.encode()
        except UnicodeEncodeError as error:  # nor can it be the name of an array
            raise ValueError(f"{str(manifest)!r}, line {number}: {path!r} is no text ({error}); rename it") from error
        if path in listed:
            raise ValueError(f"{str(manifest)!r}, line {number}: {path!r} is there twice; leave one out")
        listed[path] = Listed(path, manifest.parent / path)
    if not listed:
        raise ValueError(f"{str(manifest)!r} has no lines; list at least one recording")
    return list(listed.values())


# ----------------------------------------------------------------------------------------------------------- settings


def _settings(
    manifest: Path,
    mimi: FlaxMimiModel,
    config: MoshiConfig,
    tokenizer: PreTrainedTokenizerBase,
    pad_token_id: int,
    end_of_pad_token_id: int,
    main_speaker: str,
    whitespace_before_word: bool,
    recordings_per_shard: int,
) -> dict[str, Any]:
    """All that the contents of a dataset depend on."""
    codebooks, entries = mimi.config.num_quantizers, mimi.config.codebook_size
    if codebooks < config.num_codebooks or entries > config.audio_vocab_size:
        raise ValueError(
            f"`mimi` has {codebooks} codebooks of {entries} codes, but `config` wants {config.num_codebooks} of "
            f"{config.audio_vocab_size}; take the codec of this Moshi"
        )
    weights = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(mimi.params, sep="/").items()):
        if not path.startswith(_NOT_HEARD):
            weights.update(path.encode())
            weights.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    codec = json.loads(mimi.config.to_json_string())
    # where it was read, and with what
    for key in ("_name_or_path", "transformers_version"):
        codec.pop(key, None)
    weights.update(json.dumps(codec, sort_keys=True).encode())
    return {
        "version": VERSION,
        "manifest": hashlib.sha256(manifest.read_bytes()).hexdigest(),
        "codec": weights.hexdigest(),
        "tokenizer": hashlib.sha256(_rules(tokenizer).encode()).hexdigest(),
        "pad_token_id": pad_token_id,
        "end_of_pad_token_id": end_of_pad_token_id,
        "main_speaker": main_speaker,
        "whitespace_before_word": whitespace_before_word,
        "vocab_size": config.vocab_size,
        "audio_vocab_size": config.audio_vocab_size,
        "num_codebooks": config.num_codebooks,
        "recordings_per_shard": recordings_per_shard,
    }


def _rules(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the ids of a text depend on, as far as the tokenizer tells."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps(sorted(tokenizer.get_vocab().items()))
    # what a call truncates or pads stays noted in it
    rules = {key: value for key, value in json.loads(backend.to_str()).items() if key not in ("truncation", "padding")}
    return json.dumps(rules)


def _check_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Note the settings down in a new folder, or compare them with what is noted there."""
    path = out / SETTINGS
    if not path.is_file():
        if (out / INDEX).exists() or any(out.glob(SHARDS.format(0).replace("00000", "*"))):
            raise SettingsDiffer(f"{str(out)!r} has shards but no {SETTINGS}; give another folder")
        write_text(path, json.dumps(settings, indent=2) + "\n")
        return
    try:
        noted = parse_json(path.read_bytes())
    except ValueError as error:
        raise SettingsDiffer(f"{str(path)!r} is damaged ({error}); give another folder") from error
    different = [name for name in settings if noted.get(name) != settings[name]]
    if different:
        raise SettingsDiffer(
            f"{str(out)!r} was begun with another {', '.join(different)}; give another folder, or remove this one"
        )


@contextlib.contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Keeps other processes from ``out``; the lock goes with the process, however it ends."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UnusableFolder(f"{str(out)!r} is being prepared by another process; wait for it") from error
        # nobody else is at work, so these are of a process that was killed
        for leftover in out.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)


# --------------------------------------------------------------------------------------------------------------- text


WORD_START = "▁"
"""How a piece begins that begins a word, in SentencePiece's vocabularies."""


@dataclass(frozen=True)
class _Text:
    """Makes text ids of words."""

    tokenizer: PreTrainedTokenizerBase
    frame_rate: float
    vocab_size: int
    audio_vocab_size: int
    pad_token_id: int
    end_of_pad_token_id: int
    main_speaker: str
    whitespace_before_word: bool

    def _encode(self, text: str) -> list[int]:
        pieces = self.tokenizer.encode(text, add_special_tokens=False)
        if self.whitespace_before_word or not pieces:
            return pieces
        return _without_whitespace(pieces, self.tokenizer)

    def align(self, words: Sequence[Word], frames: int) -> AlignedText:
        return align_words(
            words,
            frames,
            self._encode,
            frame_rate=self.frame_rate,
            pad_token_id=self.pad_token_id,
            end_of_pad_token_id=self.end_of_pad_token_id,
        )


def _without_whitespace(pieces: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The pieces of a word without the space that the first of them begins with."""
    first, rest = tokenizer.convert_ids_to_tokens(pieces[0]), list(pieces[1:])
    if not first.startswith(WORD_START):
        return [pieces[0], *rest]
    vocabulary = tokenizer.get_vocab()
    name = first.removeprefix(WORD_START)
    if not name:
        return rest
    # the piece without a space, or else its characters
    names = next((found for found in ([name], list(name)) if all(piece in vocabulary for piece in found)), [first])
    return [vocabulary[piece] for piece in names] + rest


def read_words(audio: Path) -> tuple[list[Word], Counter[str]]:
    """The words in the JSON beside a recording, and how many entries are left out, and why.

    Raises:
        BadRecording: there is none, or it is no such JSON.
    """
    path = words_path(audio)
    left_out: Counter[str] = Counter()
    try:
        content = parse_json(path.read_bytes())
        if "alignments" not in content:
            there = f", but {', '.join(sorted(content))}" if content else ""
            raise BadRecording(
                f"{path.name} has no `alignments`{there:.80}; give them as a list of [word, [start, end], speaker]"
            )
        return parse_words(content["alignments"], left_out), left_out
    except OSError as error:
        raise BadRecording(f"there is no {path.name} with alignments beside it ({error.strerror})") from error
    except BadRecording:
        raise
    except ValueError as error:
        raise BadRecording(f"{path.name}: {error}") from error


def _check_main_speaker(out: Path, listed: Iterable[Listed], main_speaker: str) -> None:
    """Raises :class:`NoMainSpeaker`; as a rule the first recording has a word of Moshi's, and no other is read."""
    found: Counter[str] = Counter()
    for item in listed:
        with contextlib.suppress(BadRecording):  # which is told later
            found.update(word.speaker for word in read_words(item.path)[0])
        if main_speaker in found:
            return
    if not found:
        return
    if not (out / SETTINGS).exists():
        write_text(out / REPORT, _as_json(Report(speakers=dict(found))))
    raise NoMainSpeaker(
        f"no word of the recordings is of {main_speaker!r}, so that Moshi would never speak; their labels are "
        f"{_counted(found)}: name that of the left channel"
    )


def _counted(speakers: Mapping[str, int], most: int = 8) -> str:
    """Such as ``"'SPEAKER_00' (12 words), 'SPEAKER_01' (9 words)"``."""
    ordered = sorted(speakers.items(), key=lambda entry: -entry[1])
    named = [f"{label!r} ({count} word{'s' * (count != 1)})" for label, count in ordered[:most]]
    return ", ".join([*named, *([f"{len(ordered) - most} more"] if len(ordered) > most else [])])


@dataclass(frozen=True)
class Heard:
    """The words of a recording, entries that are left out, what of the audio is missing, and both sides' codes."""

    words: list[Word]
    left_out: Counter[str]
    problems: list[str]
    codes: Int[np.ndarray, "2 codebooks frames"]


@dataclass
class _Shard:
    """A shard in the making."""

    listed: list[Listed]
    done: dict[str, tuple[Conversation, dict[str, Any]]] = field(default_factory=dict)
    skipped: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        return len(self.done) + len(self.skipped) == len(self.listed)

    def forget(self) -> None:
        """Free what has been written."""
        self.done, self.skipped = {}, {}

    def add(self, item: Listed, files: Sequence[Any], heard: Heard | BadRecording, text: _Text) -> None:
        """Take what became of a recording, whose files were those when it was opened."""
        if isinstance(heard, BadRecording):
            self._skip(item, files, heard)
            return
        frames = heard.codes.shape[-1]
        moshi = text.align([word for word in heard.words if word.speaker == text.main_speaker], frames)
        others = [word for word in heard.words if word.speaker != text.main_speaker]
        user = text.align(others, frames) if others else None
        sides = [moshi] if user is None else [moshi, user]
        remarks = {
            **heard.left_out,
            "words outside of the recording, or that end before they start": sum(side.misplaced for side in sides),
            "pieces after its end": sum(side.cut for side in sides),
            "pieces unknown to the tokenizer": sum(side.unknown for side in sides),
        }
        moshi_codes, user_codes = heard.codes
        user_ids = None if user is None else user.ids
        conversation = Conversation(item.id, moshi.ids, moshi_codes, user_codes, user_ids)
        try:
            conversation.check_ids(text.vocab_size, text.audio_vocab_size)
        except ValueError as error:
            self._skip(item, files, error)
            return
        self.done[item.id] = (
            conversation,
            {
                "remarks": {what: count for what, count in remarks.items() if count},
                "speakers": dict(Counter(word.speaker for word in heard.words)),
                "pieces": sum(side.pieces for side in sides),
                "late_pieces": sum(side.late for side in sides),
                "largest_lag": max(side.largest_lag for side in sides) / text.frame_rate,
                "incomplete": heard.problems,
            },
        )

    def _skip(self, item: Listed, files: Sequence[Any], error: ValueError) -> None:
        self.skipped[item.id] = {"path": item.id, "reason": str(error), "files": files}

    def contents(self) -> tuple[list[tuple[Conversation, dict[str, Any]]], list[dict[str, Any]]]:
        """For :func:`write_shard`, in the order of the manifest."""
        done = [self.done[item.id] for item in self.listed if item.id in self.done]
        return done, [self.skipped[item.id] for item in self.listed if item.id in self.skipped]


def _in_shards(listed: list[Listed], size: int) -> list[_Shard]:
    return [_Shard(listed[start : start + size]) for start in range(0, len(listed), size)]


def _why_open(out: Path, number: int, shard: _Shard) -> str | None:
    """Why a shard has to be made: None if it is done, empty if it is not there, or what is wrong with it."""
    if not (out / SHARDS.format(number)).is_file():
        return ""
    if not is_whole(out, number):
        return "it was damaged"
    skipped = {entry["path"]: entry["files"] for entry in contents_of(out, number)["skipped"]}
    for item in shard.listed:
        if item.id in skipped and item.files() != skipped[item.id]:
            return f"{item.id!r} has changed since it was skipped"
    return None


def _as_json(report: Report) -> str:
    return json.dumps(asdict(report), indent=2) + "\n"


def _report(
    out: Path, shards: int, frame_rate: float, main_speaker: str, resumed: int, redone: dict[str, str]
) -> Report:
    contents = [contents_of(out, number) for number in range(shards)]
    entries = [entry for content in contents for entry in content["conversations"]]
    frames = sum(entry["frames"] for entry in entries)
    lags = {entry["id"]: {key: entry[key] for key in ("pieces", "late_pieces", "largest_lag")} for entry in entries}
    speakers: Counter[str] = Counter()
    for entry in entries:
        speakers.update(entry["speakers"])
    return Report(
        conversations=len(entries),
        frames=frames,
        seconds=frames / frame_rate,
        speakers=dict(speakers),
        pieces=sum(lag["pieces"] for lag in lags.values()),
        late_pieces=sum(lag["late_pieces"] for lag in lags.values()),
        largest_lag=max((lag["largest_lag"] for lag in lags.values()), default=0.0),
        skipped=[
            {key: entry[key] for key in ("path", "reason")} for content in contents for entry in content["skipped"]
        ],
        incomplete={entry["id"]: entry["incomplete"] for entry in entries if entry.get("incomplete")},
        remarks={entry["id"]: entry["remarks"] for entry in entries if entry["remarks"]},
        without_moshi={entry["id"]: entry["speakers"] for entry in entries if main_speaker not in entry["speakers"]},
        lags={path: lag for path, lag in lags.items() if lag["late_pieces"]},
        resumed=resumed,
        redone=redone,
    )


# -------------------------------------------------------------------------------------------------------------- codes


class _Listener:
    """A recording on its way: its blocks, each read before it is asked for, and its codes so far."""

    def __init__(self, number: int, item: Listed, rate: int, size: int, pool: ThreadPoolExecutor):
        self.number, self.item = number, item
        self.files = item.files()
        self.words: list[Word] = []
        self.left_out: Counter[str] = Counter()
        self.codes: list[Int[np.ndarray, "2 codebooks frames"]] = []
        self.problems: list[str] = []
        self._blocks = read_blocks(item.path, rate, size, self.problems)
        self._pool = pool
        self._upcoming = pool.submit(self._begin)

    def _begin(self) -> tuple[Block, bool]:
        first = next(self._blocks)
        # before an hour is encoded for nothing
        self.words, self.left_out = read_words(self.item.path)
        return first

    def hear(self) -> tuple[Block, bool]:
        """The next block, and whether it is the last; raises :class:`BadRecording`."""
        block, last = self._upcoming.result()
        if not last:
            self._upcoming = self._pool.submit(next, self._blocks)
        return block, last


class _Encoder:
    """Mimi with slots for several recordings at once, two rows of the batch each."""

    def __init__(self, mimi: FlaxMimiModel, codebooks: int, slots: int, dtype: type[np.integer]):
        self._mimi, self._codebooks, self._slots, self._dtype = mimi, codebooks, slots, dtype
        self._rate = mimi.config.sampling_rate
        self._frame = samples_per_frame(mimi.config)
        self.frame_rate = self._rate / self._frame

    def run(
        self, work: Iterable[tuple[int, Listed]], pool: ThreadPoolExecutor, standby: int
    ) -> Iterator[tuple[int, Listed, list[list[int] | None], Heard | BadRecording]]:
        """What became of recordings, in the order in which they end.

        Args:
            work: recordings, each with a number that comes back with it.
            pool: reads audio.
            standby: how many recordings are opened before a slot is free.

        Yields:
            The number, the recording, its files as they were when it was opened, and what became of it.
        """
        size = _BLOCK_FRAMES * self._frame
        todo = iter(work)
        waiting: deque[_Listener] = deque()
        slots: list[_Listener | None] = [None] * self._slots
        state = self._mimi.init_encoder_state(2 * self._slots)
        while True:
            audio = np.zeros((self._slots, 2, size), np.float32)
            fresh = np.zeros(self._slots, dtype=bool)
            heard: dict[int, tuple[int, bool]] = {}
            for place in range(self._slots):
                while place not in heard:
                    upcoming = islice(todo, standby + 1 - len(waiting))
                    waiting.extend(_Listener(*entry, self._rate, size, pool) for entry in upcoming)
                    slot = slots[place]
                    if slot is None:
                        if not waiting:
                            break
                        slot = slots[place] = waiting.popleft()
                        fresh[place] = True
                    try:
                        block, last = slot.hear()
                    except BadRecording as error:
                        slots[place] = None
                        yield slot.number, slot.item, slot.files, error
                        continue
                    audio[place, :, : block.shape[1]] = block
                    heard[place] = -(-block.shape[1] // self._frame), last
            if not heard:
                return
            active = np.array([place in heard for place in range(self._slots)])
            if fresh.any():
                state = state.reset(np.repeat(fresh, 2))
            rows = audio.reshape(2 * self._slots, 1, size)
            state, codes = self._mimi.encode_step(state, rows, np.repeat(active, 2), num_quantizers=self._codebooks)
            coded = np.asarray(codes).reshape(self._slots, 2, self._codebooks, _BLOCK_FRAMES)
            for place, (frames, last) in heard.items():
                slot = slots[place]
                assert slot is not None
                # a copy, as a view would keep the block of all slots
                slot.codes.append(coded[place, :, :, :frames].astype(self._dtype))
                if last:
                    slots[place] = None
                    codes_of_all = np.concatenate(slot.codes, axis=-1)
                    yield (
                        slot.number,
                        slot.item,
                        slot.files,
                        Heard(slot.words, slot.left_out, slot.problems, codes_of_all),
                    )
