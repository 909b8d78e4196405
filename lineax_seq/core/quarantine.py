"""Packed rows: a NaN or infinity in one document does not reach another one.

A mask cannot keep documents apart by itself, because matrix products multiply by the zeros that it makes, and zero
times NaN is NaN. So every NaN and infinity in tokens and states is set to zero before anything is multiplied.
Afterwards the outputs that the token scan would have spoilt become NaN: that of the token and those of all later tokens
of its document, or of all its tokens where they read the future. A value head is spoilt as a whole, although the scan
may leave some of its channels finite.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .recurrence import Recurrence
from .typing import Inputs, State


class Marks(NamedTuple):
    """Where something is not finite. The arrays of a recurrence without heads have no head axis."""

    written: jax.Array  # [B, T, HV] in what the token writes, which all later tokens of its document read
    queried: jax.Array  # [B, T, HV] in the token's query, which no other token reads
    entered: jax.Array  # [B, HV] in the state that enters


def around(record: Recurrence, run: Callable, reset: jax.Array, causal: bool) -> Callable:
    """`run(fields, state=...) -> (final state, o)`, made safe for rows with documents that start at `reset [B, T]`."""

    def quarantined(fields: Inputs, state: State):
        fields, state, marks = cleaned(record, fields, state, causal)
        spoilt, last = reached(marks.written, marks.entered, reset, causal)
        return spoil(run(fields, state=state), spoilt | marks.queried, last)

    return quarantined


def cleaned(record: Recurrence, fields: Inputs, state: State, causal: bool) -> tuple[Inputs, State, Marks]:
    """The fields and the state with zeros in place of what is not finite, and the marks of where that was."""
    heads = fields[record.output_field].shape[2] if record.has_heads else None
    bad = {name: _bad_tokens(record, name, fields[name], heads) for name in record.fields}
    none = jnp.zeros_like(bad[record.output_field])
    queried = bad.pop("q", none) if causal else none
    entered = [(~jnp.isfinite(s)).any(axis=tuple(range(none.ndim - 1, s.ndim))) for s in jax.tree.leaves(state)]
    marks = Marks(functools.reduce(jnp.logical_or, bad.values()), queried, functools.reduce(jnp.logical_or, entered))
    fields = {n: jnp.where(_bad(record, n, x), 0, x) if n in record.fields else x for n, x in fields.items()}
    return fields, jax.tree.map(lambda s: jnp.where(_wide(marks.entered, s), 0, s), state), marks


def spoil(result, spoilt: jax.Array, last: jax.Array):
    """`(final state, o)` with NaN in outputs where `spoilt [B, T, ...]`, and in states where `last [B, ...]`."""
    final, o = result
    o = jnp.where(_wide(spoilt, o), jnp.nan, o)
    return jax.tree.map(lambda s: jnp.where(_wide(last, s), jnp.nan, s), final), o


def reached(written: jax.Array, entered: jax.Array, reset: jax.Array, causal: bool) -> tuple[jax.Array, jax.Array]:
    """Which tokens `[B, T, ...]` are reached by what is not finite, and whether the final state `[B, ...]` is."""
    starts = jnp.broadcast_to(reset.reshape(reset.shape + (1,) * (written.ndim - 2)), written.shape)
    join = lambda a, b: (a[0] | b[0], b[1] | (a[1] & ~b[0]))  # noqa: E731
    begun, spoilt = lax.associative_scan(join, (starts, written), axis=1)
    spoilt |= ~begun & entered[:, None]
    last = spoilt[:, -1]
    if not causal:
        ends = jnp.concatenate([starts[:, 1:], jnp.zeros_like(starts[:, :1])], axis=1)
        spoilt |= lax.associative_scan(join, (ends, written), axis=1, reverse=True)[1]
    return spoilt, last


def _wide(mask: jax.Array, x: jax.Array) -> jax.Array:
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def _bad(record: Recurrence, name: str, x: jax.Array) -> jax.Array:
    """Where a field is not finite. A logarithm may be -inf, which stands for zero."""
    return ~jnp.isfinite(x) & ~(x < 0) if name in record.logs else ~jnp.isfinite(x)


def _bad_tokens(record: Recurrence, name: str, x: jax.Array, heads: int | None) -> jax.Array:
    """Which tokens of which value heads `[B, T, HV]` a field spoils; `[B, T]` where there are no heads."""
    bad = _bad(record, name, x)
    if heads is None:
        return bad.any(axis=tuple(range(2, bad.ndim)))
    if record.head_letter(name) is None:
        return jnp.broadcast_to(bad.any(axis=tuple(range(2, bad.ndim)))[..., None], (*x.shape[:2], heads))
    bad = bad.any(axis=tuple(range(3, bad.ndim)))
    return jnp.repeat(bad, heads // bad.shape[2], axis=2)
