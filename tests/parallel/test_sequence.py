"""Every recurrence over sharded time equals the token scan on one device: outputs, states and all gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, reference
from jax.sharding import AxisType, PartitionSpec as P
from tolerances import GRADIENTS, OUTPUTS, assert_close

import lineax_seq as ls
from lineax_seq.core import forms
from lineax_seq.core.lowering import prepared
from lineax_seq.core.monoid import Affine
from lineax_seq.core.target import target_here
from lineax_seq.parallel import cost, prefix, sequence_parallel
from lineax_seq.parallel.summary import mapped, over, shard_summary, zero_state

LENGTH, CHUNK = 48, 8  # on four devices a shard is a chunk and a half
DOCUMENTS = (5, 24, 25, 41)  # inside a shard, on a border, a document of one token
STRATEGIES = tuple(prefix.STRATEGIES)
# One of each kind: logs of decays without heads, dense transitions, actions that are no affine map.
KINDS = ("rg_lru", "gated_delta_rule", "mlstm")
every_recurrence = pytest.mark.parametrize("operator", ls.RECURRENCES.values(), ids=ls.RECURRENCES.keys())
each_kind = pytest.mark.parametrize("operator", [ls.RECURRENCES[name] for name in KINDS], ids=KINDS)
DECAYS = {"g": 0.05, "f": 0.05, "dt": 0.05, "A": 0.05, "slopes": 0.05, "Lambda": 1.0}


def mesh_of(**axes: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), devices=devices, axis_types=(AxisType.Auto,) * len(axes))


def case_of(operator, packed: bool, slow: bool = False) -> Case:
    case = Case(operator, T=LENGTH)
    if slow:  # a shard keeps most of what enters it, so that the order of the shards shows
        case.args = {name: np.asarray(x) * DECAYS.get(name, 1.0) for name, x in case.args.items()}
    return case.packed(*DOCUMENTS) if packed else case


@functools.cache
def expected(operator, packed: bool, slow: bool = False):
    return reference(operator, case_of(operator, packed, slow))


def evaluate(call, case: Case, packed: bool, **options):
    """`((o, final state), gradients of the arguments and of the initial state)` in float64."""
    options = {"segment_ids": case.segment_ids, **options} if packed else options

    def run(args, state, d_out):
        out, pull = jax.vjp(lambda args, state: call(**args, initial_state=state, **options), args, state)
        return out, pull(d_out)

    with jax.enable_x64(True):
        return jax.jit(run)(case.args, case.state, case.d_out)


def check(operator, call, packed: bool, slow: bool = False, **options):
    out, grads = expected(operator, packed, slow)
    got, got_grads = evaluate(call, case_of(operator, packed, slow), packed, **options)
    assert_close(got, out, OUTPUTS["float64"], "outputs")
    assert_close(got_grads, grads, GRADIENTS["float64"], "gradients")


# ---- exactness


@every_recurrence
def test_equals_scan(operator):
    """Grouped heads, packed documents across borders, a state that enters; shards that are no whole chunks."""
    call = sequence_parallel(operator, mesh_of(seq=4), strategy="all_gather")
    check(operator, call, packed=True, chunk_size=CHUNK)


@each_kind
@pytest.mark.parametrize("strategy", [*STRATEGIES[1:], None])
def test_strategies_are_equal(operator, strategy):
    check(operator, sequence_parallel(operator, mesh_of(seq=4), strategy=strategy), packed=True, chunk_size=CHUNK)


@pytest.mark.parametrize("name", ["gla", "rwkv7", "log_linear_attention"])
def test_slow_decays_of_one_document(name):
    operator = ls.RECURRENCES[name]
    check(operator, sequence_parallel(operator, mesh_of(seq=8), strategy="tree"), False, slow=True, chunk_size=CHUNK)


@pytest.mark.slow
@every_recurrence
@pytest.mark.parametrize(
    ("devices", "strategy"), [(1, STRATEGIES[0]), *((n, strategy) for n in (2, 4, 8) for strategy in STRATEGIES)]
)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_everything(operator, devices, strategy, packed):
    """With slow decays, where the order of the shards shows most; one device has nobody to ask, by any strategy."""
    call = sequence_parallel(operator, mesh_of(seq=devices), strategy=strategy)
    check(operator, call, packed, slow=True)


def test_the_slow_case_tells_the_order_of_shards():
    """With the order of a product swapped the results differ by far more than the tolerance."""
    operator = ls.gated_delta_rule
    case = case_of(operator, packed=False, slow=True)
    call = sequence_parallel(operator, mesh_of(seq=4), strategy="tree")
    (o, _), _ = expected(operator, False, True)
    record = operator.recurrence
    swapped = record.monoid._replace(combine=lambda earlier, later: record.monoid.combine(later, earlier))
    wrong = sequence_parallel(_with_monoid(operator, swapped), mesh_of(seq=4), strategy="tree")
    assert_close(evaluate(call, case, False)[0][0], o, OUTPUTS["float64"])
    with pytest.raises(AssertionError):
        assert_close(evaluate(wrong, case, False)[0][0], o, OUTPUTS["float32"])


def _with_monoid(operator, monoid):
    return dataclasses.replace(operator, recurrence=dataclasses.replace(operator.recurrence, monoid=monoid))


# ---- meshes of several axes


MIXED = ("retention", "gated_delta_rule", "mamba")


def check_mixed(operator, axis_types=AxisType.Auto):
    names = ("data", "seq", "tensor")
    mesh = jax.make_mesh((2, 2, 2), names, axis_types=(axis_types,) * 3)
    call = sequence_parallel(operator, mesh, batch_axes="data", head_axes=("tensor",))
    check(operator, call, packed=True, chunk_size=CHUNK)


@pytest.mark.parametrize("operator", [ls.RECURRENCES[name] for name in MIXED], ids=MIXED)
def test_beside_batch_and_heads(operator):
    check_mixed(operator)


def test_mesh_with_explicit_axes():
    check_mixed(ls.linear_attention, AxisType.Explicit)


@pytest.mark.slow
@every_recurrence
def test_every_recurrence_beside_batch_and_heads(operator):
    check_mixed(operator)


# ---- inside shard_map


def on_shards(operator, mesh, check_vma, **how):
    """The recurrence with `axis_name`, as a function of global arrays."""

    def call(initial_state, segment_ids=None, **args):
        specs = {name: P(None, "seq") if operator.arguments[name].per_token else P() for name in args}
        shard = lambda args, state, ids: operator(  # noqa: E731
            **args, initial_state=state, segment_ids=ids, axis_name="seq", **how
        )
        return jax.shard_map(
            shard,
            mesh=mesh,
            in_specs=(specs, P(), P(None, "seq")),
            out_specs=(P(None, "seq"), P()),
            check_vma=check_vma,
        )(args, initial_state, segment_ids)

    return call


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ["rwkv6", "lightnet"])
def test_axis_name(name, check_vma):
    """With and without the compiler's knowledge of what differs between devices; with a parameter's gradient."""
    operator = ls.RECURRENCES[name]
    check(operator, on_shards(operator, mesh_of(seq=4), check_vma, chunk_size=CHUNK), packed=True)


def test_token_scan_on_shards():
    operator = ls.delta_rule
    check(operator, on_shards(operator, mesh_of(seq=4), True, form="scan"), packed=True)


def test_gradient_taken_inside():
    """As a training step does it: each device differentiates its own loss, then the gradients are added."""
    operator, mesh = ls.gated_delta_rule, mesh_of(seq=4)
    case = case_of(operator, packed=False)
    names = sorted(case.args)

    def loss(args, state, axis_name=None):
        o, _ = operator(**args, initial_state=state, axis_name=axis_name, chunk_size=CHUNK)
        return (o**2).sum()

    def shard(args, state):
        grads, d_state = jax.grad(functools.partial(loss, axis_name="seq"), (0, 1))(args, state)
        return grads, jax.lax.psum(d_state, "seq")

    specs = dict.fromkeys(names, P(None, "seq"))
    with jax.enable_x64(True):
        inside = jax.shard_map(shard, mesh=mesh, in_specs=(specs, P()), out_specs=(specs, P()), check_vma=False)
        got, want = jax.jit(inside)(case.args, case.state), jax.jit(jax.grad(loss, (0, 1)))(case.args, case.state)
    assert_close(got, want, GRADIENTS["float64"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_inputs(dtype):
    operator = ls.kda
    case = case_of(operator, packed=False).rounded(dtype)
    out, _ = reference(operator, case)
    args = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), dtype), case.args)
    state = jnp.asarray(np.asarray(case.state), "float32")
    o, final = sequence_parallel(operator, mesh_of(seq=4))(**args, initial_state=state, chunk_size=CHUNK)
    assert (o.dtype, final.dtype) == (jnp.dtype(dtype), jnp.float32)
    assert_close((o, final), out, OUTPUTS[dtype])


# ---- every token reads all tokens


@pytest.mark.parametrize("name", ["linear_attention", "normalized_linear_attention", "lightnet"])
def test_not_causal(name):
    operator = ls.RECURRENCES[name]
    case = case_of(operator, packed=False)
    call = sequence_parallel(operator, mesh_of(seq=4))
    got, want = (evaluate(f, case, False, causal=False, chunk_size=CHUNK) for f in (call, operator))
    assert_close(got, want, GRADIENTS["float64"])


# ---- the strategies alone


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("strategy", "options"),
    [("all_gather", {}), ("ring", {}), ("tree", {}), *(("all_scan", {"blocks": m}) for m in (1, 2, 6))],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("devices", [2, 5])
def test_prefix(strategy, options, devices, reverse, x64):
    """Dense maps that do not commute, against applying them one after the other."""
    monoid = mapped(ls.delta_rule.recurrence.monoid, 2)
    keys = jax.random.split(jax.random.key(0), 3)
    transitions = jax.random.normal(keys[0], (devices, 2, 3, 4, 4)) / 2
    offsets, state = jax.random.normal(keys[1], (devices, 2, 3, 4, 6)), jax.random.normal(keys[2], (2, 3, 4, 6))

    def shard(transition, offset, state):
        axis = prefix.Axis("seq", reverse)
        summary = Affine(transition[0], offset[0])
        entering, final = prefix.STRATEGIES[strategy](monoid, summary, state, axis, 2, **options)
        return entering[None], final

    f = jax.shard_map(shard, mesh=mesh_of(seq=devices), in_specs=(P("seq"), P("seq"), P()), out_specs=(P("seq"), P()))
    entering, final = jax.jit(f)(transitions, offsets, state)
    for p in reversed(range(devices)) if reverse else range(devices):
        assert_close(entering[p], state, OUTPUTS["float64"], f"device {p}")
        state = transitions[p] @ state + offsets[p]
    assert_close(final, state, OUTPUTS["float64"], "final")


@pytest.mark.parametrize(
    ("devices", "state", "transition", "switched", "best"),
    [
        (2, 1 << 20, 1 << 20, True, "all_gather"),
        (8, 1 << 12, 0, True, "all_gather"),  # too small for rounds to pay
        (64, 1 << 16, 0, True, "tree"),
        (64, 1 << 20, 1 << 20, True, "all_scan"),
        (64, 1 << 20, 0, False, "all_scan"),
    ],
)
def test_cheapest(devices, state, transition, switched, best):
    link = cost.Link(latency=2e-6, bandwidth=50e9, switched=switched)
    assert cost.cheapest(devices, state, transition, 128, link) == best


@every_recurrence
def test_a_shard_s_summary_is_its_tokens(operator, x64):
    """The summary that is sent against the tokens' own, combined one by one."""
    case, record = Case(operator, T=12).packed(3, 7), operator.recurrence
    reset = jnp.pad(case.segment_ids[:, 1:] != case.segment_ids[:, :-1], ((0, 0), (1, 0)))
    lead = 2 if record.has_heads else 1
    run = functools.partial(forms.chunk, record, target_here(), None, 4)

    @functools.partial(jax.jit, static_argnums=(0,))
    def summarise(record, reset):
        fields, reset, _ = prepared(operator, case.args, reset, None)
        return shard_summary(record, run, fields, reset, zero_state(record, fields), lead)

    slow = dataclasses.replace(record, monoid=record.monoid._replace(total=None, probe=None))
    assert_close(summarise(record, None), summarise(slow, None), OUTPUTS["float64"], "one document")
    sent, told = summarise(record, reset), summarise(slow, reset)
    assert np.all(sent.forget) and np.all(told.forget)
    apply, zero = over(record.monoid.apply, lead), jax.tree.map(jnp.zeros_like, case.state)
    assert_close(apply(sent.summary, zero), apply(told.summary, zero), OUTPUTS["float64"], "the last document")


