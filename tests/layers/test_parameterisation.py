"""The layers over a recurrence against their papers, token by token in float64 from the layers' own parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerances import OUTPUTS, assert_close

from lineax_seq import layers

B, T, D, H = 2, 7, 24, 2
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


def softplus(x):
    return np.log1p(np.exp(x))


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


@pytest.fixture
def made(filled, x64):
    """config -> (outputs for x, the parameters by path) in float64."""

    def make(config, x, shared=None):
        layer = filled(config, D, **FLOAT64)
        run = jax.jit(lambda layer, x, shared: layer.run(x, layers.Context(), None, shared)[::2])
        y, shared = run(layer, jnp.asarray(x), shared or layer.init_shared(jnp.asarray(x)))
        return layer, np.asarray(y), values(layer), shared

    return make


@pytest.mark.parametrize("conv_width", [None, 3])
def test_gated_linear_attention(x, conv_width, made):
    config = layers.GatedLinearAttentionConfig(num_heads=H, conv_width=conv_width)
    layer, y, p, _ = made(config, x)
    assert p["decay.down.kernel"].shape == (D, 16) and layer.init_cache(B, T).state.shape == (B, H, D // 4, D // 2)
    q, k, v = (x @ p[f"{name}_proj.kernel"] for name in "qkv")
    if conv_width:
        q, k, v = (conv(a, p[f"taps.{name}.kernel"]) for name, a in zip("qkv", (q, k, v), strict=True))
    g = x @ p["decay.down.kernel"] @ p["decay.up.kernel"] + p["decay.up.bias"]
    g = np.log(sigmoid(g)) / 16
    o = rms(recur(*(heads(a, H) for a in (q, k, v, g)), None), p["o_norm.scale"])
    gate = heads(x @ p["gate_proj.kernel"], H)
    assert_close(y, (o * silu(gate)).reshape(B, T, -1) @ p["o_proj.kernel"], OUTPUTS["float64"])


def delta_tokens(p, x, HV, doubled):
    q, k, v = (conv(x @ p[f"{name}_proj.kernel"], p[f"taps.{name}.kernel"]) for name in "qkv")
    beta = sigmoid(x @ p["b_proj.kernel"]) * (2 if doubled else 1)
    return unit(heads(q, H)), unit(heads(k, H)), heads(v, HV), beta


@pytest.mark.parametrize("allow_neg_eigval", [False, True])
def test_delta_net(x, allow_neg_eigval, made):
    layer, y, p, _ = made(layers.DeltaNetConfig(num_heads=H, allow_neg_eigval=allow_neg_eigval), x)
    assert layer.init_cache(B, T).state.shape == (B, H, D // 2, D // 2)
    q, k, v, beta = delta_tokens(p, x, H, allow_neg_eigval)
    o = rms(recur(q, k, v, np.zeros((B, T, H)), beta), p["o_norm.scale"])
    assert_close(y, o.reshape(B, T, -1) @ p["o_proj.kernel"], OUTPUTS["float64"])


@pytest.mark.parametrize(("num_v_heads", "allow_neg_eigval"), [(None, False), (4, True)])
def test_gated_delta_net(x, num_v_heads, allow_neg_eigval, made):
    options = dict(num_v_heads=num_v_heads, allow_neg_eigval=allow_neg_eigval)
    layer, y, p, _ = made(layers.GatedDeltaNetConfig(num_heads=H, **options), x)
    HV = num_v_heads or H
    assert layer.init_cache(B, T).state.shape == (B, HV, 9, 18)  # 3/4 of D over the key heads, and twice that
    q, k, v, beta = delta_tokens(p, x, HV, allow_neg_eigval)
    g = -np.exp(p["A_log"]) * softplus(x @ p["a_proj.kernel"] + p["dt_bias"])
    o = rms(recur(q, k, v, g, beta), p["o_norm.scale"]) * silu(heads(x @ p["gate_proj.kernel"], HV))
    assert_close(y, o.reshape(B, T, -1) @ p["o_proj.kernel"], OUTPUTS["float64"])


def test_mlstm(x, made):
    """The memory of the first paper, without the stabiliser: in float64 nothing overflows here."""
    _, y, p, _ = made(layers.MLSTMConfig(num_heads=H, gate_soft_cap=1.5), x)
    cap = lambda z: 1.5 * np.tanh(z / 1.5)  # noqa: E731
    q, k, v = (heads(x @ p[f"{name}_proj.kernel"], H) for name in "qkv")
    i = np.exp(cap(x @ p["i_proj.kernel"] + p["i_proj.bias"]))
    f = sigmoid(cap(x @ p["f_proj.kernel"] + p["f_proj.bias"]))
    o = np.zeros_like(v)
    for b in range(B):
        for h in range(H):
            C, n = np.zeros((v.shape[-1], k.shape[-1])), np.zeros(k.shape[-1])
            for t in range(T):
                key = k[b, t, h] / np.sqrt(k.shape[-1])
                C = f[b, t, h] * C + i[b, t, h] * np.outer(v[b, t, h], key)
                n = f[b, t, h] * n + i[b, t, h] * key
                o[b, t, h] = C @ q[b, t, h] / max(abs(n @ q[b, t, h]), 1)
    centred = o - o.mean(-1, keepdims=True)
    normed = centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-5) * p["o_norm.scale"]
    want = normed.reshape(B, T, -1) * sigmoid(x @ p["gate_proj.kernel"])
    assert_close(y, want @ p["o_proj.kernel"], OUTPUTS["float64"])


def test_mlstm_begins_almost_closed_and_remembering():
    layer = layers.MLSTMConfig(num_heads=4).make(D, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer.i_proj.bias[...], -10)
    np.testing.assert_array_equal(layer.f_proj.bias[...], [3, 4, 5, 6])


@pytest.mark.parametrize("value_residual", [False, True])
def test_rwkv7(x, value_residual, made):
    """The state as the paper writes it, [V, K], from the right."""
    ranks = dict(decay_rank=3, rate_rank=4, value_rank=5, gate_rank=6)
    config = layers.RWKV7Config(num_heads=H, value_residual=value_residual, **ranks)
    first = np.random.default_rng(1).normal(size=(B, T, H, D // H))
    shared = {"rwkv7_values": jnp.asarray(first)} if value_residual else None
    _, y, p, shared = made(config, x, shared)
    before = np.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    x_r, x_w, x_k, x_v, x_a, x_g = (x + (before - x) * mu for mu in p["mu"])

    def low_rank(name, x, inner=lambda z: z):
        return inner(x @ p[f"{name}.down.kernel"]) @ p[f"{name}.up.kernel"] + p.get(f"{name}.up.bias", 0)

    r, k, v = x_r @ p["r_proj.kernel"], x_k @ p["k_proj.kernel"], x_v @ p["v_proj.kernel"]
    w = np.exp(-np.exp(-0.5) * sigmoid(low_rank("decay", x_w, np.tanh)))
    a = sigmoid(low_rank("rate", x_a))
    xi, alpha, rho = (p[name].reshape(-1) for name in ("xi", "alpha", "rho"))
    kappa = unit(heads(k * xi, H))
    k = k * (1 + (a - 1) * alpha)
    if value_residual:
        v = v + (first.reshape(B, T, D) - v) * sigmoid(low_rank("value_mixture", x_v))
    else:
        assert_close(shared["rwkv7_values"], heads(v, H), OUTPUTS["float64"])
    r, k, v, w, a = (heads(z, H) for z in (r, k, v, w, a))
    o = np.zeros_like(v)
    for b in range(B):
        for h in range(H):
            S = np.zeros((D // H, D // H))
            for t in range(T):
                at = b, t, h
                S = S @ (np.diag(w[at]) - np.outer(kappa[at], a[at] * kappa[at])) + np.outer(v[at], k[at])
                o[at] = S @ r[at]
    centred = o - o.mean(-1, keepdims=True)
    o = centred / np.sqrt(centred.var(-1, keepdims=True) + D // H * 1e-5) * p["o_norm.scale"] + p["o_norm.bias"]
    o = o + (r * k * heads(rho[None, None], H)).sum(-1, keepdims=True) * v
    want = o.reshape(B, T, D) * low_rank("gate", x_g, sigmoid)
    assert_close(y, want @ p["o_proj.kernel"], OUTPUTS["float64"])


def test_rwkv7_channel_mix(x, made):
    _, y, p, _ = made(layers.RWKV7ChannelMixConfig(), x)
    before = np.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    hidden = np.maximum((x + (before - x) * p["mu"]) @ p["up_proj.kernel"], 0) ** 2
    assert hidden.shape[-1] == 4 * D
    assert_close(y, hidden @ p["down_proj.kernel"], OUTPUTS["float64"])


def test_values_of_a_first_layer_must_come_from_one(x):
    layer = layers.RWKV7Config(num_heads=H).make(D, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="value_residual=True mixes in the values of a model's first layer"):
        layer(jnp.asarray(x, jnp.float32))


def test_ranks_are_those_of_the_papers_models():
    layer = nnx.eval_shape(lambda: layers.RWKV7Config(num_heads=12).make(768, rngs=nnx.Rngs(0)))
    ranks = {name: getattr(layer, name).down.kernel.shape[1] for name in ("decay", "rate", "value_mixture", "gate")}
    assert ranks == {"decay": 64, "rate": 64, "value_mixture": 32, "gate": 128}


def test_decays_start_in_their_ranges():
    config = layers.GatedDeltaNetConfig(num_heads=300, head_dim=1)
    layer = config.make(400, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    A, dt = np.exp(layer.A_log[...]), np.log1p(np.exp(np.asarray(layer.dt_bias[...], np.float64)))
    assert layer.A_log.dtype == layer.dt_bias.dtype == jnp.float32
    assert 0 < A.min() < 1 and 15 < A.max() < 16 and 7 < A.mean() < 9
    assert 0.999e-3 < dt.min() < 1.2e-3 and 0.08 < dt.max() < 0.1001
    assert abs(np.log(dt).mean() - np.log(1e-2)) < 0.2


@pytest.mark.parametrize("config", [layers.DeltaNetConfig, layers.GatedDeltaNetConfig])
def test_rounded_keys_still_reflect(x, config, filled):
    """In bfloat16 |k|² is off by 1e-3; beta |k|², the eigenvalue that counts, is not."""
    layer = filled(config(num_heads=H, allow_neg_eigval=True), D, dtype=jnp.bfloat16)
    inputs, context = jnp.asarray(x, jnp.bfloat16), layers.Context()
    arguments, _ = layer.arguments(inputs, layers.Taps(layer.taps, context, None), context, {})
    k, beta = arguments["k"], arguments["beta"]
    assert k.dtype == jnp.bfloat16
    square = np.sum(np.asarray(k, np.float64) ** 2, -1)
    wanted = 2 * jax.nn.sigmoid(layer.b_proj(inputs).astype(jnp.float32))
    assert np.abs(square - 1).max() > 1e-4
    np.testing.assert_allclose(beta * square, wanted, rtol=1e-5)
