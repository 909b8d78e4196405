"""LightNet, additive: S_t = sum_{j<=t} exp(k_j - z_t) v_j^T,  z_t = log sum_{j<=t} exp k_j,  o_t = q_t S_t.

Every key channel holds a softmax over the tokens seen, of their values. k is raw: logits of any size, and -1e30 masks
its token. Nothing depends on the order of the past, so `causal=False` needs no second scan: every token reads the
softmax over its whole document. The state is the pair (z, S), z = -1e30 where nothing was seen; two of them merge by
`logaddexp`.

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
from ..core.recurrence import Recurrence, Shortcut
from ..core.typing import Inputs
from . import _decay, _scalar
from ._bidirectional import undecayed
from ._normalised import EMPTY
from ._products import inner, outer, product

# Where all keys of a chunk are this near to its first one, per channel, one matrix product gives the scores: their
# exponentials, and the inverse squares of those in the gradient, are float32s.
MILD_KEYS = 30.0


class Mild(NamedTuple):
    """Factors relative to the chunk's first key."""

    q: jax.Array  # [C, K]
    v: jax.Array  # [C, V]
    keys: jax.Array  # [C, K] exp(k - first)
    sums: jax.Array  # [C, K] of these, over the document's tokens up to this one
    first: jax.Array  # [K]
    same: jax.Array | None  # [C, C] 1 within a document
    entry: jax.Array | None  # [C, 1] 1 where the token belongs to the document of the entering state
    through: jax.Array | None  # (1,) log: 0, or EMPTY when a document starts
    exit: tuple[jax.Array, jax.Array]  # (z, S) of the chunk's own tokens


class Levels(NamedTuple):
    """Factors by halves, relative to the sum of the earlier half: for keys of any size."""

    q: jax.Array
    v: jax.Array
    k: jax.Array  # [C, K]
    total: jax.Array  # [C, K] z of the chunk's own tokens up to this one
    keys: tuple[jax.Array, ...]  # per level [m, h, K]: exp(k - middle) of the earlier halves
    middles: tuple[jax.Array, ...]  # per level [m, 1 or h, K]: z of the earlier half as the later tokens see it
    same: jax.Array | None
    entry: jax.Array | None
    through: jax.Array | None
    exit: tuple[jax.Array, jax.Array]


def _merge(earlier, later):
    """Two softmaxes over disjoint tokens as one."""
    total = jnp.logaddexp(earlier[0], later[0])
    old, new = jnp.exp(earlier[0] - total), jnp.exp(later[0] - total)
    return total, old[:, None] * earlier[1] + new[:, None] * later[1]


def _nothing(state):
    return jnp.full_like(state[0], EMPTY), jnp.zeros_like(state[1])


def _present(k: jax.Array) -> jax.Array:
    """1, or 0 where the key masks its token."""
    return (k > EMPTY / 2).astype(k.dtype)


def _element(x: Inputs):
    return x["k"], _present(x["k"])[:, None] * x["v"][None, :]


def _masks(docs: _decay.Documents | None, dtype):
    """same, entry and through of the factors: floats, so that the backward pass can pull back through them."""
    if docs is None:
        return None, None, None
    through = jnp.where(docs.through, 0, EMPTY).astype(dtype)[None]
    return docs.same.astype(dtype), docs.entry.astype(dtype)[:, None], through


def _prepare_mild(x: Inputs, keep: jax.Array | None) -> Mild:
    k, v, docs = x["k"], x["v"], _decay.documents(keep)
    first = lax.stop_gradient(k[0])
    keys = jnp.exp(k - first) * _present(k)
    ones = _decay.causal(jnp.ones((k.shape[0], k.shape[0]), k.dtype), docs)
    sums = jnp.matmul(ones, keys, precision=lax.Precision.HIGHEST)
    last = jnp.where(sums[-1] > 0, sums[-1], 1)
    total = jnp.where(sums[-1] > 0, first + jnp.log(last), EMPTY)
    mean = outer(_decay.leaving(keys, docs), v) / last[:, None]
    return Mild(x["q"], v, keys, sums, first, *_masks(docs, k.dtype), (total, mean))


