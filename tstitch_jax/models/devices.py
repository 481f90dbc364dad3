"""Many devices: a mesh, and where networks and images lie on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tstitch_jax.core.checks import is_whole, shown
from tstitch_jax.core.types import Params
from tstitch_jax.models.types import Autoencoder, FeatureNetwork, Network, TextEncoder

DATA, MODEL = "data", "model"
"""The axes of a mesh: over the one images are spread, over the other parameters."""

OWN, ALL, OWN_IN_STEPS = PartitionSpec(DATA), PartitionSpec(), PartitionSpec(None, DATA)
"""What each device sees: its images, everything, or its images of every step."""

N = TypeVar("N", Network, Autoencoder, FeatureNetwork, TextEncoder)


def make_mesh(model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of ``[devices / model, model]`` devices with the axes ``"data"`` and ``"model"``.

    Args:
        model: Over how many devices the parameters of a network are spread; 1 copies them to each.
        devices: Which devices; all of all hosts by default.

    Raises:
        ValueError: If ``model`` does not divide their number, or there are none.
    """
    devices = jax.devices() if devices is None else list(devices)
    if not devices:
        raise ValueError("a mesh needs at least one device, got none")
    if not is_whole(model) or model < 1 or len(devices) % model:
        raise ValueError(
            f"model must be a whole number that divides the number of devices, {len(devices)}, "
            f"got {shown(model)}"
        )
    # Neighbours share a network; automatic axes are those that jit spreads by itself.
    grid = np.array(devices).reshape(-1, model)
    return Mesh(grid, (DATA, MODEL), axis_types=(AxisType.Auto,) * 2)


def _split(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How a parameter is spread over the model axis.

    A kernel by its output features; that of a projection back (its name ends in "out") by its input
    features, which then are the ones that lie spread (Shoeybi et al. 2019, arXiv:1909.08053).
    """
    parts = mesh.shape[MODEL]
    if parts == 1 or len(shape) < 2:
        return PartitionSpec()
    axes = [-2, -1] if name.split("/")[-2:][0].endswith("out") else [-1, -2]
    for axis in axes:
        if shape[axis] % parts == 0:
            spec: list[str | None] = [None] * len(shape)
            spec[axis] = MODEL
            return PartitionSpec(*spec)
    return PartitionSpec()


def put(value: Any, sharding: NamedSharding) -> Any:
    """The same array, laid out so; of a shape, the shape laid out so.

    On a mesh of several hosts each must give the same values, and holds only its own part.
    """
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
    if getattr(value, "sharding", None) == sharding or sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    return jax.make_array_from_callback(np.shape(value), sharding, lambda index: value[index])


def _axes(mesh: Any) -> Mesh:
    """The mesh with its two axes, whatever others it has or lacks, and however it was made."""
    if not isinstance(mesh, Mesh) or DATA not in mesh.shape or set(mesh.shape) - {DATA, MODEL}:
        axes = mesh.axis_names if isinstance(mesh, Mesh) else repr(mesh)[:80]
        raise ValueError(f'mesh needs an axis "data", and may have "model" (make_mesh), got {axes}')
    devices = mesh.devices.T if mesh.axis_names == (MODEL, DATA) else mesh.devices
    devices = devices.reshape(-1, mesh.shape.get(MODEL, 1))
    return Mesh(devices, (DATA, MODEL), axis_types=(AxisType.Auto,) * 2)


def shard_params(params: Params, mesh: Mesh, *, copies: bool = False) -> Params:
    """Parameters on a mesh: copied along "data", spread along "model" (or copied there too)."""
    mesh = _axes(mesh)

    def one(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = PartitionSpec() if copies else _split(name, np.shape(leaf), mesh)
        return put(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(one, params)


def shard(network: N, mesh: Mesh) -> N:
    """The same network of any kind, its parameters on every device of a mesh.

    ``ts.sample`` of networks on a mesh spreads the images over it; the results are the same. With
    a model axis of more than one device each holds a part of a network's parameters (for networks
    that one device cannot hold: every layer then waits for the others'), and all of an
    autoencoder's or a feature network's.

    Args:
        network: What ``load`` returns.
        mesh: From ``make_mesh``, or any with an axis ``"data"`` and at most a second, ``"model"``.

    Raises:
        ValueError: If the mesh has other axes.
    """
    copies = not isinstance(network, Network)
    params = shard_params(network.params, mesh, copies=copies)
    return dataclasses.replace(network.with_params(params), card=network.card)


def mesh_of(*owners: Network | Autoencoder | None) -> Mesh | None:
    """The mesh that networks lie on; None if they lie on one device, or are traced.

    Raises:
        ValueError: If they do not all lie on the same.
    """
    meshes: dict[Mesh | None, str] = {}
    for owner in owners:
        for leaf in jax.tree.leaves(owner.tree) if owner is not None else ():
            traced = isinstance(leaf, Tracer)
            sharding = None if traced else getattr(leaf, "sharding", None)
            mesh: Any = sharding.mesh if isinstance(sharding, NamedSharding) else None
            meshes.setdefault(mesh, owner.card.name)  # pyright: ignore[reportOptionalMemberAccess]
    if len(meshes) > 1:
        (_, here), (_, there), *_ = meshes.items()
        raise ValueError(
            f"{here} and {there} lie on different devices; ts.shard each on the same mesh"
        )
    return next(iter(meshes), None)


def rows(mesh: Mesh) -> list[Mesh]:
    """The mesh cut along "data": the devices that hold all of a network once, as meshes."""
    return [_axes(Mesh(devices[None], mesh.axis_names)) for devices in mesh.devices]


def part(tree: Any, row: Mesh) -> Any:
    """Arrays on a mesh, as one of its ``rows`` holds them; nothing is copied."""
    here = set(row.devices.flat)

    def one(leaf: jax.Array) -> jax.Array:
        pieces = [shard.data for shard in leaf.addressable_shards if shard.device in here]
        spec = leaf.sharding.spec  # pyright: ignore[reportAttributeAccessIssue]
        return jax.make_array_from_single_device_arrays(
            leaf.shape, NamedSharding(row, spec), pieces
        )

    return jax.tree.map(one, tree)


def over_data(mesh: Mesh, value: Any) -> Any:
    """An array with its leading axis spread over "data", copied along "model"."""
    return put(value, NamedSharding(mesh, OWN))


def fill(mesh: Mesh, value: np.ndarray) -> np.ndarray:
    """The batch, with its last image repeated until the devices divide it."""
    missing = -len(value) % mesh.shape[DATA]
    return np.concatenate([value, np.repeat(value[-1:], missing, axis=0)]) if missing else value


def each_device(function: Callable[..., Any], mesh: Mesh, inputs: Any, outputs: Any) -> Any:
    """``function``, run along "data" by each device, which sees only its own shard.

    No device then waits for another. Along "model" jit spreads the work as the parameters lie.

    Args:
        function: What to run.
        mesh: On what.
        inputs, outputs: ``OWN``, ``ALL`` or ``OWN_IN_STEPS`` for each.
    """
    manual = {DATA, MODEL} if mesh.shape[MODEL] == 1 else {DATA}
    return jax.shard_map(
        function, mesh=mesh, in_specs=inputs, out_specs=outputs, axis_names=manual, check_vma=False
    )
