"""LightNet, additive: S_t = sum_{j<=t} exp(k_j - z_t) v_j^T,  z_t = log sum_{j<=t} exp k_j,  o_t = q_t S_t.

Every key channel holds a mean of the values seen, weighted by the softmax of the keys. k is raw: logits of any size,
and -1e30 masks its token. Nothing depends on the order of the past, so with `causal=False` every token reads the
softmax over its whole document, in one pass. The state is the pair (z, S), with z = -1e30 where nothing was seen.

Source: Qin et al. 2024, arXiv:2405.21022, section 3 (additive linear recurrence).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..core.arguments import KEYS, QUERIES, VALUES
from ..core.layout import compute_dtype
from ..core.monoid import Monoid
from ..core.operator import Operator
from ..core.recurrence import Form, Recurrence, Special
from ..core.typing import Inputs
from . import _decay, _scalar
from ._bidirectional import undecayed
from ._decay import EMPTY
from ._products import inner, outer, product

# Where all keys of a chunk are this near to its first one, in every channel, one matrix product gives the scores: the
# exponentials of the differences, and their inverse squares in the gradient, are float32 numbers. Keys of a trained
# model are so near. Others go token by token, which is as exact and takes ten times as long.
# Derivation: docs/design/derivations/lightnet.md.
MILD_KEYS = 30.0


class Factors(NamedTuple):
    """What a chunk gives without the state, relative to its first key."""

    q: jax.Array  # [C, K]
    v: jax.Array  # [C, V]
    keys: jax.Array  # [C, K] exp(k - first)
    sums: jax.Array  # [C, K] of `keys`, over the tokens of the document in this chunk up to each one
    first: jax.Array  # [K]
    same: jax.Array | None  # [C, C] 1 where both tokens belong to one document, else 0
    entry: jax.Array | None  # [C, 1] 1 where the token belongs to the document of the entering state, else 0
    through: jax.Array | None  # (1,) 0, or EMPTY where a document starts in the chunk: added to the entering z
    exit: tuple[jax.Array, jax.Array]  # (z, S) of the chunk's own tokens


def _merge(earlier, later):
    """Two softmaxes over disjoint tokens as one."""
    total = jnp.logaddexp(earlier[0], later[0])
    old, new = jnp.exp(earlier[0] - total), jnp.exp(later[0] - total)
    return total, old[:, None] * earlier[1] + new[:, None] * later[1]


def _nothing(state):
    return jnp.full_like(state[0], EMPTY), jnp.zeros_like(state[1])


def _present(k: jax.Array) -> jax.Array:
    """1, or 0 where a key masks its token."""
    return (k > EMPTY / 2).astype(k.dtype)


def _element(x: Inputs):
    return x["k"], _present(x["k"])[:, None] * x["v"][None, :]


def _masks(docs: _decay.Documents | None, dtype):
    """The masks `same`, `entry` and `through` as floats, because all factors must be differentiable."""
    if docs is None:
        return None, None, None
    through = jnp.where(docs.through, 0, EMPTY).astype(dtype)[None]
    return docs.same.astype(dtype), docs.entry.astype(dtype)[:, None], through


def _prepare(x: Inputs, keep: jax.Array | None) -> Factors:
    k, v, docs = x["k"], x["v"], _decay.documents(keep)
    first = lax.stop_gradient(k[0])
    keys = jnp.exp(k - first) * _present(k)
    ones = _decay.causal(jnp.ones((k.shape[0], k.shape[0]), k.dtype), docs)
    sums = jnp.matmul(ones, keys, precision=lax.Precision.HIGHEST)
    last = jnp.where(sums[-1] > 0, sums[-1], 1)
    total = jnp.where(sums[-1] > 0, first + jnp.log(last), EMPTY)
    mean = outer(_decay.leaving(keys, docs), v) / last[:, None]
    return Factors(x["q"], v, keys, sums, first, *_masks(docs, k.dtype), (total, mean))


def _mild(x: Inputs) -> jax.Array:
    """Whether all keys of a group's chunks are near to the first of their chunk, or mask their token.

    NaN counts as near, so that a token that is not finite does not change how others are rounded.
    """
    far = jnp.abs(x["k"] - x["k"][:, :, :1]) > MILD_KEYS
    return ~jnp.any(far & (x["k"] > EMPTY / 2))


def _advance(factors: Factors, state):
    total, mean = state
    return _merge((total if factors.through is None else total + factors.through, mean), factors.exit), None


def _readout(factors: Factors, state) -> jax.Array:
    total, mean = state
    top = lax.stop_gradient(jnp.maximum(factors.first, total))
    own, old = jnp.exp(factors.first - top), jnp.exp(total - top)
    if factors.entry is not None:
        own, old = jnp.where(factors.entry > 0, own, 1), factors.entry * old
    weight = factors.sums * own + old  # exp(z - top)
    q = factors.q / jnp.where(weight > 0, weight, 1)
    scores = jnp.tril(inner(q * own, factors.keys))
    scores = scores if factors.same is None else scores * factors.same
    return product(q * old, mean) + product(scores, factors.v)


RUNNING_SOFTMAX = Recurrence(
    name="running_softmax",
    fields={"q": "H K", "k": "H K", "v": "HV V"},
    padding={"k": EMPTY},
    element=_element,
    output=lambda x, state, previous: x["q"] @ state[1],
    monoid=Monoid(
        _merge,
        lambda summary, state: _merge(state, summary),
        _nothing,
        total=lambda tokens, state, start: state,
    ),
    init_state=lambda x: (jnp.full_like(x["k"], EMPTY), _scalar.init_state(x)),
    special=Special(_mild, Form(_prepare, _advance, _readout)),
)


def _document_totals(k: jax.Array, reset: jax.Array | None) -> jax.Array:
    """The log of the sum of exp k over each token's document: `[B, T, H, K]`, or `[B, 1, H, K]` for one document."""
    if reset is None:
        return jax.nn.logsumexp(k, axis=1, keepdims=True)
    segments = jnp.cumsum(reset, axis=1)

    def row(k, segments):
        top = lax.stop_gradient(jax.ops.segment_max(k, segments, k.shape[0])[segments])
        return top + jnp.log(jax.ops.segment_sum(jnp.exp(k - top), segments, k.shape[0])[segments])

    return jax.vmap(row)(k, segments)


