"""Softmax attention over shards of time equals attention over the whole row, in float64, outputs and gradients."""

import collections
import functools

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tolerances import GRADIENTS, OUTPUTS, assert_close

from lineax_seq import layers, parallel
from lineax_seq.parallel import _softmax

B, T, H, HKV, K = 2, 48, 8, 4, 6
IDS = np.array([[1] * 8 + [2] * 14 + [1] * 15 + [3] * 11, [0] * 47 + [1]])  # borders inside and at the ends of shards
SHARDED = PartitionSpec(None, "seq")


def mesh(P):
    return jax.sharding.Mesh(np.array(jax.devices()[:P]), ("seq",))


def inputs(dtype=jnp.float64):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(B, T, h, K)), dtype) for h in (H, HKV, HKV)]


def split(P, packed, **options):
    """q, k, v -> outputs over P devices."""
    ids = (jnp.asarray(IDS),) if packed else ()

    def shard(q, k, v, *ids):
        return parallel.attention(q, k, v, axis_name="seq", segment_ids=ids[0] if ids else None, **options)

    specs = (SHARDED,) * (3 + len(ids))
    mapped = jax.shard_map(shard, mesh=mesh(P), in_specs=specs, out_specs=SHARDED)
    return lambda q, k, v: mapped(q, k, v, *ids)


def both(attend, xs):
    """Outputs and the gradients of a sum that weighs every one of them differently."""

    def weighed(*xs):
        o = attend(*xs)
        return jnp.sum(jnp.sin(o) * jnp.arange(o.size).reshape(o.shape) / o.size), o

    (_, o), gradients = jax.jit(jax.value_and_grad(weighed, (0, 1, 2), has_aux=True))(*xs)
    return o, gradients


def dense(q, k, v, window, packed):
    """Every score, masked. (JAX's own attention has no softmax in float64.)"""
    k, v = jnp.repeat(k, H // HKV, 2), jnp.repeat(v, H // HKV, 2)
    t, s = jnp.arange(T)[:, None], jnp.arange(T)[None]
    seen = (s <= t) & (t - s < (window or T))
    if packed:
        run = np.cumsum(np.pad(IDS[:, 1:] != IDS[:, :-1], ((0, 0), (1, 0))), 1)
        seen = seen & (run[:, None, :, None] == run[:, None, None, :])
    scores = jnp.where(seen, jnp.einsum("bthk,bshk->bhts", q, k) * K**-0.5, -jnp.inf)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores, -1), v)


@functools.cache
def whole(window, packed):
    return both(lambda *xs: dense(*xs, window, packed), inputs())


CASES = [
    *(
        (4, strategy, window, packed)
        for strategy in parallel.STRATEGIES
        for window, packed in ((None, True), (14, True))
    ),
    (2, "all_gather", None, False),
    (2, "zigzag", 5, False),
    (2, "ring", 2, False),
]
ALL = [(P, s, w, p) for P in (1, 2, 4, 8) for s in parallel.STRATEGIES for w in (None, 2, 5, 30) for p in (False, True)]


def check(P, strategy, window, packed, block_size):
    if strategy == "ulysses" and HKV % P:
        with pytest.raises(ValueError, match=f"splits {H} query and {HKV} key heads over {P} devices"):
            both(split(P, packed, window=window, strategy=strategy), inputs())
        return
    want = whole(window, packed)
    got = both(split(P, packed, window=window, strategy=strategy, block_size=block_size), inputs())
    assert_close(got[0], want[0], OUTPUTS["float64"], "outputs")
    assert_close(got[1], want[1], GRADIENTS["float64"], "gradients")


@pytest.mark.parametrize(("P", "strategy", "window", "packed"), CASES)
def test_shards_are_the_whole(P, strategy, window, packed, x64):
    check(P, strategy, window, packed, block_size=5)


@pytest.mark.slow
@pytest.mark.parametrize(("P", "strategy", "window", "packed"), ALL)
def test_shards_are_the_whole_everywhere(P, strategy, window, packed, x64):
    check(P, strategy, window, packed, block_size=512)


def test_one_collective_each_way():
    """Keys and values in one all-gather, their gradients in one sum. (Documents' ids would be gathered too.)"""
    attend = split(4, False)
    forward = jax.jit(attend).lower(*inputs(jnp.float32)).compile()
    assert hlo.counts(forward.as_text()) == {"all-gather": 1}
    pull = jax.jit(lambda *xs: jax.vjp(attend, *xs)[1](xs[0])).lower(*inputs(jnp.float32)).compile()
    assert hlo.counts(pull.as_text()) == {"all-gather": 1, "reduce-scatter": 1}


def test_zigzag_deals_out_pieces_and_takes_them_back():
    P, n = 8, 6

    def shard(x):
        there = parallel.to_zigzag(x, "seq")
        return there, parallel.from_zigzag(there, "seq")

    mapped = jax.shard_map(shard, mesh=mesh(P), in_specs=SHARDED, out_specs=SHARDED)
    there, back = jax.jit(mapped)(jnp.arange(P * n)[None])
    pieces = np.asarray(there).reshape(P, 2, n // 2)[:, :, 0] // (n // 2)
    assert pieces.tolist() == [[r, 2 * P - 1 - r] for r in range(P)]
    assert np.asarray(back)[0].tolist() == list(range(P * n))


@pytest.mark.parametrize(("strategy", "most"), [("all_gather", 15 / 9), ("zigzag", 1)])
def test_zigzag_balances_the_work(strategy, most, monkeypatch):
    """Pairs of blocks of half a shard that are not skipped: the most that a device has, over the mean."""
    worked, meet = collections.Counter(), _softmax._meet

    def counted(i, j, window):
        met = meet(i, j, window)
        jax.debug.callback(lambda r, met: worked.update({int(r): int(met)}), jax.lax.axis_index("seq"), met)
        return met

    monkeypatch.setattr(_softmax, "_meet", counted)
    jax.block_until_ready(jax.jit(split(4, False, strategy=strategy, block_size=T // 8))(*inputs(jnp.float32)))
    jax.effects_barrier()
    assert len(worked) == 4 and max(worked.values()) / (sum(worked.values()) / 4) == pytest.approx(most, abs=0.1)


def test_bfloat16_stays_and_is_close():
    xs = inputs(jnp.bfloat16)
    got = jax.jit(split(4, True))(*xs)
    want = layers.causal_attention(*(x.astype(jnp.float32) for x in xs), segment_ids=jnp.asarray(IDS))
    assert got.dtype == jnp.bfloat16
    assert_close(got, want, OUTPUTS["bfloat16"])


def test_refusals():
    xs = inputs(jnp.float32)
    with pytest.raises(ValueError, match="strategy='rin' .did you mean 'ring'"):
        split(4, False, strategy="rin")(*xs)
    with pytest.raises(ValueError, match="even length, and they have 3 tokens; give rows of a multiple of 8"):
        split(4, False, strategy="zigzag")(*(x[:, :12] for x in xs))
