"""Summaries of tokens: what a stretch of tokens does to the state that enters it.

A summary type comes with two functions and obeys three laws. For summaries a, b, c in time order and any state S:

    combine(combine(a, b), c) == combine(a, combine(b, c))      (associative; in general not commutative)
    apply(combine(a, b), S)   == apply(b, apply(a, S))          (an action on states)
    combine(identity, a) == a == combine(a, identity)           (identity of a state is `monoid.identity(S)`)

`combine(earlier, later)` takes its arguments in time order, as `jax.lax.associative_scan` hands them over.
Log-decays stay logarithms inside a summary: their composition is addition and cannot underflow.
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
    """The operations of one summary type; the module's docstring states their laws.

    The other entries say how a long stretch of tokens is summarised, sent and pulled back through; None takes what
    follows from the laws.

    total: (summaries of the tokens, stacked; state they make of the zero state; first token of the last document) ->
        the summary of that document. None folds the tokens' summaries one by one. Unused parts of them cost nothing.
    probe: zero state -> value columns that are carried along beside it, zero in every token; `total` gets the state
        with them. None needs none.
    adjoint: (summary, cotangent W) -> the map `L -> T^T L + W` of cotangents, from the end of the stretch to its
        start, as a summary of the same monoid in which the later tokens come first. None pulls back through `apply`.
    columns: (summary, first, size) -> the summary of these columns of the state (its last axis), where columns do not
        see each other.
    """

    combine: Callable[[Summary, Summary], Summary]
    apply: Callable[[Summary, State], State]
    identity: Callable[[State], Summary]
    total: Callable[[Summary, State, jax.Array], Summary] | None = None
    probe: Callable[[State], jax.Array] | None = None
    adjoint: Callable[[Summary, State], Summary] | None = None
    columns: Callable[[Summary, jax.Array, int], Summary] | None = None


class Segmented(NamedTuple):
    """A summary that may forget what came before it: a document starts inside its stretch of tokens."""

    forget: jax.Array  # bool, ()
    summary: Summary


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
    """Sum over the first axis in two stages, so that a million terms cost float32 no more than a thousand."""
    stage = 1 << max(0, (x.shape[0].bit_length() - 1) // 2)
    whole = x.shape[0] - x.shape[0] % stage
    # the barrier keeps the compiler from making it one sum again
    partial = lax.optimization_barrier(x[:whole].reshape(-1, stage, *x.shape[1:]).sum(1))
    return partial.sum(0) + x[whole:].sum(0)


def segmented(monoid: Monoid, zero: State) -> Monoid:
    """The monoid of summaries that may forget: a later summary with `forget` set discards all earlier tokens.

    A reset is this mask, never an infinite gate (`-inf - -inf` is NaN). `zero` is the state a document starts from.
    A monoid that is mapped over leading axes takes `forget` with these.
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
