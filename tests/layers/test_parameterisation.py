"""The linear layers against their papers' equations, token by token in float64 from the layers' own parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerances import OUTPUTS, assert_close

from lineax_seq import layers

B, T, D, H = 2, 7, 24, 2
INIT = dict(kernel_init=jax.nn.initializers.normal(0.4))
FLOAT64 = dict(dtype=jnp.float64, param_dtype=jnp.float64)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rms(x, scale, eps=1e-5):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * scale


def unit(x):
    return x / np.sqrt(np.sum(x**2, -1, keepdims=True) + 1e-6)


def values(module):
    """Parameters by path, float64."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(module)))
    return {jax.tree_util.keystr(p, simple=True, separator="."): np.asarray(a, np.float64) for p, a in leaves}


def conv(x, kernel):
    padded = np.pad(x, ((0, 0), (len(kernel) - 1, 0), (0, 0)))
    return silu(sum(padded[:, i : i + x.shape[1]] * kernel[i] for i in range(len(kernel))))


def heads(x, n):
    return x.reshape(*x.shape[:2], n, -1)


def recur(q, k, v, g, beta):
    """S <- exp(g) S;  S <- S + beta k (v - k S)^T, or + k v^T where beta is None;  o = q S / sqrt(K)."""
    K, V, n = q.shape[-1], v.shape[-1], v.shape[2] // k.shape[2]
    q, k = np.repeat(q, n, 2), np.repeat(k, n, 2)
    S, o = np.zeros((B, v.shape[2], K, V)), np.zeros_like(v)
    for t in range(T):
        S = S * np.exp(g[:, t, ..., None] if g.ndim == 4 else g[:, t, :, None, None])
        write = v[:, t]
        if beta is not None:
            write = beta[:, t, :, None] * (v[:, t] - np.einsum("bhk,bhkv->bhv", k[:, t], S))
        S = S + k[:, t, :, :, None] * write[:, :, None, :]
        o[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], S) * K**-0.5
    return o


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(B, T, D))


