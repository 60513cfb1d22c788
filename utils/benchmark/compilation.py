"""What the compiled programs of this library cost: seconds of each stage, and memory beside arguments and results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

STAGES = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "XLA",
}


@contextmanager
def stage_seconds() -> Iterator[dict[tuple[str, str], float]]:
    """Seconds of the stages of all programs compiled inside, by program and stage.

    XLA's include a look into the persistent cache where there is one. A program that is a part of another one counts
    in the other's tracing as well.
    """
    seconds: dict[tuple[str, str], float] = {}

    def listen(event: str, duration: float, fun_name: str = "", **_: Any) -> None:
        if event in STAGES:
            key = fun_name.removeprefix("jit(").removesuffix(")"), STAGES[event]
            seconds[key] = seconds.get(key, 0.0) + duration

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def summed(seconds: dict[tuple[str, str], float]) -> dict[str, float]:
    """Seconds by stage, without the tracing of what is a part of another program only."""
    programs = {program for program, stage in seconds if stage == "XLA"}
    return {
        stage: sum(value for (program, of), value in seconds.items() if of == stage and program in programs)
        for stage in STAGES.values()
    }


def longest(seconds: dict[tuple[str, str], float], least: float = 0.5) -> dict[str, float]:
    """Seconds of all stages of the programs that take more than ``least``, the longest first."""
    programs: dict[str, float] = {}
    for (program, _), value in seconds.items():
        if (program, "XLA") in seconds:
            programs[program] = programs.get(program, 0.0) + value
    return dict(sorted(((p, s) for p, s in programs.items() if s > least), key=lambda item: -item[1]))


@dataclass(frozen=True)
class ProgramCost:
    """A compiled program.

    Attributes:
        program: ``start`` (the prompt) or ``advance`` (the loop).
        stages: seconds by stage.
        temporary_bytes: memory beside arguments and results; the caches are both, in one place.
    """

    program: str
    stages: dict[str, float]
    temporary_bytes: int


def compile_program(name: str, program: Any, *args: Any) -> ProgramCost:
    """Compiles ``program`` for the arguments; the call that follows finds it compiled."""
    with stage_seconds() as seconds:
        compiled = program.lower(*args).compile()
    stages = {stage: seconds.get((name, stage), 0.0) for stage in STAGES.values()}
    return ProgramCost(name, stages, compiled.memory_analysis().temp_size_in_bytes)
