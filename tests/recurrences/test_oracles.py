"""Every recurrence against its paper's equations: a loop over the tokens of one head, numpy, float64.

An oracle gets one head's arguments by their public names (`[T, ...]`, parameters without T), the entering state and the
head's index, and gives the outputs and the final state. It spells everything out, scale and all, and shares nothing
with the library.
"""

import jax
import numpy as np
import pytest
from cases import Case, reference
from tolerances import OUTPUTS, assert_close

import lineax_seq as ls

ORACLES = {}


def oracle(fn):
    ORACLES[fn.__name__] = fn
    return fn


def additive(q, k, v, decays, S):
    """S_t = decay_t S_{t-1} + k_t v_t^T, o_t = q_t S_t / sqrt(K)."""
    o = []
    for q_t, k_t, v_t, decay in zip(q, k, v, decays, strict=True):
        S = decay * S + np.outer(k_t, v_t)
        o.append(q_t @ S / np.sqrt(len(q_t)))
    return np.array(o), S


@oracle
def linear_attention(x, S, head):
    return additive(x["q"], x["k"], x["v"], np.ones(len(x["q"])), S)


@oracle
def retention(x, S, head):
    return additive(x["q"], x["k"], x["v"], np.full(len(x["q"]), 1 - 2.0 ** (-5 - head)), S)


@oracle
def lightning_attention(x, S, head):
    return additive(x["q"], x["k"], x["v"], np.full(len(x["q"]), np.exp(-x["slopes"])), S)


@oracle
def simple_gla(x, S, head):
    return additive(x["q"], x["k"], x["v"], np.exp(x["g"]), S)


@oracle
def gla(x, S, head):
    return additive(x["q"], x["k"], x["v"], np.exp(x["g"])[:, :, None], S)


@oracle
def hgrn2(x, S, head):
    forget = np.exp(x["g"])
    return additive(x["q"], 1 - forget, x["v"], forget[:, :, None], S)


@oracle
def ssd(x, S, head):
    y = []
    for x_t, dt, B_t, C_t in zip(x["x"], x["dt"], x["B"], x["C"], strict=True):
        S = np.exp(dt * x["A"]) * S + dt * np.outer(B_t, x_t)
        y.append(C_t @ S + x["D"] * x_t)
    return np.array(y), S


@oracle
def rwkv6(x, S, head):
    o = []
    for r, k, v, g in zip(x["q"], x["k"], x["v"], x["g"], strict=True):
        kv = np.outer(k, v)
        o.append(r @ (S + np.diag(x["u"]) @ kv))
        S = np.diag(np.exp(g)) @ S + kv
    return np.array(o), S


def delta(q, k, v, decays, beta, S):
    """S_t = (I - beta_t k_t k_t^T) diag(decay_t) S_{t-1} + beta_t k_t v_t^T, o_t = q_t S_t / sqrt(K)."""
    o, eye = [], np.eye(k.shape[-1])
    for q_t, k_t, v_t, decay, beta_t in zip(q, k, v, decays, beta, strict=True):
        S = (eye - beta_t * np.outer(k_t, k_t)) @ (decay * eye) @ S + beta_t * np.outer(k_t, v_t)
        o.append(q_t @ S / np.sqrt(len(q_t)))
    return np.array(o), S


@oracle
def delta_rule(x, S, head):
    return delta(x["q"], x["k"], x["v"], np.ones(len(x["q"])), x["beta"], S)


@oracle
def gated_delta_rule(x, S, head):
    return delta(x["q"], x["k"], x["v"], np.exp(x["g"]), x["beta"], S)


@oracle
def kda(x, S, head):
    return delta(x["q"], x["k"], x["v"], np.exp(x["g"]), x["beta"], S)


@oracle
def gdn2(x, S, head):
    o, eye = [], np.eye(x["k"].shape[-1])
    for q, k, v, g, b, w in zip(*(x[name] for name in "qkvgbw"), strict=True):
        S = (eye - np.outer(k, b * k)) @ np.diag(np.exp(g)) @ S + np.outer(k, w * v)
        o.append(q @ S / np.sqrt(len(q)))
    return np.array(o), S


@oracle
def gated_delta_product(x, S, head):
    o, eye = [], np.eye(x["k"].shape[-1])
    for q, k, v, g, beta in zip(*(x[name] for name in ("q", "k", "v", "g", "beta")), strict=True):
        S = np.exp(g) * S
        for k_i, v_i, beta_i in zip(k, v, beta, strict=True):
            S = (eye - beta_i * np.outer(k_i, k_i)) @ S + beta_i * np.outer(k_i, v_i)
        o.append(q @ S / np.sqrt(len(q)))
    return np.array(o), S


