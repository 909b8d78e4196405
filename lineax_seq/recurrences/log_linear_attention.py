"""Log-linear attention: o_t = sum_l s_t^(l) q_t S_t^(l), with a state per level of a Fenwick partition of the past.

For token t, token t itself is on level 0, and an earlier token j on level bitlength(t xor j). So the recent past lies
in small pieces and the distant past in large ones. The state of a level is S^(l) = sum_j exp(g_{j+1} + ... + g_t) k_j
v_j^T over its tokens, with g <= 0 the log-decay of the head. `level_scales` s weighs the L levels. T tokens fill
bitlength(T - 1) + 1 levels; with fewer of them, the last level holds all that is older.

The state is the pair (S, count). S holds the levels above 0, or one where there are no others, because level 0 is empty
between two tokens. Read the number of tokens seen in binary: level l holds 2^(l-1) tokens if bit l-1 is 1, and none if
it is 0. One more token adds 1, and the levels whose bits the carry clears are added up into the next one. `count` is
the number modulo 2^(L-2), the bits of all levels but the last.

Source: Guo et al. 2025, arXiv:2506.04761, sections 2 and 3.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..core.arguments import HEAD_DECAYS, KEYS, QUERIES, VALUES, Argument
from ..core.layout import compute_dtype
from ..core.monoid import Monoid, long_sum
from ..core.operator import Operator
from ..core.recurrence import Form, Recurrence, Special
from ..core.typing import Inputs
from . import _decay
from ._products import inner, outer


class Stretch(NamedTuple):
    """The summary of the tokens at the positions from `first` to `end` - 1 of their document."""

    first: jax.Array  # ()
    end: jax.Array  # (); equal to `first` where there are no tokens
    log_decay: jax.Array  # () the sum of the tokens' log-decays
    states: jax.Array  # [L-1, K, V] what the tokens add, on the levels that they have for position `end`


def _bit_length(n: jax.Array) -> jax.Array:
    n = n.astype(jnp.int32)
    return 32 - jax.lax.clz(n)


def _differing(a: jax.Array, b: jax.Array) -> jax.Array:
    """The level that position a has for position b: the highest bit in which they differ, counted from 1."""
    return _bit_length(a.astype(jnp.int32) ^ b.astype(jnp.int32))


def _occupied(position: jax.Array, levels: int) -> jax.Array:
    """bool `[levels]`: which levels may hold tokens at `position`: those of its bits, and the last one. Others are
    never read, so that they need not be zero."""
    index = jnp.arange(levels)
    return (index == levels - 1) | (position.astype(jnp.int32) >> index & 1 == 1)


def _carry(levels: int, first: jax.Array, end: jax.Array, dtype) -> jax.Array:
    """The matrix `[levels, levels]` that takes the states from position `first` to position `end`.

    Levels below the one on which the positions differ are added to it. For `end = first` it is the identity.
    """
    index = jnp.arange(levels)
    target = jnp.minimum(_differing(first, end) - 1, levels - 1)
    joins = (index[:, None] == target) & (index[None, :] < target)
    stays = (index[:, None] == index[None, :]) & (index[:, None] >= target)
    return ((joins | stays) & _occupied(first, levels)).astype(dtype)


def _carried(states: jax.Array, first: jax.Array, end: jax.Array) -> jax.Array:
    return jnp.tensordot(_carry(states.shape[0], first, end, states.dtype), states, 1)


def _wrapped(end: jax.Array, states: int) -> jax.Array:
    """`end` modulo 2^(states - 1), as the state's count holds it."""
    return jnp.mod(end, 1 << (states - 1))


def _total(tokens: Stretch, state, start: jax.Array) -> Stretch:
    return Stretch(tokens.first[start], tokens.end[-1], long_sum(tokens.log_decay), state[0])


def _states(x: Inputs) -> int:
    """How many levels the state has: all but level 0, which is the token itself; one where there is no other."""
    return max(x["level_scales"].shape[-1] - 1, 1)


def _scales(x: Inputs) -> jax.Array:
    """The scales `[..., L-1]` of the states."""
    return x["level_scales"][..., -_states(x) :]


def _element(x: Inputs) -> Stretch:
    first, states = x["position"], _states(x)
    end = jnp.where(first < 0, first, first + 1)
    alone = jnp.minimum(_differing(first, end) - 1, states - 1)
    token = x["k"][:, None] * x["v"][None, :]
    return Stretch(first, end, x["g"], (jnp.arange(states) == alone).astype(token.dtype)[:, None, None] * token)


