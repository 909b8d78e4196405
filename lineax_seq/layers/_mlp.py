"""SwiGLU: W_down(silu(W_gate x) ⊙ W_up x).

Source: Shazeer 2020, arXiv:2002.05202, eq. 6.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from ._check import check_positive
from ._dense import dense
from ._init import NORMAL


class SwiGLU(nnx.Module):
    """The gated MLP, `[..., D] -> [..., D]`, with `d_ff` hidden channels; None is 8/3·D up to a multiple of 64."""

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        *,
        kernel_init=NORMAL,
        out_init=None,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_positive("SwiGLU", d_model=d_model, d_ff=d_ff)
        d_ff = d_ff or -(-8 * d_model // (3 * 64)) * 64
        project = functools.partial(dense, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.gate_proj = project(d_model, d_ff, kernel_init=kernel_init)
        self.up_proj = project(d_model, d_ff, kernel_init=kernel_init)
        self.down_proj = project(d_ff, d_model, kernel_init=out_init or kernel_init)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))
