"""Kernels on a mesh: each device runs them on its own sequences and heads, and nothing is gathered.

XLA cannot look into a kernel and would replicate its operands. Where the axes of the surrounding mesh are explicit, the
arrays' types say how batch and heads are split, and a `shard_map` runs one part on each device. Where the axes are
automatic, only XLA decides how: it is told which dimensions are independent, and splits the kernel like its operands.
Value heads are split only where the key heads are.
"""

import math
from collections.abc import Callable, Sequence

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from .machine import Machine


def over_mesh(
    machine: Machine,
    run: Callable,
    operands: Sequence[str],
    results: Sequence[str],
    heads: tuple[int, int],
    arrays: Sequence[jax.Array],
) -> tuple[jax.Array, ...]:
    """`run(*arrays)`, a tuple, by parts on a mesh.

    Args:
        machine: what the call is traced for; the interpreter's arithmetic is XLA's to split.
        run: works for any batch and any number of heads that the arrays share.
        operands, results: dimensions of each array, as in "B T HV V"; those but B, H and HV are local.
        heads: the numbers of key and of value heads, the sizes of H and HV.
    """
    sizes = dict(zip(("H", "HV"), heads, strict=True))
    mesh = jax.sharding.get_abstract_mesh()
    if machine.interpret or (jax.device_count() if mesh.empty else mesh.size) == 1:
        return run(*arrays)
    free = {name: kind for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
    if mesh.empty or any(kind == AxisType.Auto and mesh.shape[name] > 1 for name, kind in free.items()):
        return _partitioned(run, operands, results, sizes)(*arrays)
    if not free:
        return run(*arrays)
    place = _placement(operands, [jax.typeof(x).sharding.spec for x in arrays], sizes, mesh.shape)
    specs = tuple(map(place, operands))
    arrays = [jax.sharding.reshard(x, spec) if any(spec) else x for x, spec in zip(arrays, specs, strict=True)]
    return jax.shard_map(
        run, in_specs=specs, out_specs=tuple(map(place, results)), axis_names=set(free), check_vma=False
    )(*arrays)


def _placement(operands: Sequence[str], specs: Sequence, sizes: dict[str, int], axes: dict[str, int]) -> Callable:
    """dims -> the spec of an array, as the first operand that is split over them splits batch and heads."""
    found: dict = {}
    for dims, spec in zip(operands, specs, strict=True):
        for letter, names in zip(dims.split(), spec, strict=False):
            if names:
                found.setdefault("H" if letter == "HV" else letter, names)
    heads = found.get("H")
    shards = math.prod(axes[name] for name in ((heads,) if isinstance(heads, str) else heads or ()))
    heads = None if sizes["H"] % shards else heads
    where = {"B": found.get("B"), "H": heads, "HV": heads}
    return lambda dims: PartitionSpec(*(where.get(letter) for letter in dims.split()))


def _partitioned(run: Callable, operands: Sequence[str], results: Sequence[str], sizes: dict[str, int]) -> Callable:
    text = [" ".join(names) for names in _factors([*operands, *results], sizes)]
    order = dict.fromkeys(" ".join(text).replace("(", "").replace(")", "").split())  # as the compiler wants them

    def partition(mesh, arg_shapes, result_shapes):
        place = _placement(operands, [x.sharding.spec for x in arg_shapes], sizes, mesh.shape)
        shardings = lambda dims: NamedSharding(mesh, place(dims))  # noqa: E731
        return mesh, run, tuple(map(shardings, results)), tuple(map(shardings, operands))

    partitioned = custom_partitioning(run)
    partitioned.def_partition(
        partition=partition,
        sharding_rule=f"{', '.join(text[: len(operands)])} -> {', '.join(text[len(operands) :])}",
        need_replication_factors=tuple(name for name in order if name not in ("b", "h")),
        **({"n": sizes["HV"] // sizes["H"]} if "n" in order else {}),
    )
    return partitioned


def _factors(arrays: Sequence[str], sizes: dict[str, int]) -> list[list[str]]:
    """By array, the factor of each dimension: b, h, for value heads h groups of n; local dimensions have names of their
    own, as equal letters need not be equal sizes."""
    shared = "h" if sizes["H"] == sizes["HV"] else "(h n)"
    known = {"B": "b", "H": "h", "HV": shared} if sizes["H"] > 1 else {"B": "b"}
    return [[known.get(letter, f"x{i}y{j}") for j, letter in enumerate(dims.split())] for i, dims in enumerate(arrays)]
