"""`implementation=`: whether XLA or a kernel computes the chunk form, or one token.

A kernel computes one form of one record on one platform. `pallas_kernels` has the table of all, and its `Kernel` says
how to add one. A kernel refuses what it cannot compute by raising NotImplementedError with the reasons. `None` takes
the first implementation that does not refuse; a named one is taken or raises, and nothing else takes its place.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import pallas_kernels
from pallas_kernels import Machine

from .checks import nearest
from .recurrence import Recurrence

Result = TypeVar("Result")
PLATFORM = {"mosaic_tpu": "tpu", "mosaic_gpu": "gpu"}  # where the kernels of an implementation run
IMPLEMENTATIONS = ("xla", *PLATFORM)


def candidates(caller: str, implementation: str | Sequence[str] | None, machine: Machine) -> tuple[str, ...]:
    """The implementations to try, in order. For None these are the kernels of the machine, then XLA.

    Raises:
        ValueError: an unknown name.
    """
    if implementation is None:
        return (*(name for name, platform in PLATFORM.items() if platform == machine.platform), "xla")
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    unknown = [name for name in names if name not in IMPLEMENTATIONS]
    if unknown or not names:
        raise ValueError(
            f"{caller}: implementation={implementation!r}: unknown {unknown}"
            f"{nearest(unknown[0], IMPLEMENTATIONS) if unknown else ''}; use None, one of {IMPLEMENTATIONS}, "
            "or a sequence of them tried in order."
        )
    return names


def kernel(recurrence: Recurrence, implementation: str, machine: Machine, role: str = "chunk") -> Callable:
    """The kernel of a record: `(scale, chunk_size, fields, reset, state) -> (final state, o)`.

    With the role "step" it computes one token: T is 1, and `chunk_size` and `reset` are None.

    Raises:
        NotImplementedError: there is no such kernel. When called, a kernel raises it for what it cannot compute.
    """
    found = pallas_kernels.KERNELS.get((PLATFORM[implementation], role, recurrence.name))
    if found is None:
        raise NotImplementedError(f"{implementation}: no kernel for recurrence {recurrence.name!r} yet")
    return functools.partial(found, machine)


def first_accepting(caller: str, names: Sequence[str], attempt: Callable[[str], Result]) -> Result:
    """What `attempt(name)` returns for the first name that it does not refuse.

    Raises:
        NotImplementedError: there was one name, and it was refused.
        ExceptionGroup: there were several, and all were refused; it holds every reason.
    """
    refusals = []
    for name in names:
        try:
            return attempt(name)
        except NotImplementedError as refusal:
            refusals.append(refusal)
    if len(refusals) == 1:
        raise NotImplementedError(f"{caller}: {refusals[0]}") from refusals[0]
    raise ExceptionGroup(f"{caller}: all implementations refused", refusals)
