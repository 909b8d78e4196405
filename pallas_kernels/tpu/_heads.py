"""One head's chunk `[C, D]` out of a block `[1, C, rows, lanes]`, and back.

Inputs stay in the callers' layout `[B, T, heads, D]`, where heads lie on sublanes: a head is a load whose sublanes are
apart. Two bfloat16 rows share each 32-bit word, so they come and go in pairs. Such loads want whole tiles, which most
shapes are as they stand: heads wider than 128 lanes are split into several rows (`laid_out`), and odd numbers of rows
are filled up.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

LANES = 128
_UPPER = 0xFFFF0000


def parts(width: int) -> int:
    """Rows per head."""
    return max(1, width // LANES)


def row_count(heads: int, width: int, dtype) -> int:
    """Rows of `laid_out`."""
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
    """The reference and index of one row of every token, or of the pair that shares its words.

    The interpreter knows neither words nor flattened references, and reads the row where it stands.
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
    """The heads of a block; tokens that are not `valid [C, 1]` are zero."""

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
    """Writes the heads of a block; `close` when all are in."""

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
        """Writes rows whose pair never came: it is filling."""
        for row, x in list(self._waiting.items()):
            self._write(row ^ 1, jnp.zeros(x.shape, jnp.float32))
