"""What recurrences with exponential weights and their kernels share: the log of nothing, and mLSTM's quotient."""

import jax
import jax.numpy as jnp

EMPTY = -1e30  # the log of nothing: finite, so that EMPTY - EMPTY is 0 and not NaN
# exp(-m) below which a denominator counts as exp(-40), 1e-18 of the largest weight: its inverse square is a float32.
LARGEST_LOG = 40.0


def bounded_quotient(numerator: jax.Array, denominator: jax.Array, m: jax.Array) -> jax.Array:
    """`numerator [..., V] / max(|denominator [...]|, exp(-m [...]))`: `max(|n q|, 1)` of the true state, C exp(m).

    Both sides are multiplied by exp(min(m, 0)), so that exp(-m) does not overflow.
    """
    down = jnp.exp(jnp.minimum(m, 0))
    smallest = jnp.exp(-jnp.clip(m, 0, LARGEST_LOG))
    return numerator * (down / jnp.maximum(jnp.abs(denominator) * down, smallest))[..., None]
