"""Rows of texts: against what packing promises, of drawn lengths."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_moshi_flax.training.data.loading import IGNORED, Batch
from transformers_moshi_flax.training.text.packing import PackingPlan, RowMaker, make_loader
from transformers_moshi_flax.training.text.texts import Texts, joined


def numbered(lengths: list[int]) -> Texts:
    """Texts in which every token is another number."""
    names = iter(range(sum(lengths)))
    return joined([np.array([next(names) for _ in range(length)], np.int32) for length in lengths])


def segments(batch: Batch) -> list[list[list[tuple[int, int]]]]:
    """Of every row its texts, each as pairs of a token and the next one; asserts what is around them."""
    rows = []
    for ids, labels, names in zip(batch["input_ids"], batch["labels"], batch["segment_ids"]):
        used = int((names > 0).sum())
        assert (names[used:] == 0).all() and (labels[used:] == IGNORED).all() and (ids[used:] == 0).all()
        assert names[:used].tolist() == sorted(names[:used]) and set(names[:used]) == set(
            range(1, len({*names[:used]}) + 1)
        )
        rows.append(
            [
                list(zip(ids[names == name].tolist(), labels[names == name].tolist()))
                for name in sorted({*names[:used]})
            ]
        )
    return rows


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=25),
    max_length=st.integers(2, 16),
    batch_size=st.integers(1, 4),
    shuffle=st.booleans(),
)
def test_an_epoch_predicts_every_token_once(
    lengths: list[int], max_length: int, batch_size: int, shuffle: bool
) -> None:
    texts = numbered(lengths)
    plan = PackingPlan(texts, batch_size=batch_size, max_length=max_length, seed=1, shuffle=shuffle)
    maker = RowMaker(texts, plan, (0, batch_size))
    epochs = [
        [
            row
            for number in range(plan.batches_per_epoch)
            for row in segments(maker(epoch * plan.batches_per_epoch + number))
        ]
        for epoch in (0, 1)
    ]
    found = [pair for row in epochs[0] for text in row for pair in text]
    begins = set(texts.begins.tolist())
    # a token that begins a text follows none
    assert sorted(found) == [(one, two) for one, two in pairwise(range(sum(lengths))) if two not in begins]
    # texts are cut where they are too long alone
    pieces = [length for row in epochs[0] for text in row if (length := len(text))]
    wanted = [min(max_length, length - 1 - start) for length in lengths for start in range(0, length - 1, max_length)]
    assert sorted(pieces) == sorted(wanted)
    for row in epochs[0]:
        for text in row:
            assert all(before[1] == after[0] for before, after in pairwise(text))
    # no two rows would go into one
    sizes = sorted(sum(map(len, row)) for row in epochs[0] if row)
    assert len(sizes) == plan.rows and (len(sizes) < 2 or sizes[0] + sizes[1] > max_length)
    assert sorted(map(str, epochs[0])) == sorted(map(str, epochs[1]))


def test_every_epoch_has_another_order_and_the_seed_decides() -> None:
    texts = numbered([9] * 12)
    plans = [PackingPlan(texts, batch_size=4, max_length=8, seed=seed) for seed in (0, 0, 1)]
    orders = [[plan.batch(number).tolist() for number in range(6)] for plan in plans]
    assert orders[0] == orders[1] != orders[2] and orders[0][:3] != orders[0][3:]
    assert plans[0].fingerprint == plans[1].fingerprint != plans[2].fingerprint
    other = PackingPlan(numbered([9] * 11 + [8]), batch_size=4, max_length=8)
    assert other.fingerprint != plans[0].fingerprint


def test_processes_share_a_batch() -> None:
    texts = numbered([5, 9, 3, 14, 7])
    settings = {"batch_size": 4, "max_length": 8, "epochs": 1}
    whole = make_loader(texts, **settings)
    parts = [make_loader(texts, **settings, process_index=index, process_count=2) for index in range(2)]
    for batch, *shares in zip(whole, *parts, strict=True):
        for name, array in batch.items():
            np.testing.assert_array_equal(np.concatenate([share[name] for share in shares]), array)
