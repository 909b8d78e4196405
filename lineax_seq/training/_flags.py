"""Typed command-line flags from frozen dataclasses: `--optimizer.learning-rate 0.002`.

A field's docstring is its help text; an unknown flag names the nearest ones; a ValueError of a configuration is shown
like a bad flag (exit status 2).
"""

import sys
from collections.abc import Sequence
from typing import TypeVar

import tyro

T = TypeVar("T")


def parse_flags(default: T, args: Sequence[str] | None = None, *, program: str, description: str) -> T:
    """`default`, a frozen dataclass, with the fields changed that the flags in `args` (None: of the process) name."""
    return tyro.cli(
        type(default),
        args=sys.argv[1:] if args is None else list(args),
        default=default,
        prog=program,
        description=description,
    )
