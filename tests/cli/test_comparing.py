"""Differences of parameters and of outputs."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from transformers_moshi_flax.cli import comparing
from transformers_moshi_flax.cli.comparing import Difference, differences, value_difference
from transformers_moshi_flax.cli.outputs import OutputDifference, output_differences

NAN, INF = float("nan"), float("inf")


def test_equal_ones_are_not_told():
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.array(1.5, np.float32), "c": np.zeros((0, 3))}
    steps = []
    assert list(differences(arrays, {path: array.copy() for path, array in arrays.items()}, steps.append)) == []
    assert steps == [1, 1, 1]


def test_every_kind():
    a = {
        "lost": np.zeros(2),
        "shape": np.zeros((2, 3)),
        "type": np.array([1.0, 1 + 2**-10], np.float32),
        "same in another type": np.ones(2, np.float32),
        "value": np.array([1.0, 2.0, -4.0]),
    }
    b = {
        "new": np.zeros(2, np.int8),
        "shape": np.zeros((3, 2)),
        "type": np.array([1.0, 1 + 2**-10], ml_dtypes.bfloat16),
        "same in another type": np.ones(2, ml_dtypes.bfloat16),
        "value": np.array([1.0, 2.5, -6.0]),
    }
    assert list(differences(a, b)) == [
        Difference("lost", "missing", "float64 (2,)", None),
        Difference("new", "missing", None, "int8 (2,)"),
        Difference("same in another type", "dtype", "float32", "bfloat16", 0.0),
        Difference("shape", "shape", "float64 (2, 3)", "float64 (3, 2)"),
        Difference("type", "dtype", "float32", "bfloat16", 2**-10),
        Difference("value", "values", "float64 (3,)", "float64 (3,)", 2.0),
    ]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([NAN, 1], [NAN, 1], (0.0, 0)),
        ([INF, 1], [INF, 3], (2.0, 0)),
        ([INF, NAN, 1], [-INF, 2, 1], (0.0, 2)),
        ([3.0], [NAN], (0.0, 1)),
        ([3e38], [-3e38], (6e38, 0)),
    ],
)
def test_numbers_that_are_not_finite(a: list, b: list, expected: tuple):
    assert value_difference(np.array(a), np.array(b)) == expected


@pytest.mark.parametrize("chunk", [1, 6, 7, 100])
@pytest.mark.parametrize("place", [(0, 0), (4, 2), (6, 1)])
def test_every_chunk_counts(monkeypatch: pytest.MonkeyPatch, chunk: int, place: tuple[int, int]):
    monkeypatch.setattr(comparing, "CHUNK", chunk)
    a = np.zeros((3, 7), np.float16).T
    b = a.copy()
    b[place] = -0.5
    assert value_difference(a, b) == (0.5, 0)


def test_outputs():
    a = {"logits": np.array([10.0, -128.0]), "audio_codes": np.zeros((4, 50), np.int32)}
    assert [found.agrees for found in output_differences(a, a)] == [True, True]
    close = {"logits": np.array([10.125, -128.0]), "audio_codes": a["audio_codes"].copy()}
    close["audio_codes"][0, :2] = 7
    assert output_differences(a, close) == [
        OutputDifference("logits", 2**-10, True),
        OutputDifference("audio_codes", 0.01, True),
    ]
    far = {"logits": np.array([10.25, -128.0]), "audio_codes": close["audio_codes"].copy()}
    far["audio_codes"][1, 1] = 7
    assert [found.agrees for found in output_differences(a, far)] == [False, False]
    other = {"logits": np.array([10.0, NAN]), "audio_codes": np.zeros((4, 49), np.int32)}
    assert [found.agrees for found in output_differences(a, other)] == [False, False]
    assert [found.agrees for found in output_differences(other, {**a, "logits": other["logits"]})] == [True, False]
