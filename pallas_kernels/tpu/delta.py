"""Kernels of the delta rule: S_t = (I - k_t e_t^T) diag(exp g_t) S_{t-1} + k_t w_t^T,  o_t = q_t S_t.

e = beta k and w = beta v with one rate per token, or e = b * k and w * v with gates per channel; decays none, per head
or per key channel. With P_ij = (q_i . k_j) exp(g_{j+1} + ... + g_i) for j <= i, A_ij the same of e for j < i, F and R
the sums of g up to a token and after it:

    X = (I + A)^-1,  D = X (W - (E exp F) S_0),  O = (Q exp F) S_0 + P D,  S_C = exp(F_C) S_0 + (K exp R)^T D

Backward (X is saved, D computed again):

    dD = P^T dO + (K exp R) dS,  L = X^T dD = dW,  dP = dO D^T,  dA = -L D^T,  d(E exp F) = -L S_0^T
    dS_0 = exp(F_C) dS + (Q exp F)^T dO - (E exp F)^T L
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import _channels, _triangular, scalar
from ._chunk import Chunk, GateGradient
from ._family import Family


class Read(NamedTuple):
    """Vectors that read the state, `factor * (vectors @ S)`: after the product a factor per token costs no rounding."""

    vectors: jax.Array  # [C, K]
    factor: Any  # [C, 1] or a number


class Parts(NamedTuple):
    """A head's chunk without its values and its state."""

    scores: jax.Array  # P [C, C]
    strict: jax.Array  # A, before its rate per token
    reads: Read  # of the queries
    erases: Read  # of e
    writes: jax.Array  # K exp R [C, K]
    total: jax.Array  # exp(F_C), [1, 1] or [1, K]


def _f32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _values(x: dict) -> jax.Array:
    return _f32(x["w"]) * _f32(x["v"]) if "w" in x else x["beta"].col * _f32(x["v"])


def _rate(x: dict):
    return x["beta"].col if "beta" in x else 1.0


def _read(chunk: Chunk, read: Read, state: jax.Array) -> jax.Array:
    return read.factor * chunk.dot_t(read.vectors, state)


def _rest(chunk: Chunk, x: dict, erases: Read, state: jax.Array) -> jax.Array:
    """W - (E exp F) S_0."""
    return _values(x) - _read(chunk, erases, state)


class PerHead:
    """One decay per head, or none: decays multiply products of the inputs as they are."""

    scratch = {}

    @staticmethod
    def parts(chunk: Chunk, x: dict) -> tuple[Parts, Any]:
        q, k = x["q"], x["k"]
        pairs, since, left, total = scalar.factors(chunk.unscaled(), x)
        raw_scores, raw_strict = chunk.dot_t(q, k), chunk.dot_t(k, k)
        strict_pairs = jnp.where(chunk.i > chunk.j, pairs, 0)
        reads, erases = Read(q, since * chunk.scale), Read(k, since * x["beta"].col)
        parts = Parts(raw_scores * pairs * chunk.scale, raw_strict * strict_pairs, reads, erases, k * left, total)
        return parts, (pairs, strict_pairs, raw_scores, raw_strict, since, left)

    @staticmethod
    def store(scratch: dict, parts: Parts) -> None:
        """Nothing: it costs less to compute them again."""

    @staticmethod
    def load(chunk: Chunk, x: dict, scratch: dict) -> Parts:
        return PerHead.parts(chunk, x)[0]

    @staticmethod
    def backward(chunk: Chunk, x: dict, state, d_state, parts: Parts, tape, d_o, written, lam) -> dict:
        q, k, rate = x["q"], x["k"], x["beta"].col
        pairs, strict_pairs, raw_scores, raw_strict, since, left = tape
        d_scores = chunk.dot_t(d_o, written) * (pairs * chunk.scale)
        d_strict = chunk.dot_t(lam, written) * -strict_pairs  # of A without its rate, once multiplied by it
        d_rate = (d_strict * raw_strict).sum(1, keepdims=True)
        d_strict = d_strict * rate
        d_reads = parts.reads.factor * chunk.dot(d_o, state)
        erased = chunk.dot(lam, state)
        d_erases = -parts.erases.factor * erased
        d_writes = left * chunk.dot(written, d_state)
        d_k = chunk.t_dot(d_scores, q) + chunk.dot(d_strict, k) + chunk.t_dot(d_strict, k) + d_erases + d_writes
        grads = {"q": chunk.dot(d_scores, k) + d_reads, "k": d_k}
        d_rate = d_rate - since * (k * erased).sum(1, keepdims=True)
        if "until" in x:
            d_pairs = d_scores * raw_scores + d_strict * raw_strict
            d_until = d_pairs.sum(1, keepdims=True) + (q * d_reads + k * d_erases).sum(1, keepdims=True)
            d_total = parts.total * (_f32(state) * d_state).sum((0, 1), keepdims=True)
            last = chunk.j[:1] == chunk.size - 1
            grads["until"] = GateGradient(jnp.where(last, d_total, 0) - d_pairs.sum(0, keepdims=True), d_until)
            grads["after"] = GateGradient(None, (k * d_writes).sum(1, keepdims=True))
        return grads | {"beta": d_rate}