def _combine(earlier: Stretch, later: Stretch) -> Stretch:
    none_before, none_after = earlier.first == earlier.end, later.first == later.end
    return Stretch(
        jnp.where(none_before, later.first, earlier.first),
        jnp.where(none_after, earlier.end, later.end),
        earlier.log_decay + later.log_decay,
        jnp.exp(later.log_decay) * _carried(earlier.states, later.first, later.end) + later.states,
    )


def _apply(summary: Stretch, state):
    states, count = state
    new = jnp.exp(summary.log_decay) * _carried(states, summary.first, summary.end) + summary.states
    return new, jnp.where(summary.first == summary.end, count, _wrapped(summary.end, states.shape[0]))


def _identity(state) -> Stretch:
    states, count = state
    return Stretch(count, count, jnp.zeros_like(count), jnp.zeros_like(states))


def _output(x: Inputs, state, previous) -> jax.Array:
    scales = _scales(x) * _occupied(x["position"], _states(x))
    past = jnp.einsum("l,k,lkv->v", scales, x["q"] * jnp.exp(x["g"]), previous[0])
    return past + x["level_scales"][0] * (x["q"] @ x["k"]) * x["v"]


def _init_state(x: Inputs):
    return jnp.zeros((_states(x), x["k"].shape[-1], x["v"].shape[-1]), x["v"].dtype), jnp.zeros_like(x["g"])


class Factors(NamedTuple):
    """What a chunk gives without the state. S counts the states that may hold tokens: all of them, or the last ones,
    those above the levels within an aligned chunk. Derivation: docs/design/derivations/log_linear.md."""

    reads: jax.Array  # [C, K] queries, decayed from the chunk's entry
    weights: jax.Array  # [C, S] scales of the entering states
    intra: jax.Array  # [C, V] what the outputs get of the chunk's own tokens
    carry: jax.Array  # [S, S] the entering states' way to the chunk's exit, with decay
    added: jax.Array  # [S, K, V] what the chunk's tokens add; [K, V] where `place` says on which level
    place: jax.Array | None  # [S] 1 at that level, else 0
    old_count: jax.Array  # () the count that leaves is old_count · (the count that enters) + new_count
    new_count: jax.Array  # ()


def _own_scales(level: jax.Array, scales: jax.Array, known: int) -> jax.Array:
    """`[C, C]`: the scale of the level that a pair of tokens is on, for levels up to `known`; zero for higher ones."""
    zero = jnp.zeros(level.shape, scales.dtype)
    return sum((jnp.where(level == n, scales[:, n : n + 1], 0) for n in range(known + 1)), zero)


def _scale_at(level: jax.Array, scales: jax.Array) -> jax.Array:
    """`[C]`: of each token's scales `[C, L]` that of a level, which is one number or one for each token."""
    levels = scales.shape[-1]
    return (scales * (jnp.minimum(level, levels - 1)[..., None] == jnp.arange(levels))).sum(-1)


def _prepare(x: Inputs, keep: jax.Array | None) -> Factors:
    """Factors of a chunk that begins at any position."""
    d, docs = _decay.per_head(x["g"]), _decay.documents(keep)
    position, scales, states, size = x["position"], x["level_scales"], _states(x), x["position"].shape[0]
    first, known = position[0], min(size.bit_length() - 1, scales.shape[-1] - 1)
    level = jnp.minimum(_differing(position[:, None], position[None, :]), scales.shape[-1] - 1)
    # A chunk crosses at most one multiple of its size. All pairs of tokens on its two sides are on one level.
    crossing = _scale_at(_differing(first, first + (size - 1)), scales)[:, None]
    own = _own_scales(level, scales, known) + jnp.where(level > known, crossing, 0)
    scores = inner(x["q"], x["k"]) * d.pairs(docs) * own
    # For a token, an entering state is on its own level or, if that is lower, on the one where the token's position and
    # the chunk's first position differ.
    parting = _differing(first, position)
    weights = jnp.where(jnp.arange(1, states + 1) >= parting[:, None], _scales(x), _scale_at(parting, scales)[:, None])
    weights = weights * _occupied(first, states)
    since_entry = _decay.entering(d.since_entry, docs)
    reads, through = x["q"] * since_entry[:, None], since_entry[-1]
    writes = x["k"] * _decay.leaving(d.until_exit, docs)[:, None]
    last = position if docs is None else jnp.where(docs.exit, position, -1)
    end = jnp.where(first < 0, first, last.max() + 1)
    exits = jnp.minimum(_differing(end, position) - 1, states - 1)[:, None] == jnp.arange(states)
    added = jnp.einsum("cs,ck,cv->skv", exits.astype(writes.dtype), writes, x["v"])
    carry = _carry(states, first, end, writes.dtype) * through
    empty = (first == end).astype(writes.dtype)
    count = (1 - empty) * _wrapped(end, states)
    return Factors(reads, weights, scores @ x["v"], carry, added, None, empty, count)


