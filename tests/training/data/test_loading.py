"""Every frame once an epoch, the same batches whoever asks and whenever, and rows as the model wants them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.random_model import RANDOM_MODEL
from tests.training.data.test_prepared import CODEBOOKS, sample
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
from transformers_moshi_flax.training.data.loading import BatchPlan, Loader, WorkerError, make_loader
from transformers_moshi_flax.training.data.prepared import PreparedDataset, open_dataset

MODEL = {"vocab_size": 60, "audio_vocab_size": 32, "num_codebooks": CODEBOOKS}
START, START_CODE, PAD = 60, 32, 3


def dataset_of(lengths: list[int], user_text: bool = True) -> PreparedDataset:
    return open_dataset([sample(length, seed, user_text) for seed, length in enumerate(lengths)])


def loader_of(dataset: PreparedDataset, **options: Any) -> Loader:
    return make_loader(dataset, **{"batch_size": 2, "max_length": 5, **MODEL, **options})


def assert_equal(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for key, array in left.items():
        np.testing.assert_array_equal(array, right[key], err_msg=key)


# ---------------------------------------------------------------------------------------------------------- one batch


def test_rows() -> None:
    dataset = dataset_of([6, 1])
    (first, second) = loader_of(dataset, shuffle=False, epochs=1)
    conversation = dataset[0]
    text, moshi, user = (
        getattr(conversation, name) for name in ("moshi_text_tokens", "moshi_audio_tokens", "user_audio_tokens")
    )
    assert all(array.dtype == np.int32 for array in first.values())
    # the first chunk is whole, the second has two frames
    assert first["input_ids"].tolist() == [[START, *text[:4]], [START, *text[4:], PAD, PAD]]
    assert first["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert first["text_labels"].tolist() == [[-100, *text[:4]], [-100, *text[4:], -100, -100]]
    for name, side in (("moshi_audio_codes", moshi), ("user_audio_codes", user)):
        codes = first[name]
        assert codes.shape == (2, CODEBOOKS, 5)
        assert codes[0, 0].tolist() == [START_CODE, *side[0, :4]]
        assert codes[0, 1].tolist() == [START_CODE, START_CODE, *side[1, :3]]
        assert codes[1, 0].tolist() == [START_CODE, *side[0, 4:], START_CODE, START_CODE]
        assert codes[1, 2].tolist() == [START_CODE, START_CODE, side[2, 4], START_CODE, START_CODE]
    assert first["audio_labels"][0].tolist() == [[START_CODE, *codes[:4]] for codes in moshi]
    assert first["audio_labels"][1].tolist() == [[START_CODE, *codes[4:], -100, -100] for codes in moshi]
    # the last batch lacks a row
    assert second["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [0] * 5]
    assert (second["text_labels"][1] == -100).all() and (second["audio_labels"][1] == -100).all()
    assert second["input_ids"][1].tolist() == [PAD] * 5 and (second["moshi_audio_codes"][1] == START_CODE).all()


def test_further_codebooks_are_left() -> None:
    dataset = dataset_of([4])
    batch = next(loader_of(dataset, num_codebooks=2))
    assert batch["audio_labels"].shape == (2, 2, 5)
    with pytest.raises(ValueError, match="has 3 codebooks, but the model wants 4"):
        next(loader_of(dataset, num_codebooks=4))


def test_ids_of_another_model() -> None:
    with pytest.raises(ValueError, match=r"'sample 0': `moshi_audio_tokens` has the id .*outside of \[0, 4\)"):
        next(loader_of(dataset_of([40]), audio_vocab_size=4))


def test_swap() -> None:
    dataset = dataset_of([4] * 64)
    plain = next(loader_of(dataset, batch_size=64, shuffle=False))
    always = next(loader_of(dataset, batch_size=64, shuffle=False, swap_moshi_user=1.0))
    sometimes = loader_of(dataset, batch_size=64, shuffle=False, swap_moshi_user=0.25)
    assert always["input_ids"][:, 1:].tolist() == [one.user_text_tokens.tolist() for one in dataset]
    np.testing.assert_array_equal(always["moshi_audio_codes"], plain["user_audio_codes"])
    np.testing.assert_array_equal(always["user_audio_codes"], plain["moshi_audio_codes"])
    shares = []
    for _ in range(2):
        batch = next(sometimes)
        swapped = (batch["input_ids"] == always["input_ids"]).all(1)
        assert ((batch["input_ids"] == plain["input_ids"]).all(1) == ~swapped).all()
        np.testing.assert_array_equal(
            batch["audio_labels"], np.where(swapped[:, None, None], always["audio_labels"], plain["audio_labels"])
        )
        shares.append(swapped)
    assert 4 <= sum(shares[0]) <= 32 and (shares[0] != shares[1]).any()


def test_noise_in_the_codes_of_the_user() -> None:
    dataset = dataset_of([24] * 64)
    options = {"batch_size": 64, "shuffle": False, "max_length": 25}
    plain = next(loader_of(dataset, **options))
    loader = loader_of(dataset, **options, user_code_noise=0.5)
    batches = [next(loader), next(loader)]
    for batch in batches:
        assert_equal({**batch, "user_audio_codes": plain["user_audio_codes"]}, plain)
        codes = batch["user_audio_codes"]
        np.testing.assert_array_equal(codes == START_CODE, plain["user_audio_codes"] == START_CODE)
        assert codes.min() >= 0
        changed = (codes != plain["user_audio_codes"]).mean((1, 2))
        assert 0.15 < changed.mean() < 0.3  # of shares from 0 to 0.5, and some codes draw themselves
        assert changed.min() < 0.08 and 0.35 < changed.max() < 0.6
    assert (batches[0]["user_audio_codes"] != batches[1]["user_audio_codes"]).any()
    swapped = next(loader_of(dataset, **options, user_code_noise=0.5, swap_moshi_user=1.0))
    without = next(loader_of(dataset, **options, swap_moshi_user=1.0))
    assert_equal({**swapped, "user_audio_codes": without["user_audio_codes"]}, without)
    assert (swapped["user_audio_codes"] != without["user_audio_codes"]).any()


def test_noise_in_what_moshi_remembers() -> None:
    """What it is to say is as it was, and the user's noise is the same with it."""
    dataset = dataset_of([24] * 64)
    options = {"batch_size": 64, "shuffle": False, "max_length": 25, "user_code_noise": 0.5}
    plain, noisy = next(loader_of(dataset, **options)), next(loader_of(dataset, **options, moshi_code_noise=0.8))
    assert_equal({**noisy, "moshi_audio_codes": plain["moshi_audio_codes"]}, plain)
    codes = noisy["moshi_audio_codes"]
    np.testing.assert_array_equal(codes == START_CODE, plain["moshi_audio_codes"] == START_CODE)
    changed = (codes != plain["moshi_audio_codes"]).mean((1, 2))
    assert 0.25 < changed.mean() < 0.5 and changed.min() < 0.1 and 0.55 < changed.max() < 0.85


