"""RWKV-6: o_t = q_t (S_{t-1} + diag(u) k_t v_t^T),  S_t = diag(exp g_t) S_{t-1} + k_t v_t^T.

A query reads the state before its token, and the token itself through the bonus u per key channel instead. q is
RWKV's receptance r, g the natural log of its decay w, <= 0 (-exp of the low-rank projection). scale is 1 by default.

Source: Peng et al. 2024 (Eagle and Finch), arXiv:2404.05892, the WKV recurrence of Finch.
"""

import jax
import jax.numpy as jnp

from ..core.arguments import CHANNEL_DECAYS, KEYS, QUERIES, VALUES, Argument
from ..core.monoid import DECAY
from ..core.operator import Operator
from ..core.recurrence import Recurrence
from ..core.typing import Inputs
from . import _decay, _diagonal, _scalar


def _output(x: Inputs, state: jax.Array, previous: jax.Array) -> jax.Array:
    return x["q"] @ previous + (x["q"] * x["u"] * x["k"]).sum() * x["v"]


def _prepare(x: Inputs, keep: jax.Array | None, mild: jax.Array) -> _diagonal.Factors:
    docs, q = _decay.documents(keep), x["q"]
    d = _diagonal.decayed(mild, [_diagonal.one_earlier(q)], [x["k"]], x["g"])
    bonus = jnp.diag((q * x["u"] * x["k"]).sum(-1))
    scores = _decay.within(_diagonal.one_later(d.scores[0][0]), docs) + bonus
    return _diagonal.factors(_diagonal.one_later(d.reads[0], first=q[:1]), scores, x["v"], d, docs)


DIAGONAL_DECAY_BONUS = Recurrence(
    name="diagonal_decay_bonus",
    fields={"q": "H K", "k": "H K", "v": "HV V", "g": "HV K"},
    parameters={"u": "H K"},
    element=_diagonal.element,
    output=_output,
    monoid=DECAY,
    init_state=_scalar.init_state,
    prepare=_prepare,
    decide=_diagonal.mild,
    shares_heads=False,
    advance=_scalar.advance,
    readout=_diagonal.readout,
)

rwkv6 = Operator(
    name="rwkv6",
    recurrence=DIAGONAL_DECAY_BONUS,
    arguments={"q": QUERIES, "k": KEYS, "v": VALUES, "g": CHANNEL_DECAYS, "u": Argument("H K")},
    about=__doc__,
    default_scale=1.0,
)
