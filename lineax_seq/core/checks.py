"""What a caller got wrong, said before anything is traced: function, what was got, what was wanted, what to do."""

import difflib
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from .arguments import Argument
from .typing import State


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for an unknown name, or nothing when none is near."""
    close = difflib.get_close_matches(str(name), list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def one_of(caller: str, what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(f"{caller}: {what}={name!r}{nearest(name, known)}, wants one of {tuple(known)}.")


def integer(caller: str, what: str, value: SupportsIndex, least: int) -> int:
    """`value` as an int, if it is an integer of any kind (NumPy's too, but no bool) of at least `least`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{caller}: {what}={value!r}, wants an integer of at least {least}.")
    return number


def bind(caller: str, arguments: Mapping[str, Argument], args: tuple, kwargs: dict, options: dict) -> tuple[dict, dict]:
    """A call's arguments by name, without those left out, and its options with their defaults filled in."""
    names = list(arguments)
    if len(args) > len(names):
        raise ValueError(f"{caller}: got {len(args)} positional arguments, wants {len(names)}: {', '.join(names)}.")
    values = dict(zip(names, args, strict=False))
    options = dict(options)
    for key, value in kwargs.items():
        if key in values:
            raise ValueError(f"{caller}: {key} was given twice, by position and by name; give it once.")
        if key in names:
            values[key] = value
        elif key in options:
            options[key] = value
        else:
            known = [*names, *options]
            raise ValueError(f"{caller}: unknown argument {key!r}{nearest(key, known)}; it takes {known}.")
    values = {name: values[name] for name in names if values.get(name) is not None}
    missing = [name for name in names if name not in values and not arguments[name].optional]
    if missing:
        raise ValueError(f"{caller}: missing {', '.join(missing)}; it takes {', '.join(names)}.")
    return values, options


def arrays(caller: str, values: dict, arguments: Mapping[str, Argument]) -> tuple[dict, dict]:
    """Arrays by name and the sizes of their letters.

    Raises:
        ValueError: every argument whose rank, size or dtype does not fit.
    """
    xs = {name: jnp.asarray(value) for name, value in values.items()}
    sizes: dict[str, tuple[int, str]] = {}
    problems = []
    for name, x in xs.items():
        letters, shape = arguments[name].letters, x.shape
        if not jnp.issubdtype(x.dtype, jnp.floating):
            problems.append(f"{name} is {x.dtype}, wants a floating dtype (cast it)")
        if len(shape) != len(letters):
            problems.append(f"{name} has shape {list(shape)}, wants [{', '.join(letters)}]")
            continue
        for letter, size in zip(letters, shape, strict=True):
            known, owner = sizes.setdefault(letter, (size, name))
            if size != known:
                problems.append(f"{name} {list(shape)} has {letter}={size}, but {owner} has {letter}={known}")
            elif size == 0:
                problems.append(f"{name} {list(shape)} has {letter}=0, wants at least 1")
    dims = {letter: size for letter, (size, _) in sizes.items()}
    if not problems and {"H", "HV"} <= dims.keys() and dims["HV"] % dims["H"]:
        problems.append(f"HV={dims['HV']} value heads over H={dims['H']} key heads: HV must be a multiple of H")
    if problems:
        signature = ", ".join(f"{name} [{', '.join(argument.letters)}]" for name, argument in arguments.items())
        raise ValueError(f"{caller}: {'; '.join(problems)}. Arguments are {signature}; move or repeat axes to fit.")
    return xs, dims


def state(caller: str, name: str, got: State, wanted: State) -> None:
    """`got` has the structure and shapes of `wanted`, in float32 or float64."""
    leaves, structure = jax.tree.flatten(got)
    wanted_leaves, wanted_structure = jax.tree.flatten(wanted)
    if structure != wanted_structure:
        raise ValueError(f"{caller}: {name} is {structure}, wants {wanted_structure}; pass a state a call returned.")
    for leaf, want in zip(leaves, wanted_leaves, strict=True):
        shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
        if shape != want.shape or dtype not in (jnp.float32, jnp.float64):
            raise ValueError(
                f"{caller}: {name} is {dtype}{list(shape)}, wants float32{list(want.shape)}; "
                "cast or reshape it, or leave it out for zeros."
            )


def is_integer(value) -> bool:
    """An int of Python or NumPy, and no truth value."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def chunk_size(caller: str, size: int | None, default: int, length: int) -> int:
    """C for T = `length`: what was asked for, or the default; a short sequence is one short chunk."""
    if size is None:
        size = default
    elif not is_integer(size) or size < 1 or size & (size - 1):
        raise ValueError(f"{caller}: chunk_size={size!r}, wants a power of two such as 32, 64 or 128.")
    if not isinstance(length, int):
        raise ValueError(f"{caller}: the chunk form wants a T that is known, got {length}; take form='scan', or fix T.")
    return min(int(size), 1 << (max(1, length) - 1).bit_length())


def segment_ids(caller: str, ids, dims: Mapping[str, int]) -> jax.Array | None:
    """`ids` as an array `[B, T]` of integers; None stays."""
    if ids is None:
        return None
    ids = jnp.asarray(ids)
    if ids.shape != (dims["B"], dims["T"]) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"{caller}: segment_ids is {ids.dtype}{list(ids.shape)}, wants int32[{dims['B']}, {dims['T']}]: "
            "one id per token, equal within a document."
        )
    return ids
