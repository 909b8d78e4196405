"""Causal softmax attention over time that is split over a mesh axis, inside `jax.shard_map`.

    all_gather   every device gathers all keys and values, and attends with its own queries (LASP-2H)
    zigzag       so too; but queries are dealt out so that every device does the same work
    ring         keys and values go round the ring, one shard a hop
    ulysses      heads instead of time are split while attention runs: all-to-all of q, k, v and o

P devices, n tokens each, s bytes an element; what a device sends forward (backward the same, the ring twice that):

    all_gather   2 (P-1) n HKV K s               one all-gather; backward one reduce-scatter
    zigzag       the same + 2 n H K s            and a permutation of q and of o
    ring         2 (P-1) n HKV K s               P-1 hops
    ulysses      2 (1-1/P) n (H + HKV) K s       four all-to-alls

With shards in order, device r has 2r+1 of P² parts of the work and all wait for the last. Under zigzag it attends with
pieces r and 2P-1-r of the 2P pieces of the row. Only queries and outputs move: everything else of a model keeps its
shards in order, so recurrences send one summary a device and convolutions one halo.

Source: LASP-2H, Sun et al. 2025, arXiv:2502.07563; ring: Liu et al. 2023, arXiv:2310.01889; Ulysses: Jacobs et al.
2023, arXiv:2309.14509; two pieces a device: Llama team 2024, arXiv:2407.21783, on context parallelism.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from ..core import checks
from . import _softmax
from ._softmax import Places
from .halo import run_ids
from .varying import vary, varying

STRATEGIES = ("all_gather", "zigzag", "ring", "ulysses")
_BLOCK = 512


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str,
    window: int | None = None,
    segment_ids: jax.Array | None = None,
    strategy: str = "all_gather",
    block_size: int = _BLOCK,
) -> jax.Array:
    """Softmax attention of each token over itself and the tokens before it in the whole row: `[B, T, H, K]`.

    Args:
        q: [B, T, H, K], the shard's; scores are scaled by K**-0.5.
        k, v: [B, T, HKV, K], the shard's; query head h reads key head h // (H / HKV).
        axis_name: the mesh axis that T is split over, shards in order.
        window: how many tokens each token sees, itself included; None is all.
        segment_ids: int [B, T], the shard's; a token sees only its own run of equal ids in the whole row.
        strategy: see the module; all give the same.
        block_size: queries and keys whose scores exist at a time.

    Raises:
        ValueError: an unknown strategy; shards of an odd length under zigzag; heads that Ulysses cannot split.
    """
    checks.one_of("attention", "strategy", strategy, STRATEGIES)
    q, k, v = vary((q, k, v), varying((q, k, v)) | varying(lax.axis_index(axis_name)))
    P, n = lax.axis_size(axis_name), q.shape[1]
    size = min(block_size, n)
    if strategy == "ring":
        return _ring(axis_name, window, size, q, k, v, None if segment_ids is None else run_ids(segment_ids, axis_name))
    gather = functools.partial(lax.all_gather, axis_name=axis_name, axis=1, tiled=True)
    run = None if segment_ids is None else run_ids(gather(segment_ids))
    everywhere = Places(jnp.arange(P * n, dtype=jnp.int32), run)
    if strategy == "ulysses":
        heads = {"query": q.shape[2], "key": k.shape[2]}
        if any(count % P for count in heads.values()):
            raise ValueError(
                f"attention: strategy='ulysses' splits {heads['query']} query and {heads['key']} key heads over {P} "
                "devices; give multiples of that, or another strategy."
            )
        swap = functools.partial(lax.all_to_all, axis_name=axis_name, split_axis=2, concat_axis=1, tiled=True)
        o = _softmax.attend(window, size, swap(q), swap(k), swap(v), everywhere, everywhere)
        return lax.all_to_all(o, axis_name, split_axis=1, concat_axis=2, tiled=True)

    k, v = jnp.split(gather(jnp.concatenate([k, v], -1)), 2, -1)
    r = lax.axis_index(axis_name)
    if strategy == "all_gather":
        return _softmax.attend(window, size, q, k, v, _part(everywhere, r * n, n), everywhere)
    if n % 2:
        raise ValueError(
            f"attention: strategy='zigzag' wants shards of an even length, and they have {n} tokens; give rows of a "
            f"multiple of {2 * P} tokens, or another strategy."
        )
    low, high = (_part(everywhere, piece * (n // 2), n // 2) for piece in (r, 2 * P - 1 - r))
    places = jax.tree.map(lambda a, b: jnp.concatenate([a, b], -1), low, high)
    blocks = -(-n // 2 // size)
    if n // 2 % blocks == 0:  # with queries of both ends of the row taken together, few pairs could be skipped
        size = n // 2 // blocks
    o = _softmax.attend(window, size, to_zigzag(q, axis_name), k, v, places, everywhere)
    return from_zigzag(o, axis_name)


def _part(places: Places, start: jax.Array, length: int) -> Places:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, length, x.ndim - 1), places)


# ---- zigzag: device d has the pieces 2d and 2d+1 in order, and d and 2P-1-d in zigzag: one even and one odd both ways


def _routes(axis_name: str) -> list[list[tuple[int, int]]]:
    """For the even and for the odd pieces, from where in order to where in zigzag."""
    P = lax.axis_size(axis_name)
    return [[(d, min(2 * d + odd, 2 * P - 1 - 2 * d - odd)) for d in range(P)] for odd in (0, 1)]


def _swap_if_odd(x: jax.Array, y: jax.Array, axis_name: str) -> tuple[jax.Array, jax.Array]:
    """x and y, exchanged on devices with an odd number, whose lower zigzag piece is the odd one."""
    odd = lax.axis_index(axis_name) % 2 == 1
    return jnp.where(odd, y, x), jnp.where(odd, x, y)


def to_zigzag(x: jax.Array, axis_name: str) -> jax.Array:
    """The shard `[B, T, ...]` that device r of P has in order, for the pieces r and 2P-1-r of the row."""
    pieces = zip(jnp.split(x, 2, 1), _routes(axis_name), strict=True)
    even, odd = (lax.ppermute(piece, axis_name, route) for piece, route in pieces)
    return jnp.concatenate(_swap_if_odd(even, odd, axis_name), 1)


def from_zigzag(x: jax.Array, axis_name: str) -> jax.Array:
    """The inverse of `to_zigzag`."""
    low, high = jnp.split(x, 2, 1)
    pieces = zip(_swap_if_odd(low, high, axis_name), _routes(axis_name), strict=True)
    back = (lax.ppermute(piece, axis_name, [(b, a) for a, b in route]) for piece, route in pieces)
    return jnp.concatenate(list(back), 1)


# ---- ring


def _hops(axis_name: str, window: int | None, n: int) -> int:
    """Hops after which no earlier token is seen."""
    others = lax.axis_size(axis_name) - 1
    return others if window is None else min(others, -(-(window - 1) // n))


def _rotated(tree, axis_name: str, by: int = 1):
    P = lax.axis_size(axis_name)
    return jax.tree.map(lambda x: lax.ppermute(x, axis_name, [(r, (r + by) % P) for r in range(P)]), tree)


def _places(axis_name: str, n: int, hop, run) -> Places:
    """The places of the keys that arrive here after `hop` hops."""
    origin = (lax.axis_index(axis_name) - hop) % lax.axis_size(axis_name)
    return Places(origin * n + jnp.arange(n, dtype=jnp.int32), run)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ring(axis_name, window, size, q, k, v, run):
    return _ring_forward(axis_name, window, size, q, k, v, run)[0]


def _ring_forward(axis_name, window, size, q, k, v, run):
    n = q.shape[1]
    blocks = _softmax.queries(q, k.shape[2], _places(axis_name, n, 0, run), size)

    def absorb(sums, held, hop):
        k, v, run = held
        return _softmax.absorb(sums, blocks, k, v, _places(axis_name, n, hop, run), window)

    def hop(carry, number):
        sums, held = carry
        held = _rotated(held, axis_name)
        return (absorb(sums, held, number), held), None

    held = k, v, run
    sums = absorb(_softmax.nothing(blocks), held, 0)
    hops = jnp.arange(1, 1 + _hops(axis_name, window, n), dtype=jnp.int32)
    (sums, _), _ = lax.scan(hop, (sums, held), hops)
    o, log_denominator = _softmax.outputs(sums, n, v.dtype)
    return o, (q, k, v, run, o, log_denominator)


def _ring_backward(axis_name, window, size, residuals, d_o):
    """The gradients of keys and values travel with these, and one hop at the end brings them back to their device."""
    q, k, v, run, o, log_denominator = residuals
    n = q.shape[1]
    blocks = _softmax.queries(q, k.shape[2], _places(axis_name, n, 0, run), size)
    back = _softmax.pullback(o, d_o, log_denominator, k.shape[2])

    def gradients(held, hop):
        k, v, run = held
        d_q, *d_kv = _softmax.gradients(back, blocks, k, v, _places(axis_name, n, hop, run), window)
        return d_q, d_kv

    def hop(carry, number):
        d_q, d_kv, held = carry
        d_kv, held = _rotated((d_kv, held), axis_name)
        more = gradients(held, number)
        return (*jax.tree.map(jnp.add, (d_q, d_kv), more), held), None

    held, hops = (k, v, run), _hops(axis_name, window, n)
    (d_q, d_kv, _), _ = lax.scan(hop, (*gradients(held, 0), held), jnp.arange(1, 1 + hops, dtype=jnp.int32))
    d_k, d_v = _rotated(d_kv, axis_name, -hops)
    return _softmax.joined(d_q, n).astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_ring.defvjp(_ring_forward, _ring_backward)
