"""Inputs on which other chunk forms are known to give NaN, infinity or a drifting state. Ours: finite and right."""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, evaluate, reference
from tolerances import GRADIENTS, OUTPUTS, assert_close

import lineax_seq as ls

ONE_HEAD = dict(B=1, H=1, HV=1, K=16, V=16)
CHUNK = 64


def assert_right(operator, case):
    out, grads = reference(operator, case)
    got, got_grads = evaluate(operator, "chunk", case, "float32", chunk_size=CHUNK)
    assert_close(got, out, OUTPUTS["float32"], "outputs")
    assert_close(got_grads, grads, GRADIENTS["float32"], "gradients")


def hard_case(operator):
    return Case(operator, T=2 * CHUNK, **ONE_HEAD).rounded("float32")


@pytest.mark.parametrize("g", [-0.9, -1.4, -2.0, -5.0])
@pytest.mark.parametrize("operator", [ls.kda, ls.gdn2, ls.rwkv7], ids=lambda operator: operator.name)
def test_gradients_under_strong_gates(operator, g):
    """Uniform gates that add up to more than 88 in a chunk, where exp(-G) leaves float32; or to 58, where its square
    does, and one product still makes the scores."""
    case = hard_case(operator)
    case.args = {**case.args, "g": np.full_like(case.args["g"], g)}
    assert_right(operator, case)


@pytest.mark.parametrize("rates", ["random", "one", "two"])
def test_one_removal_key_at_every_token(rates):
    """RWKV-7's transition diag(w) - kappa (kappa * eta)^T and one kappa: powers of A_ab reach 1e17."""
    case = hard_case(ls.rwkv7)
    kappa = np.broadcast_to(np.asarray(case.args["a"])[:, :1], case.args["a"].shape)
    eta = {"one": 1.0, "two": 2.0}.get(rates) or np.random.default_rng(0).random(kappa.shape)
    g = np.zeros_like(kappa) if rates == "two" else -0.6 * np.random.default_rng(1).random(kappa.shape)
    case.args = {**case.args, "a": -kappa, "b": kappa * eta, "g": g}
    assert_right(ls.rwkv7, case.rounded("float32"))


def reflected(beta_of, tokens: int = 4096, size: int = 8):
    """The identity after `tokens` reflections along random keys that bfloat16 has rounded; and the reference's."""
    keys = np.random.default_rng(0).normal(size=(1, tokens, 1, size))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    keys = jnp.asarray(keys, jnp.bfloat16)
    exact = np.asarray(keys, np.float64)
    beta = jnp.asarray(beta_of((exact**2).sum(-1)), jnp.float32)
    state, values = jnp.eye(size)[None, None], jnp.zeros((1, tokens, 1, size), jnp.bfloat16)
    o, final = ls.delta_rule(keys, keys, values, beta, initial_state=state)
    assert np.all(np.isfinite(np.asarray(o, np.float32)))
    want = np.eye(size)
    for key, rate in zip(exact[0, :, 0], np.asarray(beta, np.float64)[0, :, 0], strict=True):
        want = want - rate * np.outer(key, key @ want)
    return np.asarray(final)[0, 0], want


def test_rounded_keys_and_beta_two():
    """Keys that bfloat16 has rounded are not of length one, so beta = 2 stretches: that is followed, not amplified."""
    final, want = reflected(lambda squared: np.full_like(squared, 2.0))
    assert np.abs(want @ want.T - np.eye(8)).max() > 0.01  # the inputs' own doing
    assert_close(final, want, OUTPUTS["float32"])


def test_rounded_keys_and_beta_over_their_length():
    """beta = 2 / |k|^2 of the rounded key reflects exactly, and the state stays orthogonal."""
    final, want = reflected(lambda squared: 2 / squared)
    assert_close(want @ want.T, np.eye(8), OUTPUTS["float32"], "the reference reflects")
    assert_close(final, want, OUTPUTS["float32"])
