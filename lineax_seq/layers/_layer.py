"""The interface of every layer, whatever it is made of: whole sequences, prefill and single tokens.

A layer writes `run` (and `run_token` where one token has a faster way than a sequence of length 1), and `init_cache`
where it remembers. Models call these; a layer that stands alone is called as

    y = layer(x, segment_ids=..., positions=..., axis_name=...)     whole sequences [B, T, D]
    cache = layer.init_cache(batch, max_length)
    y, cache = layer.prefill(x, cache, lengths=...)                 a prompt, padded on the right
    y_t, cache = layer.step(x_t, cache)                             one token [B, D]
"""

from typing import Any

import jax
from flax import nnx

from ._check import check_lengths, check_positive, check_tokens
from ._config import LayerConfig
from ._context import Context, padded_right
from ._parts import Parts

Shared = dict[str, jax.Array]


class Layer(nnx.Module):
    """A layer `[B, T, D] -> [B, T, D]`."""

    config: Any  # the layer's own kind of `LayerConfig`

    def __init__(self, config: LayerConfig, parts: Parts):
        self.config, self.d_model, self.dtype = config, parts.d_model, parts.dtype

    # ---- what a layer writes

    def run(self, x: jax.Array, context: Context, cache: Any, shared: Shared) -> tuple[jax.Array, Any, Shared]:
        """x `[B, T, D]` after what the cache holds, or whole sequences where the cache is None.

        `shared` travels through the layers of a model from bottom to top: arrays by name that a layer reads, adds to,
        or leaves alone. Returns the outputs `[B, T, D]`, the cache after the call and `shared`.
        """
        raise NotImplementedError

    def run_token(self, x_t: jax.Array, cache: Any, shared: Shared) -> tuple[jax.Array, Any, Shared]:
        """`run` of one token x_t `[B, D]`; arrays in `shared` keep a T axis of 1."""
        y, cache, shared = self.run(x_t[:, None], Context(), cache, shared)
        return y[:, 0], cache, shared

    def init_cache(self, batch: int, max_length: int, dtype=None) -> Any:
        """A cache that has seen nothing, for sequences of at most `max_length` tokens.

        `dtype` is that of the tokens it keeps (None: the layer's).
        """
        raise NotImplementedError

    def init_shared(self, x: jax.Array) -> Shared:
        """What must be in `shared` before the first token x `[B, T, D]` reaches this layer."""
        return {}

    # ---- a layer on its own

    def __call__(self, x: jax.Array, *, segment_ids=None, positions=None, axis_name: str | None = None) -> jax.Array:
        """Whole sequences `[B, T, D]`; arguments as the fields of `Context`."""
        check_tokens(type(self).__name__, x, self.d_model, segment_ids, positions)
        return self.run(x, Context(segment_ids, positions, None, axis_name), None, self.init_shared(x))[0]

    def prefill(self, x: jax.Array, cache: Any, *, lengths=None) -> tuple[jax.Array, Any]:
        """x `[B, T, D]` after what the cache holds; of each row only the first `lengths [B]` tokens count."""
        caller = f"{type(self).__name__}.prefill"
        check_tokens(caller, x, self.d_model)
        check_lengths(caller, lengths, x.shape[0])
        context = Context(valid=padded_right(x.shape[1], lengths))
        return self.run(x, context, cache, self.init_shared(x))[:2]

    def step(self, x_t: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """One token x_t `[B, D]`, one token further: `(y_t [B, D], cache)`."""
        check_tokens(f"{type(self).__name__}.step", x_t[:, None], self.d_model)
        return self.run_token(x_t, cache, self.init_shared(x_t[:, None]))[:2]

    # ---- what layers refuse alike

    def _check_cached(self, context: Context) -> None:
        """A cache continues one document per row, whole in time."""
        if context.segment_ids is not None or context.axis_name is not None:
            raise ValueError(
                f"{type(self).__name__}: a cache with segment_ids or axis_name: it continues one document per row on "
                "one device; leave them out, or the cache."
            )

    def _check_cache_size(self, batch: int, max_length: int) -> None:
        check_positive(f"{type(self).__name__}.init_cache", batch=batch, max_length=max_length)
