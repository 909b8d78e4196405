"""HGRN-2: S_t = diag(exp g_t) S_{t-1} + (1 - exp g_t) v_t^T,  o_t = q_t S_t.

Gated linear attention whose keys are what its forget gates let go of: k = 1 - exp g. g is the natural log of the decay
of each key channel, <= 0, and belongs to the key heads. A layer's lower bound of the decay is part of g.

Source: Qin et al. 2024, arXiv:2404.07904, section 3 (our exp g is their forget gate).
"""

import jax
import jax.numpy as jnp

from ..core.arguments import QUERIES, VALUES, Argument, log_decay
from ..core.layout import compute_dtype
from ..core.operator import Operator
from ._diagonal import DIAGONAL_DECAY


@jax.custom_jvp
def _released(g: jax.Array) -> jax.Array:
    """1 - exp g, also where it is as small as g and the subtraction would round it away.

    The derivative is written out as -exp g. jax 0.10 computes it from 1 + expm1 g, which rounds away what a closed gate
    leaves.
    """
    return -jnp.expm1(g)


_released.defjvps(lambda dg, released, g: -jnp.exp(g) * dg)


def _lower(xs: dict) -> dict:
    g = xs["g"].astype(compute_dtype(xs))
    return {**xs, "k": _released(g), "g": jnp.repeat(g, xs["v"].shape[2] // g.shape[2], axis=2)}


hgrn2 = Operator(
    name="hgrn2",
    recurrence=DIAGONAL_DECAY,
    arguments={"q": QUERIES, "v": VALUES, "g": Argument("B T H K", log_decay)},
    about=__doc__,
    lower=_lower,
)
