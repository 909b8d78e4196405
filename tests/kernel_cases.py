"""A matrix-state kernel through the public call, in the strict interpreter, and ahead of time for a TPU."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, reference
from tolerances import GRADIENTS, OUTPUTS, assert_close

import lineax_seq as ls
import pallas_kernels

SIZES = dict(B=1, T=100, H=2, HV=2, K=64, V=64, NH=2)
compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed: pip install libtpu"
)


def through_kernel(case: Case, operator: ls.Operator, dtype: str, chunk_size: int | None = 64):
    """Outputs, final state and every gradient, as `cases.evaluate` has them."""
    narrow = lambda x: jnp.asarray(np.asarray(x), dtype)  # noqa: E731
    args, state = jax.tree.map(narrow, case.args), jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), case.state)
    d_out = narrow(case.d_out[0]), jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), case.d_out[1])

    @jax.jit
    def run(args, state, segment_ids):
        call = functools.partial(operator, segment_ids=segment_ids, chunk_size=chunk_size, implementation="mosaic_tpu")
        out, pull = jax.vjp(lambda args, state: call(**args, initial_state=state), args, state)
        return out, pull(d_out)

    with pallas_kernels.interpret():
        return run(args, state, case.segment_ids)


def check(operator: ls.Operator, dtype: str, chunk_size: int = 64, starts=(), change=None, **sizes: int):
    """The kernel against the float64 token scan: outputs, final state, gradients of all arguments and of the state.

    `change`: arguments -> arguments.
    """
    case = Case(operator, **{**SIZES, **sizes})
    if starts:
        case.packed(*starts)
    if change is not None:
        case.args = change({name: np.asarray(x) for name, x in case.args.items()})
    case.rounded(dtype)
    out, grads = reference(operator, case)
    got, got_grads = through_kernel(case, operator, dtype, chunk_size)
    assert got[0].dtype == jnp.dtype(dtype) and {x.dtype for x in jax.tree.leaves(got[1])} == {jnp.dtype("float32")}
    assert_close(got, out, OUTPUTS[dtype], f"{operator.name}: outputs")
    assert_close(got_grads, grads, GRADIENTS[dtype], f"{operator.name}: gradients")


# ---- ahead of time


def shapes(operator: ls.Operator, backward: bool, dtype: str, **sizes: int) -> tuple:
    args = jax.eval_shape(lambda: operator.example(jax.random.key(0), dtype=jnp.dtype(dtype), **sizes))
    if not backward:
        return (args,)
    return args, jax.eval_shape(lambda a: operator(**a, implementation="xla"), args)


def program(name: str, chunk_size: int | None, args: dict, d_out: tuple | None = None):
    """Forward, and with `d_out` also backward, through the kernel of the record."""
    operator = ls.RECURRENCES[name]

    def call(args):
        return operator(**args, chunk_size=chunk_size, implementation="mosaic_tpu")

    if d_out is None:
        return call(args)
    out, pull = jax.vjp(call, args)
    return out, pull(d_out)


TARGETS = ("v5e", "v5p", "v6e", "tpu7x")
WIDE = dict(K=128, V=128, T=256)
SHAPES = [
    *(dict(dtype=dtype, chunk_size=chunk, **WIDE) for dtype in ("float32", "bfloat16") for chunk in (64, 128)),
    *(dict(dtype="bfloat16", K=K, V=V) for K, V in ((64, 256), (256, 64))),
    dict(WIDE, dtype="bfloat16", H=1, HV=3),
    dict(WIDE, dtype="float32", H=16, HV=16),
    *(dict(WIDE, dtype=dtype, H=8, HV=8, K=256, V=256) for dtype in ("float32", "bfloat16")),
]


def assert_compiles(jobs: list[tuple[str, str]], variants=(dict(dtype="bfloat16", **WIDE),)) -> None:
    """Forward and backward of every (recurrence, target) in every variant: one kernel each."""
    from pallas_kernels.profiler._aot import CompileError, compile_all

    programs, names = [], []
    for name, target in jobs:
        for variant in variants:
            sizes = {**SIZES, **variant}
            chunk_size, dtype = sizes.pop("chunk_size", 128), sizes.pop("dtype")
            args = shapes(ls.RECURRENCES[name], True, dtype, **sizes)
            programs.append((functools.partial(program, name, chunk_size), args, target))
            names.append((name, target, variant))
    for what, result in zip(names, compile_all(programs), strict=True):
        assert not isinstance(result, CompileError), f"{what}: {result}"
        kernels = [use.name for use in result.uses() if use.is_kernel]
        assert len(kernels) == 2 and "forward" in kernels[0] and "backward" in kernels[1], f"{what}: {kernels}"