def _prepare_aligned(x: Inputs, keep: jax.Array | None) -> Factors:
    """Factors of a chunk that begins at a multiple of its size, whole and of one document. Between such chunks the
    levels within a chunk are empty."""
    enters = jnp.ones((), x["k"].dtype) if keep is None else keep[0].astype(x["k"].dtype)
    d = _decay.per_head(x["g"])
    scales, size = x["level_scales"], x["position"].shape[0]
    known = min(size.bit_length() - 1, scales.shape[-1] - 1)
    token = jnp.arange(size)
    level = jnp.minimum(_differing(token[:, None], token[None, :]), known)
    scores = inner(x["q"], x["k"]) * d.pairs(None) * _own_scales(level, scales, known)
    above = _states(x) - min(size.bit_length() - 1, _states(x) - 1)
    first, through = x["position"][0], enters * d.since_entry[-1]
    # The higher levels are those of a recurrence whose tokens are chunks, so positions are counted in chunks.
    start = jnp.floor(first / size)
    end = jnp.where(first < 0, start, start + 1)
    carry = _carry(above, start, end, through.dtype) * through
    place = jnp.arange(above) == jnp.minimum(_differing(start, end) - 1, above - 1)
    empty = (start == end).astype(through.dtype)
    return Factors(
        reads=x["q"] * d.since_entry[:, None],
        weights=enters * _scales(x)[:, -above:] * _occupied(start, above),
        intra=scores @ x["v"],
        carry=carry,
        added=outer(x["k"] * d.until_exit[:, None], x["v"]),
        place=place.astype(through.dtype),
        old_count=empty,
        new_count=(1 - empty) * _wrapped(first + size, _states(x)),
    )


def _aligned(x: Inputs) -> jax.Array:
    position = x["position"]  # [B, N, C, HV]
    size, first = position.shape[2], position[:, :, :1]
    whole = jnp.all(position == first + jnp.arange(size)[:, None], axis=2) & (first[:, :, 0] % size == 0)
    return jnp.all(whole | jnp.all(position < 0, axis=2))


def _advance(factors: Factors, state):
    states, count = state
    above = factors.carry.shape[0]
    added = factors.added if factors.place is None else factors.place[:, None, None] * factors.added
    new = jnp.tensordot(factors.carry, states[-above:], 1) + added
    new = jnp.concatenate([jnp.zeros_like(states[:-above]), new])
    return (new, factors.old_count * count + factors.new_count), None


def _readout(factors: Factors, state) -> jax.Array:
    states = state[0][-factors.carry.shape[0] :]
    reads = factors.weights[:, :, None] * factors.reads[:, None, :]
    return factors.intra + reads.reshape(reads.shape[0], -1) @ states.reshape(-1, states.shape[-1])


FENWICK = Recurrence(
    name="fenwick",
    fields={"q": "H K", "k": "H K", "v": "HV V", "g": "HV", "level_scales": "HV L", "position": "HV"},
    padding={"position": -1.0},
    element=_element,
    output=_output,
    monoid=Monoid(_combine, _apply, _identity, total=_total),
    init_state=_init_state,
    prepare=_prepare,
    advance=_advance,
    readout=_readout,
    states=lambda xs: max(xs["level_scales"].shape[-1] - 1, 1),
    special=Special(_aligned, Form(_prepare_aligned, _advance, _readout)),
)


def _lower(xs: dict) -> dict:
    given = {name: x for name, x in xs.items() if name != "position"}
    position = xs["position"][..., None].astype(compute_dtype(given))
    return {**given, "position": jnp.broadcast_to(position, xs["g"].shape)}


def _draw_scales(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.nn.softplus(jax.random.normal(key, shape))


log_linear_attention = Operator(
    name="log_linear_attention",
    recurrence=FENWICK,
    arguments={
        "q": QUERIES,
        "k": KEYS,
        "v": VALUES,
        "g": HEAD_DECAYS,
        "level_scales": Argument("B T HV L", _draw_scales),
    },
    about=__doc__,
    lower=_lower,
    zero_is_identity=False,  # a token of zeros still counts, and moves the others to higher levels
    seen=lambda state: 0 if state is None else state[1][:, 0],
    default_chunk_size=128,  # every chunk carries all levels
    state="(S [B, HV, max(L-1, 1), K, V], count [B, HV])",
)
