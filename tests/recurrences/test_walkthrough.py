"""The README's "Add a recurrence", taken literally: its code is run, and the result goes through every law."""

import importlib.util
import inspect
import itertools
import re
from pathlib import Path

import pytest

import lineax_seq as ls

HERE = Path(__file__).parent


def declared() -> ls.Operator:
    """What the section's code block defines."""
    section = (HERE.parents[1] / "README.md").read_text(encoding="utf-8").split("## Add a recurrence")[1]
    namespace: dict = {}
    exec(re.search(r"```python\n(.*?)```", section, re.S)[1], namespace)
    return next(value for value in namespace.values() if isinstance(value, ls.Operator))


def laws():
    """Every law of test_laws.py with its quick parameters, as far as they concern the recurrence."""
    operator = declared()
    spec = importlib.util.spec_from_file_location("laws_for_walkthrough", HERE / "test_laws.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, law in vars(module).items():
        if not name.startswith("test_") or "operator" not in inspect.signature(law).parameters:
            continue
        choices = []
        for mark in getattr(law, "pytestmark", ()):
            if mark.name == "parametrize" and mark.args[0] == ("operator", "extreme"):
                choices.append([("extreme", e) for e in module.EXTREMES if module._changes(operator, e)])
            elif mark.name == "parametrize" and mark.args[0] != "operator":
                values = [v for v in mark.args[1] if not getattr(v, "marks", ())]
                choices.append([(mark.args[0], v) for v in values])
        for chosen in itertools.product(*choices):
            yield pytest.param(law, dict(chosen), id="-".join([name, *(str(v) for _, v in chosen)]))


@pytest.fixture(scope="module")
def operator():
    return declared()


@pytest.mark.parametrize(("law", "chosen"), list(laws()))
def test_law(operator, law, chosen, request):
    fixtures = inspect.signature(law).parameters.keys() - {"operator", *chosen}
    law(operator=operator, **chosen, **{name: request.getfixturevalue(name) for name in fixtures})


def test_all_laws_are_found():
    assert len({parameter.values[0] for parameter in laws()}) >= 12


def test_registering_is_one_line(operator, monkeypatch):
    monkeypatch.setitem(ls.RECURRENCES, operator.name, operator)
    assert ls.RECURRENCES["value_decay"] is operator