# ---- refusals


def arguments(operator, **sizes):
    return operator.example(jax.random.key(0), **{**dict(B=2, T=16, H=2, HV=2, K=4, V=4, D=4, N=2, L=5), **sizes})


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        (dict(T=18), {}, r"T=18 over 4 shards of mesh axis seq: pad to T=20"),
        (dict(B=3, T=18), dict(batch_axes="data"), r"B=3 over 2 .*pad to B=4; T=18 .*pad to T=20"),
        (dict(H=1, HV=1), dict(head_axes="data"), r"H=1 over 2 shards of mesh axis data: use a divisor of 1"),
        ({}, dict(axis="sequ"), r"no mesh axis 'sequ' \(did you mean 'seq'\?\)"),
        ({}, dict(batch_axes="seq"), r"use a mesh axis once"),
        ({}, dict(strategy="tre"), r"strategy='tre' \(did you mean 'tree'\?\)"),
    ],
)
def test_refusals(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        sequence_parallel(ls.simple_gla, mesh_of(data=2, seq=4), **options)(**arguments(ls.simple_gla, **sizes))


def test_refusals_of_options():
    call, args = sequence_parallel(ls.simple_gla, mesh_of(seq=4)), arguments(ls.simple_gla)
    with pytest.raises(ValueError, match="say it to sequence_parallel"):
        call(**args, strategy="ring")
    with pytest.raises(ValueError, match="strategy='ring' without axis_name"):
        ls.simple_gla(**args, strategy="ring")
    with pytest.raises(NotImplementedError, match="causal=False with axis_name"):
        call(**args, causal=False)
    with pytest.raises(NotImplementedError, match="block_size with axis_name"):
        call(**args, block_size=4)
    with pytest.raises(ValueError, match="strategy='al_scan'.*did you mean 'all_scan'"):
        on_shards(ls.simple_gla, mesh_of(seq=4), True, strategy="al_scan")(None, **args)
