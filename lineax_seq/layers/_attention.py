"""The softmax attention layer: rotary positions, grouped key/value heads, an optional sliding window, a KV cache.

Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; grouped heads: Ainslie et al. 2023, arXiv:2305.13245.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from .. import parallel
from ..core import checks
from ._attention_core import causal_attention
from ._check import check_lengths, check_positive, check_tokens
from ._dense import dense
from ._init import NORMAL
from ._norm import RMSNorm
from ._rotary import rotary


class AttentionCache(NamedTuple):
    """Keys and values of the tokens so far. Slot s holds the latest position p with p % S == s.

    S is the maximal length of a sequence, or the window where that is shorter (a ring).
    """

    k: jax.Array  # [B, S, HKV, K], rotated
    v: jax.Array  # [B, S, HKV, K]
    length: jax.Array  # int32 [B]: tokens so far


def _write(cache: AttentionCache, k: jax.Array, v: jax.Array, lengths: jax.Array) -> AttentionCache:
    """The cache with the first `lengths [B]` of these T tokens appended; a ring keeps the last S."""
    T, S = k.shape[1], cache.k.shape[1]
    index = jnp.arange(T, dtype=jnp.int32)[None, :]
    kept = (index < lengths[:, None]) & (index >= lengths[:, None] - S)
    slot = jnp.where(kept, (cache.length[:, None] + index) % S, S)  # S lies outside: dropped
    row = jnp.arange(k.shape[0], dtype=jnp.int32)[:, None]
    return AttentionCache(
        cache.k.at[row, slot].set(k.astype(cache.k.dtype), mode="drop"),
        cache.v.at[row, slot].set(v.astype(cache.v.dtype), mode="drop"),
        cache.length + lengths,
    )


def _in_order(cache: AttentionCache) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys, values `[B, S, HKV, K]` by position, the latest last, and which slots hold a token, bool `[B, S]`."""
    S = cache.k.shape[1]
    position = cache.length[:, None] + jnp.arange(-S, 0, dtype=jnp.int32)
    slot = (position % S)[:, :, None, None]
    return jnp.take_along_axis(cache.k, slot, 1), jnp.take_along_axis(cache.v, slot, 1), position >= 0


