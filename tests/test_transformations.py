"""What JAX does to programs, done to recurrences: one of each family, in its chunk form. See docs/transformations.

Gradients, float64 and bfloat16 of every recurrence are in recurrences/test_laws.py.
"""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import EXACT, FAMILIES, every_family, families_first
from jax import export
from tolerances import GRADIENTS, OUTPUTS, assert_close

import lineax_seq as ls

SIZES = dict(B=2, T=11, H=2, K=4, V=4, D=4, N=2, L=4)
CHUNK = 4


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


@pytest.mark.parametrize("operator", ls.RECURRENCES.values(), ids=ls.RECURRENCES.keys())
def test_copies_are_the_operator_itself(operator):
    """Modules that hold a recurrence are copied and pickled with it; what is static in a program stays the same."""
    assert copy.copy(operator) is operator
    assert copy.deepcopy({"operator": operator})["operator"] is operator
    assert pickle.loads(pickle.dumps(operator)) is operator


# ---- export


def exported(operator, call, dims: str, **fixed: int):
    """`call` of arguments whose dimensions `dims` are symbols, after it was written to bytes and read again."""
    symbols = dict(
        zip(dims.split(), export.symbolic_shape(", ".join(f"{d.lower()}_" for d in dims.split())), strict=True)
    )
    sizes = {**SIZES, "HV": SIZES["H"], "NH": 2, **fixed, **symbols}
    args = {
        name: jax.ShapeDtypeStruct([sizes[letter] for letter in argument.letters], jnp.float32)
        for name, argument in operator.arguments.items()
    }
    return export.deserialize(export.export(jax.jit(call))(args).serialize())


@families_first()
@pytest.mark.parametrize("form", ["chunk", "scan"])
def test_export_with_a_symbolic_batch(operator, form):
    options = dict(chunk_size=CHUNK) if form == "chunk" else dict(form=form)
    call = lambda args: operator(**args, **options)  # noqa: E731
    program = exported(operator, call, "B")
    for batch in (1, 3):
        args = operator.example(jax.random.key(1), **{**SIZES, "B": batch})
        assert_close(program.call(args), call(args), OUTPUTS["float32"], f"B={batch}")


@families_first()
def test_export_with_a_symbolic_length(operator):
    """Which only the token scan takes."""
    call = lambda args: operator(**args, form="scan")  # noqa: E731
    program = exported(operator, call, "B T")
    for length in (1, 7):
        args = operator.example(jax.random.key(1), **{**SIZES, "T": length})
        assert_close(program.call(args), call(args), OUTPUTS["float32"], f"T={length}")


def test_export_of_chunks_wants_a_known_length():
    with pytest.raises(ValueError, match="gla: the chunk form wants a T that is known.* form='scan'"):
        exported(ls.gla, lambda args: ls.gla(**args), "T")


def test_export_of_packed_rows():
    """With a symbolic batch; whatever the documents are."""
    (batch,) = export.symbolic_shape("b")
    arguments = ls.gla.arguments.items()
    sizes = {**SIZES, "HV": SIZES["H"], "B": batch}
    shapes = {n: jax.ShapeDtypeStruct([sizes[letter] for letter in a.letters], jnp.float32) for n, a in arguments}
    ids = jax.ShapeDtypeStruct((batch, SIZES["T"]), jnp.int32)
    call = lambda args, ids: ls.gla(**args, segment_ids=ids, chunk_size=CHUNK)  # noqa: E731
    program = export.deserialize(export.export(jax.jit(call))(shapes, ids).serialize())
    args = ls.gla.example(jax.random.key(1), **SIZES)
    ids = jnp.asarray(np.arange(SIZES["T"]) >= 6, jnp.int32)[None].repeat(SIZES["B"], 0)
    assert_close(program.call(args, ids), call(args, ids), OUTPUTS["float32"])


# ---- forward mode


@every_family
def test_forward_mode_derivatives_of_the_scan(operator, x64):
    """`jvp`, `jacfwd` and `hessian` against reverse mode."""
    args = operator.example(jax.random.key(0), B=1, T=3, H=1, K=4, V=2, D=2, N=2, L=3, dtype=jnp.float64)
    first = next(iter(args))
    tangents = {n: jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, (n, x) in enumerate(args.items())}
    call = lambda args: operator(**args, form="scan")[0]  # noqa: E731
    of_first = lambda x: call({**args, first: x})  # noqa: E731
    loss = lambda args: (call(args) ** 2).sum()  # noqa: E731

    @jax.jit
    def derivatives(args):
        o, d_o = jax.jvp(call, (args,), (tangents,))
        (pulled,) = jax.vjp(call, args)[1](o)
        along = (o * d_o).sum(), sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), pulled, tangents)))
        jacobians = jax.jacfwd(of_first)(args[first]), jax.jacrev(of_first)(args[first])
        # a Hessian's row against the derivative of the gradient, in reverse mode both times
        hessians = jax.hessian(loss)(args), jax.jacrev(jax.grad(loss))(args)
        return along, jacobians, hessians

    for what, (forward, reverse) in zip(("jvp", "jacfwd", "hessian"), derivatives(args), strict=True):
        assert_close(forward, reverse, EXACT, what)


def test_forward_mode_of_chunks_is_refused_and_documented():
    args = example(ls.gla)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda args: ls.gla(**args, chunk_size=CHUNK)[0], (args,), (args,))
    assert "forward-mode ones (`jax.jvp`, `jacfwd`, `hessian`)" in ls.gla.__doc__
