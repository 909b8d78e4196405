"""What a kernel must be: the chunk form that it replaces, and so the float64 token scan."""

import functools
from collections.abc import Collection

import jax

from ..core.operator import Operator
from ._case import Case, assert_same, evaluate, reference
from ._report import Law, run

SIZES = dict(B=2, T=100, H=2, HV=4, K=64, V=64, D=128)
STARTS = (5, 64, 71)  # inside a chunk, on a border, two in one chunk


def check_kernel(
    operator: Operator,
    implementation: str,
    laws: Collection[str] | None = None,
    *,
    chunk_size: int | None = 64,
    dtypes: Collection[str] = ("float32", "bfloat16"),
    **sizes: int,
) -> None:
    """The recurrence by this implementation is the chunk form and the token scan: outputs, states, all gradients.

    On a machine without the accelerator, run it where the implementation can be interpreted.

    Args:
        operator: the public callable.
        implementation: the kernel's name, as in `implementation=`; it is named, so that nothing falls back.
        laws: the names of those to check, of `kernel_laws(...)`; None is all of them.
        chunk_size: None is the kernel's own choice.
        dtypes: of the inputs.
        sizes: of the legend's letters; T need not be a multiple of the chunk, and should not be.

    Raises:
        AssertionError: the broken laws, each with what was got and wanted and how to see it again.
        NotImplementedError: the kernel refuses these sizes or this platform.
        ValueError: an unknown law or implementation.
    """
    laws_ = kernel_laws(operator, implementation, chunk_size=chunk_size, dtypes=dtypes, **sizes)
    run("check_kernel", f"{operator.name} by {implementation}", laws_, laws)


def kernel_laws(
    operator: Operator,
    implementation: str,
    *,
    chunk_size: int | None = 64,
    dtypes: Collection[str] = ("float32", "bfloat16"),
    **sizes: int,
) -> dict[str, Law]:
    """The laws of `check_kernel` by name."""
    compare = functools.partial(_compare, operator, implementation, chunk_size, {**SIZES, **sizes})
    return {
        **{f"kernel = scan, {dtype}": functools.partial(compare, "scan", (), dtype) for dtype in dtypes},
        **{f"kernel = chunk, {dtype}": functools.partial(compare, "chunk", (), dtype) for dtype in dtypes},
        "packed documents": functools.partial(compare, "scan", STARTS, next(iter(dtypes))),
    }


def _compare(operator, implementation, chunk_size, sizes, form, starts, dtype) -> None:
    """A state enters, heads are grouped where the recurrence has key heads and value heads."""
    case = Case(operator, **sizes)
    case = (case.packed(*starts) if starts else case).rounded(dtype)
    got = evaluate(operator, "chunk", case, dtype, chunk_size, implementation)
    if form == "scan":
        want = reference(operator, case)
    else:
        want = evaluate(operator, "chunk", case, dtype, chunk_size, "xla")
    assert_same(got, want, dtype)
    (o, final), _ = got
    assert str(o.dtype) == dtype, f"o is {o.dtype} for {dtype} inputs"
    wide = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(final)})
    assert wide == ["float32"], f"the final state is {wide}, wants float32"
