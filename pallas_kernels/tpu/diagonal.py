"""Kernels of one decay per key channel: S_t = diag(exp g_t) S_{t-1} + k_t v_t^T,  o_t = q_t S_t.

With F the sums of the chunk's g and R_j those after j, pairs of tokens as in `_channels`:

    O = A V + (Q exp F) S_0,  S_C = exp(F_C) S_0 + (K exp R)^T V

Backward: dA = dO V^T, dV = A^T dO + (K exp R) dS, dS_0 = exp(F_C) dS + (Q exp F)^T dO; `_channels` takes the rest back.
"""

import jax
import jax.numpy as jnp

from . import _channels
from ._chunk import Chunk
from ._family import Family


def _inputs(chunk: Chunk, x: dict):
    query, key, g = (x[name].astype(jnp.float32) for name in ("q", "k", "g"))
    return query * chunk.scale, key, g


def forward(chunk: Chunk, x: dict, state: jax.Array, scratch: dict):
    """One head: `(o [C, V], state^T [V, K], nothing saved)`."""
    query, key, g = _inputs(chunk, x)
    ((scores,),), (reads,), (writes,), total, _ = _channels.forward(chunk, _channels.decays(g), [query], [key])
    o = chunk.dot(jnp.where(chunk.causal, scores, 0), x["v"]) + chunk.dot_t(chunk.from_entry(reads), state)
    state = chunk.from_entry_to_exit(total) * state + chunk.t_dot(x["v"], chunk.to_exit(writes))
    return o, state, {}


def backward(chunk: Chunk, x: dict, state: jax.Array, saved: dict, d_o: jax.Array, d_state: jax.Array):
    """One head: the gradients of its inputs and of `state^T`, which entered the chunk."""
    query, key, g = _inputs(chunk, x)
    v, decays = x["v"], _channels.decays(g)
    ((scores,),), (reads,), (writes,), total, tape = _channels.forward(chunk, decays, [query], [key])
    scores, total = jnp.where(chunk.causal, scores, 0), chunk.from_entry_to_exit(total)
    reads, writes = chunk.from_entry(reads), chunk.to_exit(writes)

    d_scores = chunk.within(jnp.where(chunk.i >= chunk.j, chunk.dot_t(d_o, v), chunk.dot_t(v, d_o)))
    d_reads, d_writes = chunk.from_entry(chunk.dot(d_o, state)), chunk.to_exit(chunk.dot(v, d_state))
    d_total = total * (state.astype(jnp.float32) * d_state).sum(0, keepdims=True)
    (d_q,), (d_k,), d_g = _channels.backward(
        chunk, decays, g, [query], [key], tape, [[d_scores]], [d_reads], [d_writes], d_total
    )
    d_v = chunk.t_dot(scores, d_o) + chunk.dot_t(writes, d_state)
    grads = {"q": d_q * chunk.scale, "k": d_k, "v": d_v, "g": d_g}
    return grads, total * d_state + chunk.t_dot(d_o, reads)


DIAGONAL_DECAY = Family("diagonal_decay", {"q": "H K", "k": "H K", "v": "HV V", "g": "HV K"}, forward, backward)
