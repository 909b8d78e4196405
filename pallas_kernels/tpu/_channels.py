"""Pairs of tokens under one decay per key channel: A_ij = sum_d q_id k_jd exp(g_{j+1} + ... + g_i)_d for j <= i.

Pairs inside a tile of eight tokens come from one product, whose decays count from the tile's middle. Gates count as at
least `FLOOR` there, so that no factor leaves float32's range.

Pairs of tokens in different tiles come from halves. Take a span of 2h tokens: its later half's queries, decayed since
the middle of the span, are multiplied by its earlier half's keys, decayed until the middle. These exponents are never
positive and are sums to which terms are only added, so that nothing overflows or cancels, whatever the gates are. The
next level has spans twice as long: queries of the later half are multiplied by the whole decay of the earlier half,
keys of the earlier half by that of the later half. At the top, where the span is the chunk, these arrays are what reads
the entering state and what writes the leaving one. The backward pass goes down the levels again.

Each level takes one product for every set of queries and every set of keys. Its right operand is `joint`, which has
keys in the rows of earlier halves and queries in those of later halves: the backward pass needs both.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from ._chunk import Chunk

TILE = 8
# exp(FLOOR) is below float32's rounding of what it is added to; exp(-4 FLOOR) leaves it seven decimal orders.
FLOOR = -18.0


class Decays(NamedTuple):
    """The decays of a chunk's tokens within their tiles."""

    since: jax.Array  # [C, K] from the tile's first token to this one
    until: jax.Array  # [C, K] from the token after this one to the tile's last
    middle: jax.Array  # [C, K] from the tile's middle to this token, above 1 before it
    back: jax.Array  # [C, K] its inverse
    total: jax.Array  # [tiles, 1, K]


class Tape(NamedTuple):
    """What `backward` needs from `forward`."""

    base: tuple[list, list]  # queries and keys of the tiles' own products
    joints: list  # by level, of each set of queries and each of keys
    ups: list  # by level: the halves' whole decays, and the queries and keys after they were multiplied by them


def _tiles(x: jax.Array, rows: int = TILE) -> jax.Array:
    return x.reshape(-1, rows, x.shape[-1])


def _halves(x: jax.Array, h: int) -> tuple[jax.Array, jax.Array]:
    """The earlier and the later halves `[spans, h, D]` of the spans of 2h rows."""
    x = x.reshape(-1, 2, h, x.shape[-1])
    return x[:, 0], x[:, 1]


def _joined(earlier: jax.Array, later: jax.Array) -> jax.Array:
    """The inverse of `_halves`."""
    return jnp.stack([earlier, later], axis=1).reshape(-1, earlier.shape[-1])


def _row_in_tile(shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0) % TILE


def _tile_sums(x: jax.Array, reverse: bool = False) -> jax.Array:
    """Sums of `x [C, K]` over each tile's rows up to this one, or with `reverse` from this one on."""
    row = _row_in_tile(x.shape)
    for shift in (1, 2, 4):
        moved = pltpu.roll(x, x.shape[0] - shift if reverse else shift, 0)
        x = x + jnp.where(row < TILE - shift if reverse else row >= shift, moved, 0)
    return x


