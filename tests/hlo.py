"""Reading compiled programs: which collectives they hold, and of how many bytes."""

import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
BYTES = {"f64": 8, "f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\((?:.*?channel_id=(\d+))?")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(rf"({'|'.join(BYTES)})\[([\d,]*)\]")


class Collective(NamedTuple):
    kind: str
    size: int  # bytes of its results on one device


def collectives(text: str) -> list[Collective]:
    """Those of a compiled program in its order.

    A TPU's asynchronous one stands in several fusions, told by its channel, and is one. Elsewhere every line is one of
    its own: on a CPU all of them have the same channel.
    """
    found, channels, fused = [], set(), False
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            fused = "fus" in head.group(1)
        if (match := _COLLECTIVE.search(line)) is None:
            continue
        shape, kind, started, channel = match.groups()
        if fused and channel:
            if (kind, channel) in channels:
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
