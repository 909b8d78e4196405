"""Linear attention: S_t = S_{t-1} + k_t v_t^T,  o_t = q_t S_t.

Feature maps of q and k are the caller's; there is no denominator. `causal=False` reads every token of the document.

Source: Katharopoulos et al. 2020, arXiv:2006.16236, eq. 9-12 without the normaliser; Qin et al. 2022, arXiv:2210.10340
(NormAttention).
"""

import jax.numpy as jnp

from .. import forms
from ..arguments import KEYS, QUERIES, VALUES
from ..layout import compute_dtype
from ..operator import Operator
from ._scalar import NO_DECAY


def _bidirectional(scale, xs, reset, state):
    """o_t = q_t (S_0 + sum_j k_j v_j^T) over all tokens of t's document; S_0 belongs to the first one."""
    if reset is not None:
        return _bidirectional_packed(scale, xs, reset, state)
    dtype = compute_dtype(xs)
    q, k, v = (xs[name].astype(dtype) for name in "qkv")
    batch, length, heads, _ = q.shape
    grouped = v.reshape(batch, length, heads, v.shape[2] // heads, -1)
    state = state.reshape(batch, heads, grouped.shape[3], *state.shape[2:])
    state = state + jnp.einsum("bthk,bthnv->bhnkv", k, grouped)
    o = jnp.einsum("bthk,bhnkv->bthnv", q * scale, state).reshape(v.shape)
    return state.reshape(batch, -1, *state.shape[3:]), o.astype(xs["v"].dtype)


def _bidirectional_packed(scale, xs, reset, state):
    """The past by the recurrence, the future by the recurrence run backwards, and the token itself counted once."""
    size = min(64, 1 << (xs["q"].shape[1] - 1).bit_length())
    final, past = forms.chunk(NO_DECAY, scale, size, xs, reset, state)
    # reversed in time, a document starts where the next one began
    backwards = {name: jnp.flip(x, 1) for name, x in xs.items()}
    starts = jnp.flip(jnp.pad(reset[:, 1:], ((0, 0), (0, 1))), 1)
    starts = starts.at[:, 0].set(False)
    future = jnp.flip(forms.chunk(NO_DECAY, scale, size, backwards, starts, jnp.zeros_like(state))[1], 1)
    n = xs["v"].shape[2] // xs["q"].shape[2]
    weight = jnp.repeat((xs["q"] * xs["k"]).sum(-1) * scale, n, axis=2)[..., None]
    return final, (past + future - weight * xs["v"]).astype(xs["v"].dtype)


linear_attention = Operator(
    name="linear_attention",
    recurrence=NO_DECAY,
    arguments={"q": QUERIES, "k": KEYS, "v": VALUES},
    about=__doc__,
    bidirectional=_bidirectional,
)
