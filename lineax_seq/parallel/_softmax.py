"""Softmax attention piece by piece, with tokens anywhere in the row: the arithmetic that every strategy shares.

A piece of the queries takes in pieces of the keys one after the other, in any order, and keeps a running maximum,
denominator and numerator. If no query of one piece may see a key of the other, because of their places, the window or
their documents, the program skips the pair. The backward pass recomputes the probabilities from the log of the
denominator.

Source: Milakov & Gimelshein 2018, arXiv:1805.02867 (running maximum); Dao et al. 2022, arXiv:2205.14135, algorithm 4.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .varying import vary, varying

_LOWEST = -1e30  # stands for -inf, whose differences would be NaN
_NOWHERE = jnp.iinfo(jnp.int32).max  # the place of padding among the keys: after every query


class Places(NamedTuple):
    """Where tokens stand: their places in the row, int [T], and their documents, int [B, T] or None."""

    index: jax.Array
    run: jax.Array | None


def _split(x: jax.Array, axis: int, size: int, value=0) -> jax.Array:
    """`axis` cut into pieces of `size`, which become the first axis; padded with `value`."""
    blocks = -(-x.shape[axis] // size)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, blocks * size - x.shape[axis])
    x = jnp.pad(x, widths, constant_values=value)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :]), axis, 0)


def _split_places(places: Places, size: int, value: int) -> Places:
    run = None if places.run is None else _split(places.run, 1, size, -1)
    return Places(_split(places.index, 0, size, value), run)


def _zeros(like: jax.Array) -> jax.Array:
    """Zeros in float32 (or float64) that may become different on the devices where `like` is."""
    return vary(jnp.zeros(like.shape, jnp.promote_types(like.dtype, jnp.float32)), varying(like))


class Queries(NamedTuple):
    """Queries in N pieces, `[N, B, HKV, n, C, K]`, scaled, and their places."""

    q: jax.Array
    places: Places


class Sums(NamedTuple):
    """What queries have absorbed: sum of p·v `[N, B, HKV, n, C, K]`, maximum and sum of p `[N, B, HKV, n, C]`."""

    numerator: jax.Array
    maximum: jax.Array
    denominator: jax.Array


def _query_blocks(q: jax.Array, kv_heads: int, size: int) -> jax.Array:
    """[B, T, H, K] -> [N, B, HKV, n, C, K]"""
    B, T, H, K = q.shape
    return jnp.moveaxis(_split(q.reshape(B, T, kv_heads, H // kv_heads, K), 1, size), 2, 4)


def _key_blocks(k: jax.Array, size: int) -> jax.Array:
    """[B, T, HKV, K] -> [N, B, HKV, C, K]"""
    return jnp.moveaxis(_split(k, 1, size), 2, 3)


def queries(q: jax.Array, kv_heads: int, places: Places, size: int) -> Queries:
    """q `[B, T, H, K]` in pieces of `size`, scaled by K**-0.5 in float32 (or float64)."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scaled = (q.astype(wide) * q.shape[-1] ** -0.5).astype(q.dtype)
    return Queries(_query_blocks(scaled, kv_heads, size), _split_places(places, size, -1))


def nothing(blocks: Queries) -> Sums:
    """Before the first key."""
    rows = jnp.sum(_zeros(blocks.q), -1)
    return Sums(_zeros(blocks.q), rows + _LOWEST, rows)


def _visible(i: Places, j: Places, window: int | None) -> jax.Array:
    """bool [B or 1, 1, 1, I, J]"""
    distance = i.index[:, None] - j.index[None, :]
    mask = (distance >= 0) & (i.index >= 0)[:, None]
    if window is not None:
        mask &= distance < window
    mask = mask[None]
    if i.run is not None and j.run is not None:
        mask = mask & (i.run[:, :, None] == j.run[:, None, :])
    return mask[:, None, None]


def _meet(i: Places, j: Places, window: int | None) -> jax.Array:
    """Whether any query may see any key; documents are numbered in order, so their ranges decide."""
    meet = i.index.max() >= j.index.min()
    if window is not None:
        first = jnp.where(i.index >= 0, i.index, _NOWHERE).min()
        last = jnp.where(j.index < _NOWHERE, j.index, -1).max()
        meet &= first < last + window
    if i.run is not None and j.run is not None:
        overlap = (i.run.max(1) >= jnp.where(j.run < 0, _NOWHERE, j.run).min(1)) & (i.run.min(1) <= j.run.max(1))
        meet &= jnp.any(overlap)
    return meet


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def absorb(sums: Sums, blocks: Queries, k: jax.Array, v: jax.Array, places: Places, window: int | None) -> Sums:
    """The sums with the keys and values `[B, T, HKV, K]` added."""
    size = blocks.q.shape[-2]
    keys = _key_blocks(k, size), _key_blocks(v, size), _split_places(places, size, _NOWHERE)

    def of_queries(block):
        sums, q, i = block

        def key_block(sums, key):
            k, v, j = key

            def add(sums):
                mask = _visible(i, j, window)
                scores = jnp.where(mask, _product("bhnik,bhjk->bhnij", q, k), _LOWEST)
                maximum = jnp.maximum(sums.maximum, scores.max(-1))
                p = jnp.where(mask, jnp.exp(scores - maximum[..., None]), 0)
                old = jnp.exp(sums.maximum - maximum)
                numerator = sums.numerator * old[..., None] + _product("bhnij,bhjk->bhnik", p.astype(v.dtype), v)
                return Sums(numerator, maximum, sums.denominator * old + p.sum(-1))

            return lax.cond(_meet(i, j, window), add, lambda sums: sums, sums), None

        return lax.scan(key_block, sums, keys)[0]

    return lax.map(of_queries, (sums, *blocks))


