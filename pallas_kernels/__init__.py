"""Pallas kernels for the recurrences, and a profiler of them; imports only jax.

`KERNELS[platform, role, record]` is the table of all kernels; `Kernel` says what one is. Importing this package loads
no kernel: the table is built when it is first read.

Adding a kernel: one file that defines a `Kernel`, and one line in the list `KERNELS` of its platform's folder.
"""

from typing import TYPE_CHECKING

from ._shared.kernel import Kernel as Kernel
from ._shared.machine import (
    Machine as Machine,
    interpret as interpret,
    machine_here as machine_here,
    tracing_for as tracing_for,
)
from ._shared.quotient import bounded_quotient as bounded_quotient

if TYPE_CHECKING:
    from ._table import KERNELS as KERNELS


def __getattr__(name: str):
    if name == "KERNELS":
        from ._table import KERNELS

        return KERNELS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
