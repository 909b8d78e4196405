"""`implementation=`: who computes the chunk form. The only importer of `pallas_kernels`.

A kernel replaces `forms.chunk` for one recurrence record on one platform. It refuses with NotImplementedError and the
reason; None takes the first that accepts, a named implementation never falls back.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax

from .checks import nearest
from .recurrence import Recurrence

Result = TypeVar("Result")
IMPLEMENTATIONS = ("xla", "mosaic_tpu", "mosaic_gpu")
_PREFERRED = {"tpu": ("mosaic_tpu", "xla"), "gpu": ("mosaic_gpu", "xla"), "cuda": ("mosaic_gpu", "xla")}


def _platform() -> str:
    """What the surrounding trace is for: the mesh's devices, which need not be here, else this process's own."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.device_kind.startswith("TPU"):
        return "tpu"
    return jax.default_backend()


def candidates(caller: str, implementation: str | Sequence[str] | None) -> tuple[str, ...]:
    """The implementations to try, in order.

    Raises:
        ValueError: an unknown name.
    """
    if implementation is None:
        return _PREFERRED.get(_platform(), ("xla",))
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    unknown = [name for name in names if name not in IMPLEMENTATIONS]
    if unknown or not names:
        raise ValueError(
            f"{caller}: implementation={implementation!r}: unknown {unknown}"
            f"{nearest(unknown[0], IMPLEMENTATIONS) if unknown else ''}; use None, one of {IMPLEMENTATIONS}, "
            "or a sequence of them tried in order."
        )
    return names


def kernel(recurrence: Recurrence, implementation: str, table: str = "KERNELS") -> Callable:
    """The kernel that replaces the chunk form of `recurrence`, or, of the table STEPS, one token.

    Raises:
        NotImplementedError: there is none, with the reason.
    """
    import pallas_kernels

    kernels = getattr(pallas_kernels, table)
    if (implementation, recurrence.name) not in kernels:
        raise NotImplementedError(f"{implementation}: no kernel for recurrence {recurrence.name!r} yet")
    return kernels[implementation, recurrence.name]


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
