"""The chunk form is the same however many chunks are held at once, and whichever way they are prepared."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import EXACT, STARTS, T, example, with_gradients
from tolerances import assert_close

import lineax_seq as ls
from lineax_seq.core import chunked, forms
from lineax_seq.core.target import ACCELERATOR_GROUPS, CPU_GROUPS, Groups, target_here
from pallas_kernels import Machine, tracing_for

KINDS = ("simple_gla", "gated_delta_rule", "rwkv7", "mlstm", "mamba")  # of walks; the others under `slow`
TPU = Machine("tpu", "TPU v5 lite")


def target_of(groups: Groups):
    return dataclasses.replace(target_here(), groups=groups)


def one_chunk(chunk_size: int, sequences: int, **options):
    """Groups of one chunk of each sequence."""
    return target_of(Groups(tokens=chunk_size * sequences, **options))


def test_the_target_says_the_groups():
    assert target_here().groups is CPU_GROUPS and target_here().on_cpu
    with tracing_for(TPU):
        assert target_here().groups is ACCELERATOR_GROUPS and not target_here().on_cpu


@pytest.mark.parametrize(
    ("groups", "states", "forward_alone", "chunks"),
    [
        (Groups(tokens=1024), 1, False, 8),  # 8 chunks of 32 tokens of 4 sequences
        (Groups(tokens=1), 1, False, 1),  # never none
        (Groups(tokens=1024, chunks=3), 1, False, 3),
        (Groups(tokens=1024, forward_chunks=8), 1, True, 2),
        (Groups(tokens=1024, forward_chunks=8), 1, False, 8),
        (Groups(tokens=1024), 8, False, 4),  # eight states of a head are kept
        (Groups(tokens=1024, keep_entries=False), 8, False, 8),  # or not
    ],
)
def test_chunks_of_a_group(groups, states, forward_alone, chunks):
    assert groups.chunks_at_once(4, 32, states, forward_alone) == chunks


def test_the_parallel_chunks_of_accelerators(x64):
    """On a CPU the vector family scans tokens; what runs elsewhere is right too."""
    record, here = ls.hgrn.recurrence, target_here()
    there = dataclasses.replace(here, machine=TPU, groups=ACCELERATOR_GROUPS)
    args = example(ls.hgrn)
    state = jax.random.normal(jax.random.key(1), (2, 5))
    starts = jnp.zeros((2, T), bool).at[:, jnp.asarray(STARTS)].set(True)
    assert forms._scans(record, here) and not forms._scans(record, there)
    for reset in (None, starts):
        parallel = lambda args, state: forms.chunk(record, there, None, 8, args, reset, state)  # noqa: B023, E731
        loop = lambda args, state: forms.scan(record, None, args, reset, state)  # noqa: B023, E731
        got, want = with_gradients(parallel, args, state), with_gradients(loop, args, state)
        assert_close(got, want, EXACT)


@pytest.mark.parametrize(
    ("tokens", "keep_entries"),
    [(1, False), (64, False), (64, True), (1 << 40, True)],
    ids=["groups_of_one", "two_groups", "two_groups_kept", "at_once"],
)
@pytest.mark.parametrize(
    "operator",
    [
        pytest.param(operator, id=name, marks=() if name in KINDS else pytest.mark.slow)
        for name, operator in ls.RECURRENCES.items()
        if name != "log_linear_attention"  # its fields hold positions, which have no gradient
    ],
)
def test_chunks_are_right_in_groups_of_any_size(operator, tokens, keep_entries, x64):
    """The backward pass walks every group again, or finds the states that entered its chunks kept."""
    target = target_of(Groups(tokens, keep_entries=keep_entries))
    args = operator.example(jax.random.key(0), B=1, T=40, H=1, HV=2, K=4, V=4, D=2, N=4, NH=2, L=6, dtype=jnp.float64)
    fields, record = operator.fields(args), operator.recurrence
    state = jax.tree.map(lambda s: s + 0.5, operator(**args)[1])
    length = next(iter(fields.values())).shape[1]
    reset = jnp.zeros((1, length), bool).at[:, length // 3].set(True)
    got = with_gradients(lambda xs, state: forms.chunk(record, target, None, 8, xs, reset, state), fields, state)
    want = with_gradients(lambda xs, state: forms.scan(record, None, xs, reset, state), fields, state)
    assert_close(got, want, EXACT)


def test_forward_alone_groups_are_smaller(x64):
    """Which changes nothing: here one chunk of both heads, where a gradient's forward pass takes four."""
    target = target_of(Groups(tokens=1 << 40, forward_chunks=2, keep_entries=False))
    args = ls.kda.example(jax.random.key(0), B=1, T=60, H=1, HV=2, K=4, V=4, dtype=jnp.float64)
    record, state = ls.kda.recurrence, jnp.zeros((1, 2, 4, 4))
    chunk = lambda xs: forms.chunk(record, target, None, 16, xs, None, state)  # noqa: E731
    (alone, (kept, _)) = jax.jit(chunk)(args), jax.vjp(chunk, args)
    assert_close(alone, kept, EXACT)
    plans = [chunked.plan(record, None, 16, target, args, forward_alone=it) for it in (True, False)]
    assert [plan.groups for plan in plans] == [4, 1]


