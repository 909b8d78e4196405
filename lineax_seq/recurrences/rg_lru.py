"""RG-LRU: h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t),  log a_t = -8 r_t softplus(Lambda), elementwise.

r and i are the recurrence gate and the input gate after their sigmoids. Lambda is the parameter of the decays, shared
by all tokens. The first token of a document has no past that its input must make room for, so its multiplier is 1 in
place of the square root. The first token of a call is such a token unless `initial_state` is given: any state, even
zeros, says that the document began earlier.

The derivative of the square root is bounded by 1000, because it is infinite at a_t = 1.

Source: De et al. 2024 (Griffin), arXiv:2402.19427, eq. 1-4 (our softplus(Lambda) is their -log a).
"""

import jax
import jax.numpy as jnp

from ..core.arguments import Argument, rate
from ..core.layout import compute_dtype
from ..core.operator import Operator
from ._vector import VECTOR_DECAY

LOG_DECAY_SCALE = -8.0
LARGEST_DERIVATIVE = 1000.0


@jax.custom_jvp
def _bounded_sqrt(x: jax.Array) -> jax.Array:
    return jnp.sqrt(x)


@_bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals, tangents):
    root = jnp.sqrt(primals[0])
    return root, tangents[0] / jnp.maximum(2 * root, 1 / LARGEST_DERIVATIVE)


def _decays(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Griffin's initial Lambda: a with r = 1 is uniform in [0.9, 0.999]."""
    a = jax.random.uniform(key, shape, minval=0.9, maxval=0.999)
    return jnp.log(jnp.expm1(jnp.log(a) / LOG_DECAY_SCALE))


def _lower(xs: dict) -> dict:
    start = xs["position"][..., None] == 0
    xs = {name: xs[name] for name in ("x", "r", "i", "Lambda")}
    dtype = compute_dtype(xs)
    x, r, i, Lambda = (value.astype(dtype) for value in xs.values())
    g = LOG_DECAY_SCALE * r * jax.nn.softplus(Lambda)
    multiplier = jnp.where(start, 1, _bounded_sqrt(-jnp.expm1(2 * g)))
    return {"x": multiplier * (i * x), "g": g}


rg_lru = Operator(
    name="rg_lru",
    recurrence=VECTOR_DECAY,
    arguments={
        "x": Argument("B T D"),
        "r": Argument("B T D", rate),
        "i": Argument("B T D", rate),
        "Lambda": Argument("D", _decays),
    },
    about=__doc__,
    lower=_lower,
    finish=lambda o, xs: o.astype(xs["x"].dtype),
    scaled=False,
    seen=lambda state: 0 if state is None else 1,  # only whether a token is its document's first matters here
    state="[B, D]",
)
