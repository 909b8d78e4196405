"""What the modules of this folder share."""

import operator


def check_integer(function: str, name: str, value: int, least: int) -> None:
    """Refuses a `value` that is no integer, or below `least`."""
    try:
        fine = operator.index(value) >= least
    except TypeError:
        fine = False
    if not fine:
        raise ValueError(f"{function}: got {name}={value!r}, wanted an integer of at least {least}")