def test_padding_has_no_weight() -> None:
    """The model's losses are the same, whatever stands in the padding."""
    model = FlaxMoshiForConditionalGeneration.from_pretrained(RANDOM_MODEL)
    sizes = {name: getattr(model.config, name) for name in MODEL}
    dataset = open_dataset([sample(3, codebooks=model.config.num_codebooks)])
    padded = next(loader_of(dataset, max_length=7, **sizes))
    spoilt = {key: np.array(array) for key, array in padded.items()}
    hidden = spoilt["attention_mask"] == 0
    spoilt["input_ids"][hidden] = 7
    for name in ("user_audio_codes", "moshi_audio_codes"):
        spoilt[name][np.broadcast_to(hidden[:, None], spoilt[name].shape)] = 5

    @jax.jit
    def loss(batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        outputs = model.module.apply({"params": model.params}, **batch)
        return outputs.text_loss, outputs.depth_loss

    expected = loss(padded)
    np.testing.assert_allclose(loss(spoilt), expected, rtol=2e-6)
    assert np.isfinite(expected).all() and np.greater(expected, 0).all()
    spoilt["input_ids"][~hidden] ^= 1
    assert not np.allclose(loss(spoilt), expected, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------- a plan

PLANS = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(0, 23), min_size=1, max_size=12).filter(lambda lengths: max(lengths) >= 6),
        "batch_size": st.integers(1, 7),
        "min_length": st.integers(1, 6),
        "buckets": st.sampled_from([(), (7,), (3, 7), (2, 5, 7)]),
        "seed": st.integers(0, 3),
        "shuffle": st.booleans(),
    }
)


