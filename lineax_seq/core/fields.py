"""What the fields of a frozen record may hold: written once beside each field, checked when the record is made.

@dataclass(frozen=True)
class Config:
    rate: Annotated[float, Within("(0, inf)")] = 1e-3
    steps: Annotated[int, Within("[1, inf)")] = 100
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self):
        check_fields(self)
"""

import dataclasses
import functools
import math
import numbers
import operator
import re
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np

from .checks import nearest

_INTERVAL = re.compile(r"([\[(])\s*(\S+)\s*,\s*(\S+)\s*([\])])")


@dataclasses.dataclass(frozen=True)
class Within:
    """The numbers of an interval as mathematics writes it: "[0, 1)" has 0 and lacks 1. Infinity is never among them."""

    interval: str

    @functools.cached_property
    def _parts(self) -> tuple[str, float, float, str]:
        match = _INTERVAL.fullmatch(self.interval)
        if match is None:
            raise ValueError(f"Within: {self.interval!r} is no interval; write it like [0, 1) or (0, inf)")
        left, low, high, right = match.groups()
        return left, float(low), float(high), right

    def __contains__(self, number: float) -> bool:
        left, low, high, right = self._parts
        above = low <= number if left == "[" else low < number
        return math.isfinite(number) and above and (number <= high if right == "]" else number < high)

    def __str__(self) -> str:
        left, low, high, _ = self._parts
        if high < math.inf:
            return f"in {self.interval}"
        return f"{'at least' if left == '[' else 'above'} {low:g}"


def check_fields(record: Any) -> None:
    """Check every field of a frozen dataclass against its annotation, and make the Python number of a NumPy one.

    bool, int, float, str and `Literal` are checked, alone, in a union and in `Annotated[..., Within(...)]`; a float is
    finite. Fields of other types (records, tuples, mappings) check themselves or are checked by their owner.

    Raises:
      ValueError: all fields that hold something else.
    """
    hints = typing.get_type_hints(type(record), include_extras=True)
    complaints = []
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        options = [option for hint in _alternatives(hints[field.name]) if (option := _option(hint)) is not None]
        if len(options) < len(_alternatives(hints[field.name])):
            continue  # a type that is not checked here
        for option in options:
            if (fitting := option.take(value)) is not _MISFIT:
                object.__setattr__(record, field.name, fitting)
                break
        else:
            known = [name for option in options for name in option.names]
            wanted = " or ".join(option.wanted for option in options)
            complaints.append(f"{field.name} is {value!r}{nearest(value, known) if known else ''}; it must be {wanted}")
    if complaints:
        raise ValueError(f"{type(record).__name__}: " + "; ".join(complaints))


_MISFIT = object()


@dataclasses.dataclass(frozen=True)
class _Option:
    """One type that a field may have: `take(value)` gives the value as that type, or _MISFIT."""

    wanted: str
    take: Callable[[Any], Any]
    names: tuple[str, ...] = ()


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _option(hint: Any) -> _Option | None:
    limits: list[Within] = []
    if typing.get_origin(hint) is Annotated:
        hint, *extras = typing.get_args(hint)
        limits = [extra for extra in extras if isinstance(extra, Within)]
    within = "".join(f" {limit}" for limit in limits)
    if typing.get_origin(hint) is Literal:
        names = typing.get_args(hint)
        wanted = "one of " + ", ".join(map(str, names))
        return _Option(wanted, lambda value: value if value in names else _MISFIT, tuple(map(str, names)))
    if hint is types.NoneType:
        return _Option("None", lambda value: None if value is None else _MISFIT)
    if hint is bool:
        return _Option("True or False", lambda value: bool(value) if isinstance(value, bool | np.bool_) else _MISFIT)
    if hint is str:
        return _Option("a text", lambda value: str(value) if isinstance(value, str) else _MISFIT)
    if hint is int:
        return _Option(f"a whole number{within}", functools.partial(_number, operator.index, limits))
    if hint is float:
        return _Option(f"a finite number{within}", functools.partial(_number, _real, limits))
    return None


def _number(convert: Callable[[Any], Any], limits: list[Within], value: Any) -> Any:
    if isinstance(value, bool | np.bool_):
        return _MISFIT
    try:
        converted = convert(value)
        return converted if all(converted in limit for limit in limits) else _MISFIT
    except (TypeError, ValueError, OverflowError):
        return _MISFIT


def _real(value: Any) -> float:
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError
    return float(value)


def non_finite(values: Any, where: str = "") -> list[str]:
    """Names of the floats in nested records, mappings and tuples that are not finite, such as "model.rope_theta"."""
    if dataclasses.is_dataclass(values):
        values = {field.name: getattr(values, field.name) for field in dataclasses.fields(values)}
    if isinstance(values, dict):
        return [name for key, value in values.items() for name in non_finite(value, f"{where}.{key}" if where else key)]
    if isinstance(values, (tuple, list)):
        pairs = all(isinstance(v, (tuple, list)) and len(v) == 2 and isinstance(v[0], str) for v in values)
        named = values if pairs else enumerate(values)
        return [name for key, value in named for name in non_finite(value, f"{where}.{key}")]
    return [where] if isinstance(values, float) and not math.isfinite(values) else []
