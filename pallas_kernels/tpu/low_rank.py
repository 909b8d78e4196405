"""Kernels of a diagonal plus low-rank transition: S_t = diag(exp g_t) S_{t-1} + b_t (a_t S_{t-1}) + k_t v_t^T.

`a` reads the state before it decays: as a query it stands one token earlier, where pairs of tokens are as in
`_channels`. With F the sums of g up to a token, F' up to the one before, R those after it, A_ak and A_ab the pairs
j < i of a with k and b under exp(F'_i - F_j), A_qk and A_qb the pairs j <= i of q under exp(F_i - F_j):

    X = (I - A_ab)^-1,  U = X (A_ak V + (A exp F') S_0),  O = A_qk V + A_qb U + (Q exp F) S_0
    S_C = exp(F_C) S_0 + (B exp R)^T U + (K exp R)^T V

Backward (X is saved, U computed again):

    dU = A_qb^T dO + (B exp R) dS,  L = X^T dU,  dA_ab = L U^T,  dA_ak = L V^T,  d(A exp F') = L S_0^T
    dV = A_qk^T dO + A_ak^T L + (K exp R) dS,  dS_0 = exp(F_C) dS + (Q exp F)^T dO + (A exp F')^T L
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from . import _channels, _triangular
from ._chunk import Chunk
from ._family import Family

SCRATCH = {"qk": "C C", "qb": "C C", "ak": "C C", "reads": "C K", "own": "C K", "writes": "C K", "returns": "C K"}


class Parts(NamedTuple):
    """A head's chunk without its values and its state."""

    qk: jax.Array  # [C, C] and so the others
    qb: jax.Array
    ak: jax.Array
    reads: jax.Array  # Q exp F [C, K]
    own: jax.Array  # A exp F' [C, K]
    writes: jax.Array  # K exp R [C, K]
    returns: jax.Array  # B exp R [C, K]
    total: jax.Array  # exp(F_C) [1, K]


def _later(x: jax.Array, first: jax.Array | float = 0.0) -> jax.Array:
    """Every row one token later; `first [1, D]` comes in."""
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row == 0, first, pltpu.roll(x, 1, 0))


def _earlier(x: jax.Array) -> jax.Array:
    """Every row one token earlier; zeros come in."""
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row == x.shape[0] - 1, 0, pltpu.roll(x, x.shape[0] - 1, 0))


def _inputs(chunk: Chunk, x: dict) -> tuple[list, list, jax.Array]:
    """Queries, keys, g; `a` one token earlier."""
    q, a, k, b, g = (x[name].astype(jnp.float32) for name in "qakbg")
    return [q * chunk.scale, _earlier(a)], [k, b], g


def _parts(chunk: Chunk, x: dict) -> tuple[Parts, jax.Array, Any]:
    """With A_ab `[C, C]` and what the backward pass needs."""
    queries, keys, g = _inputs(chunk, x)
    decays = _channels.decays(g)
    ((qk, qb), (ak, ab)), (reads, own), (writes, returns), total, tape = _channels.forward(chunk, decays, queries, keys)
    qk, qb = (jnp.where(chunk.causal, scores, 0) for scores in (qk, qb))
    ak, ab = (jnp.where(chunk.strict, _later(scores), 0) for scores in (ak, ab))
    reads, own = chunk.from_entry(reads), chunk.from_entry(_later(own, x["a"][:1].astype(jnp.float32)))
    writes, returns, total = chunk.to_exit(writes), chunk.to_exit(returns), chunk.from_entry_to_exit(total)
    return Parts(qk, qb, ak, reads, own, writes, returns, total), ab, (queries, keys, g, decays, tape)


def _prepare(chunk: Chunk, inputs, heads: int, scratch: dict) -> None:
    for head in range(heads):
        parts, ab, _ = _parts(chunk, inputs(head))
        for name, value in parts._asdict().items():
            scratch[name][head] = value.astype(scratch[name].dtype)
        scratch["strict"][head, : chunk.size, : chunk.size] = -ab
    _triangular.invert(chunk, scratch, heads)


