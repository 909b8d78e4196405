"""Short causal depthwise convolution: y_t = act(sum_{l<width} w_l ⊙ x_{t-l}), no tap across a document's border.

A sum of shifted products rather than a grouped convolution: it fuses with its neighbours, and a grouped convolution
with one channel per group is slow where there is no special kernel for it.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from ..parallel import left_halo
from ._check import check_positive
from ._norm import wide


def _reaches(ids: jax.Array, lag: int, T: int) -> jax.Array:
    """bool [B, T]: the token `lag` places before each of the last T lies in the same run of equal ids."""
    inside = jnp.pad(ids[:, 1:] == ids[:, :-1], ((0, 0), (lag, 0)))  # no border just before t
    end = inside.shape[1]
    return functools.reduce(jnp.logical_and, (inside[:, end - T - back : end - back] for back in range(lag)))


class ShortConv(nnx.Module):
    """Short causal depthwise convolution, with silu by default: `[B, T, D] -> [B, T, D]` in the dtype of x.

    The taps `kernel [width, D]` are in order of time: the last one meets the present token.
    """

    def __init__(
        self, channels: int, *, width: int = 4, activation: str | None = "silu", param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        check_positive("ShortConv", channels=channels, width=width)
        if activation not in ("silu", None):
            raise ValueError(f"ShortConv: activation is {activation!r}, wants 'silu' or None.")
        bound = width**-0.5  # one input channel: the fan-in is the width
        init = jax.random.uniform(rngs.params(), (width, channels), jnp.float32, -bound, bound)
        self.kernel = nnx.Param(init.astype(param_dtype))
        self.channels, self.width, self.activation = channels, width, activation

    def init_history(self, batch: int, dtype) -> jax.Array:
        """The inputs before the first token: zeros [B, width - 1, D]."""
        return jnp.zeros((batch, self.width - 1, self.channels), dtype)

    def __call__(
        self,
        x: jax.Array,
        *,
        history: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        axis_name: str | None = None,
    ) -> jax.Array:
        """The convolution of x, which continues `history [B, width - 1, D]` (None: zeros).

        With `segment_ids`, documents see no history: they start from zeros. With `axis_name`, a mesh axis that T is
        split over, a shard continues its left neighbour.

        Raises:
            ValueError: a shard shorter than width - 1; both `history` and `axis_name`.
        """
        T, before, ids = x.shape[1], self.width - 1, segment_ids
        if axis_name is not None:
            if history is not None:
                raise ValueError("ShortConv: with axis_name, the left neighbour is the history; leave history out.")
            history = left_halo(x, before, axis_name)
            ids = None if ids is None else jnp.concatenate([left_halo(ids, before, axis_name), ids], 1)
        if history is None:
            padded = jnp.pad(x, ((0, 0), (before, 0), (0, 0)))
        else:
            padded = jnp.concatenate([history.astype(x.dtype), x], 1)
        taps = wide(self.kernel[...])
        y = wide(x) * taps[-1]
        for lag in range(1, self.width):
            past = wide(padded[:, before - lag :][:, :T])
            if ids is not None:
                past = jnp.where(_reaches(ids, lag, T)[:, :, None], past, 0)
            y += past * taps[-1 - lag]
        return (jax.nn.silu(y) if self.activation else y).astype(x.dtype)

    def next_history(self, x: jax.Array, history: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """The last `width - 1` inputs after the first `lengths [B]` tokens of x (None: all of them)."""
        both = jnp.concatenate([history, x.astype(history.dtype)], 1)
        if lengths is None:
            return both[:, x.shape[1] :]
        return jax.vmap(lambda row, n: lax.dynamic_slice_in_dim(row, n, self.width - 1))(both, lengths)