def plan_of(lengths: list[int], **options: Any) -> BatchPlan:
    return BatchPlan(dataset_of(lengths), max_length=7, **options)


@settings(max_examples=60, deadline=None)
@given(options=PLANS)
def test_every_frame_once_an_epoch(options: dict[str, Any]) -> None:
    plan, lengths = plan_of(**options), options["lengths"]
    buckets = options["buckets"] or (7,)
    for epoch in range(2):
        seen = [np.zeros(length, int) for length in lengths]
        for place in range(plan.batches_per_epoch):
            length, rows, _ = plan.batch(epoch * plan.batches_per_epoch + place)
            real = rows[rows >= 0]
            assert len(rows) == options["batch_size"] and len(real)
            assert len(real) == len(rows) or place == plan.batches_per_epoch - 1
            assert length == min(bucket for bucket in buckets if bucket > plan.length[real].max())
            for chunk in real:
                start = plan.start[chunk]
                seen[plan.conversation[chunk]][start : start + plan.length[chunk]] += 1
        dropped_frames = tails = 0
        for one, length in zip(seen, lengths):
            tail = length % 6
            kept = length if tail >= options["min_length"] else length - tail
            assert one.tolist() == [1] * kept + [0] * (length - kept)
            dropped_frames += length - kept
            tails += kept not in (0, length)
        assert plan.dropped.frames == dropped_frames and plan.dropped.tails == tails
        silent = [f"sample {index}" for index, one in enumerate(seen) if not one.any()]
        assert list(plan.dropped.conversations) == silent
        assert plan.frames == sum(lengths) - dropped_frames


def test_fingerprints_are_of_numbers_not_of_their_types() -> None:
    assert plan_of([6], batch_size=2, swap_moshi_user=np.float64(0.5), seed=True).fingerprint == (
        plan_of([6], batch_size=2, swap_moshi_user=0.5, seed=1).fingerprint
    )
    noisy = plan_of([6], batch_size=2, user_code_noise=0.5).fingerprint
    assert noisy != plan_of([6], batch_size=2).fingerprint
    assert noisy == plan_of([6], batch_size=2, user_code_noise=np.float64(0.5)).fingerprint
    assert noisy != plan_of([6], batch_size=2, moshi_code_noise=0.5).fingerprint


def test_batches_are_of_like_length() -> None:
    plan = plan_of([6, 1, 2] * 8, batch_size=4, buckets=(3, 7))
    lengths = [plan.batch(number)[0] for number in range(plan.batches_per_epoch)]
    assert sorted(lengths) == [3] * 4 + [7] * 2
    # what is left of the short ones goes with the long ones
    plan = plan_of([6, 1, 2] * 3, batch_size=4, buckets=(3, 7))
    assert sorted(plan.batch(number)[0] for number in range(3)) == [3, 7, 7]


def test_epochs_and_seeds_differ() -> None:
    def orders(**options: Any) -> list[list[int]]:
        plan = plan_of([6] * 12, batch_size=4, **options)
        return [[chunk for number in range(3) for chunk in plan.batch(3 * epoch + number)[1]] for epoch in range(2)]

    first, second = orders(seed=0)
    assert first != second and orders(seed=1)[0] != first and orders(seed=0) == [first, second]
    # and the company that a chunk keeps
    assert {frozenset(first[at : at + 4]) for at in (0, 4, 8)} != {frozenset(second[at : at + 4]) for at in (0, 4, 8)}
    assert orders(shuffle=False) == [list(range(12))] * 2


