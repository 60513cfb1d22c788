"""The tree of the parts of a checkpoint."""

from __future__ import annotations

import pytest

from transformers_moshi_flax.cli.parts import Tensor, part_tree, readable_bytes, select


def tensor(name: str, shape: tuple[int, ...] = (2, 3), dtype: str = "float32") -> Tensor:
    width = {"float32": 4, "bfloat16": 2}[dtype]
    size = 1
    for length in shape:
        size *= length
    return Tensor(name, shape, dtype, size * width, "model.safetensors")


def lines(names: list[str]) -> list[tuple[str, int]]:
    return [(part.label, part.alike) for part in part_tree(map(tensor, names)).parts]


def test_counts_add_up():
    tree = part_tree([tensor("a.w"), tensor("a.b", (3,)), tensor("c", (), "bfloat16")])
    assert (tree.label, tree.size, tree.nbytes, tree.dtypes) == ("", 10, 38, ("bfloat16", "float32"))
    a, c = tree.parts
    assert (a.label, a.size, a.nbytes, a.shape) == ("a", 9, 36, None)
    assert [(part.label, part.shape) for part in a.parts] == [("b", (3,)), ("w", (2, 3))]
    assert (c.size, c.nbytes, c.shape, c.parts) == (1, 2, (), ())


def test_alike_siblings_are_told_once():
    assert lines([f"layers.{i}.{w}" for i in range(12) for w in ("q", "k")]) == [("layers.0…11", 12)]
    (layers,) = part_tree([tensor(f"layers.{i}.{w}") for i in range(12) for w in ("q", "k")]).parts
    assert layers.size == 12 * 2 * 6
    assert [(part.label, part.size) for part in layers.parts] == [("k", 6), ("q", 6)]


def test_chains_of_alike_tensors():
    assert lines([f"heads.{i}.weight" for i in range(3)]) == [("heads.0…2.weight", 3)]
    assert lines([f"{i}.in.{j}.w" for i in range(2) for j in range(3)]) == [("0…1.in.0…2.w", 6)]


@pytest.mark.parametrize(
    "odd",
    [tensor("l.1.w", (9, 9)), tensor("l.1.w", dtype="bfloat16"), tensor("l.1.v")],
    ids=["shape", "dtype", "name"],
)
def test_siblings_that_differ_stay_apart(odd: Tensor):
    (layers,) = part_tree([tensor("l.0.w"), odd, tensor("l.2.w"), tensor("l.3.w")]).parts
    assert [part.label for part in layers.parts] == ["0.w", odd.name.removeprefix("l."), "2…3.w"]


def test_words_are_never_merged():
    assert lines(["fc1.weight", "fc2.weight"]) == [("fc1.weight", 1), ("fc2.weight", 1)]


def test_one_tensor():
    tree = part_tree([tensor("a.b.c")])
    assert (tree.label, tree.shape, tree.size) == ("", None, 6)
    assert [(part.label, part.shape) for part in tree.parts] == [("a.b.c", (2, 3))]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("", ["a.b", "ab.c", "a.bc.d"]),
        ("a", ["a.b", "a.bc.d"]),
        ("a.", ["a.b", "a.bc.d"]),
        ("a/bc", ["a.bc.d"]),
        ("a.b", ["a.b"]),
        ("b", []),
    ],
)
def test_select(part: str, expected: list[str]):
    assert [found.name for found in select(map(tensor, ["a.b", "ab.c", "a.bc.d"]), part)] == expected


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_499, "999 kB"), (999_500, "1 MB"), (15_400_000_000, "15.4 GB")],
)
def test_readable_bytes(nbytes: int, text: str):
    assert readable_bytes(nbytes) == text
