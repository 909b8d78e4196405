"""How a matrix-state kernel divides its work: an explicit argument, else a tuned row, else a rule of thumb."""

import dataclasses
from collections.abc import Mapping, Sequence

from .._shared import block_sizes

CHUNKS = (64, 128)
SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Block sizes of a matrix-state kernel.

    Attributes:
        chunk: tokens of a chunk, C.
        heads: value heads of one grid step.

    Raises:
        ValueError: sizes that no kernel can have.
    """

    chunk: int = 128
    heads: int = 8

    def __post_init__(self):
        if self.chunk not in CHUNKS:
            raise ValueError(f"BlockSizes: chunk={self.chunk!r}, wants one of {CHUNKS}.")
        if type(self.heads) is not int or self.heads < 1:
            raise ValueError(f"BlockSizes: heads={self.heads!r}, wants a number of value heads of at least 1.")


def head_choices(key_heads: int, value_heads: int) -> Sequence[int]:
    """The numbers of value heads that a grid step may have: whole tiles of key and of value heads, or all."""
    shared = value_heads // key_heads
    tiles = range(SUBLANES * shared, value_heads, SUBLANES * shared)
    return [*(heads for heads in tiles if value_heads % heads == 0), value_heads]


def choices(sizes: Mapping[str, int]) -> list[BlockSizes]:
    """Every choice for a call of these sizes, the chunk size obeyed where it is among them under C."""
    heads = head_choices(sizes["H"], sizes.get("HV", sizes["H"]))
    chunks = (sizes["C"],) if "C" in sizes else CHUNKS
    return [BlockSizes(chunk, number) for chunk in chunks for number in heads]


def choose(
    kernel: str, device: str, key_heads: int, value_heads: int, chunk: int | None = None, **facts: int | str
) -> BlockSizes:
    """The block sizes for a call; `chunk` is obeyed where given, `facts` are the others of the table's rows.

    The rule of thumb: long chunks, and as few heads as allowed, which are still several. A grid step of few heads is a
    short program: the compiler then keeps more of it in registers.
    """
    allowed = head_choices(key_heads, value_heads)
    for row in block_sizes.tuned({"kernel": kernel, "device": device, **facts}):
        if chunk in (None, row["chunk"]):
            return BlockSizes(row["chunk"], max((n for n in allowed if n <= row["heads"]), default=allowed[0]))
    return BlockSizes(128 if chunk is None else chunk, allowed[0])
