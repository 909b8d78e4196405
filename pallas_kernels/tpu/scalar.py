"""Kernels of one decay per head and token, or none: S_t = exp(g_t) S_{t-1} + k_t v_t^T,  o_t = q_t S_t.

With F_i the sum of the chunk's g up to i and R_j the sum after j, D_ij = exp(F_i - F_j) for j <= i:

    A = Q K^T,  O = (A D) V + (Q exp F) S_0,  S_C = exp(F_C) S_0 + (K exp R)^T V

Backward, from the state that entered the chunk and the gradient of the one that left it:

    dA = (dO V^T) D,  dQ = dA K + exp F (dO S_0^T),  dK = dA^T Q + exp R (V dS^T),  dV = (A D)^T dO + (K exp R) dS
    dS_0 = exp(F_C) dS + (Q exp F)^T dO,  and E = dA A gives F_i's gradient by its row sums less its column sums
"""

import jax
import jax.numpy as jnp

from ._chunk import Chunk, GateGradient
from ._family import Family


def cumulated(chunk: Chunk, gates: dict) -> dict:
    """From g `[heads, C]`: its sums up to each token and after it."""
    g = gates["g"]
    sums = dict(until=chunk.row_sums(g, chunk.i <= chunk.j), after=chunk.row_sums(g, chunk.i > chunk.j))
    return gates | sums if chunk.exact else {name: x for name, x in gates.items() if name != "g"} | sums


def cumulated_back(chunk: Chunk, grads: dict) -> dict:
    d_g = chunk.row_sums(grads["until"], chunk.i >= chunk.j) + chunk.row_sums(grads["after"], chunk.i < chunk.j)
    return {name: x for name, x in grads.items() if name not in ("until", "after")} | {"g": d_g}


def pair_decays(chunk: Chunk, x: dict) -> jax.Array:
    """exp(g_{j+1} + ... + g_i); meaningless above the diagonal, where it is not above 1 either.

    A difference of two sums loses what bfloat16 products lose anyway; float32 ones get a sum over the tokens between.
    """
    if chunk.exact:
        between = chunk.dot((chunk.i >= chunk.j).astype(jnp.float32), jnp.where(chunk.i > chunk.j, x["g"].col, 0))
    else:
        between = x["until"].col - x["until"].row
    return jnp.exp(jnp.minimum(between, 0))


def forward(chunk: Chunk, x: dict, state: jax.Array, scratch: dict):
    """One head: `(o [C, V], state^T [V, K], nothing saved)`."""
    q, k, v = x["q"], x["k"], x["v"]
    scores, reads, writes, decay = factors(chunk, x)
    scores = chunk.dot_t(q, k) * scores
    o = chunk.dot(scores, v) + reads * chunk.dot_t(q, state)
    return o, decay * state + chunk.t_dot(v, k * writes), {}


def factors(chunk: Chunk, x: dict):
    """What decays multiply: the scores [C, C] (causal, scaled), reads [C, 1] (scaled), writes [C, 1], the state."""
    ones = jnp.ones((chunk.size, 1), jnp.float32)
    if "until" in x:
        pairs, total = pair_decays(chunk, x), jnp.exp(x["until"].row[:, -1:])
        since, left = jnp.exp(x["until"].col), jnp.exp(x["after"].col)
    else:
        pairs, total, since, left = jnp.ones((), jnp.float32), jnp.ones((1, 1), jnp.float32), ones, ones
    scores = jnp.where(chunk.causal, pairs * chunk.scale, 0)
    return scores, chunk.from_entry(since * chunk.scale), chunk.to_exit(left), chunk.from_entry_to_exit(total)


def backward(chunk: Chunk, x: dict, state: jax.Array, saved: dict, d_o: jax.Array, d_state: jax.Array):
    """One head: the gradients of its inputs and of `state^T`, which entered the chunk."""
    q, k, v = x["q"], x["k"], x["v"]
    pairs, reads, writes, decay = factors(chunk, x)
    scores = chunk.dot_t(q, k)
    d_scores = chunk.dot_t(d_o, v) * pairs
    d_reads, d_writes = reads * chunk.dot(d_o, state), writes * chunk.dot(v, d_state)
    grads: dict[str, jax.Array | GateGradient] = {
        "q": chunk.dot(d_scores, k) + d_reads,
        "k": chunk.t_dot(d_scores, q) + d_writes,
        "v": chunk.t_dot(scores * pairs, d_o) + chunk.dot_t(k * writes, d_state),
    }
    if "until" in x:
        d_pairs = d_scores * scores
        d_until = d_pairs.sum(1, keepdims=True) + (q * d_reads).sum(1, keepdims=True)
        d_decay = decay * (state.astype(jnp.float32) * d_state).sum((0, 1), keepdims=True)
        last = chunk.j[:1] == chunk.size - 1
        grads["until"] = GateGradient(jnp.where(last, d_decay, 0) - d_pairs.sum(0, keepdims=True), d_until)
        grads["after"] = GateGradient(None, (k * d_writes).sum(1, keepdims=True))
    return grads, decay * d_state + chunk.t_dot(d_o * reads, q)


# below exp(-40) nothing is left in float32, and sums of such gates keep the digits of the others
GATES = dict(gates=cumulated, gates_back=cumulated_back, floor={"g": -40.0})
NO_DECAY = Family("no_decay", {"q": "H K", "k": "H K", "v": "HV V"}, forward, backward)
SCALAR_DECAY = Family("scalar_decay", {"q": "H K", "k": "H K", "v": "HV V", "g": "HV"}, forward, backward, **GATES)