class PerChannel:
    """One decay per key channel: products of vectors that carry their decays."""

    scratch = {"scores": ("C", "C"), "reads": ("C", "K"), "erases": ("C", "K"), "writes": ("C", "K")}

    @staticmethod
    def parts(chunk: Chunk, x: dict) -> tuple[Parts, Any]:
        queries, key, g = PerChannel._inputs(chunk, x)
        decays = _channels.decays(g)
        ((scores,), (strict,)), (reads, erases), (writes,), total, tape = _channels.forward(
            chunk, decays, queries, [key]
        )
        scores, strict = jnp.where(chunk.causal, scores, 0), jnp.where(chunk.strict, strict, 0)
        reads, erases = Read(chunk.from_entry(reads), 1.0), Read(chunk.from_entry(erases), _rate(x))
        parts = Parts(scores, strict, reads, erases, chunk.to_exit(writes), chunk.from_entry_to_exit(total))
        return parts, (decays, tape)

    @staticmethod
    def _inputs(chunk: Chunk, x: dict):
        key = _f32(x["k"])
        return [_f32(x["q"]) * chunk.scale, _f32(x["b"]) * key if "b" in x else key], key, _f32(x["g"])

    @staticmethod
    def store(scratch: dict, parts: Parts) -> None:
        values = dict(scores=parts.scores, reads=parts.reads.vectors, erases=parts.erases.vectors, writes=parts.writes)
        for name, value in values.items():
            scratch[name][...] = value.astype(scratch[name].dtype)
        scratch["total"][...] = parts.total

    @staticmethod
    def load(chunk: Chunk, x: dict, scratch: dict) -> Parts:
        got = {name: scratch[name][...] for name in (*PerChannel.scratch, "total")}
        reads, erases = Read(got["reads"], 1.0), Read(got["erases"], _rate(x))
        return Parts(got["scores"], got["scores"], reads, erases, got["writes"], got["total"])

    @staticmethod
    def backward(chunk: Chunk, x: dict, state, d_state, parts: Parts, tape, d_o, written, lam) -> dict:
        queries, key, g = PerChannel._inputs(chunk, x)
        decays, tape = tape
        below = chunk.i >= chunk.j
        rate = (x["beta"].col, x["beta"].row) if "beta" in x else (1.0, 1.0)
        d_scores = chunk.within(jnp.where(below, chunk.dot_t(d_o, written), chunk.dot_t(written, d_o)))
        d_strict = jnp.where(below, chunk.dot_t(lam, written), chunk.dot_t(written, lam))
        d_strict = chunk.within(jnp.where(chunk.i == chunk.j, 0, -d_strict))
        d_reads, erased = chunk.from_entry(chunk.dot(d_o, state)), chunk.from_entry(chunk.dot(lam, state))
        d_rate = (d_strict * parts.strict).sum(1, keepdims=True) - (parts.erases.vectors * erased).sum(1, keepdims=True)
        d_strict = d_strict * jnp.where(below, rate[0], rate[1])
        d_writes = chunk.to_exit(chunk.dot(written, d_state))
        d_total = parts.total * (_f32(state) * d_state).sum(0, keepdims=True)
        d_pairs, d_reads = [[d_scores], [d_strict]], [d_reads, -rate[0] * erased]
        (d_q, d_e), (d_k,), d_g = _channels.backward(
            chunk, decays, g, queries, [key], tape, d_pairs, d_reads, [d_writes], d_total
        )
        grads = {"q": d_q * chunk.scale, "g": d_g}
        if "b" in x:
            return grads | {"k": d_k + d_e * _f32(x["b"]), "b": d_e * key}
        return grads | {"k": d_k + d_e, "beta": d_rate}


