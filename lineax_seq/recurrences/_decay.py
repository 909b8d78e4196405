"""Cumulated log-decays and decayed scores of a chunk, with exponents that are never positive.

Within a chunk, token j reaches token i >= j through the product of the decays of j+1..i. Taking it as
`exp(G_i - G_j)` with G a cumulative sum cancels: one gate of -1e4 costs every later ratio of the chunk three digits.
Here the sums are built by halves instead. A block of 2h tokens splits at its middle; a pair on either side of it is
joined by a sum that starts in the middle (`forward`, for the later token) and one that ends there (`backward`, for the
earlier one). Both only ever add non-positive numbers, so nothing cancels and nothing overflows, whatever the gates.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sums(NamedTuple):
    """Sums of log-decays inside consecutive blocks of one length; arrays `[blocks, block, ...]`."""

    forward: jax.Array  # from the block's first token to this one, both included
    backward: jax.Array  # from the token after this one to the block's last


def leaves(g: jax.Array) -> Sums:
    """Blocks of one token of `g [C, ...]`."""
    return Sums(g[:, None], jnp.zeros_like(g)[:, None])


def double(sums: Sums) -> Sums:
    """Blocks of twice the length."""
    forward, backward = _pairs(sums.forward), _pairs(sums.backward)
    left, right = forward[:, 0, -1:], forward[:, 1, -1:]
    return Sums(
        jnp.concatenate([forward[:, 0], forward[:, 1] + left], axis=1),
        jnp.concatenate([backward[:, 0] + right, backward[:, 1]], axis=1),
    )


def _pairs(x: jax.Array) -> jax.Array:
    """`[blocks, block, ...]` -> `[blocks / 2, 2, block, ...]`."""
    return x.reshape(x.shape[0] // 2, 2, *x.shape[1:])


def pair_sums(g: jax.Array) -> tuple[jax.Array, Sums]:
    """`[C, C]` sums of `g [C]` over j+1..i (0 on the diagonal, meaningless above), and its sums over the chunk."""
    sums, matrix = leaves(g), jnp.zeros((g.shape[0], 1, 1), g.dtype)
    while matrix.shape[0] > 1:
        later, earlier = _pairs(sums.forward)[:, 1], _pairs(sums.backward)[:, 0]
        matrix = assemble(matrix, later[:, :, None] + earlier[:, None, :])
        sums = double(sums)
    return matrix[0], Sums(sums.forward[0], sums.backward[0])


def assemble(diagonal: jax.Array, lower: jax.Array) -> jax.Array:
    """Diagonal blocks `[2m, h, h]` and the blocks below them `[m, h, h]` -> `[m, 2h, 2h]`, zero above."""
    pairs = _pairs(diagonal)
    top = jnp.concatenate([pairs[:, 0], jnp.zeros_like(lower)], axis=2)
    return jnp.concatenate([top, jnp.concatenate([lower, pairs[:, 1]], axis=2)], axis=1)


class Documents(NamedTuple):
    """Masks of a chunk that document starts cut; None everywhere when there are none."""

    same: jax.Array  # [C, C] both tokens in one document
    entry: jax.Array  # [C] the token still belongs to the document of the state that enters
    exit: jax.Array  # [C] the token belongs to the document of the state that leaves
    through: jax.Array  # () no document starts: the entering state reaches the end


def documents(keep: jax.Array | None) -> Documents | None:
    """The masks for `keep [C]` (False where a document starts)."""
    if keep is None:
        return None
    count = jnp.cumsum(~keep)
    return Documents(count[:, None] == count[None, :], count == 0, count == count[-1], count[-1] == 0)


def entering(x: jax.Array, docs: Documents | None) -> jax.Array:
    """`x [C, ...]`, of which zero is left after a document's start: what reads the entering state."""
    return x if docs is None else mask(x, docs.entry)


def leaving(x: jax.Array, docs: Documents | None) -> jax.Array:
    """`x [C, ...]`, of which zero is left before a document's start: what writes into the leaving state."""
    return x if docs is None else mask(x, docs.exit)


def mask(x: jax.Array, kept: jax.Array) -> jax.Array:
    """Rows of `x [C, ...]` set to zero where not kept."""
    return jnp.where(kept.reshape(kept.shape + (1,) * (x.ndim - kept.ndim)), x, 0)


def causal(scores: jax.Array, docs: Documents | None, strict: bool = False) -> jax.Array:
    """Scores `[C, C]` below the diagonal (and on it unless strict), within documents."""
    scores = jnp.tril(scores, -1 if strict else 0)
    return scores if docs is None else jnp.where(docs.same, scores, 0)
