"""What of a source cannot be read: refused where it is met, or passed over, counted and said."""

import warnings
from typing import Literal, NamedTuple

from ..core.checks import one_of

Unreadable = Literal["refuse", "pass"]


class PassedOver(NamedTuple):
    """How many files or lines could not be read and were passed over, and what is wrong with the first of them."""

    count: int = 0
    first: str = ""

    def __str__(self) -> str:
        return f"passed over {self.count} unreadable file(s) or line(s), the first because {self.first}"

    def warn(self, caller: str, stacklevel: int) -> None:
        """Says so, if it is any."""
        if self.count:
            warnings.warn(f"{caller}: {self}.", stacklevel=stacklevel + 1)


class Faults:
    """Called for each file or line that cannot be read, with what is wrong with it and what to do about it.

    Raises:
      ValueError: what is wrong, unless it is to be passed over; or an `unreadable` that is neither.
    """

    def __init__(self, unreadable: Unreadable, caller: str = "read_documents"):
        one_of(caller, "unreadable", unreadable, ("refuse", "pass"))
        self._caller, self._pass_over = caller, unreadable == "pass"
        self.passed = PassedOver()

    def __call__(self, what: str, remedy: str) -> None:
        if not self._pass_over:
            raise ValueError(f"{self._caller}: {what}; {remedy}, or pass over it with unreadable='pass'.")
        self.passed = PassedOver(self.passed.count + 1, self.passed.first or what)


def shortened(what: object, length: int = 200) -> str:
    """As text, but no longer than a sentence bears."""
    text = str(what)
    return text if len(text) <= length else text[:length] + " ..."
