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

from pallas_kernels import machine_here

from .chunked import Chunked
from .layout import Layout
from .recurrence import Recurrence, step
from .typing import Inputs, State


def scan(
    recurrence: Recurrence, scale: float | None, xs: Inputs, reset: jax.Array | None, state: State
) -> tuple[State, jax.Array]:
    """Token by token: the reference of every other form."""
    layout, out_dtype = Layout(recurrence, xs), xs[recurrence.output_field].dtype
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
    if _scans(recurrence):
        return scan(recurrence, scale, xs, reset, state)
    return _chunk(recurrence, scale, chunk_size, xs, reset, state, factors)


def _scans(recurrence: Recurrence) -> bool:
    """Whether the token scan is the faster form here."""
    return recurrence.scans_on_cpu and machine_here().platform == "cpu"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunk(recurrence, scale, chunk_size, xs, reset, state, factors):
    return Chunked(recurrence, scale, chunk_size, xs, reset, forward_alone=True).forward(state, factors)[0]


def _chunk_forward(recurrence, scale, chunk_size, xs, reset, state, factors):
    result, entries = Chunked(recurrence, scale, chunk_size, xs, reset).forward(state, factors)
    return result, (xs, reset, entries)


def _chunk_backward(recurrence, scale, chunk_size, residuals, cotangents):
    xs, reset, entries = residuals
    d_xs, d_state = Chunked(recurrence, scale, chunk_size, xs, reset).backward(entries, *cotangents)
    return d_xs, None, d_state, None


_chunk.defvjp(_chunk_forward, _chunk_backward)


def chunk_factors(
    recurrence: Recurrence, scale: float | None, chunk_size: int, xs: Inputs, reset: jax.Array | None
) -> Any:
    """The factors of all chunks, for several runs of `chunk` from different states, where `chunk` has them apart.

    None where it does not: where blocks follow one another, where ways to prepare give factors of different kinds, or
    where the token scan is the faster form.
    """
    return None if _scans(recurrence) else Chunked(recurrence, scale, chunk_size, xs, reset).factors()