@pytest.mark.parametrize("conv_width", [None, 3])
def test_gated_linear_attention(x, conv_width, x64):
    layer = layers.GatedLinearAttention(D, num_heads=H, conv_width=conv_width, rngs=nnx.Rngs(0), **INIT, **FLOAT64)
    layer.decay_up_proj.bias[...] = jnp.linspace(-3, 3, D // 2)
    p = values(layer)
    assert p["decay_down_proj.kernel"].shape == (D, 16) and layer.state_shape(B) == (B, H, D // 4, D // 2)
    q, k, v = (x @ p[f"{name}_proj.kernel"] for name in "qkv")
    if conv_width:
        q, k, v = (conv(y, p[f"convs.{i}.kernel"]) for i, y in enumerate((q, k, v)))
    g = x @ p["decay_down_proj.kernel"] @ p["decay_up_proj.kernel"] + p["decay_up_proj.bias"]
    g = np.log(sigmoid(g)) / 16
    o = rms(recur(*(heads(y, H) for y in (q, k, v, g)), None), p["o_norm.scale"])
    gate = heads(x @ p["gate_proj.kernel"], H)
    want = (o * silu(gate)).reshape(B, T, -1) @ p["o_proj.kernel"]
    assert_close(jax.jit(layer)(jnp.asarray(x)), want, OUTPUTS["float64"])


def delta_tokens(p, x, HV, doubled):
    q, k, v = (conv(x @ p[f"{name}_proj.kernel"], p[f"{name}_conv.kernel"]) for name in "qkv")
    beta = sigmoid(x @ p["b_proj.kernel"]) * (2 if doubled else 1)
    return unit(heads(q, H)), unit(heads(k, H)), heads(v, HV), beta


@pytest.mark.parametrize("allow_neg_eigval", [False, True])
def test_delta_net(x, allow_neg_eigval, x64):
    layer = layers.DeltaNet(D, num_heads=H, allow_neg_eigval=allow_neg_eigval, rngs=nnx.Rngs(0), **INIT, **FLOAT64)
    p = values(layer)
    assert layer.state_shape(B) == (B, H, D // 2, D // 2)
    q, k, v, beta = delta_tokens(p, x, H, allow_neg_eigval)
    o = rms(recur(q, k, v, np.zeros((B, T, H)), beta), p["o_norm.scale"])
    assert_close(jax.jit(layer)(jnp.asarray(x)), o.reshape(B, T, -1) @ p["o_proj.kernel"], OUTPUTS["float64"])


@pytest.mark.parametrize(("num_v_heads", "allow_neg_eigval"), [(None, False), (4, True)])
def test_gated_delta_net(x, num_v_heads, allow_neg_eigval, x64):
    options = dict(num_v_heads=num_v_heads, allow_neg_eigval=allow_neg_eigval)
    layer = layers.GatedDeltaNet(D, num_heads=H, rngs=nnx.Rngs(0), **options, **INIT, **FLOAT64)
    p, HV = values(layer), num_v_heads or H
    assert layer.state_shape(B) == (B, HV, 9, 18)  # 3/4 of D over the key heads, and twice that
    q, k, v, beta = delta_tokens(p, x, HV, allow_neg_eigval)
    g = -np.exp(p["A_log"]) * np.log1p(np.exp(x @ p["a_proj.kernel"] + p["dt_bias"]))
    o = rms(recur(q, k, v, g, beta), p["o_norm.scale"]) * silu(heads(x @ p["gate_proj.kernel"], HV))
    assert_close(jax.jit(layer)(jnp.asarray(x)), o.reshape(B, T, -1) @ p["o_proj.kernel"], OUTPUTS["float64"])


def test_decays_start_in_their_ranges():
    layer = layers.GatedDeltaNet(400, num_heads=300, head_dim=1, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    A, dt = np.exp(layer.A_log[...]), np.log1p(np.exp(np.asarray(layer.dt_bias[...], np.float64)))
    assert layer.A_log.dtype == layer.dt_bias.dtype == jnp.float32
    assert 0 < A.min() < 1 and 15 < A.max() < 16 and 7 < A.mean() < 9
    assert 0.999e-3 < dt.min() < 1.2e-3 and 0.08 < dt.max() < 0.1001
    assert abs(np.log(dt).mean() - np.log(1e-2)) < 0.2


@pytest.mark.parametrize("make", [layers.DeltaNet, layers.GatedDeltaNet])
def test_rounded_keys_still_reflect(x, make):
    """In bfloat16 |k|² is off by 1e-3; beta |k|², the eigenvalue that counts, is not."""
    layer = make(D, num_heads=H, dtype=jnp.bfloat16, allow_neg_eigval=True, rngs=nnx.Rngs(0), **INIT)
    inputs = jnp.asarray(x, jnp.bfloat16)
    _, k, _, *_, beta = layer.tokens(inputs, lambda n, y: layer.convolutions()[n](y))
    assert k.dtype == jnp.bfloat16
    square = np.sum(np.asarray(k, np.float64) ** 2, -1)
    wanted = 2 * jax.nn.sigmoid(layer.b_proj(inputs).astype(jnp.float32))
    assert np.abs(square - 1).max() > 1e-4
    np.testing.assert_allclose(beta * square, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda **o: layers.GatedLinearAttention(10, num_heads=4, **o), "expand_k=0.5 of d_model=10 over num_heads=4"),
        (lambda **o: layers.GatedDeltaNet(D, num_heads=2, num_v_heads=3, **o), "num_v_heads=3 is no multiple"),
        (lambda **o: layers.GatedDeltaNet(10, num_heads=4, **o), "head_dim"),
        (lambda **o: layers.DeltaNet(D, num_heads=0, **o), "num_heads=0"),
    ],
)
def test_bad_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(rngs=nnx.Rngs(0))
