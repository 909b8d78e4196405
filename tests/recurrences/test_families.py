"""What the laws of every recurrence do not say: properties of one family, against formulas written out in full."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CHUNK, Case, evaluate, reference
from tolerances import GRADIENTS, OUTPUTS, assert_close

import lineax_seq as ls
from lineax_seq.core import chunked, forms
from lineax_seq.core.chunked import Chunked
from lineax_seq.core.layout import Layout

KINDS = ("simple_gla", "gated_delta_rule", "rwkv7", "mlstm", "mamba")  # of walks; the others under `slow`
EXACT = OUTPUTS["float64"]
T = 2 * CHUNK + 5
STARTS = (7, 25)  # where the documents of the packed examples start


def example(operator, seed=0, **sizes):
    sizes = {**dict(B=2, T=T, H=2, HV=4, K=4, V=6, D=5, N=3, L=7), **sizes}
    return operator.example(jax.random.key(seed), dtype=jnp.float64, **sizes)


def segments(length=T, batch=2):
    return jnp.broadcast_to(sum((jnp.arange(length) >= start).astype(jnp.int32) for start in STARTS), (batch, length))


def heads(x, n):
    """Key heads repeated for the value heads that share them."""
    return jnp.repeat(x, n, axis=2)


def with_gradients(fn, *args):
    """`fn(*args)` and the gradients of a weighted sum of its outputs."""

    @jax.jit
    def run(args):
        out, pull = jax.vjp(fn, *args)
        weights = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(9), leaf.shape, leaf.dtype), out)
        return out, pull(weights)

    return run(args)


# ---- reading the future: causal=False and block_size


def decayed_weights(g, borders):
    """`[B, T, T, HV]`: the decay from j to i <= i's past, and back from the future up to the next border.

    `borders [B, T]` numbers the documents, or the blocks, that the future ends with.
    """
    G = jnp.cumsum(g, axis=1)
    past = jnp.exp(G[:, :, None] - G[:, None])  # j < i: g of j+1..i
    before = G - g
    future = jnp.exp(before[:, None] - before[:, :, None])  # j > i: g of i..j-1
    order = jnp.arange(g.shape[1])
    later = (order[None, :] > order[:, None])[None, :, :, None]
    return jnp.where(later, jnp.where((borders[:, :, None] == borders[:, None])[..., None], future, 0), past)


def direct(q, k, v, weights, same, scale):
    n = v.shape[2] // q.shape[2]
    scores = jnp.einsum("bihk,bjhk->bijh", heads(q, n) * scale, heads(k, n)) * weights * same[..., None]
    return scores, jnp.einsum("bijh,bjhv->bihv", scores, v)


@pytest.mark.parametrize(
    ("name", "block_size", "packed"),
    [
        ("simple_gla", None, False),
        ("simple_gla", 5, True),
        ("retention", None, True),
        ("linear_attention", 5, True),
        ("normalized_linear_attention", None, False),
        ("normalized_linear_attention", None, True),
        ("normalized_linear_attention", 5, False),
    ],
)
def test_reading_the_future(name, block_size, packed, x64):
    """Outputs and gradients against a matrix of weights between all pairs of tokens."""
    operator = ls.RECURRENCES[name]
    args = example(operator)
    ids = segments() if packed else jnp.zeros((2, T), jnp.int32)
    option = dict(causal=False) if block_size is None else dict(block_size=block_size)

    def ours(args):
        return operator(**args, **option, segment_ids=ids if packed else None, chunk_size=8)[0]

    def theirs(args):
        g = jnp.zeros((2, T, 4))
        if name == "simple_gla":
            g = args["g"]
        if name == "retention":
            g = g + jnp.log1p(-(2.0 ** (-5 - jnp.arange(4.0))))
        borders = ids
        if block_size is not None:
            first = jnp.argmax(ids[:, :, None] == ids[:, None], axis=2)  # of the token's document
            borders = ids * T + (jnp.arange(T) - first) // block_size
        same = ids[:, :, None] == ids[:, None]
        scale = 1.0 if name == "normalized_linear_attention" else 4**-0.5
        scores, o = direct(args["q"], args["k"], args["v"], decayed_weights(g, borders), same, scale)
        return o / scores.sum(2)[..., None] if name == "normalized_linear_attention" else o

    got, want = with_gradients(ours, args), with_gradients(theirs, args)
    assert_close(got[0], want[0], 1e-11, "outputs")
    assert_close(got[1], want[1], 1e-11, "gradients")


def test_blocks_of_one_token_are_causal_and_one_block_is_not(x64):
    args = example(ls.simple_gla)
    assert_close(ls.simple_gla(**args, block_size=1), ls.simple_gla(**args), EXACT)
    assert_close(ls.simple_gla(**args, block_size=T), ls.simple_gla(**args, causal=False), EXACT)


def test_handing_the_state_over_between_blocks(x64):
    """Three blocks of images at once, or the third after the state of two."""
    args = example(ls.simple_gla, T=24)
    o, final = ls.simple_gla(**args, block_size=8)
    state, parts = None, []
    for part in (slice(0, 16), slice(16, 24)):
        o_part, state = ls.simple_gla(**{n: x[:, part] for n, x in args.items()}, block_size=8, initial_state=state)
        parts.append(o_part)
    assert_close((jnp.concatenate(parts, 1), state), (o, final), EXACT)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("gla", dict(causal=False), "gla: causal=False: this recurrence reads the past only"),
        ("gla", dict(block_size=4), "gla: block_size=4: this recurrence reads the past only"),
        ("lightnet", dict(block_size=4), "lightnet: block_size=4"),
        ("retention", dict(block_size=0), "block_size=0, wants a number of tokens"),
        ("retention", dict(block_size=True), "block_size=True, wants a number of tokens"),
        ("retention", dict(block_size=4, causal=False), "leave block_size out, or causal"),
        ("retention", dict(causal=False, form="scan"), "causal=False has no token scan"),
    ],
)
def test_directions_that_cannot_be_are_refused(name, options, match):
    operator = ls.RECURRENCES[name]
    args = operator.example(jax.random.key(0), B=1, T=8, H=1, K=4, V=4)
    with pytest.raises(ValueError, match=match):
        operator(**args, **options)


def test_a_kernel_that_reads_the_future_is_refused():
    args = ls.retention.example(jax.random.key(0), B=1, T=8, H=1, K=4, V=4)
    with pytest.raises(NotImplementedError, match="no kernel that reads the future"):
        ls.retention(**args, causal=False, implementation="mosaic_gpu")


# ---- lightnet


def softmax_over_time(args, state, allowed):
    """o_t = q_t · (softmax over the tokens that t may read, per key channel, of their values), and the state's part."""
    z, S = state
    q, k = heads(args["q"], 2) * 4**-0.5, heads(args["k"], 2)
    logs = jnp.where(allowed[..., None, None], k[:, None], -jnp.inf)  # [B, T, T, HV, K]
    enters = allowed[:, :, :1, None] & True  # the state belongs to the document of the first token
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
    assert_close(got[1], want[1], 1e-11, "gradients")


