"""What editors, type checkers and `help` show of a recurrence is what it takes."""

import inspect
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import lineax_seq as ls

from .stub import PATH, stub

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("user_program.py")


def test_the_stub_is_fresh():
    assert PATH.read_text(encoding="utf-8") == stub(), "the registry has changed: run python -m tests.typing.stub"


def test_types_are_shipped():
    files = resources.files("lineax_seq")
    assert (files / "py.typed").is_file() and (files / "recurrences" / "__init__.pyi").is_file()


def test_the_checker_refuses_the_wrong_lines_and_no_others():
    pytest.importorskip("pyrefly")
    command = [sys.executable, "-m", "pyrefly", "check", "--python-interpreter-path", sys.executable]
    command += ["--output-format", "min-text", "--search-path", str(ROOT), str(PROGRAM)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    refused = {int(line) for line in re.findall(r"user_program\.py:(\d+)", done.stdout)}
    lines = PROGRAM.read_text(encoding="utf-8").splitlines()
    wrong = {number for number, line in enumerate(lines, 1) if "# wrong: " in line}
    assert len(wrong) >= 10 and refused == wrong, done.stdout + done.stderr


@pytest.mark.parametrize("operator", ls.RECURRENCES.values(), ids=ls.RECURRENCES)
def test_help_shows_every_argument(operator):
    for name in inspect.signature(operator).parameters:
        assert re.search(rf"^    {name}: ", operator.__doc__, re.M), name
