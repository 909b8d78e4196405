"""Norms over the last axis: statistics in float32, eps inside the root.

Source: RMSNorm, Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4; the gated form norm(x)·silu(gate) as in GLA
(arXiv:2312.06635) and Gated DeltaNet (arXiv:2412.06464); LayerNorm, Ba et al. 2016, arXiv:1607.06450, eq. 4.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from ._check import check_positive


def wide(x: jax.Array) -> jax.Array:
    """x in float32, in which sums, gates and angles are computed; float64 stays."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """`x / sqrt(mean(x²) + eps) · scale` over the last axis, in float32."""
    x = wide(x)
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * wide(scale)


def l2_normalize(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """`x / sqrt(sum(x²) + eps)` over the last axis, in float32: zero (with gradient) at zero, never NaN."""
    x = wide(x)
    return x * lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """RMSNorm with a learned scale: `[..., D] -> [..., D]` in `dtype` (None: that of x).

    `shape` is (D,), or (H, D) for heads with scales of their own.
    """

    def __init__(self, *shape: int, eps: float = 1e-5, dtype=None, param_dtype=jnp.float32):
        for width in shape:
            check_positive(type(self).__name__, width=width)
        self.scale = nnx.Param(jnp.ones(shape, param_dtype), kind="norm")
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps).astype(self.dtype or x.dtype)


class GatedRMSNorm(RMSNorm):
    """RMSNorm(x) · silu(gate), the product in float32: `[..., D], [..., D] -> [..., D]`."""

    def __call__(self, x: jax.Array, gate: jax.Array) -> jax.Array:  # pyrefly: ignore
        y = rms_norm(x, self.scale[...], self.eps) * jax.nn.silu(wide(gate))
        return y.astype(self.dtype or x.dtype)


class LayerNorm(RMSNorm):
    """LayerNorm: the mean is taken off first, and a shift is added where `use_bias`. Over heads it is a group norm."""

    def __init__(self, *shape: int, use_bias: bool = True, eps: float = 1e-5, dtype=None, param_dtype=jnp.float32):
        super().__init__(*shape, eps=eps, dtype=dtype, param_dtype=param_dtype)
        self.bias = nnx.Param(jnp.zeros(shape, param_dtype), kind="norm") if use_bias else nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        centred = wide(x) - jnp.mean(wide(x), -1, keepdims=True)
        y = rms_norm(centred, self.scale[...], self.eps)
        if self.bias is not None:
            y = y + wide(self.bias[...])
        return y.astype(self.dtype or x.dtype)