@pytest.mark.parametrize("size", [10.0, 100.0])
def test_lightnet_with_keys_of_very_different_size(size):
    """Where exp(k - first key) leaves float32 the halves take over."""
    case = Case(ls.lightnet).packed(5, CHUNK + 3)
    case.args = {**case.args, "k": np.asarray(case.args["k"]) * size}
    case = case.rounded("float32")
    out, grads = reference(ls.lightnet, case)
    got, got_grads = evaluate(ls.lightnet, "chunk", case, "float32")
    assert_close(got, out, OUTPUTS["float32"], "outputs")
    if size > 1e3:  # the entering state's weight is below the smallest float32
        got_grads, grads = got_grads[0], grads[0]
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


# ---- mLSTM


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
    assert_close(got[0], want[0], 1e-12, "outputs and state")
    assert_close(got[1], want[1], 1e-11, "gradients")


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


# ---- elementwise recurrences


def test_the_parallel_chunks_of_accelerators(x64):
    """On a CPU the vector family scans tokens; what runs elsewhere is right too."""
    record = dataclasses.replace(ls.hgrn.recurrence, scans_on_cpu=False)
    args = example(ls.hgrn)
    state = jax.random.normal(jax.random.key(1), (2, 5))
    starts = jnp.zeros((2, T), bool).at[:, jnp.asarray(STARTS)].set(True)
    assert not forms._scans(record) and forms._scans(ls.hgrn.recurrence)
    for reset in (None, starts):
        parallel = lambda args, state: forms.chunk(record, None, 8, args, reset, state)  # noqa: B023, E731
        loop = lambda args, state: forms.scan(record, None, args, reset, state)  # noqa: B023, E731
        got, want = with_gradients(parallel, args, state), with_gradients(loop, args, state)
        assert_close(got, want, EXACT)


