"""Normalised linear attention: o_t = q_t S_t / (q_t · z_t),  S_t = S_{t-1} + k_t v_t^T,  z_t = z_{t-1} + k_t.

A mean of the values with weights q_t · k_j. Feature maps are the caller's and must leave q, k >= 0, which nothing
checks: with signs the denominator can vanish. 1e-12 is added to it. A scale of q would cancel, so there is none.
The state is the pair (S, z).

Source: Katharopoulos et al. 2020, arXiv:2006.16236, eq. 9-12; T2R arXiv:2103.13076; Hedgehog arXiv:2402.04347.
"""

import jax
import jax.numpy as jnp

from ..core.arguments import VALUES, Argument
from ..core.layout import compute_dtype
from ..core.operator import Operator
from . import _normalised
from ._bidirectional import undecayed


def _features(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Hedgehog's: a softmax over each half of the channels."""
    x = jax.random.normal(key, (*shape[:-1], -(-shape[-1] // 2)))
    return jnp.concatenate([jax.nn.softmax(x), jax.nn.softmax(-x)], axis=-1)[..., : shape[-1]]


def _bidirectional(target, scale, chunk_size, xs, reset, state, blocks):
    """Linear attention of the values and of a column of ones: numerators and denominators."""
    v = xs["v"].astype(compute_dtype(xs))
    both = {**xs, "v": jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)}
    state = jnp.concatenate([state[0], state[1][..., None]], axis=-1)
    state, sums = undecayed(target, scale, chunk_size, both, reset, state, blocks)
    o = _normalised.quotient(sums[..., :-1], sums[..., -1])
    return (state[..., :-1], state[..., -1]), o.astype(xs["v"].dtype)


normalized_linear_attention = Operator(
    name="normalized_linear_attention",
    recurrence=_normalised.NORMALISED,
    arguments={"q": Argument("B T H K", _features), "k": Argument("B T H K", _features), "v": VALUES},
    about=__doc__,
    scaled=False,
    bidirectional=_bidirectional,
    order_free=True,
    takes_blocks=True,
    state="(S [B, HV, K, V], z [B, HV, K])",
)
