"""A kernel with a gradient: two passes over named arrays, wired to automatic differentiation and split over a mesh.

A kernel says which arrays it takes, gives and saves, by name and dimensions, and computes one device's part of them.
What is here is the same for all kernels.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Protocol

import jax

from .machine import Machine
from .partition import over_mesh

Arrays = Mapping[str, jax.Array]
Dimensions = Mapping[str, str]  # name -> letters, as in "B T HV V"


class Passes(Protocol):
    """What is static in a call of a kernel, and its two passes. An instance is frozen and hashable.

    The gradient of an array `x` has the name `d_x`.
    """

    @property
    def machine(self) -> Machine:
        """What the kernel is traced for."""
        ...

    @property
    def heads(self) -> tuple[int, int]:
        """The numbers of key and of value heads of the whole call; (1, 1) where heads stay together on a device.

        They do where an input belongs to all sequences and all heads: its gradient is a sum over the heads.
        """
        ...

    @property
    def inputs(self) -> Dimensions:
        """The inputs. All have a gradient but `reset`, which is boolean."""
        ...

    @property
    def outputs(self) -> Dimensions: ...

    @property
    def kept(self) -> tuple[str, ...]:
        """The inputs and outputs that `backward` reads."""
        ...

    @property
    def saved(self) -> Dimensions:
        """What `forward` gives besides the outputs, for `backward` alone."""
        ...

    def forward(self, arrays: Arrays, keep: bool) -> Arrays:
        """One device's outputs and, with `keep`, what is saved."""
        ...

    def backward(self, arrays: Arrays) -> Arrays:
        """One device's gradients of the inputs, from what is kept and saved and the gradients of the outputs.

        An input without a batch axis, which all sequences share, gets one gradient for each of them: with a batch axis.
        """
        ...


def differentiable(passes: Passes, arrays: Arrays) -> Arrays:
    """The outputs by name, with a gradient.

    Raises:
        ValueError: heads that may be split though the gradient of an input adds up over them.
    """
    whole = [name for name, dims in passes.inputs.items() if not {"B", "H", "HV"} & set(dims.split())]
    if whole and passes.heads != (1, 1):
        raise ValueError(
            f"differentiable: {whole} belong to all heads, and heads={passes.heads} may be split over devices; "
            "heads wants to be (1, 1)."
        )
    return _outputs(passes, dict(arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _outputs(passes: Passes, arrays: Arrays) -> Arrays:
    return _on_mesh(passes, functools.partial(passes.forward, keep=False), arrays, passes.inputs, passes.outputs)


def _forward(passes: Passes, arrays: Arrays) -> tuple[Arrays, Arrays]:
    run = functools.partial(passes.forward, keep=True)
    results = _on_mesh(passes, run, arrays, passes.inputs, {**passes.outputs, **passes.saved})
    known = {**arrays, **results}
    outputs = {name: results[name] for name in passes.outputs}
    return outputs, {name: known[name] for name in (*passes.kept, *passes.saved)}


def _backward(passes: Passes, residuals: Arrays, cotangents: Arrays) -> tuple[Mapping]:
    known = {**passes.inputs, **passes.outputs, **passes.saved}
    operands = {name: known[name] for name in residuals} | {f"d_{name}": known[name] for name in passes.outputs}
    arrays = {**residuals, **{f"d_{name}": d for name, d in cotangents.items()}}
    shared = [name for name, dims in passes.inputs.items() if "B" not in dims.split()]
    results = {name: f"B {dims}" if name in shared else dims for name, dims in passes.inputs.items() if name != "reset"}
    found = _on_mesh(passes, passes.backward, arrays, operands, {f"d_{name}": dims for name, dims in results.items()})
    gradients = {name: d.sum(0) if name in shared else d for name in results for d in [found[f"d_{name}"]]}
    return ({name: gradients.get(name) for name in passes.inputs},)


_outputs.defvjp(_forward, _backward)


def _on_mesh(passes: Passes, run: Callable, arrays: Arrays, operands: Dimensions, results: Dimensions) -> Arrays:
    """`run(arrays)` by parts, each device its own."""

    def local(*own: jax.Array) -> tuple[jax.Array, ...]:
        found = run(dict(zip(operands, own, strict=True)))
        return tuple(found[name] for name in results)

    ordered = [arrays[name] for name in operands]
    found = over_mesh(passes.machine, local, [*operands.values()], [*results.values()], passes.heads, ordered)
    return dict(zip(results, found, strict=True))
