"""CONTRIBUTING.md taken literally: the code of its sections, and the lines that they add to lists."""

import importlib.util
import re
import sys
import types
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r'^```(\w+) title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    """The text from a heading to the next one of its rank."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"CONTRIBUTING.md has no section {title!r}"
    return found[1]


def blocks(title: str, language: str) -> dict[str, str]:
    """The section's blocks in a language that name a file: file -> text."""
    return {name: code for kind, name, code in FENCE.findall(section(title)) if kind == language}


def patched(source: str, diff: str) -> str:
    """`source` with the diff's `+` lines behind their context, which must be there in this order."""
    lines, at = source.splitlines(), 0
    for line in diff.splitlines():
        if line.startswith("@@"):
            continue
        if line.startswith("+"):
            lines.insert(at, line[1:])
            at += 1
        else:
            assert line[1:] in lines[at:], f"no line {line[1:]!r} after line {at}"
            at = lines.index(line[1:], at) + 1
    return "\n".join(lines) + "\n"


def listed(title: str) -> tuple[types.ModuleType, types.ModuleType]:
    """The section's file as a module, and the package of its folder with the section's lines in its `__init__.py`."""
    ((path, source),) = blocks(title, "python").items()
    registry = f"{Path(path).parent.as_posix()}/__init__.py"
    package = Path(path).parent.as_posix().replace("/", ".")
    name = path.removesuffix(".py").replace("/", ".")
    before, made = sys.modules.get(name), _module(name, package, path, source)
    sys.modules[name] = made
    try:
        text = patched((ROOT / registry).read_text("utf-8"), blocks(title, "diff")[registry])
        return made, _module(package, package, registry, text)
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


def _module(name: str, package: str, path: str, source: str) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__package__ = package
    sys.modules.setdefault(name, made)  # dataclasses look their module up
    exec(compile(source, path, "exec"), vars(made))
    return made


def loaded(path: str) -> types.ModuleType:
    """A test module anew, as pytest would collect it now."""
    spec = importlib.util.spec_from_file_location("collected_anew", ROOT / path)
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made
