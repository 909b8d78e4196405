"""CONTRIBUTING's "A recurrence", taken literally: its file is run, its lines are put into the registry, and what is
then listed there obeys every law."""

import pytest
import recipes

import lineax_seq as ls
from lineax_seq.testing import check_recurrence, recurrence_laws

REGISTRY = recipes.listed("A recurrence")[1].RECURRENCES
OPERATOR = REGISTRY["value_decay"]
LAWS_TEST = "tests/recurrences/test_laws.py"
SLOW = recipes.loaded(LAWS_TEST).SLOW


@pytest.mark.parametrize("law", [law for law in recurrence_laws(OPERATOR) if law not in SLOW])
def test_law(law):
    check_recurrence(OPERATOR, laws=[law])


def test_the_recipe_s_lines_list_it():
    """The registry's own entries stay, in their order, and the new one follows under its name."""
    assert list(REGISTRY) == [*ls.RECURRENCES, "value_decay"] and OPERATOR.name == "value_decay"


def test_the_registry_enrols_it_in_every_law(monkeypatch):
    """What the tests are parametrised over comes from the registry, not from a list of their own."""
    monkeypatch.setattr(ls, "RECURRENCES", REGISTRY)
    (mark,) = recipes.loaded(LAWS_TEST).test_law.pytestmark
    enrolled = {parameters.values[1] for parameters in mark.args[1] if parameters.values[0] is OPERATOR}
    assert enrolled == set(recurrence_laws(OPERATOR))
