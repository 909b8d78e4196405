"""Tokens that read the future too: all of their document (`causal=False`), or the rest of their block (`block_size=`).

A token reads the past by the recurrence and the future by the recurrence that runs backwards in time; it counts itself
once. Token j > i reaches token i through the decays of i..j-1, as token i reaches j through those of i+1..j. Where the
next document or the next block begins, the run backwards starts a document, so that no token reads beyond.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..core import forms
from ..core.layout import compute_dtype
from ..core.recurrence import Recurrence
from ..core.typing import Inputs
from ._scalar import NO_DECAY


def both_ways(recurrence: Recurrence) -> Callable:
    """An operator's `bidirectional` for a recurrence whose outputs are sums over tokens, `(q_i · k_j) decay v_j`."""

    def run(target, scale, chunk_size, xs: Inputs, reset, state, blocks):
        """`blocks` is None, or bool [B, T]: a block starts here, as one does with every document."""
        dtype, xs = xs["v"].dtype, {name: x.astype(compute_dtype(xs)) for name, x in xs.items()}
        final, past = forms.chunk(recurrence, target, scale, chunk_size, xs, reset, state)
        bounds = reset if blocks is None else blocks
        if bounds is not None:  # The run backwards starts a document at the last token before each border.
            bounds = jnp.flip(jnp.pad(bounds[:, 1:], ((0, 0), (0, 1))), 1)
        backwards = {name: jnp.flip(x, 1) for name, x in xs.items()}
        nothing = jax.tree.map(jnp.zeros_like, state)
        future = jnp.flip(forms.chunk(recurrence, target, scale, chunk_size, backwards, bounds, nothing)[1], 1)
        itself = (xs["q"] * xs["k"]).sum(-1) * (1 if scale is None else scale)
        itself = jnp.repeat(itself, xs["v"].shape[2] // itself.shape[2], axis=2)[..., None] * xs["v"]
        return final, (past + future - itself).astype(dtype)

    return run


def undecayed(target, scale, chunk_size, xs: Inputs, reset, state, blocks):
    """`both_ways(NO_DECAY)`. If a row is one document, one sum serves all t: o_t = q_t (S_0 + sum_j k_j v_j^T)."""
    if reset is not None or blocks is not None:
        return both_ways(NO_DECAY)(target, scale, chunk_size, xs, reset, state, blocks)
    dtype = compute_dtype(xs)
    q, k, v = (xs[name].astype(dtype) for name in "qkv")
    batch, length, heads, _ = q.shape
    grouped = v.reshape(batch, length, heads, v.shape[2] // heads, -1)
    state = state.reshape(batch, heads, grouped.shape[3], *state.shape[2:])
    state = state + jnp.einsum("bthk,bthnv->bhnkv", k, grouped)
    o = jnp.einsum("bthk,bhnkv->bthnv", q if scale is None else q * scale, state).reshape(v.shape)
    return state.reshape(batch, -1, *state.shape[3:]), o.astype(xs["v"].dtype)
