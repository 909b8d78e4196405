"""The laws that every recurrence of the registry obeys. A new recurrence is tested by being listed there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CHUNK, SIZES, Case, chunked, evaluate, reference
from tolerances import GRADIENTS, OUTPUTS, assert_close, relative_rms

import lineax_seq as ls
from lineax_seq.core import lowering, monoid
from lineax_seq.core.arguments import rate, wide_rate
from lineax_seq.core.monoid import Segmented

every_recurrence = pytest.mark.parametrize("operator", ls.RECURRENCES.values(), ids=ls.RECURRENCES.keys())
DOCUMENTS = (5, CHUNK, 2 * CHUNK - 1)


@functools.cache
def packed_reference(operator, dtype):
    case = Case(operator).packed(*DOCUMENTS).rounded(dtype)
    return case, reference(operator, case)


# ---- the monoid


@every_recurrence
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "segmented"])
def test_monoid_laws(operator, packed, x64):
    record = operator.recurrence
    sizes = dict(B=1, T=6, H=1, K=4, V=5, D=6, N=3, L=4)
    fields = operator.fields(operator.example(jax.random.key(0), dtype=jnp.float64, **sizes))
    one_head = lambda name, x: x[0] if record.head_letter(name) else x  # noqa: E731

    def token(t):
        xs = {name: fields[name][0, t] for name in record.fields} | {name: fields[name] for name in record.parameters}
        return {name: one_head(name, x) for name, x in xs.items()}

    zero = state = record.init_state(token(0))
    for t in range(3):
        state = record.monoid.apply(record.element(token(t)), state)
    a, b, c = (record.element(token(t)) for t in range(3, 6))
    laws, identity = record.monoid, record.monoid.identity(state)
    if packed:
        laws = monoid.segmented(laws, zero)
        a, b, c = (Segmented(jnp.asarray(forget), s) for forget, s in zip((False, True, False), (a, b, c), strict=True))
        identity = laws.identity(state)
    left, right = laws.combine(laws.combine(a, b), c), laws.combine(a, laws.combine(b, c))
    assert_close(laws.apply(left, state), laws.apply(right, state), 1e-13, "associativity")
    in_turn = laws.apply(c, laws.apply(b, laws.apply(a, state)))
    assert_close(laws.apply(left, state), in_turn, 1e-13, "action")
    for name, summary in (("left", laws.combine(identity, a)), ("right", laws.combine(a, identity))):
        assert_close(laws.apply(summary, state), laws.apply(a, state), 1e-13, f"{name} identity")


# ---- the forms agree


@every_recurrence
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_chunk_equals_scan(operator, dtype):
    """Outputs, final state and all gradients: grouped heads, packed documents, a state that enters, T = 2C + 5."""
    case, (out, grads) = packed_reference(operator, dtype)
    got, got_grads = evaluate(operator, "chunk", case, dtype)
    assert_close(got, out, OUTPUTS[dtype], "outputs")
    assert_close(got_grads, grads, GRADIENTS[dtype], "gradients")
    assert {leaf.dtype for leaf in jax.tree.leaves((got[0], got_grads[0]))} == {jnp.dtype(dtype)}
    state_dtype = jnp.dtype("float64" if dtype == "float64" else "float32")
    assert {leaf.dtype for leaf in jax.tree.leaves((got[1], got_grads[1]))} == {state_dtype}


@every_recurrence
def test_scan_in_float32(operator):
    case, (out, grads) = packed_reference(operator, "float32")
    got, got_grads = evaluate(operator, "scan", case, "float32")
    assert_close(got, out, OUTPUTS["float32"], "outputs")
    assert_close(got_grads, grads, GRADIENTS["float32"], "gradients")


@every_recurrence
@pytest.mark.parametrize(
    "length",
    [1, CHUNK + 1, *(pytest.param(t, marks=pytest.mark.slow) for t in (2, CHUNK - 1, CHUNK, 3 * CHUNK))],
)
def test_any_length(operator, length):
    """Against the reference at full length, whose later tokens are identity tokens (zeros)."""
    full, short = Case(operator), Case(operator)
    cut = lambda x: np.where(np.arange(x.shape[1]).reshape(1, -1, *(1,) * (x.ndim - 2)) < length, x, 0)  # noqa: E731
    slice_ = lambda x: x[:, :length]  # noqa: E731
    if length > SIZES["T"]:
        full, short = Case(operator, T=length), Case(operator, T=length)
    tokens = lambda f: {  # noqa: E731
        name: f(np.asarray(x)) if operator.arguments[name].per_token else x for name, x in short.args.items()
    }
    full.args, full.d_out = tokens(cut), (cut(np.asarray(full.d_out[0])), full.d_out[1])
    short.args, short.d_out = tokens(slice_), (slice_(np.asarray(short.d_out[0])), short.d_out[1])
    short.segment_ids = short.segment_ids[:, :length]
    if not operator.zero_is_identity:
        (out, grads) = reference(operator, short)
    else:
        (o, state), (d_args, d_state) = reference(operator, full)
        per_token = lambda name, x: x[:, :length] if operator.arguments[name].per_token else x  # noqa: E731
        out, grads = (o[:, :length], state), ({n: per_token(n, x) for n, x in d_args.items()}, d_state)
    got, got_grads = evaluate(operator, "chunk", short, "float32")
    assert_close(got, out, OUTPUTS["float32"], "outputs")
    assert_close(got_grads, grads, GRADIENTS["float32"], "gradients")


@every_recurrence
def test_fast_chunk_form_equals_the_derived_one(operator, x64):
    """A family's matmul form against the chunk form that follows from its tokens alone."""
    case = Case(operator)
    fast, slow = (chunked(operator, CHUNK, derived)(case.args, case.state) for derived in (False, True))
    assert_close(fast, slow, OUTPUTS["float64"])


