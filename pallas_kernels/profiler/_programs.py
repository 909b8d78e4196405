"""What the profiler compiles: a recurrence of the library, or any function that a user names.

This package does not import the library. A program is named by a string, resolved when it is asked for.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._shared.kernel import Kernel
from .._shared.machine import machine_here

LIBRARY = "lineax_seq"
PASSES = ("forward", "backward")


def resolve(path: str) -> Any:
    """The object that `MODULE:NAME` names.

    Raises:
        ValueError: no such module or name.
    """
    module, _, name = path.partition(":")
    if not name:
        raise ValueError(f"kernel: got {path!r}, wanted MODULE:FUNCTION, as in my_package.kernels:example")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as missing:
        raise ValueError(f"kernel: {path!r}: {missing}; is it on PYTHONPATH?") from missing
    except AttributeError as missing:
        raise ValueError(f"kernel: {path!r}: {missing}") from missing


def operators() -> Mapping[str, Any]:
    """The library's recurrences by name."""
    return resolve(f"{LIBRARY}:RECURRENCES")


def letters(name: str) -> set[str]:
    """The sizes that a recurrence's arguments have."""
    arguments = operators()[name].arguments.values()
    return {letter for argument in arguments if not argument.optional for letter in argument.letters}


def run(name: str, implementation: str, chunk_size: int | None, backward: bool, arguments: dict, *cotangents):
    """One call of a recurrence; with `backward` also the gradients of all its arguments."""
    operator = operators()[name]
    call = functools.partial(_call, operator, implementation, chunk_size)
    if not backward:
        return call(arguments)
    out, pull = jax.vjp(call, arguments)
    return out, pull(cotangents)


def _call(operator, implementation: str, chunk_size: int | None, arguments: dict):
    return operator(**arguments, implementation=implementation, chunk_size=chunk_size)


def recurrence(
    name: str,
    implementation: str,
    sizes: Mapping[str, int],
    dtype: str = "bfloat16",
    chunk_size: int | None = None,
    backward: bool = False,
) -> tuple[Callable, tuple]:
    """(function, shapes of its arguments) of a recurrence's forward pass, or of forward and backward together."""
    operator = operators()[name]
    sizes = {"HV": sizes.get("H", 1), **sizes}
    arguments = jax.eval_shape(
        lambda: operator.example(jax.random.key(0), dtype=jnp.dtype(dtype), **sizes)  # only shapes: nothing is drawn
    )
    args: tuple = (arguments,)
    if backward:
        args += tuple(jax.eval_shape(functools.partial(_call, operator, "xla", None), arguments))
    return functools.partial(run, name, implementation, chunk_size, backward), args


def tunable(record: str) -> Kernel:
    """The TPU's chunk kernel of this record, whose block sizes can be chosen.

    Raises:
        ValueError: it has none, with the records whose kernel has.
    """
    from .. import KERNELS  # loads Pallas: only to tune

    chunk = {kernel.record: kernel for kernel in KERNELS.values() if (kernel.platform, kernel.role) == ("tpu", "chunk")}
    known = {record: kernel for record, kernel in chunk.items() if kernel.block_sizes is not None}
    if record not in known:
        raise ValueError(
            f"--tune: record {record} has no block sizes of its own to search, "
            f"wanted a recurrence of one of {sorted(known)}"
        )
    return known[record]


def run_kernel(record: str, scale: float | None, block_sizes, backward: bool, fields: dict, state, *cotangents):
    """One call of a record's kernel with these block sizes; with `backward` also the gradients."""
    kernel, machine = tunable(record), machine_here()

    def call(fields, state):
        return kernel(machine, scale, block_sizes.chunk, fields, None, state, block_sizes=block_sizes)

    if not backward:
        return call(fields, state)
    out, pull = jax.vjp(call, fields, state)
    return out, pull(cotangents)


def kernel_arguments(name: str, sizes: Mapping[str, int], dtype: str, backward: bool) -> tuple[dict, tuple]:
    """(facts of a recurrence's kernel: its record and sizes, shapes of the arguments of `run_kernel`)."""
    operator = operators()[name]
    arguments = recurrence(name, "xla", sizes, dtype)[1][0]
    o, state = jax.eval_shape(functools.partial(_call, operator, "xla", None), arguments)
    fields = jax.eval_shape(operator.fields, arguments)
    args = (fields, state) + ((state, o) if backward else ())
    return {"record": operator.recurrence.name, "dtype": str(fields[operator.recurrence.output_field].dtype)}, args


def token_heads(sizes: Mapping[str, int], has_heads: bool) -> tuple[int, str]:
    """What costs are counted per: tokens times value heads, or tokens where there are no heads."""
    tokens = sizes.get("B", 1) * sizes["T"]
    return (tokens * sizes.get("HV", sizes.get("H", 1)), "token-head") if has_heads else (tokens, "token")
