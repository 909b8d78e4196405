"""The forms of a recurrence over batch, heads and time: `scan` (the reference, and of one token: decoding) and `chunk`.

Both take the recurrence's fields as `[B, T, heads, ...]`, `reset` (None or bool `[B, T]`: a document starts here)
and the state as `[B, HV, ...]`, and return the final state and the outputs `[B, T, HV, ...]`. They compute in float32,
or float64 when an input is float64. `scale` multiplies the field q.
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
    """Chunk-parallel: everything inside a chunk for many chunks at once, the state carried over them by a scan.

    `factors`, where `chunk_factors` gave any for these inputs, are not made again; gradients are of the inputs alone.
    """
    if _scans(recurrence, target):
        return scan(recurrence, scale, xs, reset, state)
    return _chunk(recurrence, target, scale, chunk_size, _own_heads(recurrence, xs), reset, state, factors)


def _own_heads(recurrence: Recurrence, xs: Inputs) -> Inputs:
    """Queries and keys for every value head, where these share nothing."""
    n = Layout.of(recurrence, xs).n
    if recurrence.shares_heads or n == 1:
        return xs
    shared = {name for name in xs if recurrence.head_letter(name) == "H"}
    axis = lambda name: 2 if name in recurrence.fields else 0  # noqa: E731
    return {name: jnp.repeat(x, n, axis=axis(name)) if name in shared else x for name, x in xs.items()}


def _scans(recurrence: Recurrence, target: Target) -> bool:
    """Whether the token scan is the faster form there."""
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
    """The factors of all chunks, for several runs of `chunk` from different states, where `chunk` has them apart.

    None where it does not: where groups follow one another, where a special way has factors of another kind, or where
    the token scan is the faster form.
    """
    if _scans(recurrence, target):
        return None
    xs = _own_heads(recurrence, xs)
    return chunked.factors(chunked.plan(recurrence, scale, chunk_size, target, xs), xs, reset)
