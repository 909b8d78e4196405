"""mLSTM's stabiliser changes nothing, and gates of any size are right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CHUNK, Case, evaluate, reference
from examples import EXACT, example, heads
from tolerances import GRADIENTS, OUTPUTS, assert_close

import lineax_seq as ls


def unstabilised(args, state):
    """The paper's equations without m, on the true state."""
    C, n, m = state
    C, n = C * jnp.exp(m)[..., None, None], n * jnp.exp(m)[..., None]
    q, k = heads(args["q"], 2) * 4**-0.5, heads(args["k"], 2)

    def token(state, x):
        (C, n), (q, k, v, i, f) = state, x
        C = f[..., None, None] * C + i[..., None, None] * k[..., None] * v[..., None, :]
        n = f[..., None] * n + i[..., None] * k
        size = jnp.maximum(jnp.abs(jnp.einsum("bhk,bhk->bh", q, n)), 1)
        return (C, n), jnp.einsum("bhk,bhkv->bhv", q, C) / size[..., None]

    xs = (q, k, args["v"], jnp.exp(args["i"]), jnp.exp(args["f"]))
    (C, n), o = jax.lax.scan(token, (C, n), jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), xs))
    return jnp.moveaxis(o, 0, 1), C, n


def test_mlstm_is_the_unstabilised_recurrence(x64):
    """Outputs, true state, and the outputs' gradients: m may be a constant to them, as it cancels."""
    args = example(ls.mlstm, T=21)
    state = ls.mlstm(**example(ls.mlstm, seed=1, T=21))[1]

    def ours(args, state):
        o, (C, n, m) = ls.mlstm(**args, initial_state=state, chunk_size=8)
        return o, C * jnp.exp(m)[..., None, None], n * jnp.exp(m)[..., None]

    def outputs_and_gradients(fn):
        out, pull = jax.vjp(fn, args, state)
        return out, pull((jnp.cos(jnp.arange(out[0].size)).reshape(out[0].shape), *map(jnp.zeros_like, out[1:])))

    got, want = jax.jit(lambda: outputs_and_gradients(ours))(), jax.jit(lambda: outputs_and_gradients(unstabilised))()
    assert_close(got[0], want[0], EXACT, "outputs and state")
    assert_close(got[1], want[1], GRADIENTS["float64"], "gradients")


@pytest.mark.parametrize("gates", [dict(i=100.0), dict(i=-100.0), dict(i=100.0, f=-1e4), dict(f=-np.inf)], ids=str)
def test_mlstm_with_gates_beyond_float_range(gates):
    """exp(i) overflows or vanishes; forget gates close completely; all of it now and then.

    q, k > 0, as nothing bounds a quotient of sums that cancel.
    """
    case = Case(ls.mlstm).packed(5, CHUNK + 3)
    hit = np.random.default_rng(0).random(case.args["i"].shape) < 0.2
    case.args = {**case.args, **{name: np.where(hit, value, case.args[name]) for name, value in gates.items()}}
    case.args = {**case.args, **{name: np.abs(case.args[name]) for name in "qk"}}
    case = case.rounded("float32")
    out, grads = reference(ls.mlstm, case)
    got, got_grads = evaluate(ls.mlstm, "chunk", case, "float32")
    assert np.isfinite(np.asarray(out[0])).all()
    assert_close(got, out, OUTPUTS["float32"], "outputs")
    assert_close(got_grads, grads, GRADIENTS["float32"], "gradients")


@pytest.mark.parametrize("log_size", [200.0, -200.0])
def test_mlstm_with_all_gates_beyond_float_range(log_size):
    """Far above, the denominator is |n q| whatever its size; far below, it is 1 and the outputs vanish."""
    args = ls.mlstm.example(jax.random.key(0), B=1, T=20, H=1, K=4, V=4)
    args["i"] = args["i"] + log_size
    loss = lambda args: ls.mlstm(**args, chunk_size=8)[0].sum()  # noqa: E731
    o, _ = ls.mlstm(**args, chunk_size=8)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((o, jax.grad(loss)(args))))
    args["q"] = jnp.zeros_like(args["q"])
    np.testing.assert_array_equal(ls.mlstm(**args, chunk_size=8)[0], 0)  # not 0 / 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.grad(loss)(args)))
