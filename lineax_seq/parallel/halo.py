"""What a shard of time must know of the shards before it: their last tokens, and where its first document began.

With `axis_name=None` every function takes time to be whole, so that its callers are written once for both. The first
tokens of a shard continue those of the shard before, unless `segment_ids` say that a document starts.
"""

import jax
import jax.numpy as jnp
from jax import lax


def left_halo(x: jax.Array, width: int, axis_name: str | None = None) -> jax.Array:
    """The `width` tokens before this shard: x `[B, T, ...]` -> `[B, width, ...]`, zeros before the first one.

    One `ppermute` sends `width` tokens to the right; the backward pass sends their gradients to the left.

    Raises:
        ValueError: the shard is shorter than the halo.
    """
    if axis_name is None or width == 0:
        return jnp.zeros((x.shape[0], width, *x.shape[2:]), x.dtype)
    if x.shape[1] < width:
        raise ValueError(
            f"left_halo: shards of {x.shape[1]} tokens are shorter than the {width} that their right neighbour needs; "
            f"split time over fewer devices of axis {axis_name!r}, or give longer rows."
        )
    last = x[:, x.shape[1] - width :]
    return lax.ppermute(last, axis_name, [(r, r + 1) for r in range(lax.axis_size(axis_name) - 1)])


def token_shift(x: jax.Array, *, segment_ids: jax.Array | None = None, axis_name: str | None = None) -> jax.Array:
    """`[B, T, D] -> [B, T, D]`: for each token the one before it, zeros where a document starts."""
    previous = jnp.concatenate([left_halo(x, 1, axis_name), x[:, :-1]], 1)
    if segment_ids is None:
        return previous
    return jnp.where(borders(segment_ids, axis_name)[..., None], 0, previous)


def borders(segment_ids: jax.Array, axis_name: str | None = None) -> jax.Array:
    """bool [B, T]: the token's id differs from the id of the token before it; False at the first token of the row."""
    if axis_name is None:
        return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    before = jnp.concatenate([left_halo(segment_ids, 1, axis_name), segment_ids[:, :-1]], 1)
    first = jnp.arange(segment_ids.shape[1]) + shard_start(segment_ids.shape[1], axis_name) == 0
    return (segment_ids != before) & ~first


def shard_start(length: int, axis_name: str | None = None) -> jax.Array | int:
    """The place in the row of the first token of this shard of `length` tokens."""
    return 0 if axis_name is None else lax.axis_index(axis_name) * length


def positions(length: int, segment_ids: jax.Array | None = None, axis_name: str | None = None) -> jax.Array:
    """Each token's place in its row, int32 `[T]`; with `segment_ids [B, T]` in its run of equal ids, `[B, T]`.

    With ids, shards exchange one number per row: where their last run began.
    """
    index = shard_start(length, axis_name) + jnp.arange(length, dtype=jnp.int32)
    if segment_ids is None:
        return index
    begun = lax.cummax(jnp.where(borders(segment_ids, axis_name), index, -1), axis=1)  # -1: before this shard
    if axis_name is not None:
        last = lax.all_gather(begun[:, -1], axis_name)  # [P, B]
        earlier = jnp.arange(last.shape[0])[:, None] < lax.axis_index(axis_name)
        begun = jnp.maximum(begun, jnp.max(jnp.where(earlier, last, 0), 0)[:, None])
    return index - jnp.maximum(begun, 0)


def run_ids(segment_ids: jax.Array, axis_name: str | None = None) -> jax.Array:
    """int32 [B, T]: 0, 1, 2... for the runs of equal ids in the row, so that an id that comes back is another document.

    Over shards, one number per row is exchanged: how many runs begin in each.
    """
    runs = jnp.cumsum(borders(segment_ids, axis_name).astype(jnp.int32), 1)
    if axis_name is None:
        return runs
    counts = lax.all_gather(runs[:, -1], axis_name)  # [P, B]
    earlier = jnp.arange(counts.shape[0])[:, None] < lax.axis_index(axis_name)
    return runs + jnp.sum(jnp.where(earlier, counts, 0), 0)[:, None]
