"""Reading compiled programs: which collectives they hold, and of how many bytes."""

import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
BYTES = {"f64": 8, "f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\((?:.*?channel_id=(\d+))?")
_ARRAY = re.compile(rf"({'|'.join(BYTES)})\[([\d,]*)\]")


class Collective(NamedTuple):
    kind: str
    size: int  # bytes of its results on one device


def collectives(text: str) -> list[Collective]:
    """Those of a compiled program in its order; one that several fusions hold, told by its channel, is one."""
    found, channels = [], set()
    for shape, kind, started, channel in _COLLECTIVE.findall(text):
        if channel and (kind, channel) in channels:
            continue
        channels.add((kind, channel))
        arrays = _ARRAY.findall(shape)
        if started:  # its shape is that of what goes in, then of what comes out
            arrays = arrays[-1:]
        found.append(Collective(kind, sum(BYTES[dtype] * _elements(dims) for dtype, dims in arrays)))
    return found


def counts(text: str) -> dict[str, int]:
    """kind -> how many."""
    kinds = [collective.kind for collective in collectives(text)]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def _elements(dims: str) -> int:
    product = 1
    for dim in filter(None, dims.split(",")):
        product *= int(dim)
    return product
