"""The machine that a program is traced for: asked once at a public call, then passed on as a static value.

It need not be the machine that traces. A program for a TPU or an H100 can be traced, lowered and compiled on a laptop:
inside `tracing_for(machine)`, or on a mesh whose devices are described ahead of time.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

# The value of a user context is part of the key of every jit cache, so that nothing that was traced for one machine is
# ever reused for another one.
_asked_for = jax.make_user_context(default_value=None)


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

    First comes what `tracing_for` asks for, then the device of the surrounding abstract mesh, then JAX's default one.
    """
    asked: Machine | None = _asked_for.value
    if asked is not None:
        return asked
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return Machine(_platform(described.platform), described.device_kind)
    device: Any = jax.config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0] if device else jax.devices()[0]
    return Machine(_platform(device.platform), device.device_kind)


def _platform(name: str) -> str:
    return "gpu" if name in ("cuda", "rocm") else name


@contextlib.contextmanager
def tracing_for(machine: Machine) -> Iterator[None]:
    """Public calls inside this context are traced for `machine`, whatever machine traces them.

    A program that was lowered or compiled outside keeps its machine; a jitted function is traced anew in here.
    """
    with _asked_for(machine):
        yield


@contextlib.contextmanager
def interpret(platform: str = "tpu", params: Any = None) -> Iterator[None]:
    """Run the kernels of a platform in JAX's interpreter inside this context: for tests, on any machine.

    Args:
        platform: whose kernels, "tpu" or "gpu".
        params: of the TPU interpreter, `pltpu.InterpretParams`. None is the strict one: memory that nobody wrote is
            NaN, reads out of bounds and races raise an error.

    Raises:
        ValueError: a platform that has no kernels, or parameters for another interpreter than the TPU's.
    """
    if platform not in ("tpu", "gpu") or (params is not None and platform != "tpu"):
        raise ValueError(
            f"interpret: platform={platform!r}, params={params!r}; the platform is 'tpu' or 'gpu', and only 'tpu' has "
            "parameters: leave params out."
        )
    # The device keeps its own name: no tuned block sizes apply to an interpreter.
    machine = dataclasses.replace(machine_here(), platform=platform, interpret=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(tracing_for(machine))
        if platform == "tpu":
            stack.enter_context(_tpu_interpreter(params))
        yield


def _tpu_interpreter(params: Any) -> contextlib.AbstractContextManager:
    from jax.experimental.pallas import tpu as pltpu  # loads all of Pallas: only where it is used

    if params is None:
        params = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise", detect_races=True)
    return pltpu.force_tpu_interpret_mode(params)
