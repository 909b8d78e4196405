"""What the fields of records may hold."""

from dataclasses import dataclass, fields
from typing import Annotated, Literal

import numpy as np
import pytest

from lineax_seq.core.fields import Within, check_fields, non_finite
from lineax_seq.training import OptimizerConfig, TrainingConfig


@dataclass(frozen=True)
class Record:
    rate: Annotated[float, Within("(0, 1]")] = 0.5
    count: Annotated[int, Within("[1, inf)")] | None = None
    plain: float = 0.0
    shape: Literal["linear", "cosine"] = "linear"
    on: bool = False
    name: str = ""
    free: tuple[int, ...] = ()

    def __post_init__(self):
        check_fields(self)


def test_numbers_of_numpy_become_python_s():
    record = Record(rate=np.float32(0.25), count=np.int64(3), plain=7, on=np.bool_(True), name=np.str_("a"))
    assert [type(getattr(record, f.name)) for f in fields(record)][:6] == [float, int, float, str, bool, str]
    assert record == Record(rate=0.25, count=3, plain=7.0, on=True, name="a")
    assert TrainingConfig(steps=np.int64(5), batch_size=np.uint8(4)) == TrainingConfig(steps=5, batch_size=4)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("rate", 0.0, "a finite number in (0, 1]"),
        ("rate", float("nan"), "a finite number"),
        ("rate", "x", "a finite number"),
        ("rate", True, "a finite number"),
        ("rate", 10**400, "a finite number"),
        ("count", 0, "a whole number at least 1 or None"),
        ("count", 1.0, "a whole number"),
        ("count", True, "a whole number"),
        ("plain", float("inf"), "a finite number"),
        ("plain", None, "a finite number"),
        ("shape", "linaer", "(did you mean 'linear'?); it must be one of linear, cosine"),
        ("shape", ["linear"], "one of linear, cosine"),
        ("on", 1, "True or False"),
        ("name", 3, "a text"),
    ],
)
def test_what_does_not_fit_is_refused(field, value, wanted):
    with pytest.raises(ValueError) as error:
        Record(**{field: value})
    assert str(error.value).startswith(f"Record: {field} is {value!r}") and wanted in str(error.value)


def test_all_offenders_are_told_at_once():
    with pytest.raises(ValueError, match="rate is 2.*count is -1.*name is None"):
        Record(rate=2, count=-1, name=None)


def test_an_interval_is_written_like_one():
    with pytest.raises(ValueError, match="no interval"):
        0 in Within("0..1")  # noqa: B015


def test_floats_that_are_not_finite_are_found_in_everything():
    values = {"a": (1.0, float("inf")), "b": Record(), "c": (("x", float("nan")), ("y", 1)), "d": "nan"}
    assert non_finite(values) == ["a.1", "c.x"]


@pytest.mark.parametrize("config", [OptimizerConfig, TrainingConfig])
def test_every_number_of_a_configuration_has_a_domain(config):
    """No field takes infinity, and none takes everything below zero."""
    for field in fields(config):
        if type(getattr(config(), field.name)) not in (int, float):
            continue
        for bad in (float("inf"), float("nan"), -1):
            with pytest.raises(ValueError, match=field.name):
                config(**{field.name: bad})