@every_recurrence
def test_steps_equal_scan(operator):
    case = Case(operator)
    (o, _), _ = reference(operator, case)
    narrow = lambda x: jnp.asarray(np.asarray(x), "float32")  # noqa: E731
    state, outputs = jax.tree.map(narrow, case.state), []
    for t in range(6):
        token = {n: narrow(x[:, t]) if operator.arguments[n].per_token else narrow(x) for n, x in case.args.items()}
        o_t, state = operator.step(**token, state=state)
        outputs.append(o_t)
    assert_close(jnp.stack(outputs, 1), o[:, :6], OUTPUTS["float32"])


# ---- time


@every_recurrence
@pytest.mark.parametrize("cut", [1, CHUNK, 2 * CHUNK + 1])
def test_handing_the_state_over(operator, cut):
    """The state carries everything: two calls equal one."""
    case = Case(operator)
    (o, final), _ = reference(operator, case)
    narrow = lambda x: jnp.asarray(np.asarray(x), "float32")  # noqa: E731
    state, outputs = jax.tree.map(narrow, case.state), []
    for part in (slice(None, cut), slice(cut, None)):
        tokens = {n: narrow(x[:, part]) if operator.arguments[n].per_token else narrow(x) for n, x in case.args.items()}
        o_part, state = operator(**tokens, initial_state=state, chunk_size=CHUNK)
        outputs.append(o_part)
    assert_close((jnp.concatenate(outputs, 1), state), (o, final), OUTPUTS["float32"])


@every_recurrence
@pytest.mark.parametrize("form", ["scan", "chunk"])
def test_causality(operator, form):
    """Other tokens in the future change nothing in the past, to the last bit; NaN from a chunk's border on neither."""
    clean, other = Case(operator), Case(operator, seed=1)
    (o, _), _ = evaluate(operator, form, clean, "float32")
    for t, future in ((CHUNK, np.nan), (CHUNK + 7, None)):
        case = Case(operator)
        for name, x in case.args.items():
            if operator.arguments[name].per_token:
                later = np.asarray(other.args[name])[:, t:] if future is None else future
                x = np.array(x)
                x[:, t:] = later
                case.args[name] = x
        (changed, _), _ = evaluate(operator, form, case, "float32")
        np.testing.assert_array_equal(np.asarray(changed)[:, :t], np.asarray(o)[:, :t])
        assert not np.array_equal(np.asarray(changed)[:, t:], np.asarray(o)[:, t:], equal_nan=True)