def decays(g: jax.Array) -> Decays:
    since = _tiles(_tile_sums(jnp.maximum(g, FLOOR)))
    total, middle = since[:, TILE - 1 :], since - since[:, TILE // 2 - 1 : TILE // 2]
    flat = lambda x: jnp.exp(x).reshape(g.shape)  # noqa: E731
    return Decays(flat(since), flat(total - since), flat(middle), flat(-middle), jnp.exp(total))


def forward(chunk: Chunk, d: Decays, queries: list, keys: list):
    """(the scores `[C, C]` of each set of queries with each of keys, right where j <= i; queries decayed since the
    chunk's entry; keys decayed until its exit; the chunk's decay `[1, K]`; what `backward` needs)."""
    operand = lambda x: x.astype(chunk.dtype)  # noqa: E731
    apart = chunk.i ^ chunk.j
    base = [operand(q * d.middle) for q in queries], [operand(k * d.back) for k in keys]
    scores = [[jnp.where(apart < TILE, chunk.dot_t(q, k), 0) for k in base[1]] for q in base[0]]
    reads, writes, total = [q * d.since for q in queries], [k * d.until for k in keys], d.total
    joints, ups, h = [], [], TILE
    while h < chunk.size:
        earlier_keys, later_keys = zip(*(_halves(write, h) for write in writes), strict=True)
        first, second = _halves(total, 1)
        inside = _halves(apart, h)[1]
        level = []
        for n, read in enumerate(reads):
            earlier, later = _halves(read, h)
            level.append([operand(_joined(key, later)) for key in earlier_keys])
            for m, joint in enumerate(level[-1]):
                pairs = chunk.dot_t(later.reshape(-1, later.shape[-1]), joint).reshape(-1, h, chunk.size)
                above, below = _halves(scores[n][m], h)
                scores[n][m] = _joined(above, jnp.where((inside >= h) & (inside < 2 * h), pairs, below))
            reads[n] = _joined(earlier, later * first)
        writes = [_joined(key * second, later) for key, later in zip(earlier_keys, later_keys, strict=True)]
        joints.append(level)
        ups.append((total, list(reads), writes))
        total = first * second
        h *= 2
    return scores, reads, writes, total[0], Tape(base, joints, ups)


def backward(chunk: Chunk, d: Decays, g, queries, keys, tape: Tape, d_scores: list, d_reads, d_writes, d_total):
    """(gradients of the queries, of the keys, of g), from those of `forward`'s results.

    `d_scores`: with its transpose above the diagonal. `d_total`: of the logarithm of the chunk's decay.
    """
    apart, d_total, d_reads, d_writes, h = chunk.i ^ chunk.j, d_total[None], list(d_reads), list(d_writes), chunk.size
    for level, (total, reads, writes) in zip(reversed(tape.joints), reversed(tape.ups), strict=True):
        h //= 2
        inside = (apart >= h) & (apart < 2 * h)
        d_earlier_total, d_later_total, (first, second) = d_total, d_total, _halves(total, 1)
        d_earlier_keys, d_later_keys = map(list, zip(*(_halves(d_write, h) for d_write in d_writes), strict=True))
        for m, d_key in enumerate(d_earlier_keys):
            d_later_total = d_later_total + (_halves(writes[m], h)[0] * d_key).sum(1, keepdims=True)
            d_earlier_keys[m] = d_key * second
        for n, joints in enumerate(level):
            d_earlier, d_later = _halves(d_reads[n], h)
            d_earlier_total = d_earlier_total + (_halves(reads[n], h)[1] * d_later).sum(1, keepdims=True)
            d_later = d_later * first
            for m, joint in enumerate(joints):
                d_key, d_query = _halves(chunk.dot(jnp.where(inside, d_scores[n][m], 0), joint), h)
                d_earlier_keys[m] = d_earlier_keys[m] + d_key
                d_later = d_later + d_query
            d_reads[n] = _joined(d_earlier, d_later)
        d_writes = [_joined(*halves) for halves in zip(d_earlier_keys, d_later_keys, strict=True)]
        d_total = jnp.stack([d_earlier_total, d_later_total], axis=1).reshape(-1, 1, d_total.shape[-1])

    inside, row = apart < TILE, _row_in_tile(g.shape)
    d_queries = [d_read * d.since for d_read in d_reads]
    d_keys = [d_write * d.until for d_write in d_writes]
    d_since = sum(query * d_query for query, d_query in zip(queries, d_queries, strict=True))
    d_until = jnp.asarray(sum(key * d_key for key, d_key in zip(keys, d_keys, strict=True)))
    d_middle = 0
    for n, q in enumerate(tape.base[0]):
        for m, k in enumerate(tape.base[1]):
            d_own = jnp.where(chunk.i == chunk.j, d_scores[n][m], 0).sum(1, keepdims=True)
            d_pairs = jnp.where(inside, d_scores[n][m], 0)
            d_q = chunk.dot(jnp.where(chunk.i > chunk.j, d_pairs, 0), k)
            d_k = chunk.dot(jnp.where(chunk.i < chunk.j, d_pairs, 0), q)
            # of the operands as they were rounded, so that what a pair gives to its two tokens cancels between them
            d_middle = d_middle + (q.astype(jnp.float32) * d_q - k.astype(jnp.float32) * d_k)
            # a token meets itself without a decay
            d_queries[n] = d_queries[n] + (d_q * d.middle + d_own * keys[m])
            d_keys[m] = d_keys[m] + (d_k * d.back + d_own * queries[n])
    at = lambda place, x: jnp.where(_tiles(row) == place, x, 0).reshape(g.shape)  # noqa: E731
    d_middle = d_middle - at(TILE // 2 - 1, _tiles(jnp.asarray(d_middle)).sum(1, keepdims=True))
    d_g = _tile_sums(d_since + d_middle + at(TILE - 1, d_total), reverse=True)
    d_g = d_g + _tile_sums(jnp.where(row > 0, pltpu.roll(d_until, 1, 0), 0))  # of the tokens before
    return d_queries, d_keys, jnp.where(g > FLOOR, d_g, 0)
