"""Steps in real time, on a clock that only the test moves."""

from __future__ import annotations

import pytest

from transformers_moshi_flax.cli.pacing import Pace


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


def run(work: list[float], realtime: bool) -> tuple[Pace, list[float]]:
    """A pace of 80 ms after steps that take ``work`` seconds, and when each began."""
    clock = Clock()
    pace = Pace(0.08, realtime, clock, clock.sleep)
    begun = []
    for seconds in work:
        pace.begin()
        begun.append(clock.now - 100.0)
        clock.now += seconds
        pace.end()
    return pace, begun


def test_a_frame_is_not_heard_before_its_last_sample():
    pace, begun = run([0.01] * 4, realtime=True)
    assert begun == pytest.approx([0.08, 0.16, 0.24, 0.32])
    assert pace.lateness == [0, 0, 0, 0]
    assert pace.report() == (
        "ms a step: p50 10.0, p95 10.0, p99 10.0, max 10.0; deadline misses: 0 of 4, worst lateness 0.0 ms"
    )


def test_a_long_step_is_late_and_so_are_those_that_it_holds_up():
    # ready at .28 instead of .16, at .33 instead of .24, at .34 instead of .32, and then in time
    pace, begun = run([0.2, 0.05, 0.01, 0.01], realtime=True)
    assert begun == pytest.approx([0.08, 0.28, 0.33, 0.34])
    assert pace.lateness == pytest.approx([0.12, 0.09, 0.02, 0], abs=1e-9)
    assert pace.report().endswith("deadline misses: 3 of 4, worst lateness 120.0 ms")
    assert "p50 30.0" in pace.report() and "max 200.0" in pace.report()


def test_without_real_time_nothing_waits():
    pace, begun = run([0.01, 0.03], realtime=False)
    assert begun == pytest.approx([0, 0.01])
    assert pace.realtime_factor == pytest.approx(0.25)
    assert pace.report().endswith("; real-time factor 0.250")
