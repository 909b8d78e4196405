"""Family: one decay per key channel. S_t = diag(exp g_t) S_{t-1} + k_t v_t^T,  o_t = q_t S_t.

Scores A_ij = sum_d q_id k_jd exp(G_i - G_j)_d. Where the decays of a stretch of tokens stay well within float range
(mild), one product (Q exp G) (K exp -G)^T makes them. Stretches are joined by halves (see `_decay`), by products whose
exponents are never positive. The gates decide how long the stretches are: the whole chunk, LEAF tokens, or one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
from jax import lax

from ..core.monoid import DECAY, Affine
from ..core.recurrence import Recurrence, Shortcut
from ..core.typing import Inputs
from . import _decay, _scalar
from ._products import inner, outer, product

# e^60 = 1e26 and e^-60 leave float32 twelve decimal orders for what they multiply.
MILD_DECAY = 60.0
LEAF = 16
GROUP = 8  # tokens that the first stage of a cumulative sum adds up


class Decays(NamedTuple):
    """What is left of a state's channels; arrays [C, K]."""

    since_entry: jax.Array  # at this token, of the state that enters the chunk
    until_exit: jax.Array  # at the chunk's exit, of what this token writes
    reads: list[jax.Array]  # the queries, times since_entry


def element(x: Inputs) -> Affine:
    return Affine(x["g"][:, None], x["k"][:, None] * x["v"][None, :])


def decayed_scores(
    leaf: int | None, queries: Sequence[jax.Array], keys: Sequence[jax.Array], g: jax.Array
) -> tuple[list[list[jax.Array]], Decays]:
    """Scores `[C, C]` on and below the diagonal, `sum_d q_id k_jd exp(g_{j+1} + ... + g_i)_d`, and the chunk's decays.

    All `queries` and `keys`, each `[C, K]`, meet the same decays `g [C, K]`: `scores[a][b]` is of queries a on keys b.
    Decays must be mild in stretches of `leaf` tokens; None is the whole chunk, 1 is none at all.
    """
    size = g.shape[0]
    leaf = min(leaf or size, size)
    stretches = lambda xs: [x.reshape(-1, leaf, x.shape[-1]) for x in xs]  # noqa: E731
    if leaf == 1:
        sums, scores = _decay.leaves(g), _products(stretches(queries), stretches(keys))
    else:
        # Decays count from the stretch's entry, not from its middle, so that not even rounding depends on later tokens.
        forward = _cumulated(*stretches([g]))
        since_entry = jnp.exp(forward)
        grown = _reciprocal(since_entry)
        reads = [q * since_entry for q in stretches(queries)]
        scores = jax.tree.map(jnp.tril, _products(reads, [k * grown for k in stretches(keys)]))
        if leaf == size:
            # exp(G_C) exp(-G) is one exponential less than exp(G_C - G), and just as precise
            return _whole(scores), Decays(since_entry[0], since_entry[0, -1] * grown[0], _whole(reads))
        sums = _decay.Sums(forward, forward[:, -1:] - forward)
    while leaf < size:
        later = [q[1::2] * jnp.exp(sums.forward[1::2]) for q in stretches(queries)]
        earlier = [k[0::2] * jnp.exp(sums.backward[0::2]) for k in stretches(keys)]
        scores = jax.tree.map(_decay.assemble, scores, _products(later, earlier))
        sums, leaf = _decay.double(sums), 2 * leaf
    since_entry = jnp.exp(sums.forward[0])
    return _whole(scores), Decays(since_entry, jnp.exp(sums.backward[0]), [q * since_entry for q in queries])


def _cumulated(g: jax.Array) -> jax.Array:
    """Sums over the tokens so far of each stretch `[m, h, K]`, by products with ones: on every platform faster than a
    cumulative sum. In two stages, of a few tokens and of what came before them, it takes a fraction of the products."""
    groups = g.reshape(g.shape[0], -1, min(GROUP, g.shape[1]), g.shape[2])
    size, count = groups.shape[2], groups.shape[1]
    ones = lambda n, diagonal: jnp.tril(jnp.ones((n, n), g.dtype), diagonal)  # noqa: E731
    own = jnp.matmul(ones(size, 0), groups, precision=lax.Precision.HIGHEST)
    before = jnp.matmul(ones(count, -1), own[:, :, -1], precision=lax.Precision.HIGHEST)
    return (own + before[:, :, None]).reshape(g.shape)


@jax.custom_jvp
def _reciprocal(x: jax.Array) -> jax.Array:
    """exp(-G) from exp(G), for less than a second exponential."""
    return 1 / x


