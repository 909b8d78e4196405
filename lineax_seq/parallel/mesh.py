"""The mesh of a job, and where the arrays of a training step lie on it.

    data     rows of the batch
    fsdp     rows of the batch; parameters and optimizer state are split over it too
    tensor   columns of parameters; XLA splits the products with them
    seq      time: recurrences, convolutions and attention exchange what crosses a shard's border

A training step is one program over global arrays. Its loss runs shard by shard (`sharded_loss`): every device computes
the two sums of its rows and its stretch of time, with whole parameters that XLA gathers for it, and the sums of all
devices are added. Optimizer and state stay split. So the program of a mesh of one device is the one without a mesh.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from ..core.checks import nearest

PyTree = Any
AXES = ("data", "fsdp", "tensor", "seq")
ROWS, SEQ = ("data", "fsdp"), "seq"


def parse_mesh(text: str) -> dict[str, int]:
    """The size of every axis, 1 where not named: `"data=2,seq=4"` -> `{"data": 2, "fsdp": 1, "tensor": 1, "seq": 4}`.

    Raises:
        ValueError: not NAME=SIZE pairs, an unknown or repeated name, a size that is no whole number of at least 1.
    """
    sizes: dict[str, int] = {}
    for entry in text.split(","):
        name, equals, size = (part.strip() for part in entry.partition("="))
        if not equals:
            raise ValueError(f"mesh: {entry!r} in {text!r} is not NAME=SIZE; write it like data=2,seq=4.")
        if name not in AXES:
            raise ValueError(f"mesh: unknown axis {name!r}{nearest(name, AXES)}, wants one of {', '.join(AXES)}.")
        if name in sizes:
            raise ValueError(f"mesh: axis {name!r} is given twice in {text!r}; give it once.")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"mesh: {name}={size}, wants a whole number of at least 1.")
        sizes[name] = int(size)
    return {name: sizes.get(name, 1) for name in AXES}


def make_mesh(sizes: str | Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh with all of `AXES`; devices that are near each other are neighbours on the last axes.

    Args:
        sizes: as `parse_mesh` takes or gives it.
        devices: None is all devices of all processes.

    Raises:
        ValueError: as `parse_mesh`; or the sizes multiply to another number than there are devices.
    """
    text = sizes if isinstance(sizes, str) else ",".join(f"{name}={size}" for name, size in sizes.items())
    sizes = parse_mesh(text)
    count, wanted = jax.device_count() if devices is None else len(devices), math.prod(sizes.values())
    if wanted != count:
        rest = wanted // sizes["data"]
        advice = f"set data={count // rest}" if count % rest == 0 else f"choose sizes that multiply to {count}"
        raise ValueError(
            f"mesh: {text} asks for {wanted} device{'s' * (wanted != 1)}, and there {'are' if count != 1 else 'is'} "
            f"{count}; {advice}, or start the job on {wanted} (simulated ones: "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={wanted}, or experiments.launch_local)."
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def time_axis(mesh: Mesh | None) -> str | None:
    """The `axis_name` of what runs inside `sharded_loss`: None where time is whole."""
    return SEQ if mesh is not None and mesh.shape[SEQ] > 1 else None


def row_shards(mesh: Mesh | None) -> int:
    """How many parts the rows of a batch are in."""
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in ROWS)


# ---- the loss


def sharded_loss(loss_function: Callable, mesh: Mesh) -> Callable:
    """`loss_function(params, batch, rng) -> (sum, sum)` over global arrays, differentiable in params.

    `loss_function` sees whole parameters and one shard `[B / rows, T / seq]` of every array of the batch, and returns
    the sums of that shard, in which it uses `time_axis(mesh)` for what crosses a shard's border.
    """

    def loss(params, batch, rng):
        def of_shard(params, batch, rng):
            return lax.psum(loss_function(params, batch, rng), (*ROWS, SEQ))

        return jax.shard_map(
            of_shard,
            mesh=mesh,
            in_specs=(P(), P(ROWS, SEQ), P()),
            out_specs=P(),
            axis_names={*ROWS, SEQ},  # tensor is left to XLA
            check_vma=False,  # scans that start from zeros would have to say on which axes they will vary
        )(params, batch, rng)

    return loss


# ---- parameters and optimizer state


