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

from .typing import State, Summary


class Affine(NamedTuple):
    """The map `S -> transition · S + offset`; the monoid says how `transition` acts."""

    transition: jax.Array
    offset: jax.Array


class Monoid(NamedTuple):
    """The operations of one summary type; the module's docstring states their laws."""

    combine: Callable[[Summary, Summary], Summary]
    apply: Callable[[Summary, State], State]
    identity: Callable[[State], Summary]


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


DECAY = Monoid(
    _decay_combine, _decay_apply, lambda state: Affine(jnp.zeros_like(state[..., :1]), jnp.zeros_like(state))
)
"""Elementwise transitions, kept as log-decays that broadcast against the state: `[1, 1]`, `[K, 1]` or `[D]`."""

DENSE = Monoid(
    _dense_combine,
    _dense_apply,
    lambda state: Affine(jnp.eye(state.shape[-2], dtype=state.dtype), jnp.zeros_like(state)),
)
"""Matrix transitions `[K, K]` acting from the left on states `[K, V]`."""


def segmented(monoid: Monoid, zero: State) -> Monoid:
    """The monoid of summaries that may forget: a later summary with `forget` set discards all earlier tokens.

    A reset is this mask, never an infinite gate (`-inf - -inf` is NaN). `zero` is the state a document starts from.
    """

    def choose(forget, new, old):
        return jax.tree.map(lambda n, o: jnp.where(forget, n, o), new, old)

    def combine(earlier: Segmented, later: Segmented) -> Segmented:
        joined = monoid.combine(earlier.summary, later.summary)
        return Segmented(earlier.forget | later.forget, choose(later.forget, later.summary, joined))

    def apply(element: Segmented, state: State) -> State:
        return monoid.apply(element.summary, choose(element.forget, zero, state))

    return Monoid(combine, apply, lambda state: Segmented(jnp.asarray(False), monoid.identity(state)))
