"""The order of axes: between the callers' arrays `[B, T, HV, ...]` and the functions of one head.

The chunk form works on `[N, B, H, (n,) C, ...]`. Chunks come first, so that a scan slices them. HV heads are split into
the H key heads and the n value heads of each, so that what queries and keys give is computed once for all n; for n = 1
there is no such axis.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .recurrence import Form, Recurrence
from .typing import Inputs, State


def compute_dtype(xs: Inputs) -> jnp.dtype:
    """float64 if any input is float64, else float32: states and cumulated decays are never narrower."""
    return jnp.dtype(jnp.float64 if any(x.dtype == jnp.float64 for x in xs.values()) else jnp.float32)


def pad_time(x: jax.Array, length: int, value: float = 0) -> jax.Array:
    """`[B, T, ...]` -> `[B, length, ...]`, padded with a field's value of a token that leaves the state alone."""
    missing, rest = length - x.shape[1], ((0, 0),) * (x.ndim - 2)
    return jnp.pad(x, ((0, 0), (0, missing), *rest), constant_values=value) if missing else x


@dataclasses.dataclass(frozen=True)
class Layout:
    """The axes of one call, and the ways between their orders.

    Attributes:
        recurrence: the record whose functions are mapped over them.
        dtype: of computation.
        batch, length: B and T, which may be symbolic dimensions.
        n: value heads for each key head.
    """

    recurrence: Recurrence
    dtype: jnp.dtype
    batch: Any
    length: Any
    n: int

    @classmethod
    def of(cls, recurrence: Recurrence, xs: Inputs) -> "Layout":
        """The layout of fields `[B, T, heads, ...]` and parameters `[heads, ...]`."""
        batch, length = xs[next(iter(recurrence.fields))].shape[:2]
        heads = {recurrence.head_letter(name): xs[name].shape[2] for name in recurrence.fields if xs[name].ndim > 2}
        n = heads["HV"] // heads["H"] if {"H", "HV"} <= heads.keys() else 1
        return cls(recurrence, compute_dtype(xs), batch, length, n)

    # ---- mapping a one-head function

    def over_heads(self, fn: Callable, kinds: str) -> Callable:
        """`fn` of one head, mapped over `[B]`, `[B, H]` or `[B, H, n]`.

        `kinds` has a letter for each argument of `fn`: x for a dictionary of fields and parameters, r for what all
        heads share (resets), s for what every head has (states, factors, outputs).
        """

        def axes(fields, shared):
            return tuple({"x": fields, "r": shared, "s": 0}[kind] for kind in kinds)

        names = (*self.recurrence.fields, *self.recurrence.parameters)
        owners = {name: self.recurrence.head_letter(name) for name in names}
        if self.recurrence.has_heads:
            if self.n > 1:
                fn = jax.vmap(fn, axes({name: 0 if owner == "HV" else None for name, owner in owners.items()}, None))
            fn = jax.vmap(fn, axes({name: 0 if owner else None for name, owner in owners.items()}, None))
        return jax.vmap(fn, axes(self.token_axes, 0))

    @property
    def token_axes(self) -> dict[str, int | None]:
        """0 for fields and None for parameters: the axis that a map over batch or chunks takes of each."""
        return {**dict.fromkeys(self.recurrence.fields, 0), **dict.fromkeys(self.recurrence.parameters)}

    # ---- inputs

    def computed(self, xs: Inputs, scale: float | None) -> Inputs:
        """The inputs in the dtype of computation. Queries are scaled after the cast, so that bfloat16 loses nothing."""
        xs = {name: x.astype(self.dtype) for name, x in xs.items()}
        return xs if scale is None else {**xs, "q": xs["q"] * scale}

    def parameters(self, xs: Inputs) -> Inputs:
        return {name: self._split(name, xs[name], 0) for name in self.recurrence.parameters}

    def tokens_first(self, xs: Inputs) -> Inputs:
        """Fields `[B, T, heads, ...]` -> `[T, B, H, (n,) ...]`."""
        return {name: self._split(name, jnp.moveaxis(xs[name], 1, 0), 2) for name in self.recurrence.fields}

    def chunks_first(self, name: str, x: jax.Array, chunk_size: int) -> jax.Array:
        """A field `[B, N·C, heads, ...]` -> `[N, B, H, (n,) C, ...]`."""
        x = x.reshape(x.shape[0], -1, chunk_size, *x.shape[2:])  # [B, N, C, heads, ...]
        x = self._split(name, jnp.moveaxis(x, 0, 1), 3)  # [N, B, C, H, (n,) ...]
        return jnp.moveaxis(x, 2, 2 + self._head_axes(name))

    def time_back(self, name: str, x: jax.Array) -> jax.Array:
        """The inverse of `chunks_first`."""
        x = jnp.moveaxis(x, 2 + self._head_axes(name), 2)  # [N, B, C, H, (n,) ...]
        if self._head_axes(name) == 2:
            x = x.reshape(*x.shape[:3], x.shape[3] * x.shape[4], *x.shape[5:])
        x = jnp.moveaxis(x, 1, 0)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    def _head_axes(self, name: str) -> int:
        return {"H": 1, "HV": 2 if self.n > 1 else 1, None: 0}[self.recurrence.head_letter(name)]

    def _split(self, name: str, x: jax.Array, axis: int) -> jax.Array:
        """`x` with the HV heads on `axis` split into `[H, n]`, if the field or parameter has value heads."""
        if self.n == 1 or self.recurrence.head_letter(name) != "HV":
            return x
        return x.reshape(*x.shape[:axis], x.shape[axis] // self.n, self.n, *x.shape[axis + 1 :])

    # ---- states

    def group_state(self, state: State) -> State:
        """`[B, HV, ...]` -> `[B, H, (n,) ...]`."""
        if self.n == 1 or not self.recurrence.has_heads:
            return state
        return jax.tree.map(lambda s: s.reshape(s.shape[0], s.shape[1] // self.n, self.n, *s.shape[2:]), state)

    def merge_heads(self, tree, axis: int = 1):
        """`[H, n]` on `axis` -> HV."""
        if self.n == 1 or not self.recurrence.has_heads:
            return tree
        merge = lambda s: s.reshape(*s.shape[:axis], s.shape[axis] * self.n, *s.shape[axis + 2 :])  # noqa: E731
        return jax.tree.map(merge, tree)

    def zero_state(self, xs: Inputs) -> State:
        """The state `[B, HV, ...]` of a recurrence that has seen nothing."""
        xs = self.computed(xs, None)
        first = {name: x[0] for name, x in self.tokens_first(xs).items()} | self.parameters(xs)
        return self.merge_heads(self.over_heads(self.recurrence.init_state, "x")(first))


class MappedForm(NamedTuple):
    """The functions of a form, mapped over batch and heads. Those whose names end in `_all` are mapped over the chunks
    of a group as well. The last three are the record's `Adjoint`, None where it has none.
    """

    prepare_all: Callable
    advance: Callable
    advance_all: Callable
    readout_all: Callable
    walks_tokens: bool
    ready_all: Callable | None = None
    retreat: Callable | None = None
    gather_all: Callable | None = None

    @classmethod
    def of(cls, layout: Layout, form: Form, keep: jax.Array | None) -> "MappedForm":
        """The functions of `form`; `keep [N, B, C]` is False where documents start, None where there is one."""
        advance, readout = (layout.over_heads(fn, "ss") for fn in (form.advance, form.readout))
        if keep is None:
            prepare_all = jax.vmap(layout.over_heads(lambda x: form.prepare(x, None), "x"), (layout.token_axes,))
        else:
            prepare = jax.vmap(layout.over_heads(form.prepare, "xr"), (layout.token_axes, 0))
            prepare_all = lambda x: prepare(x, keep)  # noqa: E731
        mapped = cls(prepare_all, advance, jax.vmap(advance), jax.vmap(readout), form.walks_tokens)
        if (adjoint := layout.recurrence.adjoint) is None:
            return mapped
        ready, retreat, gather = (layout.over_heads(fn, "s" * n) for fn, n in zip(adjoint, (1, 3, 5), strict=True))
        return mapped._replace(ready_all=jax.vmap(ready), retreat=retreat, gather_all=jax.vmap(gather))
