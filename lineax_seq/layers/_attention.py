"""The softmax attention layer: rotary positions, grouped key/value heads, an optional sliding window, a KV cache.

Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; grouped heads: Ainslie et al. 2023, arXiv:2305.13245.
"""

import dataclasses
import functools
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from .. import parallel
from ._attention_core import causal_attention
from ._config import LayerConfig, channels
from ._context import Context
from ._layer import Layer
from ._parts import Parts, heads, merged
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxAttentionConfig(LayerConfig):
    """Causal softmax attention.

    Attributes:
        num_heads: query heads H.
        num_kv_heads: key and value heads, a divisor of H; None is H.
        head_dim: channels per head; None is D / H.
        window: how many tokens each token sees, itself included; None is all.
        rope_theta: base of the rotary frequencies; None leaves positions out.
        qk_norm: RMSNorm of queries and keys over each head's channels, before the rotation.
        implementation: of `jax.nn.dot_product_attention`: None, "xla" or "cudnn"; the last one wants time whole.
        strategy: where time is split over devices, one of `parallel.STRATEGIES`.
    """

    name: ClassVar[str] = "softmax_attention"
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    rope_theta: float | None = 10000.0
    qk_norm: bool = False
    implementation: Literal["xla", "cudnn"] | None = None
    strategy: Literal["all_gather", "zigzag", "ring", "ulysses"] = "all_gather"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"SoftmaxAttentionConfig: num_heads={self.num_heads} is no multiple of num_kv_heads={self.kv_heads}; "
                "change one."
            )

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def width(self, d_model: int) -> int:
        """Channels per head."""
        of_width = f"d_model={d_model} over num_heads={self.num_heads} (without head_dim)"
        width = self.head_dim or channels("SoftmaxAttentionConfig", of_width, d_model / self.num_heads)
        if self.rope_theta is not None and width % 2:
            raise ValueError(
                f"SoftmaxAttentionConfig: head_dim={width} is odd, rotary positions want it even; or rope_theta=None."
            )
        return width

    def check(self, d_model: int) -> None:
        self.width(d_model)

    def build(self, parts: Parts) -> "SoftmaxAttention":
        return SoftmaxAttention(self, parts)


class SoftmaxAttention(Layer):
    """Causal softmax attention, `[B, T, D] -> [B, T, D]`."""

    def __init__(self, config: SoftmaxAttentionConfig, parts: Parts):
        super().__init__(config, parts)
        self.head_dim = config.width(parts.d_model)
        self.q_proj = parts.project(config.num_heads * self.head_dim)
        self.k_proj = parts.project(config.kv_heads * self.head_dim)
        self.v_proj = parts.project(config.kv_heads * self.head_dim)
        self.o_proj = parts.out(config.num_heads * self.head_dim)
        norms = [parts.rms_norm(self.head_dim) for _ in "qk"] if config.qk_norm else [nnx.data(None)] * 2
        self.q_norm, self.k_norm = norms

    def _qkv(self, x: jax.Array, positions: jax.Array):
        config = self.config
        q, k, v = (
            heads(project(x), n)
            for project, n in (
                (self.q_proj, config.num_heads),
                (self.k_proj, config.kv_heads),
                (self.v_proj, config.kv_heads),
            )
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if config.rope_theta is not None:
            q, k = rotary(q, positions, config.rope_theta), rotary(k, positions, config.rope_theta)
        return q, k, v

    def run(self, x: jax.Array, context: Context, cache: AttentionCache | None, shared):
        if cache is None:
            return self._whole(x, context), None, shared
        return *self._after(x, context, cache), shared

    def _whole(self, x: jax.Array, context: Context) -> jax.Array:
        segment_ids, axis_name, config = context.segment_ids, context.axis_name, self.config
        positions = context.positions
        if positions is None:
            positions = parallel.positions(x.shape[1], segment_ids, axis_name)
        q, k, v = self._qkv(x, jnp.asarray(positions))
        seen = dict(window=config.window, segment_ids=segment_ids)
        if axis_name is None:
            return self.o_proj(merged(causal_attention(q, k, v, **seen, implementation=config.implementation)))
        if config.implementation == "cudnn":
            raise ValueError("SoftmaxAttention: implementation='cudnn' wants time whole; leave it or axis_name out.")
        return self.o_proj(merged(parallel.attention(q, k, v, **seen, axis_name=axis_name, strategy=config.strategy)))

    def _after(self, x: jax.Array, context: Context, cache: AttentionCache) -> tuple[jax.Array, AttentionCache]:
        """Tokens appended to what the cache holds.

        Without a window, a row that outgrows the cache gets NaN: inside jit there is no other way to refuse.

        Raises:
            ValueError: T alone is more than the cache holds.
        """
        self._check_cached(context)
        (B, T), S = x.shape[:2], cache.k.shape[1]
        if T > S and not self._is_ring(cache):
            raise ValueError(f"SoftmaxAttention: {T} tokens, the cache holds {S}; give init_cache more than that.")
        lengths = context.lengths
        if lengths is None:
            lengths = jnp.full((B,), T, jnp.int32)
        q, k, v = self._qkv(x, cache.length[:, None] + jnp.arange(T, dtype=jnp.int32))
        attend = functools.partial(
            causal_attention, window=self.config.window, implementation=self.config.implementation
        )

        def after_cached(q, k, v):
            old_k, old_v, held = _in_order(cache)
            held = jnp.pad(held.astype(jnp.int32), ((0, 0), (0, T)), constant_values=1)  # empty slots: another document
            k = jnp.concatenate([old_k.astype(k.dtype), k], 1)
            v = jnp.concatenate([old_v.astype(v.dtype), v], 1)
            return attend(jnp.pad(q, ((0, 0), (S, 0), (0, 0), (0, 0))), k, v, segment_ids=held)[:, S:]

        written = _write(cache, k, v, lengths)
        o = lax.cond(jnp.any(cache.length > 0), after_cached, attend, q, k, v)
        return self._refuse_overflow(self.o_proj(merged(o)), written), written

    def run_token(self, x_t: jax.Array, cache: AttentionCache, shared):
        q, k, v = self._qkv(x_t[:, None], cache.length[:, None])
        cache = _write(cache, k, v, jnp.ones_like(cache.length))
        seen = jnp.arange(cache.k.shape[1]) < cache.length[:, None]  # no cache is longer than the window
        o = jax.nn.dot_product_attention(q, cache.k.astype(q.dtype), cache.v.astype(q.dtype), mask=seen[:, None, None])
        return self._refuse_overflow(self.o_proj(merged(o)), cache)[:, 0], cache, shared

    def init_cache(self, batch: int, max_length: int, dtype=None) -> AttentionCache:
        """An empty cache for sequences of at most `max_length` tokens; with a window, no longer than it."""
        self._check_cache_size(batch, max_length)
        slots = max_length if self.config.window is None else min(max_length, self.config.window)
        shape = (batch, slots, self.config.kv_heads, self.head_dim)
        k, v = jnp.zeros(shape, dtype or self.dtype), jnp.zeros(shape, dtype or self.dtype)
        return AttentionCache(k, v, jnp.zeros((batch,), jnp.int32))

    def _is_ring(self, cache: AttentionCache) -> bool:
        return self.config.window is not None and cache.k.shape[1] >= self.config.window

    def _refuse_overflow(self, y: jax.Array, cache: AttentionCache) -> jax.Array:
        if self._is_ring(cache):
            return y
        return jnp.where((cache.length > cache.k.shape[1])[:, None, None], jnp.nan, y)
