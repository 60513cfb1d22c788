"""Compiler options that only some platforms and versions have."""

import functools

import jax


@functools.cache
def cpu_options(name: str, value: str) -> dict[str, str]:
    """An option for ``jax.jit`` where the default platform is the CPU and its compiler knows the option, else none."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x, compiler_options={name: value}).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:  # another jaxlib may not have it
        return {}
    return {name: value}
