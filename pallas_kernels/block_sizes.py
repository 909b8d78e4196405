"""How a kernel divides its work: an explicit argument, else the tuned table of the device, else a rule of thumb.

The table is `block_sizes.json` beside this file, written by `python -m pallas_kernels.profile --tune`: rows that name
what they were tuned for (`FACTS`), the block sizes, and under `source` where the numbers come from.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path

TABLE = Path(__file__).with_name("block_sizes.json")
FACTS = ("kernel", "device", "K", "V", "dtype")
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


@functools.cache
def _table() -> list[dict]:
    return json.loads(TABLE.read_text("utf-8")) if TABLE.exists() else []


def choose(
    kernel: str, device: str, key_heads: int, value_heads: int, chunk: int | None = None, **facts: int | str
) -> BlockSizes:
    """The block sizes for a call; `chunk` is obeyed where given, facts are those of the table's rows.

    The rule of thumb: long chunks, and few enough heads for the compiler to keep an eye on, yet several.
    """
    choices = head_choices(key_heads, value_heads)
    facts = {"kernel": kernel, "device": device, **facts}
    for row in _table():
        if all(row[name] == facts[name] for name in FACTS) and chunk in (None, row["chunk"]):
            return BlockSizes(row["chunk"], max((n for n in choices if n <= row["heads"]), default=choices[0]))
    return BlockSizes(128 if chunk is None else chunk, choices[0])
