"""Norms, short convolution, MLP, rotary embedding and projections against the equations in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerances import GRADIENTS, OUTPUTS, assert_close

from lineax_seq import layers

B, T, D = 2, 9, 6
F32 = OUTPUTS["float32"]


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def silu(x):
    return x / (1 + np.exp(-x))


def run_of(ids):
    """0, 1, 2... for the runs of equal ids."""
    return np.cumsum(np.r_[0, ids[1:] != ids[:-1]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_are_their_equations(dtype):
    x, gate, scale = normal(0, B, T, D) * 30, normal(1, B, T, D), normal(2, D)
    plain, gated = layers.RMSNorm(D, eps=1e-3), layers.GatedRMSNorm(D, eps=1e-3)
    plain.scale[...] = gated.scale[...] = jnp.asarray(scale, jnp.float32)
    xs = [jnp.asarray(a, dtype) for a in (x, gate)]
    x, gate = (np.asarray(a, np.float64) for a in xs)
    want = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-3) * scale
    assert plain(xs[0]).dtype == gated(*xs).dtype == jnp.dtype(dtype)
    assert_close(plain(xs[0]), want, OUTPUTS[dtype])
    assert_close(gated(*xs), want * silu(gate), OUTPUTS[dtype])


@pytest.mark.parametrize("use_bias", [False, True])
def test_layer_norm_over_heads_is_its_equation(use_bias):
    x, scale, shift = normal(11, B, T, 2, D) + 3, normal(12, 2, D), normal(13, 2, D)
    norm = layers.LayerNorm(2, D, use_bias=use_bias, eps=1e-3)
    norm.scale[...] = jnp.asarray(scale, jnp.float32)
    if use_bias:
        norm.bias[...] = jnp.asarray(shift, jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    want = centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-3) * scale + (shift if use_bias else 0)
    assert_close(norm(jnp.asarray(x, jnp.float32)), want, F32)


def test_token_shift_is_the_token_before():
    shift, x, history = layers.TokenShift(D), jnp.asarray(normal(14, B, T, D)), jnp.asarray(normal(15, B, 1, D))
    ids = jnp.array([[1, 1, 2, 1, 1, 1, 1, 1, 1], [3, 3, 3, 3, 3, 0, 0, 5, 5]])
    np.testing.assert_array_equal(shift(x)[:, 1:], x[:, :-1])
    np.testing.assert_array_equal(shift(x)[:, 0], 0)
    np.testing.assert_array_equal(shift(x, history=history)[:, :1], history)
    starts = np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    np.testing.assert_array_equal(shift(x, segment_ids=ids), np.where(starts[..., None], 0, shift(x)))
    np.testing.assert_array_equal(shift.next_history(x, history, jnp.array([0, 4]))[:, 0], [history[0, 0], x[1, 3]])


def test_l2_normalize_has_finite_gradient_at_zero():
    x = np.r_[normal(3, 1, D), np.zeros((1, D))]
    assert_close(
        layers.l2_normalize(jnp.asarray(x, jnp.float32)), x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6), F32
    )
    gradient = jax.grad(lambda x: layers.l2_normalize(x).sum())(jnp.zeros((D,)))
    np.testing.assert_allclose(gradient, 1e3, rtol=1e-5)


def convolve(x, kernel, runs, history):
    """Token by token; `runs` says which document each token is in, `history` comes before the first."""
    width = len(kernel)
    y = np.zeros_like(x)
    for t in range(len(x)):
        for lag in range(width):
            if t - lag >= 0:
                y[t] += kernel[-1 - lag] * x[t - lag] * (runs[t] == runs[t - lag])
            elif history is not None:
                y[t] += kernel[-1 - lag] * history[t - lag]
    return y


@pytest.mark.parametrize("width", [1, 2, 4])
def test_convolution_is_its_equation_and_stops_at_borders(width):
    conv = layers.ShortConv(D, width=width, rngs=nnx.Rngs(0))
    kernel = np.asarray(conv.kernel[...], np.float64)
    x, history = normal(4, B, T, D), normal(5, B, width - 1, D)
    ids = np.array([[1, 1, 2, 1, 1, 1, 1, 1, 1], [3, 3, 3, 3, 3, 0, 0, 5, 5]])  # in row 0, an id that comes back
    x32, h32 = jnp.asarray(x, jnp.float32), jnp.asarray(history, jnp.float32)
    plain = [convolve(row, kernel, np.zeros(T), None) for row in x]
    packed = [convolve(row, kernel, run_of(i), None) for row, i in zip(x, ids, strict=True)]
    after = [convolve(row, kernel, np.zeros(T), h) for row, h in zip(x, history, strict=True)]
    assert_close(conv(x32), silu(np.stack(plain)), F32)
    assert_close(conv(x32, segment_ids=jnp.asarray(ids)), silu(np.stack(packed)), F32)
    assert_close(conv(x32, history=h32), silu(np.stack(after)), F32)

    lengths = np.array([T, 2])
    kept = conv.next_history(x32, h32, jnp.asarray(lengths))
    for b, n in enumerate(lengths):
        want = np.concatenate([h32[b], x32[b, :n]])[n:]
        np.testing.assert_array_equal(kept[b], want)
    np.testing.assert_array_equal(conv.next_history(x32, h32)[0], kept[0])


def test_convolution_without_activation_is_linear():
    conv = layers.ShortConv(D, activation=None, rngs=nnx.Rngs(0))
    x = jnp.asarray(normal(6, B, T, D), jnp.float32)
    assert_close(conv(-2 * x), -2 * conv(x), F32)


def test_swiglu_is_its_equation():
    mlp = layers.SwiGLUConfig(d_ff=10).make(D, rngs=nnx.Rngs(0), kernel_init=jax.nn.initializers.normal(0.5))
    x = normal(7, B, T, D)
    gate, up, down = (np.asarray(p.kernel[...], np.float64) for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    assert_close(mlp(jnp.asarray(x, jnp.float32)), (silu(x @ gate) * (x @ up)) @ down, F32)
    assert layers.SwiGLUConfig().make(96, rngs=nnx.Rngs(0)).up_proj.kernel.shape == (96, 256)


def test_projection_has_the_gradients_of_a_matrix_product():
    mlp = layers.SwiGLUConfig(d_ff=10).make(D, rngs=nnx.Rngs(0))
    x, dy = jnp.asarray(normal(8, B, T, D), jnp.float32), jnp.asarray(normal(9, B, T, 10), jnp.float32)
    got = jax.grad(lambda p, x: jnp.sum(p(x) * dy), (0, 1))(mlp.up_proj, x)
    want = jax.grad(lambda w, x: jnp.sum((x @ w) * dy), (0, 1))(mlp.up_proj.kernel[...], x)
    assert_close((got[0].kernel[...], got[1]), want, GRADIENTS["float32"])


def test_rotary_turns_pairs_by_position():
    K = 6
    x, positions = normal(10, B, T, 2, K), np.arange(100, 100 + T)
    z = x[..., : K // 2] + 1j * x[..., K // 2 :]
    z = z * np.exp(1j * positions[:, None] * 50.0 ** (-2 * np.arange(K // 2) / K))[:, None]
    got = layers.rotary(jnp.asarray(x, jnp.float32), jnp.asarray(positions), theta=50.0)
    assert_close(got, np.concatenate([z.real, z.imag], -1), F32)
    with pytest.raises(ValueError, match="even"):
        layers.rotary(jnp.ones((1, 1, 1, 3)), jnp.zeros(1, int))


def test_segment_positions_restart():
    ids = jnp.array([[7, 7, 7, 0, 0, 7], [1, 2, 3, 3, 3, 3]])
    np.testing.assert_array_equal(layers.segment_positions(ids), [[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layers.ShortConv(D, width=0, rngs=nnx.Rngs(0)), "width=0"),
        (lambda: layers.ShortConv(D, activation="relu", rngs=nnx.Rngs(0)), "'relu'"),
        (lambda: layers.RMSNorm(2.0), "width=2.0"),
    ],
)
def test_bad_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
