"""RWKV-7: S_t = diag(exp g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,  o_t = q_t S_t.

A transition that is diagonal plus low rank; a reads the state before it decays. RWKV-7 has a = -kappa and
b = kappa * eta, with |kappa| = 1 its removal key and eta in (0, 1) its rates; keeping the transition from growing is
the caller's. q is its receptance r, g the natural log of its decay w, <= 0. scale is 1 by default.

Chunk form, with G the cumulated g, G' the one of the token before, and R_t = a_t^T S_{t-1} what a token reads:

    A_ab = (a_i · b_j) exp(G'_i - G_j) and A_ak likewise, j < i;  A_qb = (q_i · b_j) exp(G_i - G_j) and A_qk, j <= i
    X = (I - A_ab)^-1,  W = X (A exp G'),  R = W S_0 + X A_ak V
    O = (Q exp G) S_0 + A_qb R + A_qk V,   S_C = exp(G_C) S_0 + (B exp(G_C - G))^T R + (K exp(G_C - G))^T V

Source: Peng et al. 2025 (RWKV-7), arXiv:2503.14456, the evolution of its weighted key value state.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..core.arguments import CHANNEL_DECAYS, KEYS, QUERIES, VALUES, Argument, rate, unit
from ..core.monoid import DENSE, Affine
from ..core.operator import Operator
from ..core.recurrence import Recurrence
from ..core.typing import Inputs
from . import _decay, _diagonal, _scalar
from ._products import columns, product
from ._triangular import unit_lower_solve


class Factors(NamedTuple):
    reads: jax.Array  # [2C, K] of the entering state: W, and the queries, decayed from the chunk's entry
    own_reads: jax.Array  # X A_ak V [C, V] what a reads of the chunk's values
    decay: jax.Array  # [K, 1] what is left of the entering state
    writes: jax.Array  # [K, 2C] keys and b, decayed until the chunk's exit
    v: jax.Array  # [C, V]
    scores: jax.Array  # [C, 2C] of queries on keys and on b


def _element(x: Inputs) -> Affine:
    transition = jnp.diag(jnp.exp(x["g"])) + x["b"][:, None] * x["a"][None, :]
    return Affine(transition, x["k"][:, None] * x["v"][None, :])


def _update(x: Inputs, state: jax.Array) -> jax.Array:
    read, written = x["a"] @ state, x["k"][:, None] * x["v"][None, :]
    return jnp.exp(x["g"])[:, None] * state + x["b"][:, None] * read[None, :] + written


def _prepare(decayed: _diagonal.DecayedScores, x: Inputs, keep: jax.Array | None) -> Factors:
    docs = _decay.documents(keep)
    scores, decays = decayed([x["q"], _diagonal.one_earlier(x["a"])], [x["k"], x["b"]], x["g"])
    qk, qb = (_decay.causal(s, docs) for s in scores[0])
    ak, ab = (_decay.causal(_diagonal.one_later(s), docs, strict=True) for s in scores[1])

    reads = _decay.entering(x["a"] * _diagonal.one_later(decays.since_entry, first=1), docs)
    state_reads, own_reads = unit_lower_solve(-ab, (None, reads), (None, product(ak, x["v"])))
    reads = jnp.concatenate([state_reads, _decay.entering(decays.reads[0], docs)])
    decay, until_exit = _diagonal.at_exit(decays, docs)
    writes = columns(jnp.concatenate([x["k"] * until_exit, x["b"] * until_exit]))
    return Factors(reads, own_reads, decay, writes, x["v"], jnp.concatenate([qk, qb], axis=1))


def _advance(factors: Factors, state: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    read, queried = jnp.split(product(factors.reads, state), 2)
    written = jnp.concatenate([factors.v, factors.own_reads + read])
    return factors.decay * state + product(factors.writes, written), (written, queried)


def _readout(factors: Factors, seen: tuple[jax.Array, jax.Array]) -> jax.Array:
    written, queried = seen
    return queried + product(factors.scores, written)


DIAGONAL_PLUS_LOW_RANK = Recurrence(
    name="diagonal_plus_low_rank",
    fields={"q": "H K", "k": "H K", "v": "HV V", "g": "HV K", "a": "HV K", "b": "HV K"},
    element=_element,
    output=_scalar.output,
    monoid=DENSE,
    init_state=_scalar.init_state,
    update=_update,
    **_diagonal.by_gates(_prepare),
    advance=_advance,
    readout=_readout,
)


def _removal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Vectors shorter than one, as kappa * eta."""
    directions, rates = jax.random.split(key)
    return unit(directions, shape) * rate(rates, shape)


rwkv7 = Operator(
    name="rwkv7",
    recurrence=DIAGONAL_PLUS_LOW_RANK,
    arguments={
        "q": QUERIES,
        "k": KEYS,
        "v": VALUES,
        "g": CHANNEL_DECAYS,
        "a": Argument("B T HV K", unit),
        "b": Argument("B T HV K", _removal),
    },
    about=__doc__,
    default_scale=1.0,
    cpu_chunk_size=32,
)
