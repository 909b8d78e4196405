"""State space duality (Mamba-2): S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T,  y_t = C_t S_t + D x_t.

Mamba-2's names for scalar-decay linear attention: q = C, k = B, v = dt x, g = dt A. dt > 0 is the step after softplus
and bias, A < 0 is -exp(A_log), both per value head; the H heads of B and C are Mamba-2's groups. There is no scale.

Source: Dao & Gu 2024, arXiv:2405.21060, eq. 1 with a scalar times the identity for A (section 5).
"""

import jax

from ..core.arguments import Argument, step_size
from ..core.layout import compute_dtype
from ..core.operator import Operator
from ._scalar import SCALAR_DECAY
from ._skip import skip


def _negative(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return -jax.random.uniform(key, shape, minval=1.0, maxval=16.0)


def _lower(xs: dict) -> dict:
    dtype = compute_dtype(xs)
    dt = xs["dt"].astype(dtype)
    return {
        "q": xs["C"],
        "k": xs["B"],
        "v": xs["x"].astype(dtype) * dt[..., None],
        "g": dt * xs["A"].astype(dtype),
    }


def _finish(o: jax.Array, xs: dict) -> jax.Array:
    return skip(o, xs["D"][:, None] if "D" in xs else None, xs["x"])


ssd = Operator(
    name="ssd",
    recurrence=SCALAR_DECAY,
    arguments={
        "x": Argument("B T HV V"),
        "dt": Argument("B T HV", step_size),
        "A": Argument("HV", _negative),
        "B": Argument("B T H K"),
        "C": Argument("B T H K"),
        "D": Argument("HV", optional=True),
    },
    about=__doc__,
    lower=_lower,
    finish=_finish,
    scaled=False,
    queries=("C",),
)
