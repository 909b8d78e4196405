"""The skip connection of state space models, which is no part of the recurrence: y_t + D x_t."""

import jax
import jax.numpy as jnp


def skip(y: jax.Array, D: jax.Array | None, x: jax.Array) -> jax.Array:
    """`y + D x` (y alone without D), summed in float32 or wider, in the dtype of x."""
    if D is not None:
        dtype = jnp.promote_types(y.dtype, jnp.float32)
        y = y.astype(dtype) + D.astype(dtype) * x.astype(dtype)
    return y.astype(x.dtype)
