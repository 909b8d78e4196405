"""What JAX does to programs, done to recurrences: one of each family, in its chunk form. See docs/transformations.

Gradients, float64 and bfloat16 of every recurrence are in recurrences/test_laws.py.
"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import GRADIENTS, OUTPUTS, assert_close

import lineax_seq as ls

SIZES = dict(B=2, T=11, H=2, K=4, V=4, D=4, N=2, L=4)
CHUNK = 4
FAMILIES = (
    *(ls.linear_attention, ls.simple_gla, ls.gla, ls.gated_delta_rule, ls.rwkv7, ls.hgrn, ls.mamba),
    *(ls.normalized_linear_attention, ls.mlstm, ls.lightnet, ls.log_linear_attention),
)
every_family = pytest.mark.parametrize("operator", FAMILIES, ids=lambda operator: operator.name)


def run(operator, args):
    return operator(**args, chunk_size=CHUNK)


def loss(operator, args):
    o, final = run(operator, args)
    return sum((leaf**2).sum() for leaf in jax.tree.leaves((o, final)))


@functools.cache
def example(operator):
    return operator.example(jax.random.key(0), **SIZES)


@functools.cache
def gradient(operator):
    """Of the token scan: what every way to the chunk form's gradient has to give."""

    def of_scan(args):
        o, final = operator(**args, form="scan")
        return sum((leaf**2).sum() for leaf in jax.tree.leaves((o, final)))

    return jax.jit(jax.grad(of_scan))(example(operator))


def test_every_family_is_here():
    """A record of the registry that is no relative of one of these has to be added."""
    kind = lambda operator: (operator.recurrence.monoid, operator.recurrence.has_heads)  # noqa: E731
    assert {kind(operator) for operator in ls.RECURRENCES.values()} == {kind(operator) for operator in FAMILIES}


@every_family
def test_jit_traces_once(operator):
    args, traces = example(operator), []

    @jax.jit
    def program(args):
        traces.append(args)
        return run(operator, args)

    got = program(args)
    assert_close(got, operator(**args, form="scan"), OUTPUTS["float32"])
    program(jax.tree.map(lambda x: x + 0, args))
    assert len(traces) == 1


@every_family
def test_grad_with_and_without_checkpoint(operator):
    plain = jax.jit(jax.grad(functools.partial(loss, operator)))(example(operator))
    assert_close(plain, gradient(operator), GRADIENTS["float32"], "grad")

    @jax.checkpoint
    def again(args):
        return run(operator, args)

    rematerialised = jax.grad(lambda args: sum((leaf**2).sum() for leaf in jax.tree.leaves(again(args))))
    assert_close(jax.jit(rematerialised)(example(operator)), plain, GRADIENTS["float32"], "checkpoint")


@every_family
def test_vmap(operator):
    """Over a further axis, gradients too; parameters are shared or mapped like everything else."""
    args = example(operator)
    stacked = {name: jnp.stack([x, 0.5 * x]) for name, x in args.items()}
    got = jax.jit(jax.vmap(jax.value_and_grad(functools.partial(loss, operator))))(stacked)
    one = jax.jit(jax.value_and_grad(functools.partial(loss, operator)))
    for index in range(2):
        row = jax.tree.map(lambda x, index=index: x[index], (stacked, got))
        assert_close(row[1], one(row[0]), GRADIENTS["float32"])

    shared = {name: 0 if operator.arguments[name].per_token else None for name in args}
    both = {name: jnp.stack([x, x]) if shared[name] == 0 else x for name, x in args.items()}
    o, _ = jax.jit(jax.vmap(functools.partial(run, operator), (shared,)))(both)
    assert_close(o[1], run(operator, args)[0], OUTPUTS["float32"])


@every_family
def test_donated_state(operator):
    """A decoding loop gives its state away at every step: the new one takes its place."""
    args = example(operator)
    token = {name: x[:, 0] if operator.arguments[name].per_token else x for name, x in args.items()}
    step = lambda state: operator.step(**token, state=state)  # noqa: E731
    state = run(operator, args)[1]
    want = step(state)
    with_donation = jax.jit(step, donate_argnums=0)
    given = jax.tree.map(jnp.array, state)
    assert_close(with_donation(given), want, OUTPUTS["float32"])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))


@every_family
def test_debug_nans(operator):
    """No intermediate result of sound inputs is a NaN, forward or backward, over document borders and in padding. A
    NaN that a caller brings is found."""
    args = example(operator)
    ids = jnp.asarray(np.arange(SIZES["T"]) >= 6, jnp.int32)[None].repeat(SIZES["B"], 0)
    packed = lambda args: operator(**args, chunk_size=CHUNK, segment_ids=ids)[0].sum()  # noqa: E731
    with jax.debug_nans(True):
        jax.block_until_ready(jax.jit(jax.value_and_grad(packed))(args))
        first = next(iter(args))
        with pytest.raises(FloatingPointError):
            jax.block_until_ready(jax.jit(packed)(args | {first: args[first].at[0, 0].set(jnp.nan)}))


@every_family
def test_deepcopy(operator):
    """Modules that hold a recurrence are copied with it."""
    args = example(operator)
    assert_close(copy.deepcopy(operator)(**args, chunk_size=CHUNK), run(operator, args), OUTPUTS["float32"])


@pytest.mark.parametrize("operator", [ls.gla, ls.hgrn], ids=lambda operator: operator.name)
def test_automatic_sharding(operator):
    """Under `jit`, arguments that lie split over a mesh, here by sequences, give outputs that do."""
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    args = example(operator)
    place = lambda name: NamedSharding(mesh, P("data") if operator.arguments[name].per_token else P())  # noqa: E731
    split = {name: jax.device_put(x, place(name)) for name, x in args.items()}
    o, final = jax.jit(functools.partial(run, operator))(split)
    assert_close((o, final), run(operator, args), OUTPUTS["float32"])
    assert o.sharding.spec[0] == "data"
