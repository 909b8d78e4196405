"""Running laws: what every check does with the laws that it has."""

from collections.abc import Callable, Collection, Mapping

import chex
import jax

from ..core.checks import one_of

Law = Callable[[], None]


def run(check: str, subject: str, laws: Mapping[str, Law], only: Collection[str] | None) -> None:
    """All laws, or `only` those named.

    Raises:
        AssertionError: laws that are broken: all of them, each with what was got and wanted and how to see it again.
        ValueError: a name that is none of the laws'.
    """
    names = list(laws) if only is None else list(only)
    for name in names:
        one_of(check, "law", name, tuple(laws))
    broken = []
    for name in names:
        chex.clear_trace_counter()  # it counts over a whole process
        try:
            with jax.default_matmul_precision("highest"):
                laws[name]()
        except AssertionError as error:
            told = str(error).replace("\n", "\n    ")
            broken.append(f"law {name!r} is broken:\n    {told}\n    to see it again: {check}(..., laws=[{name!r}])")
        except BaseException as error:
            error.add_note(f"{check}: {subject}, law {name!r}")
            raise
    assert not broken, f"{subject} breaks {len(broken)} of {len(names)} laws.\n" + "\n".join(broken)
