"""One head's chunk `[C, D]` out of a block `[1, C, rows, lanes]`, and back.

Inputs stay in the caller's layout `[B, T, heads, D]`, where heads lie on sublanes and D on lanes: one head's chunk is a
load with a stride over the sublanes. Two bfloat16 rows share each 32-bit word, so that they are read and written in
pairs. Loads with a stride need whole tiles. Most shapes are whole tiles as they stand; for the others `laid_out` splits
heads wider than 128 lanes into several rows and pads the number of rows.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

LANES = 128
_UPPER = 0xFFFF0000


def parts(width: int) -> int:
    """How many rows of 128 lanes a head of this width has."""
    return max(1, width // LANES)


def row_count(heads: int, width: int, dtype) -> int:
    """How many rows `laid_out` makes of these heads."""
    rows, whole = heads * parts(width), (2, 4) if dtype == jnp.bfloat16 else (1, 2, 4)
    return rows if rows in whole else rows + -rows % (2 if rows < 2 else 4 if rows < 4 else 8)


def laid_out(x: jax.Array) -> jax.Array:
    """`[B, T, heads, D]` -> `[B, T, rows, lanes]`."""
    batch, length, heads, width = x.shape
    rows = row_count(heads, width, x.dtype)
    x = x.reshape(batch, length, heads * parts(width), -1)
    return jnp.pad(x, ((0, 0), (0, 0), (0, rows - x.shape[2]), (0, 0))) if rows > x.shape[2] else x


def heads_back(x: jax.Array, heads: int, width: int) -> jax.Array:
    """The inverse of `laid_out`."""
    return x[:, :, : heads * parts(width)].reshape(*x.shape[:2], heads, width)


def _rows(ref, row: int, interpret: bool):
    """The ref and the index at which one row of every token stands, or the pair of rows that share their words.

    The interpreter can neither view a ref as words nor flatten it, and finds the row where it stands.
    """
    if interpret:
        return ref, (0, slice(None), row)
    chunk, rows, lanes = ref.shape[1:]
    ref = ref.at[0]
    if ref.dtype == jnp.bfloat16:
        ref, rows, row = ref.bitcast(jnp.uint32), rows // 2, row // 2
    ref = ref.reshape(chunk * rows, lanes)
    return ref, (pl.ds(row, chunk, stride=rows) if rows > 1 else pl.ds(0, chunk), slice(None))


class Reader:
    """`reader[head]` is the head's `[C, D]` out of a block; tokens that are not `valid [C, 1]` are zero there."""

    def __init__(self, ref, width: int, valid: jax.Array | None, interpret: bool):
        self._ref, self._parts, self._valid, self._interpret = ref, parts(width), valid, interpret
        self._read: dict[int, jax.Array] = {}

    def __getitem__(self, head: int) -> jax.Array:
        found = [self._row(head * self._parts + part) for part in range(self._parts)]
        return found[0] if len(found) == 1 else jnp.concatenate(found, axis=1)

    def _row(self, row: int) -> jax.Array:
        if row not in self._read:
            ref, index = _rows(self._ref, row, self._interpret)
            x = ref[index]
            if self._valid is not None:
                x = jnp.where(self._valid, x, jnp.zeros((), x.dtype))
            if x.dtype == jnp.uint32:
                for i, half in enumerate((x << 16, x & jnp.uint32(_UPPER))):
                    half = lax.bitcast_convert_type(half, jnp.float32)
                    self._read[row - row % 2 + i] = half.astype(jnp.bfloat16)
            else:
                self._read[row] = x
        return self._read[row]


class Writer:
    """`writer[head] = x` writes the head's `[C, D]` into a block; call `close` after the last head."""

    def __init__(self, ref, width: int, interpret: bool):
        self._ref, self._parts, self._interpret = ref, parts(width), interpret
        self._waiting: dict[int, jax.Array] = {}

    def __setitem__(self, head: int, x: jax.Array) -> None:
        lanes = x.shape[1] // self._parts
        for part in range(self._parts):
            self._write(head * self._parts + part, x[:, part * lanes : (part + 1) * lanes])

    def _write(self, row: int, x: jax.Array) -> None:
        ref, index = _rows(self._ref, row, self._interpret)
        if ref.dtype != jnp.uint32:
            ref[index] = x.astype(ref.dtype)
            return
        x = lax.bitcast_convert_type(x.astype(jnp.bfloat16).astype(jnp.float32), jnp.uint32)
        other = self._waiting.pop(row ^ 1, None)
        if other is None:
            self._waiting[row] = x
            return
        lower, upper = (x, other) if row % 2 == 0 else (other, x)
        ref[index] = (lower >> 16) | upper

    def close(self) -> None:
        """Writes the rows whose partner never came, because it is padding."""
        for row, x in list(self._waiting.items()):
            self._write(row ^ 1, jnp.zeros(x.shape, jnp.float32))
