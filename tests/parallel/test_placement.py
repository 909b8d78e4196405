"""Calls on arrays that lie split over a mesh: results as on one device, split as arguments are, nothing gathered."""

import contextlib
import functools

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import EXACT, FAMILIES, families_first
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tolerances import assert_close

import lineax_seq as ls

SIZES = dict(B=2, T=11, H=2, HV=4, K=4, V=4, D=4, N=2, L=4)
CHUNK = 4
OWNERS = {"B": "data", "H": "tensor", "HV": "tensor", "D": "tensor"}
# Those that number their heads go wrong in their own way.
QUICK = (*FAMILIES, ls.retention, ls.lightning_attention)
WAYS = ("eager", "set_mesh", "jit")


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices()[:4], axis_types=(kind, kind))


@functools.cache
def example(operator):
    """`(arguments, state, cotangents)`, and what they give on one device, all in float64."""
    args = operator.example(jax.random.key(0), **SIZES, dtype=jnp.float64)
    out = operator(**args, form="scan")
    state = jax.tree.map(lambda s: 0.5 * s, out[1])
    d_out = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape, x.dtype), out)
    arrays = args, state, d_out
    return arrays, jax.jit(functools.partial(values_and_gradients, operator, form="scan"))(*arrays)


def values_and_gradients(operator, args, state, d_out, **options):
    options = options or dict(chunk_size=CHUNK)
    out, pull = jax.vjp(lambda args, state: operator(**args, initial_state=state, **options), args, state)
    return out, pull(d_out)


def specs(operator, owners=OWNERS):
    """Of arguments, state and cotangents."""
    spec = lambda letters: P(*(owners.get(letter) for letter in letters))  # noqa: E731
    heads = "HV" if operator.recurrence.has_heads else "D"
    args = {name: spec(argument.letters) for name, argument in operator.arguments.items()}
    return args, spec(("B", heads)), (spec(("B", "T", heads)), spec(("B", heads)))


def placed_on(mesh, operator, arrays, owners=OWNERS):
    """Arguments, state and cotangents where their letters' axes are."""
    (args, state, (d_o, d_state)), (by_name, states, (outputs, _)) = arrays, specs(operator, owners)
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, P(*spec[: x.ndim])))  # noqa: E731
    args = {name: put(x, by_name[name]) for name, x in args.items()}
    state, d_state = (jax.tree.map(lambda s: put(s, states), tree) for tree in (state, d_state))
    return args, state, (put(d_o, outputs), d_state)


def assert_split(operator, got, owners=OWNERS) -> None:
    """Outputs, states and gradients lie as what they belong to."""
    (o, final), (d_args, d_state) = got
    by_name, states, (outputs, _) = specs(operator, owners)

    def lies(x, spec, what):
        found = (*x.sharding.spec, *(None,) * x.ndim)[: x.ndim]
        assert found == (*spec, *(None,) * x.ndim)[: x.ndim], f"{what}: {found}, wants {spec}"

    lies(o, outputs, "o")
    for leaf in jax.tree.leaves((final, d_state)):
        lies(leaf, states, "state")
    for name, d in d_args.items():
        lies(d, by_name[name], f"d {name}")


# ---- explicit axes


def check_explicit(operator, way: str) -> None:
    arrays, want = example(operator)
    mesh = mesh_of(AxisType.Explicit)
    arrays = placed_on(mesh, operator, arrays)
    run = functools.partial(values_and_gradients, operator)
    with jax.set_mesh(mesh) if way == "set_mesh" else contextlib.nullcontext():
        got = (jax.jit(run) if way == "jit" else run)(*arrays)
    assert_close(got, want, EXACT)
    assert_split(operator, got)


@families_first(*QUICK)
def test_explicit_axes(operator, x64):
    check_explicit(operator, "jit")


@families_first(ls.gla, ls.retention)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "jit"])
def test_explicit_axes_without_jit(operator, way, x64):
    """On the arrays' mesh alone, and on the surrounding one."""
    check_explicit(operator, way)


def test_packed_rows_and_reading_the_future(x64):
    """Segment ids lie with the sequences, or anywhere; both directions are run by parts too."""
    operator, mesh = ls.retention, mesh_of(AxisType.Explicit)
    (args, state, _), _ = example(operator)
    ids = jnp.asarray(np.arange(SIZES["T"]) >= 6, jnp.int32)[None].repeat(2, 0)
    split_args, split_state, _ = placed_on(mesh, operator, example(operator)[0])
    for spec in (P("data"), P()):
        split_ids = jax.device_put(ids, NamedSharding(mesh, spec))
        got = operator(**split_args, initial_state=split_state, segment_ids=split_ids, chunk_size=CHUNK)
        assert_close(got, operator(**args, initial_state=state, segment_ids=ids, form="scan"), EXACT, str(spec))
    got = operator(**split_args, initial_state=split_state, causal=False)
    assert_close(got, operator(**args, initial_state=state, causal=False), EXACT, "causal=False")


