"""The forms of a recurrence over batch, heads and time: `step`, `scan` (the reference) and `chunk` (training).

All three take the recurrence's fields as `[B, T, heads, ...]`, `reset` (None or bool `[B, T]`: a document starts here)
and the state as `[B, HV, ...]`, and return the final state and the outputs `[B, T, HV, ...]`. They compute in float32,
or float64 when an input is float64. `scale` multiplies the field q.

The backward pass of `chunk` keeps only the inputs and the states that enter each chunk. It recomputes the factors of
all chunks at once, runs the adjoint state scan from right to left, and pulls back through `prepare` once.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from .recurrence import Recurrence, step as _step
from .typing import Inputs, State


def compute_dtype(xs: Inputs) -> jnp.dtype:
    """float64 if any input is float64, else float32: states and cumulated decays are never narrower."""
    return jnp.dtype(jnp.float64 if any(x.dtype == jnp.float64 for x in xs.values()) else jnp.float32)


def length(recurrence: Recurrence, xs: Inputs) -> int:
    """T of the record's fields."""
    return xs[next(iter(recurrence.fields))].shape[1]


def _groups(recurrence: Recurrence, xs: Inputs) -> int:
    """n = HV / H, with the heads of every field on axis 2."""
    heads = {recurrence.head_letter(name): xs[name].shape[2] for name in recurrence.fields if xs[name].ndim > 2}
    return heads["HV"] // heads["H"] if {"H", "HV"} <= heads.keys() else 1


def over_heads(recurrence: Recurrence, n: int, fn: Callable, kinds: str) -> Callable:
    """Map a one-head `fn` over `[B]`, `[B, H]` or `[B, H, n]`; the letters of `kinds` name its arguments.

    x: a dictionary of fields and parameters; r: per token of the batch, shared by heads (resets); s: states, factors,
    outputs.
    """

    def axes(fields, shared):
        return tuple({"x": fields, "r": shared, "s": 0}[kind] for kind in kinds)

    if recurrence.has_heads:
        owners = {name: recurrence.head_letter(name) for name in (*recurrence.fields, *recurrence.parameters)}
        if n > 1:
            fn = jax.vmap(fn, axes({name: 0 if owner == "HV" else None for name, owner in owners.items()}, None))
        fn = jax.vmap(fn, axes({name: 0 if owner else None for name, owner in owners.items()}, None))
    return jax.vmap(fn, axes(_token_axes(recurrence), 0))


def _token_axes(recurrence: Recurrence) -> dict[str, int | None]:
    """The leading axis of fields, none for parameters: for mapping over the batch or the chunks."""
    return {**dict.fromkeys(recurrence.fields, 0), **dict.fromkeys(recurrence.parameters)}


