"""Mutated values of every flag: a configuration, or exit status 2 with a sentence; never anything else."""

import dataclasses
import random
import types
import typing

import pytest

from experiments import train_lm, train_recall
from lineax_seq.tasks import TextConfig
from lineax_seq.training import parse_flags, plain_output
from lineax_seq.training._run_directory import from_json, to_json

VALUES = {
    int: (-(2**70), -1, 0, 1, 3, 2**31, 2**70),
    float: (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e-300, 0.5, 1.0, 1.5, 1e300),
    str: ("", " ", "nan", "-1", "None", "é😀", "a=b", "../..", "data=2,data=2", "seq=0", "1:2", "x" * 5000),
    bool: (False, True),
    type(None): (None,),
}
WORDS = (
    "",
    "nan",
    "inf",
    "-1",
    "0",
    "1e400",
    "None",
    "true",
    "9" * 30,
    "é",
    "a=b",
    "[1]",
    "{}",
    "=",
    "1,2",
    "\udcff",
    "--",
)
PROGRAMS = {"train_lm": train_lm.DEFAULT, "train_recall": train_recall.DEFAULT}


def kinds_of_values(hint):
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in kinds_of_values(part)]
    if typing.get_origin(hint) is typing.Literal:
        return [str]
    return [hint] if hint in VALUES else []


def mutations(config):
    """(name, mutate) for every value of every field, nested ones too; `mutate()` gives the whole configuration."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            for name, inner in mutations(value):
                yield f"{field.name}.{name}", lambda f=field.name, i=inner: dataclasses.replace(config, **{f: i()})
            continue
        for kind in kinds_of_values(hints[field.name]):
            for new in VALUES[kind]:
                name = f"{field.name}={str(new)[:20]!r}"
                yield name, lambda f=field.name, n=new: dataclasses.replace(config, **{f: n})


@pytest.mark.parametrize("default", PROGRAMS.values(), ids=PROGRAMS)
def test_every_value_of_every_field_is_refused_or_comes_back(default):
    kept, refused = 0, []
    for name, mutate in mutations(default):
        try:
            config = mutate()
        except ValueError as error:
            assert len(str(error)) > 20, name
            refused.append(name)
            continue
        kept += 1
        assert from_json(type(config), to_json(config)) == config, name
    assert kept > 100 and len(refused) > 100
    for wanted in ("optimizer.beta1=", "optimizer.eps=", "training.steps=", "training.max_seconds=", "mesh="):
        assert any(name.startswith(wanted) for name in refused), wanted


def flags(config, prefix="--"):
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name.replace("_", "-")
        yield from flags(value, name + ".") if dataclasses.is_dataclass(value) else [name]


@pytest.mark.parametrize("default", PROGRAMS.values(), ids=PROGRAMS)
def test_mutated_flags_end_in_a_configuration_or_exit_2(default, capsys):
    known, drawn = sorted(flags(default)), random.Random(7)
    parsed = 0
    for _ in range(40):
        flag = drawn.choice(known)
        if drawn.random() < 0.2:  # a letter less
            at = drawn.randrange(2, len(flag))
            flag = flag[:at] + flag[at + 1 :]
        args = [flag, *drawn.sample(WORDS, drawn.choice((0, 1, 1, 1, 2)))]
        try:
            with plain_output():
                config = parse_flags(default, args, program="program", description="")
        except SystemExit as stop:
            assert stop.code == 2, args
            output = capsys.readouterr()
            text = output.err + output.out
            assert text.strip() and "Traceback" not in text, args
        else:
            parsed += 1
            assert isinstance(config, type(default))
    assert 0 < parsed < 40


def test_a_field_of_a_later_version_is_told():
    with pytest.raises(ValueError, match="has no field 'freez' .did you mean 'freeze'.* another version"):
        from_json(TextConfig, to_json(train_lm.DEFAULT) | {"freez": None})
