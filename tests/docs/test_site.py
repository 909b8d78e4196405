"""The documentation's site: it builds without a warning, holds every public name, and says what the packages say."""

import html
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lineax_seq as ls
from lineax_seq.core import typing

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ROOMS = ("lineax_seq", *(f"lineax_seq.{room}" for room in ("parallel", "layers", "models", "training", "data")))
# rooms that may come get a page when they are there
PACKAGES = [
    name
    for name in (*ROOMS, "lineax_seq.tasks", "lineax_seq.testing", "lineax_seq.hf", "pallas_kernels")
    if (ROOT / name.replace(".", "/") / "__init__.py").is_file()
]
built_here = pytest.mark.skipif(
    importlib.util.find_spec("zensical") is None, reason="the site's tools are not installed: pip install .[docs]"
)


def public(package: str) -> set[str]:
    """What the package offers under a name of its own: `X as X`, or defined in its `__init__.py`; no modules."""
    module = importlib.import_module(package)
    source = Path(module.__file__).read_text("utf-8").removeprefix(f'"""{module.__doc__}"""')
    named = re.findall(r"\bas (\w+)", source) + re.findall(r"(?m)^(?:def |class )?([A-Za-z]\w*)(?= = |\(|: \w)", source)
    return {name for name in named if not isinstance(getattr(module, name), ModuleType)}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built beside the repository, so that nothing in it changes."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(DOCS, root / "docs", ignore=shutil.ignore_patterns("site", ".cache", "__pycache__"))
    for name in ("lineax_seq", "pallas_kernels", "notebooks", "experiments", "CONTRIBUTING.md"):
        (root / name).symlink_to(ROOT / name)
    environment = os.environ | {"PYTHONPATH": str(root), "NO_COLOR": "1"}
    command = [sys.executable, "docs/site_build", "build", "--no-notebooks", "--strict"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "docs" / "site"


@built_here
def test_every_public_name_is_documented(site):
    pages = {path.name: path.read_text("utf-8") for path in (site / "api").glob("*.html")}
    for package in PACKAGES:
        text = pages.get(f"{package.rpartition('.')[2]}.html")
        assert text, f"docs/api has no page for {package}"
        missing = {name for name in public(package) if f'id="api-{package}.{name}"' not in text}
        assert missing == set(), f"{package}: {sorted(missing)}"


@built_here
def test_recurrences_show_their_own_docstrings(site):
    """They are objects: static analysis alone would find a name without text."""
    text = (site / "api" / "lineax_seq.html").read_text("utf-8")
    for name, operator in ls.RECURRENCES.items():
        entry = text.split(f'id="api-lineax_seq.{name}"')[1].split('id="api-')[0]
        shown = html.unescape(re.sub(r"<[^>]+>", "", entry))
        assert operator.about.split(":")[0] in shown, name
        assert "segment_ids" in shown and "Raises" in shown and operator.state in shown, name


@built_here
def test_formulas_are_mathml(site):
    """No page asks the browser to fetch or run anything to show a formula, and no TeX is left over."""
    formulas = 0
    for path in site.rglob("*.html"):
        text = path.read_text("utf-8")
        formulas += text.count("<math")
        assert "arithmatex" not in text, path.name
        assert not re.search(r"<mi>\\|<mi>&</mi>", text), path.name
        fetched = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', text)
        assert fetched == [], path.name
    assert formulas > 100


@built_here
def test_a_formula_that_cannot_be_said_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    pages = importlib.import_module("site_build.pages")
    assert "<msub>" in pages.mathml(r"S_t \odot k", display=False)
    with pytest.raises(ValueError, match="a formula that MathML cannot say"):
        pages.mathml(r"\begin{aligned} a &= b \end{aligned}", display=True)


@built_here
def test_notebooks_are_tutorials(site):
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        pages = [p for p in (DOCS / "tutorials").glob("*.md") if f"!notebook {path.name}" in p.read_text("utf-8")]
        assert len(pages) == 1, f"{path.name}: wants one page in docs/tutorials"
        text = (site / "tutorials" / f"{pages[0].stem}.html").read_text("utf-8")
        assert "highlight" in text and "!notebook" not in text


def test_every_page_is_in_the_navigation():
    listed = re.findall(r'"([\w/]+\.md)"', (DOCS / "zensical.toml").read_text("utf-8"))
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_every_recurrence_is_in_the_table():
    table = re.findall(r"(?m)^\| `(\w+)` \|", (DOCS / "recurrences.md").read_text("utf-8"))
    assert table == list(ls.RECURRENCES)


def test_the_legend_is_the_code_s():
    """One legend: lineax_seq/core/typing.py defines the letters, the glossary repeats them word by word."""
    code = re.findall(r"(?m)^([A-Z]{1,2}) {2,}(\S.*)$", typing.__doc__)
    page = re.findall(r"(?m)^\| ([A-Z]{1,2}) \| (.*) \|$", (DOCS / "glossary.md").read_text("utf-8"))
    assert code and page == code


def test_a_word_has_one_entry_in_the_glossary():
    entries = [
        word
        for line in re.findall(r"(?m)^\*\*(.+)\*\*$", (DOCS / "glossary.md").read_text("utf-8"))
        for word in line.split(", ")
    ]
    assert len(entries) == len(set(entries)) > 30
