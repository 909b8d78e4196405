"""RG-LRU and Mamba: what the laws of every recurrence do not say about vector states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import EXACT, STARTS, T, example, segments
from tolerances import assert_close

import lineax_seq as ls


def griffin(args, starts, h):
    o = []
    for t in range(args["x"].shape[0]):
        a = np.exp(-8 * args["r"][t] * np.log1p(np.exp(args["Lambda"])))
        room = 1 if t in starts else np.sqrt(1 - a**2)
        h = (0 if t in starts else a * h) + room * args["i"][t] * args["x"][t]
        o.append(h)
    return np.array(o)


@pytest.mark.parametrize("form", ["scan", "chunk"])
def test_rg_lru_takes_a_documents_first_token_whole(form, x64):
    args = example(ls.rg_lru, B=1)
    one = {name: np.asarray(x if name == "Lambda" else x[0]) for name, x in args.items()}
    options = dict(form=form, **({"chunk_size": 8} if form == "chunk" else {}))
    o, _ = ls.rg_lru(**args, **options, segment_ids=segments(batch=1))
    assert_close(o[0], griffin(one, (0, *STARTS), 0), EXACT, "packed")
    state = jnp.ones((1, 5))
    o, _ = ls.rg_lru(**args, **options, segment_ids=segments(batch=1), initial_state=state)
    assert_close(o[0], griffin(one, STARTS, 1.0), EXACT, "with a state")
    token = {name: x if name == "Lambda" else x[:, 0] for name, x in args.items()}
    assert_close(ls.rg_lru.step(**token)[0][0], griffin(one, (0,), 0)[0], EXACT, "first step")
    assert_close(ls.rg_lru.step(**token, state=state)[0][0], griffin(one, (), 1.0)[0], EXACT, "later step")


def test_rg_lru_gradient_is_finite_where_nothing_decays():
    args = ls.rg_lru.example(jax.random.key(0), B=1, T=12, D=4)
    args["r"] = jnp.zeros_like(args["r"])
    gradients = jax.grad(lambda args: ls.rg_lru(**args)[0].sum())(args)
    assert all(np.isfinite(d).all() for d in gradients.values())
    assert np.abs(gradients["r"]).max() > 0


def test_mamba_reads_its_steps_from_another_stream(x64):
    """u from one stream; dt, B, C from a flow: the gradients of each stay its own, and steps share the state."""
    flow = jax.random.normal(jax.random.key(1), (2, T, 5))
    args = example(ls.mamba)
    u, A = args["u"], args["A"]

    def run(u, flow):
        return ls.mamba(u, jax.nn.softplus(flow), A, flow[..., :3], flow[..., 2:], chunk_size=8)

    o, state = run(u, flow)
    d_u, d_flow = jax.grad(lambda u, flow: run(u, flow)[0][:, 9].sum(), (0, 1))(u, flow)
    assert np.any(d_u[:, :10]) and np.any(d_flow[:, :10]) and not np.any(d_u[:, 10:]) and not np.any(d_flow[:, 10:])
    h = None
    for t in range(3):
        y, h = ls.mamba.step(u[:, t], jax.nn.softplus(flow[:, t]), A, flow[:, t, :3], flow[:, t, 2:], state=h)
        assert_close(y, o[:, t], EXACT)
