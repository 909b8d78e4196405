"""LightNet is a softmax over time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CHUNK, Case, evaluate, reference
from examples import EXACT, T, example, heads, segments, with_gradients
from tolerances import GRADIENTS, OUTPUTS, assert_close

import lineax_seq as ls


def softmax_over_time(args, state, allowed):
    """o_t = q_t · (softmax over the tokens that t may read, per key channel, of their values), and the state's part."""
    z, S = state
    q, k = heads(args["q"], 2) * 4**-0.5, heads(args["k"], 2)
    logs = jnp.where(allowed[..., None, None], k[:, None], -jnp.inf)  # [B, T, T, HV, K]
    enters = allowed[:, :, :1, None]  # the state belongs to the document of the first token
    old = jnp.where(enters, z[:, None], -jnp.inf)
    total = jnp.logaddexp(jax.nn.logsumexp(logs, axis=2), old)
    mean = jnp.einsum("bijhk,bjhv->bihkv", jnp.exp(logs - total[:, :, None]), args["v"])
    mean = mean + jnp.exp(old - total)[..., None] * S[:, None]
    return jnp.einsum("bihk,bihkv->bihv", q, mean), (total[:, -1], mean[:, -1])


@pytest.mark.parametrize(("causal", "packed"), [(True, True), (False, False), (False, True)])
def test_lightnet_is_a_softmax_over_time(causal, packed, x64):
    args = example(ls.lightnet)
    state = ls.lightnet(**example(ls.lightnet, seed=1))[1]
    ids = segments() if packed else jnp.zeros((2, T), jnp.int32)
    allowed = ids[:, :, None] == ids[:, None]
    allowed = allowed & jnp.tri(T, dtype=bool) if causal else allowed
    options = dict(causal=causal, segment_ids=ids if packed else None, chunk_size=8)
    ours = lambda args, state: ls.lightnet(**args, **options, initial_state=state)  # noqa: E731
    theirs = lambda args, state: softmax_over_time(args, state, allowed)  # noqa: E731
    got, want = with_gradients(ours, args, state), with_gradients(theirs, args, state)
    assert_close(got[0], want[0], EXACT, "outputs")
    assert_close(got[1], want[1], GRADIENTS["float64"], "gradients")


@pytest.mark.parametrize("size", [10.0, 100.0])
def test_lightnet_with_keys_of_very_different_size(size):
    """Where exp(k - first key) leaves float32 the halves take over."""
    case = Case(ls.lightnet).packed(5, CHUNK + 3)
    case.args = {**case.args, "k": np.asarray(case.args["k"]) * size}
    case = case.rounded("float32")
    out, grads = reference(ls.lightnet, case)
    got, got_grads = evaluate(ls.lightnet, "chunk", case, "float32")
    assert_close(got, out, OUTPUTS["float32"], "outputs")
    assert_close(got_grads, grads, GRADIENTS["float32"], "gradients")


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_lightnet_does_not_see_masked_tokens(size, x64):
    """k = -1e30 leaves a token out, at the start, in the middle, at the end, and where there is nothing else."""
    args = example(ls.lightnet, B=1)
    args["k"] = args["k"] * size
    hidden = np.zeros(T, bool)
    hidden[[0, 1, 11, T - 1]] = True
    hidden[16:24] = True  # a whole chunk
    masked = {**args, "k": jnp.where(hidden[None, :, None, None], -1e30, args["k"])}
    rest = {name: x[:, ~hidden] for name, x in args.items()}
    want, want_state = ls.lightnet(**rest, form="scan")
    for form in ("chunk", "scan"):
        o, state = ls.lightnet(**masked, form=form, **({"chunk_size": 8} if form == "chunk" else {}))
        assert_close((o[:, ~hidden], state), (want, want_state), EXACT, form)
        np.testing.assert_array_equal(o[:, :2], 0)  # nothing to read yet
    alone = ls.lightnet(**masked, causal=False)[1]
    assert_close(alone, want_state, EXACT, "bidirectional")


def test_lightnet_scans_an_image_once(x64):
    """Which way the image is read makes no difference, unless it is read causally."""
    grid = lambda x: x.reshape(2, 4, 6, *x.shape[2:])  # noqa: E731
    q, k, v = (grid(x) for x in example(ls.lightnet, T=24).values())
    o, state = ls.lightnet_2d(q, k, v)
    turned, turned_state = ls.lightnet_2d(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)))
    assert_close((jnp.swapaxes(turned, 1, 2), turned_state), (o, state), EXACT)
    causal, last = ls.lightnet_2d(q, k, v, causal=True)
    assert_close((causal[:, -1, -1], last), (o[:, -1, -1], state), EXACT)
    assert not np.allclose(causal[:, 0, 0], o[:, 0, 0])
    with pytest.raises(ValueError, match="lightnet_2d: q .*wants"):
        ls.lightnet_2d(q[:, 0], k, v)
    with pytest.raises(ValueError, match="lightnet_2d: segment_ids"):
        ls.lightnet_2d(q, k, v, segment_ids=jnp.zeros((2, 24), jnp.int32))