# ---------------------------------------------------------------------------------------------------------- a stream


@settings(max_examples=15, deadline=None)
@given(options=PLANS, cut=st.integers(0, 12), swap=st.sampled_from([0.0, 0.5]), noise=st.sampled_from([0.0, 0.5]))
def test_resumed_is_uninterrupted(options: dict[str, Any], cut: int, swap: float, noise: float) -> None:
    dataset = dataset_of(options["lengths"])
    options = {key: value for key, value in options.items() if key != "lengths"}
    options |= {"max_length": 7, "swap_moshi_user": swap, "user_code_noise": noise}
    whole = loader_of(dataset, **options)
    expected = [next(whole) for _ in range(cut + 3)]
    interrupted = loader_of(dataset, **options)
    for _ in range(cut):
        next(interrupted)
    state = json.loads(json.dumps(interrupted.get_state()))
    resumed = loader_of(dataset, **options)
    next(resumed)
    resumed.set_state(state)
    for batch in expected[cut:]:
        assert_equal(next(resumed), batch)
    for loader in (whole, interrupted, resumed):
        loader.close()


@settings(max_examples=10, deadline=None)
@given(options=PLANS, processes=st.integers(1, 3))
def test_processes_share_the_batches_of_one(options: dict[str, Any], processes: int) -> None:
    dataset = dataset_of(options["lengths"])
    options = {key: value for key, value in options.items() if key != "lengths"}
    options |= {"max_length": 7, "batch_size": processes * options["batch_size"], "epochs": 1, "user_code_noise": 0.5}
    shares = [
        list(loader_of(dataset, **options, process_index=index, process_count=processes)) for index in range(processes)
    ]
    for batch, *parts in zip(loader_of(dataset, **options), *shares, strict=True):
        assert_equal({key: np.concatenate([part[key] for part in parts]) for key in batch}, batch)


def test_end_of_epochs() -> None:
    loader = loader_of(dataset_of([4] * 5), epochs=2)
    assert len(list(loader)) == 6 and loader.position == 6 and loader.epoch == 2
    assert list(loader) == []
    assert sum(int(batch["attention_mask"].sum()) for batch in loader_of(dataset_of([4] * 5), epochs=1)) == 25


def test_worker_processes_make_the_same_batches() -> None:
    dataset = dataset_of([6, 5, 23, 2])
    with_workers = loader_of(dataset, workers=2)
    without = loader_of(dataset)
    for _ in range(3):
        batch = next(with_workers)
        assert_equal(batch, next(without))
        # not in shared memory, which an error would leave behind
        assert {type(array) for array in batch.values()} == {np.ndarray}
    state = with_workers.get_state()
    with_workers.close()
    again = loader_of(dataset)
    again.set_state(state)
    assert_equal(next(again), next(without))


def test_a_worker_that_is_killed_is_told() -> None:
    loader = loader_of(dataset_of([6] * 20), workers=1)
    next(loader)
    (worker,) = [child for child in multiprocessing.active_children() if "grain" in child.name]
    worker.kill()
    with pytest.raises(WorkerError, match=r"`data\.workers` is 1, .* exit code -9\. .*__main__.* memory may lack"):
        list(loader)  # some are made already


