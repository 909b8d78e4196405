"""Compile for a TPU that isn't there, and read the schedules of what was compiled.

    from pallas_kernels.profile import compile_and_schedule, report
    c = compile_and_schedule(fn, args, "v5e")  # fn(*args), args of jax.ShapeDtypeStruct; 3 s and the compiler's time
    print(report("mine", c).table())  # every kernel: cycles and bundles of a grid step, units, spills, vector memory
    c.memory["temp"], c.kernels["my_kernel.1"].utilisation(), c.hlo

`fn` goes to a process of its own, as the compiler takes its flags when it is loaded and ends the process on some
errors. It must be importable: a function of a module, `functools.partial` of one, or its name as `MODULE:NAME`; no
lambda. From the shell: `python -m pallas_kernels.profile --kernel MODULE:FUNCTION --target v5e`, where FUNCTION()
returns `(fn, args)`.

Cycles and bundles are not the same: a bundle count leaves out every wait for a matrix unit (see `_schedule`).
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from .._shared.machine import Machine, tracing_for
from ._hlo import Program, Use
from ._programs import resolve
from ._schedule import Schedule, read
from ._targets import Target, target as find_target

_DUMPED = "packed-bundles-post-ra|final_bundles|pre-delay_hlo"


class CompileError(RuntimeError):
    """The compiler refused; the message is its own."""


@dataclasses.dataclass(frozen=True)
class PallasCall:
    """A `pallas_call` in the traced program.

    Attributes:
        name: of the kernel.
        steps: of its grid.
        moved: bytes that its pipeline moves in one call for each operand and each result: a block is moved when its
            index changes. None for what the kernel moves itself.
    """

    name: str
    steps: int
    moved: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a function.

    Attributes:
        target: the device.
        memory: bytes of `argument`, `output`, `alias`, `temp` and `code`.
        hlo: the compiled program's text.
        kernels: instruction -> schedule, of kernels and of XLA's own fusions.
        calls: the traced program's `pallas_call`s, in order.
    """

    target: Target
    memory: dict[str, int]
    hlo: str
    kernels: dict[str, Schedule]
    calls: tuple[PallasCall, ...]

    def uses(self) -> list[Use]:
        """What the program runs and how often."""
        return Program(self.hlo).uses(lambda use: self.kernels[use.name].cycles if use.name in self.kernels else 0)

    def call(self, use: Use) -> PallasCall | None:
        """The traced call behind a kernel of the compiled program, whose name has the transformations around it."""
        named = [c for c in self.calls if c.name in use.name]
        return max(named, key=lambda call: len(call.name), default=None) if use.is_kernel else None

    def hbm_bytes(self, use: Use) -> int:
        """Moved from and to HBM by one run; what the compiler keeps in vector memory is not."""
        call = self.call(use)
        if call is None or None in call.moved or len(call.moved) != len(use.in_hbm):
            return use.hbm_bytes
        return sum(moved or 0 for moved, hbm in zip(call.moved, use.in_hbm, strict=True) if hbm)


def require_compiler() -> None:
    """Raises ModuleNotFoundError, with what to install, where the TPU compiler is missing."""
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "the TPU compiler is not installed: pip install libtpu (part of jax[tpu]; it needs no TPU)", name="libtpu"
        )


def compile_and_schedule(
    fn: Callable | str, args: Sequence[Any], target: "str | Target", *, timeout: float = 600
) -> Compiled:
    """Compile `fn(*args)` for one device of `target`, on any machine.

    Args:
        fn: an importable function, jitted or not, or `MODULE:NAME`.
        args: arrays or jax.ShapeDtypeStruct, in trees.
        target: v5e, v5p, v6e or tpu7x.
        timeout: seconds until the compiler is given up on.

    Raises:
        ValueError: an unknown target, or a function that another process cannot import.
        ModuleNotFoundError: no compiler, with what to install.
        CompileError: the compiler's refusal.
        subprocess.TimeoutExpired: it took too long.
    """
    result = next(compile_all([(fn, args, target)], timeout=timeout))
    if isinstance(result, CompileError):
        raise result
    return result


def compile_all(jobs: Sequence[tuple], *, timeout: float = 600) -> Iterator["Compiled | CompileError"]:
    """The results of `(fn, args, target)` one after the other, in one process that is started anew if it dies.

    Raises what `compile_and_schedule` does, except that a compiler's refusal is a result.
    """
    require_compiler()
    shapes = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(jax.numpy.shape(x), x.dtype), tree)  # noqa: E731
    todo = [(fn, shapes(tuple(args)), find_target(name)) for fn, args, name in jobs]
    for fn, _, _ in todo:
        resolve(fn) if isinstance(fn, str) else _check_importable(fn)
    with tempfile.TemporaryDirectory(prefix="pallas_kernels_") as folder:
        done = 0
        while done < len(todo):
            for result in _worker(Path(folder), todo[done:], timeout):
                done += 1
                yield result


def _check_importable(fn: Callable) -> None:
    try:
        pickle.loads(pickle.dumps(fn))
        importable = "__main__" not in repr(getattr(fn, "func", fn)) and getattr(fn, "__module__", "") != "__main__"
    except (pickle.PicklingError, AttributeError, TypeError):
        importable = False
    if not importable:
        raise ValueError(
            f"compile_and_schedule: {fn!r} cannot be imported by the compiler's process, wanted a function of a module "
            "or functools.partial of one; move it into a file, and bind what it closes over with functools.partial."
        )


