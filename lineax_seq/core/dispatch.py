"""`implementation=`: who computes the chunk form, or one token.

A kernel replaces a form of one recurrence record on one platform; `pallas_kernels` has the table of them, and its
`Kernel` says how to add one. It refuses with NotImplementedError and the reasons; None takes the first that accepts, a
named implementation never falls back.
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
    """The implementations to try, in order: None is the kernels of the machine, then XLA.

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
    """`(scale, chunk_size, fields, reset, state) -> (final state, o)`: a kernel in place of the chunk form.

    Of the role "step" it computes one token: T is 1, `chunk_size` and `reset` are None.

    Raises:
        NotImplementedError: there is none. The kernel itself raises it with the reasons why it cannot.
    """
    found = pallas_kernels.KERNELS.get((PLATFORM[implementation], role, recurrence.name))
    if found is None:
        raise NotImplementedError(f"{implementation}: no kernel for recurrence {recurrence.name!r} yet")
    return functools.partial(found, machine)


def first_accepting(caller: str, names: Sequence[str], attempt: Callable[[str], Result]) -> Result:
    """`attempt(name)` for the first implementation that does not refuse.

    Raises:
        NotImplementedError: the only one refused.
        ExceptionGroup: all of several refused; it holds every reason.
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
