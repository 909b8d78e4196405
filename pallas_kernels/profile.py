"""Cost of a kernel on a TPU that need not be there.

    python -m pallas_kernels.profile --recurrence kda --target v5e --shape B=1,T=4096,H=16,K=128,V=128
    python -m pallas_kernels.profile --kernel my_package.my_module:example --target v5e,v6e

The TPU compiler runs on any machine; its schedule tells the cycles. On a machine with a TPU the program also runs, and
`--trace` keeps what the device did.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .profiler import _aot, _measure, _picture, _programs, _targets, _tune
from .profiler._aot import Compiled as Compiled, compile_and_schedule as compile_and_schedule
from .profiler._picture import figure as figure
from .profiler._programs import recurrence as recurrence
from .profiler._report import Report as Report, compare as compare, report as report

_DESCRIPTION = """\
Compile a recurrence's kernels (or any function) for a TPU, on any machine, and report what its schedule will cost:
cycles of a grid step and of a token-head, how busy each unit is, spills, vector memory, bytes through HBM, what binds,
and how far the time is from the least that the matrix units and HBM allow."""
_EPILOG = """\
"cycles" are those of the schedule with the waits the compiler planned for; "bundles" leave the waits out and are what
is issued. A rolled loop is multiplied by its trip count; a loop whose count the program decides is counted once, and
said so. What a kernel does in some grid steps only, as to set up its state, is counted in all of them. Waits for HBM
come on top only where a kernel's transfers take longer than its cycles: "time" is the larger.

examples:
  python -m pallas_kernels.profile --recurrence gla --pass forward,backward --against xla
  python -m pallas_kernels.profile --recurrence kda --json before.json
  python -m pallas_kernels.profile --recurrence kda --against before.json --picture kda.png
  python -m pallas_kernels.profile --recurrence gla --target v6e --tune"""


@dataclasses.dataclass(frozen=True)
class Job:
    """A program to compile: its title, the function, its arguments' shapes, and what its costs are counted per."""

    title: str
    fn: Callable
    args: tuple
    per: tuple[int, str]
    target: str


def profile(
    fn: Callable, args: Sequence, target: str = "v5e", *, title: str | None = None, per: tuple[int, str] = (1, "call")
) -> Report:
    """What `fn(*args)` costs on `target`, compiled on any machine.

    Args:
        fn: an importable function, jitted or not.
        args: arrays or jax.ShapeDtypeStruct.
        target: v5e, v5p, v6e or tpu7x.
        title: of the report; None is the function's name.
        per: what to divide costs by, as in (B * T * H, "token-head").

    Raises what `compile_and_schedule` raises.
    """
    name = title or getattr(getattr(fn, "func", fn), "__name__", repr(fn))
    return report(name, _aot.compile_and_schedule(fn, args, target), per)


def parse_shape(text: str) -> dict[str, int]:
    """ "B=1,T=4096" -> sizes by letter.

    Raises:
        ValueError: what is no positive integer under a letter.
    """
    sizes = {}
    for item in text.split(","):
        name, _, number = item.strip().partition("=")
        if not name.isalpha() or not number.isdigit() or int(number) < 1:
            raise ValueError(f"--shape: got {item.strip()!r}, wanted LETTER=NUMBER, as in B=1,T=4096,H=16,K=128,V=128")
        sizes[name] = int(number)
    return sizes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m pallas_kernels.profile",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recurrence", metavar="NAME", help="a recurrence of lineax_seq")
    what.add_argument(
        "--kernel", metavar="MODULE:FUNCTION", help="FUNCTION() returns (function, its arguments' shapes)"
    )
    parser.add_argument("--target", default="v5e", help=f"one or more of {','.join(_targets.TARGETS)} (v5e)")
    parser.add_argument("--shape", default="B=1,T=4096,H=16,K=128,V=128", help="sizes by letter (%(default)s)")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the inputs (%(default)s)"
    )
    parser.add_argument(
        "--pass",
        dest="passes",
        default="forward",
        help="forward, backward (which includes the forward) or both (forward)",
    )
    parser.add_argument("--chunk-size", type=int, help="tokens of a chunk (the recurrence's own choice)")
    parser.add_argument("--implementation", default="mosaic_tpu", choices=("mosaic_tpu", "xla"), help="(mosaic_tpu)")
    parser.add_argument("--against", metavar="WHAT", help="xla, another MODULE:FUNCTION, or a FILE.json written before")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports; - is the terminal, alone")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the units' use over the schedules")
    parser.add_argument("--trace", type=Path, metavar="FOLDER", help="keep a profile of the device's own (needs a TPU)")
    parser.add_argument(
        "--tune", action="store_true", help="search block sizes by predicted cost and keep the best ones"
    )
    return parser


def _targets_of(options: argparse.Namespace) -> list[str]:
    return [_targets.target(name).name for name in options.target.split(",")]


def _sizes_of(options: argparse.Namespace) -> dict[str, int]:
    """The sizes of the recurrence, both checked."""
    names, sizes = _programs.operators(), parse_shape(options.shape)
    if options.recurrence not in names:
        hint = _targets.nearest(options.recurrence, names)
        raise ValueError(f"--recurrence: got {options.recurrence!r}{hint} wanted one of {', '.join(sorted(names))}")
    missing = _programs.letters(options.recurrence) - {"HV", "NH", *sizes}
    if missing:
        raise ValueError(f"--shape: {options.shape} lacks {', '.join(sorted(missing))} of {options.recurrence}")
    return sizes


