"""Family: the delta rule. S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T,  o_t = q_t S_t.

Decay first, then erase what the key reads, then write. Chunk form (WY representation, Yang et al. 2024,
arXiv:2406.06484, section 3; with decays arXiv:2412.06464), with A_ij = beta_i (k_i · k_j) exp(G_i - G_j) for j < i:

    X = (I + A)^-1,  U = X (beta V),  W = X (beta K exp G)      what the keys would write, and what they read of S_0
    D = U - W S_0                                               the values actually written
    O = (Q exp G) S_0 + A_qk D,   S_C = exp(G_C) S_0 + (K exp(G_C - G))^T D
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..monoid import DENSE, Affine
from ..recurrence import Recurrence
from ..typing import Inputs
from . import _decay, _diagonal, _scalar
from ._triangular import unit_lower_inverse


class Factors(NamedTuple):
    reads: jax.Array  # [C, K] queries, decayed from the chunk's entry
    scores: jax.Array  # [C, C] of queries on keys, decayed, causal
    decay: jax.Array  # [1, 1] or [K, 1] what is left of the entering state, before erasing
    writes: jax.Array  # [C, K] keys, decayed until the chunk's exit
    values: jax.Array  # U [C, V]
    erased: jax.Array  # W [C, K]


def _transition(k: jax.Array, beta: jax.Array, decay: jax.Array) -> jax.Array:
    """(I - beta k k^T) diag(decay); `decay` is a scalar or `[K]`."""
    return jnp.diag(jnp.broadcast_to(decay, k.shape)) - beta * k[:, None] * (k * decay)[None, :]


def element(x: Inputs) -> Affine:
    decay = jnp.exp(x["g"]) if "g" in x else jnp.ones((), x["k"].dtype)
    return Affine(_transition(x["k"], x["beta"], decay), x["beta"] * x["k"][:, None] * x["v"][None, :])


def update(x: Inputs, state: jax.Array) -> jax.Array:
    """One token without its K x K transition: decay, read what the key holds, write the difference."""
    if "g" in x:
        state = jnp.exp(x["g"])[..., None] * state
    return state + x["k"][:, None] * (x["beta"] * (x["v"] - x["k"] @ state))[None, :]


def _factors(x: Inputs, scores, strict, since_entry, until_exit, docs) -> Factors:
    """WY factors from the scores of queries and of `beta · keys` on keys, and the decays to the chunk's ends."""
    beta = x["beta"][:, None]
    inverse = unit_lower_inverse(_decay.causal(strict, docs, strict=True))
    reads, erased, writes = x["q"] * since_entry, beta * x["k"] * since_entry, x["k"] * until_exit
    decay = since_entry[-1][:, None]
    if docs is not None:
        reads, erased = _decay.mask(reads, docs.entry), _decay.mask(erased, docs.entry)
        writes, decay = _decay.mask(writes, docs.exit), jnp.where(docs.through, decay, 0)
    return Factors(reads, _decay.causal(scores, docs), decay, writes, inverse @ (beta * x["v"]), inverse @ erased)


def _prepare_undecayed(x: Inputs, keep: jax.Array | None) -> Factors:
    one = jnp.ones((x["k"].shape[0], 1), x["k"].dtype)
    return _factors(x, x["q"] @ x["k"].T, (x["beta"][:, None] * x["k"]) @ x["k"].T, one, one, _decay.documents(keep))


def _prepare_scalar(x: Inputs, keep: jax.Array | None) -> Factors:
    pairs, sums = _decay.pair_sums(x["g"])
    decays = jnp.exp(pairs)
    strict = (x["beta"][:, None] * x["k"]) @ x["k"].T * decays
    since_entry, until_exit = jnp.exp(sums.forward)[:, None], jnp.exp(sums.backward)[:, None]
    return _factors(x, x["q"] @ x["k"].T * decays, strict, since_entry, until_exit, _decay.documents(keep))


def _prepare_diagonal(x: Inputs, keep: jax.Array | None) -> Factors:
    both = jnp.stack([x["q"], x["beta"][:, None] * x["k"]])
    (scores, strict), sums = _diagonal.decayed_scores(both, x["k"], x["g"])
    scores = scores + jnp.diag((x["q"] * x["k"]).sum(-1))
    return _factors(x, scores, strict, jnp.exp(sums.forward), jnp.exp(sums.backward), _decay.documents(keep))


def advance(factors: Factors, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    written = factors.values - factors.erased @ state
    return factors.decay * state + factors.writes.T @ written, written


def readout(factors: Factors, state: jax.Array, written: jax.Array) -> jax.Array:
    return factors.reads @ state + factors.scores @ written


def _delta(name: str, prepare, **gate: str) -> Recurrence:
    return Recurrence(
        name=name,
        fields={"q": "H K", "k": "H K", "v": "HV V", **gate, "beta": "HV"},
        element=element,
        output=_scalar.output,
        monoid=DENSE,
        init_state=_scalar.init_state,
        update=update,
        prepare=prepare,
        advance=advance,
        readout=readout,
    )


DELTA = _delta("delta", _prepare_undecayed)
DELTA_SCALAR_DECAY = _delta("delta_scalar_decay", _prepare_scalar, g="HV")
DELTA_DIAGONAL_DECAY = _delta("delta_diagonal_decay", _prepare_diagonal, g="HV K")
