"""CONTRIBUTING.md taken literally: the code of its sections, and the lines that they add to lists."""

import re
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
