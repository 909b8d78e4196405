"""Mamba: h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,  y_t = h_t C_t + D u_t, with N states for each of D channels.

dt > 0 is the step after bias and softplus, A < 0 is -exp(A_log). dt, B and C say how u is taken in and read out, and
may be computed from u's stream or from any other of the same length (TrackSSM's Flow-SSM: from the flow feature, with
the state handed from layer to layer). The decay has no axis that a query and a key could share, so there is no matrix
form; the chunks' states [C, D, N] exist one chunk at a time.

Source: Gu & Dao 2023, arXiv:2312.00752, eq. 2a and algorithm 2 (B discretised as dt B).
"""

import jax
import jax.numpy as jnp

from ..core.arguments import Argument, step_size
from ..core.operator import Operator
from ._skip import skip
from ._vector import SELECTIVE


def _rates(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """-1, -2, ..., -N for every channel, Mamba's initial A."""
    return jnp.broadcast_to(-jnp.arange(1.0, shape[-1] + 1), shape)


mamba = Operator(
    name="mamba",
    recurrence=SELECTIVE,
    arguments={
        "u": Argument("B T D"),
        "dt": Argument("B T D", step_size),
        "A": Argument("D N", _rates),
        "B": Argument("B T N"),
        "C": Argument("B T N"),
        "D": Argument("D", optional=True),
    },
    about=__doc__,
    lower=lambda xs: {name: x for name, x in xs.items() if name != "D"},
    finish=lambda y, xs: skip(y, xs.get("D"), xs["u"]),
    scaled=False,
    queries=("C",),
    state="[B, D, N]",
)
