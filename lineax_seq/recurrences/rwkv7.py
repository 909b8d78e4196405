"""RWKV-7: S_t = diag(exp g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,  o_t = q_t S_t.

The transition is diagonal plus low rank, and a reads the state before it decays. In RWKV-7's terms a = -kappa and
b = kappa * eta, with |kappa| = 1 the removal key and eta in (0, 1) its rates; q is the receptance r, and g <= 0 the
natural log of the decay w. The caller must choose a and b so that the transition does not grow. scale is 1 by default.

Source: Peng et al. 2025 (RWKV-7), arXiv:2503.14456, the evolution of its weighted key value state.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..core.arguments import CHANNEL_DECAYS, KEYS, QUERIES, VALUES, Argument, rate, unit
from ..core.monoid import DENSE, Affine
from ..core.operator import Operator
from ..core.recurrence import Adjoint, Recurrence
from ..core.typing import Inputs
from . import _decay, _diagonal, _scalar
from ._products import columns, inner, product
from ._triangular import unit_lower_solve


class Factors(NamedTuple):
    """What a chunk gives without the state; docs/design/derivations/delta_family.md derives it and names W, X, A."""

    reads: jax.Array  # [2C, K] what reads the entering state: W, then the queries, decayed from the chunk's entry
    own_reads: jax.Array  # X A_ak V [C, V] what a reads of the chunk's values
    decay: jax.Array  # [K, 1] what the chunk leaves of the entering state
    writes: jax.Array  # [K, 2C] keys and b, decayed until the chunk's exit
    v: jax.Array  # [C, V]
    scores: jax.Array  # [C, 2C] of queries on keys and on b


def _element(x: Inputs) -> Affine:
    transition = jnp.diag(jnp.exp(x["g"])) + x["b"][:, None] * x["a"][None, :]
    return Affine(transition, x["k"][:, None] * x["v"][None, :])


def _update(x: Inputs, state: jax.Array) -> jax.Array:
    read, written = x["a"] @ state, x["k"][:, None] * x["v"][None, :]
    return jnp.exp(x["g"])[:, None] * state + x["b"][:, None] * read[None, :] + written


def _prepare(x: Inputs, keep: jax.Array | None, mild: jax.Array) -> Factors:
    docs, a = _decay.documents(keep), x["a"]
    d = _diagonal.decayed(mild, [x["q"], _diagonal.one_earlier(a)], [x["k"], x["b"]], x["g"])
    qk, qb = (_decay.within(s, docs) for s in d.scores[0])
    ak, ab = (_decay.within(_diagonal.one_later(s), docs) for s in d.scores[1])

    reads = _decay.entering(_diagonal.one_later(d.reads[1], first=a[:1]), docs)
    state_reads, own_reads = unit_lower_solve(-ab, (None, reads), (None, product(ak, x["v"])))
    reads = jnp.concatenate([state_reads, _decay.entering(d.reads[0], docs)])
    writes = columns(jnp.concatenate([_decay.leaving(w, docs) for w in d.writes]))
    decay = _diagonal.decay_to_exit(d, docs)
    return Factors(reads, own_reads, decay, writes, x["v"], jnp.concatenate([qk, qb], axis=1))


def _advance(factors: Factors, state: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    read, queried = jnp.split(product(factors.reads, state), 2)
    written = jnp.concatenate([factors.v, factors.own_reads + read])
    return factors.decay * state + product(factors.writes, written), (written, queried)


def _readout(factors: Factors, seen: tuple[jax.Array, jax.Array]) -> jax.Array:
    written, queried = seen
    return queried + product(factors.scores, written)


def _ready(factors: Factors) -> tuple[jax.Array, ...]:
    return factors.decay, columns(factors.reads), columns(factors.writes)


def _retreat(ready, d_state: jax.Array, d_seen: tuple[jax.Array, jax.Array]):
    decay, reads, writes = ready
    d_written, d_queried = d_seen
    d_written += product(writes, d_state)
    d_rows = jnp.concatenate([jnp.split(d_written, 2)[1], d_queried])  # of what `reads` found in the state
    return decay * d_state + product(reads, d_rows), (d_written, d_rows)


def _gather(factors: Factors, state: jax.Array, seen, d_state: jax.Array, kept) -> Factors:
    d_written, d_rows = kept
    d_v, d_own_reads = jnp.split(d_written, 2)
    return Factors(
        reads=inner(d_rows, state),
        own_reads=d_own_reads,
        decay=(d_state * state).sum(-1, keepdims=True),
        writes=inner(d_state, seen[0]),
        v=d_v,
        scores=jnp.zeros_like(factors.scores),
    )


DIAGONAL_PLUS_LOW_RANK = Recurrence(
    name="diagonal_plus_low_rank",
    fields={"q": "H K", "k": "H K", "v": "HV V", "g": "HV K", "a": "HV K", "b": "HV K"},
    element=_element,
    output=_scalar.output,
    monoid=DENSE,
    init_state=_scalar.init_state,
    update=_update,
    prepare=_prepare,
    decide=_diagonal.mild,
    shares_heads=False,
    advance=_advance,
    readout=_readout,
    adjoint=Adjoint(_ready, _retreat, _gather),
)


def _removal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Vectors shorter than 1, as kappa * eta is."""
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
