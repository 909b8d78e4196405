"""Every code block of README, CONTRIBUTING and docs: Python runs, page by page, in order; of shell commands the
programs, their flags, make's targets and pip's extras exist. A block that cannot run says why in its title: "not run".
"""

import contextlib
import io
import linecache
import re
import runpy
import shlex
import sys
import tomllib
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import recipes

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"(?m)^([a-z-]+):.*## ", (ROOT / "Makefile").read_text("utf-8")))
NOT_RUN = "not run"
FENCE = re.compile(r'^(```+)(\w*)(?: title="([^"]*)")?$')


class Block(NamedTuple):
    page: str
    line: int  # of its first line of code
    language: str
    title: str
    code: str

    @property
    def skipped(self) -> bool:
        return self.title.startswith(NOT_RUN)


def blocks_of(text: str, page: str) -> list[Block]:
    found, lines = [], text.splitlines()
    opened = None
    for number, line in enumerate(lines, 1):
        if opened is None:
            if line.lstrip().startswith("```"):
                match = FENCE.match(line)
                assert match, f'{page}:{number}: {line!r}, wants ```language, then nothing or title="..."'
                opened = (number, *match.groups(""))
        elif line == opened[1]:
            start, _, language, title = opened
            found.append(Block(page, start + 1, language, title, "\n".join(lines[start : number - 1]) + "\n"))
            opened = None
    assert opened is None, f"{page}:{opened[0]}: the block does not end"
    return found


BLOCKS = {path.relative_to(ROOT).as_posix(): blocks_of(path.read_text("utf-8"), str(path)) for path in PAGES}


def ids(page: str) -> str:
    return page.removesuffix(".md")


@pytest.mark.parametrize("page", BLOCKS, ids=ids)
def test_blocks_are_of_a_known_kind(page):
    """Nothing escapes the tests by an unknown language: text is for reading, the rest is run or says why not."""
    for block in BLOCKS[page]:
        known = block.language in ("python", "sh", "text", "diff") or block.skipped
        assert known, f"{page}:{block.line}: {block.language!r} neither runs nor says why not"
        if block.skipped:
            assert len(block.title.split()) >= 5, f"{page}:{block.line}: {block.title!r} gives no reason"


def run_python(blocks: list[Block]) -> dict:
    """One page's blocks, one after the other, in one namespace; a traceback shows the page's line."""
    namespace: dict = {"__name__": "page"}
    for block in blocks:
        source = "\n" * (block.line - 1) + block.code
        linecache.cache[block.page] = (len(source), None, source.splitlines(keepends=True), block.page)
        exec(compile(source, block.page, "exec"), namespace)
    return namespace


RUN = {page: [b for b in found if b.language == "python" and not b.skipped] for page, found in BLOCKS.items()}


@pytest.mark.parametrize("page", [page for page, found in RUN.items() if found], ids=ids)
def test_python_runs(page, capsys):
    run_python(RUN[page])


def test_a_block_that_fails_is_found_with_its_line():
    (block,) = blocks_of("# A page\n\n```python\nx = 1\nassert x == 2\n```\n", "page.md")
    with pytest.raises(AssertionError) as failed:
        run_python([block])
    assert failed.traceback[-1].lineno + 1 == 5


# ---- shell


def commands(code: str) -> list[list[str]]:
    """The words of each command: lines joined at backslashes, without comments; what runs in a loop is a command."""
    joined = code.replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [line for line in words if line]


HELP: dict[str, str] = {}


def help_of(module: str) -> str:
    """What `python -m module --help` prints, run in this process."""
    if module not in HELP:
        printed, arguments = io.StringIO(), sys.argv
        sys.argv = [module, "--help"]
        try:
            with contextlib.redirect_stdout(printed), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the module is imported already
                with pytest.raises(SystemExit) as ended:
                    runpy.run_module(module, run_name="__main__", alter_sys=False)
        finally:
            sys.argv = arguments
        assert ended.value.code in (0, None), f"{module} --help ends with {ended.value.code}"
        HELP[module] = re.sub(r"\x1b\[[0-9;]*m", "", printed.getvalue())
    return HELP[module]