def _rest(chunk: Chunk, x: dict, parts: Parts, state: jax.Array) -> jax.Array:
    """A_ak V + (A exp F') S_0."""
    return chunk.dot(parts.ak, x["v"]) + chunk.dot_t(parts.own, state)


def _forward(chunk: Chunk, x: dict, state: jax.Array, scratch: dict):
    """One head: `(o [C, V], state^T [V, K], X)`."""
    inverse = scratch["inverse"][: chunk.size, : chunk.size]
    parts = Parts(**{name: scratch[name][...] for name in (*SCRATCH, "total")})
    entered, rest = state, _rest(chunk, x, parts, state)
    yield
    read = chunk.fine_dot(inverse, rest)
    yield
    state = parts.total * state + chunk.t_dot(x["v"], parts.writes) + chunk.fine_t_dot(read, parts.returns)
    o = chunk.dot_t(parts.reads, entered) + chunk.dot(parts.qk, x["v"]) + chunk.dot(parts.qb, read)
    return o, state, {"inverse": inverse}


def _backward(chunk: Chunk, x: dict, state: jax.Array, saved: dict, d_o: jax.Array, d_state: jax.Array):
    """One head: the gradients of its inputs and of `state^T`, which entered the chunk."""
    parts, _, (queries, keys, g, decays, tape) = _parts(chunk, x)
    rest = _rest(chunk, x, parts, state)
    yield
    read = chunk.dot(saved["inverse"], rest)
    d_read = chunk.t_dot(parts.qb, d_o) + chunk.dot_t(parts.returns, d_state)
    yield
    lam = chunk.t_dot(saved["inverse"], d_read)
    yield
    below, v = chunk.i >= chunk.j, x["v"]
    pairs = lambda d, y: chunk.within(jnp.where(below, chunk.dot_t(d, y), chunk.dot_t(y, d)))  # noqa: E731
    ahead = _earlier(lam)
    d_scores = [[pairs(d_o, v), pairs(d_o, read)], [pairs(ahead, v), pairs(ahead, read)]]
    d_reads, d_own = chunk.from_entry(chunk.dot(d_o, state)), chunk.from_entry(chunk.dot(lam, state))
    d_writes, d_returns = chunk.to_exit(chunk.dot(v, d_state)), chunk.to_exit(chunk.dot(read, d_state))
    d_total = parts.total * (state.astype(jnp.float32) * d_state).sum(0, keepdims=True)
    (d_q, d_a), (d_k, d_b), d_g = _channels.backward(
        chunk, decays, g, queries, keys, tape, d_scores, [d_reads, _earlier(d_own)], [d_writes, d_returns], d_total
    )
    d_v = chunk.t_dot(parts.qk, d_o) + chunk.t_dot(parts.ak, lam) + chunk.dot_t(parts.writes, d_state)
    grads = {"q": d_q * chunk.scale, "k": d_k, "v": d_v, "g": d_g, "a": _later(d_a, d_own[:1]), "b": d_b}
    entry = chunk.t_dot(d_o, parts.reads) + chunk.t_dot(lam, parts.own)
    return grads, parts.total * d_state + entry


def _reading_nothing(fields: dict, reset: jax.Array) -> dict:
    """A token that starts a document reads nothing: pairs one token earlier are then of one document too."""
    return {**fields, "a": jnp.where(reset[:, :, None, None], 0, fields["a"])}


DIAGONAL_PLUS_LOW_RANK = Family(
    "diagonal_plus_low_rank",
    {"q": "H K", "k": "H K", "v": "HV V", "g": "HV K", "a": "HV K", "b": "HV K"},
    _forward,
    _backward,
    saves={"inverse": "C C"},
    turns=4,  # of eight, float32 would fill the vector memory
    prepare=_prepare,
    scratch={name: (tuple(shape.split()), False) for name, shape in SCRATCH.items()}
    | {"total": ((1, "K"), True)}
    | _triangular.SCRATCH,
    at_starts=_reading_nothing,
)