def environment(dump: Path) -> dict[str, str]:
    """The variables of a process that compiles for TPUs on a machine that has none and dumps its schedules."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LIBTPU", "XLA_FLAGS", "JAX_COMPILATION_CACHE"))}
    path = [str(Path(__file__).parents[2]), *(p for p in sys.path if p)]
    return kept | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        "TPU_STDERR_LOG_LEVEL": "3",
        # a lock that guards a real TPU; compiling opens none
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
        f"--xla_jf_dump_llo_pass_label_regex={_DUMPED}",
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)),
    }


def _worker(folder: Path, todo: list, timeout: float) -> Iterator["Compiled | CompileError"]:
    """Results until the process ends; at least one, as a death is the first unfinished job's result."""
    dump, jobs = folder / "dump", folder / "jobs"
    dump.mkdir(exist_ok=True)
    jobs.write_bytes(pickle.dumps(todo))
    log, finished = folder / "log", 0
    command = [sys.executable, "-m", "pallas_kernels.profiler._aot", str(jobs), str(dump)]
    with (
        log.open("wb") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=environment(dump)) as process,
    ):
        assert process.stdout is not None
        try:
            with _kill_after(process, timeout):
                while finished < len(todo):
                    try:
                        result = pickle.load(process.stdout)
                    except EOFError:
                        break
                    finished += 1
                    yield result
        finally:
            process.kill()
    code = process.returncode
    if finished < len(todo):
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        yield CompileError(f"the compiler's process ended with {code} after {finished} of {len(todo)} jobs:\n{tail}")


@contextlib.contextmanager
def _kill_after(process: subprocess.Popen, seconds: float) -> Iterator[None]:
    import threading

    expired = threading.Event()

    def end():
        expired.set()
        process.kill()

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if expired.is_set():
        raise subprocess.TimeoutExpired(process.args, seconds)


# ---- in the compiler's process


def _serve(jobs: Path, dump: Path) -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints goes to the log
    for fn, args, target in pickle.loads(jobs.read_bytes()):
        try:
            result = _compile(fn, args, target, dump)
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError, TypeError) as refusal:
            result = CompileError(f"{type(refusal).__name__}: {refusal}")
        pickle.dump(result, out)
        out.flush()
        for path in dump.rglob("*.*"):
            path.unlink()


def _compile(fn, args, target: Target, dump: Path) -> Compiled:
    fn = resolve(fn) if isinstance(fn, str) else fn
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=target.topology).devices[0]
    mesh = jax.sharding.Mesh([device], ("x",))
    place = jax.sharding.SingleDeviceSharding(device)
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args)
    # Pallas asks the mesh which device it compiles for
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), tracing_for(Machine("tpu", target.kind)):
        traced = (fn if hasattr(fn, "trace") else jax.jit(fn)).trace(*args)
        compiled = traced.lower().compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None, "this jax has no memory analysis or text of a compiled program"
    sizes = {"argument": memory.argument_size_in_bytes, "output": memory.output_size_in_bytes}
    sizes |= {"alias": memory.alias_size_in_bytes, "temp": memory.temp_size_in_bytes}
    sizes |= {"code": memory.generated_code_size_in_bytes}
    kernels = {schedule.name: schedule for schedule in read(dump, target.branch_delay)}
    return Compiled(target, sizes, text, kernels, tuple(_calls(traced.jaxpr.jaxpr)))


def _calls(jaxpr) -> Iterator[PallasCall]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield _call(eqn)
            continue
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _calls(inner)


def _call(eqn) -> PallasCall:
    mapping = eqn.params["grid_mapping"]
    grid = tuple(mapping.grid)
    steps = math.prod(grid)
    moved: list[int | None] = []
    for block in mapping.block_mappings:
        aval = block.transformed_block_aval
        if "any" in str(aval.memory_space).lower() or "hbm" in str(aval.memory_space).lower():
            moved.append(None)
            continue
        dims = [getattr(d, "block_size", d) for d in block.block_shape]
        size = math.prod(dim for dim in dims if isinstance(dim, int))
        moved.append(_changes(block.index_map_jaxpr, grid, steps) * size * aval.dtype.itemsize)
    name = eqn.params.get("name") or eqn.params["name_and_src_info"].name
    return PallasCall(name, steps, tuple(moved))


def _changes(index_map, grid: tuple[int, ...], steps: int) -> int:
    """How often a block's index changes over the grid, the first time included."""
    if not grid:
        return 1
    if len(index_map.jaxpr.invars) != len(grid):
        return steps  # indices from prefetched scalars are not known here
    jnp = jax.numpy
    points = jnp.unravel_index(jnp.arange(steps, dtype=jnp.int32), grid)
    at = jax.vmap(lambda *point: tuple(jax.core.eval_jaxpr(index_map.jaxpr, index_map.consts, *point)))
    indices = [jnp.asarray(i) for i in at(*points)]
    if not indices:
        return 1
    return 1 + int(jnp.any(jnp.stack([i[1:] != i[:-1] for i in indices]), axis=0).sum())


if __name__ == "__main__":
    from pallas_kernels.profiler import _aot  # the classes under the name that the other process knows

    _aot._serve(Path(sys.argv[1]), Path(sys.argv[2]))
