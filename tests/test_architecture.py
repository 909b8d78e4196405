"""The import rules of the rooms, and the few things that no file may contain, read off the source.

`ROOMS` and the sets below are the rules; change them only together with the architecture they state.
"""

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each room imports from those before it.
ORDER = ("core", "recurrences", "parallel", "layers", "models")
# A room may import itself and the rooms named here. A room of lineax_seq that is not here fails.
ROOMS = {
    **{room: set(ORDER[:place]) for place, room in enumerate(ORDER)},
    "data": {"core"},
    "training": {"core", "parallel"},  # it knows tasks as a protocol, never text
    "hf": set(ORDER),
    "tasks": {*ORDER, "data", "training"},
    "linearize": {*ORDER, "data", "training", "hf", "tasks"},
    "testing": {"core", "recurrences", "layers"},
}
# The modules of core, each of which imports from those before it.
CORE = (
    *("typing", "monoid", "recurrence", "arguments", "checks", "fields", "layout"),
    *("target", "quarantine", "chunked", "forms", "dispatch", "lowering", "documentation", "operator"),
)
# Who may import pallas_kernels.
KERNEL_IMPORTERS = {
    *("lineax_seq.core.target", "lineax_seq.core.dispatch"),
    "lineax_seq.recurrences._normalised",  # mLSTM's quotient has one definition, which its kernel holds
}
# What pallas_kernels may import inside a function, besides jax: its profiler draws.
KERNELS_LAZY = {"matplotlib"}

# What sends data between devices or names a mesh axis; only parallel/ does.
COLLECTIVES = {
    *("psum", "pmean", "pmax", "pmin", "psum_scatter", "all_gather", "all_gather_invariant", "all_to_all"),
    *("ppermute", "pshuffle", "pswapaxes", "pcast", "pvary", "ragged_all_to_all", "axis_index", "axis_size"),
    *("shard_map", "pmap", "process_allgather", "broadcast_one_to_all", "sync_global_devices"),
}
MESHES = {"Mesh", "AbstractMesh", "make_mesh", "set_mesh", "use_mesh", "PartitionSpec", "P"}
# The longest prefix of a module's name decides.
JAX_NAMES_REFUSED = {
    "lineax_seq": COLLECTIVES | MESHES,
    "lineax_seq.parallel": set(),
    "pallas_kernels": (COLLECTIVES | MESHES) - {"axis_index", "Mesh"},  # there they mean a kernel's grid
    # kernels are opaque to XLA: this module splits them over batch and heads
    "pallas_kernels._shared.partition": (COLLECTIVES | MESHES) - {"shard_map", "PartitionSpec"},
    "experiments": COLLECTIVES,
    "notebooks": COLLECTIVES,
}

# The only module that asks JAX which machine it runs on.
MACHINE = "pallas_kernels/_shared/machine.py"