def _prepare(decays, chunk: Chunk, inputs, heads: int, scratch: dict) -> None:
    """The inverse's leaves, which are found for all heads together, and what is known on the way."""
    for head in range(heads):
        x = inputs(head)
        parts, _ = decays.parts(chunk, x)
        scratch["strict"][head, : chunk.size, : chunk.size] = parts.strict * _rate(x)
        decays.store({name: ref.at[head] for name, ref in scratch.items()}, parts)
    _triangular.invert(chunk, scratch, heads)


def _forward(decays, chunk: Chunk, x: dict, state: jax.Array, scratch: dict):
    """One head: `(o [C, V], state^T [V, K], X)`."""
    inverse = scratch["inverse"][: chunk.size, : chunk.size]
    parts = decays.load(chunk, x, scratch)
    entered, rest = state, _rest(chunk, x, parts.erases, state)
    yield
    written = chunk.fine_dot(inverse, rest)
    yield
    state = parts.total * state + chunk.fine_t_dot(written, parts.writes)
    return _read(chunk, parts.reads, entered) + chunk.dot(parts.scores, written), state, {"inverse": inverse}


def _backward(decays, chunk: Chunk, x: dict, state: jax.Array, saved: dict, d_o: jax.Array, d_state: jax.Array):
    """One head: the gradients of its inputs and of `state^T`, which entered the chunk."""
    parts, tape = decays.parts(chunk, x)
    rest = _rest(chunk, x, parts.erases, state)
    yield
    written = chunk.dot(saved["inverse"], rest)
    d_written = chunk.t_dot(parts.scores, d_o) + chunk.dot_t(parts.writes, d_state)
    yield
    lam = chunk.t_dot(saved["inverse"], d_written)
    yield
    grads = decays.backward(chunk, x, state, d_state, parts, tape, d_o, written, lam)
    if "w" in x:
        grads |= {"v": lam * _f32(x["w"]), "w": lam * _f32(x["v"])}
    else:
        d_rate = grads["beta"] + (lam * _f32(x["v"])).sum(1, keepdims=True)
        grads |= {"v": lam * x["beta"].col, "beta": GateGradient(None, d_rate)}
    entry = chunk.t_dot(d_o, parts.reads.vectors * parts.reads.factor)
    return grads, parts.total * d_state + entry - chunk.t_dot(lam, parts.erases.vectors * parts.erases.factor)


def _family(name: str, decays, more: dict, **options) -> Family:
    scratch = {name: (shape, False) for name, shape in decays.scratch.items()}
    return Family(
        name,
        {"q": "H K", "k": "H K", "v": "HV V", **more},
        functools.partial(_forward, decays),
        functools.partial(_backward, decays),
        saves={"inverse": "C C"},
        turns=8,
        prepare=functools.partial(_prepare, decays),
        scratch=_triangular.SCRATCH | scratch | ({"total": ((1, "K"), True)} if scratch else {}),
        **options,
    )


DELTA = _family("delta", PerHead, {"beta": "HV"})
DELTA_SCALAR_DECAY = _family("delta_scalar_decay", PerHead, {"g": "HV", "beta": "HV"}, **scalar.GATES)
DELTA_DIAGONAL_DECAY = _family("delta_diagonal_decay", PerChannel, {"g": "HV K", "beta": "HV"})
DELTA_CHANNEL_GATES = _family("delta_channel_gates", PerChannel, {"g": "HV K", "b": "HV K", "w": "HV V"})
