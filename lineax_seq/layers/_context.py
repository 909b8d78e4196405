"""What a layer is told of its tokens besides the tokens themselves."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Context(NamedTuple):
    """Where the tokens `[B, T]` of a call stand.

    segment_ids: int [B, T]; the tokens of a document share an id, and what a layer remembers starts anew where the id
        changes. None: every row is one document.
    positions: int [B, T] or [T], for rotary embedding. None: counted from the start of each document.
    valid: bool [B, T], False for padding on the right of a row, which no cache keeps. None: there is no padding.
    axis_name: a mesh axis that T is split over, inside `jax.shard_map`. None: T is whole.
    """

    segment_ids: jax.Array | None = None
    positions: jax.Array | None = None
    valid: jax.Array | None = None
    axis_name: str | None = None

    @property
    def lengths(self) -> jax.Array | None:
        """How many tokens of each row are real, int32 [B]; None: all."""
        return None if self.valid is None else jnp.sum(self.valid, 1, dtype=jnp.int32)


def padded_right(length: int, lengths: jax.Array | None) -> jax.Array | None:
    """`Context.valid` of rows of T = `length` tokens, of which the first `lengths [B]` are real."""
    return None if lengths is None else jnp.arange(length) < jnp.asarray(lengths)[:, None]
