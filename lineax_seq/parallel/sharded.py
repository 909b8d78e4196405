"""Sequence parallelism over global arrays. The letters of an argument's dimensions say how it is split over a mesh."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh, PartitionSpec as P

from ..core import checks, dispatch
from ..core.lowering import How
from ..core.operator import Operator
from .placement import HEAD_LETTERS, by_parts
from .prefix import STRATEGIES


def sequence_parallel(
    operator: Operator,
    mesh: Mesh,
    axis: str = "seq",
    *,
    strategy: str | None = None,
    batch_axes: str | Sequence[str] = (),
    head_axes: str | Sequence[str] = (),
) -> Callable:
    """A function that is called like the recurrence, on global arrays, and splits their time over a mesh axis.

    >>> run = sequence_parallel(ls.gated_delta_rule, mesh, "seq", batch_axes="data")  # doctest: +SKIP
    >>> o, final_state = run(q, k, v, g, beta)  # doctest: +SKIP

    Its results are those of the recurrence. `o` [B, T, HV, ...] is split like the arguments, and every device of `axis`
    has the whole final state. Arguments are moved to where they are needed; those that are already split as
    `batch_axes`, `axis` and `head_axes` say are not. The function is differentiable, and works under `jax.jit`.

    Args:
        operator: an entry of `RECURRENCES`.
        mesh: the devices.
        axis: the mesh axis that time (T) is split over, in contiguous shards.
        strategy: "all_gather" (LASP-2), "ring" (LASP-1), "tree", "all_scan" (ZeCO); None is the cheapest by
            `lineax_seq.parallel.cost`.
        batch_axes: mesh axes that sequences (B) are split over.
        head_axes: mesh axes that heads (H and HV), or the channels D of a vector recurrence, are split over.

    Raises:
        ValueError: an axis the mesh does not have or that is used twice, an unknown strategy; in the call, sizes that
            the mesh does not divide, with the padded one to use; and what the recurrence itself refuses.
    """
    caller = f"sequence_parallel({operator.name})"
    batch, heads = (_names(names) for names in (batch_axes, head_axes))
    used = [axis, *batch, *heads]
    for name in used:
        if name not in mesh.shape:
            known = tuple(mesh.shape)
            raise ValueError(f"{caller}: no mesh axis {name!r}{checks.nearest(name, known)}, wants one of {known}.")
    if len(set(used)) < len(used):
        raise ValueError(f"{caller}: axis={axis!r}, batch_axes={batch}, head_axes={heads}: use a mesh axis once.")
    if strategy is not None:
        checks.one_of(caller, "strategy", strategy, tuple(STRATEGIES))

    def run(*args, **kwargs):
        for name in ("axis_name", "strategy"):
            if name in kwargs:
                raise ValueError(f"{caller}: {name}={kwargs[name]!r}: say it to sequence_parallel, not to its result.")
        call = operator.checked(args, {**kwargs, "axis_name": axis, "strategy": strategy}, mesh.shape[axis])
        split = {"B": batch, "T": (axis,), **dict.fromkeys(HEAD_LETTERS, heads)}
        _check_sizes(caller, operator, call.xs, mesh, split)
        where = mesh, axis, batch, heads
        attempt = lambda name: _run(  # noqa: E731
            call.how(operator, name), where, call.xs, call.segment_ids, call.state
        )
        return dispatch.first_accepting(operator.name, call.implementations, attempt)

    return run


def over_time(function: Callable, mesh: Mesh, axis: str = "seq") -> Callable:
    """`function`, which maps arrays [B, T, ...] to such an array, run shard by shard with T split over a mesh axis.

    Inside, `parallel.attention`, `parallel.left_halo` and others reach across shards, with `axis_name=axis`.
    """
    time = P(None, axis)
    return jax.shard_map(function, mesh=mesh, in_specs=time, out_specs=time, check_vma=False)


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _check_sizes(caller: str, operator: Operator, xs: dict, mesh: Mesh, split: dict[str, tuple[str, ...]]) -> None:
    problems = {}
    for name, x in xs.items():
        for letter, size in zip(operator.arguments[name].letters, x.shape, strict=True):
            axes = split.get(letter, ())
            shards = math.prod(mesh.shape[a] for a in axes)
            if size % shards:
                padded = -(-size // shards) * shards
                advice = f"pad to {letter}={padded}" if letter in "BT" else f"use a divisor of {size}"
                problems[letter] = f"{letter}={size} over {shards} shards of mesh axis {'·'.join(axes)}: {advice}"
    if problems:
        raise ValueError(f"{caller}: {'; '.join(problems.values())}.")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(how: How, where: tuple, xs: dict, segment_ids, state):
    mesh, axis, batch, heads = where
    split = {"B": batch, "T": axis, **dict.fromkeys(HEAD_LETTERS, heads)}
    # kernels do not say over which axes their outputs differ
    return by_parts(how, mesh, split, xs, segment_ids, state, check_vma=how.implementation == "xla")
