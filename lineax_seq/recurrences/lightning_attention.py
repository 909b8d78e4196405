"""Lightning attention: S_t = exp(-s_h) S_{t-1} + k_t v_t^T,  o_t = q_t S_t.

One fixed decay per value head, given by its slope s_h >= 0. Slopes differ between models (`alibi_slopes` scaled by
depth in TransNormerLLM, other formulas elsewhere): take a checkpoint's own. Feature maps of q and k are the caller's.

Source: Qin et al. 2024 (Lightning Attention-2), arXiv:2401.04658, section 3 (our exp(-s) is their lambda).
"""

import math

import jax
import jax.numpy as jnp

from ..core.arguments import KEYS, QUERIES, VALUES, Argument
from ..core.layout import compute_dtype
from ..core.operator import Operator
from ._bidirectional import both_ways
from ._scalar import SCALAR_DECAY


def alibi_slopes(heads: int) -> jax.Array:
    """`[heads]` float32: 2^(-8 (h+1) / heads) if `heads` is a power of two. Otherwise those of the next lower power of
    two, followed by as many as are missing of every second one of the next higher power, from its first on.

    Source: Press et al. 2021 (ALiBi), arXiv:2108.12409, section 3.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    slopes += [2.0 ** (-4 * (2 * h + 1) / power) for h in range(heads - power)]
    return jnp.asarray(slopes, jnp.float32)


def _lower(xs: dict) -> dict:
    xs = dict(xs)
    g = -xs.pop("slopes").astype(compute_dtype(xs))
    return {**xs, "g": jnp.broadcast_to(g, xs["v"].shape[:3])}


lightning_attention = Operator(
    name="lightning_attention",
    zero_is_identity=False,  # a token of zeros still decays the state
    recurrence=SCALAR_DECAY,
    arguments={
        "q": QUERIES,
        "k": KEYS,
        "v": VALUES,
        "slopes": Argument("HV", lambda key, shape: alibi_slopes(math.prod(shape))),
    },
    about=__doc__,
    lower=_lower,
    bidirectional=both_ways(SCALAR_DECAY),
    takes_blocks=True,
)
