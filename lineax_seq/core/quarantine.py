"""Packed rows: a NaN or infinity in one document does not reach another one.

A mask cannot keep documents apart by itself, because matrix products multiply by the zeros that it makes, and zero
times NaN is NaN. So every NaN and infinity in tokens and states is set to zero before anything is multiplied.
Afterwards the outputs that the token scan would have spoilt become NaN: that of the token and those of all later tokens
of its document, or of all its tokens where they read the future. A value head is spoilt as a whole, although the scan
may leave some of its channels finite.
"""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .typing import State

if TYPE_CHECKING:
    from .operator import Operator


class Marks(NamedTuple):
    """Where something is not finite. The arrays of a recurrence without heads have no head axis."""

    written: jax.Array  # [B, T, HV] in what the token writes, which all later tokens of its document read
    queried: jax.Array  # [B, T, HV] in the token's query, which no other token reads
    entered: jax.Array  # [B, HV] in the state that enters


def cleaned(operator: "Operator", xs: dict, state: State | None, causal: bool) -> tuple[dict, State | None, Marks]:
    """The arguments and the state with zeros in place of what is not finite, and the marks of where that was."""
    batch, length = next(x.shape[:2] for name, x in xs.items() if operator.arguments[name].per_token)
    heads = [x.shape[a.letters.index("HV")] for n, x in xs.items() if "HV" in (a := operator.arguments[n]).letters]
    shape = (batch, length, *heads[:1])
    written, queried = jnp.zeros(shape, bool), jnp.zeros(shape, bool)
    for name, x in xs.items():
        if operator.arguments[name].per_token:
            bad = _bad_tokens(operator.arguments[name].letters, _bad(operator, name, x), shape)
            if causal and name in operator.queries:
                queried |= bad
            else:
                written |= bad
    entered = jnp.zeros((batch, *heads[:1]), bool)
    for leaf in jax.tree.leaves(state):
        entered |= (~jnp.isfinite(leaf)).any(axis=tuple(range(entered.ndim, leaf.ndim)))
    xs = {n: jnp.where(_bad(operator, n, x), 0, x) if operator.arguments[n].per_token else x for n, x in xs.items()}
    state = jax.tree.map(lambda s: jnp.where(_wide(entered, s), 0, s), state)
    return xs, state, Marks(written, queried, entered)


def spoil(result, spoilt: jax.Array, last: jax.Array):
    """`(o, final state)` with NaN in outputs where `spoilt [B, T, ...]`, and in states where `last [B, ...]`."""
    o, final = result
    o = jnp.where(_wide(spoilt, o), jnp.nan, o)
    return o, jax.tree.map(lambda s: jnp.where(_wide(last, s), jnp.nan, s), final)


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


def _bad(operator: "Operator", name: str, x: jax.Array) -> jax.Array:
    """Where an argument is not finite. A logarithm may be -inf, which stands for zero."""
    return ~jnp.isfinite(x) & ~(x < 0) if name in operator.logs else ~jnp.isfinite(x)


def _bad_tokens(letters: list[str], bad: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Which tokens of which value heads `[B, T, HV]` an argument spoils; `[B, T]` where there are no heads."""
    head = next((letters.index(letter) for letter in ("HV", "H") if letter in letters), None)
    bad = bad.any(axis=tuple(axis for axis in range(2, bad.ndim) if axis != head))
    if len(shape) == 2:
        return bad
    if head is None:
        return jnp.broadcast_to(bad[..., None], shape)
    return jnp.repeat(bad, shape[2] // bad.shape[2], axis=2)
