"""Family: outputs that are divided by the sum of the weights, which is part of the state.

NORMALISED   S_t = S_{t-1} + k_t v_t^T,  z_t = z_{t-1} + k_t,  o_t = q_t S_t / (q_t · z_t + eps)
STABILISED   C_t = exp f_t C_{t-1} + exp i_t k_t v_t^T,  n_t likewise with k_t,  o_t = q_t C_t / max(|q_t · n_t|, 1)

The state of STABILISED is C and n divided by exp m_t, with m_t the largest log-weight so far. That depends on the
state, which `prepare` does not know; it divides by the largest weight of the chunk's own tokens. `advance` and
`readout` then divide both by the larger of the two. All exponents are differences to a maximum, so never positive.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import bounded_quotient

from ..core.monoid import Monoid, long_sum
from ..core.recurrence import Recurrence
from ..core.typing import Inputs
from . import _decay, _scalar
from ._decay import EMPTY
from ._products import inner, outer, product

EPS = 1e-12  # prevents 0 / 0, and is nothing beside features of about 1


# ---- NORMALISED


class Sums(NamedTuple):
    reads: jax.Array  # [C, K] queries of the tokens that the entering state reaches
    intra: jax.Array  # [C, V] numerators of the chunk's own tokens
    weight: jax.Array  # [C] their denominators
    through: jax.Array  # () 1, or 0 where a document starts in the chunk
    values: jax.Array  # [K, V] what the tokens add to S
    keys: jax.Array  # [K] and to z


def _add(earlier, later):
    return jax.tree.map(jnp.add, earlier, later)


ADDITIVE = Monoid(
    _add,
    _add,
    lambda state: jax.tree.map(jnp.zeros_like, state),
    total=lambda tokens, state, start: state,
    adjoint=lambda summary, cotangent: cotangent,
)
"""Summaries that are added to the state, whatever its tree."""


def quotient(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    return numerator / (denominator[..., None] + EPS)


def _prepare_sums(x: Inputs, keep: jax.Array | None) -> Sums:
    docs = _decay.documents(keep)
    scores = _decay.causal(inner(x["q"], x["k"]), docs)
    reads, writes = _decay.entering(x["q"], docs), _decay.leaving(x["k"], docs)
    through = jnp.ones((), x["k"].dtype) if docs is None else docs.through.astype(x["k"].dtype)
    return Sums(reads, product(scores, x["v"]), scores.sum(-1), through, outer(writes, x["v"]), writes.sum(0))


def _advance_sums(factors: Sums, state):
    return (factors.through * state[0] + factors.values, factors.through * state[1] + factors.keys), None


def _readout_sums(factors: Sums, state) -> jax.Array:
    return quotient(factors.intra + product(factors.reads, state[0]), factors.weight + factors.reads @ state[1])


NORMALISED = Recurrence(
    name="normalised",
    fields={"q": "H K", "k": "H K", "v": "HV V"},
    element=lambda x: (x["k"][:, None] * x["v"][None, :], x["k"]),
    output=lambda x, state, previous: quotient(x["q"] @ state[0], x["q"] @ state[1]),
    monoid=ADDITIVE,
    init_state=lambda x: (_scalar.init_state(x), jnp.zeros_like(x["k"])),
    prepare=_prepare_sums,
    advance=_advance_sums,
    readout=_readout_sums,
)


# ---- STABILISED


class Weighted(NamedTuple):
    """The summary of STABILISED: weighted sums over the tokens, and the log-decay of what came before them."""

    log_decay: jax.Array  # ()
    log_size: jax.Array  # () the largest log-weight; `values` and `keys` are divided by its exponential
    values: jax.Array  # [K, V]
    keys: jax.Array  # [K]


class Stabilised(NamedTuple):
    q: jax.Array  # [C, K]
    intra: jax.Array  # [C, V] numerators of the chunk's own tokens, over exp(size)
    weight: jax.Array  # [C] their denominators, over exp(size)
    size: jax.Array  # [C] the largest log-weight of the chunk's tokens up to this one
    entering: jax.Array  # [C] log of what is left of the entering state
    log_decay: jax.Array  # () the same at the chunk's exit
    log_size: jax.Array  # () the largest log-weight at the chunk's exit
    values: jax.Array  # [K, V] what the tokens add to C, over exp(log_size)
    keys: jax.Array  # [K] and to n


def _add_weighted(summary: Weighted | Stabilised, state):
    """The state with a summary added. Its true value is C exp m and n exp m; m only keeps numbers in range, and is a
    constant to the gradient."""
    C, n, m = state
    largest = lax.stop_gradient(jnp.maximum(summary.log_decay + m, summary.log_size))
    old, new = jnp.exp(summary.log_decay + m - largest), jnp.exp(summary.log_size - largest)
    return old * C + new * summary.values, old * n + new * summary.keys, largest


def _combine_weighted(earlier: Weighted, later: Weighted) -> Weighted:
    C, n, m = _add_weighted(later, (earlier.values, earlier.keys, earlier.log_size))
    return Weighted(earlier.log_decay + later.log_decay, m, C, n)


def _nothing_weighted(state) -> Weighted:
    C, n, m = state
    return Weighted(jnp.zeros_like(m), jnp.full_like(m, EMPTY), jnp.zeros_like(C), jnp.zeros_like(n))


WEIGHTED = Monoid(
    _combine_weighted,
    _add_weighted,
    _nothing_weighted,
    total=lambda tokens, state, start: Weighted(long_sum(tokens.log_decay), state[2], state[0], state[1]),
)


def _prepare_weighted(x: Inputs, keep: jax.Array | None) -> Stabilised:
    f, docs = _decay.bounded(x["f"], of="weight"), _decay.documents(keep)
    logs = _decay.pair_logs(f, "weight") + x["i"][None, :]
    logs = jnp.where(_decay.causal_pairs(logs.shape[0], docs), logs, EMPTY)
    size = lax.stop_gradient(logs.max(-1))
    scores = inner(x["q"], x["k"]) * jnp.exp(logs - size[:, None])
    entering, exits = _decay.running_sum(f), _decay.until_exit(f) + x["i"]
    log_decay = entering[-1]
    if docs is not None:
        entering, exits = jnp.where(docs.entry, entering, EMPTY), jnp.where(docs.exit, exits, EMPTY)
        log_decay = jnp.where(docs.through, log_decay, EMPTY)
    log_size = lax.stop_gradient(exits.max())
    writes = x["k"] * jnp.exp(exits - log_size)[:, None]
    intra, values = product(scores, x["v"]), outer(writes, x["v"])
    return Stabilised(x["q"], intra, scores.sum(-1), size, entering, log_decay, log_size, values, writes.sum(0))


def _readout_weighted(factors: Stabilised, state) -> jax.Array:
    C, n, m = state
    largest = lax.stop_gradient(jnp.maximum(factors.size, factors.entering + m))
    own, old = jnp.exp(factors.size - largest), jnp.exp(factors.entering + m - largest)
    numerator = own[:, None] * factors.intra + old[:, None] * product(factors.q, C)
    return bounded_quotient(numerator, own * factors.weight + old * (factors.q @ n), largest)


STABILISED = Recurrence(
    name="stabilised",
    fields={"q": "H K", "k": "H K", "v": "HV V", "i": "HV", "f": "HV"},
    padding={"i": EMPTY},
    element=lambda x: Weighted(x["f"], x["i"], x["k"][:, None] * x["v"][None, :], x["k"]),
    output=lambda x, state, previous: bounded_quotient(x["q"] @ state[0], x["q"] @ state[1], state[2]),
    monoid=WEIGHTED,
    init_state=lambda x: (_scalar.init_state(x), jnp.zeros_like(x["k"]), jnp.full_like(x["f"], EMPTY)),
    prepare=_prepare_weighted,
    advance=lambda factors, state: (_add_weighted(factors, state), None),
    readout=_readout_weighted,
)