def _split_groups(recurrence: Recurrence, n: int, name: str, x: jax.Array, axis: int) -> jax.Array:
    """HV heads on `axis` -> `[H, n]`, for the fields that value heads own."""
    if n == 1 or recurrence.head_letter(name) != "HV":
        return x
    return x.reshape(*x.shape[:axis], x.shape[axis] // n, n, *x.shape[axis + 1 :])


def _group_state(recurrence: Recurrence, n: int, state: State) -> State:
    if n == 1 or not recurrence.has_heads:
        return state
    return jax.tree.map(lambda s: s.reshape(s.shape[0], s.shape[1] // n, n, *s.shape[2:]), state)


def _merge_heads(recurrence: Recurrence, n: int, tree, axis: int):
    """`[H, n]` on `axis` -> HV."""
    if n == 1 or not recurrence.has_heads:
        return tree
    return jax.tree.map(lambda s: s.reshape(*s.shape[:axis], s.shape[axis] * n, *s.shape[axis + 2 :]), tree)


def _tokens_first(recurrence: Recurrence, n: int, xs: Inputs) -> tuple[Inputs, Inputs]:
    """Fields `[B, T, heads, ...]` -> `[T, B, H, (n,) ...]`, and the parameters."""
    tokens = {name: _split_groups(recurrence, n, name, jnp.moveaxis(xs[name], 1, 0), 2) for name in recurrence.fields}
    return tokens, _parameters(recurrence, n, xs)


def _parameters(recurrence: Recurrence, n: int, xs: Inputs) -> Inputs:
    return {name: _split_groups(recurrence, n, name, xs[name], 0) for name in recurrence.parameters}


def _computed(xs: Inputs, scale: float | None) -> Inputs:
    """The fields in the dtype of computation; queries are scaled after the cast, so bfloat16 ones lose nothing."""
    dtype = compute_dtype(xs)
    xs = {name: x.astype(dtype) for name, x in xs.items()}
    return xs if scale is None else {**xs, "q": xs["q"] * scale}


def zero_state(recurrence: Recurrence, xs: Inputs) -> State:
    """The zero state `[B, HV, ...]` for these inputs, in the dtype of computation."""
    n = _groups(recurrence, xs)
    tokens, parameters = _tokens_first(recurrence, n, _computed(xs, None))
    first = {name: x[0] for name, x in tokens.items()} | parameters
    return _merge_heads(recurrence, n, over_heads(recurrence, n, recurrence.init_state, "x")(first), 1)


def scan(
    recurrence: Recurrence, scale: float | None, xs: Inputs, reset: jax.Array | None, state: State
) -> tuple[State, jax.Array]:
    """Token by token: the reference of every other form."""
    n, out_dtype = _groups(recurrence, xs), xs[recurrence.output_field].dtype
    tokens, parameters = _tokens_first(recurrence, n, _computed(xs, scale))
    keep = None if reset is None else jnp.moveaxis(~reset, 1, 0)

    def body(state, token):
        x, keep_t = token[0] | parameters, token[1]
        if keep_t is None:
            return over_heads(recurrence, n, lambda x, s: _step(recurrence, x, None, s), "xs")(x, state)
        return over_heads(recurrence, n, functools.partial(_step, recurrence), "xrs")(x, keep_t, state)

    state, o = lax.scan(body, _group_state(recurrence, n, state), (tokens, keep))
    o = jnp.moveaxis(_merge_heads(recurrence, n, o, 2), 0, 1)
    return _merge_heads(recurrence, n, state, 1), o.astype(out_dtype)


def step(recurrence: Recurrence, scale: float | None, x: Inputs, state: State) -> tuple[State, jax.Array]:
    """One token of every sequence and head: the fields as `[B, heads, ...]`."""
    state, o = scan(recurrence, scale, {name: a[:, None] for name, a in x.items()}, None, state)
    return state, o[:, 0]


def _chunks_first(recurrence: Recurrence, n: int, chunk_size: int, xs: Inputs) -> Inputs:
    """`[B, T, heads, ...]` -> `[N, B, H, (n,) C, ...]`, padded at the end by zeros, which are identity tokens."""
    chunked = {}
    for name in recurrence.fields:
        x = _pad_time(xs[name], chunk_size)
        x = x.reshape(x.shape[0], -1, chunk_size, *x.shape[2:])  # [B, N, C, heads, ...]
        x = _split_groups(recurrence, n, name, jnp.moveaxis(x, 0, 1), 3)  # [N, B, C, H, (n,) ...]
        chunked[name] = jnp.moveaxis(x, 2, 2 + _head_axes(recurrence, n, name))
    return chunked | _parameters(recurrence, n, xs)


def _head_axes(recurrence: Recurrence, n: int, name: str) -> int:
    return {"H": 1, "HV": 2 if n > 1 else 1, None: 0}[recurrence.head_letter(name)]


def _tokens_back(recurrence: Recurrence, n: int, heads: int, tokens: int, x: jax.Array) -> jax.Array:
    """The inverse of `_chunks_first` for an array with `heads` head axes."""
    x = jnp.moveaxis(x, 2 + heads, 2)  # [N, B, C, H, (n,) ...]
    if heads == 2:
        x = x.reshape(*x.shape[:3], x.shape[3] * n, *x.shape[5:])
    x = jnp.moveaxis(x, 1, 0)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :tokens]


def _pad_time(x: jax.Array, multiple: int) -> jax.Array:
    missing = -x.shape[1] % multiple
    return jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2)) if missing else x


def _keep_chunks(reset: jax.Array | None, chunk_size: int) -> jax.Array | None:
    """`[B, T]` resets -> `[N, B, C]`, True where the token continues its document."""
    if reset is None:
        return None
    reset = _pad_time(reset, chunk_size)
    return jnp.moveaxis(~reset.reshape(reset.shape[0], -1, chunk_size), 0, 1)