FOLDERS = "home|root|work|tmp|usr|opt|mnt|var|etc|srv|Users|private|scratch"
ABSOLUTE_PATH = re.compile(rf"(?<![\w.}})\]~/*-])/(?:{FOLDERS})(?=/\w)")


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix(".ipynb").removesuffix("/__init__").replace("/", ".")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def walk(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below with whether it runs only when a function is called; what only type checkers see is left out."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        below = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield child, lazy
        yield from walk(child, below)


def imported(node: ast.AST, path: str) -> list[tuple[str, str]]:
    """(dotted name, the name it gets) for each thing that an import statement brings in; relative ones resolved."""
    if isinstance(node, ast.Import):
        return [(a.name, a.asname or a.name.split(".")[0]) for a in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    package = module_name(path).split(".")
    if not path.endswith("/__init__.py"):
        package = package[:-1]
    start = package[: len(package) - node.level + 1] if node.level else []
    base = ".".join([*start, *([node.module] if node.module else [])])
    return [(f"{base}.{a.name}", a.asname or a.name) for a in node.names]


def import_problem(path: str, target: str, lazy: bool) -> str | None:
    """Why this module may not import this name, or None."""
    module = module_name(path)
    here, there = module.split("."), target.split(".")
    package, room = here[0], here[1] if len(here) > 1 else ""
    if there[0] == "experiments":
        return "nothing imports experiments"
    if package == "pallas_kernels":
        may = {"jax", package, *sys.stdlib_module_names} | (KERNELS_LAZY if lazy else set())
        return None if there[0] in may else "pallas_kernels imports only jax"
    if there[0] == "pallas_kernels":
        allowed = package != "lineax_seq" or module in KERNEL_IMPORTERS
        return None if allowed else f"only {' and '.join(sorted(KERNEL_IMPORTERS))} import pallas_kernels"
    if there[0] != "lineax_seq":
        return None
    if package != "lineax_seq":
        private = any(part.startswith("_") and not part.startswith("__") for part in there)
        return "experiments and notebooks use public names" if private else None
    if room == "":
        return None
    if room not in ROOMS:
        return f"the room {room} has no row in ROOMS"
    target_room = there[1] if len(there) > 1 else ""
    if target_room not in ROOMS:
        return "inside the package, import from a room that has a row in ROOMS"
    if target_room != room:
        return None if target_room in ROOMS[room] else f"{room} may not import {target_room}"
    return core_problem(here, there) if room == "core" else None


def core_problem(here: list[str], there: list[str]) -> str | None:
    """Why a module of core may not import another one, or None."""
    module, other = (parts[2] if len(parts) > 2 else "" for parts in (here, there))
    if unknown := [name for name in (module, other) if name not in CORE]:
        return f"core's {' and '.join(repr(name) for name in unknown)} has no place in CORE"
    return None if CORE.index(other) <= CORE.index(module) else f"{other} comes after {module} in CORE"


def refused_names(module: str) -> set[str]:
    prefixes = [name for name in JAX_NAMES_REFUSED if module == name or module.startswith(name + ".")]
    return JAX_NAMES_REFUSED[max(prefixes, key=len)]


def catches_everything(node: ast.AST) -> bool:
    """Whether this handler or `suppress` takes every exception. `BaseException` may be caught if it is raised again."""
    if isinstance(node, ast.ExceptHandler):
        caught = {ast.unparse(n) for n in ast.walk(node.type)} if node.type else {"Exception"}
        raises = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
        return "Exception" in caught or ("BaseException" in caught and not raises)
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "suppress":
        return any(ast.unparse(argument) in ("Exception", "BaseException") for argument in node.args)
    return False


def asks_the_machine(node: ast.AST, used: list[str]) -> str | None:
    """What this node does that only the module of the machine may do, or None."""
    if "jax.default_backend" in used:
        return "jax.default_backend: the machine is asked once, by pallas_kernels/_shared/machine.py"
    patched: list[ast.expr] = []
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("object", "setattr", "patch"):
        patched = node.args[:1]
    elif isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        patched = [target for target in targets if isinstance(target, ast.Attribute)]
    words = [ast.unparse(target).strip("'\"") for target in patched]
    return "patches jax" if any(word == "jax" or word.startswith("jax.") for word in words) else None


def problems(path: str, source: str) -> list[str]:
    """What is wrong with a file, each as `path:line: what`. The path is relative to the repository, with slashes."""
    found = [
        (number, f"absolute path {match.group()}")
        for number, line in enumerate(source.splitlines(), 1)
        for match in ABSOLUTE_PATH.finditer(line)
    ]
    if not path.startswith("tests/"):
        nodes = list(walk(ast.parse(source)))
        origin = {}  # what a name stands for
        for node, lazy in nodes:
            for target, name in imported(node, path):
                # `import jax.numpy` binds jax
                origin[name] = target if isinstance(node, ast.ImportFrom) or node.names[0].asname else name
                if why := import_problem(path, target, lazy):
                    found.append((node.lineno, f"imports {target}: {why}"))
        refused = refused_names(module_name(path))
        for node, _ in nodes:
            if isinstance(node, ast.Attribute):
                root, _, rest = ast.unparse(node).partition(".")
                dotted = f"{origin.get(root, root)}.{rest}"
                used = [dotted]
            else:
                used = [target for target, _ in imported(node, path)]
            if path != MACHINE and (what := asks_the_machine(node, used)):
                found.append((node.lineno, what))
            for dotted in used:
                parts = dotted.split(".")
                if parts[-1] == "nan_to_num":
                    found.append((node.lineno, "nan_to_num hides an overflow"))
                if parts[0] == "jax" and parts[-1] in refused:
                    found.append((node.lineno, f"{dotted}: only lineax_seq/parallel has collectives and mesh axes"))
            if catches_everything(node):
                found.append((node.lineno, "catches every exception: name the ones that are expected"))
    return [f"{path}:{line}: {what}" for line, what in sorted(found)]


def sources() -> dict[str, str]:
    """The repository's Python by path; of notebooks the code cells."""
    found = {}
    for folder in ("lineax_seq", "pallas_kernels", "experiments", "tests"):
        found |= {p.relative_to(ROOT).as_posix(): p.read_text("utf-8") for p in (ROOT / folder).rglob("*.py")}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = [cell["source"] for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
        code = "\n".join(cell if isinstance(cell, str) else "".join(cell) for cell in cells)
        found[path.relative_to(ROOT).as_posix()] = re.sub(r"(?m)^[%!].*$", "", code)
    return found


def test_every_file_keeps_the_rules():
    checked = sources()
    assert "lineax_seq/core/typing.py" in checked and "tests/test_architecture.py" in checked
    assert [problem for path, source in checked.items() for problem in problems(path, source)] == []


BAD = {
    "up": ("lineax_seq/core/forms.py", "from ..recurrences import gla", "core may not import recurrences"),
    "up from a package": ("lineax_seq/recurrences/gla.py", "from ..layers import GLA", "may not import layers"),
    "up, absolute": ("lineax_seq/data/text.py", "import lineax_seq.models.decoder as m", "data may not import models"),
    "up in __init__": ("lineax_seq/layers/__init__.py", "from ..models import Decoder", "may not import models"),
    "up in a class": ("lineax_seq/parallel/a.py", "class A:\n from ..layers import x", "may not import layers"),
    "up in a function": (
        "lineax_seq/core/operator.py",
        "def f():\n from ..parallel import x",
        "may not import parallel",
    ),
    "later in core": ("lineax_seq/core/forms.py", "from . import operator", "operator comes after forms"),
    "later in core, a name": ("lineax_seq/core/monoid.py", "from .forms import chunk", "forms comes after monoid"),
    "new in core": ("lineax_seq/core/utils.py", "from .typing import State", "'utils' has no place in CORE"),
    "training knows no models": (
        "lineax_seq/training/loop.py",
        "from ..models import Decoder",
        "may not import models",
    ),
    "training knows no recurrence": ("lineax_seq/training/a.py", "from ..recurrences import gla", "may not import rec"),
    "training knows no data": ("lineax_seq/training/loop.py", "from ..data import Text", "may not import data"),
    "weights train nothing": ("lineax_seq/hf/a.py", "def f():\n from ..training import x", "may not import training"),
    "kit of shards": ("lineax_seq/testing/a.py", "from ..parallel import cost", "testing may not import parallel"),
    "own package": ("lineax_seq/models/lm.py", "import lineax_seq as ls", "import from a room"),
    "name of the package": ("lineax_seq/models/lm.py", "from .. import gla", "import from a room"),
    "new room": ("lineax_seq/utils.py", "from .core.typing import State", "no row in ROOMS"),
    "kernel elsewhere": ("lineax_seq/core/forms.py", "def f():\n import pallas_kernels.tpu", "import pallas_kernels"),
    "kernel in a layer": ("lineax_seq/layers/a.py", "from pallas_kernels import gpu", "import pallas_kernels"),
    "kernel to library": ("pallas_kernels/tpu/gla.py", "from lineax_seq.core.typing import State", "only jax"),
    "picture early": ("pallas_kernels/profile.py", "import matplotlib.figure", "imports only jax"),
    "kernel to numpy": ("pallas_kernels/tpu/gla.py", "import numpy as np", "imports only jax"),
    "experiments": ("lineax_seq/training/loop.py", "def f():\n from experiments import x", "imports experiments"),
    "experiments, relative": ("experiments/generate.py", "from .train_lm import main", "imports experiments"),
    "private": ("experiments/bench.py", "from lineax_seq.recurrences._delta import DELTA", "public names"),
    "private in a notebook": ("notebooks/01.ipynb", "import lineax_seq._x", "public names"),
    "collective": ("lineax_seq/layers/a.py", "import jax\njax.lax.psum(1, 'x')", "jax.lax.psum: only"),
    "collective, alias": ("lineax_seq/layers/a.py", "from jax import lax as l\nf = l.all_gather", "all_gather: only"),
    "collective, name": ("experiments/a.py", "from jax.lax import ppermute as send", "ppermute: only"),
    "shard_map": ("lineax_seq/training/a.py", "import jax\n@jax.shard_map\ndef f(x): pass", "shard_map: only"),
    "mesh axis": ("lineax_seq/models/a.py", "from jax.sharding import PartitionSpec as P", "PartitionSpec: only"),
    "collective in a kernel": ("pallas_kernels/gpu/a.py", "import jax.lax\njax.lax.psum(1, 'x')", "psum: only"),
    "bare except": ("lineax_seq/data/a.py", "try:\n f()\nexcept:\n raise", "every exception"),
    "except Exception": ("lineax_seq/data/a.py", "try:\n f()\nexcept Exception as e:\n raise", "every exception"),
    "in a tuple": ("experiments/a.py", "try:\n f()\nexcept (OSError, Exception):\n pass", "every exception"),
    "swallowed": ("lineax_seq/data/a.py", "try:\n f()\nexcept BaseException:\n g()", "every exception"),
    "suppress": ("lineax_seq/data/a.py", "with contextlib.suppress(Exception): f()", "every exception"),
    "nan_to_num": ("lineax_seq/core/forms.py", "import jax.numpy as jnp\njnp.nan_to_num(x)", "nan_to_num"),
    "platform": ("lineax_seq/core/forms.py", "import jax\nx = jax.default_backend() == 'cpu'", "asked once"),
    "platform, by name": ("pallas_kernels/a.py", "from jax import default_backend as platform", "asked once"),
    "patch": ("pallas_kernels/a.py", "import jax\nmock.patch.object(jax, 'devices', f)", "patches jax"),
    "patch, by name": ("experiments/a.py", "with mock.patch('jax.devices', f): g()", "patches jax"),
    "patch, assigned": ("lineax_seq/layers/a.py", "import jax\njax.numpy.exp = f", "patches jax"),
    "patch, setattr": ("lineax_seq/layers/a.py", "import jax\nsetattr(jax.lax, 'scan', f)", "patches jax"),
    "path": ("lineax_seq/data/a.py", "x = '/" + "home/me/data'", "absolute path"),
    "path in a docstring": ("tests/test_a.py", '"""See ' + "/" + 'tmp/runs."""', "absolute path"),
    "path in a comment": ("experiments/a.py", "# run it in " + "/" + "work/main", "absolute path"),
}


@pytest.mark.parametrize(("path", "source", "expected"), BAD.values(), ids=BAD)
def test_a_breach_is_found(path, source, expected):
    assert expected in "\n".join(problems(path, source))


GOOD = {
    "down": ("lineax_seq/tasks/text.py", "from ..models import Decoder\nfrom ..core.typing import State"),
    "loop": (
        "lineax_seq/training/loop.py",
        "from ..core import checks\nfrom ..parallel import mesh\nfrom . import _step",
    ),
    "weights": ("lineax_seq/hf/rules.py", "from ..models import spec\nfrom ..layers import Gla"),
    "linearize": ("lineax_seq/linearize/a.py", "from ..hf import load\nfrom ..tasks import distillation"),
    "kit": ("lineax_seq/testing/a.py", "from ..core.operator import Operator\nfrom ..layers import LAYERS"),
    "core": ("lineax_seq/core/operator.py", "from . import checks, forms as f\nfrom .typing import State"),
    "own room": (
        "lineax_seq/recurrences/gla.py",
        "from . import _scalar\nfrom ._decay import x\nfrom ..core import forms",
    ),
    "package": ("lineax_seq/__init__.py", "from .recurrences import gla as gla\nfrom . import parallel as parallel"),
    "kernels": ("lineax_seq/core/dispatch.py", "from pallas_kernels import tpu\ndef f():\n import pallas_kernels"),
    "types only": ("lineax_seq/core/monoid.py", "import typing\nif typing.TYPE_CHECKING:\n from .forms import x"),
    "machine": (MACHINE, "import jax\nplatform = jax.default_backend()"),
    "own attribute": (
        "lineax_seq/layers/a.py",
        "import jax\nself.jax = jax.lax.scan\nobject.__setattr__(self, 'a', 1)",
    ),
    "kernel": ("pallas_kernels/gpu/a.py", "import functools\nimport jax\nfrom . import b\njax.lax.axis_index('wg')"),
    "picture": ("pallas_kernels/profile.py", "def draw():\n import matplotlib.figure"),
    "parallel": ("lineax_seq/parallel/a.py", "import jax\nfrom ..core.monoid import DENSE\njax.lax.all_gather(1, 'x')"),
    "mesh of a user": ("experiments/a.py", "import jax\nmesh = jax.make_mesh((8,), ('seq',))"),
    "a method's name": ("lineax_seq/layers/a.py", "self.all_gather(x)\nparallel.psum(x)"),
    "clean up": ("lineax_seq/data/a.py", "try:\n f()\nexcept BaseException:\n g()\n raise"),
    "relative path": ("lineax_seq/data/a.py", "x = 'data/home/x'; y = f'{root}/tmp/a', 'https://a.b/usr/c', a/var/c"),
}


@pytest.mark.parametrize(("path", "source"), GOOD.values(), ids=GOOD)
def test_what_is_allowed_is_not_reported(path, source):
    assert problems(path, source) == []
