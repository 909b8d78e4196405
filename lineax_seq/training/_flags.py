"""Typed command-line flags from frozen dataclasses: `--optimizer.learning-rate 0.002`.

A field's docstring is its help text; an unknown flag names the nearest ones; a ValueError of a configuration is shown
like a bad flag (exit status 2).
"""

import dataclasses
import json
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar, cast

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, StructConstructorSpec, StructTypeInfo

T = TypeVar("T")


def parse_flags(default: T, args: Sequence[str] | None = None, *, program: str, description: str) -> T:
    """`default`, a frozen dataclass, with the fields changed that the flags in `args` (None: of the process) name."""
    return tyro.cli(
        type(default),
        args=sys.argv[1:] if args is None else list(args),
        default=default,
        prog=program,
        description=description,
        registry=_registry(),
    )


def _option(word: str) -> tuple[str, Any]:
    name, equals, value = word.partition("=")
    if not (name and equals):
        raise ValueError(f"{word!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value  # a bare word is a string


# Layer options: `--model.linear-options expand_v=1.0 use_conv=true`.
_OPTIONS = PrimitiveConstructorSpec(
    nargs="*",
    metavar="[NAME=VALUE ...]",
    instance_from_str=lambda words: dict(map(_option, words)),
    is_instance=lambda value: isinstance(value, Mapping),
    str_from_instance=lambda value: [f"{name}={json.dumps(v)}" for name, v in value.items()],
)


def _registry() -> ConstructorRegistry:
    """tyro's rules, and for dataclasses with fields `Mapping[str, Any]`, which tyro has no flags for, `_OPTIONS`."""
    registry, inside = ConstructorRegistry(), []

    @registry.struct_rule
    def with_options(info: StructTypeInfo) -> StructConstructorSpec | None:
        if inside or not dataclasses.is_dataclass(info.type):
            return None
        names = {n for n, hint in typing.get_type_hints(info.type).items() if typing.get_origin(hint) is Mapping}
        if not names:
            return None
        inside.append(info)  # the call below asks every rule, this one too
        try:
            found = ConstructorRegistry.get_struct_spec(info)
        finally:
            inside.pop()
        assert isinstance(found, StructConstructorSpec)  # tyro knows every dataclass
        fields = tuple(
            # A frozen configuration may hold its options as pairs.
            dataclasses.replace(f, type=cast(Any, Annotated[Mapping, _OPTIONS]), default=dict(f.default))
            if f.name in names
            else f
            for f in found.fields
        )
        return dataclasses.replace(found, fields=fields)

    return registry