# ---- the ways to prepare


def scaled_example(operator, strengths):
    """One head pair, chunks of 32 tokens, each with gates (or keys, for lightnet) of its own strength."""
    args = operator.example(jax.random.key(0), B=1, T=90, H=1, HV=2, K=4, V=4, dtype=jnp.float64)
    scaled = "k" if operator is ls.lightnet else "g"
    args[scaled] = args[scaled] * jnp.repeat(jnp.asarray(strengths), 32)[None, :90, None, None]
    state = jax.tree.map(lambda s: s + 0.5, operator(**args)[1])
    return operator.fields(args), state


def runs_right(record, target, fields, state):
    chunk = lambda xs, state: forms.chunk(record, target, None, 32, xs, None, state)  # noqa: E731
    want = with_gradients(lambda xs, state: forms.scan(record, None, xs, None, state), fields, state)
    assert_close(with_gradients(chunk, fields, state), want, EXACT)
    assert_close(jax.jit(chunk)(fields, state), want[0], EXACT)


@pytest.mark.parametrize("operator", [ls.gla, ls.kda], ids=lambda operator: operator.name)
@pytest.mark.parametrize(
    ("strengths", "decisions"),
    [((0.1, 0.1, 0.1), [True, True, True]), ((0.1, 300.0, 2.0), [True, False, True])],
    ids=["all_mild", "mixed"],
)
def test_every_group_decides_how_to_prepare(operator, strengths, decisions, x64):
    """Groups of one chunk: all mild, or each of its own kind; with gradients and without. All chunks at once are one
    group, which is mild if all of it is."""
    fields, state = scaled_example(operator, strengths)
    record, single = operator.recurrence, one_chunk(32, 2)
    for target, wanted in ((single, decisions), (target_of(Groups(tokens=1 << 40)), [all(decisions)])):
        plan = chunked.plan(record, None, 32, target, fields)
        np.testing.assert_array_equal(chunked.Cut(plan, fields, None).decisions, wanted)
        runs_right(record, target, fields, state)


@pytest.mark.parametrize(("strengths", "special"), [((0.1,) * 3, True), ((0.1, 300.0, 0.1), False)], ids=str)
def test_all_groups_take_the_special_form_or_none(strengths, special, x64):
    fields, state = scaled_example(ls.lightnet, strengths)
    record = ls.lightnet.recurrence
    for target in (one_chunk(32, 2), target_of(Groups(tokens=1 << 40))):
        plan = chunked.plan(record, None, 32, target, fields)
        assert bool(chunked.Cut(plan, fields, None).holds(record.special.applies).all()) == special
        runs_right(record, target, fields, state)


def test_a_special_form_is_taken_where_it_applies(x64):
    """Its outputs show whether it ran: here it is a form that gives zeros."""
    fields, state = scaled_example(ls.lightnet, (0.1,) * 3)
    record, special = ls.lightnet.recurrence, ls.lightnet.recurrence.special
    zeros = special.form._replace(readout=lambda *args: jnp.zeros_like(special.form.readout(*args)))
    for applies in (True, False):
        changed = special._replace(applies=lambda x, applies=applies: jnp.asarray(applies), form=zeros)
        changed = dataclasses.replace(record, special=changed)
        o = forms.chunk(changed, one_chunk(32, 2), None, 32, fields, None, state)[1]
        assert bool((o == 0).all()) == applies


# ---- factors apart


def test_factors_serve_several_runs(x64):
    """All chunks at once: what `chunk_factors` gives is not made again, and gradients are as without it."""
    at_once, record = target_of(Groups(tokens=1 << 40)), ls.gla.recurrence
    args = ls.gla.example(jax.random.key(0), B=1, T=20, H=1, HV=2, K=4, V=4, dtype=jnp.float64)
    fields, state = ls.gla.fields(args), ls.gla(**args)[1]
    reset = jnp.zeros((1, 20), bool).at[:, 11].set(True)
    call = functools.partial(forms.chunk, record, at_once, None, 8)
    factors = forms.chunk_factors(record, at_once, None, 8, fields, reset)
    got = with_gradients(lambda xs, state: call(xs, reset, state, factors), fields, state)
    want = with_gradients(lambda xs, state: forms.scan(record, None, xs, reset, state), fields, state)
    assert_close(got, want, EXACT)
    np.testing.assert_array_equal(call(fields, reset, state, jax.tree.map(jnp.zeros_like, factors))[1], 0)
    # groups follow one another
    assert forms.chunk_factors(record, one_chunk(8, 2), None, 8, fields, reset) is None


def test_factors_of_a_special_form_stay_inside_its_branch():
    at_once = target_of(Groups(tokens=1 << 40))
    fields = ls.lightnet.fields(ls.lightnet.example(jax.random.key(0), B=1, T=40, H=1, HV=1, K=4, V=4))
    assert forms.chunk_factors(ls.lightnet.recurrence, at_once, None, 16, fields, None) is None


def test_a_token_scan_has_no_factors():
    fields = ls.hgrn.fields(ls.hgrn.example(jax.random.key(0), B=1, T=8, D=2))
    assert forms.chunk_factors(ls.hgrn.recurrence, target_here(), None, 4, fields, None) is None
