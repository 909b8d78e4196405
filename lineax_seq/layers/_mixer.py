"""What all layers over a linear recurrence share: whole sequences, prefill, steps, caches, padding, segments, shards.

A layer says what a token's arguments are (`arguments`: projections, taps, gates) and what is done with the outputs
(`output`). The state is the operator's: any tree, any initial value, and tokens of padding are those that leave it
alone.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ..core import checks
from ..core.operator import Operator
from ._config import RecurrentConfig
from ._context import Context
from ._layer import Layer, Shared
from ._parts import Parts
from ._tap import Tap, Taps


class MixerCache(NamedTuple):
    """What a mixer remembers, whatever the number of tokens so far."""

    taps: dict[str, jax.Array]  # by name: the last inputs [B, before, channels]
    state: Any  # the operator's, float32 (float64 in a float64 layer)


class Mixer(Layer):
    """Base of the layers over a recurrence. Subclasses give `operator`, `arguments` and `output`.

    Attributes:
        operator: the recurrence.
        kept: names that `arguments` gives beyond the operator's own, for `output` to read.
        taps: short convolutions and token shifts by name.
    """

    operator: ClassVar[Operator]
    kept: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: RecurrentConfig, parts: Parts, taps: Mapping[str, Tap] | None = None):
        super().__init__(config, parts)
        self.taps = nnx.Dict(dict(taps or {}))

    def arguments(
        self, x: jax.Array, taps: Taps, context: Context, shared: Shared
    ) -> tuple[dict[str, jax.Array], Shared]:
        """The operator's arguments by name, each with a T axis unless it is a parameter, and `shared`.

        `taps("q", y)` passes y `[B, T, channels]` through the tap of that name.
        """
        raise NotImplementedError

    def output(self, o: jax.Array, x: jax.Array, arguments: dict[str, jax.Array]) -> jax.Array:
        """The operator's outputs o `[B, T, ...]`, the layer's input x `[B, T, D]` -> `[B, T, D]`."""
        raise NotImplementedError

    def run(self, x: jax.Array, context: Context, cache: MixerCache | None, shared: Shared):
        taps = Taps(self.taps, context, None if cache is None else cache.taps)
        arguments, shared = self.arguments(x, taps, context, shared)
        given, config = self._given(arguments), self.config
        options = dict(form=config.form, chunk_size=config.chunk_size, implementation=config.implementation)
        if cache is None:
            o, _ = self.operator(**given, **options, segment_ids=context.segment_ids, axis_name=context.axis_name)
        else:
            self._check_cached(context)
            if context.valid is not None:
                given = self.operator.identity_tokens(given, context.valid)
            o, state = self.operator(**given, **options, initial_state=cache.state)
            cache = MixerCache(taps.histories, state)
        return self.output(o, x, arguments), cache, shared

    def run_token(self, x_t: jax.Array, cache: MixerCache, shared: Shared):
        x, context = x_t[:, None], Context()
        taps = Taps(self.taps, context, cache.taps)
        arguments, shared = self.arguments(x, taps, context, shared)
        token = {
            name: a[:, 0] if self.operator.arguments[name].per_token else a
            for name, a in self._given(arguments).items()
        }
        o, state = self.operator.step(**token, state=cache.state)
        return self.output(o[:, None], x, arguments)[:, 0], MixerCache(taps.histories, state), shared

    def init_cache(self, batch: int, max_length: int, dtype=None) -> MixerCache:
        """A cache that has seen nothing, of the same size for any `max_length`; `dtype` is the taps'."""
        self._check_cache_size(batch, max_length)
        taps = {name: tap.init_history(batch, dtype or self.dtype) for name, tap in self.taps.items()}
        sizes, wide = self.config.sizes(self.d_model), jnp.promote_types(self.dtype, jnp.float32)
        return MixerCache(taps, self.operator.init_state(B=batch, dtype=wide, **sizes))

    def _given(self, arguments: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The operator's own of what `arguments` gave."""
        names = self.operator.arguments
        for name in arguments:
            checks.one_of(f"{type(self).__name__}.arguments", "a name", name, (*names, *self.kept))
        return {name: a for name, a in arguments.items() if name in names}
