"""Kernels that take their refs by name, in whatever order Pallas hands them over."""

from collections.abc import Callable, Iterable
from typing import Any


def by_name(kernel: Callable[..., None], names: Iterable[str]) -> Callable[..., None]:
    """A kernel of positional refs, one for each of `names`, that calls `kernel` with the ref of `x` as `x_ref`.

    Raises:
        ValueError: a name that stands twice.
    """
    names = tuple(names)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"by_name: {twice} stand twice among {list(names)}; give every ref a name of its own.")

    def positional(*refs: Any) -> None:
        kernel(**{f"{name}_ref": ref for name, ref in zip(names, refs, strict=True)})

    return positional