@oracle
def rwkv7(x, S, head):
    o = []
    for r, k, v, g, a, b in zip(*(x[name] for name in "qkvgab"), strict=True):
        S = (np.diag(np.exp(g)) + np.outer(b, a)) @ S + np.outer(k, v)
        o.append(r @ S)
    return np.array(o), S


@oracle
def normalized_linear_attention(x, state, head):
    S, z = state
    o = []
    for q, k, v in zip(x["q"], x["k"], x["v"], strict=True):
        S, z = S + np.outer(k, v), z + k
        o.append(q @ S / (q @ z + 1e-12))
    return np.array(o), (S, z)


@oracle
def lightnet(x, state, head):
    """A softmax over time per key channel, as its logarithm and its mean of values."""
    z, S = state
    o = []
    for q, k, v in zip(x["q"], x["k"], x["v"], strict=True):
        new = np.logaddexp(z, k)
        S, z = np.exp(z - new)[:, None] * S + np.outer(np.exp(k - new), v), new
        o.append(q @ S / np.sqrt(len(q)))
    return np.array(o), (z, S)


@oracle
def mlstm(x, state, head):
    C, n, m = state
    o = []
    for q, k, v, i, f in zip(*(x[name] for name in "qkvif"), strict=True):
        new = max(f + m, i)
        forget, write = np.exp(f + m - new), np.exp(i - new)
        C, n, m = forget * C + write * np.outer(k, v), forget * n + write * k, new
        q = q / np.sqrt(len(q))
        o.append(q @ C / max(abs(q @ n), np.exp(-m)))
    return np.array(o), (C, n, m)


@oracle
def hgrn(x, h, head):
    o = []
    for x_t, g in zip(x["x"], x["g"], strict=True):
        h = np.exp(g) * h + x_t
        o.append(h)
    return np.array(o), h


@oracle
def rg_lru(x, h, head):
    """A state enters, so the first token is not its document's first."""
    o = []
    for x_t, r, i in zip(x["x"], x["r"], x["i"], strict=True):
        a = np.exp(-8 * r * np.log1p(np.exp(x["Lambda"])))
        h = a * h + np.sqrt(1 - a**2) * (i * x_t)
        o.append(h)
    return np.array(o), h


@oracle
def mamba(x, h, head):
    y = []
    for u, dt, B_t, C_t in zip(x["u"], x["dt"], x["B"], x["C"], strict=True):
        h = np.exp(dt[:, None] * x["A"]) * h + np.outer(dt * u, B_t)
        y.append(h @ C_t + x["D"] * u)
    return np.array(y), h


@oracle
def log_linear_attention(x, state, head):
    """A binary counter of states: level l > 0 holds 2^(l-1) tokens, the last one all that is older."""
    levels, count = x["level_scales"].shape[1], int(state[1])
    S = np.concatenate([np.zeros_like(state[0][:1]), state[0]])
    o = []
    for q, k, v, g, scales in zip(*(x[name] for name in ("q", "k", "v", "g", "level_scales")), strict=True):
        S = np.exp(g) * S
        S[0] = np.outer(k, v)
        o.append(sum(scale * (q @ level) for scale, level in zip(scales, S, strict=True)) / np.sqrt(len(q)))
        carry = min((count ^ (count + 1)).bit_length(), levels - 1)
        S[carry] += S[:carry].sum(0)
        S[:carry] = 0
        count = (count + 1) % 2 ** (levels - 2)
    return np.array(o), (S[1:], float(count))


@pytest.mark.parametrize("name", ls.RECURRENCES)
def test_the_scan_is_the_papers_equation(name):
    """With grouped heads and a state that enters; the chunk form is held to the scan by the laws."""
    operator = ls.RECURRENCES[name]
    case = Case(operator)
    (o, final), _ = reference(operator, case)
    has_heads, sizes = operator.recurrence.has_heads, case.sizes
    for b in range(sizes["B"]):
        for head in range(sizes["HV"] if has_heads else 1):
            one = {"B": b, "HV": head, "H": head * sizes["H"] // sizes["HV"]}
            index = lambda letters: tuple(one.get(letter, slice(None)) for letter in letters)  # noqa: B023, E731
            x = {name: np.asarray(value)[index(operator.arguments[name].letters)] for name, value in case.args.items()}
            state, got_final = (
                jax.tree.map(lambda s: np.asarray(s)[(b, head) if has_heads else b], tree)  # noqa: B023
                for tree in (case.state, final)
            )
            got_o = np.asarray(o)[b, :, head] if has_heads else np.asarray(o)[b]
            want = ORACLES[name](x, state, head)
            assert_close((got_o, got_final), want, OUTPUTS["float64"], f"sequence {b}, head {head}")
