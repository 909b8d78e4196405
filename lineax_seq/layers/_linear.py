"""What all layers over a linear recurrence share: whole sequences, prefill and step, with one cache.

A layer says what a token is (`tokens`: projections, convolutions, gates) and what is done with the outputs (`output`).
Padding on the right is made of identity steps: zero keys, values, log-decays and write strengths leave any of these
states as they are.
"""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ..core.operator import Operator
from ._check import check_lengths, check_positive, check_tokens
from ._conv import ShortConv


class RecurrentCache(NamedTuple):
    """What a linear layer remembers, whatever the number of tokens so far."""

    conv: tuple[jax.Array, ...]  # [B, width - 1, channels] per short convolution: its last inputs
    state: Any  # of the recurrence, float32 (float64 in a float64 layer)


class LinearLayer(nnx.Module):
    """Base of the layers over a recurrence. Subclasses give `recurrence`, `tokens`, `output` and `state_shape`."""

    recurrence: ClassVar[Operator]

    def __init__(self, d_model: int, *, form: str, chunk_size: int | None, implementation: str | None, dtype):
        self.d_model, self.dtype = d_model, dtype
        self.form, self.chunk_size, self.implementation = form, chunk_size, implementation

    def tokens(self, x: jax.Array, convolve) -> tuple[jax.Array, ...]:
        """The recurrence's arguments, queries first. `convolve(n, y)` passes y through the n-th short convolution."""
        raise NotImplementedError

    def output(self, o: jax.Array, x: jax.Array) -> jax.Array:
        """o `[B, T, HV, V]` and the layer's input x `[B, T, D]` -> `[B, T, D]`."""
        raise NotImplementedError

    def state_shape(self, batch: int) -> tuple[int, ...]:
        raise NotImplementedError

    def convolutions(self) -> tuple[ShortConv, ...]:
        return ()

    def _run(self, *args, **options):
        return self.recurrence(
            *args, form=self.form, chunk_size=self.chunk_size, implementation=self.implementation, **options
        )

    def __call__(self, x: jax.Array, *, segment_ids=None, positions=None, axis_name: str | None = None) -> jax.Array:
        """Whole sequences: `[B, T, D] -> [B, T, D]`.

        Args:
            segment_ids: int [B, T]; state and convolutions start anew where the id changes.
            positions: checked and of no effect: the order of the tokens is all that a recurrence knows.
            axis_name: a mesh axis that T is split over, inside `jax.shard_map`.
        """
        check_tokens(type(self).__name__, x, self.d_model, segment_ids, positions)
        convolutions = self.convolutions()
        along = dict(segment_ids=segment_ids, axis_name=axis_name)
        args = self.tokens(x, lambda n, y: convolutions[n](y, **along))
        o, _ = self._run(*args, **along)
        return self.output(o, x)

    def init_cache(self, batch: int, max_length: int, dtype=None) -> RecurrentCache:
        """An empty cache, of the same size for any `max_length`; `dtype` is the convolutions' (None: the layer's)."""
        check_positive(f"{type(self).__name__}.init_cache", batch=batch, max_length=max_length)
        conv = tuple(c.init_history(batch, dtype or self.dtype) for c in self.convolutions())
        return RecurrentCache(conv, jnp.zeros(self.state_shape(batch), jnp.promote_types(self.dtype, jnp.float32)))

    def prefill(self, x: jax.Array, cache: RecurrentCache, *, lengths=None) -> tuple[jax.Array, RecurrentCache]:
        """x `[B, T, D]` after what the cache holds; of each row only the first `lengths [B]` tokens count."""
        caller = f"{type(self).__name__}.prefill"
        check_tokens(caller, x, self.d_model)
        check_lengths(caller, lengths, x.shape[0])
        args, conv = self._tokens_after(x, cache, lengths)
        if lengths is not None:
            real = jnp.arange(x.shape[1]) < lengths[:, None]
            q, *rest = args
            args = (q, *(jnp.where(real.reshape(*real.shape, *[1] * (a.ndim - 2)), a, 0) for a in rest))
        o, state = self._run(*args, initial_state=cache.state)
        return self.output(o, x), RecurrentCache(conv, state)

    def step(self, x_t: jax.Array, cache: RecurrentCache) -> tuple[jax.Array, RecurrentCache]:
        """One token x_t `[B, D]`, one token further: `(y_t [B, D], cache)`."""
        x = x_t[:, None]
        check_tokens(f"{type(self).__name__}.step", x, self.d_model)
        args, conv = self._tokens_after(x, cache, None)
        o, state = self.recurrence.step(*(a[:, 0] for a in args), state=cache.state)
        return self.output(o[:, None], x)[:, 0], RecurrentCache(conv, state)

    def _tokens_after(self, x, cache: RecurrentCache, lengths):
        convolutions, after = self.convolutions(), list(cache.conv)

        def convolve(n, y):
            after[n] = convolutions[n].next_history(y, cache.conv[n], lengths)
            return convolutions[n](y, history=cache.conv[n])

        args = self.tokens(x, convolve)
        return args, tuple(after)