def _bidirectional(target, scale, chunk_size, xs: Inputs, reset, state, blocks):
    """Linear attention over the whole document, with the softmax of the keys in place of keys."""
    v, (before, mean) = xs["v"], state
    repeat = lambda x: jnp.repeat(x.astype(compute_dtype(xs)), v.shape[2] // x.shape[2], axis=2)  # noqa: E731
    q, k = repeat(xs["q"]), repeat(xs["k"])
    total = _document_totals(k, reset)
    joined = jnp.logaddexp(total, before[:, None])
    if reset is not None:
        joined = jnp.where((jnp.cumsum(reset, axis=1) == 0)[..., None, None], joined, total)
    mean = jnp.exp(before - joined[:, 0])[..., None] * mean
    keys = jnp.exp(k - joined) * _present(k)
    mean, o = undecayed(target, scale, chunk_size, {"q": q, "k": keys, "v": v}, reset, mean, None)
    return (joined[:, -1], mean), o


lightnet = Operator(
    name="lightnet",
    recurrence=RUNNING_SOFTMAX,
    arguments={"q": QUERIES, "k": KEYS, "v": VALUES},
    about=__doc__,
    zero_is_identity=False,  # k = 0 is a key like any other
    bidirectional=_bidirectional,
    order_free=True,
    state="(z [B, HV, K], S [B, HV, K, V])",
)


def lightnet_2d(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = False, **options):
    """`lightnet` over the positions of an image, in one scan: `(o [B, Y, X, HV, V], final state)`.

    Args:
        q, k, v: [B, Y, X, H, K], [B, Y, X, H, K], [B, Y, X, HV, V].
        causal: False: every position reads all of the image. True: positions in reading order, row by row.
        options: scale, initial_state, chunk_size and so on, as `lightnet` takes them; no segment_ids.

    Raises:
        ValueError: shapes or options that do not fit.

    Source: Qin et al. 2024, arXiv:2405.21022, section 3.
    """
    shapes = {name: jnp.shape(x) for name, x in (("q", q), ("k", k), ("v", v))}
    if any(len(shape) != 5 for shape in shapes.values()) or len({shape[:3] for shape in shapes.values()}) != 1:
        got = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(f"lightnet_2d: {got}; wants [B, Y, X, H, K] twice and [B, Y, X, HV, V] on one grid.")
    if options.get("segment_ids") is not None:
        raise ValueError("lightnet_2d: segment_ids: every image is one document; flatten and call lightnet instead.")
    flat = lambda x: jnp.reshape(x, (x.shape[0], -1, *x.shape[3:]))  # noqa: E731
    o, state = lightnet(flat(q), flat(k), flat(v), causal=causal, **options)
    return o.reshape(*shapes["v"][:4], -1), state
