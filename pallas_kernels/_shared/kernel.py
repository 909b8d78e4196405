"""The record of a kernel: what it replaces, where it runs, what it refuses, how it is called."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .machine import Machine

ROLES = ("chunk", "summary", "step")
DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel in place of one form of one recurrence. Calling it refuses, with every reason, or runs.

    Arguments of a call, of `run` too: `(machine, scale, chunk_size, fields, reset, state) -> (final state, o)`, with

        machine: what the program is traced for; kernels never look for it themselves.
        scale: of the queries; None is 1.
        chunk_size: tokens of a chunk; None leaves it to the kernel.
        fields: name -> array, `[B, T, ...]` or, of parameters, without `B T`.
        reset: None, or bool `[B, T]`: where a document starts.
        state: `[B, ...]` float32, one array or a tuple of them.

    Attributes:
        record: the name of the recurrence's record.
        platform: "tpu" or "gpu".
        role: "chunk", the chunk form; "summary", a shard's summary; or "step", one token: T is 1.
        fields: the record's fields, name -> dimensions after `B T`, as in `"HV V"`.
        run: computes; it may rely on `refuses` having found nothing.
        refuses: (machine, sizes, dtypes) -> reasons why the kernel cannot, none where it can. `sizes` are by letter,
            with the chunk size under C where the caller gave one; `dtypes` are by field, with the state's under
            "state".
        parameters: those that all tokens share, name -> dimensions.
        block_sizes: None, or sizes -> every choice of block sizes that such a call has; `run` then obeys
            `block_sizes=`.
    """

    record: str
    platform: str
    role: str
    fields: Mapping[str, str]
    run: Callable
    refuses: Callable[[Machine, Mapping[str, int], Mapping[str, str]], Sequence[str]]
    parameters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    block_sizes: Callable[[Mapping[str, int]], Sequence[Any]] | None = None

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"Kernel: role={self.role!r}, wants one of {ROLES}.")

    def __call__(
        self,
        machine: Machine,
        scale: float | None,
        chunk_size: int | None,
        fields: Mapping[str, jax.Array],
        reset: jax.Array | None,
        state: Any,
        **options: Any,
    ) -> tuple[Any, jax.Array]:
        """`run(...)`, once nothing speaks against it.

        Raises:
            NotImplementedError: every reason why the kernel cannot.
        """
        sizes = sizes_of(self.fields, fields, self.parameters)
        if chunk_size is not None:
            sizes["C"] = chunk_size
        dtypes = {name: str(x.dtype) for name, x in fields.items()}
        dtypes["state"] = str(jnp.result_type(*jax.tree.leaves(state)))
        if (refusal := self.refusal(machine, sizes, dtypes)) is not None:
            raise NotImplementedError(refusal)
        return self.run(machine, scale, chunk_size, fields, reset, state, **options)

    def refusal(self, machine: Machine, sizes: Mapping[str, int], dtypes: Mapping[str, str]) -> str | None:
        """Why the kernel cannot take such a call on this machine, in words; None where it can."""
        reasons = [*_elsewhere(self.platform, machine), *self.refuses(machine, sizes, dtypes)]
        name = f"mosaic_{self.platform}: the kernel of {self.record}{' (one token)' if self.role == 'step' else ''}"
        return f"{name} cannot: {'; '.join(reasons)}" if reasons else None


def _elsewhere(platform: str, machine: Machine) -> list[str]:
    if machine.platform == platform:
        return []
    return [
        f"this call runs on {machine.platform}, the kernel on {platform} (implementation='xla' runs anywhere, "
        f"pallas_kernels.interpret({platform!r}) runs the kernel's arithmetic slowly on any machine)"
    ]


def sizes_of(
    fields: Mapping[str, str], arrays: Mapping[str, jax.Array], parameters: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Letter -> size, from arrays `[B, T, ...]` of these fields and those of the parameters."""
    dims = {name: f"B T {letters}" for name, letters in fields.items()} | dict(parameters or {})
    sizes: dict[str, int] = {}
    for name, letters in dims.items():
        sizes |= dict(zip(letters.split(), arrays[name].shape, strict=True))
    return sizes


def dtype_reasons(dtypes: Mapping[str, str], allowed: Sequence[str] = DTYPES) -> list[str]:
    """Reasons against fields of other dtypes than these, and against a state that is not float32."""
    wanted = dict.fromkeys(dtypes, tuple(allowed)) | {"state": ("float32",)}
    return [
        f"{name} is {dtype}, wants {wanted[name][0] if len(wanted[name]) == 1 else f'one of {wanted[name]}'}"
        for name, dtype in dtypes.items()
        if dtype not in wanted[name]
    ]


def table(*kernels: Kernel) -> dict[tuple[str, str, str], Kernel]:
    """Kernels by platform, role and record.

    Raises:
        ValueError: two kernels for the same.
    """
    found: dict[tuple[str, str, str], Kernel] = {}
    for kernel in kernels:
        key = kernel.platform, kernel.role, kernel.record
        if key in found:
            raise ValueError(f"table: two kernels for {key}; leave one out of the list.")
        found[key] = kernel
    return found
