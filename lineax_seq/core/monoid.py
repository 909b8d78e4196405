"""Summaries of tokens: what a stretch of tokens does to the state that enters it.

A type of summaries comes with two functions, `combine` and `apply`, and obeys three laws. For summaries a, b, c in the
order of time and any state S:

    combine(combine(a, b), c) == combine(a, combine(b, c))      (associative; in general not commutative)
    apply(combine(a, b), S)   == apply(b, apply(a, S))          (an action on states)
    combine(identity, a) == a == combine(a, identity)           (identity of a state is `monoid.identity(S)`)

`combine(earlier, later)` takes its arguments in the order of time, as `jax.lax.associative_scan` hands them over.
Decays stay logarithms inside a summary. Their product is then a sum, which cannot underflow.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .typing import State, Summary


class Affine(NamedTuple):
    """The map `S -> transition · S + offset`; the monoid says how `transition` acts."""

    transition: jax.Array
    offset: jax.Array


class Monoid(NamedTuple):
    """The functions of one type of summaries; the module's docstring has the laws of the first three.

    The other four tell sequence parallelism how a shard is summarised, how its summary travels, and how gradients come
    back. None takes what follows from the laws, which is right for every monoid and slower.

    Attributes:
        combine: (earlier, later) -> the summary of both stretches in a row.
        apply: (summary, state) -> the state after the stretch.
        identity: state -> the summary of no tokens, for states of this shape.
        total: (summaries of the tokens, stacked; the state that the tokens make of the zero state; index of the first
            token of the last document) -> the summary of that document. The compiler drops the parts of the tokens'
            summaries that `total` does not read. None combines them one after the other.
        probe: zero state -> columns to append to its values before the tokens go over it. The tokens write zeros there,
            so that these columns end as what the transition makes of them; `total` gets the state with them. None
            appends nothing.
        adjoint: (summary with transition T, gradient W) -> the map `L -> T^T L + W`, which takes the gradient L of the
            state after the stretch to that of the state before it. It is a summary of the same monoid, in which the
            later stretch comes first. None pulls gradients back through `apply`.
        columns: (summary, first, size) -> the summary that acts on `size` columns of the state, on its last axis. None
            where columns depend on each other.
    """

    combine: Callable[[Summary, Summary], Summary]
    apply: Callable[[Summary, State], State]
    identity: Callable[[State], Summary]
    total: Callable[[Summary, State, jax.Array], Summary] | None = None
    probe: Callable[[State], jax.Array] | None = None
    adjoint: Callable[[Summary, State], Summary] | None = None
    columns: Callable[[Summary, jax.Array, int], Summary] | None = None


class Segmented(NamedTuple):
    """The summary of a stretch in which a document may start, so that what came before the stretch is forgotten."""

    forget: jax.Array  # bool, (): a document starts in the stretch
    summary: Summary  # of the tokens of the last document


def _decay_combine(earlier: Affine, later: Affine) -> Affine:
    return Affine(earlier.transition + later.transition, jnp.exp(later.transition) * earlier.offset + later.offset)


def _decay_apply(summary: Affine, state: jax.Array) -> jax.Array:
    return jnp.exp(summary.transition) * state + summary.offset


def _dense_combine(earlier: Affine, later: Affine) -> Affine:
    return Affine(later.transition @ earlier.transition, later.transition @ earlier.offset + later.offset)


def _dense_apply(summary: Affine, state: jax.Array) -> jax.Array:
    return summary.transition @ state + summary.offset


def _columns(x: jax.Array, first: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, first, size, axis=-1)


def _decay_columns(summary: Affine, first: jax.Array, size: int) -> Affine:
    transition, offset = summary
    one_for_all = transition.shape[-1] == 1
    return Affine(transition if one_for_all else _columns(transition, first, size), _columns(offset, first, size))


DECAY = Monoid(
    _decay_combine,
    _decay_apply,
    lambda state: Affine(jnp.zeros_like(state[..., :1]), jnp.zeros_like(state)),
    total=lambda tokens, state, start: Affine(long_sum(tokens.transition), state),
    adjoint=lambda summary, cotangent: Affine(summary.transition, cotangent),
    columns=_decay_columns,
)
"""Elementwise transitions, kept as log-decays that broadcast against the state: `[1, 1]`, `[K, 1]` or `[D]`."""

DENSE = Monoid(
    _dense_combine,
    _dense_apply,
    lambda state: Affine(jnp.eye(state.shape[-2], dtype=state.dtype), jnp.zeros_like(state)),
    total=lambda tokens, state, start: Affine(state[:, -state.shape[0] :], state[:, : -state.shape[0]]),
    probe=lambda state: jnp.eye(state.shape[0], dtype=state.dtype),
    adjoint=lambda summary, cotangent: Affine(summary.transition.T, cotangent),
    columns=lambda summary, first, size: Affine(summary.transition, _columns(summary.offset, first, size)),
)
"""Matrix transitions `[K, K]` acting from the left on states `[K, V]`."""


def long_sum(x: jax.Array) -> jax.Array:
    """Sum over the first axis in two stages: a million terms then cost float32 no more accuracy than a thousand do."""
    stage = 1 << max(0, (x.shape[0].bit_length() - 1) // 2)
    whole = x.shape[0] - x.shape[0] % stage
    # Without the barrier the compiler would make one sum of both stages.
    partial = lax.optimization_barrier(x[:whole].reshape(-1, stage, *x.shape[1:]).sum(1))
    return partial.sum(0) + x[whole:].sum(0)


def segmented(monoid: Monoid, zero: State) -> Monoid:
    """The monoid of `Segmented` summaries: one that forgets discards all that is earlier.

    The start of a document is this mask and never a gate of -inf, as `-inf - -inf` is NaN. `zero` is the state that a
    document starts from. If `monoid` is mapped over leading axes, `forget` has these axes.
    """

    def choose(forget, new, old):
        wide = lambda x: forget.reshape(forget.shape + (1,) * (x.ndim - forget.ndim))  # noqa: E731
        return jax.tree.map(lambda n, o: jnp.where(wide(o), n, o), new, old)

    def combine(earlier: Segmented, later: Segmented) -> Segmented:
        joined = monoid.combine(earlier.summary, later.summary)
        return Segmented(earlier.forget | later.forget, choose(later.forget, later.summary, joined))

    def apply(element: Segmented, state: State) -> State:
        return monoid.apply(element.summary, choose(element.forget, zero, state))

    adjoint, columns = monoid.adjoint, monoid.columns
    return Monoid(
        combine,
        apply,
        lambda state: Segmented(jnp.asarray(False), monoid.identity(state)),
        adjoint=adjoint and (lambda element, d: Segmented(element.forget, adjoint(element.summary, d))),
        columns=columns and (lambda element, first, n: Segmented(element.forget, columns(element.summary, first, n))),
    )
