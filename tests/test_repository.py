"""The repository as someone meets it: modules import, versions fit, targets exist, nothing lies about."""

import doctest
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PACKAGES = ("lineax_seq", "pallas_kernels")
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
)
TOP_LEVEL = {
    *("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile"),
    *("lineax_seq", "pallas_kernels", "experiments", "tests", "notebooks", "docs"),
}


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_and_its_examples_hold(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0
    assert module.__doc__, f"{name}: a module says what it is for in its first line"


REQUIREMENTS = [Requirement(line) for line in PROJECT["dependencies"]]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.name)
def test_installed_dependency_is_in_the_declared_range(requirement):
    installed = importlib.metadata.version(requirement.name)
    assert requirement.specifier.contains(installed, prereleases=True), f"{installed} is not {requirement}"
    assert any(s.operator == ">=" for s in requirement.specifier), f"{requirement} says no lowest version"


def test_python_is_in_the_declared_range():
    assert SpecifierSet(PROJECT["requires-python"]).contains("{}.{}.{}".format(*sys.version_info))


def test_version_is_the_declared_one():
    assert importlib.import_module("lineax_seq").__version__ == PROJECT["version"]


def git(*arguments: str) -> list[str]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git clone")
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1) and not done.stderr, done.stderr  # check-ignore: 1 when nothing is ignored
    return done.stdout.splitlines()


def test_top_level_holds_only_what_belongs_there():
    files = git("ls-files", "--cached", "--others", "--exclude-standard")
    names = {name.split("/")[0] for name in files if (ROOT / name).exists()}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


def test_no_module_is_ignored_by_git():
    """A pattern such as `data/` would keep a room out of commits and out of the wheel."""
    paths = [f"{package}/{room}/x.py" for package in PACKAGES for room in ("data", "runs", "build", "hf", "tpu")]
    paths += [str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert git("check-ignore", "--no-index", *paths) == []


def test_license_is_the_declared_one():
    assert PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def make_targets() -> set[str]:
    return set(re.findall(r"(?m)^([a-z-]+):.*## ", (ROOT / "Makefile").read_text("utf-8")))


def test_make_has_the_targets():
    wanted = {"help", "setup", "train", "test", "test-all", "lint", "bench", "notebooks", "docs", "clean"}
    assert wanted <= make_targets()


def test_documented_commands_exist():
    """In prose and comments; tests/docs goes through the code blocks of the pages, and their links."""
    pages = [*ROOT.glob("*.md"), ROOT / "Makefile", *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(page.read_text("utf-8") for page in pages)
    targets = set(re.findall(r"(?:^\s*|`)(?:\$ )?make ([a-z-]+)\b", text, re.MULTILINE))
    assert targets <= make_targets()
    experiments = set(re.findall(r"-m experiments\.(?!NAME)(\w+)", text))
    assert {name for name in experiments if not (ROOT / "experiments" / f"{name}.py").is_file()} == set()


def find_python(*arguments: str, path: str, pyenv: Path) -> subprocess.CompletedProcess:
    environment = {"PATH": path, "PYENV_ROOT": str(pyenv)}
    command = [shutil.which("sh"), str(ROOT / ".ci" / "find-python"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_a_python_that_does_not_start_is_passed_over(tmp_path):
    script(tmp_path / "shims" / "python3.14", "echo 'command not found' >&2; exit 127")
    script(tmp_path / "shims" / "python3", "echo usable 14 cpython 3.14.0 /nowhere; exit 127")
    script(tmp_path / "pyenv" / "versions" / "a version" / "bin" / "python3", f"exec '{sys.executable}' \"$@\"")
    done = find_python(path=str(tmp_path / "shims"), pyenv=tmp_path / "pyenv")
    assert done.returncode == 0, done.stderr
    assert os.path.samefile(done.stdout.strip(), sys.executable)
    assert f"passed over {tmp_path}/shims/python3.14: does not start" in done.stderr

    none = find_python(path=str(tmp_path / "shims"), pyenv=tmp_path / "empty")
    assert none.returncode == 1 and none.stdout == ""
    assert "No usable Python" in none.stderr and "make PYTHON=" in none.stderr


def test_a_named_python_is_taken_or_refused(tmp_path):
    done = find_python(sys.executable, path="", pyenv=tmp_path)
    assert (done.returncode, done.stdout) == (0, sys.executable + "\n")
    script(tmp_path / "python3.12", "exit 127")
    for name, why in ((str(tmp_path / "python3.12"), "does not start"), ("python0.1", "no such command")):
        done = find_python(name, path=os.environ["PATH"], pyenv=tmp_path)
        assert done.returncode == 1 and done.stdout == "" and why in done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("printed", "made", "last", "status"),
    [
        ("== 47 passed in 1.49s ==", 0, "== 47 passed in 1.49s ==", 0),
        ("2 failed, 9 passed, 1 skipped in 61.00s (0:01:01)\nmake: *** Error 1", 2, "2 failed, 9 passed, 1 skipped", 2),
        ("=== 56 deselected, 1 error in 1.64s ===", 2, "=== 56 deselected, 1 error in 1.64s ===", 2),
        ("no tests ran in 0.01s", 0, "No tests ran.", 1),
        ("pip could not install", 2, "No tests ran.", 2),
    ],
)
def test_ci_ends_with_the_closing_line_and_the_status(printed, made, last, status, tmp_path):
    script(tmp_path / "make", f"echo '{printed}'\nexit {made}")  # stands in for `make test`
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = [shutil.which("bash"), str(ROOT / ".ci" / "run")]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == status
    assert done.stdout.splitlines()[-1].startswith(last)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_failed_installation_is_tried_again(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "MAKE"))}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}  # no package can be had
    command = ["make", "setup", f"VENV={tmp_path / 'venv'}", f"PYTHON={sys.executable}", "EXTRAS="]
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and "ERROR: No matching distribution found for hatchling" in done.stderr
        assert (tmp_path / "venv" / "bin" / "python").exists() and not (tmp_path / "venv" / ".installed").exists()


def test_tests_have_eight_devices():
    assert jax.device_count() == 8


def test_x64_is_on_with_the_fixture(x64):
    assert jnp.ones(1).dtype == jax.jit(lambda: jnp.float64(1) / 3)().dtype == jnp.float64


def test_x64_is_off_without_it():
    assert jnp.ones(1).dtype == jnp.float32


def test_a_half_written_program_is_compiled_again(tmp_path):
    """Test processes share the compilation cache, and may read what another one has not finished writing."""
    shared = jax.config.jax_compilation_cache_dir
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        double = jax.jit(lambda x: 2 * x)
        double(1.0)
        entries = list(tmp_path.glob("*-cache"))
        assert entries
        for entry in entries:
            entry.write_bytes(entry.read_bytes()[:100])
        double.clear_cache()
        assert double(1.0) == 2.0
    finally:
        jax.config.update("jax_compilation_cache_dir", shared)
        compilation_cache.reset_cache()
