"""What is counted of a server, in the format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

COMPILED = "/jax/core/compile/backend_compile_duration"
"""What JAX tells when XLA has made a program, or found one in its cache."""


class Metrics:
    """The figures of one server; names begin with ``moshi_``, those of the process with ``process_``."""

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
        self.compilations = Counter(
            "moshi_compilations", "Programs compiled since the port opened: none, if all is well.", registry=registry
        )
        # memory, processor time, open files; where the system tells
        ProcessCollector(registry=registry)
        registry.register(DeviceMemory())

    @contextmanager
    def counting_compilations(self) -> Iterator[None]:
        """Count them, in whichever thread."""

        def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
            if event == COMPILED:
                self.compilations.inc()

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    def text(self) -> bytes:
        """All of it, for ``/metrics``."""
        return generate_latest(self.registry)


class DeviceMemory(Collector):
    """The memory of this process's devices, of those whose backend tells."""

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """As of now."""
        figures = {
            "bytes_in_use": GaugeMetricFamily("moshi_device_memory_bytes", "Memory in use.", labels=["device"]),
            "peak_bytes_in_use": GaugeMetricFamily("moshi_device_memory_peak_bytes", "Its peak.", labels=["device"]),
            "bytes_limit": GaugeMetricFamily("moshi_device_memory_limit_bytes", "What there is.", labels=["device"]),
        }
        for device in jax.local_devices():
            told = device.memory_stats() or {}
            for name, figure in figures.items():
                if name in told:
                    figure.add_metric([str(device.id)], told[name])
        yield from figures.values()