@pytest.mark.parametrize(
    ("process", "message"),
    [
        (
            SimpleNamespace(_inheriting=True, daemon=False),
            "is 1, but what starts .* under `if __name__ == .__main__.:`",
        ),
        (SimpleNamespace(daemon=True), "is 1, but this process is a daemon.*: set it to 0"),
    ],
)
def test_processes_that_can_have_no_workers(
    process: SimpleNamespace, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patches:
        patches.setattr(multiprocessing, "current_process", lambda: process)
        with pytest.raises(WorkerError, match=message):
            next(loader_of(dataset_of([4]), workers=1))
        next(loader_of(dataset_of([4])))


UNGUARDED = """
import numpy as np
from transformers_moshi_flax.training.data.loading import make_loader
from transformers_moshi_flax.training.data.prepared import open_dataset

text, audio = np.zeros(4, int), np.zeros((1, 4), int)
dataset = open_dataset([{"moshi_text_tokens": text, "moshi_audio_tokens": audio, "user_audio_tokens": audio}])
sizes = {"vocab_size": 60, "audio_vocab_size": 32, "num_codebooks": 1}
loader = make_loader(dataset, batch_size=1, max_length=5, workers=1, **sizes)
next(loader)
"""
KILLED = f"import time\n{UNGUARDED}\nprint('made', flush=True)\ntime.sleep(60)"


def test_a_script_without_a_guard_is_told_of_it(tmp_path: Path) -> None:
    """By the worker, which ends there, and by the script."""
    (tmp_path / "script.py").write_text(UNGUARDED)
    process = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=120)
    told = [line for line in process.stderr.splitlines() if "WorkerError: " in line]
    assert process.returncode == 1 and len(told) == 2 and process.stderr.count("\nTraceback") == 1
    assert all('under `if __name__ == "__main__":`' in line for line in told)
    assert "exit code 1. If" in told[1]


def test_worker_processes_end_with_a_killed_trainer() -> None:
    arguments = [sys.executable, "-c", KILLED]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout.readline() == "made\n"
            process.send_signal(signal.SIGKILL)
            # the pipe ends when all that have it have ended
            assert process.communicate(timeout=30) == ("", None)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def test_an_error_in_the_thread_arrives() -> None:
    samples = [sample(4), sample(4, 1)]
    dataset = open_dataset(samples)
    samples[1]["moshi_text_tokens"][:] = 60
    loader = loader_of(dataset, shuffle=False, batch_size=1)
    next(loader)
    with pytest.raises(ValueError, match="'sample 1': `moshi_text_tokens` has the id 60"):
        next(loader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"max_length": 1}, "`max_length` is 1"),
        ({"min_length": 5}, "`min_length` is 5"),
        ({"min_length": 4}, "none of the 2 conversations has as many frames"),
        ({"buckets": (5, 3)}, "`buckets` are"),
        ({"buckets": (3,)}, "`buckets` are"),
        ({"seed": -1}, "`seed` is -1"),
        ({"swap_moshi_user": 1.5}, "`swap_moshi_user` is 1.5"),
        ({"user_code_noise": -0.5}, "`user_code_noise` is -0.5"),
        ({"moshi_code_noise": 1.5}, "`moshi_code_noise` is 1.5"),
        ({"swap_moshi_user": 0.5}, "1 conversations have no `user_text_tokens`, 'sample 1' is the first"),
        ({"process_count": 3}, "`batch_size` is 2, which 3 processes cannot share"),
        ({"process_index": 1}, "`process_index` is 1"),
        ({"workers": -1}, "`workers` is -1"),
        ({"epochs": 0}, "`epochs` is 0"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    dataset = open_dataset([sample(3), sample(2, user_text=False)])
    with pytest.raises(ValueError, match=message):
        loader_of(dataset, **options)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "no position of a loader"),
        ({"version": 1, "position": "2", "plan": ""}, "no position of a loader"),
        ({"version": 1, "position": 2}, "no position of a loader"),
        (loader_of(dataset_of([4]), seed=1).get_state(), "other data or settings"),
        (loader_of(dataset_of([5])).get_state(), "other data or settings"),
    ],
)
def test_bad_states(state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader_of(dataset_of([4])).set_state(state)


def test_without_grain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "grain", None)
    with pytest.raises(ImportError, match=r"transformers-moshi-flax\[train\]"):
        loader_of(dataset_of([4]))
