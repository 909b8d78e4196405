"""(I + A)^-1 for the strictly lower triangular A of several heads at once: first leaves of sixteen rows, then merges.

A leaf is a square of sixteen rows and columns on the diagonal. Leaves are inverted row by row, by forward substitution,
the leaves of eight heads at once. One register holds row i of 64 leaves: the eight leaves of a head lie on the eight
sublanes, and each of the eight heads has sixteen of the 128 lanes. A step of the substitution is then one
multiplication for all 64 leaves. Row i of a head's leaves is every sixteenth row of its matrix, hence loads and stores
with that stride. A permutation of lanes moves a row from its place in the matrix to its head's lanes, and back.

Two neighbouring inverses P, Q merge as [[P, 0], [-Q A P, Q]], for all pairs of one size in two products. No powers of A
are formed: they reach 1e11 when keys repeat, while the inverse stays small.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ._chunk import Chunk, dot, split

LEAF = 16
TILE = (8, 128)
SQUARE = 128  # rows and columns of a head's scratch, whatever C is: eight leaves
SCRATCH = dict.fromkeys(("strict", "inverse"), ((SQUARE, SQUARE), True))  # of a `Family`: A and the inverse


def _permuted(x: jax.Array, lanes: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, lanes, axis=1, mode="promise_in_bounds")


def invert_leaves(a_ref, inverse_ref, heads: int) -> None:
    """`inverse_ref [heads, 128, 128]` := the inverses of the leaves of `a_ref [heads, 128, 128]`, zero elsewhere.

    Rows from C on may hold anything, and then do afterwards.
    """
    leaf, lane = (lax.broadcasted_iota(jnp.int32, TILE, axis) for axis in (0, 1))
    own, place = lane // LEAF, lane % LEAF  # the lane's head among the eight, its column in the leaf
    rows = lambda i: pl.ds(i, TILE[0], stride=LEAF)  # noqa: E731
    for first in range(0, heads, TILE[0]):
        together = range(first, min(first + TILE[0], heads))
        a, x = [], []
        for i in range(LEAF):
            row = jnp.zeros(TILE, jnp.float32)
            for n, head in enumerate(together):
                row = jnp.where(own == n, _permuted(a_ref[head, rows(i), :], leaf * LEAF + place), row)
            a.append(row)
            x.append(jnp.where(place == i, 1.0, 0.0))
        for j in range(LEAF):
            for i in range(j + 1, LEAF):
                x[i] = x[i] - _permuted(a[i], own * LEAF + j) * x[j]
        for i in range(LEAF):
            for n, head in enumerate(together):
                row = _permuted(x[i], n * LEAF + place)
                inverse_ref[head, rows(i), :] = jnp.where(own == leaf, row, 0)


def _accurate(chunk: Chunk, a: jax.Array, b: jax.Array) -> jax.Array:
    """a b with more than the operands' usual eight bits: what is lost here, the inverse amplifies."""
    if chunk.exact:
        return chunk.dot(a, b)
    (a_high, a_low), (b_high, b_low) = split(a, 2), split(b, 2)
    bf16 = jnp.dtype(jnp.bfloat16)
    return dot(a_high, b_high, bf16) + (dot(a_low, b_high, bf16) + dot(a_high, b_low, bf16))


def merge_leaves(chunk: Chunk, a_ref, inverse_ref, heads: int) -> None:
    """`inverse_ref` := the inverses of I + A in its first C rows and columns, from those of the leaves.

    The same product is taken for one head after the other, so that a head's product runs while another one's result
    is not there yet.
    """
    apart, h, size = chunk.i ^ chunk.j, LEAF, chunk.size
    later = lambda x: x.reshape(-1, 2, h, size)[:, 1].reshape(-1, size)  # noqa: E731
    while h < size:
        between = (apart >= h) & (apart < 2 * h) & (chunk.i > chunk.j)
        inverses = [inverse_ref[head, :size, :size] for head in range(heads)]
        products = [
            _accurate(chunk, later(x), jnp.where(between, a_ref[head, :size, :size], 0))
            for head, x in enumerate(inverses)
        ]
        products = [_accurate(chunk, product, x) for product, x in zip(products, inverses, strict=True)]
        for head, (product, x) in enumerate(zip(products, inverses, strict=True)):
            rows = (later(x) - product).reshape(-1, h, size)
            for n in range(rows.shape[0]):
                inverse_ref[head, (2 * n + 1) * h : (2 * n + 2) * h, :size] = rows[n]
        h *= 2


def invert(chunk: Chunk, scratch: dict, heads: int) -> None:
    """`scratch["inverse"]` := (I + A)^-1 of the A that stand in `scratch["strict"]`."""
    invert_leaves(scratch["strict"], scratch["inverse"], heads)
    merge_leaves(chunk, scratch["strict"], scratch["inverse"], heads)
