"""Feed-forward layers: a function of each token and, through taps, of the few before it.

SwiGLU: W_down(silu(W_gate x) ⊙ W_up x). Source: Shazeer 2020, arXiv:2002.05202, eq. 6.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
from flax import nnx

from ._config import LayerConfig
from ._context import Context
from ._layer import Layer, Shared
from ._parts import Parts
from ._tap import Tap, Taps


class FeedForward(Layer):
    """Base of the layers without a state. Subclasses give `tokens`; the cache is the histories of their taps."""

    def __init__(self, config: LayerConfig, parts: Parts, taps: Mapping[str, Tap] | None = None):
        super().__init__(config, parts)
        self.taps = nnx.Dict(dict(taps or {}))

    def tokens(self, x: jax.Array, taps: Taps, context: Context, shared: Shared) -> tuple[jax.Array, Shared]:
        """x `[B, T, D]` -> `[B, T, D]`, and `shared`. `taps("shift", x)` passes x through the tap of that name."""
        raise NotImplementedError

    def run(self, x: jax.Array, context: Context, cache: dict[str, jax.Array] | None, shared: Shared):
        if cache is not None:
            self._check_cached(context)
        taps = Taps(self.taps, context, cache)
        y, shared = self.tokens(x, taps, context, shared)
        return y, None if cache is None else taps.histories, shared

    def init_cache(self, batch: int, max_length: int, dtype=None) -> dict[str, jax.Array]:
        """The inputs before the first token of every tap; of the same size for any `max_length`."""
        self._check_cache_size(batch, max_length)
        return {name: tap.init_history(batch, dtype or self.dtype) for name, tap in self.taps.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwiGLUConfig(LayerConfig):
    """The gated MLP with `d_ff` hidden channels; None is 8/3·D up to a multiple of 64."""

    name: ClassVar[str] = "swiglu"
    d_ff: int | None = None

    def build(self, parts: Parts) -> "SwiGLU":
        return SwiGLU(self, parts)


class SwiGLU(FeedForward):
    """The gated MLP, `[B, T, D] -> [B, T, D]`."""

    def __init__(self, config: SwiGLUConfig, parts: Parts):
        super().__init__(config, parts)
        d_ff = config.d_ff or -(-8 * parts.d_model // (3 * 64)) * 64
        self.gate_proj, self.up_proj, self.down_proj = parts.project(d_ff), parts.project(d_ff), parts.out(d_ff)

    def tokens(self, x: jax.Array, taps: Taps, context: Context, shared):
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)), shared
