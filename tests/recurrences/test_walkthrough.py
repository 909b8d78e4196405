"""The README's "Add a recurrence", taken literally: its code is run, and the result goes through every law."""

import re
from pathlib import Path

import pytest

import lineax_seq as ls
from lineax_seq.testing import check_recurrence, recurrence_laws


def declared() -> ls.Operator:
    """What the section's code block defines."""
    section = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").split("## Add a recurrence")[1]
    namespace: dict = {}
    exec(re.search(r"```python\n(.*?)```", section, re.S)[1], namespace)
    return next(value for value in namespace.values() if isinstance(value, ls.Operator))


@pytest.fixture(scope="module")
def operator():
    return declared()


@pytest.mark.parametrize("law", recurrence_laws(declared()))
def test_law(operator, law):
    check_recurrence(operator, laws=[law])
