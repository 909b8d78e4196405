"""The state that enters each device: the summaries of all earlier devices, applied to the state before the first one.

Every strategy takes a monoid that is mapped over `lead` leading axes (batch, heads), this device's summary, and the
state that enters the first device, which all devices have. It gives the state that enters this device, and the one that
leaves the last. With `reverse` and adjoint summaries it is the backward pass: it gives the gradient of the state that
leaves this device, and that of the initial state. All leaves travel in one buffer. Nothing here is differentiated.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from ..core.monoid import Monoid
from ..core.typing import State, Summary
from .cost import blocks as pipeline_blocks


@dataclasses.dataclass(frozen=True)
class Axis:
    """A mesh axis whose devices have places in an order: that of time or, with `reverse`, the opposite one."""

    name: str
    reverse: bool = False

    @property
    def size(self) -> int:
        return lax.axis_size(self.name)

    @property
    def index(self) -> jax.Array:
        index = lax.axis_index(self.name)
        return self.size - 1 - index if self.reverse else index

    def send(self, tree, pairs: list[tuple[int, int]], lead: int):
        """One `ppermute` between the places of `pairs`, (from, to); a device that is sent nothing gets zeros."""
        place = lambda i: self.size - 1 - i if self.reverse else i  # noqa: E731
        packed, unpack = pack(tree, lead)
        return unpack(lax.ppermute(packed, self.name, [(place(i), place(j)) for i, j in pairs]))

    def from_last(self, tree, lead: int):
        """The values of the last place, on every device; their type says that they are the same everywhere."""
        packed, unpack = pack(tree, lead)
        return unpack(lax.psum(jnp.where(self.index == self.size - 1, packed, 0), self.name))


def pack(tree, lead: int) -> tuple[jax.Array, Callable]:
    """All leaves as one array `[*lead, features]` in their widest float dtype, and the function that undoes it.

    The leading axes stay apart, so that other mesh axes may split them.
    """
    leaves, structure = jax.tree.flatten(tree)
    dtype = jnp.result_type(*(x.dtype for x in leaves if x.dtype != bool))
    flat = [x.reshape(*x.shape[:lead], -1).astype(dtype) for x in leaves]
    ends = [0]
    for x in flat:
        ends.append(ends[-1] + x.shape[-1])

    def unpack(packed: jax.Array):
        parts = [packed[..., i:j] for i, j in zip(ends, ends[1:], strict=False)]
        back = lambda part, x: part > 0.5 if x.dtype == bool else part.astype(x.dtype)  # noqa: E731
        parts = [back(part, x).reshape(x.shape) for part, x in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(structure, parts)

    return jnp.concatenate(flat, axis=-1), unpack


def choose(condition: jax.Array, new, old):
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def all_gather(monoid: Monoid, summary: Summary, state: State, axis: Axis, lead: int) -> tuple[State, State]:
    """LASP-2: one all-gather of the summaries, after which every device applies the earlier ones to the state.

    Source: Sun et al. 2025, arXiv:2502.07563, algorithm 2.
    """
    packed, unpack = pack(summary, lead)
    gathered = lax.all_gather(packed, axis.name, to="invarying")
    size, index = axis.size, axis.index

    def body(carry, place):
        entering, state = carry
        # Summaries are unpacked one by one, because the compiler keeps several copies of all if it has them at once.
        summary = unpack(
            lax.dynamic_index_in_dim(gathered, size - 1 - place if axis.reverse else place, keepdims=False)
        )
        state = monoid.apply(summary, state)
        return (choose(place < index, state, entering), state), None

    start = (choose(index >= 0, state, state), state)  # gives the first one the type of what differs between devices
    (entering, final), _ = lax.scan(body, start, jnp.arange(size))
    return entering, final


def ring(monoid: Monoid, summary: Summary, state: State, axis: Axis, lead: int) -> tuple[State, State]:
    """LASP-1: the state goes from device to device in P-1 hops, and every device waits for the one before it.

    Source: Sun et al. 2024, arXiv:2404.02882, algorithm 2.
    """
    index = axis.index
    entering = choose(index >= 0, state, state)
    for hop in range(1, axis.size):
        sent = axis.send(monoid.apply(summary, entering), [(hop - 1, hop)], lead)
        entering = choose(index == hop, sent, entering)
    return entering, axis.from_last(monoid.apply(summary, entering), lead)


def tree(monoid: Monoid, summary: Summary, state: State, axis: Axis, lead: int) -> tuple[State, State]:
    """A parallel prefix by doubling: ceil(log2 P) exchanges of summaries.

    Source: Hillis & Steele 1986, "Data parallel algorithms"; here with and without a device's own summary at once.
    """
    size, index = axis.size, axis.index
    before = upto = summary  # of the devices so far that end just before this one, and of those that end with it
    distance = 1
    while distance < size:
        sent = axis.send(upto, [(i, i + distance) for i in range(size - distance)], lead)
        there = index >= distance
        before = choose(there, sent if distance == 1 else monoid.combine(sent, before), before)
        upto = choose(there, monoid.combine(sent, upto), upto)
        distance *= 2
    return (
        choose(index > 0, monoid.apply(before, state), state),
        axis.from_last(monoid.apply(upto, state), lead),
    )


def all_scan(
    monoid: Monoid, summary: Summary, state: State, axis: Axis, lead: int, blocks: int | None = None
) -> tuple[State, State]:
    """The ring as a pipeline: the state is cut into M pieces, and P+M-2 hops send one piece each.

    The pieces are columns of a matrix state, because columns do not depend on each other and a hop then needs the
    device's own transition only. Where columns depend on each other, as in states of several parts, the pieces are
    heads, or sequences if there are no heads. `blocks` is M; None takes the cheapest.

    Source: Chou et al. 2025 (ZeCO), arXiv:2507.01004, All-Scan.
    """
    size, index = axis.size, axis.index
    take, put = _splitter(monoid, state, lead)
    available = columns(monoid, state, lead)
    count = blocks or pipeline_blocks(size, sum(x.nbytes for x in jax.tree.leaves(state)), available)
    width = available // count
    buffer = choose(index >= 0, state, state)

    def hop(buffer, t):
        mine = jnp.clip(t - index, 0, count - 1) * width
        part, rest = take(summary, buffer, mine, width)
        sent = axis.send(monoid.apply(part, rest), [(i, i + 1) for i in range(size - 1)], lead)
        arrived = t + 1 - index
        first = jnp.clip(arrived, 0, count - 1) * width
        valid = (index > 0) & (arrived >= 0) & (arrived < count)
        old = take(summary, buffer, first, width)[1]
        return put(buffer, choose(valid, sent, old), first), None

    buffer, _ = lax.scan(hop, buffer, jnp.arange(size + count - 2))
    return buffer, axis.from_last(monoid.apply(summary, buffer), lead)


def columns(monoid: Monoid, state: State, lead: int) -> int:
    """The length of the axis that `all_scan` cuts into pieces: how many independent parts the state has there."""
    return jax.tree.leaves(state)[0].shape[-1 if monoid.columns else lead - 1]


def _splitter(monoid: Monoid, state: State, lead: int) -> tuple[Callable, Callable]:
    """`take(summary, state, first, width)` and `put(state, part, first)` of a piece. The axis is that of value columns;
    where columns depend on each other it is the last leading one: heads, or sequences if there are no heads."""
    axes = jax.tree.map(lambda x: x.ndim - 1 if monoid.columns else lead - 1, state)
    cut = lambda x, axis, first, width: lax.dynamic_slice_in_dim(x, first, width, axis)  # noqa: E731

    def take(summary: Summary, state: State, first: jax.Array, width: int):
        if monoid.columns is not None:
            part = monoid.columns(summary, first, width)
        else:
            part = jax.tree.map(lambda x: cut(x, lead - 1, first, width), summary)
        return part, jax.tree.map(lambda x, axis: cut(x, axis, first, width), state, axes)

    def put(state: State, part: State, first: jax.Array) -> State:
        return jax.tree.map(lambda x, y, axis: lax.dynamic_update_slice_in_dim(x, y, first, axis), state, part, axes)

    return take, put


STRATEGIES = {"all_gather": all_gather, "ring": ring, "tree": tree, "all_scan": all_scan}