def state_shardings(mesh: Mesh, tree: PyTree) -> PyTree:
    """Where each array (or shape) of a training state lies: split over `fsdp` and `tensor` where a size divides.

    A function of the shape alone, so that a moment of a parameter lies with it. Of the last two axes (those before
    stack layers) `tensor` takes the longest it divides, and `fsdp` the other one, or the same where only that divides.
    """

    def place(leaf) -> NamedSharding:
        spec: list = [()] * leaf.ndim
        free = list(leaf.shape)
        candidates = sorted(range(max(0, leaf.ndim - 2), leaf.ndim), key=lambda axis: (-leaf.shape[axis], -axis))
        for name in ("tensor", "fsdp"):
            size = mesh.shape[name]
            fitting = [axis for axis in candidates if free[axis] % size == 0]
            if size > 1 and fitting:
                axis = next((a for a in fitting if not spec[a]), fitting[0])
                spec[axis] += (name,)
                free[axis] //= size
        while spec and not spec[-1]:
            spec.pop()
        return NamedSharding(mesh, P(*(names or None for names in spec)))

    return jax.tree.map(place, tree)


def distribute(tree: PyTree, shardings: PyTree) -> PyTree:
    """Host arrays that every process has whole, as global arrays; each process keeps its devices' parts."""

    def place(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree, shardings)


# ---- batches


class Part(NamedTuple):
    """The part of every batch `[B, T]` that a process reads: of its rows piece `block` of `blocks`, and columns."""

    block: int
    blocks: int
    columns: slice | None  # None: all


def local_part(mesh: Mesh, batch_size: int, length: int) -> Part:
    """What the devices of this process hold of a batch `[batch_size, length]`.

    Raises:
        ValueError: the mesh does not divide the batch, or gives this process rows that are not one piece.
    """
    for what, size, axes in (("rows of a batch", batch_size, ROWS), ("tokens of a row", length, (SEQ,))):
        shards = math.prod(mesh.shape[name] for name in axes)
        if size % shards:
            raise ValueError(
                f"mesh: {size} {what} do not divide over {'·'.join(axes)} = {shards} shards; "
                f"the next number that does is {-(-size // shards) * shards}."
            )
    held: dict[int, tuple[set[int], set[int]]] = {}  # process -> its shards of rows and of time
    for (data, fsdp, _, seq), device in np.ndenumerate(mesh.devices):
        rows, columns = held.setdefault(device.process_index, (set(), set()))
        rows.add(data * mesh.shape["fsdp"] + fsdp)
        columns.add(seq)
    rows, columns = (sorted(shards) for shards in held[jax.process_index()])
    count = len(rows)
    for process, shards in held.items():  # all of them: each process must come to the same end
        if not _is_run(shards[0]) or not _is_run(shards[1]) or len(shards[0]) != count or min(shards[0]) % count:
            raise ValueError(
                f"mesh: the devices of process {process} hold row shards {sorted(shards[0])} and time shards "
                f"{sorted(shards[1])} of {dict(mesh.shape)}, wants blocks of one size; choose sizes of which the last "
                "ones multiply up to the devices of a process."
            )
    width = length // mesh.shape[SEQ]
    span = slice(columns[0] * width, (columns[-1] + 1) * width)
    whole = len(columns) == mesh.shape[SEQ]
    return Part(rows[0] // count, row_shards(mesh) // count, None if whole else span)


def _is_run(numbers: set[int]) -> bool:
    return max(numbers) - min(numbers) == len(numbers) - 1


def place_batch(mesh: Mesh, part: Part, length: int, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """The global batch `[B, length]` whose `part` this process holds as host arrays `[B / part.blocks, columns]`."""
    sharding = NamedSharding(mesh, P(ROWS, SEQ))

    def place(x: np.ndarray) -> jax.Array:
        first = part.block * x.shape[0]

        def shard(index):
            rows, columns = (s.indices(n) for s, n in zip(index, (x.shape[0] * part.blocks, length), strict=True))
            begin = 0 if part.columns is None else part.columns.start
            return x[rows[0] - first : rows[1] - first, columns[0] - begin : columns[1] - begin]

        return jax.make_array_from_callback((x.shape[0] * part.blocks, length), sharding, shard)

    return {name: place(np.asarray(x)) for name, x in batch.items()}
