"""Family: one decay per key channel. S_t = diag(exp g_t) S_{t-1} + k_t v_t^T,  o_t = q_t S_t.

The scores are A_ij = sum_d q_id k_jd exp(G_i - G_j)_d for j <= i, with G the cumulated g. Where no channel decays by
more than e^-60 over a chunk (mild decays), one product gives them all. Otherwise a chunk is cut into stretches of a few
tokens: pairs within a stretch take an exponential each, pairs of two stretches a product for each stretch. Gradients
have one shape in both ways. Derivation: docs/design/derivations/decays.md.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..core.monoid import DECAY, Affine
from ..core.recurrence import Recurrence
from ..core.typing import Inputs
from . import _decay, _scalar
from ._products import inner, outer, product
from ._rows import branch

# e^60 = 1e26, and e^-60, leave float32 twelve decimal orders for what they multiply.
MILD_DECAY = 60.0
STRETCH = 8  # tokens


class Decayed(NamedTuple):
    """Vectors that read the state, and vectors that write into it, under decays g `[C, K]`.

    `scores[a][b]` is what the reads a find of the writes b, `sum_d r_id w_jd exp(g_{j+1} + ... + g_i)_d`, and zero
    above the diagonal.
    """

    scores: list[list[jax.Array]]  # [C, C] each
    reads: list[jax.Array]  # [C, K] each, times the decay since the chunk's entry
    writes: list[jax.Array]  # [C, K] each, times the decay until the chunk's exit
    since_entry: jax.Array  # [C, K] what each token finds left of the state that enters


def element(x: Inputs) -> Affine:
    return Affine(x["g"][:, None], x["k"][:, None] * x["v"][None, :])


def mild(x: Inputs) -> jax.Array:
    """Whether no channel decays by more than e^-MILD_DECAY over any chunk of a group, with `g [B, N, C, HV, K]`.

    NaN counts as mild, so that a token that is not finite does not change how others are rounded.
    """
    return ~jnp.any(x["g"].sum(2) < -MILD_DECAY)


# ---- scores


@jax.custom_vjp
def decayed(mild: jax.Array, reads: Sequence[jax.Array], writes: Sequence[jax.Array], g: jax.Array) -> Decayed:
    """Reads and writes, each `[C, K]`, under the decays of log-decays `g [C, K]`; `mild` chooses between two ways that
    are both exact."""
    return branch(mild, _mild, _general, list(reads), list(writes), g)


def _forward(mild, reads, writes, g):
    result = decayed(mild, reads, writes, g)
    return result, (mild, list(reads), list(writes), g, result)


def _backward(residuals, d: Decayed):
    """The gradient of the cumulated decays follows from the gradients of reads and writes: dG = R dR - W dW.

    The pair of a token with itself does not decay. It is left out of dR and dW here and added to them afterwards,
    because its two contributions to dG would cancel only up to rounding.
    """
    mild, reads, writes, g, result = residuals
    strict = d._replace(scores=jax.tree.map(lambda s: jnp.tril(s, -1), d.scores))
    d_reads, d_writes, d_sums = branch(mild, _mild_pull, _general_pull, reads, writes, g, result, strict)
    itself = [[jnp.diagonal(s)[:, None] for s in row] for row in d.scores]
    through_exit = sum(map(jnp.multiply, result.writes, d.writes), jnp.zeros_like(g))
    (d_g,) = jax.linear_transpose(_decay.running_sum, g)(d_sums)
    d_g += _decay.running_sum(jnp.concatenate([jnp.zeros_like(g[:1]), through_exit[:-1]]))
    d_g = jnp.where(g < _decay.bounded(g), 0, d_g)
    d_reads = [sum(map(jnp.multiply, row, writes), d_r) for row, d_r in zip(itself, d_reads, strict=True)]
    d_writes = [sum(map(jnp.multiply, c, reads), w) for c, w in zip(zip(*itself, strict=True), d_writes, strict=True)]
    return None, d_reads, d_writes, d_g


decayed.defvjp(_forward, _backward)


def _mild(reads: list, writes: list, g: jax.Array) -> Decayed:
    """Decays count from the chunk's entry, not from its middle, so that not even rounding depends on later tokens."""
    since_entry = jnp.exp(_decay.running_sum(g))
    grown = 1 / since_entry  # costs less than a second exponential
    entered, left = [r * since_entry for r in reads], [w * grown for w in writes]
    scores = [[jnp.tril(inner(r, w)) for w in left] for r in entered]
    return Decayed(scores, entered, [w * since_entry[-1] for w in left], since_entry)