def _prepare(x: Inputs, keep: jax.Array | None) -> Levels:
    k, v, docs = x["k"], x["v"], _decay.documents(keep)
    count = None if keep is None else jnp.cumsum(~keep)
    total, keys, middles = k[:, None], [], []  # of blocks of one token
    while total.shape[0] > 1:
        left, right = total[0::2], total[1::2]
        middle = left[:, -1:]
        own, reach = _halves(k, left.shape[1])[0], lax.stop_gradient(middle)
        logs = own - reach
        joined = jnp.logaddexp(right, middle)
        if count is not None:  # the middle is one document's: that of the earlier half's last token
            earlier, later = _halves(count[:, None], left.shape[1])
            earlier, later = earlier == earlier[:, -1:], later == earlier[:, -1:]
            logs, reach = jnp.where(earlier, logs, EMPTY), jnp.where(later, reach, EMPTY)
            joined = jnp.where(later, joined, right)
        keys.append(jnp.exp(logs) * _present(own))
        middles.append(reach)
        total = jnp.concatenate([left, joined], axis=1)
    total = total[0]
    logs = k - total[-1]
    writes = jnp.exp(logs if docs is None else jnp.where(docs.exit[:, None], logs, EMPTY)) * _present(k)
    exits = total[-1], outer(writes, v)
    return Levels(x["q"], v, k, total, tuple(keys), tuple(middles), *_masks(docs, k.dtype), exits)


def _halves(x: jax.Array, h: int) -> tuple[jax.Array, jax.Array]:
    """The earlier and later halves `[m, h, ...]` of consecutive blocks of 2h tokens."""
    x = x.reshape(-1, 2, h, *x.shape[1:])
    return x[:, 0], x[:, 1]


def _mild(x: Inputs) -> jax.Array:
    """NaN counts as mild: a broken token must not change how others are rounded."""
    far = jnp.abs(x["k"] - x["k"][:, :, :1]) > MILD_KEYS
    return ~jnp.any(far & (x["k"] > EMPTY / 2))


def _advance(factors: Mild | Levels, state):
    total, mean = state
    return _merge((total if factors.through is None else total + factors.through, mean), factors.exit), None


def _readout_mild(factors: Mild, state) -> jax.Array:
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


def _readout(factors: Mild | Levels, state) -> jax.Array:
    if isinstance(factors, Mild):
        return _readout_mild(factors, state)
    q, (before, mean) = factors.q, state
    if factors.entry is not None:
        before = jnp.where(factors.entry > 0, before, EMPTY)
    total = jnp.logaddexp(factors.total, before)
    scores = jnp.zeros((q.shape[0], 1, 1), q.dtype)
    for keys, middle in zip(factors.keys, factors.middles, strict=True):
        later = _halves(q, keys.shape[1])[1] * jnp.exp(middle - _halves(total, keys.shape[1])[1])
        scores = _decay.assemble(scores, jnp.einsum("mid,mjd->mij", later, keys))
    itself = (q * _present(factors.k) * jnp.exp(factors.k - total)).sum(-1)
    scores = scores[0] if factors.same is None else scores[0] * factors.same
    return (q * jnp.exp(before - total)) @ mean + (scores + jnp.diag(itself)) @ factors.v


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
    prepare=_prepare,
    advance=_advance,
    readout=_readout,
    shortcuts=(Shortcut(_mild, _prepare_mild),),
)


def _document_totals(k: jax.Array, reset: jax.Array | None) -> jax.Array:
    """`[B, T, H, K]`, or `[B, 1, H, K]` for one document: the log of the sum of exp k over each token's document."""
    if reset is None:
        return jax.nn.logsumexp(k, axis=1, keepdims=True)
    segments = jnp.cumsum(reset, axis=1)

    def row(k, segments):
        top = lax.stop_gradient(jax.ops.segment_max(k, segments, k.shape[0])[segments])
        return top + jnp.log(jax.ops.segment_sum(jnp.exp(k - top), segments, k.shape[0])[segments])

    return jax.vmap(row)(k, segments)


def _bidirectional(scale, chunk_size, xs: Inputs, reset, state, blocks):
    """Linear attention over the document with keys that a softmax over its tokens has normalised."""
    v, (before, mean) = xs["v"], state
    repeat = lambda x: jnp.repeat(x.astype(compute_dtype(xs)), v.shape[2] // x.shape[2], axis=2)  # noqa: E731
    q, k = repeat(xs["q"]), repeat(xs["k"])
    total = _document_totals(k, reset)
    joined = jnp.logaddexp(total, before[:, None])
    if reset is not None:
        joined = jnp.where((jnp.cumsum(reset, axis=1) == 0)[..., None, None], joined, total)
    mean = jnp.exp(before - joined[:, 0])[..., None] * mean
    keys = jnp.exp(k - joined) * _present(k)
    mean, o = undecayed(scale, chunk_size, {"q": q, "k": keys, "v": v}, reset, mean, None)
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
