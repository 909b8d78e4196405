"""Short causal depthwise convolution: y_t = act(sum_{l<width} w_l ⊙ x_{t-l}), no tap across a document's border.

A sum of shifted products rather than a grouped convolution: it fuses with its neighbours, and a grouped convolution
with one channel per group is slow where there is no special kernel for it.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from ._check import check_positive
from ._norm import wide
from ._tap import Tap


class ShortConv(Tap):
    """Short causal depthwise convolution, with silu by default: `[B, T, D] -> [B, T, D]` in the dtype of x.

    `kernel [width, D]` is in order of time: its last row meets the present token.
    """

    def __init__(
        self, channels: int, *, width: int = 4, activation: str | None = "silu", param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        check_positive("ShortConv", channels=channels, width=width)
        if activation not in ("silu", None):
            raise ValueError(f"ShortConv: activation is {activation!r}, wants 'silu' or None.")
        super().__init__(channels, width - 1)
        bound = width**-0.5  # one input channel: the fan-in is the width
        init = jax.random.uniform(rngs.params(), (width, channels), jnp.float32, -bound, bound)
        self.kernel = nnx.Param(init.astype(param_dtype), kind="convolution")
        self.activation = activation

    def mixed(self, x: jax.Array, past: list[jax.Array]) -> jax.Array:
        kernel = wide(self.kernel[...])
        y = wide(x) * kernel[-1]
        for lag, earlier in enumerate(past, 1):
            y += wide(earlier) * kernel[-1 - lag]
        return (jax.nn.silu(y) if self.activation else y).astype(x.dtype)
