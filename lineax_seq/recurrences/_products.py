"""Matrix products in the order that the platform is fast at."""

import jax
import jax.numpy as jnp
from jax import lax


def transposed_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a^T b` for `a [C, K]`, `b [C, V]`.

    XLA's CPU products run at half their speed when the left factor is read along columns (85 against 180 GFLOP/s for
    [64, 128]^T [64, 128] on two cores), so there it is transposed first, in the pass that computes it.
    """
    transposed = a.T
    if jax.default_backend() == "cpu":
        transposed = lax.optimization_barrier(transposed)
    return jnp.matmul(transposed, b)
