"""Family: the delta rule. S_t = (I - k_t e_t^T) diag(exp g_t) S_{t-1} + k_t w_t^T,  o_t = q_t S_t.

The state decays first, then what e reads of it is taken away, then w is written. With one rate per token e = beta k and
w = beta v; with gates per channel e = b * k and w = w * v. With A_ij = (e_i · k_j) exp(G_i - G_j) for j < i, a chunk is

    X = (I + A)^-1,  U = X V_w,  W = X (E exp G)      what the tokens would write, and what they read of S_0
    D = U - W S_0                                     the values that they do write
    O = (Q exp G) S_0 + A_qk D,   S_C = exp(G_C) S_0 + (K exp(G_C - G))^T D

Derivations: docs/design/derivations/delta_family.md, and way_back.md for the adjoint.
Source: Yang et al. 2024, arXiv:2406.06484, section 3 (WY representation); with decays arXiv:2412.06464.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..core.monoid import DENSE, Affine
from ..core.recurrence import Adjoint, Recurrence
from ..core.typing import Inputs
from . import _decay, _diagonal, _scalar
from ._products import columns, gram, inner, product
from ._triangular import unit_lower_solve


class Factors(NamedTuple):
    reads: jax.Array  # [2C, K] what reads the entering state: W, then the queries
    since_entry: jax.Array  # [C, 1] scales what the queries read: the decay, where all channels share it, else 1
    scores: jax.Array  # [C, C] of queries on keys, decayed, causal
    decay: jax.Array  # [1, 1] or [K, 1] what decays leave of the entering state
    writes: jax.Array  # [K, C] keys, decayed until the chunk's exit
    values: jax.Array  # U [C, V]


def _erased_written(x: Inputs) -> tuple[jax.Array, jax.Array]:
    """The vectors e and w of a token, or of all tokens of a chunk."""
    if "beta" in x:
        beta = x["beta"][..., None]
        return beta * x["k"], beta * x["v"]
    return x["b"] * x["k"], x["w"] * x["v"]


def element(x: Inputs) -> Affine:
    (e, w), k = _erased_written(x), x["k"]
    decay = jnp.exp(x["g"]) if "g" in x else jnp.ones((), k.dtype)
    transition = jnp.diag(jnp.broadcast_to(decay, k.shape)) - k[:, None] * (e * decay)[None, :]
    return Affine(transition, k[:, None] * w[None, :])


def update(x: Inputs, state: jax.Array) -> jax.Array:
    """The state after one token, without building the token's transition [K, K]."""
    e, w = _erased_written(x)
    if "g" in x:
        state = jnp.exp(x["g"])[..., None] * state
    return state + x["k"][:, None] * (w - e @ state)[None, :]


def _prepare_undecayed(x: Inputs, keep: jax.Array | None) -> Factors:
    one, docs = jnp.ones(x["beta"].shape, x["beta"].dtype), _decay.documents(keep)
    pairs = _decay.causal_pairs(one.shape[0], docs).astype(one.dtype)
    return _per_head(x, pairs, one, one, docs)


def _prepare_scalar(x: Inputs, keep: jax.Array | None) -> Factors:
    d, docs = _decay.per_head(x["g"]), _decay.documents(keep)
    return _per_head(x, d.pairs(docs), d.since_entry, d.until_exit, docs)


def _per_head(x: Inputs, pairs: jax.Array, since_entry: jax.Array, until_exit: jax.Array, docs) -> Factors:
    """Decays that all channels share, and beta, scale columns of the inverse, which are shorter than keys."""
    since_entry, until_exit = _decay.entering(since_entry, docs), _decay.leaving(until_exit, docs)
    scores = inner(x["q"], x["k"]) * pairs
    strict = jnp.tril(gram(x["k"]) * (x["beta"][:, None] * pairs), -1)
    values, erased = unit_lower_solve(strict, (x["beta"], x["v"]), (x["beta"] * since_entry, x["k"]))
    reads, writes = jnp.concatenate([erased, x["q"]]), columns(x["k"] * until_exit[:, None])
    return Factors(reads, since_entry[:, None], scores, since_entry[-1:, None], writes, values)


