"""Which machine a call is being traced for, and the interpreter that stands in for a TPU.

The mesh decides before the process's own device, so that a kernel can be compiled for a machine that isn't there.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
from jax.experimental.pallas import tpu as pltpu

_interpreted: contextvars.ContextVar[bool] = contextvars.ContextVar("interpreted", default=False)


def platform() -> str:
    """ "tpu", "gpu", "cpu": what the surrounding trace is for; "tpu" inside `interpret`."""
    if _interpreted.get():
        return "tpu"
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    kind = device.device_kind
    return "tpu" if kind.startswith("TPU") else "gpu" if kind.startswith("NVIDIA") else kind


def device_kind() -> str:
    """The device that the surrounding trace is for, as JAX names its kind."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def interpreting() -> bool:
    """Whether the surrounding trace is inside `interpret`."""
    return _interpreted.get()


def require_tpu() -> None:
    """Refuse to build a TPU kernel where none can run.

    Raises:
        NotImplementedError: the surrounding trace is neither for a TPU nor inside `interpret`.
    """
    if (got := platform()) != "tpu":
        raise NotImplementedError(
            f"mosaic_tpu: this call runs on {got}, its kernels run on a TPU; use implementation='xla', or "
            "pallas_kernels.interpret() to run a kernel's arithmetic slowly where there is no TPU"
        )


@contextlib.contextmanager
def interpret(params: pltpu.InterpretParams | None = None) -> Iterator[None]:
    """Run TPU kernels in JAX's interpreter inside this context: for tests, on any machine.

    None is the strict interpreter: memory that nobody wrote is NaN, reads out of bounds and races raise.
    """
    if params is None:
        params = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise", detect_races=True)
    token = _interpreted.set(True)
    try:
        # part of the key of every jit cache, so that nothing traced in here is reused outside
        with pltpu.force_tpu_interpret_mode(params):
            yield
    finally:
        _interpreted.reset(token)
