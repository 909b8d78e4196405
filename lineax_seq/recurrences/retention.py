"""Retention: S_t = gamma_h S_{t-1} + k_t v_t^T,  o_t = q_t S_t,  gamma_h = 1 - 2^(-5-h) for head h = 0..HV-1.

Source: Sun et al. 2023 (RetNet), arXiv:2307.08621, eq. 5-7 and the decays of section 3.
"""

import jax
import jax.numpy as jnp

from ..core.arguments import KEYS, QUERIES, VALUES
from ..core.layout import compute_dtype
from ..core.operator import Operator
from ._bidirectional import both_ways
from ._scalar import SCALAR_DECAY


def log_decays(heads: int, dtype=jnp.float32, first: jax.Array | int = 0) -> jax.Array:
    """`[heads]`: log(1 - 2^(-5-h)) for h = first..first+heads-1."""
    return jnp.log1p(-(2.0 ** (-5.0 - first - jnp.arange(heads, dtype=dtype))))


def _lower(xs: dict) -> dict:
    xs = dict(xs)
    first = xs.pop("first_head")
    g = log_decays(xs["v"].shape[2], compute_dtype(xs), first)
    return {**xs, "g": jnp.broadcast_to(g, xs["v"].shape[:3])}


retention = Operator(
    name="retention",
    zero_is_identity=False,  # a token of zeros still decays the state
    recurrence=SCALAR_DECAY,
    arguments={"q": QUERIES, "k": KEYS, "v": VALUES},
    about=__doc__,
    lower=_lower,
    numbers_heads=True,
    bidirectional=both_ways(SCALAR_DECAY),
    takes_blocks=True,
)
