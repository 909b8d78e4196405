"""What a call is compiled for: the machine, and how many chunks a program holds at once there.

It is resolved once, at the public call, and passed on as a static value: nothing below a public call asks JAX where it
runs.
"""

import dataclasses

from pallas_kernels import Machine, machine_here

WIDTH = 128  # channels of a value head that the numbers of tokens below are meant for


@dataclasses.dataclass(frozen=True)
class Groups:
    """How large a group is: the chunks that the chunk form computes at once. One group follows the other.

    Attributes:
        tokens: the most tokens of a group, counted over all sequences and heads.
        chunks: the most chunks of each sequence in a group; None is no limit.
        forward_chunks: where nothing is differentiated, the most chunks of a group over all sequences and heads; None
            is no limit.
        keep_entries: whether the forward pass keeps the state that enters every chunk for the backward pass. If not, it
            keeps the states that enter groups, and the backward pass carries the state over each group again.
    """

    tokens: int
    chunks: int | None = None
    forward_chunks: int | None = None
    keep_entries: bool = True

    def chunks_at_once(
        self, sequences: int, chunk_size: int, width: int | None, states: int, forward_alone: bool
    ) -> int:
        """How many chunks of each sequence a group holds, at least 1; `sequences` counts rows times heads.

        Value heads of less than `WIDTH` channels get up to twice as many tokens, wider ones fewer. A record whose state
        consists of several matrices gets fewer chunks where the states that enter them are kept.
        """
        tokens = self.tokens * WIDTH // max(width or WIDTH, WIDTH // 2)
        limits = [tokens // (sequences * chunk_size * max(1, states // 4 if self.keep_entries else 1))]
        if self.chunks is not None:
            limits.append(self.chunks)
        if forward_alone and self.forward_chunks is not None:
            limits.append(self.forward_chunks // sequences)
        return max(1, min(limits))


# On a CPU the arrays of a group should stay in cache. With twice as many tokens, a backward pass needs more memory than
# malloc keeps between calls (32 MB), and touching fresh pages takes a quarter of the time. The state is carried over
# the chunks without a loop there, because XLA's loop copies the state at every step and first fills the arrays for its
# results with zeros; so programs grow with the number of chunks. Where nothing is differentiated, more than 16 chunks
# make the products no faster, and no longer fit into the cache.
CPU_GROUPS = Groups(tokens=1024, chunks=8, forward_chunks=16, keep_entries=False)
# An accelerator needs many chunks to be busy: 256 chunks of 64 tokens are about two for each of an H100's 132
# multiprocessors. More would only take more memory, since all intermediate results of a group exist at once.
ACCELERATOR_GROUPS = Groups(tokens=1 << 14)


@dataclasses.dataclass(frozen=True)
class Target:
    """The machine that a call is compiled for, and how large groups of chunks are on it."""

    machine: Machine
    groups: Groups

    @property
    def on_cpu(self) -> bool:
        return self.machine.platform == "cpu"


def target_here() -> Target:
    """The target of the program that is being traced, as `pallas_kernels.machine_here` finds its machine."""
    machine = machine_here()
    return Target(machine, CPU_GROUPS if machine.platform == "cpu" else ACCELERATOR_GROUPS)
