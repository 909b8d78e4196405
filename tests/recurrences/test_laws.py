"""The laws that every recurrence of the registry obeys. A new recurrence is tested by being listed there."""

import pytest

import lineax_seq as ls
from lineax_seq.testing import check_recurrence, recurrence_laws

SLOW = {"T = 2", "T = 15", "T = 16", "T = 48"}
CASES = [(operator, law) for operator in ls.RECURRENCES.values() for law in recurrence_laws(operator)]


@pytest.mark.parametrize(
    ("operator", "law"),
    [
        pytest.param(operator, law, id=f"{operator.name}-{law}", marks=pytest.mark.slow if law in SLOW else ())
        for operator, law in CASES
    ],
)
def test_law(operator, law):
    check_recurrence(operator, laws=[law])