class SoftmaxAttention(nnx.Module):
    """Causal softmax attention, `[B, T, D] -> [B, T, D]`.

    Args:
        d_model: D.
        num_heads: query heads H.
        num_kv_heads: key and value heads, a divisor of H; None is H.
        head_dim: channels per head; None is D / H.
        window: how many tokens each token sees, itself included; None is all.
        rope_theta: base of the rotary frequencies; None leaves positions out.
        qk_norm: RMSNorm of queries and keys over each head's channels, before the rotation.
        implementation: of `jax.nn.dot_product_attention`: None, "xla" or "cudnn"; the last one wants time whole.
        strategy: where time is split over devices, one of `parallel.STRATEGIES`.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        rope_theta: float | None = 10000.0,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        implementation: str | None = None,
        strategy: str = "all_gather",
        kernel_init=NORMAL,
        out_init=None,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        name = "SoftmaxAttention"
        sizes = dict(d_model=d_model, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, window=window)
        check_positive(name, **sizes)
        num_kv_heads = num_kv_heads or num_heads
        if num_heads % num_kv_heads:
            raise ValueError(
                f"{name}: num_heads={num_heads} is no multiple of num_kv_heads={num_kv_heads}; change one."
            )
        if head_dim is None and d_model % num_heads:
            raise ValueError(f"{name}: d_model={d_model} is no multiple of num_heads={num_heads}; give head_dim.")
        head_dim = head_dim or d_model // num_heads
        if rope_theta is not None and head_dim % 2:
            raise ValueError(f"{name}: head_dim={head_dim} is odd, rotary positions want it even; or rope_theta=None.")
        if implementation not in (None, "xla", "cudnn"):
            raise ValueError(f"{name}: implementation is {implementation!r}, wants None, 'xla' or 'cudnn'.")
        checks.one_of(name, "strategy", strategy, parallel.STRATEGIES)
        project = functools.partial(dense, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.q_proj = project(d_model, num_heads * head_dim, kernel_init=kernel_init)
        self.k_proj = project(d_model, num_kv_heads * head_dim, kernel_init=kernel_init)
        self.v_proj = project(d_model, num_kv_heads * head_dim, kernel_init=kernel_init)
        self.o_proj = project(num_heads * head_dim, d_model, kernel_init=out_init or kernel_init)
        norm = functools.partial(RMSNorm, head_dim, eps=norm_eps, param_dtype=param_dtype)
        self.q_norm, self.k_norm = (norm(), norm()) if qk_norm else (nnx.data(None), nnx.data(None))
        self.d_model, self.num_heads, self.num_kv_heads, self.head_dim = d_model, num_heads, num_kv_heads, head_dim
        self.window, self.rope_theta, self.implementation, self.dtype = window, rope_theta, implementation, dtype
        self.strategy = strategy

    def _qkv(self, x: jax.Array, positions: jax.Array):
        def heads(y, n):
            return y.reshape(*y.shape[:2], n, self.head_dim)

        q, k = heads(self.q_proj(x), self.num_heads), heads(self.k_proj(x), self.num_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_theta is not None:
            q, k = rotary(q, positions, self.rope_theta), rotary(k, positions, self.rope_theta)
        return q, k, heads(self.v_proj(x), self.num_kv_heads)

    def _out(self, o: jax.Array) -> jax.Array:
        return self.o_proj(o.reshape(*o.shape[:2], self.num_heads * self.head_dim))

    def __call__(self, x: jax.Array, *, segment_ids=None, positions=None, axis_name: str | None = None) -> jax.Array:
        """Whole sequences x `[B, T, D]`.

        Args:
            segment_ids: int [B, T]; a token sees only its own run of equal ids.
            positions: int [B, T] or [T], for the rotation; None counts from the start of each segment.
            axis_name: a mesh axis that T is split over, inside `jax.shard_map`.
        """
        check_tokens("SoftmaxAttention", x, self.d_model, segment_ids, positions)
        if positions is None:
            positions = parallel.positions(x.shape[1], segment_ids, axis_name)
        q, k, v = self._qkv(x, jnp.asarray(positions))
        seen = dict(window=self.window, segment_ids=segment_ids)
        if axis_name is None:
            return self._out(causal_attention(q, k, v, **seen, implementation=self.implementation))
        if self.implementation == "cudnn":
            raise ValueError("SoftmaxAttention: implementation='cudnn' wants time whole; leave it or axis_name out.")
        return self._out(parallel.attention(q, k, v, **seen, axis_name=axis_name, strategy=self.strategy))

    def init_cache(self, batch: int, max_length: int, dtype=None) -> AttentionCache:
        """An empty cache for sequences of at most `max_length` tokens; with a window, no longer than it."""
        check_positive("SoftmaxAttention.init_cache", batch=batch, max_length=max_length)
        slots = max_length if self.window is None else min(max_length, self.window)
        shape = (batch, slots, self.num_kv_heads, self.head_dim)
        k, v = jnp.zeros(shape, dtype or self.dtype), jnp.zeros(shape, dtype or self.dtype)
        return AttentionCache(k, v, jnp.zeros((batch,), jnp.int32))

    def prefill(self, x: jax.Array, cache: AttentionCache, *, lengths=None) -> tuple[jax.Array, AttentionCache]:
        """x `[B, T, D]` appended to what the cache holds; of each row only the first `lengths [B]` tokens count.

        Without a window, a row that outgrows the cache gets NaN: inside jit there is no other way to refuse.

        Raises:
            ValueError: T alone is more than the cache holds.
        """
        check_tokens("SoftmaxAttention.prefill", x, self.d_model)
        B, T = x.shape[:2]
        check_lengths("SoftmaxAttention.prefill", lengths, B)
        S = cache.k.shape[1]
        if T > S and not self._is_ring(cache):
            raise ValueError(
                f"SoftmaxAttention.prefill: {T} tokens, the cache holds {S}; give init_cache more than that."
            )
        lengths = jnp.full((B,), T, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
        q, k, v = self._qkv(x, cache.length[:, None] + jnp.arange(T, dtype=jnp.int32))
        attend = functools.partial(causal_attention, window=self.window, implementation=self.implementation)

        def after_cached(q, k, v):
            old_k, old_v, held = _in_order(cache)
            held = jnp.pad(held.astype(jnp.int32), ((0, 0), (0, T)), constant_values=1)  # empty slots: another document
            k = jnp.concatenate([old_k.astype(k.dtype), k], 1)
            v = jnp.concatenate([old_v.astype(v.dtype), v], 1)
            return attend(jnp.pad(q, ((0, 0), (S, 0), (0, 0), (0, 0))), k, v, segment_ids=held)[:, S:]

        written = _write(cache, k, v, lengths)
        o = lax.cond(jnp.any(cache.length > 0), after_cached, attend, q, k, v)
        return self._refuse_overflow(self._out(o), written), written

    def step(self, x_t: jax.Array, cache: AttentionCache) -> tuple[jax.Array, AttentionCache]:
        """One token x_t `[B, D]`, one token further: `(y_t [B, D], cache)`."""
        check_tokens("SoftmaxAttention.step", x_t[:, None], self.d_model)
        q, k, v = self._qkv(x_t[:, None], cache.length[:, None])
        cache = _write(cache, k, v, jnp.ones_like(cache.length))
        seen = jnp.arange(cache.k.shape[1]) < cache.length[:, None]  # no cache is longer than the window
        o = jax.nn.dot_product_attention(q, cache.k.astype(q.dtype), cache.v.astype(q.dtype), mask=seen[:, None, None])
        return self._refuse_overflow(self._out(o), cache)[:, 0], cache

    def _is_ring(self, cache: AttentionCache) -> bool:
        return self.window is not None and cache.k.shape[1] >= self.window

    def _refuse_overflow(self, y: jax.Array, cache: AttentionCache) -> jax.Array:
        if self._is_ring(cache):
            return y
        return jnp.where((cache.length > cache.k.shape[1])[:, None, None], jnp.nan, y)