def outputs(sums: Sums, length: int, dtype) -> tuple[jax.Array, jax.Array]:
    """Outputs [B, T, H, K] and the log of the denominators [N, B, HKV, n, C]."""
    seen = sums.denominator > 0  # not so for padding
    denominator = jnp.where(seen, sums.denominator, 1)
    o = jnp.moveaxis(sums.numerator / denominator[..., None], 4, 2)  # [N, B, C, HKV, n, K]
    return joined(o, length).astype(dtype), sums.maximum + jnp.log(denominator)


def joined(x: jax.Array, length: int) -> jax.Array:
    """[N, B, C, HKV, n, K] -> [B, T, H, K]"""
    N, B, C, HKV, n, K = x.shape
    return jnp.moveaxis(x, 0, 1).reshape(B, N * C, HKV * n, K)[:, :length]


class Pullback(NamedTuple):
    """What the gradient of all keys needs of the queries: d o `[N, B, HKV, n, C, K]` and, per query, two numbers."""

    d_o: jax.Array
    log_denominator: jax.Array
    inner: jax.Array  # sum of o · d o


def pullback(o: jax.Array, d_o: jax.Array, log_denominator: jax.Array, kv_heads: int) -> Pullback:
    wide = log_denominator.dtype
    size = log_denominator.shape[-1]
    inner = jnp.sum(o.astype(wide) * d_o.astype(wide), -1, keepdims=True)
    return Pullback(_query_blocks(d_o, kv_heads, size), log_denominator, _query_blocks(inner, kv_heads, size)[..., 0])


def gradients(back: Pullback, blocks: Queries, k, v, places: Places, window: int | None):
    """The shares of these keys in d q `[B, T, H, K]` (with the scale), and d k, d v `[B, T, HKV, K]`, in float32."""
    size, length = blocks.q.shape[-2], k.shape[1]
    keys = _key_blocks(k, size), _key_blocks(v, size), _split_places(places, size, _NOWHERE)
    zeros = _zeros(keys[0]), _zeros(keys[1])

    def of_queries(d_kv, block):
        (d_o, log_denominator, inner), q, i = block

        def key_block(d_q, key):
            k, v, j, d_k, d_v = key

            def add(d_q, d_k, d_v):
                scores = _product("bhnik,bhjk->bhnij", q, k)
                p = jnp.where(_visible(i, j, window), jnp.exp(scores - log_denominator[..., None]), 0)
                d_p = _product("bhnik,bhjk->bhnij", d_o, v)
                d_scores = (p * (d_p - inner[..., None])).astype(q.dtype)
                d_q += _product("bhnij,bhjk->bhnik", d_scores, k)
                d_k += _product("bhnij,bhnik->bhjk", d_scores, q)
                d_v += _product("bhnij,bhnik->bhjk", p.astype(d_o.dtype), d_o)
                return d_q, d_k, d_v

            d_q, d_k, d_v = lax.cond(_meet(i, j, window), add, lambda *same: same, d_q, d_k, d_v)
            return d_q, (d_k, d_v)

        d_q, d_kv = lax.scan(key_block, _zeros(q), (*keys, *d_kv))
        return d_kv, d_q

    d_kv, d_q = lax.scan(of_queries, zeros, (back, *blocks))
    scale = blocks.q.shape[-1] ** -0.5
    return jnp.moveaxis(d_q, 4, 2) * scale, *(_keys_back(d, length) for d in d_kv)


def _keys_back(x: jax.Array, length: int) -> jax.Array:
    """[N, B, HKV, C, K] -> [B, T, HKV, K]"""
    x = jnp.moveaxis(x, 2, 3)
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(window: int | None, size: int, q, k, v, i: Places, j: Places) -> jax.Array:
    """Queries `[B, T, H, K]` at places i over keys and values `[B, S, HKV, K]` at places j, in pieces of `size`."""
    return _attend_forward(window, size, q, k, v, i, j)[0]


def _attend_forward(window, size, q, k, v, i, j):
    blocks = queries(q, k.shape[2], i, size)
    o, log_denominator = outputs(absorb(nothing(blocks), blocks, k, v, j, window), q.shape[1], v.dtype)
    return o, (q, k, v, i, j, o, log_denominator)


def _attend_backward(window, size, residuals, d_o):
    q, k, v, i, j, o, log_denominator = residuals
    blocks = queries(q, k.shape[2], i, size)
    d_q, d_k, d_v = gradients(pullback(o, d_o, log_denominator, k.shape[2]), blocks, k, v, j, window)
    return joined(d_q, q.shape[1]).astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


attend.defvjp(_attend_forward, _attend_backward)
