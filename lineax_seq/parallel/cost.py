"""What a strategy costs: rounds of messages and bytes, on links of a stated latency and bandwidth.

With S the bytes of the state and T those of the transition that go with it, on P devices, one direction:

    strategy    rounds         bytes, one after the other      note
    all_gather  1              (P-1) (S + T)                   the only one during which other work can run
    ring        P-1            (P-1) S                         a device waits for all before it
    tree        ceil(log2 P)   ceil(log2 P) (S + T)            on a ring of links (P-1) (S + T), as messages share links
    all_scan    P+M-2          (P+M-2) S / M                   M pieces of the state; transitions are not sent

All but the all-gather then send the final state to everyone, by an all-reduce of S: 2 S bytes in one more round.
"""

import dataclasses
import math

from ..core.target import Machine, machine_here


@dataclasses.dataclass(frozen=True)
class Link:
    """What a message costs between neighbours.

    Attributes:
        latency: seconds until the first byte, the start of the collective included.
        bandwidth: bytes per second in one direction.
        switched: whether any two devices are neighbours (NVLink, a switch), or only those next to each other on a ring
            (a TPU's torus), where a message over d devices keeps d links busy.
    """

    latency: float = 2e-6
    bandwidth: float = 50e9
    switched: bool = True


def link_of(machine: Machine) -> Link:
    """The links between such machines. The numbers have the order of magnitude of TPU and GPU pods."""
    return Link(switched=machine.platform != "tpu")


def message_rounds(strategy: str, devices: int, state_bytes: int, transition_bytes: int, blocks: int = 1):
    """`(rounds, bytes)` of an exchange, without sending the final state to everyone; `blocks` is M."""
    doubling = math.ceil(math.log2(devices)) if devices > 1 else 0
    both = state_bytes + transition_bytes
    return {
        "all_gather": (min(devices - 1, 1), (devices - 1) * both),
        "ring": (devices - 1, (devices - 1) * state_bytes),
        "tree": (doubling, doubling * both),
        "all_scan": (devices + blocks - 2, (devices + blocks - 2) * state_bytes / blocks),
    }[strategy]


def predicted_seconds(
    strategy: str, devices: int, state_bytes: int, transition_bytes: int, blocks: int = 1, link: Link | None = None
) -> float:
    """The time of one exchange during which nothing else is computed."""
    link = link or link_of(machine_here())
    rounds, volume = message_rounds(strategy, devices, state_bytes, transition_bytes, blocks)
    if strategy == "tree" and not link.switched:
        volume = (devices - 1) * (state_bytes + transition_bytes)
    if strategy != "all_gather" and devices > 1:
        rounds, volume = rounds + 1, volume + 2 * state_bytes
    return rounds * link.latency + volume / link.bandwidth


def blocks(devices: int, state_bytes: int, columns: int, link: Link | None = None) -> int:
    """M, the number of pieces for `all_scan`: the largest divisor of `columns` that is no more than the best number.

    The time (P-2+M)(latency + S/(M bandwidth)) is least for M = sqrt((P-2) S / (latency bandwidth)); 2 is the smallest
    number that counts as best.
    """
    link = link or link_of(machine_here())
    best = max(2.0, math.sqrt(max(devices - 2, 0) * state_bytes / (link.latency * link.bandwidth)))
    return max(d for d in range(1, columns + 1) if columns % d == 0 and (d <= best or d == 1))


def cheapest(devices: int, state_bytes: int, transition_bytes: int, columns: int, link: Link | None = None) -> str:
    """The strategy that `strategy=None` takes."""
    pieces = blocks(devices, state_bytes, columns, link)
    cost = lambda s: predicted_seconds(s, devices, state_bytes, transition_bytes, pieces, link)  # noqa: E731
    return min(("all_gather", "tree", "all_scan", "ring"), key=cost)
