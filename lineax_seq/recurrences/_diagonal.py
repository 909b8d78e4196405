"""Family: one decay per key channel. S_t = diag(exp g_t) S_{t-1} + k_t v_t^T,  o_t = q_t S_t.

Scores A_ij = sum_d q_id k_jd exp(G_i - G_j)_d, by halves (see `_decay`): log2 C levels of matrix products whose
exponents are never positive. One product (Q exp G) (K exp -G)^T is enough where the decays of a chunk stay well within
float range (`mild`), which trained gates do.
"""

import functools
from collections.abc import Callable
from typing import TypedDict

import jax
import jax.numpy as jnp
from jax import lax

from ..monoid import DECAY, Affine
from ..recurrence import Recurrence
from ..typing import Inputs
from . import _decay, _scalar

# e^60 = 1e26 and e^-60 leave float32 twelve decimal orders for what they multiply.
MILD_DECAY = 60.0


def element(x: Inputs) -> Affine:
    return Affine(x["g"][:, None], x["k"][:, None] * x["v"][None, :])


def decayed_scores(queries: jax.Array, keys: jax.Array, g: jax.Array) -> tuple[jax.Array, _decay.Sums]:
    """Strictly lower `[C, C]` scores `sum_d q_id k_jd exp(g_{j+1} + ... + g_i)_d`, and g's sums over the chunk.

    Several sets of queries `[S, C, K]` or keys `[R, C, K]` meet the same decays `g [C, K]`: `[S, C, C]`, `[R, C, C]` or
    `[S, R, C, C]`.
    """
    s, r = "s" * (queries.ndim - 2), "r" * (keys.ndim - 2)
    assemble = _decay.assemble
    for _ in s + r:
        assemble = jax.vmap(assemble)
    blocks = lambda x, h: x.reshape(*x.shape[:-2], -1, 2, h, x.shape[-1])  # noqa: E731
    sums, size = _decay.leaves(g), g.shape[0]
    matrix = jnp.zeros((*queries.shape[:-2], *keys.shape[:-2], size, 1, 1), g.dtype)
    for h in (2**i for i in range(size.bit_length() - 1)):
        since_middle = jnp.exp(sums.forward.reshape(-1, 2, *sums.forward.shape[1:])[:, 1])
        until_middle = jnp.exp(sums.backward.reshape(-1, 2, *sums.backward.shape[1:])[:, 0])
        later = blocks(queries, h)[..., 1, :, :] * since_middle
        earlier = blocks(keys, h)[..., 0, :, :] * until_middle
        matrix = assemble(matrix, jnp.einsum(f"{s}mid,{r}mjd->{s}{r}mij", later, earlier))
        sums = _decay.double(sums)
    return matrix[..., 0, :, :], _decay.Sums(sums.forward[0], sums.backward[0])


def mild(x: Inputs) -> jax.Array:
    """Whether no channel decays by more than e^-MILD_DECAY over its chunk (`g [..., C, K]`).

    NaN counts as mild: a broken token must not change how others are rounded.
    """
    return ~jnp.any(x["g"].sum(-2) < -MILD_DECAY)


def mild_scores(queries: jax.Array, keys: jax.Array, g: jax.Array) -> tuple[jax.Array, _decay.Sums]:
    """`decayed_scores` as one product, for mild gates.

    Decays count from the chunk's entry, not from its middle, so that not even rounding depends on later tokens.
    """
    s, r, size = "s" * (queries.ndim - 2), "r" * (keys.ndim - 2), g.shape[0]
    # cumulated by a product with ones: on every platform faster than a cumulative sum
    forward = jnp.matmul(jnp.tril(jnp.ones((size, size), g.dtype)), g, precision=lax.Precision.HIGHEST)
    scores = jnp.einsum(f"{s}id,{r}jd->{s}{r}ij", queries * jnp.exp(forward), keys * jnp.exp(-forward))
    return jnp.tril(scores, -1), _decay.Sums(forward, forward[-1] - forward)


class Preparations(TypedDict, total=False):
    """Entries of a record."""

    prepare: Callable
    prepare_mild: Callable
    mild: Callable


def by_gates(prepare: Callable) -> Preparations:
    """The record's entries for a `prepare(scores, x, keep)` that takes either way to its decayed scores."""
    return Preparations(
        prepare=functools.partial(prepare, decayed_scores),
        prepare_mild=functools.partial(prepare, mild_scores),
        mild=mild,
    )


def one_earlier(x: jax.Array) -> jax.Array:
    """Rows of `x [..., C, K]` moved to the token before theirs, zero at the last: what reads the state before a token
    reads it after the one before, and there it decays by the same sums as everything else."""
    return jnp.concatenate([x[..., 1:, :], jnp.zeros_like(x[..., :1, :])], axis=-2)


def one_later(x: jax.Array) -> jax.Array:
    """The way back: zero at the first token."""
    return jnp.concatenate([jnp.zeros_like(x[..., :1, :]), x[..., :-1, :]], axis=-2)


def _prepare(decayed: Callable, x: Inputs, keep: jax.Array | None) -> _scalar.Factors:
    docs = _decay.documents(keep)
    scores, sums = decayed(x["q"], x["k"], x["g"])
    scores = scores + jnp.diag((x["q"] * x["k"]).sum(-1))
    scores = _decay.causal(scores, docs)
    return _scalar.factors(x, scores, jnp.exp(sums.forward), jnp.exp(sums.backward), docs)


DIAGONAL_DECAY = Recurrence(
    name="diagonal_decay",
    fields={"q": "H K", "k": "H K", "v": "HV V", "g": "HV K"},
    element=element,
    output=_scalar.output,
    monoid=DECAY,
    init_state=_scalar.init_state,
    **by_gates(_prepare),
    advance=_scalar.advance,
    readout=_scalar.readout,
)
