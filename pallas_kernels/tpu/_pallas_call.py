"""`pl.pallas_call` with names: one list says each operand's array, block and ref."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._shared.refs import by_name


def pallas_call(
    kernel: Callable[..., None],
    name: str,
    *,
    grid: tuple[int, ...],
    inputs: Mapping[str, tuple[jax.Array, pl.BlockSpec]],
    outputs: Mapping[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    scratch: Mapping[str, Any] | None = None,
    in_place: Mapping[str, str] | None = None,
    **parameters: Any,
) -> dict[str, jax.Array]:
    """The outputs by name. The kernel gets the ref of every `x` as the keyword argument `x_ref`.

    Args:
        name: of the kernel in the compiled program.
        in_place: input -> the output that takes over its memory.
        parameters: of the compiler, as `pltpu.CompilerParams` has them.
    """
    scratch, places = scratch or {}, (list(inputs), list(outputs))
    results = pl.pallas_call(
        by_name(kernel, (*inputs, *outputs, *scratch)),
        grid=grid,
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for _, spec in outputs.values()],
        out_shape=[shape for shape, _ in outputs.values()],
        scratch_shapes=[*scratch.values()],
        input_output_aliases={places[0].index(a): places[1].index(b) for a, b in (in_place or {}).items()},
        compiler_params=pltpu.CompilerParams(**parameters),
        name=name,
    )(*(array for array, _ in inputs.values()))
    return dict(zip(outputs, results, strict=True))