class _Mapped:
    """A recurrence's chunk form mapped over batch and heads; `_all` over the chunks too."""

    def __init__(self, recurrence: Recurrence, n: int, keep: jax.Array | None, mild: bool):
        prepare, advance, readout = recurrence.chunk_form(mild)
        self.advance = over_heads(recurrence, n, advance, "ss")
        self.advance_all = jax.vmap(self.advance)
        self.readout_all = jax.vmap(over_heads(recurrence, n, readout, "sss"))
        if keep is None:
            mapped = over_heads(recurrence, n, lambda x: prepare(x, None), "x")
            self.prepare_all = jax.vmap(mapped, (_token_axes(recurrence),))
        else:
            mapped = jax.vmap(over_heads(recurrence, n, prepare, "xr"), (_token_axes(recurrence), 0))
            self.prepare_all = lambda x: mapped(x, keep)


def _forward(recurrence, n, mild, x, keep, state):
    form = _Mapped(recurrence, n, keep, mild)
    factors = form.prepare_all(x)

    def body(state, factors_c):
        new, extra = form.advance(factors_c, state)
        return new, (state, extra)

    state, (entries, extras) = lax.scan(body, state, factors)
    return state, form.readout_all(factors, entries, extras), entries


def _backward(recurrence, n, mild, x, keep, entries, d_state, d_o):
    form = _Mapped(recurrence, n, keep, mild)
    factors, pull_prepare = jax.vjp(form.prepare_all, x)
    extras = form.advance_all(factors, entries)[1]
    _, pull_readout = jax.vjp(form.readout_all, factors, entries, extras)
    d_factors, d_entries, d_extras = pull_readout(d_o)

    def body(d_state, chunk):
        factors_c, entry, d_entry, d_extra = chunk
        _, pull = jax.vjp(form.advance, factors_c, entry)
        d_factors_c, d_before = pull((d_state, d_extra))
        return jax.tree.map(jnp.add, d_before, d_entry), d_factors_c

    d_state, d_through = lax.scan(body, d_state, (factors, entries, d_entries, d_extras), reverse=True)
    return pull_prepare(jax.tree.map(jnp.add, d_factors, d_through))[0], d_state


def _by_gates(recurrence: Recurrence, x: Inputs, run: Callable):
    """`run(mild)`, with `mild` decided by the values of the gates where the recurrence has a cheaper form for them."""
    if recurrence.mild is None:
        return run(False)
    return lax.cond(recurrence.mild(x), lambda: run(True), lambda: run(False))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def chunk(
    recurrence: Recurrence,
    scale: float | None,
    chunk_size: int,
    xs: Inputs,
    reset: jax.Array | None,
    state: State,
) -> tuple[State, jax.Array]:
    """Chunk-parallel: everything inside a chunk for all chunks at once, the state carried over them by a scan."""
    return _chunk_forward(recurrence, scale, chunk_size, xs, reset, state)[0]


def _chunk_forward(recurrence, scale, chunk_size, xs, reset, state):
    n, out_dtype = _groups(recurrence, xs), xs[recurrence.output_field].dtype
    x = _chunks_first(recurrence, n, chunk_size, _computed(xs, scale))
    keep = _keep_chunks(reset, chunk_size)
    state = _group_state(recurrence, n, state)
    final, o, entries = _by_gates(recurrence, x, lambda mild: _forward(recurrence, n, mild, x, keep, state))
    heads = _head_axes(recurrence, n, recurrence.output_field)
    o = _tokens_back(recurrence, n, heads, length(recurrence, xs), o).astype(out_dtype)
    return (_merge_heads(recurrence, n, final, 1), o), (xs, reset, entries)


def _chunk_backward(recurrence, scale, chunk_size, residuals, cotangents):
    xs, reset, entries = residuals
    d_state, d_o = cotangents
    n = _groups(recurrence, xs)
    x = _chunks_first(recurrence, n, chunk_size, _computed(xs, scale))
    keep = _keep_chunks(reset, chunk_size)
    field = recurrence.output_field
    d_o = _chunks_first(recurrence, n, chunk_size, {**xs, field: d_o.astype(compute_dtype(xs))})[field]
    d_state = _group_state(recurrence, n, d_state)
    d_x, d_state = _by_gates(recurrence, x, lambda mild: _backward(recurrence, n, mild, x, keep, entries, d_state, d_o))
    if scale is not None:
        d_x = {**d_x, "q": d_x["q"] * scale}
    d_xs = {
        name: d.reshape(xs[name].shape)
        if name in recurrence.parameters
        else _tokens_back(recurrence, n, _head_axes(recurrence, n, name), length(recurrence, xs), d)
        for name, d in d_x.items()
    }
    d_xs = {name: d.astype(xs[name].dtype) for name, d in d_xs.items()}
    return d_xs, None, _merge_heads(recurrence, n, d_state, 1)


chunk.defvjp(_chunk_forward, _chunk_backward)
