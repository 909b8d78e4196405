"""Softmax attention in blocks against the dense equation in float64, and its cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerances import GRADIENTS, OUTPUTS, assert_close

from lineax_seq import layers
from lineax_seq.layers import _attention_core

B, T, H, HKV, K = 2, 21, 4, 2, 6


def dense(q, k, v, window, ids):
    """Every score, masked; float64."""
    k, v = np.repeat(k, H // HKV, 2), np.repeat(v, H // HKV, 2)
    scores = np.einsum("bthk,bshk->bhts", q, k) * K**-0.5
    t, s = np.arange(T)[:, None], np.arange(T)[None]
    seen = (s <= t) & (t - s < (window or T))
    if ids is not None:
        run = np.cumsum(np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0))), 1)
        seen = seen & (run[:, None, :, None] == run[:, None, None, :])
    p = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    return np.einsum("bhts,bshk->bthk", p / p.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("window", [None, 1, 5, 16, 40])
def test_blocks_are_the_dense_equation(window, packed, monkeypatch):
    monkeypatch.setattr(_attention_core, "_BLOCK_MIN", 4)
    rng = np.random.default_rng(0)
    xs = [rng.normal(size=(B, T, h, K)) for h in (H, HKV, HKV)]
    ids = np.array([[1] * 8 + [2] * 4 + [1] * 9, [0] * 20 + [1]]) if packed else None
    attend = jax.jit(lambda *xs: layers.causal_attention(*xs, window=window, segment_ids=ids))
    assert_close(attend(*(jnp.asarray(x, jnp.float32) for x in xs)), dense(*xs, window, ids), OUTPUTS["float32"])


def test_gradients_are_those_of_one_block(monkeypatch):
    rng = np.random.default_rng(1)
    xs = [jnp.asarray(rng.normal(size=(B, T, h, K)), jnp.float32) for h in (H, HKV, HKV)]
    ids = jnp.array([[1] * 8 + [2] * 13, [0] * 20 + [1]])

    def gradients(window):
        f = lambda *xs: jnp.sum(jnp.sin(layers.causal_attention(*xs, window=window, segment_ids=ids)))  # noqa: E731
        return jax.jit(jax.grad(f, (0, 1, 2)))(*xs)

    plain = gradients(None), gradients(11)  # T is below the least block, and below two windows
    monkeypatch.setattr(_attention_core, "_BLOCK_MIN", 8)
    assert_close(gradients(None), plain[0], GRADIENTS["float32"])
    assert_close(gradients(11), plain[1], GRADIENTS["float32"])


def test_backward_does_not_hold_probabilities():
    long = 2048
    xs = [jax.ShapeDtypeStruct((1, long, 1, 8), jnp.float32)] * 3
    _, residuals = jax.eval_shape(lambda *xs: jax.vjp(layers.causal_attention, *xs), *xs)
    assert sum(r.size for r in jax.tree.leaves(residuals)) < long * 300  # all scores: long² / 2


def attention(**options):
    init = jax.nn.initializers.normal(0.3)
    return layers.SoftmaxAttentionConfig(**{"num_heads": 4, **options}).make(16, kernel_init=init, rngs=nnx.Rngs(0))


def test_ring_holds_no_more_than_the_window():
    layer = attention(window=3, num_kv_heads=2)
    assert layer.init_cache(2, 100).k.shape == (2, 3, 2, 4)
    assert layer.init_cache(2, 2).k.shape == (2, 2, 2, 4)


def test_a_full_cache_refuses_to_overflow():
    layer, x = attention(), jnp.ones((1, 5, 16))
    cache = layer.init_cache(1, 4)
    with pytest.raises(ValueError, match="5 tokens, the cache holds 4"):
        layer.prefill(x, cache)
    y, cache = jax.jit(lambda x, cache: layer.prefill(x, cache))(x[:, :4], cache)
    assert np.isfinite(y).all()
    assert np.isnan(jax.jit(lambda x, cache: layer.step(x, cache))(x[:, 4], cache)[0]).all()


def test_position_only_enters_as_a_distance():
    layer, x = attention(), jax.random.normal(jax.random.key(0), (1, 8, 16))
    apply = jax.jit(lambda positions: layer(x, positions=positions))
    positions = jnp.arange(8)
    assert_close(apply(positions + 100), apply(positions), OUTPUTS["float32"])
    assert np.abs(apply(2 * positions) - apply(positions)).max() > 1e-2
