"""Texts -> rows of several texts -> batches, endlessly and in the same order every time.

Texts are laid into rows once (best fit, the longest first), as none sees its neighbours anyway; every epoch deals the
rows to batches anew.
"""

from __future__ import annotations

import bisect
import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from ..data.loading import IGNORED, Batch, Loader
from .texts import Texts


class RowPlan:
    """Which rows are in which batch.

    Args:
        rows: how many there are.
        contents: changes with what is in them.
        batch_size: rows of a batch.
        seed: of the order.
        shuffle: False takes the rows as they lie.

    Attributes:
        batches_per_epoch: the last one, which may lack rows, included.
        fingerprint: of data and settings.
    """

    def __init__(self, rows: int, contents: str, batch_size: int, seed: int, shuffle: bool):
        self.rows, self.batch_size = rows, batch_size
        self._seed, self._shuffle = seed, shuffle
        self.batches_per_epoch = -(-rows // batch_size)
        self.fingerprint = hashlib.sha256(f"{contents} {batch_size} {seed} {bool(shuffle)}".encode()).hexdigest()
        self._epoch: tuple[int, np.ndarray] | None = None

    def batch(self, number: int) -> Int[np.ndarray, "rows"]:
        """The rows of a batch of the endless stream; -1 for those that the last one of an epoch lacks."""
        epoch, place = divmod(number, self.batches_per_epoch)
        cached = self._epoch  # may be replaced by another thread
        if cached is None or cached[0] != epoch:
            order = np.arange(self.rows)
            if self._shuffle:
                order = np.random.default_rng([self._seed, epoch]).permutation(self.rows)
            cached = self._epoch = (epoch, order)
        rows = np.full(self.batch_size, -1)
        found = cached[1][place * self.batch_size : (place + 1) * self.batch_size]
        rows[: len(found)] = found
        return rows


class PackingPlan(RowPlan):
    """Which tokens are in which row of which batch.

    A text of n tokens has n - 1 pairs of a token and the next one. Texts with more pairs than ``max_length`` are cut
    into pieces of so many, and a rest; a token at a cut is the last label of one piece and the first input of the
    next, so that every token of a text but its first is predicted once an epoch.

    Attributes:
        text, begin, length: of every piece: its text, its first token in ``Texts.tokens``, and its pairs.
        row_ends: how many pieces are in the rows up to each; the pieces of a row are neighbours.
    """

    def __init__(self, texts: Texts, *, batch_size: int, max_length: int, seed: int = 0, shuffle: bool = True):
        self.max_length = max_length
        pairs = texts.ends - texts.begins - 1
        counts = -(-pairs // max_length)
        text = np.repeat(np.arange(len(texts)), counts)
        offset = (np.arange(len(text)) - np.repeat(np.cumsum(counts) - counts, counts)) * max_length
        length = np.minimum(pairs[text] - offset, max_length)
        rows = best_fit(length, max_length)
        order = np.argsort(rows, kind="stable")
        self.text, self.length = text[order], length[order]
        self.begin = (texts.begins[text] + offset)[order]
        self.row_ends = np.cumsum(np.bincount(rows))
        super().__init__(len(self.row_ends), f"{texts.fingerprint} {int(max_length)}", batch_size, seed, shuffle)

    def pieces(self, row: int) -> range:
        """The pieces of a row."""
        return range(int(self.row_ends[row - 1]) if row else 0, int(self.row_ends[row]))


def best_fit(lengths: Int[np.ndarray, "pieces"], capacity: int) -> Int[np.ndarray, "pieces"]:
    """The row of every piece: the longest first, each into the fullest row that has room for it."""
    rows = np.empty(len(lengths), np.int64)
    spaces: list[int] = []  # that some rows have left, ascending
    open_rows: dict[int, list[int]] = {}
    count = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        place = bisect.bisect_left(spaces, length)
        if place == len(spaces):
            row, space = count, capacity
            count += 1
        else:
            space = spaces[place]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del spaces[place]
        rows[piece] = row
        if left := space - length:
            if not open_rows.setdefault(left, []):
                bisect.insort(spaces, left)
            open_rows[left].append(row)
    return rows


@dataclass(frozen=True)
class RowMaker:
    """Makes this process's rows of a batch.

    Attributes:
        texts: where the tokens are.
        plan: which of them.
        rows: of this process, first and behind the last.
    """

    texts: Texts
    plan: PackingPlan
    rows: tuple[int, int]

    def __call__(self, number: int) -> Batch:
        """The batch of that number; see :func:`make_loader`."""
        plan, tokens = self.plan, self.texts.tokens
        shape = (self.rows[1] - self.rows[0], plan.max_length)
        input_ids, segment_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        labels = np.full(shape, IGNORED, np.int32)
        for place, row in enumerate(plan.batch(number)[slice(*self.rows)].tolist()):
            start = 0
            for segment, piece in enumerate(plan.pieces(row) if row >= 0 else (), 1):
                begin, length = int(plan.begin[piece]), int(plan.length[piece])
                part = slice(start, start + length)
                input_ids[place, part] = tokens[begin : begin + length]
                labels[place, part] = tokens[begin + 1 : begin + length + 1]
                segment_ids[place, part] = segment
                start += length
        return {"input_ids": input_ids, "segment_ids": segment_ids, "labels": labels}


def make_loader(
    texts: Texts,
    *,
    batch_size: int,
    max_length: int,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> Loader:
    """Batches of texts; see :class:`PackingPlan` for what is in them.

    A batch has, all int32 ``(batch_size / process_count, max_length)``:

    - ``input_ids``: tokens of one text behind another, 0 for padding at the end;
    - ``segment_ids``: 1 for the first text of a row, 2 for the next one, …, 0 for padding;
    - ``labels``: the token that follows in its text, -100 for padding.

    Args:
        texts: see :func:`~transformers_moshi_flax.training.text.texts.tokenized`.
        batch_size: rows of a batch over all processes.
        max_length: tokens of a row.
        seed: of the order.
        shuffle: False takes the rows as they lie.
        epochs: after how many the batches end; None goes on for ever.
        process_index, process_count: of this process, which gets its share of the rows.
        workers: processes that make batches; 0 makes them in a thread of this one.
    """
    plan = PackingPlan(texts, batch_size=batch_size, max_length=max_length, seed=seed, shuffle=shuffle)
    share = batch_size // process_count
    rows = (process_index * share, (process_index + 1) * share)
    return Loader(RowMaker(texts, plan, rows), epochs, workers, prefetch=2)
