"""What is counted of a server, in the format of Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """The figures of one server; every name begins with ``moshi_``."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.slots = Gauge("moshi_slots", "Dialogues that are possible at once.", registry=registry)
        self.dialogues = Gauge("moshi_dialogues", "Dialogues that are held now.", registry=registry)
        self.waiting = Gauge("moshi_waiting", "Callers who wait for a slot.", registry=registry)
        self.ended = Counter("moshi_dialogues_ended", "Dialogues by why they ended.", ["reason"], registry=registry)
        self.refusals = Counter("moshi_refusals", "Callers without a dialogue, by why.", ["reason"], registry=registry)
        self.recordings = Counter(
            "moshi_recordings", "Dialogues to be kept, by result.", ["result"], registry=registry
        )
        self.steps = Histogram(
            "moshi_step_seconds",
            "Time of a step of all slots, samples in to samples out.",
            buckets=(0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1, 0.16, 0.32, 1.0),
            registry=registry,
        )
        self.late = Counter("moshi_late_steps", "Steps that ended after the next one was due.", registry=registry)
        self.dropped = Counter(
            "moshi_dropped_audio_seconds", "Callers' audio that was dropped as too much.", registry=registry
        )
        self.missing = Counter(
            "moshi_missing_frames", "Frames that were silence because a caller's audio was late.", registry=registry
        )

    def text(self) -> bytes:
        """All of it, for ``/metrics``."""
        return generate_latest(self.registry)
