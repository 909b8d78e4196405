"""`lax.cond` on a CPU without copies of what enters and leaves it.

XLA chooses the memory layout of arrays inside and outside of a branch independently. Outside it keeps tokens before
heads, as the caller's arrays have them; inside it takes heads before tokens, and so copies every array that crosses the
border. A constraint to row-major layout on both sides ends that: the gradient of kda gets 4 % faster, that of gla 7 %.
An exported program must not carry the constraint, because `jax.export` promises nothing about it. Only the lowering of
a primitive knows whether it is for an export, which is why there is one here.
"""

from collections.abc import Callable

import jax
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_rows_p = Primitive("rows")
_rows_p.def_impl(lambda x: x)
_rows_p.def_abstract_eval(lambda x: x)
ad.deflinear(_rows_p, lambda cotangent: [_rows_p.bind(cotangent)])
batching.defvectorized(_rows_p)
mlir.register_lowering(_rows_p, lambda ctx, x: [x])


def _lowered_for_cpu(ctx, x):
    if ctx.module_context.lowering_parameters.for_export:
        return [x]
    constrained = lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim))))  # noqa: E731
    return mlir.lower_fun(constrained, multiple_results=False)(ctx, x)


mlir.register_lowering(_rows_p, _lowered_for_cpu, platform="cpu")


def branch(predicate: jax.Array, where_true: Callable, where_false: Callable, *operands):
    """`lax.cond` with operands and results in row-major layout."""
    rows = lambda tree: jax.tree.map(_rows_p.bind, tree)  # noqa: E731
    after = lambda fn: lambda *args: rows(fn(*args))  # noqa: E731
    return lax.cond(predicate, after(where_true), after(where_false), *rows(operands))
