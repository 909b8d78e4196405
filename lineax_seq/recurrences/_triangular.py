"""Unit lower triangular systems, by the inverse of small leaves and block merges.

[[P, 0], [A, Q]]^-1 = [[P^-1, 0], [-Q^-1 A P^-1, Q^-1]]. Leaves are inverted row by row, in registers as it were.
The product form (I - A)(I + A^2)(I + A^4)... is shorter, but powers of A reach 1e11 when keys repeat (padding, common
tokens) although the inverse itself stays below 2, and cancel to nothing in float32; so no powers are formed here.
"""

import jax
import jax.numpy as jnp
from jax import lax

from . import _decay
from ._products import inner, outer

LEAF = 8


def _leaf_inverse(strict: jax.Array) -> jax.Array:
    """(I + A)^-1 of `[blocks, h, h]` by forward substitution: row i = e_i - sum_{j<i} A_ij row j."""
    h = strict.shape[-1]
    eye = jnp.eye(h, dtype=strict.dtype)
    rows = [jnp.broadcast_to(eye[0], strict.shape[:-2] + (h,))]
    for i in range(1, h):
        above = jnp.stack(rows, axis=-2)  # [blocks, i, h]
        rows.append(eye[i] - (strict[..., i, :i, None] * above).sum(-2))
    return jnp.stack(rows, axis=-2)


def _diagonal_blocks(matrix: jax.Array, h: int) -> jax.Array:
    m = matrix.shape[0] // h
    return matrix.reshape(m, h, m, h)[jnp.arange(m), :, jnp.arange(m)]


def _inverse(strict: jax.Array) -> jax.Array:
    size = strict.shape[0]
    h = min(LEAF, size)
    inverse = _leaf_inverse(_diagonal_blocks(strict, h))
    while h < size:
        pairs = inverse.reshape(-1, 2, h, h)
        lower = _diagonal_blocks(strict, 2 * h)[:, h:, :h]
        product = jnp.matmul(pairs[:, 1], lower, precision=lax.Precision.HIGHEST)
        inverse = _decay.assemble(inverse, -jnp.matmul(product, pairs[:, 0], precision=lax.Precision.HIGHEST))
        h *= 2
    return inverse[0]


@jax.custom_vjp
def unit_lower_solve(strict: jax.Array, *right: jax.Array) -> tuple[jax.Array, ...]:
    """`(I + A)^-1 R` for a strictly lower triangular `A [C, C]`, C a power of two, and each R `[C, ...]`.

    With Y = (I + A)^-1 R the gradients are dR = (I + A)^-T dY and dA = -dR Y^T below the diagonal, summed over all R:
    two products where the inverse's own gradient would need four.
    """
    return _forward(strict, *right)[0]


def _forward(strict, *right):
    inverse = _inverse(strict)
    solved = tuple(inverse @ r for r in right)
    return solved, (inverse, solved)


def _backward(residuals, d_solved):
    inverse, solved = residuals
    d_right = tuple(outer(inverse, d) for d in d_solved)
    d_strict = sum(inner(d, y) for d, y in zip(d_right, solved, strict=True))
    return -jnp.tril(d_strict, -1), *d_right


unit_lower_solve.defvjp(_forward, _backward)
