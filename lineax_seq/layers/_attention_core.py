"""Causal softmax attention over whole sequences, in blocks of queries that skip the keys they cannot see.

`jax.nn.dot_product_attention` computes all T² scores and masks half of them. Here a block of queries meets only the
keys up to its own end, and with a window only those of its own and the previous block. Each block is rematerialised, so
that the backward pass does not hold the probabilities of all blocks (and, in a stack, of all layers).
"""

import functools

import jax
import jax.numpy as jnp

from ..parallel import run_ids

_BLOCKS = 8  # of queries, unrolled: (1 + 1/8) / 2 of the full square, and a program that does not grow with T
_BLOCK_MIN = 256


def _visible(i: jax.Array, j: jax.Array, window: int | None, run_i=None, run_j=None) -> jax.Array:
    """bool [1 or B, 1, I, J]: queries at indices i see keys at indices j >= 0; a window counts the query itself."""
    distance = i[:, None] - j[None, :]
    mask = (distance >= 0) & (j >= 0)[None, :]
    if window is not None:
        mask &= distance < window
    mask = mask[None]
    if run_i is not None and run_j is not None:
        mask = mask & (run_i[:, :, None] == run_j[:, None, :])
    return mask[:, None]


@functools.partial(jax.checkpoint, static_argnums=(7, 8))
def _block(q, k, v, i, j, run_i, run_j, window, implementation):
    return jax.nn.dot_product_attention(
        q, k, v, mask=_visible(i, j, window, run_i, run_j), implementation=implementation
    )


def _growing(q, k, v, window, runs, implementation):
    """Block n of the queries against all keys up to its end (from the start of its window on)."""
    T = q.shape[1]
    size = max(_BLOCK_MIN, -(-T // _BLOCKS))
    index = jnp.arange(T, dtype=jnp.int32)
    outputs = []
    for start in range(0, T, size):
        end = min(start + size, T)
        own = slice(start, end)
        seen = slice(0 if window is None else max(0, start - window + 1), end)
        run_i, run_j = (None, None) if runs is None else (runs[:, own], runs[:, seen])
        outputs.append(
            _block(q[:, own], k[:, seen], v[:, seen], index[own], index[seen], run_i, run_j, window, implementation)
        )
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, 1)


def _banded(q, k, v, window, runs, implementation):
    """Blocks as long as the window: each meets itself and the block before it, all blocks at once."""
    B, T = q.shape[:2]
    blocks = -(-T // window)

    def split(x):  # [B, T, ...] -> [B, blocks, window, ...]
        x = jnp.pad(x, [(0, 0), (0, blocks * window - T)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(B, blocks, window, *x.shape[2:])

    def with_previous(x):  # -> [B, blocks, 2·window, ...]
        previous = jnp.pad(x, [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))[:, :-1]
        return jnp.concatenate([previous, x], 2)

    start = jnp.arange(blocks, dtype=jnp.int32)[:, None] * window
    i = start + jnp.arange(window, dtype=jnp.int32)
    j = start + jnp.arange(-window, window, dtype=jnp.int32)  # negative before the first block: seen by nobody
    q, k, v = split(q), with_previous(split(k)), with_previous(split(v))
    run_i, run_j = None, None
    if runs is not None:
        run_i = split(runs)
        run_j = with_previous(run_i)
    axes = (1, 1, 1, 0, 0, None if runs is None else 1, None if runs is None else 1)
    o = jax.vmap(lambda *xs: _block(*xs, window, implementation), axes, 1)(q, k, v, i, j, run_i, run_j)
    return o.reshape(B, blocks * window, *o.shape[3:])[:, :T]


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention of each token over itself and the tokens before it: `[B, T, H, K]` in the dtype of v.

    Args:
        q: [B, T, H, K]; scores are scaled by K**-0.5.
        k, v: [B, T, HKV, K]; query head h reads key head h // (H / HKV).
        window: how many tokens each token sees, itself included; None is all.
        segment_ids: int [B, T]; a token sees only its own run of equal ids.
        implementation: of `jax.nn.dot_product_attention`: None and "xla" run in blocks, "cudnn" in one fused call.
    """
    if implementation == "cudnn":
        runs = None if segment_ids is None else run_ids(segment_ids)
        mask = None if runs is None else (runs[:, :, None] == runs[:, None, :])[:, None]
        local = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=True, local_window_size=local, implementation=implementation
        )
    runs = None if segment_ids is None else run_ids(segment_ids)
    if window is not None and q.shape[1] > 2 * window:
        return _banded(q, k, v, window, runs, implementation)
    return _growing(q, k, v, window, runs, implementation)
