"""Configurations: frozen records that are checked when made, travel as JSON and are command-line flags at once.

What a field may hold follows from its type: an `int` is a whole number of at least 1, a `float` a finite number above
0, a `Literal` one of its choices. So a configuration that exists can be built, and nothing is written to disk before a
mistake in it is found.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Self

import jax.numpy as jnp
from flax import nnx

from ..core import checks
from ._parts import NORMAL, Parts

if typing.TYPE_CHECKING:
    from ._layer import Layer


def _choices(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one that there is."""
    return (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )


def _refusal(hint: Any, value: Any) -> str | None:
    """What a field of this type wants instead of the value, or None where it fits or the type says nothing."""
    wanted = []
    for choice in _choices(hint):
        if choice is int:
            fits, text = type(value) is int and value >= 1, "a whole number of at least 1"
        elif choice is float:
            number = type(value) in (int, float)
            fits, text = number and math.isfinite(value) and value > 0, "a finite number above 0"
        elif choice is bool:
            fits, text = type(value) is bool, "True or False"
        elif choice is types.NoneType:
            fits, text = value is None, "None"
        elif typing.get_origin(choice) is Literal:
            known = typing.get_args(choice)
            fits, text = value in known, f"one of {', '.join(map(repr, known))}{checks.nearest(value, known)}"
        else:
            return None
        if fits:
            return None
        wanted.append(text)
    return " or ".join(wanted)


class Config:
    """Base of the configurations: the checks of the fields, and the way to JSON and back."""

    # field -> what makes its value of the JSON value, for fields that are no plain values
    readers: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}

    def __post_init__(self) -> None:
        """Check every field against its type.

        Raises:
            ValueError: all fields that do not fit.
        """
        hints = typing.get_type_hints(type(self))
        values = {name: getattr(self, name) for name in self.field_names()}
        refused = {name: _refusal(hints[name], value) for name, value in values.items()}
        problems = [f"{name}={values[name]!r}, wants {wanted}" for name, wanted in refused.items() if wanted]
        if problems:
            raise ValueError(f"{type(self).__name__}: {'; '.join(problems)}.")

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(cls))  # pyrefly: ignore

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON holds; `from_dict` makes the same configuration of them."""
        return {name: _plain(getattr(self, name)) for name in self.field_names()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration that `to_dict` wrote.

        Raises:
            ValueError: an unknown field, with the nearest known one; missing ones.
        """
        caller, known = f"{cls.__name__}.from_dict", cls.field_names()
        if not isinstance(values, Mapping):
            raise ValueError(f"{caller}: got {values!r}, wants a dictionary of {', '.join(known)}.")
        for name in values:
            checks.one_of(caller, "a field", name, known)
        fields = dataclasses.fields(cls)  # pyrefly: ignore
        missing = [f.name for f in fields if f.name not in values and _required(f)]
        if missing:
            raise ValueError(f"{caller}: missing {', '.join(missing)}.")
        return cls(**{name: cls.readers.get(name, _same)(value) for name, value in values.items()})


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _same(value: Any) -> Any:
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


class LayerConfig(Config):
    """Configuration of a layer `[B, T, D] -> [B, T, D]`. Subclasses give `name`, `check` and `build`."""

    name: ClassVar[str]

    def check(self, d_model: int) -> None:
        """Whether the layer has whole sizes at this width.

        Raises:
            ValueError: it has not.
        """

    def build(self, parts: Parts) -> "Layer":
        raise NotImplementedError

    def make(
        self,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        kernel_init=NORMAL,
        out_init=None,
        norm_eps: float = 1e-5,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    ) -> "Layer":
        """The layer of width D = d_model.

        Args:
            kernel_init: initialiser of the projections; `out_init` of the one that ends the layer (None: the same).
            norm_eps: of the norms inside the layer.
            dtype: of computation; states, gates and norms are float32 in any case.
            param_dtype: of the parameters.

        Raises:
            ValueError: sizes that do not fit each other.
        """
        if type(d_model) is not int or d_model < 1:
            raise ValueError(f"{type(self).__name__}.make: d_model={d_model!r}, wants a whole number of at least 1.")
        self.check(d_model)
        return self.build(Parts(d_model, rngs, kernel_init, out_init or kernel_init, norm_eps, dtype, param_dtype))

    def first(self) -> Self:
        """The configuration of the lowest such layer of a model, where that one differs from those above it."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON holds, and the layer's name under "name"."""
        return {"name": self.name, **super().to_dict()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentConfig(LayerConfig):
    """What the layers over a linear recurrence share: how it is computed.

    Attributes:
        form: "chunk" or "scan", of whole sequences.
        chunk_size: C, a power of two; None is the fastest measured.
        implementation: "xla", "mosaic_tpu" or "mosaic_gpu"; None is the fastest that supports the device.
    """

    form: Literal["chunk", "scan"] = "chunk"
    chunk_size: int | None = None
    implementation: Literal["xla", "mosaic_tpu", "mosaic_gpu"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.chunk_size(type(self).__name__, self.chunk_size, 1, 1)

    def sizes(self, d_model: int) -> dict[str, int]:
        """The sizes of the recurrence's letters (H, HV, K, V, ...) at this width.

        Raises:
            ValueError: a size that is not whole.
        """
        raise NotImplementedError

    def check(self, d_model: int) -> None:
        self.sizes(d_model)


def named(table: Mapping[str, type[LayerConfig]], caller: str) -> Callable[[Mapping[str, Any]], LayerConfig]:
    """A reader of what `LayerConfig.to_dict` wrote, for the configurations of a table."""

    def read(values: Mapping[str, Any]) -> LayerConfig:
        if not isinstance(values, Mapping) or "name" not in values:
            raise ValueError(f"{caller}: got {values!r}, wants a dictionary with a name, one of {', '.join(table)}.")
        checks.one_of(caller, "name", values["name"], tuple(table))
        return table[values["name"]].from_dict({name: value for name, value in values.items() if name != "name"})

    return read


def channels(caller: str, what: str, width: float) -> int:
    """A head's channels, which `what` says in words.

    Raises:
        ValueError: not a whole number of at least 1.
    """
    if width < 1 or width != int(width):
        raise ValueError(f"{caller}: {what} is {width:g} channels per head; choose numbers that make it whole.")
    return int(width)
