"""Devices as a mesh of the axes ``data``, ``fsdp`` and ``tensor``, and how state and batches lie on it.

Rows of a batch are dealt over ``data`` and ``fsdp``. Parameters lie as ``partitioning.PARTITION_RULES`` says, split
over ``fsdp`` and ``tensor``; what the optimizer keeps for a parameter lies as the parameter. With several processes
every one runs the same program on its own rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey

from ..partitioning import param_shardings

AXES = ("data", "fsdp", "tensor")
ROW_AXES = ("data", "fsdp")


def initialize_distributed(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins this process to the others of the run, before anything else uses JAX; alone it does nothing.

    Args:
        coordinator_address: ``host:port`` of process 0.
        num_processes: of the run; None for this one alone.
        process_id: of this one, from 0.

    Raises:
        ValueError: some of them are missing or out of range.
    """
    if num_processes is None:
        for name, value in {"coordinator_address": coordinator_address, "process_id": process_id}.items():
            if value is not None:
                raise ValueError(f"`{name}` is {value!r}, but `num_processes` is missing; give all three of them.")
        return
    if num_processes < 1:
        raise ValueError(f"`num_processes` must be at least 1, but is {num_processes}.")
    if coordinator_address is None or process_id is None:
        raise ValueError(
            f"`num_processes` is {num_processes}, but `coordinator_address` is {coordinator_address!r} and "
            f"`process_id` is {process_id!r}; give the address of process 0, and each process its number."
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(f"`process_id` must be in [0, {num_processes}), but is {process_id}.")
    # it would swallow SIGTERM from here on
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(coordinator_address, num_processes, process_id)


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """The devices as a mesh of the axes :data:`AXES`.

    Args:
        data: groups of devices that hold a copy of everything each; they share the rows.
        fsdp: devices that share the rows of a group, and hold a part of every parameter each.
        tensor: devices that share the work on a row.

    Raises:
        ValueError: a size below 1; more devices than there are; fewer, where several processes must all take part.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1, but is {size}.")
    wanted, devices = math.prod(sizes.values()), jax.devices()
    product = f"`data` x `fsdp` x `tensor` = {data} x {fsdp} x {tensor} = {wanted}"
    if wanted > len(devices):
        raise ValueError(f"{product} devices are wanted, but there are {len(devices)}; use a smaller mesh.")
    if wanted < len(devices) and jax.process_count() > 1:
        raise ValueError(
            f"{product} devices are wanted of the {len(devices)} that {jax.process_count()} processes have; use a "
            "mesh of all devices."
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * len(AXES), devices=devices[:wanted])


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Where every array of a train state lies.

    Args:
        mesh: of :func:`make_mesh`.
        state: a ``TrainState``, or its shapes (``jax.eval_shape``).

    Returns:
        The same tree of ``NamedSharding``: parameters by the table; what the optimizer keeps of a parameter's shape
        under its path, as the parameter; all else on every device.

    Raises:
        ValueError: the mesh splits a dimension that it does not divide; all such are listed.
    """
    parameters = {**flatten_dict(dict(state.params), sep="/"), **flatten_dict(dict(state.frozen_params), sep="/")}
    placed = flatten_dict(param_shardings(mesh, unflatten_dict(parameters, sep="/")), sep="/")
    everywhere = NamedSharding(mesh, PartitionSpec())

    def sharding(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        path = parameter_path(keys)
        if path in parameters and parameters[path].shape == leaf.shape:
            return placed[path]
        return everywhere

    return jax.tree_util.tree_map_with_path(sharding, state)


def parameter_path(keys: tuple[Any, ...]) -> str:
    """The names of dictionaries at the end of a leaf's path, "/"-joined: the parameter that it belongs to, if any."""
    names: list[str] = []
    for key in reversed(keys):
        if not isinstance(key, DictKey):
            break
        names.append(str(key.key))
    return "/".join(reversed(names))


def put_state(state: Any, mesh: Mesh) -> Any:
    """A train state on the mesh.

    Every process must have the whole of it, with the same values.

    Raises:
        ValueError: see :func:`state_shardings`.
    """

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, state, state_shardings(mesh, state))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of every array of a batch: rows over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def put_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """A batch on the mesh, from the rows that each process has.

    Args:
        batch: arrays of this process's rows, equally many in each process. Those of process 0 come first.
        mesh: of :func:`make_mesh`.

    Raises:
        ValueError: the rows cannot be shared equally by the devices.
    """
    processes, devices = jax.process_count(), math.prod(mesh.shape[name] for name in ROW_AXES)
    rows = processes * len(next(iter(batch.values())))
    if rows % devices:
        raise ValueError(
            f"`batch` has {rows} rows, which are not divisible by `data` x `fsdp` = "
            f"{mesh.shape['data']} x {mesh.shape['fsdp']} = {devices}; use a multiple of it."
        )
    sharding = batch_sharding(mesh)
    own = sharding.addressable_devices_indices_map((rows,)).values()
    if len({row for index in own if index for row in range(*index[0].indices(rows))}) * processes != rows:
        raise ValueError(
            f"`mesh` has {devices} groups of rows (`data` x `fsdp`) for {processes} processes, each of which must "
            "have rows of its own; use more of them and a smaller `tensor`."
        )
    return {name: jax.make_array_from_process_local_data(sharding, np.asarray(rows)) for name, rows in batch.items()}
