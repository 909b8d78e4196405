"""What is not finite in one document of a packed row stays in it: outputs, states and gradients of the others."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from examples import families_first
from jax.sharding import AxisType
from kernel_cases import through_kernel
from tolerances import GRADIENTS, OUTPUTS, assert_close

import lineax_seq as ls
from lineax_seq.core.arguments import log_decay

SIZES = dict(B=1, H=1, HV=1, K=8, V=8, D=8, N=4, L=7, NH=2)
LENGTH, CLEAN, CHUNK = 100, 90, 32
BAD = (np.nan, np.inf)
RECURRENCES = tuple(ls.RECURRENCES.values())
BIDIRECTIONAL = [operator for operator in RECURRENCES if operator.bidirectional]
KINDS = (ls.rg_lru, ls.gated_delta_rule, ls.mlstm)  # no heads, dense transitions, no affine map


class Row(NamedTuple):
    """Two documents, one of which is to be spoilt, and a loss on the other one alone."""

    clean: slice
    bad: slice
    ids: np.ndarray
    loss: tuple  # cotangents of the outputs and of the final state

    @property
    def last_is_clean(self) -> bool:
        return self.clean.start > 0

    @property
    def token(self) -> int:
        """The one that is spoilt."""
        return self.bad.start + 3


def row_of(case: Case, bad_first: bool) -> Row:
    length = case.sizes["T"]
    border = length - CLEAN if bad_first else CLEAN
    ids = (np.arange(length) >= border).astype(np.int32)[None]
    parts = slice(0, border), slice(border, length)
    bad, clean = parts if bad_first else parts[::-1]
    d_o, d_state = case.d_out
    heard = (ids == int(bad_first)).reshape(1, length, *(1,) * (d_o.ndim - 2))
    return Row(clean, bad, ids, (np.where(heard, d_o, 0), jax.tree.map(lambda d: d * bad_first, d_state)))


@functools.lru_cache(8)
def case_of(operator, length: int = LENGTH) -> Case:
    return Case(operator, T=length, **SIZES)


@functools.lru_cache(16)
def program(call, **options):
    """`(o, final state), (gradients of the arguments, of the initial state)`."""

    @jax.jit
    def run(args, state, segment_ids, d_out):
        run = lambda args, state: call(**args, initial_state=state, segment_ids=segment_ids, **options)  # noqa: E731
        out, pull = jax.vjp(run, args, state)
        return out, pull(d_out)

    return run


def wanted(operator, args: dict, case: Case, row: Row, **options):
    """The clean document alone, by the float64 token scan; no state enters the second document."""
    part = {n: x[:, row.clean] if operator.arguments[n].per_token else x for n, x in args.items()}
    state = None if row.last_is_clean else case.state
    loss = row.loss[0][:, row.clean], row.loss[1]
    (o, final), (d_args, d_state) = program(operator, **(options or dict(form="scan")))(part, state, None, loss)
    if row.last_is_clean:
        return (o, final), (d_args, jax.tree.map(np.zeros_like, case.state))
    return (o, None), (d_args, d_state)


def assert_contained(operator, row: Row, got, want, what: str, dtype: str = "float64") -> None:
    """The clean document is as it is alone, and nothing of the loss on it reaches the other one."""
    (o, final), grads = got
    out, (d_args, d_state) = want

    def with_zeros(d):
        whole = np.zeros((1, row.ids.shape[1], *d.shape[2:]))
        whole[:, row.clean] = d
        return whole

    d_args = {name: with_zeros(d) if operator.arguments[name].per_token else d for name, d in d_args.items()}
    assert_close((o[:, row.clean], final if row.last_is_clean else None), out, OUTPUTS[dtype], what)
    assert_close(grads, (d_args, d_state), GRADIENTS[dtype], f"{what}: gradients")


def spoilt(args: dict, name: str, token: int, bad: float) -> dict:
    """One number of one token."""
    x = np.array(args[name], np.float64)
    x[(0, token, *(0,) * (x.ndim - 2))] = bad
    return {**args, name: x}


def check(operator, call, bad_first: bool, length: int = LENGTH, causal: bool = True, **options) -> None:
    """Every argument that tokens have is spoilt in turn."""
    case = case_of(operator, length)
    row = row_of(case, bad_first)
    reference = {} if causal else dict(causal=False, chunk_size=CHUNK)
    run = program(call, **options, **reference)
    want = wanted(operator, case.args, case, row, **reference)
    for name in (name for name, argument in operator.arguments.items() if argument.per_token):
        for bad in BAD:
            got = run(spoilt(case.args, name, row.token, bad), case.state, row.ids, row.loss)
            what = f"{name}={bad}"
            assert_contained(operator, row, got, want, what)
            if np.isinf(bad):
                continue  # a gate may make something finite of it, as rg_lru's do
            (o, final), _ = got
            broken = np.isnan(o[0, row.bad]).reshape(row.bad.stop - row.bad.start, -1).all(axis=1)
            first = row.token - row.bad.start
            if not causal:
                np.testing.assert_array_equal(broken, True, what)
            else:
                assert broken[first] and not broken[:first].any(), f"{what}: {broken}"
                query_alone = not broken[first + 1 :].any()
                assert broken[first:].all() or query_alone, f"{what}: {broken}"
            if not row.last_is_clean and (not causal or broken[-1]):
                assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(final)), f"{what}: final state"


documents = pytest.mark.parametrize("bad_first", [False, True], ids=["second", "first"])


@families_first()
@documents
def test_chunk(operator, bad_first, x64):
    check(operator, operator, bad_first, chunk_size=CHUNK)


@families_first(*RECURRENCES)
@documents
def test_scan(operator, bad_first, x64):
    check(operator, operator, bad_first, form="scan")


@pytest.mark.parametrize("operator", BIDIRECTIONAL, ids=lambda operator: operator.name)
@documents
def test_reading_the_future(operator, bad_first, x64):
    """The whole of the bad document is spoilt."""
    check(operator, operator, bad_first, causal=False)


@families_first(*KINDS)
@documents
def test_eight_shards(operator, bad_first, x64):
    """The bad document spans shards, or begins inside one."""
    mesh = jax.make_mesh((8,), ("seq",), devices=jax.devices()[:8], axis_types=(AxisType.Auto,))
    call = ls.parallel.sequence_parallel(operator, mesh, strategy="all_gather")
    check(operator, call, bad_first, length=104, chunk_size=8)


@families_first(*KINDS)
@pytest.mark.parametrize("form", ["chunk", "scan"])
def test_a_spoilt_state(operator, form, x64):
    """It spoils the first document alone, and all of it."""
    case = case_of(operator)
    row = row_of(case, bad_first=True)
    leaves, structure = jax.tree.flatten(case.state)
    first = np.array(leaves[0])
    first[(0,) * first.ndim] = np.nan
    state = jax.tree.unflatten(structure, [first, *leaves[1:]])
    options = dict(chunk_size=CHUNK) if form == "chunk" else dict(form=form)
    got = program(operator, **options)(case.args, state, row.ids, row.loss)
    assert_contained(operator, row, got, wanted(operator, case.args, case, row), "state")
    assert np.isnan(got[0][0][:, row.bad]).all()


GATED = [
    operator for operator in RECURRENCES if log_decay in [a.draw for n, a in operator.arguments.items() if n == "g"]
]


@pytest.mark.parametrize("form", ["chunk", "scan"])
@families_first(ls.simple_gla, ls.gla, ls.gated_delta_rule, ls.rwkv7, among=GATED)
def test_a_closed_gate_is_no_mistake(operator, form, x64):
    """-inf is the log of a decay of zero: all is right, and the gate's own gradient is zero."""
    case, token = case_of(operator), 20
    row = row_of(case, bad_first=False)
    args = {**case.args, "g": np.array(case.args["g"])}
    args["g"][0, token] = -np.inf
    options = dict(chunk_size=CHUNK) if form == "chunk" else dict(form=form)
    got = program(operator, **options)(spoilt(args, "v", row.token, np.nan), case.state, row.ids, row.loss)
    # a gate that is finite, and whose exponential is zero all the same
    want = wanted(operator, {**args, "g": np.maximum(args["g"], -1e5)}, case, row)
    assert_contained(operator, row, got, want, "closed")
    np.testing.assert_array_equal(got[1][0]["g"][0, token], 0)


@documents
def test_kernel(bad_first):
    """The interpreted TPU kernel of one family, in float32."""
    operator, sizes = ls.simple_gla, {**SIZES, "K": 64, "V": 64}
    case = Case(operator, T=LENGTH, **sizes).rounded("float32")
    row = row_of(case, bad_first)
    with jax.enable_x64(True):
        want = wanted(operator, case.args, case, row)
    case.segment_ids, case.d_out = jnp.asarray(row.ids), row.loss
    for name in operator.arguments:
        case.args = spoilt(clean := case.args, name, row.token, np.nan)
        got = through_kernel(case, operator, "float32")
        assert_contained(operator, row, got, want, name, "float32")
        case.args = clean