@every_recurrence
def test_gradients_are_causal(operator):
    """What only the past is asked about sends nothing to the future."""
    case = Case(operator)
    t = CHUNK + 7
    d_o, d_state = (np.array(np.asarray(x)) for x in (case.d_out[0], 0.0))
    d_o[:, t:] = 0
    case.d_out = d_o, jax.tree.map(jnp.zeros_like, case.d_out[1])
    _, (d_args, _) = evaluate(operator, "chunk", case, "float32")
    for name, d in d_args.items():
        if operator.arguments[name].per_token:
            assert np.any(np.asarray(d)[:, :t]), name
            np.testing.assert_array_equal(np.asarray(d)[:, t:], 0, name)


@every_recurrence
def test_packed_documents_equal_separate_runs(operator):
    """The entering state reaches the first document only; the final state is the last document's."""
    case = Case(operator, B=1).packed(*DOCUMENTS)
    (o, final), _ = evaluate(operator, "chunk", case, "float32")
    borders = (0, *DOCUMENTS, SIZES["T"])
    with jax.enable_x64(True):
        for start, stop in zip(borders, borders[1:], strict=False):
            tokens = {n: x[:, start:stop] if operator.arguments[n].per_token else x for n, x in case.args.items()}
            alone, state = operator(**tokens, form="scan", initial_state=case.state if start == 0 else None)
            assert_close(o[:, start:stop], alone, OUTPUTS["float32"], f"document at {start}")
    assert_close(final, state, OUTPUTS["float32"], "final state")


# ---- numbers


# What a log-decay of 1 is in each argument that stands for one.
DECAYS = {"g": 1.0, "f": 1.0, "slopes": -1.0, "A": 100.0}


def _changes(operator, extreme):
    """argument -> its constant, or function of what it is. `g` stands for every decay, `beta` for every rate."""
    changes = {}
    for name, argument in operator.arguments.items():
        key = "g" if name in DECAYS else "beta" if argument.draw in (rate, wide_rate) else name
        if key in EXTREMES[extreme]:
            value, unit = EXTREMES[extreme][key], DECAYS.get(name, 1.0)
            changes[name] = (lambda x, f=value, u=unit: f(x / u) * u) if callable(value) else value * unit
    return changes


def _extreme(case, changes):
    for name, value in changes.items():
        x = case.args[name]
        case.args[name] = value(np.asarray(x)) if callable(value) else jnp.full_like(x, value)
    return case


def _first_key_everywhere(k):
    return np.broadcast_to(k[:, :1], k.shape)


def _positive_unit(k):
    return np.abs(k) / np.linalg.norm(k, axis=-1, keepdims=True)


def _mixed_gates(g):
    """Slow decays with now and then a gate that closes all but completely."""
    closing = np.random.default_rng(0).random(g.shape) < 0.1
    return np.where(closing, -1e4, g)


EXTREMES = {
    "g=0": dict(g=0.0),
    "g=-1e-6": dict(g=-1e-6),
    "g=-30": dict(g=-30.0),
    "g=-1e4": dict(g=-1e4),
    "g=-1e4 among slow ones": dict(g=_mixed_gates),
    "beta=0": dict(beta=0.0),
    "beta=1": dict(beta=1.0),
    "beta=2": dict(beta=2.0, g=0.0),
    "identical keys": dict(k=_first_key_everywhere),
    "identical keys, beta=1, no decay": dict(k=_first_key_everywhere, beta=1.0, g=0.0),
    "identical keys, beta=2, no decay": dict(k=_first_key_everywhere, beta=2.0, g=0.0),
    "positive keys": dict(k=_positive_unit),
    "positive keys, beta=2, no decay": dict(k=_positive_unit, beta=2.0, g=0.0),
    "slow decay": dict(g=lambda g: g * 1e-3),
}


