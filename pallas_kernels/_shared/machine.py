"""The machine that a program is traced for: asked once at a public call, then passed on as a static value.

It need not be the machine that traces. A program for a TPU or an H100 can be traced, lowered and compiled on a laptop:
inside `tracing_for(machine)`, or on a mesh whose devices are described ahead of time.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

_asked_for: contextvars.ContextVar["Machine | None"] = contextvars.ContextVar("asked_for", default=None)


@dataclasses.dataclass(frozen=True)
class Machine:
    """What kernels and block sizes depend on.

    Attributes:
        platform: "cpu", "tpu" or "gpu".
        device_kind: the device's name as JAX gives it, such as "TPU v5e" or "NVIDIA H100 80GB HBM3".
        interpret: whether kernels run in Pallas's interpreter instead of being compiled.
    """

    platform: str
    device_kind: str
    interpret: bool = False


def machine_here() -> Machine:
    """The machine that the surrounding trace is for.

    What `tracing_for` asks for comes first, then the device of the surrounding abstract mesh, then JAX's default device.
    """
    if (asked := _asked_for.get()) is not None:
        return asked
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return Machine(_platform_of(described.device_kind), described.device_kind)
    device: Any = jax.config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0] if device else jax.devices()[0]
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    return Machine(platform, device.device_kind)


def _platform_of(device_kind: str) -> str:
    return "tpu" if device_kind.startswith("TPU") else "gpu" if device_kind.startswith("NVIDIA") else "cpu"


@contextlib.contextmanager
def tracing_for(machine: Machine) -> Iterator[None]:
    """Public calls inside this context are traced for `machine`, whatever machine traces them.

    A program that was jitted outside keeps the machine it was traced for: jit and lower inside the context.
    """
    token = _asked_for.set(machine)
    try:
        yield
    finally:
        _asked_for.reset(token)
