"""How arrays lie on devices: one mesh for training and evaluation, of one device or of many.

The mesh has two axes. A batch is spread over both. Along `fsdp`, devices share one copy of each
large leaf of the model and of what the optimiser knows of it; along `data`, each has its own, so
that frozen weights never travel there. Adapters and all that is small lie whole on each device. A
laptop is a mesh of 1 x 1.

Nothing here needs data or real devices: shapes, and a mesh of any devices, are enough.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA, FSDP = "data", "fsdp"

# Leaves of more bytes are split: to gather a smaller one costs as much as to keep it.
SPLIT_BYTES = 4 * 2**20


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (`data`, `fsdp`) of all devices, or of those given.

    Raises ValueError where `fsdp` does not divide their number.
    """
    devices = jax.devices() if devices is None else devices
    check_fsdp(fsdp, len(devices))
    shape = len(devices) // fsdp, fsdp
    return jax.make_mesh(shape, (DATA, FSDP), axis_types=(AxisType.Auto,) * 2, devices=devices)


def check_fsdp(fsdp: int, devices: int) -> None:
    """Raises ValueError where `fsdp` devices cannot share a copy of the weights."""
    if devices % fsdp:
        known = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
        raise ValueError(
            f"fsdp {fsdp} does not divide the {devices} devices: choose one of {known}"
        )


def check_batch(images: int, what: str, devices: int) -> None:
    """Raises ValueError where so many images at a time, in words, do not spread over devices."""
    if images % devices:
        raise ValueError(
            f"{what} makes {images} images at a time, which the {devices} devices cannot share in "
            f"equal parts: choose a multiple of {devices}"
        )


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of each leaf of a tree: of variables, of a state, or of a part of them.

    A leaf (anything with shape and dtype) of more than `SPLIT_BYTES` is split over `fsdp` along the
    longest of the axes that can be; what lies under a key `peft`, an adapter or the moments of one,
    is whole on each device, as are all other leaves. A leaf and its moments lie alike.
    """

    def of_leaf(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        size = mesh.shape[FSDP]
        large = math.prod(leaf.shape) * leaf.dtype.itemsize > SPLIT_BYTES
        if size == 1 or not large or any(getattr(key, "key", None) == "peft" for key in path):
            return whole(mesh)
        axes = [axis for axis, length in enumerate(leaf.shape) if length % size == 0]
        if not axes:
            return whole(mesh)
        axis = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, FSDP))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def whole(mesh: Mesh) -> NamedSharding:
    """The sharding of what lies whole on each device."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch, whose leading axis is spread over all devices."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def with_shardings(tree: Any, mesh: Mesh) -> Any:
    """The leaves as `jax.ShapeDtypeStruct` that know their shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings(tree, mesh),
    )


def place(tree: Any, mesh: Mesh) -> Any:
    """The leaves on their devices, each of which gets its part alone.

    Arrays that lie there already are left as they are. Of several processes each has the whole tree
    on its host.
    """

    def put(leaf: Any, sharding: NamedSharding) -> Any:
        if isinstance(leaf, jax.Array) and (
            not leaf.is_fully_addressable or leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        ):
            return leaf
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, shardings(tree, mesh))


@dataclasses.dataclass(frozen=True)
class StepShardings:
    """Of the arguments and results of a training step, `step(state, frozen, batch)`."""

    state: Any
    frozen: Any
    batch: NamedSharding  # of each leaf
    logs: NamedSharding  # of each

    @staticmethod
    def of(state: Any, frozen: Any, mesh: Mesh) -> StepShardings:
        """Those of a step whose arguments have these shapes."""
        return StepShardings(
            shardings(state, mesh), shardings(frozen, mesh), rows(mesh), whole(mesh)
        )


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """How a batch of so many images, a multiple of the devices, is spread over a mesh."""

    mesh: Mesh
    size: int

    @staticmethod
    def for_at_least(size: int, mesh: Mesh) -> BatchLayout:
        """The smallest batch of `size` images or more that spreads in equal parts."""
        return BatchLayout(mesh, -(-size // mesh.size) * mesh.size)

    @functools.cached_property
    def own(self) -> list[int]:
        """The rows of the batch that lie on this process's devices, in order; of one, all."""
        parts = rows(self.mesh).addressable_devices_indices_map((self.size,)).values()
        return sorted({row for (part,) in parts for row in range(*part.indices(self.size))})

    def place(self, batch: Any) -> Any:
        """A batch of this process's own rows, as part of the one that all devices hold."""
        position = {row: i for i, row in enumerate(self.own)}
        sharding = rows(self.mesh)

        def put(leaf: np.ndarray) -> jax.Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                start, stop, _ = index[0].indices(self.size)
                return leaf[position[start] : position[start] + stop - start]

            shape = self.size, *leaf.shape[1:]
            return jax.make_array_from_callback(shape, sharding, part)

        return jax.tree.map(put, batch)

    def local(self, array: jax.Array) -> jax.Array:
        """This process's own rows of an array that lies as a batch does, on its own devices."""
        if array.is_fully_addressable:
            return array
        shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start)
        mesh = Mesh(np.array([shard.device for shard in shards]), ("local",))
        return jax.make_array_from_single_device_arrays(
            (len(self.own), *array.shape[1:]),
            NamedSharding(mesh, PartitionSpec("local")),
            [shard.data for shard in shards],
        )
