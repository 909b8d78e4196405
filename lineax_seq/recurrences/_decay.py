"""Cumulated log-decays of a chunk, whose differences do not cancel, and the masks of its documents.

Token j reaches token i >= j through exp(G_i - G_j), with G the cumulated log-decays of the chunk. Every log-decay is
split into a multiple of 1/256, whose sums and differences are exact in float32, and a rest of at most 1/512, whose sums
are too small for their rounding to matter. Derivation: docs/design/derivations/decays.md.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

EMPTY = -1e30  # the log of nothing: finite, so that EMPTY - EMPTY is 0 and not NaN
STAGE = 8  # tokens that the first stage of a cumulative sum adds up
# Log-decays are split into multiples of these steps. 512 times the lowest decay is below 2^24 fine steps, which is what
# float32 adds exactly.
STEPS = {"decay": (1 / 256,), "weight": (4096.0, 8.0, 1 / 256)}
LOWEST = {"decay": -110.0, "weight": -1e8}  # exp(-110) is zero in float32


class Cumulated(NamedTuple):
    """Sums of log-decays `[C, ...]` from the chunk's first token to each one, both included. They are kept as parts,
    the one with the largest steps first."""

    parts: tuple[jax.Array, ...]

    @property
    def since_entry(self) -> jax.Array:
        """The log of what each token finds left of the state that enters the chunk."""
        return sum(self.parts[1:], self.parts[0])

    def minus(self, other: "Cumulated") -> jax.Array:
        """The log-decay from the tokens of `other` to these."""
        first, *rest = (a - b for a, b in zip(self.parts, other.parts, strict=True))
        return sum(rest, first)

    def at(self, index) -> "Cumulated":
        return Cumulated(tuple(part[index] for part in self.parts))


def bounded(g: jax.Array, of: str = "decay") -> jax.Array:
    """Log-decays no lower than the lowest that makes a difference. Gradients of those below are zero.

    Args:
        of: "decay" where only exponentials of sums matter: a gate whose exponential is zero need not be lower. "weight"
            where a large weight may make up for a closed gate, as in mLSTM: there it matters down to -1e8 how closed a
            gate is.
    """
    return jnp.maximum(g, LOWEST[of] if jnp.finfo(g.dtype).bits <= 32 else 7 * LOWEST[of])


def cumulated(g: jax.Array, of: str = "decay") -> Cumulated:
    """The cumulated log-decays of `g [C, ...]`, which is `bounded`."""
    rest, parts = g, []
    for step in STEPS[of]:
        parts.append(lax.stop_gradient(jnp.round(rest / step) * step))
        rest -= parts[-1]
    sums = running_sum(jnp.stack([*parts, rest], axis=1))
    return Cumulated(tuple(sums[:, n] for n in range(sums.shape[1])))


def until_exit(g: jax.Array) -> jax.Array:
    """The log of what the chunk's exit finds left of what each token writes: the sum of `g` over later tokens."""
    return jnp.flip(running_sum(jnp.flip(jnp.concatenate([g[1:], jnp.zeros_like(g[:1])]), 0)), 0)


