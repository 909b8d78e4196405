"""Functions of rows, such as a model's: where rows are split over explicit mesh axes, each device takes its own."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P

from .placement import axes_of, names_of, resharded

PyTree = Any


def by_rows(function: Callable, whole: PyTree, *rows: jax.Array | None, summed: bool = False) -> PyTree:
    """`function(whole, *rows)`, run by parts where the first of `rows` is split over explicit axes.

    Args:
        whole: what every row needs, such as a model; it is gathered where it is split.
        rows: arrays `[B, ...]`, or None. One whose first axis is not B is needed whole too.
        summed: whether the results are sums over rows, not arrays `[B, ...]`.

    Raises:
        ValueError: an axis other than the first one is split.
    """
    first = jax.typeof(rows[0])
    mesh, spec = first.sharding.mesh, first.sharding.spec
    if mesh.empty or AxisType.Explicit not in mesh.axis_types or not any(spec):
        return function(whole, *rows)
    if any(spec[1:]):
        raise ValueError(f"rows of type {first} are split along an axis other than the first; gather that, or name it.")
    batch = names_of(spec[0])

    def part(whole, *rows):
        results = function(whole, *rows)
        return lax.psum(results, batch) if summed else results

    own = [P(batch) if x is not None and x.shape[:1] == first.shape[:1] else P() for x in rows]
    in_specs = (P(), *own)
    return jax.shard_map(
        part,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=P() if summed else P(batch),
        axis_names=axes_of(mesh, AxisType.Explicit),
        check_vma=False,  # kernels do not say over which axes their outputs differ
    )(*resharded((whole, *rows), in_specs, mesh))
