"""Family: one decay per head and token, or none. S_t = exp(g_t) S_{t-1} + k_t v_t^T,  o_t = q_t S_t.

Chunk form, with G the cumulated g: A_ij = (q_i · k_j) exp(G_i - G_j) for j <= i;
O = (Q exp G) S_0 + A V;  S_C = exp(G_C) S_0 + (K exp(G_C - G))^T V.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..core.monoid import DECAY, Affine
from ..core.recurrence import Recurrence
from ..core.typing import Inputs
from . import _decay
from ._products import inner, outer, product


class Factors(NamedTuple):
    """What a chunk gives without the state."""

    q: jax.Array  # [C, K]
    since_entry: jax.Array  # [C, 1] what each token finds left of the entering state; it scales what q reads
    intra: jax.Array  # [C, V] what the outputs get of the chunk's own tokens
    decay: jax.Array  # [1, 1] what the chunk leaves of the entering state
    offset: jax.Array  # [K, V] what the chunk's tokens add to it


def element(x: Inputs) -> Affine:
    return Affine(x["g"][None, None], x["k"][:, None] * x["v"][None, :])


def output(x: Inputs, state: jax.Array, previous: jax.Array) -> jax.Array:
    return x["q"] @ state


def init_state(x: Inputs) -> jax.Array:
    return jnp.zeros((x["k"].shape[-1], x["v"].shape[-1]), x["v"].dtype)


def prepare(x: Inputs, keep: jax.Array | None) -> Factors:
    d, docs = _decay.per_head(x["g"]), _decay.documents(keep)
    scores = inner(x["q"], x["k"]) * d.pairs(docs)
    return factors(x, scores, d.since_entry[:, None], d.until_exit[:, None], docs)


def factors(x: Inputs, scores: jax.Array, since_entry: jax.Array, until_exit: jax.Array, docs) -> Factors:
    """From the masked scores `[C, C]` and the decays `[C, 1]` since the chunk's entry and until its exit."""
    since_entry, writes = _decay.entering(since_entry, docs), x["k"] * _decay.leaving(until_exit, docs)
    return Factors(x["q"], since_entry, product(scores, x["v"]), since_entry[-1:], outer(writes, x["v"]))


def advance(factors: Factors, state: jax.Array) -> tuple[jax.Array, None]:
    return factors.decay * state + factors.offset, None


def readout(factors: Factors, state: jax.Array) -> jax.Array:
    return factors.intra + factors.since_entry * product(factors.q, state)


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
