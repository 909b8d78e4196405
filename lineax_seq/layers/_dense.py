"""Projections: `nnx.Linear` over tokens, whose kernel gradient is formed without transposing the output's gradient.

Autodiff puts the output's gradient first in `d kernel = dy^T x`, and XLA on CPU then computes that gradient twice, once
into a transposed copy: a quarter of the time of an MLP's training step. With x first there is no such copy.
The results carry the name `PROJECTION`, by which a `jax.checkpoint` policy can save them.
"""

import functools

import jax
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ..parallel.varying import vary, varying

PROJECTION = "projection"


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _project(x, kernel, precision):
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision=precision)


def _forward(x, kernel, precision):
    return _project(x, kernel, precision), (x, kernel)


def _backward(precision, residuals, dy):
    x, kernel = residuals
    tokens = tuple(range(x.ndim - 1))
    dx = lax.dot_general(dy, kernel, (((dy.ndim - 1,), (1,)), ((), ())), precision=precision)
    return dx, lax.dot_general(x, dy, ((tokens, tokens), ((), ())), precision=precision)


_project.defvjp(_forward, _backward)


def _dot_general(x, kernel, dimension_numbers, precision=None, out_sharding=None):
    if dimension_numbers != (((x.ndim - 1,), (0,)), ((), ())) or out_sharding is not None:
        raise ValueError(
            f"dense: dimension_numbers={dimension_numbers}, out_sharding={out_sharding}; wants the last axis of x "
            "against the first of the kernel and no out_sharding (constrain the result instead)."
        )
    # a kernel that all shards share gets the sum of their gradients
    x, kernel = vary((x, kernel), varying((x, kernel)))
    return checkpoint_name(_project(x, kernel, precision), PROJECTION)


dense = functools.partial(nnx.Linear, use_bias=False, dot_general=_dot_general)
