"""How a call of a matrix-state kernel is cut: its grid, the block of every array, the memory of a grid step.

Grid: batch x blocks of heads x chunks, the chunks in sequence. The state is held transposed, `[V, K]`, so that the
decays of key channels lie along lanes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ._block_sizes import BlockSizes
from ._family import Family
from ._heads import parts, row_count


@dataclasses.dataclass(frozen=True)
class Tiling:
    """One call on one device: everything about it that is static.

    `tiling["T"]` is the size that the letter stands for; N is the number of chunks.

    Attributes:
        sizes: letter -> size, as pairs.
        dtypes: field that is a vector per token -> dtype, as pairs.
        operands: the dtype that the matrix units read.
        resets: whether documents start inside the sequence.
        interpret: whether the kernel runs in the interpreter.
    """

    family: Family
    scale: float
    block_sizes: BlockSizes
    sizes: tuple[tuple[str, int], ...]
    dtypes: tuple[tuple[str, jnp.dtype], ...]
    operands: jnp.dtype
    resets: bool
    interpret: bool

    def __getitem__(self, letter: str) -> int:
        return dict(self.sizes)[letter]

    @property
    def shared(self) -> int:
        """How many value heads share a key head."""
        return self["HV"] // self["H"]

    @property
    def grid(self) -> tuple[int, int, int]:
        return self["B"], self["HV"] // self.block_sizes.heads, self["N"]

    def width(self, name: str) -> int:
        """Of a field's vectors."""
        return self[self.family.fields[name].split()[1]]

    def shape(self, name: str) -> jax.ShapeDtypeStruct:
        """Of a field as `_heads.laid_out` gives it."""
        heads, width, dtype = self.family.fields[name].split()[0], self.width(name), dict(self.dtypes)[name]
        rows = row_count(self[heads], width, dtype)
        return jax.ShapeDtypeStruct((self["B"], self["T"], rows, width // parts(width)), dtype)

    # ---- blocks; `at` maps a grid step's time to the chunk that it works on

    def spec(self, name: str, at: Callable) -> pl.BlockSpec:
        """Of a field or its gradient."""
        heads, chunk = self.block_sizes.heads, self.block_sizes.chunk
        if name in self.family.numbers:
            return pl.BlockSpec((1, 1, heads, chunk), lambda b, h, t: (b, at(t), h, 0))
        *_, rows, lanes = self.shape(name).shape
        if heads < self["HV"]:
            own = self.family.fields[name].startswith("HV")
            rows = heads // (1 if own else self.shared) * parts(self.width(name))
        return pl.BlockSpec((1, chunk, rows, lanes), lambda b, h, t: (b, at(t), h, 0))

    def count_spec(self, at: Callable) -> pl.BlockSpec:
        """Of how many documents have started up to each token of a chunk."""
        return pl.BlockSpec((1, 1, 1, self.block_sizes.chunk), lambda b, h, t: (b, at(t), 0, 0))

    @property
    def state_spec(self) -> pl.BlockSpec:
        return pl.BlockSpec((1, self.block_sizes.heads, self["V"], self["K"]), lambda b, h, t: (b, h, 0, 0))

    @property
    def state_shape(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self["B"], self["HV"], self["V"], self["K"]), jnp.float32)

    def saved_spec(self, name: str, at: Callable) -> pl.BlockSpec:
        shape = self._saved(name)
        return pl.BlockSpec((1, 1, self.block_sizes.heads, *shape), lambda b, h, t: (b, at(t), h, 0, 0))

    def saved_shape(self, name: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self["B"], self["N"], self["HV"], *self._saved(name)), self.operands)

    def _saved(self, name: str) -> tuple[int, ...]:
        """The shape for one chunk of one head."""
        return tuple(self[letter] for letter in self.family.saved[name].split())

    @property
    def scratch(self) -> dict[str, Any]:
        """All heads' memory of a grid step, by the names of `Family.scratch`."""
        size = lambda x: x if isinstance(x, int) else self[x]  # noqa: E731
        return {
            name: pltpu.VMEM((self.block_sizes.heads, *map(size, shape)), jnp.float32 if exact else self.operands)
            for name, (shape, exact) in self.family.scratch.items()
        }