@pytest.mark.parametrize("tokens", [1, 64, 1 << 40], ids=["blocks_of_one", "two_blocks", "at_once"])
@pytest.mark.parametrize(
    "operator",
    [
        pytest.param(operator, id=name, marks=() if name in KINDS else pytest.mark.slow)
        for name, operator in ls.RECURRENCES.items()
        if name != "log_linear_attention"  # its fields hold positions, which have no gradient
    ],
)
def test_chunks_are_right_in_blocks_of_any_size(operator, tokens, monkeypatch, x64):
    """Blocks keep the state that enters them and pull back through their walk, one block the states of its chunks."""
    monkeypatch.setattr(chunked, "CPU_BLOCK_TOKENS", tokens)
    args = operator.example(jax.random.key(0), B=1, T=40, H=1, HV=2, K=4, V=4, D=2, N=4, NH=2, L=6, dtype=jnp.float64)
    fields, record = operator.fields(args), operator.recurrence
    state = jax.tree.map(lambda s: s + 0.5, operator(**args)[1])
    length = next(iter(fields.values())).shape[1]
    reset = jnp.zeros((1, length), bool).at[:, length // 3].set(True)
    got = with_gradients(lambda xs, state: forms.chunk(record, None, 8, xs, reset, state), fields, state)
    want = with_gradients(lambda xs, state: forms.scan(record, None, xs, reset, state), fields, state)
    assert_close(got, want, EXACT)


@pytest.mark.parametrize("operator", [ls.gla, ls.kda, ls.lightnet], ids=lambda operator: operator.name)
@pytest.mark.parametrize("strengths", [(0.1, 0.1, 0.1), (0.1, 300.0, 2.0), (300.0, 0.1, 0.1)], ids=str)
def test_every_block_chooses_how_to_prepare(operator, strengths, monkeypatch, x64):
    """Blocks of one chunk of 32 tokens: all mild, or each of its own kind; with gradients and without."""
    monkeypatch.setattr(chunked, "CPU_BLOCK_TOKENS", 64)
    args = operator.example(jax.random.key(0), B=1, T=90, H=1, HV=2, K=4, V=4, dtype=jnp.float64)
    scaled = "k" if operator is ls.lightnet else "g"
    args[scaled] = args[scaled] * jnp.repeat(jnp.asarray(strengths), 32)[None, :90, None, None]
    fields, record = operator.fields(args), operator.recurrence
    state = jax.tree.map(lambda s: s + 0.5, operator(**args)[1])
    chunk = lambda xs, state: forms.chunk(record, None, 32, xs, None, state)  # noqa: E731
    want = with_gradients(lambda xs, state: forms.scan(record, None, xs, None, state), fields, state)
    assert_close(with_gradients(chunk, fields, state), want, EXACT)
    assert_close(jax.jit(chunk)(fields, state), want[0], EXACT)
    call = Chunked(record, None, 32, fields, None)
    np.testing.assert_array_equal(call._decided(call._applies(call.shortcuts[0])), call._decided())


def test_forward_alone_blocks_are_smaller(monkeypatch, x64):
    """Which changes nothing: here one chunk of both heads, where a gradient's forward pass takes four."""
    monkeypatch.setattr(chunked, "CPU_FORWARD_CHUNKS", 2)
    args = ls.kda.example(jax.random.key(0), B=1, T=60, H=1, HV=2, K=4, V=4, dtype=jnp.float64)
    chunk = lambda xs: forms.chunk(ls.kda.recurrence, None, 16, xs, None, jnp.zeros((1, 2, 4, 4)))  # noqa: E731
    (alone, (kept, _)) = jax.jit(chunk)(args), jax.vjp(chunk, args)
    assert_close(alone, kept, EXACT)
    blocks = [Chunked(ls.kda.recurrence, None, 16, args, None, forward_alone=it).blocks for it in (True, False)]
    assert blocks == [4, 1]


@pytest.mark.parametrize("operator", [ls.gla, ls.kda, ls.lightnet], ids=lambda operator: operator.name)
@pytest.mark.parametrize("strength", [0.1, 1.0, 30.0])
def test_all_chunks_at_once_choose_how_to_prepare(operator, strength, monkeypatch, x64):
    """Elsewhere than on a CPU all chunks are one block; of 32 tokens, so that every shortcut is worth it."""
    monkeypatch.setattr(chunked, "CPU_BLOCK_TOKENS", 1 << 40)
    args = operator.example(jax.random.key(0), B=1, T=70, H=1, HV=2, K=4, V=4, dtype=jnp.float64)
    scaled = "k" if operator is ls.lightnet else "g"
    args[scaled] = args[scaled] * strength
    fields, record = operator.fields(args), operator.recurrence
    state = jax.tree.map(lambda s: s + 0.5, operator(**args)[1])
    got = with_gradients(lambda xs, state: forms.chunk(record, None, 32, xs, None, state), fields, state)
    want = with_gradients(lambda xs, state: forms.scan(record, None, xs, None, state), fields, state)
    assert_close(got, want, EXACT)


def test_factors_serve_several_runs(monkeypatch, x64):
    """All chunks at once: what `chunk_factors` gives is not made again, and gradients are as without it."""
    monkeypatch.setattr(chunked, "CPU_BLOCK_TOKENS", 1 << 40)
    args = ls.gla.example(jax.random.key(0), B=1, T=20, H=1, HV=2, K=4, V=4, dtype=jnp.float64)
    fields, state = ls.gla.fields(args), ls.gla(**args)[1]
    reset = jnp.zeros((1, 20), bool).at[:, 11].set(True)
    call = functools.partial(forms.chunk, ls.gla.recurrence, None, 8)
    factors = forms.chunk_factors(ls.gla.recurrence, None, 8, fields, reset)
    got = with_gradients(lambda xs, state: call(xs, reset, state, factors), fields, state)
    want = with_gradients(lambda xs, state: forms.scan(ls.gla.recurrence, None, xs, reset, state), fields, state)
    assert_close(got, want, EXACT)
    np.testing.assert_array_equal(call(fields, reset, state, jax.tree.map(jnp.zeros_like, factors))[1], 0)
    monkeypatch.setattr(chunked, "CPU_BLOCK_TOKENS", 1)  # blocks follow one another
    assert forms.chunk_factors(ls.gla.recurrence, None, 8, fields, reset) is None


def test_factors_of_several_kinds_stay_inside_their_branch(monkeypatch):
    monkeypatch.setattr(chunked, "CPU_BLOCK_TOKENS", 1 << 40)
    fields = ls.lightnet.fields(ls.lightnet.example(jax.random.key(0), B=1, T=40, H=1, HV=1, K=4, V=4))
    assert forms.chunk_factors(ls.lightnet.recurrence, None, 16, fields, None) is None


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


def test_mamba_holds_the_states_of_one_chunk_at_a_time():
    """Compiled temporary bytes of forward and backward, against a state [D, N] for every token."""
    args = jax.eval_shape(lambda: ls.mamba.example(jax.random.key(0), B=1, T=2048, D=32, N=64))
    loss = lambda args: ls.mamba(**args, chunk_size=64)[0].sum()  # noqa: E731
    used = jax.jit(jax.grad(loss)).lower(args).compile().memory_analysis().temp_size_in_bytes
    assert used < 2048 * 32 * 64 * 4 / 2


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


# ---- log-linear attention


@pytest.mark.parametrize("levels", [1, 2, 3, 7])
def test_log_linear_attention_is_its_matrix_of_levels(levels, x64):
    """level(t, j) = bitlength(t xor j), the last one for all that is older."""
    args = example(ls.log_linear_attention, L=levels)
    t = np.arange(T)
    level = np.minimum(np.vectorize(lambda n: int(n).bit_length())(t[:, None] ^ t), levels - 1)
    by_level = jnp.moveaxis(args["level_scales"], 2, 3)  # [B, T, L, HV]
    scales = jnp.stack([by_level[:, i][:, level[i]] for i in t], axis=1)  # [B, T, T, HV]
    G = jnp.cumsum(args["g"], axis=1)
    weights = jnp.where(jnp.tri(T, dtype=bool)[None, :, :, None], jnp.exp(G[:, :, None] - G[:, None]), 0)
    want = direct(args["q"], args["k"], args["v"], weights * scales, jnp.ones((2, T, T)), 4**-0.5)[1]
    for form in ("scan", "chunk"):
        o, _ = ls.log_linear_attention(**args, form=form, **({"chunk_size": 8} if form == "chunk" else {}))
        assert_close(o, want, EXACT, form)


@pytest.mark.parametrize("levels", [3, 7])
def test_aligned_chunks_take_the_short_way(levels, x64):
    """The form for aligned chunks against the one for chunks that begin anywhere, with gradients."""
    operator = ls.log_linear_attention
    args = example(operator, T=40, L=levels)
    anywhere = dataclasses.replace(operator.recurrence, shortcuts=())
    fields = operator.fields(args)
    aligned = operator.recurrence.shortcuts[0].applies
    chunks = fields["position"].reshape(2, 5, 8, 4)
    assert aligned({"position": chunks}) and not aligned({"position": chunks + 1})
    assert not aligned({"position": chunks.at[-1, 0, 0, 3].set(-1)})
    state = Layout(anywhere, fields).zero_state(fields)
    floats = {name: x for name, x in fields.items() if name != "position"}

    def run(record):
        def on(xs):
            return forms.chunk(record, 0.5, 8, {**xs, "position": fields["position"]}, None, state)

        return on

    assert_close(with_gradients(run(operator.recurrence), floats), with_gradients(run(anywhere), floats), EXACT)


def test_documents_that_start_with_aligned_chunks(x64):
    """The short way forgets too."""
    args = example(ls.log_linear_attention, T=40)
    ids = jnp.broadcast_to((jnp.arange(40) >= 16).astype(jnp.int32), (2, 40))
    state = ls.log_linear_attention(**example(ls.log_linear_attention, seed=1, T=32))[1]

    def run(**options):
        return lambda args, state: ls.log_linear_attention(**args, initial_state=state, segment_ids=ids, **options)

    got, want = (with_gradients(run(**o), args, state) for o in (dict(chunk_size=8), dict(form="scan")))
    assert_close(got, want, EXACT)


def test_log_linear_count_wraps(x64):
    """The count keeps the bits that the levels can tell apart: no length of a document is too long for it."""
    args = example(ls.log_linear_attention, L=4)
    _, (_, count) = ls.log_linear_attention(**args)
    np.testing.assert_array_equal(count, T % 4)
    _, (_, count) = ls.log_linear_attention(**args, segment_ids=segments())
    np.testing.assert_array_equal(count, (T - STARTS[-1]) % 4)
