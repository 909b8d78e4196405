"""CONTRIBUTING's "A recurrence", taken literally: its file is run, its lines are put into the registry, and what is
then listed there goes through every law."""

import importlib.util
import inspect
import itertools
import sys
import types
from pathlib import Path

import pytest
import recipes

import lineax_seq as ls

HERE = Path(__file__).parent
REGISTRY = "lineax_seq/recurrences/__init__.py"


def module(path: str, source: str) -> types.ModuleType:
    """A module of `lineax_seq.recurrences` from its text."""
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    made = types.ModuleType(name)
    made.__package__ = "lineax_seq.recurrences"
    exec(compile(source, path, "exec"), vars(made))
    return made


def registry() -> dict[str, ls.Operator]:
    """What the registry's file gives with the recipe's lines in it, beside the recipe's file."""
    ((path, source),) = recipes.blocks("A recurrence", "python").items()
    name = path.removesuffix(".py").replace("/", ".")
    before = sys.modules.get(name)
    sys.modules[name] = module(path, source)
    try:
        text = recipes.patched(
            (recipes.ROOT / REGISTRY).read_text("utf-8"), recipes.blocks("A recurrence", "diff")[REGISTRY]
        )
        return module(REGISTRY, text).RECURRENCES
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


def laws_module() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("laws_for_walkthrough", HERE / "test_laws.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def laws():
    """Every law of test_laws.py with its quick parameters, as far as they concern the recurrence."""
    made, operator = laws_module(), registry()["value_decay"]
    for name, law in vars(made).items():
        if not name.startswith("test_") or "operator" not in inspect.signature(law).parameters:
            continue
        choices = []
        for mark in getattr(law, "pytestmark", ()):
            if mark.name == "parametrize" and mark.args[0] == ("operator", "extreme"):
                choices.append([("extreme", e) for e in made.EXTREMES if made._changes(operator, e)])
            elif mark.name == "parametrize" and mark.args[0] != "operator":
                values = [v for v in mark.args[1] if not getattr(v, "marks", ())]
                choices.append([(mark.args[0], v) for v in values])
        for chosen in itertools.product(*choices):
            yield pytest.param(law, dict(chosen), id="-".join([name, *(str(v) for _, v in chosen)]))


@pytest.fixture(scope="module")
def operator():
    return registry()["value_decay"]


@pytest.mark.parametrize(("law", "chosen"), list(laws()))
def test_law(operator, law, chosen, request):
    fixtures = inspect.signature(law).parameters.keys() - {"operator", *chosen}
    law(operator=operator, **chosen, **{name: request.getfixturevalue(name) for name in fixtures})


def test_all_laws_are_found():
    assert len({parameter.values[0] for parameter in laws()}) >= 12


def test_the_recipe_s_lines_list_it():
    """The registry's own entries stay, in their order, and the new one follows under its name."""
    assert list(registry()) == [*ls.RECURRENCES, "value_decay"]
    assert registry()["value_decay"].name == "value_decay"


def test_the_registry_enrols_it_in_every_law(monkeypatch):
    """What the tests are parametrised over comes from the registry, not from a list of their own."""
    monkeypatch.setattr(ls, "RECURRENCES", registry())
    for name, law in vars(laws_module()).items():
        if name.startswith("test_") and "operator" in inspect.signature(law).parameters:
            values = [v for mark in law.pytestmark if mark.name == "parametrize" for v in mark.args[1]]
            chosen = [x for v in values for x in (v.values if hasattr(v, "marks") else (v,))]
            assert "value_decay" in {getattr(x, "name", None) for x in chosen}, f"{name} does not run over it"
