"""Family: one decay per key channel. S_t = diag(exp g_t) S_{t-1} + k_t v_t^T,  o_t = q_t S_t.

Scores A_ij = sum_d q_id k_jd exp(G_i - G_j)_d. Where the decays of a stretch of tokens stay well within float range
(mild), one product (Q exp G) (K exp -G)^T makes them. Stretches are joined by halves (see `_decay`), by products whose
exponents are never positive. The gates decide how long the stretches are: the whole chunk, LEAF tokens, or one.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
from jax import lax

from ..monoid import DECAY, Affine
from ..recurrence import Recurrence, Shortcut
from ..typing import Inputs
from . import _decay, _scalar

# e^60 = 1e26 and e^-60 leave float32 twelve decimal orders for what they multiply.
MILD_DECAY = 60.0
LEAF = 16


class Decays(NamedTuple):
    """What is left of a state's channels; arrays [C, K]."""

    since_entry: jax.Array  # at this token, of the state that enters the chunk
    until_exit: jax.Array  # at the chunk's exit, of what this token writes


def element(x: Inputs) -> Affine:
    return Affine(x["g"][:, None], x["k"][:, None] * x["v"][None, :])


def decayed_scores(leaf: int | None, queries: jax.Array, keys: jax.Array, g: jax.Array) -> tuple[jax.Array, Decays]:
    """Scores `[C, C]` on and below the diagonal, `sum_d q_id k_jd exp(g_{j+1} + ... + g_i)_d`, and the chunk's decays.

    Several sets of queries `[S, C, K]` or keys `[R, C, K]` meet the same decays `g [C, K]`: `[S, C, C]`, `[R, C, C]` or
    `[S, R, C, C]`. Decays must be mild in stretches of `leaf` tokens; None is the whole chunk, 1 is none at all.
    """
    size = g.shape[0]
    leaf = min(leaf or size, size)
    products = functools.partial(_products, "s" * (queries.ndim - 2), "r" * (keys.ndim - 2))
    if leaf == 1:
        sums, matrix = _decay.leaves(g), products(_blocks(queries, 1), _blocks(keys, 1))
    else:
        # Decays count from the stretch's entry, not from its middle, so that not even rounding depends on later
        # tokens. Cumulated by a product with ones: on every platform faster than a cumulative sum.
        ones = jnp.tril(jnp.ones((leaf, leaf), g.dtype))
        forward = jnp.matmul(ones, g.reshape(-1, leaf, g.shape[-1]), precision=lax.Precision.HIGHEST)
        grown = _blocks(keys, leaf) * jnp.exp(-forward)
        matrix = jnp.tril(products(_blocks(queries, leaf) * jnp.exp(forward), grown))
        if leaf == size:
            since_entry = jnp.exp(forward[0])
            # one exponential less than exp(G_C - G), and just as precise
            return matrix[..., 0, :, :], Decays(since_entry, since_entry[-1] * jnp.exp(-forward[0]))
        sums = _decay.Sums(forward, forward[:, -1:] - forward)
    assemble = _decay.assemble
    for _ in range(matrix.ndim - 3):
        assemble = jax.vmap(assemble)
    while leaf < size:
        later = _blocks(queries, leaf)[..., 1::2, :, :] * jnp.exp(sums.forward[1::2])
        earlier = _blocks(keys, leaf)[..., 0::2, :, :] * jnp.exp(sums.backward[0::2])
        matrix, sums, leaf = assemble(matrix, products(later, earlier)), _decay.double(sums), 2 * leaf
    return matrix[..., 0, :, :], Decays(jnp.exp(sums.forward[0]), jnp.exp(sums.backward[0]))


def _blocks(x: jax.Array, size: int) -> jax.Array:
    return x.reshape(*x.shape[:-2], -1, size, x.shape[-1])


def _products(s: str, r: str, queries: jax.Array, keys: jax.Array) -> jax.Array:
    return jnp.einsum(f"{s}mid,{r}mjd->{s}{r}mij", queries, keys)


def _mild(leaf: int | None, x: Inputs) -> jax.Array:
    """Whether no channel decays by more than e^-MILD_DECAY over a stretch (`g [..., C, K]`).

    NaN counts as mild: a broken token must not change how others are rounded.
    """
    g = x["g"]
    return ~jnp.any(_blocks(g, min(leaf or g.shape[-2], g.shape[-2])).sum(-2) < -MILD_DECAY)


class Preparations(TypedDict, total=False):
    """Entries of a record."""

    prepare: Callable
    shortcuts: tuple[Shortcut, ...]


def by_gates(prepare: Callable) -> Preparations:
    """The record's entries for a `prepare(decayed_scores, x, keep)`."""
    ways = {leaf: functools.partial(prepare, functools.partial(decayed_scores, leaf)) for leaf in (None, LEAF, 1)}
    shortcuts = tuple(Shortcut(functools.partial(_mild, leaf), ways[leaf]) for leaf in (None, LEAF))
    return Preparations(prepare=ways[1], shortcuts=shortcuts)


def one_earlier(x: jax.Array) -> jax.Array:
    """Rows of `x [..., C, K]` moved to the token before theirs, zero at the last: what reads the state before a token
    reads it after the one before, and there it decays by the same sums as everything else."""
    return jnp.concatenate([x[..., 1:, :], jnp.zeros_like(x[..., :1, :])], axis=-2)


def one_later(x: jax.Array, first: float = 0) -> jax.Array:
    """The way back; what comes to stand at the first token."""
    return jnp.concatenate([jnp.full_like(x[..., :1, :], first), x[..., :-1, :]], axis=-2)


def _prepare(decayed: Callable, x: Inputs, keep: jax.Array | None) -> _scalar.Factors:
    docs = _decay.documents(keep)
    scores, decays = decayed(x["q"], x["k"], x["g"])
    return _scalar.factors(x, _decay.causal(scores, docs), *decays, docs)


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
