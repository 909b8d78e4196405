"""Family: one decay per head and token, or none. S_t = exp(g_t) S_{t-1} + k_t v_t^T,  o_t = q_t S_t.

Chunk form, with G the cumulated g: A_ij = (q_i · k_j) exp(G_i - G_j) for j <= i;
O = (Q exp G) S_0 + A V;  S_C = exp(G_C) S_0 + (K exp(G_C - G))^T V.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..monoid import DECAY, Affine
from ..recurrence import Recurrence
from ..typing import Inputs
from . import _decay
from ._products import inner, outer, product


class Factors(NamedTuple):
    """What a chunk says without knowing the state; shared by those with one decay per head, or none."""

    reads: jax.Array  # [C, K] queries, decayed from the chunk's entry
    intra: jax.Array  # [C, V] outputs of the chunk's own tokens
    decay: jax.Array  # [1, 1] or [K, 1] what is left of the entering state
    offset: jax.Array  # [K, V] what the chunk's tokens add to it


def element(x: Inputs) -> Affine:
    return Affine(x["g"][None, None], x["k"][:, None] * x["v"][None, :])


def output(x: Inputs, state: jax.Array, previous: jax.Array) -> jax.Array:
    return x["q"] @ state


def init_state(x: Inputs) -> jax.Array:
    return jnp.zeros((x["k"].shape[-1], x["v"].shape[-1]), x["v"].dtype)


def prepare(x: Inputs, keep: jax.Array | None) -> Factors:
    (pairs, sums), docs = _decay.pair_sums(x["g"]), _decay.documents(keep)
    scores = _decay.causal(inner(x["q"], x["k"]) * jnp.exp(pairs), docs)
    return factors(x, scores, jnp.exp(sums.forward)[:, None], jnp.exp(sums.backward)[:, None], docs)


def factors(x: Inputs, scores: jax.Array, since_entry: jax.Array, until_exit: jax.Array, docs) -> Factors:
    """The factors from the masked scores `[C, C]` and the decays since the chunk's entry and until its exit."""
    reads, decay, offset = ends(x, since_entry, until_exit, docs)
    return Factors(reads, product(scores, x["v"]), decay, offset)


def ends(x: Inputs, since_entry: jax.Array, until_exit: jax.Array, docs) -> tuple[jax.Array, jax.Array, jax.Array]:
    """reads, decay and offset of the factors: what ties the chunk to the states at its ends."""
    reads, writes, decay = x["q"] * since_entry, x["k"] * until_exit, since_entry[-1][:, None]
    if docs is not None:
        reads, writes = _decay.mask(reads, docs.entry), _decay.mask(writes, docs.exit)
        decay = jnp.where(docs.through, decay, 0)
    return reads, decay, outer(writes, x["v"])


def advance(factors: Factors, state: jax.Array) -> tuple[jax.Array, None]:
    return factors.decay * state + factors.offset, None


def readout(factors: Factors, state: jax.Array, extra: None) -> jax.Array:
    return factors.intra + product(factors.reads, state)


def _prepare_undecayed(x: Inputs, keep: jax.Array | None) -> Factors:
    docs, one = _decay.documents(keep), jnp.ones((x["k"].shape[0], 1), x["k"].dtype)
    return factors(x, _decay.causal(inner(x["q"], x["k"]), docs), one, one, docs)


SCALAR_DECAY = Recurrence(
    name="scalar_decay",
    fields={"q": "H K", "k": "H K", "v": "HV V", "g": "HV"},
    element=element,
    output=output,
    monoid=DECAY,
    init_state=init_state,
    prepare=prepare,
    advance=advance,
    readout=readout,
)

NO_DECAY = Recurrence(
    name="no_decay",
    fields={"q": "H K", "k": "H K", "v": "HV V"},
    element=lambda x: Affine(jnp.zeros((1, 1), x["k"].dtype), x["k"][:, None] * x["v"][None, :]),
    output=output,
    monoid=DECAY,
    init_state=init_state,
    prepare=_prepare_undecayed,
    advance=advance,
    readout=readout,
)
