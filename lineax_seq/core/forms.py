"""The forms of a recurrence over batch, heads and time: `scan`, which is the reference, and `chunk`.

Both take the record's fields `[B, T, heads, ...]`, `reset` (None, or bool `[B, T]`: a document starts here) and the
state `[B, HV, ...]`. Both return the final state and the outputs `[B, T, HV, ...]`. They compute in float32, or in
float64 if an input is float64. `scale` multiplies the field q. One token is decoded by `scan` with T = 1.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import chunked
from .layout import Layout
from .recurrence import Recurrence, step
from .target import Target
from .typing import Inputs, State


def scan(
    recurrence: Recurrence, scale: float | None, xs: Inputs, reset: jax.Array | None, state: State
) -> tuple[State, jax.Array]:
    """Token by token: the reference of every other form."""
    layout, out_dtype = Layout.of(recurrence, xs), xs[recurrence.output_field].dtype
    xs = layout.computed(xs, scale)
    tokens, parameters = layout.tokens_first(xs), layout.parameters(xs)
    keep = None if reset is None else jnp.moveaxis(~reset, 1, 0)

    def body(state, token):
        x, keep_t = token[0] | parameters, token[1]
        if keep_t is None:
            return layout.over_heads(lambda x, s: step(recurrence, x, None, s), "xs")(x, state)
        return layout.over_heads(functools.partial(step, recurrence), "xrs")(x, keep_t, state)

    state, o = lax.scan(body, layout.group_state(state), (tokens, keep))
    return layout.merge_heads(state), jnp.moveaxis(layout.merge_heads(o, 2), 0, 1).astype(out_dtype)


def chunk(
    recurrence: Recurrence,
    target: Target,
    scale: float | None,
    chunk_size: int,
    xs: Inputs,
    reset: jax.Array | None,
    state: State,
    factors: Any = None,
) -> tuple[State, jax.Array]:
    """Chunk by chunk: what happens inside of chunks for many of them at once, and the state carried over them.

    `factors` are those that `chunk_factors` gave for the same inputs, so that they are not computed again; None
    computes them. Gradients flow to the inputs and the state, never to `factors`.
    """
    if _scans(recurrence, target):
        return scan(recurrence, scale, xs, reset, state)
    return _chunk(recurrence, target, scale, chunk_size, _own_heads(recurrence, xs), reset, state, factors)


def _own_heads(recurrence: Recurrence, xs: Inputs) -> Inputs:
    """The inputs with queries and keys repeated for every value head, if the record's value heads share no work."""
    n = Layout.of(recurrence, xs).n
    if recurrence.shares_heads or n == 1:
        return xs
    shared = {name for name in xs if recurrence.head_letter(name) == "H"}
    axis = lambda name: 2 if name in recurrence.fields else 0  # noqa: E731
    return {name: jnp.repeat(x, n, axis=axis(name)) if name in shared else x for name, x in xs.items()}


def _scans(recurrence: Recurrence, target: Target) -> bool:
    """Whether the token scan stands in for the chunk form, being faster on this machine."""
    return recurrence.scans_on_cpu and target.on_cpu


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _chunk(recurrence, target, scale, chunk_size, xs, reset, state, factors):
    plan = chunked.plan(recurrence, scale, chunk_size, target, xs, forward_alone=True)
    return chunked.forward(plan, xs, reset, state, factors)[0]


def _chunk_forward(recurrence, target, scale, chunk_size, xs, reset, state, factors):
    plan = chunked.plan(recurrence, scale, chunk_size, target, xs)
    result, entries = chunked.forward(plan, xs, reset, state, factors)
    return result, (xs, reset, entries)


def _chunk_backward(recurrence, target, scale, chunk_size, residuals, cotangents):
    xs, reset, entries = residuals
    plan = chunked.plan(recurrence, scale, chunk_size, target, xs)
    d_xs, d_state = chunked.backward(plan, xs, reset, entries, *cotangents)
    return d_xs, None, d_state, None


_chunk.defvjp(_chunk_forward, _chunk_backward)


def chunk_factors(
    recurrence: Recurrence, target: Target, scale: float | None, chunk_size: int, xs: Inputs, reset: jax.Array | None
) -> Any:
    """The factors of all chunks, for several runs of `chunk` that differ in their states alone.

    None where `chunk` has no such factors: where it takes several groups, where another form has factors of another
    kind, and where the token scan stands in for it.
    """
    if _scans(recurrence, target):
        return None
    xs = _own_heads(recurrence, xs)
    return chunked.factors(chunked.plan(recurrence, scale, chunk_size, target, xs), xs, reset)
