"""Prepared conversations -> batches, endlessly and in the same order every time.

What a batch holds depends on the seed and its number alone: :class:`BatchPlan` says which chunks are in which batch,
``grain`` makes batches ahead of the step (in a thread, or in processes), and the position is how many have been handed
out. All processes make the same plan, and each takes its own rows of every batch.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from ...models.moshi.delay_pattern import delay
from .prepared import Conversation, PreparedDataset

IGNORED = -100
"""Label of what is not predicted."""

Batch = dict[str, Int[np.ndarray, "rows *shape"]]

_ORDER, _SWAPS, USER_NOISE, MOSHI_NOISE = 0, 1, 2, 3

_GUARD = 'if __name__ == "__main__":'


class WorkerError(RuntimeError):
    """The processes that make batches cannot be started, or one has ended."""


@dataclass(frozen=True)
class Dropped:
    """What no epoch holds, because it is shorter than ``min_length``.

    Attributes:
        tails: last chunks of conversations.
        conversations: names of the conversations that are dropped whole.
        frames: of both.
    """

    tails: int
    conversations: tuple[str, ...]
    frames: int


class BatchPlan:
    """Which frames of which conversations are in which batch.

    Conversations are cut into chunks of ``max_length - 1`` frames; the last one of each is shorter, and is dropped if
    it has less than ``min_length``. With ``shuffle``, every epoch deals the chunks to batches anew. With several
    ``buckets`` a batch is dealt chunks of the same bucket, as far as they go: what is left of a bucket goes to the
    next. An epoch ends with one batch that may not be full.

    Attributes:
        chunks: in an epoch.
        frames: of all chunks.
        batches_per_epoch: the last one included.
        dropped: see :class:`Dropped`.
    """

    def __init__(
        self,
        dataset: PreparedDataset,
        *,
        batch_size: int,
        max_length: int,
        min_length: int = 1,
        buckets: Sequence[int] = (),
        seed: int = 0,
        shuffle: bool = True,
        swap_moshi_user: float = 0.0,
        user_code_noise: float = 0.0,
        moshi_code_noise: float = 0.0,
    ):
        """Plan batches.

        Args:
            dataset: what is to be trained on.
            batch_size: chunks of a batch.
            max_length: the most frames of a row, the start frame included.
            min_length: the fewest dialogue frames of a chunk.
            buckets: lengths that batches may have, ascending, the last one ``max_length``; none is that one.
            seed: of the order and the swaps.
            shuffle: False takes the chunks as they lie, also if there are several buckets.
            swap_moshi_user: the probability that the two streams of a chunk change places.
            user_code_noise: the largest share of the codes of a row's user that are replaced by others; the share is
                drawn for each row from 0 to this.
            moshi_code_noise: the same of what Moshi remembers of its own codes; what it is to say next stays.

        Raises:
            ValueError: a number that makes no sense, no chunks, or a swap where the user's text lacks.
        """
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}, but must be at least 1")
        if max_length < 2:
            raise ValueError(f"`max_length` is {max_length}, but must hold a start frame and one more: at least 2")
        if not 1 <= min_length < max_length:
            raise ValueError(f"`min_length` is {min_length}, but must be at least 1 and below max_length={max_length}")
        buckets = tuple(buckets) or (max_length,)
        if list(buckets) != sorted(set(buckets)) or buckets[0] < 2 or buckets[-1] != max_length:
            raise ValueError(f"`buckets` are {buckets}, but must ascend from 2 or more to max_length={max_length}")
        if seed < 0:
            raise ValueError(f"`seed` is {seed}, but must not be negative")
        if not 0 <= swap_moshi_user <= 1:
            raise ValueError(f"`swap_moshi_user` is {swap_moshi_user}, but must be a probability")
        for name, noise in (("user_code_noise", user_code_noise), ("moshi_code_noise", moshi_code_noise)):
            if not 0 <= noise <= 1:
                raise ValueError(f"`{name}` is {noise}, but must be a share, from 0 to 1")
        if swap_moshi_user and dataset.without_user_text:
            raise ValueError(
                f"`swap_moshi_user` is {swap_moshi_user}, but {len(dataset.without_user_text)} conversations have no "
                f"`user_text_tokens`, {dataset.without_user_text[0]!r} is the first; write down what the user says, "
                "or set it to 0"
            )
        self.batch_size, self._buckets, self._seed = batch_size, np.array(buckets), seed
        self._shuffle, self._swap = shuffle, swap_moshi_user
        self._noises = {USER_NOISE: user_code_noise, MOSHI_NOISE: moshi_code_noise}
        size, lengths = max_length - 1, dataset.lengths
        whole, tails = lengths // size, lengths % size
        kept = tails >= min_length
        counts = whole + kept
        total = int(counts.sum())
        if not total:
            raise ValueError(
                f"`min_length` is {min_length}, but none of the {len(lengths)} conversations has as many "
                "frames; lower it, or give longer conversations"
            )
        self.conversation = np.repeat(np.arange(len(lengths)), counts)
        self.start = (np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)) * size
        self.length = np.minimum(lengths[self.conversation] - self.start, size)
        self.chunks, self.frames = total, int(self.length.sum())
        self.batches_per_epoch = -(-total // batch_size)
        lost = (tails > 0) & ~kept
        (alone,) = np.nonzero(lost & (whole == 0) | (lengths == 0))
        self.dropped = Dropped(
            int((lost & (whole > 0)).sum()), tuple(dataset.ids[one] for one in alone), int(tails[lost].sum())
        )
        # the same for equal numbers of other types
        sizes = [int(number) for number in (batch_size, max_length, min_length, *buckets, seed)]
        settings: tuple[Any, ...] = (sizes, bool(shuffle), float(swap_moshi_user))
        if user_code_noise or moshi_code_noise:  # runs that have none go on as ever
            settings = (*settings, float(user_code_noise))
        if moshi_code_noise:
            settings = (*settings, float(moshi_code_noise))
        self.fingerprint = hashlib.sha256(f"{dataset.fingerprint} {settings}".encode()).hexdigest()
        self._epoch: tuple[int, Int[np.ndarray, "batches rows"], Bool[np.ndarray, "chunks"]] | None = None

    def batch(self, number: int) -> tuple[int, Int[np.ndarray, "rows"], Bool[np.ndarray, "rows"]]:
        """A batch of the endless stream.

        Returns:
            Its length in model frames, its chunks (-1 for rows that are padding), and which of them are swapped.
        """
        epoch, place = divmod(number, self.batches_per_epoch)
        cached = self._epoch  # may be replaced by another thread
        if cached is None or cached[0] != epoch:
            cached = self._epoch = (epoch, self._order(epoch), self._draw_swaps(epoch))
        _, batches, swaps = cached
        rows = batches[place]
        longest = int(self.length[rows[rows >= 0]].max()) + 1
        return int(self._buckets[np.searchsorted(self._buckets, longest)]), rows, swaps[rows] & (rows >= 0)

    def noisy(
        self, codes: Int[np.ndarray, "codebooks frames"], whose: int, number: int, row: int, audio_vocab_size: int
    ) -> Int[np.ndarray, "codebooks frames"]:
        """Codes of that row of that batch, some of them replaced; ``whose`` is ``USER_NOISE`` or ``MOSHI_NOISE``."""
        if not self._noises[whose]:
            return codes
        rng = np.random.default_rng([self._seed, number, row, whose])
        replaced = rng.random(codes.shape) < rng.uniform(0, self._noises[whose])
        return np.where(replaced, rng.integers(audio_vocab_size, size=codes.shape), codes)

    def _order(self, epoch: int) -> Int[np.ndarray, "batches rows"]:
        if not self._shuffle:
            batches, left = self._split(np.arange(self.chunks))
        else:
            rng = np.random.default_rng([self._seed, epoch, _ORDER])
            order = rng.permutation(self.chunks)
            bucket = np.searchsorted(self._buckets, self.length[order] + 1)
            parts, left = [], order[:0]
            for number in range(len(self._buckets)):
                part, left = self._split(np.concatenate([left, order[bucket == number]]))
                parts.append(part)
            batches = rng.permutation(np.concatenate(parts))
        if not len(left):
            return batches
        last = np.full((1, self.batch_size), -1)
        last[0, : len(left)] = left
        return np.concatenate([batches, last])

    def _split(
        self, chunks: Int[np.ndarray, "chunks"]
    ) -> tuple[Int[np.ndarray, "batches rows"], Int[np.ndarray, "left"]]:
        """Full batches, and what is left."""
        whole = len(chunks) // self.batch_size * self.batch_size
        return chunks[:whole].reshape(-1, self.batch_size), chunks[whole:]

    def _draw_swaps(self, epoch: int) -> Bool[np.ndarray, "chunks"]:
        return np.random.default_rng([self._seed, epoch, _SWAPS]).random(self.chunks) < self._swap


@dataclass(frozen=True)
class BatchMaker:
    """Makes this process's rows of a batch.

    Attributes:
        dataset: where the frames are.
        plan: which of them.
        rows: of this process, first and behind the last.
        vocab_size, audio_vocab_size: sizes, and the ids of the start frame.
        num_codebooks: that are taken, the first ones.
        pad_token_id: what padded text inputs hold.
    """

    dataset: PreparedDataset
    plan: BatchPlan
    rows: tuple[int, int]
    vocab_size: int
    audio_vocab_size: int
    num_codebooks: int
    pad_token_id: int

    def __call__(self, number: int) -> Batch:
        """The batch of that number; see :func:`make_loader`.

        Raises:
            ValueError: a conversation is damaged, or has ids or codebooks that the model has not.
        """
        length, chunks, swaps = self.plan.batch(number)
        mine = slice(*self.rows)
        rows = self.rows[1] - self.rows[0]
        text = np.full((rows, length), self.pad_token_id, np.int32)
        mask = np.zeros((rows, length), np.int32)
        codes = np.full((3, rows, self.num_codebooks, length), self.audio_vocab_size, np.int32)
        for row, (chunk, swap) in enumerate(zip(chunks[mine], swaps[mine])):
            if chunk < 0:
                continue
            part = self._chunk(int(chunk))
            end = part.frames + 1
            mask[row, :end] = 1
            text[row, 0] = self.vocab_size
            said: Any = part.user_text_tokens if swap else part.moshi_text_tokens
            text[row, 1:end] = said
            sides = [side[: self.num_codebooks] for side in (part.moshi_audio_tokens, part.user_audio_tokens)]
            spoken, heard = sides[::-1] if swap else sides
            place = number, self.rows[0] + row, self.audio_vocab_size
            codes[0, row, :, 1:end] = self.plan.noisy(heard, USER_NOISE, *place)
            codes[1, row, :, 1:end] = self.plan.noisy(spoken, MOSHI_NOISE, *place)
            codes[2, row, :, 1:end] = spoken
        real = mask.astype(bool)
        text_labels = np.where(real, text, IGNORED).astype(np.int32)
        text_labels[:, 0] = IGNORED
        user, remembered, moshi = codes
        # the delay moves the last codes of a row into its padding
        delayed = [
            np.where(real[:, None], delay(stream, self.audio_vocab_size), self.audio_vocab_size).astype(np.int32)
            for stream in (user, remembered)
        ]
        return {
            "input_ids": text,
            "attention_mask": mask,
            "user_audio_codes": delayed[0],
            "moshi_audio_codes": delayed[1],
            "text_labels": text_labels,
            "audio_labels": np.where(real[:, None], moshi, IGNORED).astype(np.int32),
        }

    def _chunk(self, chunk: int) -> Conversation:
        plan = self.plan
        conversation = self.dataset[int(plan.conversation[chunk])]
        codebooks = conversation.moshi_audio_tokens.shape[0]
        if codebooks < self.num_codebooks:
            raise ValueError(
                f"{conversation.id!r}: has {codebooks} codebooks, but the model wants {self.num_codebooks}; prepare "
                "the dataset with this model"
            )
        start = int(plan.start[chunk])
        part = conversation.part(start, start + int(plan.length[chunk]))
        part.check_ids(self.vocab_size, self.audio_vocab_size)
        return part


def check_workers(workers: int) -> None:
    """Raises :class:`WorkerError` where this process is not allowed any.

    Python begins a process with the import of the script that starts it, and whatever the script does is done again.
    """
    process = multiprocessing.current_process()
    if workers and getattr(process, "_inheriting", False):
        raise WorkerError(
            f"`data.workers` is {workers}, but what starts these processes is not under `{_GUARD}` in the script, "
            "which every one of them imports: put it there, or set it to 0"
        )
    if workers and process.daemon:
        raise WorkerError(
            f"`data.workers` is {workers}, but this process is a daemon, which Python allows no processes: set it to 0"
        )


class Loader(Iterator[dict[str, np.ndarray]]):
    """Batches one after another, with a position that can be kept and restored; :func:`make_loader` makes one.

    A maker has a ``plan`` with ``batches_per_epoch`` and ``fingerprint``, and is called with the numbers of batches.

    The next batch raises what cannot be read as ``ValueError``, and :class:`WorkerError` for the processes.

    Attributes:
        plan: what the batches hold; its ``dropped`` is worth a message.
        position: how many batches have been handed out.
    """

    def __init__(self, maker: Any, epochs: int | None, workers: int, prefetch: int):
        self.plan = maker.plan
        self.position = 0
        self._maker, self._workers, self._prefetch = maker, workers, prefetch
        self._end = sys.maxsize // 2 if epochs is None else epochs * self.plan.batches_per_epoch
        self._batches: Any = None
        self._close: Any = None

    @property
    def epoch(self) -> int:
        """Of the next batch."""
        return self.position // self.plan.batches_per_epoch

    def __next__(self) -> dict[str, np.ndarray]:
        if self.position >= self._end:
            self.close()
            raise StopIteration
        if self._batches is None:
            self._start()
        try:
            batch = next(self._batches)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            self.close()
            raise WorkerError(
                f"`data.workers` is {self._workers}, but one of these processes has ended: "
                f"{str(error).split('. ')[0]}. If it has exit code 1, see what it said; in a script, what starts them "
                f"must be under `{_GUARD}`. If it was killed, memory may lack: give fewer, or 0"
            ) from None
        self.position += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """What :meth:`set_state` goes on from; JSON. It is the same in all processes, and for any ``workers``."""
        return {"version": 1, "position": self.position, "plan": self.plan.fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`get_state` was called.

        Raises:
            ValueError: a state of other data or settings, or none at all.
        """
        position, plan = state.get("position"), state.get("plan")
        if state.get("version") != 1 or not isinstance(position, int) or position < 0 or not isinstance(plan, str):
            raise ValueError(f"`state` is {dict(state)!r:.200}, which is no position of a loader")
        if plan != self.plan.fingerprint:
            raise ValueError(
                "`state` is of other data or settings of the loader (batch_size, max_length, min_length, buckets, "
                "seed, shuffle, swap_moshi_user), so its position means nothing here; take those of its run"
            )
        self.close()
        self.position = position

    def close(self) -> None:
        """Stop threads and processes; they begin again when the next batch is asked for."""
        if self._close is not None:
            self._close()
        self._batches = self._close = None

    def _start(self) -> None:
        check_workers(self._workers)
        grain = _import_grain()
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self._prefetch)
        batches = grain.MapDataset.range(self.position, self._end).map(self._maker).to_iter_dataset(options)
        if self._workers:
            # through pipes: blocks of shared memory outlive a loader that an error has ended
            through_pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
            batches = grain.experimental.WithOptionsIterDataset(batches, through_pipes)
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=self._prefetch),
                worker_init_fn=_end_with_parent,
            )
        self._batches = iter(batches)
        # at the end of Python too: grain's own threads would complain
        self._close = weakref.finalize(self, self._batches.close)


