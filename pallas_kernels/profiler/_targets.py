"""The TPUs that the profiler compiles for, as JAX sees one device of each.

Clock and matrix-unit rate are tied: the rate in bfloat16 is what the compiler's schedules of a large product reach
(131,072 flop a cycle on four 128x128 units, 524,288 on two 256x256 ones), the clock is the published peak over it.
"""

import dataclasses
import difflib
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Target:
    """One device.

    Attributes:
        name: as users say it.
        kind: the device as JAX calls it.
        topology: the smallest slice, as the compiler names it.
        clock: cycles a second of one core.
        bandwidth: bytes a second from and to HBM, of the device.
        flops: bfloat16 operations a cycle of one core's matrix units.
        vmem: bytes of vector memory of one core.
        cores: that share a device; a kernel's "parallel" grid dimensions are split over them.
        branch_delay: bundles that are still issued after a taken branch.
    """

    name: str
    kind: str
    topology: str
    clock: float
    bandwidth: float
    flops: int
    vmem: int
    cores: int = 1
    branch_delay: int = 4

    @property
    def bytes_per_cycle(self) -> float:
        return self.bandwidth / self.clock


TARGETS = {
    target.name: target
    for target in (
        Target("v5e", "TPU v5 lite", "v5e:2x2", 1.5e9, 819e9, 131_072, 128 << 20),
        Target("v5p", "TPU v5", "v5p:2x2x1", 1.75e9, 2765e9, 131_072, 64 << 20, cores=2),
        Target("v6e", "TPU v6 lite", "v6e:2x2", 1.75e9, 1640e9, 524_288, 128 << 20),
        Target("tpu7x", "TPU7x", "tpu7x:2x2x1", 2.2e9, 3690e9, 524_288, 64 << 20, branch_delay=6),
    )
}


def target(name: "str | Target") -> Target:
    """The target of this name.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(name, Target):
        return name
    if name not in TARGETS:
        raise ValueError(f"target: got {name!r}{nearest(name, TARGETS)} wanted one of {list(TARGETS)}")
    return TARGETS[name]


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for an unknown name, or nothing when none is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
