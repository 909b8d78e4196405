"""What is not finite in one document of a packed row stays in it.

Matrix products multiply what a mask has set to zero, and zero times NaN is NaN. So before anything is multiplied, tokens
that hold a NaN or an infinity are replaced by tokens of zeros, and a state that does by a state of zeros. Afterwards the
outputs that the token scan would have spoilt become NaN: those of the token and of all later ones of its document, or of
the whole document where tokens read the future. A value head counts as a whole: the scan may leave some of its channels
finite.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from .recurrence import Recurrence
from .typing import Inputs, State


def around(record: Recurrence, run: Callable, reset: jax.Array, causal: bool = True) -> Callable:
    """`run(fields, state=...) -> (final state, o)` for rows whose documents start where `reset [B, T]` is True."""

    def quarantined(fields: Inputs, state: State, **more):
        queries = {"q"} if causal else set()  # what a query spoils no other token sees
        heads = fields[record.output_field].shape[2] if record.has_heads else None
        bad = {name: _bad_tokens(record, name, x, heads) for name, x in fields.items() if name in record.fields}
        written = _any([b for name, b in bad.items() if name not in queries])
        entered = _bad_state(state, heads)
        clean = {n: jnp.where(_bad(record, n, x), 0, x) if n in record.fields else x for n, x in fields.items()}
        clean_state = jax.tree.map(lambda s: jnp.where(_wide(entered, s), 0, s), state)
        final, o = run(clean, state=clean_state, **more)
        spoilt, last = _spoilt(written, entered, reset, causal)
        if "q" in bad:
            spoilt |= bad["q"]
        o = jnp.where(_wide(spoilt, o), jnp.nan, o)
        return jax.tree.map(lambda s: jnp.where(_wide(last, s), jnp.nan, s), final), o

    return quarantined


def _wide(mask: jax.Array, x: jax.Array) -> jax.Array:
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def _bad(record: Recurrence, name: str, x: jax.Array) -> jax.Array:
    """Where a field is not finite; of logarithms -inf is as good as any. A parameter belongs to all documents."""
    return ~jnp.isfinite(x) & ~(x < 0) if name in record.logs else ~jnp.isfinite(x)


def _bad_tokens(record: Recurrence, name: str, x: jax.Array, heads: int | None) -> jax.Array:
    """`[B, T, HV]`, or `[B, T]` without heads."""
    bad = _bad(record, name, x)
    if heads is None:
        return bad.any(axis=tuple(range(2, bad.ndim)))
    if record.head_letter(name) is None:
        return jnp.broadcast_to(bad.any(axis=tuple(range(2, bad.ndim)))[..., None], (*x.shape[:2], heads))
    bad = bad.any(axis=tuple(range(3, bad.ndim)))
    return jnp.repeat(bad, heads // bad.shape[2], axis=2)


def _bad_state(state: State, heads: int | None) -> jax.Array:
    """`[B, HV]`, or `[B]` without heads."""
    kept = 1 if heads is None else 2
    return _any([(~jnp.isfinite(s)).any(axis=tuple(range(kept, s.ndim))) for s in jax.tree.leaves(state)])


def _any(masks: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.logical_or, masks)


def _spoilt(written: jax.Array, entered: jax.Array, reset: jax.Array, causal: bool) -> tuple[jax.Array, jax.Array]:
    """Which outputs `[B, T, ...]` and which final states `[B, ...]` a bad token or a bad entering state reaches."""
    starts = reset.reshape(reset.shape + (1,) * (written.ndim - 2))
    first = jnp.arange(written.shape[1]).reshape(1, -1, *(1,) * (written.ndim - 2)) == 0
    written |= first & entered[:, None]
    join = lambda a, b: (a[0] | b[0], b[1] | (a[1] & ~b[0]))  # noqa: E731
    _, spoilt = lax.associative_scan(join, (jnp.broadcast_to(starts, written.shape), written), axis=1)
    last = spoilt[:, -1]
    if not causal:
        ends = jnp.broadcast_to(jnp.pad(starts[:, 1:], [(0, 0), (0, 1)] + [(0, 0)] * (starts.ndim - 2)), written.shape)
        _, backwards = lax.associative_scan(join, (ends, written), axis=1, reverse=True)
        spoilt |= backwards
    return spoilt, last