def _prepare_channels(x: Inputs, keep: jax.Array | None, mild: jax.Array) -> Factors:
    """Decays per channel. A rate per token scales columns of the inverse, gates per channel scale keys and values."""
    docs, rate = _decay.documents(keep), x.get("beta")
    erase, w = (x["k"], x["v"]) if "beta" in x else _erased_written(x)
    d = _diagonal.decayed(mild, [x["q"], erase], [x["k"]], x["g"])
    (scores,), (strict,) = d.scores
    strict = jnp.tril(strict if rate is None else rate[:, None] * strict, -1)
    queries, erased = (_decay.entering(r, docs) for r in d.reads)
    values, erased = unit_lower_solve(_decay.within(strict, docs), (rate, w), (rate, erased))
    reads, one = jnp.concatenate([erased, queries]), jnp.ones_like(x["g"][:, :1])
    writes = columns(_decay.leaving(d.writes[0], docs))
    return Factors(reads, one, _decay.within(scores, docs), _diagonal.decay_to_exit(d, docs), writes, values)


def advance(factors: Factors, state: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """W and the queries read the state in one product. So it is loaded once, and `readout` does not need it."""
    read, queried = jnp.split(product(factors.reads, state), 2)
    written = factors.values - read
    return factors.decay * state + product(factors.writes, written), (written, queried)


def readout(factors: Factors, seen: tuple[jax.Array, jax.Array]) -> jax.Array:
    written, queried = seen
    return factors.since_entry * queried + product(factors.scores, written)


def _ready(factors: Factors) -> tuple[jax.Array, ...]:
    return factors.decay, columns(factors.reads), columns(factors.writes)


def _retreat(ready, d_state: jax.Array, d_seen: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    decay, reads, writes = ready
    d_written, d_queried = d_seen
    d_rows = jnp.concatenate([-d_written - product(writes, d_state), d_queried])  # of what `reads` found in the state
    return decay * d_state + product(reads, d_rows), d_rows


def _gather(factors: Factors, state: jax.Array, seen, d_state: jax.Array, d_rows: jax.Array) -> Factors:
    d_decay = (d_state * state).sum(-1, keepdims=True)
    return Factors(
        reads=inner(d_rows, state),
        since_entry=jnp.zeros_like(factors.since_entry),
        scores=jnp.zeros_like(factors.scores),
        decay=d_decay if factors.decay.shape[0] > 1 else d_decay.sum(0, keepdims=True),
        writes=inner(d_state, seen[0]),
        values=-d_rows[: factors.values.shape[0]],
    )


def _delta(name: str, prepare: Callable, decide: Callable | None = None, **gates: str) -> Recurrence:
    return Recurrence(
        name=name,
        fields={"q": "H K", "k": "H K", "v": "HV V", **gates},
        element=element,
        output=_scalar.output,
        monoid=DENSE,
        init_state=_scalar.init_state,
        update=update,
        prepare=prepare,
        advance=advance,
        readout=readout,
        adjoint=Adjoint(_ready, _retreat, _gather),
        decide=decide,
        shares_heads=decide is None,
    )


DELTA = _delta("delta", _prepare_undecayed, beta="HV")
DELTA_SCALAR_DECAY = _delta("delta_scalar_decay", _prepare_scalar, g="HV", beta="HV")
DELTA_DIAGONAL_DECAY = _delta("delta_diagonal_decay", _prepare_channels, _diagonal.mild, g="HV K", beta="HV")
DELTA_CHANNEL_GATES = _delta("delta_channel_gates", _prepare_channels, _diagonal.mild, g="HV K", b="HV K", w="HV V")
