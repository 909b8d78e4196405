"""The summary of a shard for any recurrence, and the monoid of the maps that the backward pass combines.

Leaves are `[B, HV, ...]`, or `[B, ...]` where there are no heads. The functions of a monoid are of one head, and are
mapped over these `lead` leading axes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..core.layout import Layout
from ..core.monoid import Monoid, Segmented
from ..core.recurrence import Recurrence
from ..core.typing import Inputs, State, Summary
from . import prefix
from .varying import vary, varying

# ---- the shard's summary


def zero_state(recurrence: Recurrence, xs: Inputs) -> State:
    """The zero state `[B, HV, ...]`, made of shapes alone, so that its type says it is the same everywhere."""
    tokens = {name: (xs[name].shape[0], 1, *xs[name].shape[2:]) for name in recurrence.fields}
    shapes = {name: tokens.get(name, x.shape) for name, x in xs.items()}
    one = {name: jnp.zeros(shape, xs[name].dtype) for name, shape in shapes.items()}
    return Layout.of(recurrence, one).zero_state(one)


def shard_summary(recurrence: Recurrence, run: Callable, xs: Inputs, reset, zero: State, lead: int) -> Summary:
    """The summary of the shard, leaves `[B, HV, ...]`. Where documents start in the shard, that of its last document,
    which says that it forgets what came before."""
    layout, monoid = Layout.of(recurrence, xs), recurrence.monoid
    wide, start = xs, zero
    if monoid.probe is not None:
        probe = over(monoid.probe, lead)(zero)
        more = lambda name, x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, probe.shape[-1])])  # noqa: E731
        columns = {name for name, dims in recurrence.fields.items() if dims.split()[-1] == "V"}
        wide = {name: more(name, x) if name in columns else x for name, x in xs.items()}
        start = jnp.concatenate([zero, probe], axis=-1)
    reached = run(wide, reset, start)[0]

    xs = layout.computed(xs, None)
    element = jax.vmap(layout.over_heads(recurrence.element, "x"), (layout.token_axes,))
    tokens = layout.merge_heads(element(layout.tokens_first(xs) | layout.parameters(xs)), 2)  # [T, B, HV, ...]
    places = jnp.zeros((layout.batch, layout.length), jnp.int32) if reset is None else reset * jnp.arange(layout.length)
    first = jnp.max(places, axis=1)
    if monoid.total is not None:
        summary = over(monoid.total, lead, axes=(1, 0, None), last=(1, 0, 0))(tokens, reached, first)
    else:
        folded = lambda tokens, first: _folded(monoid, tokens, first)  # noqa: E731
        summary = over(folded, lead, axes=(1, None), last=(1, 0))(tokens, first)
    if reset is None:
        return summary
    forget = jnp.any(reset, axis=1).reshape(-1, *(1,) * (lead - 1))
    heads = jax.tree.leaves(zero)[0].shape[:lead]
    return Segmented(jnp.broadcast_to(forget, heads), summary)


def _folded(monoid: Monoid, tokens: Summary, first: jax.Array) -> Summary:
    """The summaries of the tokens `first` to T-1 of one head, combined one after the other."""

    def body(summary, token):
        t, one = token
        joined = monoid.combine(summary, one)
        return prefix.choose(t <= first, one, joined), None

    start = jax.tree.map(lambda x: x[0], tokens)
    rest = jax.tree.map(lambda x: x[1:], tokens)
    return lax.scan(body, start, (jnp.arange(1, 1 + len(jax.tree.leaves(rest)[0])), rest))[0]


def over(fn: Callable, lead: int, axes: Any = 0, last: Any = None) -> Callable:
    """`fn` mapped over `lead` leading axes. The outermost map takes `last` in place of `axes`, if given."""
    for _ in range(lead - 1):
        fn = jax.vmap(fn, axes)
    return jax.vmap(fn, axes if last is None else last)


def mapped(monoid: Monoid, lead: int) -> Monoid:
    """The monoid with its functions mapped over batch and heads."""
    columns = monoid.columns
    return Monoid(
        over(monoid.combine, lead),
        over(monoid.apply, lead),
        over(monoid.identity, lead),
        adjoint=monoid.adjoint and over(monoid.adjoint, lead),
        columns=columns and (lambda summary, first, n: over(lambda s: columns(s, first, n), lead)(summary)),
    )


# ---- the backward pass's summaries


class Adjoint(NamedTuple):
    """The map `L -> (d apply / d state)^T L + tail` of gradients, from the end of a stretch of tokens to its start."""

    summary: Summary
    entering: State
    tail: State


def adjoint_monoid(monoid: Monoid) -> Monoid:
    """The monoid of the maps of gradients. Its order is reversed: the stretch that is later in time comes first."""
    if monoid.adjoint is not None:
        return monoid

    def apply(element: Adjoint, cotangent: State) -> State:
        out, pull = jax.vjp(lambda state: monoid.apply(element.summary, state), element.entering)
        cotangent = jax.tree.map(lambda d, x: vary(d, varying(x)), cotangent, out)
        return jax.tree.map(jnp.add, element.tail, pull(cotangent)[0])

    def combine(earlier: Adjoint, later: Adjoint) -> Adjoint:
        return Adjoint(monoid.combine(later.summary, earlier.summary), later.entering, apply(later, earlier.tail))

    def identity(state: State) -> Adjoint:
        return Adjoint(monoid.identity(state), state, jax.tree.map(jnp.zeros_like, state))

    return Monoid(combine, apply, identity)
