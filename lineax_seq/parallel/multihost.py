"""Several processes, one program: how they find each other, and the few things they agree on beside the arrays.

Every process runs the same script on the same arguments and drives the devices of its host. The first one (`is_main`)
also shows progress and writes files. What only one of them can know (a drawn seed, a measured time, a signal) is agreed
on before it decides what any of them does: they must all run the same programs in the same order.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

COORDINATOR, PROCESSES, PROCESS_ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
DETECT = ("auto", "always", "never")


def cluster(environment=os.environ) -> str | None:
    """The cluster whose environment variables say that this is one of several processes, or None."""
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= environment.keys():
        return "SLURM"
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
        return "Kubernetes"
    hosts = environment.get("TPU_WORKER_HOSTNAMES", environment.get("TPU_PROCESS_ADDRESSES", ""))
    return "TPU pod" if "," in hosts and " " not in hosts else None  # libtpu may write a sentence there


def initialize(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None, *, detect: str = "auto"
) -> None:
    """Join the other processes of this job, before anything asks for a device; a job of one process does nothing.

    Args:
        coordinator, processes, process_id: HOST:PORT of the first process, how many there are, which one this is; or
            the environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
        detect: where those are not given. "auto": ask the cluster if `cluster` sees one. "always": ask it anyway, for
            TPU virtual machines outside of Kubernetes and Open MPI, which only JAX recognises. "never": one process.

    Raises:
        ValueError: some but not all of the three; numbers out of range; `detect` without a cluster.
    """
    if detect not in DETECT:
        raise ValueError(f"initialize: detect={detect!r}, wants one of {DETECT}.")
    given = {COORDINATOR: coordinator, PROCESSES: processes, PROCESS_ID: process_id}
    words = {name: os.environ.get(name) if value is None else str(value) for name, value in given.items()}
    address, *numbers = words.values()
    missing = [name for name, word in words.items() if word is None]
    if address is not None and not missing:
        count, number = (int(word) if word and word.isdecimal() else -1 for word in numbers)
        if ":" not in address or not 0 <= number < count:
            raise ValueError(
                f"initialize: coordinator {address!r}, process {numbers[1]} of {numbers[0]}: wants HOST:PORT and a "
                "process id from 0 to processes - 1."
            )
        jax.distributed.initialize(address, count, number, cluster_detection_method="deactivate")
    elif coordinator is not None or processes is not None or process_id is not None:
        raise ValueError(
            f"initialize: missing {', '.join(missing)}; give coordinator, processes and process id together, as flags "
            "or as environment variables, or none of them on a cluster that JAX recognises."
        )
    elif detect == "always" or (detect == "auto" and cluster() is not None):
        jax.distributed.initialize()


def is_main() -> bool:
    """Whether this process is the one that shows progress and writes files."""
    return jax.process_index() == 0


def broadcast(value: Any) -> Any:
    """The first process's `value`, of plain values that JSON holds, on all of them; a barrier too."""
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(json.dumps(value).encode(), np.uint8) if is_main() else np.zeros(0, np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    data = np.resize(data, size) if is_main() else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(data), np.uint8).tobytes())


def to_host(tree: Any) -> Any:
    """Every array whole, as a NumPy array on every process, wherever its parts lie; all processes must ask."""

    def fetch(x):
        whole = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
        return np.asarray(x if whole else multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(fetch, tree)


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The first process runs the body of the `with` statement, then the others do, and find on disk what it made."""
    if not is_main():
        broadcast(None)
    try:
        yield
    finally:
        if is_main():
            broadcast(None)


class Agreement:
    """`agreement(value)` -> the largest value that any process gave; of several, that of the call before (first: 0).

    So asking does not wait: the answer is computed behind the work that was dispatched before it. `wait=True` does.
    """

    def __init__(self):
        self._previous: jax.Array | None = None
        if jax.process_count() > 1:
            mesh = Mesh(np.asarray(jax.devices()), ("all",))
            self._sharding = NamedSharding(mesh, P("all"))
            self._largest = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, P()))

    def __call__(self, value: int, *, wait: bool = False) -> int:
        if jax.process_count() == 1:
            return value
        shape = (jax.device_count(),)
        given = jax.make_array_from_callback(shape, self._sharding, lambda index: np.full(1, value, np.int32))
        previous, self._previous = self._previous, self._largest(given)
        answer = self._previous if wait else previous
        return 0 if answer is None else int(answer)
