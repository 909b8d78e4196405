"""Taps: what a layer sees of the few tokens before each. A cache holds their last inputs, a shard asks its neighbour.

`Tap` knows the past; a short convolution (`ShortConv`) and the token shift are what is made of it.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from ..core import checks
from ..parallel import left_halo
from ._check import check_positive
from ._context import Context


def _reaches(ids: jax.Array, lag: int, T: int) -> jax.Array:
    """bool [B, T]: the token `lag` places before each of the last T lies in the same run of equal ids."""
    inside = jnp.pad(ids[:, 1:] == ids[:, :-1], ((0, 0), (lag, 0)))  # no border just before t
    end = inside.shape[1]
    return functools.reduce(jnp.logical_and, (inside[:, end - T - back : end - back] for back in range(lag)))


class Tap(nnx.Module):
    """A function of each token and the `before` ones ahead of it: `[B, T, channels] -> [B, T, channels]`."""

    def __init__(self, channels: int, before: int):
        check_positive(type(self).__name__, channels=channels)
        self.channels, self.before = channels, before

    def mixed(self, x: jax.Array, past: list[jax.Array]) -> jax.Array:
        """What is made of x and `past`, the same tokens 1, 2, .. places earlier, zeros where a document begins."""
        raise NotImplementedError

    def __call__(
        self,
        x: jax.Array,
        *,
        history: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        axis_name: str | None = None,
    ) -> jax.Array:
        """The function of x, which continues `history [B, before, channels]` (None: zeros).

        With `segment_ids`, documents see no history: they start from zeros. With `axis_name`, a mesh axis that T is
        split over, a shard continues its left neighbour.

        Raises:
            ValueError: a shard shorter than `before`; both `history` and `axis_name`.
        """
        T, ids = x.shape[1], segment_ids
        if axis_name is not None:
            if history is not None:
                raise ValueError(
                    f"{type(self).__name__}: with axis_name, the left neighbour is the history; leave history out."
                )
            history = left_halo(x, self.before, axis_name)
            ids = None if ids is None else jnp.concatenate([left_halo(ids, self.before, axis_name), ids], 1)
        if history is None:
            padded = jnp.pad(x, ((0, 0), (self.before, 0), (0, 0)))
        else:
            padded = jnp.concatenate([history.astype(x.dtype), x], 1)
        past = [padded[:, self.before - lag :][:, :T] for lag in range(1, self.before + 1)]
        if ids is not None:
            reached = (_reaches(ids, lag, T)[:, :, None] for lag in range(1, self.before + 1))
            past = [jnp.where(reaches, earlier, 0) for reaches, earlier in zip(reached, past, strict=True)]
        return self.mixed(x, past)

    def init_history(self, batch: int, dtype) -> jax.Array:
        """The inputs before the first token: zeros [B, before, channels]."""
        return jnp.zeros((batch, self.before, self.channels), dtype)

    def next_history(self, x: jax.Array, history: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """The last `before` inputs after the first `lengths [B]` tokens of x (None: all of them)."""
        both = jnp.concatenate([history, x.astype(history.dtype)], 1)
        if lengths is None:
            return both[:, x.shape[1] :]
        return jax.vmap(lambda row, n: lax.dynamic_slice_in_dim(row, n, self.before))(both, lengths)


class TokenShift(Tap):
    """The token before each, zeros before a document's first."""

    def __init__(self, channels: int):
        super().__init__(channels, 1)

    def mixed(self, x: jax.Array, past: list[jax.Array]) -> jax.Array:
        return past[0]


class Taps:
    """A layer's taps in one call: `taps("q", y)` passes y through the tap of that name.

    `histories` are what they leave in the cache: the ones given, and where a tap was used the ones after the call.
    """

    def __init__(self, taps: Mapping[str, Tap], context: Context, histories: dict[str, jax.Array] | None):
        self._taps, self._context, self._before = taps, context, histories
        self.histories = dict(histories or {})

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        checks.one_of("taps", "name", name, tuple(self._taps))
        tap = self._taps[name]
        if self._before is None:
            return tap(x, segment_ids=self._context.segment_ids, axis_name=self._context.axis_name)
        self.histories[name] = tap.next_history(x, self._before[name], self._context.lengths)
        return tap(x, history=self._before[name])
