"""What the pages may say beyond Markdown.

`!api PACKAGE`        the package's docstring and every public name of its `__init__.py`, in its order
`!notebook FILE`      the prose and the code of notebooks/FILE, with outputs where `make docs` has executed it
`!file FILE`          the text of a file of the repository
`![...](../FILE)`     a picture from elsewhere in the repository is put into the page
`$...$`, `$$...$$`    become MathML, which browsers draw by themselves: no script and no font is loaded
"""

import ast
import base64
import html
import re
from collections.abc import Iterator
from pathlib import Path

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.postprocessors import Postprocessor
from markdown.preprocessors import Preprocessor

from . import notebooks

ROOT = Path(__file__).parents[2]


def public_names(package: str) -> dict[str, str]:
    """What `package/__init__.py` makes public, each with the dotted path of its definition.

    Public is `X as X`, and what the file defines without a leading underscore; rooms have pages of their own.
    """
    folder = ROOT / package.replace(".", "/")
    found = {}
    for node in _statements(folder / "__init__.py"):
        if isinstance(node, ast.ImportFrom) and node.module:  # `from . import room` has none
            found |= {a.asname: definition(_source(package, node), a.name) for a in node.names if a.asname}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: f"{package}.{target.id}" for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = f"{package}.{node.name}"
    return {name: path for name, path in found.items() if not name.startswith("_") and not (folder / name).is_dir()}


def _statements(path: Path) -> Iterator[ast.stmt]:
    """Those of the module, and what only type checkers are shown."""
    for node in ast.parse(path.read_text("utf-8")).body:
        yield from node.body if isinstance(node, ast.If) else [node]


def _source(package: str, node: ast.ImportFrom) -> str:
    """The module that a relative import in `package/__init__.py` takes names from."""
    parts = package.split(".")
    return ".".join([*parts[: len(parts) + 1 - node.level], str(node.module)])


def definition(module: str, name: str) -> str:
    """Where a name is defined that `module` offers. A module and what it defines may have one name, as `gla.gla`."""
    package = ROOT / module.replace(".", "/") / "__init__.py"
    if package.is_file():
        for node in _statements(package):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            if any((a.asname or a.name) == name for a in node.names):
                return definition(_source(module, node), name)
    return f"{module}.{name}"


def api(package: str) -> list[str]:
    lines = [f"::: {package}", "    options:", "      members: []", "      show_root_heading: false", ""]
    for name, path in public_names(package).items():
        # the anchor is the name that users write
        lines += [f'<a id="api-{package}.{name}"></a>', "", f"::: {path}", ""]
    return lines


def file(name: str) -> list[str]:
    """Its links start at the root, those of a page in `docs`."""
    return (ROOT / name).read_text("utf-8").replace("](docs/", "](").splitlines()


_PICTURE = re.compile(r"!\[([^]]*)\]\((?:\.\./)+([^)]+\.png)\)")


def _picture(found: re.Match) -> str:
    data = base64.b64encode((ROOT / found[2]).read_bytes()).decode()
    return f"![{found[1]}](data:image/png;base64,{data})"


class _Includes(Preprocessor):
    includes = {"!api": api, "!notebook": notebooks.markdown, "!file": file}

    def run(self, lines: list[str]) -> list[str]:
        done = []
        for line in lines:
            word, _, argument = line.strip().partition(" ")
            done += self.includes[word](argument) if word in self.includes else [_PICTURE.sub(_picture, line)]
        return done


_MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def mathml(formula: str, display: bool) -> str:
    """Raises ValueError where the converter leaves TeX behind."""
    done = convert(formula, display="block" if display else "inline")
    if re.search(r"<m[io]>(&|\\|\\?\w*\\)", done.replace("&#", "")):
        raise ValueError(f"site: a formula that MathML cannot say: {formula}")
    return done


class _Math(Postprocessor):
    def run(self, text: str) -> str:
        return _MATH.sub(lambda found: mathml(html.unescape(found[2]), found[1] == "div"), text)


class Pages(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(_Includes(md), "lineax_seq_includes", 60)
        md.postprocessors.register(_Math(md), "lineax_seq_math", -10)


def makeExtension(**options) -> Pages:
    return Pages(**options)