def test_split_time_is_refused(x64):
    (args, _, _), _ = example(ls.gla)
    pad = lambda x: jnp.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2))  # noqa: E731
    mesh = mesh_of(AxisType.Explicit)
    args = {name: jax.device_put(pad(x), NamedSharding(mesh, P(None, "data"))) for name, x in args.items()}
    with pytest.raises(ValueError, match=r"gla: T is split over mesh axis data; use parallel.sequence_parallel\(gla"):
        ls.gla(**args)


def test_heads_that_do_not_divide_stay_whole(x64):
    """One key head for two devices: the value heads, which would, do not either."""
    operator, mesh = ls.gla, mesh_of(AxisType.Explicit)
    args = operator.example(jax.random.key(0), **{**SIZES, "H": 1, "HV": 2}, dtype=jnp.float64)
    want = operator(**args, form="scan")
    spec = {name: P("data", None, None if name in "qk" else "tensor") for name in args}
    split = {name: jax.device_put(x, NamedSharding(mesh, spec[name])) for name, x in args.items()}
    got = operator(**split, chunk_size=CHUNK)
    assert_close(got, want, EXACT)
    assert got[0].sharding.spec[0] == "data"


@pytest.mark.parametrize("owners", [{"B": "data"}, {"H": "tensor", "HV": "tensor"}], ids=["batch", "heads"])
def test_one_axis_splits_nothing(owners, x64):
    operator, mesh = ls.gated_delta_rule, mesh_of(AxisType.Explicit)
    arrays, want = example(operator)
    got = jax.jit(functools.partial(values_and_gradients, operator))(*placed_on(mesh, operator, arrays, owners))
    assert_close(got, want, EXACT)
    assert_split(operator, got, owners)


# ---- automatic axes


@families_first(ls.gla, ls.hgrn)
def test_automatic_axes(operator, x64):
    """Under `jit` the compiler splits the program, and sequences stay where they are."""
    arrays, want = example(operator)
    owners = {"B": "data"}
    got = jax.jit(functools.partial(values_and_gradients, operator))(
        *placed_on(mesh_of(AxisType.Auto), operator, arrays, owners)
    )
    assert_close(got, want, EXACT)
    assert got[0][0].sharding.spec[0] == "data"


@families_first(ls.gla, ls.gated_delta_rule, ls.retention, ls.hgrn)
def test_placed_automatic_axes_gather_nothing(operator, x64):
    """Where the program is told how calls lie, they run by parts: forward and backward hold no collective but the sums
    of gradients that devices share: of parameters."""
    arrays, want = example(operator)
    mesh = mesh_of(AxisType.Auto)
    arrays = placed_on(mesh, operator, arrays)
    with jax.set_mesh(mesh), ls.parallel.placed(batch="data", heads="tensor"):
        program = jax.jit(functools.partial(values_and_gradients, operator)).lower(*arrays).compile()
    assert_close(program(*arrays), want, EXACT)
    shared = any(not operator.arguments[name].per_token for name in arrays[0])
    shared |= any(not {"H", "HV", "D"} & {*operator.arguments[name].letters} for name in arrays[0])
    assert hlo.counts(program.as_text()).keys() <= ({"all-reduce"} if shared else set())


def test_placed_needs_the_mesh():
    args = ls.gla.example(jax.random.key(0), **SIZES)
    with ls.parallel.placed(batch="data"), pytest.raises(ValueError, match="no axis 'data' in the surrounding mesh"):
        ls.gla(**args)
    with jax.set_mesh(mesh_of(AxisType.Auto)), ls.parallel.placed(batch="date"):
        with pytest.raises(ValueError, match="no axis 'date'"):
            ls.gla(**args)


def test_placed_ends_with_its_context():
    """And what was compiled inside is not used outside."""
    args, mesh = ls.gla.example(jax.random.key(0), **SIZES), mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh):
        with ls.parallel.placed(batch="data"):
            inside = ls.gla(**args)[0]
        outside = ls.gla(**args)[0]
    assert inside.sharding.spec[0] == "data"
    assert not outside.sharding.is_equivalent_to(inside.sharding, outside.ndim)
