"""What a family's formulas may use of the chunk they work on: products, sums over tokens, masks."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Gate(NamedTuple):
    """A number per token, along either axis of a matrix of pairs."""

    row: jax.Array  # [1, C]
    col: jax.Array  # [C, 1]


class GateGradient(NamedTuple):
    """The gradient of a `Gate`, in two parts that are to be added; either may be None."""

    row: jax.Array | None
    col: jax.Array | None


def dot(a: jax.Array, b: jax.Array, dtype: jnp.dtype, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """The product over these axes of two matrices, in float32; the matrix unit reads them as `dtype`."""
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(
        a.astype(dtype), b.astype(dtype), dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def split(x: jax.Array, parts: int) -> list[jax.Array]:
    """bfloat16 arrays whose sum is close to `x`, each about 2^-8 of the one before."""
    out = []
    for _ in range(parts):
        out.append(x.astype(jnp.bfloat16))
        x = x - out[-1].astype(jnp.float32)
    return out


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """The chunk of a grid step, the same for all heads: its masks, and products in the right precision.

    Attributes:
        size: C.
        dtype: of the operands of matrix products; they add up in float32.
        scale: of the queries.
        count: None, or how many documents started in the chunk up to and with each token.
        i, j: [C, C] the row and the column number: the places in the chunk of a pair's two tokens.
        causal, strict: [C, C] pairs in one document with j <= i, and with j < i.
        same, entry, leave, through: None without documents, else which pairs are in one document, which tokens the
            entering state reaches, which reach the leaving state, and whether the one reaches the other.
    """

    size: int
    dtype: jnp.dtype
    scale: float
    count: Gate | None
    i: jax.Array = dataclasses.field(init=False, repr=False)
    j: jax.Array = dataclasses.field(init=False, repr=False)
    causal: jax.Array = dataclasses.field(init=False, repr=False)
    strict: jax.Array = dataclasses.field(init=False, repr=False)
    same: jax.Array | None = dataclasses.field(init=False, repr=False)
    entry: jax.Array | None = dataclasses.field(init=False, repr=False)
    leave: jax.Array | None = dataclasses.field(init=False, repr=False)
    through: jax.Array | None = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        i, j = (lax.broadcasted_iota(jnp.int32, (self.size, self.size), axis) for axis in (0, 1))
        causal, strict = i >= j, i > j
        entry = leave = through = same = None
        if self.count is not None:
            last = self.count.row[:, -1:]
            same = self.count.col == self.count.row
            causal, strict = causal & same, strict & same
            entry, leave, through = self.count.col == 0, self.count.col == last, last == 0
        masks = dict(causal=causal, strict=strict, same=same, entry=entry, leave=leave, through=through)
        for name, mask in dict(i=i, j=j, **masks).items():
            object.__setattr__(self, name, mask)

    def unscaled(self) -> "Chunk":
        return dataclasses.replace(self, scale=1.0)

    @property
    def exact(self) -> bool:
        return self.dtype == jnp.float32

    def dot(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """a b"""
        return dot(a, b, self.dtype)

    def fine_dot(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """a b, of which only a is rounded: for what is written to the state, which carries every rounding along."""
        return self.dot(a, b) if self.exact else jnp.asarray(sum(self.dot(a, part) for part in split(b, 2)))

    def fine_t_dot(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """a^T b, of which only b is rounded."""
        return self.t_dot(a, b) if self.exact else jnp.asarray(sum(self.t_dot(part, b) for part in split(a, 2)))

    def dot_t(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """a b^T"""
        return dot(a, b, self.dtype, (1, 1))

    def t_dot(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """a^T b"""
        return dot(a, b, self.dtype, (0, 0))

    def row_sums(self, rows: jax.Array, mask: jax.Array) -> jax.Array:
        """`rows [R, C]` times the 0-1 matrix `mask`, as accurate as float32, by one product of three parts."""
        parts = jnp.concatenate([part.astype(jnp.float32) for part in split(rows, 3)], axis=0).astype(jnp.bfloat16)
        sums = dot(parts, mask.astype(jnp.float32).astype(jnp.bfloat16), jnp.dtype(jnp.bfloat16))
        n = rows.shape[0]
        return sums[:n] + sums[n : 2 * n] + sums[2 * n :]

    def within(self, pairs: jax.Array) -> jax.Array:
        """`pairs [C, C]` where both tokens are of one document, zero elsewhere."""
        return pairs if self.same is None else jnp.where(self.same, pairs, 0)

    def from_entry(self, x: jax.Array) -> jax.Array:
        """`x [C, ...]` for tokens that the entering state still reaches, zero for others."""
        return x if self.entry is None else jnp.where(self.entry, x, 0)

    def to_exit(self, x: jax.Array) -> jax.Array:
        """`x [C, ...]` for tokens that reach the leaving state."""
        return x if self.leave is None else jnp.where(self.leave, x, 0)

    def from_entry_to_exit(self, x: jax.Array) -> jax.Array:
        return x if self.through is None else jnp.where(self.through, x, 0)
