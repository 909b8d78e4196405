"""Normalised linear attention: o_t = q_t S_t / (q_t z_t),  S_t = S_{t-1} + k_t v_t^T,  z_t = z_{t-1} + k_t.

A weighted mean of the values with weights q_t · k_j. Feature maps are the caller's and must leave q, k >= 0, which
nothing checks: with signs the denominator can vanish. 1e-12 is added to it. A scale of q cancels, so there is none.
`causal=False` reads every token of the document. The state is the pair (S, z).

Source: Katharopoulos et al. 2020, arXiv:2006.16236, eq. 9-12; T2R arXiv:2103.13076; Hedgehog arXiv:2402.04347.
"""

import jax
import jax.numpy as jnp

from ..arguments import VALUES, Argument
from ..layout import compute_dtype
from ..operator import Operator
from ._bidirectional import everywhere
from ._normalised import NORMALISED, _quotient
from ._scalar import NO_DECAY


def _features(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Hedgehog's: a softmax over each half of the channels."""
    x = jax.random.normal(key, (*shape[:-1], -(-shape[-1] // 2)))
    return jnp.concatenate([jax.nn.softmax(x), jax.nn.softmax(-x)], axis=-1)[..., : shape[-1]]