def running_sum(x: jax.Array) -> jax.Array:
    """The sums of `x [C, ...]` over the tokens up to each one, by products with matrices of ones.

    Where there are channels, there are two stages: sums over `STAGE` tokens, and over what came before these. That
    takes a fraction of the multiplications.
    """
    size = x.shape[0]
    ones = lambda n, diagonal: jnp.tril(jnp.ones((n, n), x.dtype), diagonal)  # noqa: E731
    if x.ndim < 3 and x[0].size < STAGE:
        return jnp.tensordot(ones(size, 0), x, 1, precision=lax.Precision.HIGHEST)
    stage = min(STAGE, size)
    parts = x.reshape(-1, stage, *x.shape[1:])
    own = jnp.einsum("ij,mj...->mi...", ones(stage, 0), parts, precision=lax.Precision.HIGHEST)
    before = jnp.einsum("mn,n...->m...", ones(size // stage, -1), own[:, -1], precision=lax.Precision.HIGHEST)
    return (own + before[:, None]).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def pair_logs(g: jax.Array, of: str = "decay") -> jax.Array:
    """`[C, C]`: the sum of the log-decays `g [C]` over the tokens after j up to i; zero for j >= i.

    The gradient of a gate is summed over the pairs that it lies between, and over no others. A difference of cumulative
    sums would leave their rounding errors in gradients that strong decays make small.
    """
    sums = cumulated(g, of)
    logs = sums.at((slice(None), None)).minus(sums.at((None, slice(None))))
    return jnp.where(jnp.tril(jnp.ones(logs.shape, bool), -1), logs, 0)


def _pair_logs_backward(of: str, size: int, d_logs: jax.Array) -> tuple[jax.Array]:
    ones = jnp.ones((size, size), d_logs.dtype)
    later = jnp.matmul(jnp.triu(ones), jnp.tril(d_logs, -1), precision=lax.Precision.HIGHEST)  # sums over i >= t
    return (jnp.tril(later, -1).sum(1),)


pair_logs.defvjp(lambda g, of: (pair_logs(g, of), g.shape[0]), _pair_logs_backward)


class PerHead(NamedTuple):
    """The decays of a chunk whose channels share them: what is left of one thing at another place."""

    since_entry: jax.Array  # [C] of the state that enters the chunk, at each token
    until_exit: jax.Array  # [C] of what each token writes, at the chunk's exit
    logs: jax.Array  # [C, C] of what token j writes, at token i: the logarithm; zero for j >= i

    def pairs(self, docs: "Documents | None") -> jax.Array:
        """`[C, C]`: what token i finds left of what token j wrote; zero for j > i and between documents."""
        return jnp.where(causal_pairs(self.logs.shape[0], docs), jnp.exp(self.logs), 0)


def per_head(g: jax.Array) -> PerHead:
    """The decays between the tokens of a chunk with log-decays `g [C]`."""
    g = bounded(g)
    return PerHead(jnp.exp(running_sum(g)), jnp.exp(until_exit(g)), pair_logs(g))


def causal_pairs(size: int, docs: "Documents | None") -> jax.Array:
    """bool `[C, C]`: token j is token i itself, or an earlier token of its document."""
    return jnp.tril(jnp.ones((size, size), bool) if docs is None else docs.same)


def assemble(diagonal: jax.Array, lower: jax.Array) -> jax.Array:
    """`[m, 2h, 2h]`: pairs of the squares `diagonal [2m, h, h]` with `lower [m, h, h]` below, and zeros above."""
    pairs = diagonal.reshape(-1, 2, *diagonal.shape[1:])
    top = jnp.concatenate([pairs[:, 0], jnp.zeros_like(lower)], axis=2)
    return jnp.concatenate([top, jnp.concatenate([lower, pairs[:, 1]], axis=2)], axis=1)


class Documents(NamedTuple):
    """The masks of a chunk in which documents start. Where rows hold one document, None stands for this record."""

    same: jax.Array  # [C, C] both tokens belong to one document
    entry: jax.Array  # [C] the token belongs to the document of the state that enters the chunk
    exit: jax.Array  # [C] the token belongs to the document of the state that leaves the chunk
    through: jax.Array  # () no document starts in the chunk, so that the entering state reaches its exit


def documents(keep: jax.Array | None) -> Documents | None:
    """The masks for `keep [C]`, which is False where a document starts."""
    if keep is None:
        return None
    count = jnp.cumsum(~keep)
    return Documents(count[:, None] == count[None, :], count == 0, count == count[-1], count[-1] == 0)


def entering(x: jax.Array, docs: Documents | None) -> jax.Array:
    """`x [C, ...]` with zeros from the first document start on: for what reads the state that enters."""
    return x if docs is None else mask(x, docs.entry)


def leaving(x: jax.Array, docs: Documents | None) -> jax.Array:
    """`x [C, ...]` with zeros before the last document start: for what writes into the state that leaves."""
    return x if docs is None else mask(x, docs.exit)


def mask(x: jax.Array, kept: jax.Array) -> jax.Array:
    """`x [C, ...]` with zeros in the rows that are not `kept [C]`."""
    return jnp.where(kept.reshape(kept.shape + (1,) * (x.ndim - kept.ndim)), x, 0)


def within(scores: jax.Array, docs: Documents | None) -> jax.Array:
    """Scores `[C, C]` with zeros between tokens of different documents."""
    return scores if docs is None else jnp.where(docs.same, scores, 0)


def causal(scores: jax.Array, docs: Documents | None, strict: bool = False) -> jax.Array:
    """Scores `[C, C]` with zeros above the diagonal, between documents and, if `strict`, on the diagonal."""
    return within(jnp.tril(scores, -1 if strict else 0), docs)
