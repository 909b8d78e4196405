"""Gated DeltaProduct: every token decays the state once and takes NH steps of the delta rule.

    S = exp(g_t) S_{t-1};  S = (I - beta_i k_i k_i^T) S + beta_i k_i v_i^T for i = 1..NH;  S_t = S;  o_t = q_t S_t

With |k| = 1 and beta in (0, 2) a step's eigenvalue along its key is in (-1, 1); beta = 2 reflects, and products of
reflections are the rotations and permutations that follow a finite group's state. g [B, T, HV] is the natural log of
the decay, <= 0; None is no decay. Internally a token is NH micro-steps in a row, and `chunk_size` counts those.

Source: Siems et al. 2025 (DeltaProduct), arXiv:2502.10297, section 3; the gate as in arXiv:2412.06464.
"""

import jax
import jax.numpy as jnp

from ..core.arguments import HEAD_DECAYS, QUERIES, VALUES, Argument, unit, wide_rate
from ..core.operator import Operator
from ._delta import DELTA_SCALAR_DECAY


def _lower(xs: dict) -> dict:
    """The decay falls on a token's first micro-step, its query on the last."""
    batch, length, steps = xs["k"].shape[:3]
    micro = lambda x: x.reshape(batch, length * steps, *x.shape[3:])  # noqa: E731
    only = lambda x, before, after: micro(  # noqa: E731
        jnp.pad(x[:, :, None], [(0, 0), (0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2))
    )
    g = xs["g"] if "g" in xs else jnp.zeros(xs["beta"][:, :, 0].shape, xs["beta"].dtype)
    return {name: micro(xs[name]) for name in ("k", "v", "beta")} | {
        "q": only(xs["q"], steps - 1, 0),
        "g": only(g, 0, steps - 1),
    }


def _finish(o: jax.Array, xs: dict) -> jax.Array:
    batch, length, steps = xs["k"].shape[:3]
    return o.reshape(batch, length, steps, *o.shape[2:])[:, :, -1]


gated_delta_product = Operator(
    name="gated_delta_product",
    recurrence=DELTA_SCALAR_DECAY,
    arguments={
        "q": QUERIES,
        "k": Argument("B T NH H K", unit),
        "v": VALUES._replace(dims="B T NH HV V"),
        "g": HEAD_DECAYS._replace(optional=True),
        "beta": Argument("B T NH HV", wide_rate),
    },
    about=__doc__,
    cpu_chunk_size=32,
    lower=_lower,
    finish=_finish,
)