@_reciprocal.defjvp
def _reciprocal_jvp(primals, tangents):
    grown = _reciprocal(*primals)
    return grown, -grown * (grown * tangents[0])  # a tangent of exp(G) is small where grown^2 would overflow


def _products(queries: list[jax.Array], keys: list[jax.Array]) -> list[list[jax.Array]]:
    return [[jax.vmap(inner)(q, k) for k in keys] for q in queries]


def _whole(tree):
    return jax.tree.map(lambda stretches: stretches[0], tree)


def _mild(leaf: int | None, x: Inputs) -> jax.Array:
    """Whether no channel decays by more than e^-MILD_DECAY over a stretch of LEAF tokens, or, `leaf` None, the chunk
    (`g [B, N, C, HV, K]`).

    NaN counts as mild: a broken token must not change how others are rounded.
    """
    batch, chunks, size, *channels = x["g"].shape
    leaves = x["g"].reshape(batch, chunks, max(1, size // LEAF), min(LEAF, size), *channels)
    sums = leaves.sum(3)  # the same for every `leaf`
    return ~jnp.any((sums if leaf else sums.sum(2)) < -MILD_DECAY)


DecayedScores = Callable[[Sequence[jax.Array], Sequence[jax.Array], jax.Array], tuple[list[list[jax.Array]], Decays]]
"""`decayed_scores` of one `leaf`."""


class Preparations(TypedDict, total=False):
    """Entries of a record."""

    prepare: Callable
    shortcuts: tuple[Shortcut, ...]


def by_gates(prepare: Callable) -> Preparations:
    """The record's entries for a `prepare(decayed_scores, x, keep)`."""
    ways = {leaf: functools.partial(prepare, functools.partial(decayed_scores, leaf)) for leaf in (None, LEAF, 1)}
    whole = Shortcut(functools.partial(_mild, None), ways[None])
    leaves = Shortcut(functools.partial(_mild, LEAF), ways[LEAF], longer_than=LEAF)
    return Preparations(prepare=ways[1], shortcuts=(whole, leaves))


def one_earlier(x: jax.Array) -> jax.Array:
    """Rows of `x [..., C, K]` moved to the token before theirs, zero at the last: what reads the state before a token
    reads it after the one before, and there it decays by the same sums as everything else."""
    return jnp.concatenate([x[..., 1:, :], jnp.zeros_like(x[..., :1, :])], axis=-2)


def one_later(x: jax.Array, first: float = 0) -> jax.Array:
    """The way back; what comes to stand at the first token."""
    return jnp.concatenate([jnp.full_like(x[..., :1, :], first), x[..., :-1, :]], axis=-2)


class Factors(NamedTuple):
    """`readout` makes `scores v`, not `prepare`, which is a branch among others: the compiler leaves a branch whole,
    while this product runs when there is time for it, as a state is on its way."""

    reads: jax.Array  # [C, K] queries, decayed from the chunk's entry
    scores: jax.Array  # [C, C] of queries on keys, decayed, causal
    v: jax.Array  # [C, V]
    decay: jax.Array  # [K, 1] what is left of the entering state
    offset: jax.Array  # [K, V] what the chunk's tokens add to it


def readout(factors: Factors, state: jax.Array) -> jax.Array:
    return product(factors.scores, factors.v) + product(factors.reads, state)


def at_exit(decays: Decays, docs: _decay.Documents | None) -> tuple[jax.Array, jax.Array]:
    """What is left at the chunk's exit of the entering state `[K, 1]` and of what its tokens write `[C, K]`."""
    return _decay.entering(decays.since_entry, docs)[-1][:, None], _decay.leaving(decays.until_exit, docs)


def factors(x: Inputs, reads: jax.Array, scores: jax.Array, decays: Decays, docs) -> Factors:
    """From the decayed queries `[C, K]` and the masked scores `[C, C]`."""
    decay, until_exit = at_exit(decays, docs)
    return Factors(_decay.entering(reads, docs), scores, x["v"], decay, outer(x["k"] * until_exit, x["v"]))


def _prepare(decayed: DecayedScores, x: Inputs, keep: jax.Array | None) -> Factors:
    docs = _decay.documents(keep)
    ((scores,),), decays = decayed([x["q"]], [x["k"]], x["g"])
    return factors(x, decays.reads[0], _decay.causal(scores, docs), decays, docs)


DIAGONAL_DECAY = Recurrence(
    name="diagonal_decay",
    fields={"q": "H K", "k": "H K", "v": "HV V", "g": "HV K"},
    element=element,
    output=_scalar.output,
    monoid=DECAY,
    init_state=_scalar.init_state,
    **by_gates(_prepare),
    advance=_scalar.advance,
    readout=readout,
)