def _mild_pull(reads: list, writes: list, g: jax.Array, result: Decayed, d: Decayed):
    since_entry = result.since_entry
    grown = 1 / since_entry
    left = [w * grown for w in writes]
    d_entered = [sum(map(product, row, left), own) for row, own in zip(d.scores, d.reads, strict=True)]
    d_left = [sum(map(outer, column, result.reads)) for column in zip(*d.scores, strict=True)]
    d_sums = sum(map(jnp.multiply, result.reads, d_entered), d.since_entry * since_entry)
    d_sums -= sum(map(jnp.multiply, left, d_left))
    d_writes = [grown * (a + b * since_entry[-1]) for a, b in zip(d_left, d.writes, strict=True)]
    return [since_entry * x for x in d_entered], d_writes, d_sums


class _Stretches(NamedTuple):
    """The decays of a chunk that is cut into m stretches of h tokens."""

    near: jax.Array  # [m, h, h, K] within a stretch, from its token j to its token i; zero for j > i
    later: jax.Array  # [m, h, K] from a stretch's start to each of its tokens
    earlier: (
        jax.Array
    )  # [m, C, K] from each token of the chunk to a stretch's start; zero from tokens that are not before it


def _stretches(g: jax.Array) -> tuple[_decay.Cumulated, _Stretches]:
    size = g.shape[0]
    h = min(STRETCH, size)
    sums = _decay.cumulated(_decay.bounded(g))
    cut = _decay.Cumulated(tuple(x.reshape(-1, h, x.shape[-1]) for x in sums.parts))
    inside = cut.at((slice(None), slice(None), None)).minus(cut.at((slice(None), None)))
    inside = jnp.where(jnp.tril(jnp.ones((h, h), bool))[..., None], inside, _decay.EMPTY)
    # The sums over all tokens before each stretch. There are none before the first.
    start = _decay.Cumulated(tuple(jnp.pad(x[:-1, -1:], ((1, 0), (0, 0), (0, 0))) for x in cut.parts))
    before = jnp.arange(size) < h * jnp.arange(size // h)[:, None]
    earlier = jnp.where(before[..., None], start.minus(sums), _decay.EMPTY)
    return sums, _Stretches(jnp.exp(inside), jnp.exp(cut.minus(start)), jnp.exp(earlier))


def _cut(x: jax.Array, like: _Stretches) -> jax.Array:
    return x.reshape(*like.later.shape[:2], x.shape[-1])


def _on_diagonal(blocks: jax.Array) -> jax.Array:
    """`[m, h, h]` -> `[m, h, C]`: the scores within stretch n stand in that stretch's columns, zeros elsewhere."""
    m, h, _ = blocks.shape
    return (blocks[:, :, None, :] * jnp.eye(m, dtype=blocks.dtype)[:, None, :, None]).reshape(m, h, m * h)


def _own_blocks(scores: jax.Array, h: int) -> jax.Array:
    """`[C, C]` -> `[m, h, h]`: the scores within each stretch."""
    m = scores.shape[0] // h
    return (scores.reshape(m, h, m, h) * jnp.eye(m, dtype=scores.dtype)[:, None, :, None]).sum(2)


def _general(reads: list, writes: list, g: jax.Array) -> Decayed:
    sums, decays = _stretches(g)
    since_entry, until_exit = jnp.exp(sums.since_entry), _until_exit(sums)

    def scores(r, w):
        near = (_cut(r, decays)[:, :, None] * _cut(w, decays)[:, None] * decays.near).sum(-1)
        far = jax.vmap(inner)(_cut(r, decays) * decays.later, w * decays.earlier)
        return (_on_diagonal(near) + far).reshape(r.shape[0], -1)

    table = [[scores(r, w) for w in writes] for r in reads]
    return Decayed(table, [r * since_entry for r in reads], [w * until_exit for w in writes], since_entry)


def _general_pull(reads: list, writes: list, g: jax.Array, result: Decayed, d: Decayed):
    sums, decays = _stretches(g)
    d_reads = [own * result.since_entry for own in d.reads]
    d_writes = [jnp.zeros_like(w) for w in writes]
    for a, r in enumerate(reads):
        for b, w in enumerate(writes):
            own, rows = _own_blocks(d.scores[a][b], decays.near.shape[1])[..., None], _cut(d.scores[a][b], decays)
            near, read = own * decays.near, _cut(r, decays) * decays.later
            d_read = jax.vmap(product)(rows, w * decays.earlier) * decays.later
            d_reads[a] += ((near * _cut(w, decays)[:, None]).sum(2) + d_read).reshape(r.shape)
            d_written = (jax.vmap(outer)(rows, read) * decays.earlier).sum(0)
            d_writes[b] += (near * _cut(r, decays)[:, :, None]).sum(1).reshape(w.shape) + d_written
    d_sums = sum(map(jnp.multiply, reads, d_reads), d.since_entry * result.since_entry)
    d_sums -= sum(map(jnp.multiply, writes, d_writes))
    until_exit = _until_exit(sums)
    return d_reads, [a + b * until_exit for a, b in zip(d_writes, d.writes, strict=True)], d_sums


def _until_exit(sums: _decay.Cumulated) -> jax.Array:
    return jnp.exp(sums.at(slice(-1, None)).minus(sums))


# ---- the chunk form


def one_earlier(x: jax.Array) -> jax.Array:
    """The rows of `x [..., C, K]` moved to the token before theirs; the last row becomes zero.

    A vector that reads the state before its token reads the state after the token before. There it meets the same
    sums of decays as every other vector.
    """
    return jnp.concatenate([x[..., 1:, :], jnp.zeros_like(x[..., :1, :])], axis=-2)


def one_later(x: jax.Array, first: jax.Array | None = None) -> jax.Array:
    """The rows moved back to the token after theirs; `first [..., 1, K]` becomes the first row, or zeros if None."""
    first = jnp.zeros_like(x[..., :1, :]) if first is None else first
    return jnp.concatenate([first, x[..., :-1, :]], axis=-2)


class Factors(NamedTuple):
    """What a chunk gives without the state. The product of scores and values is left to `readout`: on several devices
    it can run while a state is on its way."""

    reads: jax.Array  # [C, K] queries, times the decay since the chunk's entry
    scores: jax.Array  # [C, C] of queries on keys, decayed, causal
    v: jax.Array  # [C, V]
    decay: jax.Array  # [K, 1] what the chunk leaves of the entering state
    offset: jax.Array  # [K, V] what the chunk's tokens add to it


def readout(factors: Factors, state: jax.Array) -> jax.Array:
    return product(factors.scores, factors.v) + product(factors.reads, state)


def factors(reads: jax.Array, scores: jax.Array, v: jax.Array, decayed: Decayed, docs) -> Factors:
    """From the decayed queries `[C, K]` and the masked scores `[C, C]`."""
    writes = _decay.leaving(decayed.writes[0], docs)
    return Factors(_decay.entering(reads, docs), scores, v, decay_to_exit(decayed, docs), outer(writes, v))


def decay_to_exit(decayed: Decayed, docs: _decay.Documents | None) -> jax.Array:
    """`[K, 1]`: what the chunk leaves of the entering state."""
    return _decay.entering(decayed.since_entry, docs)[-1][:, None]


def _prepare(x: Inputs, keep: jax.Array | None, mild: jax.Array) -> Factors:
    docs = _decay.documents(keep)
    d = decayed(mild, [x["q"]], [x["k"]], x["g"])
    return factors(d.reads[0], _decay.within(d.scores[0][0], docs), x["v"], d, docs)


DIAGONAL_DECAY = Recurrence(
    name="diagonal_decay",
    fields={"q": "H K", "k": "H K", "v": "HV V", "g": "HV K"},
    element=element,
    output=_scalar.output,
    monoid=DECAY,
    init_state=_scalar.init_state,
    prepare=_prepare,
    advance=_scalar.advance,
    readout=readout,
    decide=mild,
    shares_heads=False,
)
