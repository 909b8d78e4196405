"""A call on arrays that are split over a mesh: every device computes its own sequences and heads.

Sequences are independent of each other, and so are heads. A call whose batch or heads are split over devices is thus as
many smaller calls, and nothing is gathered. On explicit axes, which are what `jax.make_mesh` gives, the types of the
arrays say how they are split. On automatic axes nobody knows before the compiler decides; there `placed` can say it,
and otherwise the compiler splits the program itself.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from ..core import lowering
from ..core.lowering import How
from ..core.operator import Operator
from ..core.typing import State
from . import sequence

HEAD_LETTERS = ("H", "HV", "D")  # dimensions that can be split like the batch: heads, and channels without heads

Axes = tuple[str, ...]
_told: contextvars.ContextVar[tuple[Axes, Axes] | None] = contextvars.ContextVar("told", default=None)


class Placement(NamedTuple):
    """How a call is split over a mesh: the axes of its sequences and those of its heads. Static in the call."""

    mesh: Any
    batch: Axes
    heads: Axes
    manual: frozenset[str]  # the axes that `jax.shard_map` takes: these, and explicit ones that split nothing


@contextlib.contextmanager
def placed(*, batch: str | Axes = (), heads: str | Axes = ()) -> Iterator[None]:
    """Calls in this context run by parts: every device computes its own sequences and heads.

    The named axes are automatic ones of the surrounding mesh, `jax.set_mesh`. Heads stay whole in calls where an axis
    does not divide them.

    >>> with jax.set_mesh(mesh), ls.parallel.placed(batch="data", heads="tensor"):  # doctest: +SKIP
    ...     o, state = ls.gla(q, k, v, g)
    """
    token = _told.set((names_of(batch), names_of(heads)))
    try:
        yield
    finally:
        _told.reset(token)


def placement(operator: Operator, xs: Mapping[str, jax.Array], segment_ids, state: State | None) -> Placement | None:
    """How the arguments of a call are split; None where they are not, or where that is left to the compiler.

    Raises:
        ValueError: T is split, or `placed` names an axis that the surrounding mesh does not have.
    """
    here = jax.sharding.get_abstract_mesh()
    told = _told.get()
    if told is not None and any(told):
        if unknown := [name for name in (*told[0], *told[1]) if name not in here.shape]:
            raise ValueError(
                f"placed: no axis {', '.join(map(repr, unknown))} in the surrounding mesh {dict(here.shape)}; "
                "enter the mesh with jax.set_mesh, and name its axes."
            )
        manual = axes_of(here, AxisType.Manual)
        batch, heads = (tuple(name for name in names if name not in manual) for names in told)
        heads = _dividing(operator, xs, heads, here.shape)
        return Placement(here, batch, heads, frozenset((*batch, *heads))) if batch or heads else None

    found: dict[str, Axes] = {}
    mesh = None
    for name, x in xs.items():
        mesh = _note(found, x, operator.arguments[name].letters, mesh)
    if segment_ids is not None:
        mesh = _note(found, segment_ids, ["B", "T"], mesh)
    for leaf in jax.tree.leaves(state):
        mesh = _note(found, leaf, ["B", "HV" if operator.recurrence.has_heads else "D"], mesh)
    if mesh is None:
        return None
    if "T" in found:
        axis = "·".join(found["T"])
        raise ValueError(
            f"{operator.name}: T is split over mesh axis {axis}; use parallel.sequence_parallel({operator.name}, mesh, "
            f"axis={found['T'][0]!r}), or gather T with jax.sharding.reshard."
        )
    batch = found.get("B", ())
    heads = next((tuple(n for n in found[letter] if n not in batch) for letter in HEAD_LETTERS if letter in found), ())
    heads = _dividing(operator, xs, heads, mesh.shape)
    return Placement(mesh, batch, heads, axes_of(mesh, AxisType.Explicit))


def _note(found: dict[str, Axes], x, letters: list[str], mesh):
    """Add the explicit axes that split an array's dimensions to `found`. Returns its mesh if that has explicit axes,
    else `mesh`."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    if sharding is None or sharding.mesh.empty or AxisType.Explicit not in sharding.mesh.axis_types:
        return mesh
    for letter, names in zip(letters, sharding.spec, strict=False):
        if names:
            found.setdefault(letter, names_of(names))
    return sharding.mesh


def _dividing(operator: Operator, xs: Mapping[str, jax.Array], axes: Axes, sizes: Mapping[str, int]) -> Axes:
    """`axes`, or no axes if they do not divide every number of heads."""
    shards = math.prod(sizes[name] for name in axes)
    for name, x in xs.items():
        for letter, size in zip(operator.arguments[name].letters, x.shape, strict=True):
            if letter in HEAD_LETTERS and size % shards:
                return ()
    return axes


def names_of(names: str | Axes) -> Axes:
    """One name or several, as several."""
    return (names,) if isinstance(names, str) else tuple(names)


def on_mesh(how: How, placement: Placement, xs: dict, segment_ids, state: State | None):
    """`(o, final state)`, split over the mesh as the arguments are."""
    split = {"B": placement.batch, **dict.fromkeys(HEAD_LETTERS, placement.heads)}
    # kernels do not say over which axes their outputs differ
    options = dict(axis_names=placement.manual, check_vma=False)
    return by_parts(how, placement.mesh, split, xs, segment_ids, state, **options)


def by_parts(how: How, mesh, split: Mapping[str, Axes], xs: dict, segment_ids, state: State | None, **options):
    """`(o, final state)` of a call whose dimensions are split over mesh axes: `split` names these by letter.

    `options` go to `jax.shard_map`.
    """
    operator, axes = how.operator, {letter: names or None for letter, names in split.items()}
    batch, time, heads = axes["B"], axes.get("T"), axes["H"]
    specs = {name: P(*(axes.get(letter) for letter in operator.arguments[name].letters)) for name in xs}
    in_specs, states = (specs, P(batch, time), P(batch, heads)), P(batch, heads)

    def part(xs, segment_ids, state):
        first_head = 0
        if operator.numbers_heads and heads:
            first_head = lax.axis_index(heads) * xs[operator.recurrence.output_field].shape[2]
        return lowering.compute(how, xs, segment_ids, state, first_head)

    run = jax.shard_map(part, mesh=mesh, in_specs=in_specs, out_specs=(P(batch, time, heads), states), **options)
    return run(*resharded((xs, segment_ids, state), in_specs, mesh))


def axes_of(mesh, kind: AxisType) -> frozenset[str]:
    """The axes of a mesh that are of one kind."""
    return frozenset(name for name, own in zip(mesh.axis_names, mesh.axis_types, strict=True) if own == kind)


def resharded(arrays, specs, mesh):
    """The arrays, split as `specs` say. With explicit axes they must be moved there before `jax.shard_map`."""
    if AxisType.Explicit not in mesh.axis_types:
        return arrays

    def move(spec, tree):
        sharding = lambda x: NamedSharding(mesh, P(*spec[: x.ndim]))  # noqa: E731
        return jax.tree.map(lambda x: jax.sharding.reshard(x, sharding(x)), tree)

    return jax.tree.map(move, specs, arrays, is_leaf=lambda s: isinstance(s, P))


lowering.distribution = lowering.Distribution(placement, on_mesh, sequence.on_shard)