def problems(words: list[str]) -> list[str]:
    """What a command names that does not exist."""
    if "--" in words:  # a command that starts another
        at = words.index("--")
        return problems(words[:at]) + problems(words[at + 1 :])
    for at, word in enumerate(words):
        if word == "make" and words[at + 1 :]:
            return [] if words[at + 1] in TARGETS else [f"make has no target {words[at + 1]}"]
        if Path(word).name == "python" and words[at + 1 : at + 2] == ["-m"]:
            module, flags = words[at + 2], [w.split("=")[0] for w in words[at + 3 :] if w.startswith("--")]
            if not (ROOT / f"{module.replace('.', '/')}.py").is_file():
                return [f"no module {module}"]
            known = set(re.findall(r"--[\w.-]+", help_of(module))) if flags else set()
            return [f"{module} has no flag {flag}" for flag in flags if flag not in known]
        if word == "pip":
            asked = {extra for w in words for part in re.findall(r"\[([\w,]+)\]", w) for extra in part.split(",")}
            return [f"there is no extra {extra}" for extra in asked - EXTRAS.keys() if words[-1].startswith(".")]
    return [] if words[0] in ("for", "done", "#!/bin/bash") else [f"{words[0]}: a command of an unknown kind"]


SHELL = {page: [b for b in found if b.language == "sh" and not b.skipped] for page, found in BLOCKS.items()}


@pytest.mark.parametrize("page", [page for page, found in SHELL.items() if found], ids=ids)
def test_shell_commands_exist(page):
    wrong = [
        f"{page}:{block.line}: {problem}"
        for block in SHELL[page]
        for words in commands(block.code)
        for problem in problems(words)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("python -m experiments.train_llm", "no module experiments.train_llm"),
        ("python -m experiments.train_lm --training.stepz 5", "experiments.train_lm has no flag --training.stepz"),
        ("srun python -m experiments.train_lm --mesh=2 \\\n --nope", "experiments.train_lm has no flag --nope"),
        ("python -m experiments.launch_local --devices 4 -- make tests", "make has no target tests"),
        ("pip install .[date]", "there is no extra date"),
        ("conda install it", "conda: a command of an unknown kind"),
        ("make train ARGS='--help'  # not make tests", None),
    ],
)
def test_what_does_not_exist_is_found(line, problem):
    (words,) = commands(line)
    assert problems(words) == ([] if problem is None else [problem])


# ---- the rest


DIFFS = [block for found in BLOCKS.values() for block in found if block.language == "diff"]


@pytest.mark.parametrize("block", DIFFS, ids=lambda block: block.title)
def test_diffs_apply(block):
    source = (ROOT / block.title).read_text("utf-8")
    assert len(recipes.patched(source, block.code)) > len(source)


LINK = re.compile(r"!?\[[^]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", BLOCKS, ids=ids)
def test_links_lead_somewhere(page):
    """In the repository as it is; the site's own links are checked when it is built."""
    prose = re.sub(r"(?ms)^```.*?^```", "", (ROOT / page).read_text("utf-8"))
    targets = [t for t in LINK.findall(prose) if not re.match(r"https?:|mailto:|#", t)]
    broken = [t for t in targets if not ((ROOT / page).parent / t.split("#")[0]).exists()]
    assert broken == []


def test_named_tests_exist():
    """Pages say which test holds a claim."""
    for page in BLOCKS:
        text = (ROOT / page).read_text("utf-8")
        for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
            source = (ROOT / path).read_text("utf-8")
            assert not name or f"def {name}(" in source, f"{page}: {path} has no test {name}"


def test_readme_fits_a_reading():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120
