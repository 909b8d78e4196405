"""Rotary position embedding, half-split: channels c and c + K/2 are turned by the angle position · theta^(-2c/K).

Source: Su et al. 2021, arXiv:2104.09864, eq. 34 (there channels 2c and 2c + 1 are paired).
"""

import jax
import jax.numpy as jnp

from .. import parallel
from ._norm import wide


def rotary(x: jax.Array, positions: jax.Array, theta: float = 10000.0) -> jax.Array:
    """x `[B, T, H, K]` turned by its integer `positions [B, T]` or `[T]`; angles in float32, result in the dtype of x.

    Raises:
        ValueError: K is odd.
    """
    K = x.shape[-1]
    if K % 2:
        raise ValueError(f"rotary: x has {K} channels per head, wants an even number; change head_dim.")
    dtype = wide(x).dtype
    frequency = theta ** (-jnp.arange(0, K, 2, dtype=dtype) / K)
    angle = positions[..., None].astype(dtype) * frequency  # [B, T, K/2]
    cos, sin = jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]
    a, b = jnp.split(wide(x), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def segment_positions(segment_ids: jax.Array, axis_name: str | None = None) -> jax.Array:
    """int32 [B, T]: positions that restart at 0 where the id changes, in rows that may be split over a mesh axis."""
    return parallel.positions(segment_ids.shape[1], segment_ids, axis_name)
