"""Notebooks as pages. They are committed without outputs; `execute` keeps executed copies in the cache, by content."""

import hashlib
import importlib.util
import json
import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "notebooks"


def executed_copy(path: Path) -> Path:
    """Where the executed notebook lies, if it does: another text is another file."""
    return CACHE / f"{path.stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.ipynb"


def execute() -> None:
    """Execute the notebooks that have no copy yet, but those that need a module which is not installed."""
    import nbclient
    import nbformat

    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # beside the TPU's compiler, jax would look for a TPU
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if (copy := executed_copy(path)).exists():
            continue
        notebook = nbformat.read(path, as_version=4)
        missing = [name for name in notebook.metadata.get("requires", []) if importlib.util.find_spec(name) is None]
        if missing:
            print(f"not executing {path.relative_to(ROOT)}: {', '.join(missing)} is not installed", flush=True)
            continue
        print(f"executing {path.relative_to(ROOT)}", flush=True)
        nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3").execute()
        copy.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, copy)


def markdown(name: str) -> list[str]:
    """The notebook's cells as lines of Markdown, with outputs if there is an executed copy."""
    path = ROOT / "notebooks" / name
    copy = executed_copy(path)
    cells = json.loads((copy if copy.exists() else path).read_text("utf-8"))["cells"]
    lines = []
    for cell in cells:
        source = _text(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += [*_display_math(source).splitlines(), ""]
        elif cell["cell_type"] == "code":
            lines += ["```python", *source.splitlines(), "```", ""]
            for output in cell.get("outputs", []):
                lines += [*_output(output), ""]
    return lines


def _text(source: str | list[str]) -> str:
    return source if isinstance(source, str) else "".join(source)


def _display_math(source: str) -> str:
    """A formula alone on its line stands apart, as notebooks show it."""
    return re.sub(r"(?m)^(\$\$.*\$\$)$", r"\n\1\n", source)


def _output(output: dict) -> list[str]:
    data = output.get("data", {})
    if "image/png" in data:
        return [f"![Output of the cell](data:image/png;base64,{_text(data['image/png']).replace(chr(10), '')})"]
    text = _text(output.get("text", data.get("text/plain", "")))
    if output.get("name") == "stderr" or not text.strip():
        return []
    return ["```text", *text.rstrip().splitlines(), "```"]
