"""Unit lower triangular systems: the inverses of small diagonal squares, merged in pairs.

Two inverses make that of twice the size: [[P, 0], [A, Q]]^-1 = [[P^-1, 0], [-Q^-1 A P^-1, Q^-1]]. The product form
(I - A)(I + A^2)(I + A^4)... is shorter. But where keys repeat, as in padding and for common tokens, the powers of A
reach 1e11 although the inverse stays below 2, and cancel in float32. So no powers are formed here.
Derivation: docs/design/derivations/delta_family.md.
"""

import jax
import jax.numpy as jnp
from jax import lax

from . import _decay
from ._products import inner, outer

LEAF = 8


def _leaf_inverse(strict: jax.Array) -> jax.Array:
    """(I + A)^-1 of many A `[m, h, h]` by forward substitution: row i = e_i - sum_{j<i} A_ij row j."""
    h = strict.shape[-1]
    eye = jnp.eye(h, dtype=strict.dtype)
    rows = [jnp.broadcast_to(eye[0], strict.shape[:-2] + (h,))]
    for i in range(1, h):
        above = jnp.stack(rows, axis=-2)  # [m, i, h]
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


Scaled = tuple[jax.Array | None, jax.Array]
"""`diag(s) R` as `(s [C] or None for ones, R [C, ...])`."""


@jax.custom_vjp
def unit_lower_solve(strict: jax.Array, *right: Scaled) -> tuple[jax.Array, ...]:
    """`(I + A)^-1 diag(s) R` for a strictly lower triangular `A [C, C]`, C a power of two, and each `(s, R)`.

    s scales columns of the inverse, which are shorter than rows of R. With Y the solution and E = (I + A)^-T dY, the
    gradients are dR = diag(s) E, ds_i = E_i · R_i and, summed over all R, dA = -E Y^T below the diagonal. These are two
    products, where the gradient of the inverse itself would take four.
    """
    return _forward(strict, *right)[0]


def _forward(strict, *right):
    inverse = _inverse(strict)
    solved = tuple((inverse if s is None else inverse * s) @ r for s, r in right)
    return solved, (inverse, right, solved)


def _backward(residuals, d_solved):
    inverse, right, solved = residuals
    through = [outer(inverse, d) for d in d_solved]
    d_strict = sum(inner(e, y) for e, y in zip(through, solved, strict=True))
    d_right = [
        (None, e) if s is None else ((e * r).sum(-1), s[:, None] * e) for (s, r), e in zip(right, through, strict=True)
    ]
    return -jnp.tril(d_strict, -1), *d_right


unit_lower_solve.defvjp(_forward, _backward)