@pytest.mark.parametrize(
    ("operator", "extreme"),
    [
        pytest.param(operator, extreme, id=f"{name}-{extreme}")
        for name, operator in ls.RECURRENCES.items()
        for extreme in EXTREMES
        if _changes(operator, extreme)
    ],
)
def test_extremes(operator, extreme):
    """Finite and right where factored exponentials overflow and powers of the WY matrix cancel. K=8 < C=16."""
    case = _extreme(Case(operator), _changes(operator, extreme)).rounded("float32")
    out, grads = reference(operator, case)
    got, got_grads = evaluate(operator, "chunk", case, "float32")
    assert_close(got, out, OUTPUTS["float32"], "outputs")
    assert_close(got_grads, grads, GRADIENTS["float32"], "gradients")


@pytest.mark.parametrize(
    "operator", [pytest.param(op, id=n) for n, op in ls.RECURRENCES.items() if "g" in op.arguments]
)
def test_gates_that_close_completely(operator):
    """g = -inf now and then forgets exactly, and its gradient is zero, not NaN."""
    case = Case(operator).rounded("float32")
    g = np.array(case.args["g"])
    closed = np.random.default_rng(0).random(g.shape) < 0.1
    case.args["g"] = np.where(closed, -np.inf, g)
    out, grads = reference(operator, case)
    got, got_grads = evaluate(operator, "chunk", case, "float32")
    assert_close(got, out, OUTPUTS["float32"], "outputs")
    assert_close(got_grads, grads, GRADIENTS["float32"], "gradients")
    np.testing.assert_array_equal(np.asarray(got_grads[0]["g"])[closed], 0)


# ---- compilation and memory


@every_recurrence
def test_second_call_does_not_retrace(operator):
    args = operator.example(jax.random.key(0), **SIZES)
    operator(**args, chunk_size=CHUNK)
    before = lowering.run._cache_size()
    operator(**jax.tree.map(lambda x: x * 0.5, args), chunk_size=CHUNK)
    assert lowering.run._cache_size() == before
    traces = []

    @jax.jit
    def call(args):
        traces.append(1)
        return operator(**args, chunk_size=CHUNK)

    call(args), call(args)
    assert len(traces) == 1


@every_recurrence
def test_backward_memory_is_linear_and_holds_no_token_states(operator):
    """Temporary bytes of forward and backward, as compiled."""
    sizes = dict(B=1, H=1, HV=1, K=32, V=32, D=32, N=16, L=12, C=32)

    def temporary(length):
        args = jax.eval_shape(lambda: operator.example(jax.random.key(0), T=length, **sizes))
        loss = lambda args: operator(**args, chunk_size=sizes["C"])[0].sum()  # noqa: E731
        state = jax.eval_shape(lambda a: operator(**a)[1], args)
        compiled = jax.jit(jax.grad(loss)).lower(args).compile()
        return compiled.memory_analysis().temp_size_in_bytes, sum(4 * s.size for s in jax.tree.leaves(state))

    # several blocks of chunks each: a sequence of one block has no loop, and needs less
    (short, _), (long, state_bytes) = temporary(4096), temporary(16384)
    assert long <= 4.4 * short, f"temporary bytes grow from {short} to {long} when T grows fourfold"
    if operator.recurrence.prepare is not None and state_bytes >= 4 * sizes["K"] * sizes["V"]:
        assert long < 16384 * state_bytes, f"{long} bytes: as much as a state for every token, {16384 * state_bytes}"


def test_relative_rms_fails_when_it_should():
    """The measure that everything above rests on."""
    x = np.ones(4)
    assert relative_rms(x * (1 + 1e-3), x) == pytest.approx(1e-3)
    assert relative_rms(x, 0 * x) == np.inf and relative_rms(0 * x, 0 * x) == 0
    assert relative_rms(x * np.nan, x) == np.inf
    with pytest.raises(AssertionError):
        assert_close({"a": x * 1.1}, {"a": x}, 1e-2)