def _jobs(options: argparse.Namespace, implementation: str, kernel: str | None) -> list[Job]:
    targets = _targets_of(options)
    if kernel is not None:
        example = _programs.resolve(kernel)()
        if not (isinstance(example, tuple) and len(example) == 2 and callable(example[0])):
            raise ValueError(f"kernel: {kernel}() returned {type(example).__name__}, wanted (function, arguments)")
        return [Job(kernel, example[0], tuple(example[1]), (1, "call"), name) for name in targets]
    names, sizes = _programs.operators(), _sizes_of(options)
    if unknown := set(options.passes.split(",")) - set(_programs.PASSES):
        raise ValueError(f"--pass: got {sorted(unknown)}, wanted {' or '.join(_programs.PASSES)}, or both with a comma")
    jobs = []
    for target in targets:
        for passed in options.passes.split(","):
            backward = passed == "backward"
            fn, args = _programs.recurrence(
                options.recurrence, implementation, sizes, options.dtype, options.chunk_size, backward
            )
            title = f"{options.recurrence} {'forward+backward' if backward else 'forward'}, {implementation}"
            per = _programs.token_heads(sizes, names[options.recurrence].recurrence.has_heads)
            jobs.append(Job(title, fn, args, per, target))
    return jobs


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _compiled(jobs: Sequence[Job]) -> list[_aot.Compiled]:
    done = []
    results = _aot.compile_all([(job.fn, job.args, job.target) for job in jobs])
    for number, job in enumerate(jobs, 1):
        _say(f"compiling {number}/{len(jobs)}: {job.title} for {job.target}")
        result = next(results)
        if isinstance(result, _aot.CompileError):
            raise result
        done.append(result)
    return done


def _measured(job: Job, found: Report, trace: Path | None) -> Report:
    folder = trace / f"{job.title}-{job.target}".replace(" ", "_") if trace else None
    return dataclasses.replace(found, measured_ms=_measure.measure(job.fn, job.args, trace=folder))


def write(path: Path, text: str) -> None:
    """The whole file or none of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, "utf-8")
    part.replace(path)


def _against(options: argparse.Namespace) -> list[Report] | None:
    if options.against is None:
        return None
    if options.against.endswith(".json"):
        path = Path(options.against)
        if not path.is_file():
            raise ValueError(f"--against: no file {path}, wanted one that --json wrote")
        return [Report.from_json(one) for one in json.loads(path.read_text("utf-8"))]
    kernel = None if options.against == "xla" else options.against
    if kernel is None and options.kernel:
        raise ValueError("--against xla needs --recurrence; with --kernel name another MODULE:FUNCTION or a FILE.json")
    jobs = _jobs(options, "xla", kernel)
    return [report(job.title, c, job.per) for job, c in zip(jobs, _compiled(jobs), strict=True)]


def _run(options: argparse.Namespace) -> None:
    _aot.require_compiler()
    here = _measure.tpu_here()
    if not here:
        if options.trace:
            raise ValueError("--trace: this machine has no TPU to trace; leave it out for the predicted cost")
        import jax

        jax.config.update("jax_platforms", "cpu")  # before anything looks for a device
    if options.tune:
        if not options.recurrence:
            raise ValueError("--tune: searches the block sizes of a recurrence's kernel, wanted --recurrence")
        for target in _targets_of(options):
            for row in _tune.tune(
                options.recurrence,
                target,
                _sizes_of(options),
                options.dtype,
                chunk_size=options.chunk_size,
                backward="backward" in options.passes,
                say=_say,
            ):
                print(json.dumps(row))
        return
    others = _against(options)
    jobs = _jobs(options, options.implementation, options.kernel)
    compiled = _compiled(jobs)
    reports = [report(job.title, c, job.per) for job, c in zip(jobs, compiled, strict=True)]
    if here:
        reports = [_measured(job, found, options.trace) for job, found in zip(jobs, reports, strict=True)]
    text = json.dumps([one.to_json() for one in reports], indent=1)
    if options.json and str(options.json) == "-":
        print(text)
    else:
        print("\n\n".join(one.table() for one in reports))
    if options.json and str(options.json) != "-":
        write(options.json, text)
    if options.picture:
        _picture.draw(compiled, reports, options.picture)
    if others is not None:
        if len(others) != len(reports):
            raise ValueError(f"--against: {len(others)} reports, wanted {len(reports)}: the same targets and passes")
        for new, old in zip(reports, others, strict=True):
            print(f"\nagainst {old.title} on {old.target} (ratio: theirs over ours)\n{compare(new, old)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (ValueError, NotImplementedError, ModuleNotFoundError, _aot.CompileError) as problem:
        _say(f"error: {problem}")
        return 1
    return 0


if __name__ == "__main__":
    # the name under which the compiler's process finds what this module defines
    from pallas_kernels import profile as _profile

    sys.exit(_profile.main())
