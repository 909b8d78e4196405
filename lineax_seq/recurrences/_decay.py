"""Cumulated log-decays of a chunk whose differences do not cancel, and the masks of its documents.

Within a chunk, token j reaches token i >= j through the product of the decays of j+1..i, which is exp(G_i - G_j) with G
the cumulated log-decays. Taken plainly, that difference cancels: after one gate of -1e4 all later ratios of the chunk
have lost three digits. So every log-decay is split into a multiple of 1/256 and a rest of at most 1/512. Sums of the
former are exact in float32, and so are their differences; sums of the latter stay below 1, so that their rounding
errors do too.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

EMPTY = -1e30  # the log of nothing: finite, so that EMPTY - EMPTY is 0 and not NaN
STAGE = 8  # tokens that the first stage of a cumulative sum adds up
# What log-decays are split into multiples of, and the lowest that count: 512 of them are 24 bits of multiples.
FINE_STEP, COARSE_STEP = 1 / 256, 4096.0
LOWEST = {"decay": -110.0, "weight": -1e8}  # exp(-110) is zero in float32


class Cumulated(NamedTuple):
    """Log-decays `[C, ...]` summed from the chunk's first token to each one, both included, in parts, largest first."""

    parts: tuple[jax.Array, ...]

    @property
    def since_entry(self) -> jax.Array:
        """The log of what is left, at each token, of the state that enters the chunk."""
        return sum(self.parts[1:], self.parts[0])

    def minus(self, other: "Cumulated") -> jax.Array:
        """The log-decay from the tokens of `other` to these."""
        first, *rest = (a - b for a, b in zip(self.parts, other.parts, strict=True))
        return sum(rest, first)

    def at(self, index) -> "Cumulated":
        return Cumulated(tuple(part[index] for part in self.parts))


def bounded(g: jax.Array, of: str = "decay") -> jax.Array:
    """Log-decays, closed ones at the lowest that counts; their gradients are zero.

    Args:
        of: "decay" where only exponentials of sums count, so that a gate whose exponential is zero may as well be less
            closed than it is. "weight" where a weight may make up for what a gate closes, as in mLSTM: closed gates
            stay apart down to -1e8.
    """
    return jnp.maximum(g, LOWEST[of] if jnp.finfo(g.dtype).bits <= 32 else 7 * LOWEST[of])


def cumulated(g: jax.Array, of: str = "decay") -> Cumulated:
    """Sums of `bounded` log-decays `g [C, ...]`."""
    rest, parts = g, []
    for step in (COARSE_STEP, FINE_STEP) if of == "weight" else (FINE_STEP,):
        parts.append(lax.stop_gradient(jnp.round(rest / step) * step))
        rest -= parts[-1]
    sums = running_sum(jnp.stack([*parts, rest], axis=1))
    return Cumulated(tuple(sums[:, n] for n in range(sums.shape[1])))


def until_exit(g: jax.Array) -> jax.Array:
    """The log of what is left, at the chunk's exit, of what each token writes: the sum of `g` over later tokens."""
    return jnp.flip(running_sum(jnp.flip(jnp.concatenate([g[1:], jnp.zeros_like(g[:1])]), 0)), 0)


def running_sum(x: jax.Array) -> jax.Array:
    """Sums over the tokens so far of `x [C, ...]`, by products with ones.

    Of channels in two stages, of a few tokens and of what came before these: a fraction of the products.
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
    """`[C, C]`: the log-decay from token j to a later token i, of log-decays `g [C]`; zero for j >= i.

    Its gradient sums, for each gate, the pairs that it lies between, and no others: the difference of two cumulative
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
    """What is left of a state whose channels share their decays."""

    since_entry: jax.Array  # [C] at each token, of the state that enters the chunk
    until_exit: jax.Array  # [C] at the chunk's exit, of what each token writes
    logs: jax.Array  # [C, C] the log of what is left at token i of what token j wrote, zero for j >= i

    def pairs(self, docs: "Documents | None") -> jax.Array:
        """`[C, C]`: what is left at token i of what token j wrote; zero for j > i and between documents."""
        return jnp.where(causal_pairs(self.logs.shape[0], docs), jnp.exp(self.logs), 0)


def per_head(g: jax.Array) -> PerHead:
    """Of log-decays `g [C]`."""
    g = bounded(g)
    return PerHead(jnp.exp(running_sum(g)), jnp.exp(until_exit(g)), pair_logs(g))


def causal_pairs(size: int, docs: "Documents | None") -> jax.Array:
    """bool `[C, C]`: token j is token i or earlier in its document."""
    return jnp.tril(jnp.ones((size, size), bool) if docs is None else docs.same)


def assemble(diagonal: jax.Array, lower: jax.Array) -> jax.Array:
    """Diagonal blocks `[2m, h, h]` and the blocks below them `[m, h, h]` -> `[m, 2h, 2h]`, zero above."""
    pairs = diagonal.reshape(-1, 2, *diagonal.shape[1:])
    top = jnp.concatenate([pairs[:, 0], jnp.zeros_like(lower)], axis=2)
    return jnp.concatenate([top, jnp.concatenate([lower, pairs[:, 1]], axis=2)], axis=1)


class Documents(NamedTuple):
    """Masks of a chunk that document starts cut; None everywhere when there are none."""

    same: jax.Array  # [C, C] both tokens in one document
    entry: jax.Array  # [C] the token still belongs to the document of the state that enters
    exit: jax.Array  # [C] the token belongs to the document of the state that leaves
    through: jax.Array  # () no document starts: the entering state reaches the end


def documents(keep: jax.Array | None) -> Documents | None:
    """The masks for `keep [C]` (False where a document starts)."""
    if keep is None:
        return None
    count = jnp.cumsum(~keep)
    return Documents(count[:, None] == count[None, :], count == 0, count == count[-1], count[-1] == 0)


def entering(x: jax.Array, docs: Documents | None) -> jax.Array:
    """`x [C, ...]`, of which zero is left after a document's start: what reads the entering state."""
    return x if docs is None else mask(x, docs.entry)


def leaving(x: jax.Array, docs: Documents | None) -> jax.Array:
    """`x [C, ...]`, of which zero is left before a document's start: what writes into the leaving state."""
    return x if docs is None else mask(x, docs.exit)


def mask(x: jax.Array, kept: jax.Array) -> jax.Array:
    """Rows of `x [C, ...]` set to zero where not kept."""
    return jnp.where(kept.reshape(kept.shape + (1,) * (x.ndim - kept.ndim)), x, 0)


def within(scores: jax.Array, docs: Documents | None) -> jax.Array:
    """Scores `[C, C]` of which zero is left between documents."""
    return scores if docs is None else jnp.where(docs.same, scores, 0)


def causal(scores: jax.Array, docs: Documents | None, strict: bool = False) -> jax.Array:
    """Scores `[C, C]` below the diagonal (and on it unless strict), within documents."""
    return within(jnp.tril(scores, -1 if strict else 0), docs)
