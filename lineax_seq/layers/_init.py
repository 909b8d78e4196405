"""Initialisers that the papers' parameterisations share."""

import jax
import jax.numpy as jnp

NORMAL = jax.nn.initializers.normal(0.02)


def log_decay_rate(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A_log = log A with A ~ U(0, 16), float32; the bound below keeps the log finite."""
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, 1e-4, 16.0))


def inverse_softplus_step(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """dt_bias with softplus(dt_bias) = dt, log dt ~ U(log 1e-3, log 1e-1), float32.

    Source: Gu & Dao 2023, arXiv:2312.00752, section 3.6.
    """
    low, high = jnp.log(1e-3), jnp.log(1e-1)
    dt = jnp.exp(jax.random.uniform(key, shape, jnp.float32, low, high))
    return dt + jnp.log(-jnp.expm1(-dt))