def make_loader(
    dataset: PreparedDataset,
    *,
    batch_size: int,
    max_length: int,
    vocab_size: int,
    audio_vocab_size: int,
    num_codebooks: int,
    min_length: int = 1,
    buckets: Sequence[int] = (),
    seed: int = 0,
    shuffle: bool = True,
    swap_moshi_user: float = 0.0,
    user_code_noise: float = 0.0,
    moshi_code_noise: float = 0.0,
    epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    prefetch: int = 2,
    pad_token_id: int = 3,
) -> Loader:
    """Batches of a dataset; see :class:`BatchPlan` for what is in them.

    A row is a start frame (text ``vocab_size``, codes ``audio_vocab_size``) and the frames of a chunk, padded on the
    right. A batch has, all int32, with ``rows = batch_size / process_count`` and ``length`` the smallest bucket that
    holds all chunks of the batch (in all processes):

    - ``input_ids`` ``(rows, length)``, ``attention_mask`` ``(rows, length)``, 0 for padding;
    - ``user_audio_codes`` and ``moshi_audio_codes`` ``(rows, num_codebooks, length)``, delayed;
    - ``text_labels`` ``(rows, length)``, -100 for padding and for the start frame, which nothing predicts;
    - ``audio_labels`` ``(rows, num_codebooks, length)``, undelayed, -100 for padding and ``audio_vocab_size`` in the
      start frame.

    Args:
        dataset: as :func:`~transformers_moshi_flax.training.data.prepared.open_dataset` gives it.
        batch_size: rows of a batch over all processes.
        max_length, min_length, buckets, seed, shuffle, swap_moshi_user, user_code_noise, moshi_code_noise: as in
            :class:`BatchPlan`.
        vocab_size, audio_vocab_size, num_codebooks: of the model. Further codebooks of the data are left.
        epochs: after how many the batches end; None goes on for ever.
        process_index, process_count: of this process, which gets its share of the rows.
        workers: processes that make batches; 0 makes them in a thread of this one.
        prefetch: batches that are made before they are asked for (by each worker).
        pad_token_id: what padded ``input_ids`` hold.

    Raises:
        ValueError: as :class:`BatchPlan`; processes that do not divide the batch; numbers that make no sense.
        ImportError: ``grain`` is not installed.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"`process_index` is {process_index}, but must be in [0, {process_count})")
    if batch_size % process_count:
        raise ValueError(
            f"`batch_size` is {batch_size}, which {process_count} processes cannot share; give a multiple of that"
        )
    if workers < 0 or prefetch < 1:
        raise ValueError(f"`workers` is {workers} and `prefetch` {prefetch}, but must be at least 0 and 1")
    if epochs is not None and epochs < 1:
        raise ValueError(f"`epochs` is {epochs}, but must be at least 1, or None for no end")
    _import_grain()
    plan = BatchPlan(
        dataset,
        batch_size=batch_size,
        max_length=max_length,
        min_length=min_length,
        buckets=buckets,
        seed=seed,
        shuffle=shuffle,
        swap_moshi_user=swap_moshi_user,
        user_code_noise=user_code_noise,
        moshi_code_noise=moshi_code_noise,
    )
    share = batch_size // process_count
    rows = (process_index * share, (process_index + 1) * share)
    maker = BatchMaker(dataset, plan, rows, vocab_size, audio_vocab_size, num_codebooks, pad_token_id)
    return Loader(maker, epochs, workers, prefetch)


def _end_with_parent(worker: int, workers: int) -> None:
    """In a worker: see to it that it ends with its parent, also one that is killed and can tell nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _import_grain() -> Any:
    try:
        import grain
        from absl import flags
    except ImportError as error:
        raise ImportError(
            "loading training data needs grain, which is not installed: run "
            '`pip install "transformers-moshi-flax[train]"`'
        ) from error
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers look at flags, which only programs of absl parse
    return grain
