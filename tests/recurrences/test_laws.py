"""The laws that every recurrence of the registry obeys. A new recurrence is tested by being listed there."""

import pytest

import lineax_seq as ls
from lineax_seq.testing import check_recurrence, recurrence_laws

SLOW = {"T = 2", "T = 15", "T = 16", "T = 48"}


@pytest.mark.parametrize(
    ("operator", "law"),
    [
        pytest.param(operator, law, id=f"{name}-{law}", marks=pytest.mark.slow if law in SLOW else ())
        for name, operator in ls.RECURRENCES.items()
        for law in recurrence_laws(operator)
    ],
)
def test_law(operator, law):
    check_recurrence(operator, laws=[law])
