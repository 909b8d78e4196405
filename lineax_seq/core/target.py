"""What a call is compiled for: the machine, and how many chunks a program holds at once there.

It is resolved once, at the public call, and passed on as a static value: nothing below a public call asks JAX where it
runs.
"""

import dataclasses

from pallas_kernels import Machine, machine_here


@dataclasses.dataclass(frozen=True)
class Groups:
    """How many chunks the chunk form computes at once: a group of them, one group after the other.

    Attributes:
        tokens: of a group, over all sequences and heads.
        chunks: of each sequence in a group; None is no limit.
        forward_chunks: of a group, over all sequences and heads, where nothing is differentiated; None is no limit.
        keep_entries: whether the forward pass keeps the state that enters every chunk for the backward pass. If not, it
            keeps the states that enter groups, and the backward pass walks each group again.
    """

    tokens: int
    chunks: int | None = None
    forward_chunks: int | None = None
    keep_entries: bool = True

    def chunks_at_once(self, sequences: int, chunk_size: int, states: int, forward_alone: bool) -> int:
        """Chunks of each of so many `sequences` (rows times heads) that a group holds, at least 1.

        Where chunks keep the states that enter them, several states count as tokens: four as much as one chunk's.
        """
        limits = [self.tokens // (sequences * chunk_size * max(1, states // 4 if self.keep_entries else 1))]
        if self.chunks is not None:
            limits.append(self.chunks)
        if forward_alone and self.forward_chunks is not None:
            limits.append(self.forward_chunks // sequences)
        return max(1, min(limits))


# On a CPU a group's arrays should stay in cache. Backward with twice as many tokens, the memory of a call exceeds what
# malloc keeps (32 MB), and touching fresh pages costs a quarter of the time. Chunks are walked without a loop there,
# since one would copy the state at every step and fill what it stacks results in with zeros first; programs grow with
# their number. Forward alone, more than 16 chunks do not make the products faster, and leave the cache.
CPU_GROUPS = Groups(tokens=1024, chunks=8, forward_chunks=16, keep_entries=False)
# An accelerator needs many chunks to be busy: 256 of 64 tokens are two for each of an H100's 132 multiprocessors.
# More of them would only take more memory, since a group's intermediate results exist all at once.
ACCELERATOR_GROUPS = Groups(tokens=1 << 14)


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine and its groups of chunks."""

    machine: Machine
    groups: Groups

    @property
    def on_cpu(self) -> bool:
        return self.machine.platform == "cpu"


def target_here() -> Target:
    """The target of the surrounding trace, see `pallas_kernels.machine_here`."""
    machine = machine_here()
    return Target(machine, CPU_GROUPS if machine.platform == "cpu" else ACCELERATOR_GROUPS)
