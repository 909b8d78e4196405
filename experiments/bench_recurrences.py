"""How long does every recurrence in every form compile and run on this machine, beside softmax attention and peers?

Command: `python -m experiments.bench_recurrences` (`make bench`); `--help` lists recurrences, lengths and shapes;
`--compile-only --lengths 2048` takes minutes. Each candidate first has to agree with our token scan; then all
candidates of a recurrence and length take turns, and the minimum over rounds and sweeps counts, so that a noisy machine
disturbs them alike. Results: a table, one JSON line per candidate, length and pass, and a plot of time over T.
Compiling is all from the function to its program, traced anew and with no cache on disk: seconds of the clock and of
the processor. For gradients, "+100 runs" is the clock's seconds until a hundredth result is there.

Expected: forward the chunk form is 1.6 to 3 times as fast as the token scan for recurrences with a matrix state,
forward+backward nearly 10 times and more (`mamba` 2); softmax attention falls behind before T = 512
(`gated_delta_product` before 2,048).
Measured: `experiments/measured/bench_recurrences.jsonl`; two cores of an AMD EPYC (Zen 5), jax 0.12.0.1.
"""

import dataclasses
import importlib.util
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import numpy as np
import tqdm
import tyro

import lineax_seq as ls

AGREEMENT = 1e-3  # relative rms against our scan that a candidate must reach to be timed
LEAST = ("milliseconds", "compile_s", "compile_cpu_s")  # measured: the least of all sweeps counts


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What to time."""

    recurrences: tuple[str, ...] = tuple(ls.RECURRENCES)
    """Names of the registry."""
    lengths: tuple[int, ...] = (512, 2048, 8192, 32768)
    """T, in tokens."""
    batch: int = 1
    heads: int = 4
    key_dim: int = 128
    """K; vector recurrences get heads * key_dim channels."""
    value_dim: int = 128
    forms: tuple[Literal["scan", "chunk"], ...] = ("scan", "chunk")
    passes: tuple[Literal["forward", "forward+backward"], ...] = ("forward", "forward+backward")
    chunk_sizes: tuple[int, ...] = ()
    """C of the chunk form; empty takes each recurrence's default."""
    rounds: int = 5
    """Turns that every candidate gets in a sweep; the minimum counts."""
    sweeps: int = 1
    """Times that all is measured from first to last: a machine that shares its cores is slow for minutes at a time."""
    scan_limit: int = 8192
    """Longest T for softmax attention, and for the backward pass of token scans, which keeps every state."""
    softmax: bool = True
    compile_only: bool = False
    """Compile every candidate once a sweep, and neither check nor run any."""
    peers_path: str = ""
    """Folder with packages to compare with, if they are not in the environment."""
    out: str = "runs/bench"
    """Folder for results.jsonl and time_over_length.png."""


# ---- the same recurrences in other JAX packages, where they are installed
# `pip install --no-deps --ignore-requires-python --target FOLDER jax-linear-attention equinox deltanet-tpu mamba2-jax`
# and `--peers-path FOLDER` bring those known here. Each builder gives `fn(**arguments) -> o` on our arguments.


def _jla(kind: str, rename: Callable[[dict], tuple[tuple, dict]]) -> list:
    """Its chunk form and its token scan."""

    def builder(impl: str):
        def build():
            from jla import ops

            def fn(**a):
                args, kwargs = rename(a)
                return ops.linear_attention(kind, *args, impl=impl, output_final_state=True, **kwargs)[0]

            return fn

        return build

    return [
        ("jax-linear-attention", "jla", builder("chunked")),
        ("jax-linear-attention scan", "jla", builder("reference")),
    ]


def _qkv(*names: str) -> Callable[[dict], tuple[tuple, dict]]:
    return lambda a: ((a["q"], a["k"], a["v"]), {name: a[name] for name in names})


def _ssd_of_jla(a: dict) -> tuple[tuple, dict]:
    return (a["C"], a["B"], a["dt"][..., None] * a["x"]), {"g": a["dt"] * a["A"], "scale": 1.0}


def _deltanet_tpu(function: str, *names: str) -> Callable:
    def build():
        import deltanet_tpu

        call = getattr(deltanet_tpu, function)

        def fn(**a):
            out = call(a["q"], a["k"], a["v"], *(a[name] for name in names), precision="fp32", fallback_scan=True)
            return out[0] if isinstance(out, tuple) else out

        return fn

    return build


def _mamba2_jax():
    import jax.numpy as jnp
    from mamba2_jax.modeling import ssd_forward

    def fn(**a):
        heads = a["dt"].shape[-1]
        dt = jnp.log(jnp.expm1(a["dt"]))  # it applies the softplus itself
        zeros = jnp.zeros(heads)
        return ssd_forward(a["x"], dt, a["A"], a["B"], a["C"], 256, zeros, zeros, 0.0, float("inf"))[0]

    return fn


# our name -> (peer, its module, builder)
PEERS = {
    "simple_gla": _jla("simple_gla", _qkv("g")),
    "ssd": [*_jla("simple_gla", _ssd_of_jla), ("mamba2-jax", "mamba2_jax", _mamba2_jax)],
    "gla": [*_jla("gla", _qkv("g")), ("deltanet-tpu", "deltanet_tpu", _deltanet_tpu("chunk_gla", "g"))],
    "delta_rule": _jla("deltanet", _qkv("beta")),
    "gated_delta_rule": [
        *_jla("gated_deltanet", _qkv("g", "beta")),
        ("deltanet-tpu", "deltanet_tpu", _deltanet_tpu("chunk_gdn", "g", "beta")),
    ],
    "kda": [
        *_jla("kda", _qkv("g", "beta")),
        ("deltanet-tpu", "deltanet_tpu", _deltanet_tpu("chunk_kda", "g", "beta")),
    ],
    "gdn2": _jla("gdn2", _qkv("g", "b", "w")),
}


def installed_peers(name: str) -> dict[str, Callable]:
    """peer -> `fn(**arguments) -> o`, for the peers of recurrence `name` that can be imported."""
    return {
        peer: build() for peer, module, build in PEERS.get(name, ()) if importlib.util.find_spec(module) is not None
    }


# ---- timing


def candidates(name: str, config: Benchmark) -> dict[str, Callable]:
    """label -> fn(**arguments) -> o."""
    operator = ls.RECURRENCES[name]
    found = {}
    for form in config.forms:
        for size in (config.chunk_sizes or (None,)) if form == "chunk" else (None,):
            label = form if size is None else f"{form} C={size}"
            found[label] = lambda form=form, size=size, **a: operator(**a, form=form, chunk_size=size)[0]
    return found | installed_peers(name)


def peak_gflops(rounds: int = 20) -> float:
    """The best rate of float32 products of 1024 x 1024 here: what there is to be had."""
    a = jax.random.normal(jax.random.key(0), (1024, 1024))
    run = jax.jit(lambda a: a @ a).lower(a).compile()
    return 2 * 1024**3 / minima({"product": lambda: run(a)}, rounds)["product"] / 1e9


def arithmetic(name: str, config: Benchmark, length: int, chunk_size: int = 64) -> float | None:
    """GFLOP of a forward pass's matrix products, for families whose chunk form is the textbook one."""
    K, V, C = config.key_dim, config.value_dim, chunk_size
    decays = 2 * C * (K + V) + 4 * K * V  # scores, scores on values, reading and writing the state
    delta = 2 * C * (2 * K + (K + V) + V) + 6 * K * V  # two scores, W and U, scores on values; W S besides
    kinds = dict.fromkeys(("linear_attention", "retention", "simple_gla", "ssd", "gla", "hgrn2"), decays)
    kinds |= dict.fromkeys(("delta_rule", "gated_delta_rule", "kda", "gdn2"), delta)
    return kinds[name] * config.batch * config.heads * length / 1e9 if name in kinds else None


def softmax_attention(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def compiled(fn: Callable, args: dict, which: str) -> tuple[Callable, dict[str, float]]:
    """The program with its arguments, and the seconds that it took to trace, lower and compile it."""
    outputs, loss = lambda args: fn(**args), lambda args: fn(**args).sum()
    jax.clear_caches()  # what others traced; and Linux gives a process 65,530 memory maps, programs take some each
    clock, processor = time.perf_counter(), time.process_time()
    run = jax.jit(outputs if which == "forward" else jax.grad(loss)).lower(args).compile()
    seconds = dict(compile_s=time.perf_counter() - clock, compile_cpu_s=time.process_time() - processor)
    return lambda: run(args), seconds


def minima(runs: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Seconds: the least over `rounds`, all candidates taking turns.

    A turn is two calls, of which the second is timed: the first has to get the memory back from the system that a large
    candidate before it gave up, which costs more than many a computation.
    """
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for label, run in runs.items():
            jax.block_until_ready(run())
            start = time.perf_counter()
            jax.block_until_ready(run())
            best[label] = min(best[label], time.perf_counter() - start)
    return best


def agrees(fn: Callable, args: dict, want: np.ndarray) -> float:
    got = np.asarray(jax.jit(fn)(**args), np.float64)
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


class Group:
    """The candidates of one recurrence and length, checked and compiled."""

    def __init__(self, name: str, length: int, config: Benchmark):
        self.name, self.length, self.config = name, length, config
        args = self.arguments(length)
        found, self.errors = self.checked(candidates(name, config))
        softmax = ls.linear_attention.example(jax.random.key(1), T=length, **self.sizes)
        self.programs: dict[str, dict[str, tuple[Callable, dict[str, float]]]] = {}
        for which in config.passes:
            too_long = which != "forward" and length > config.scan_limit
            fns = {label: (fn, args) for label, fn in found.items() if not (too_long and label.endswith("scan"))}
            if config.softmax and length <= config.scan_limit:
                fns["softmax attention"] = softmax_attention, softmax
            self.programs[which] = {label: compiled(*given, which) for label, given in fns.items()}

    @property
    def sizes(self) -> dict[str, int]:
        config, width = self.config, self.config.heads * self.config.key_dim
        sizes = dict(B=config.batch, H=config.heads, HV=config.heads, K=config.key_dim, V=config.value_dim, D=width)
        levels = (self.length - 1).bit_length() + 1  # which the short check has too
        return sizes | dict(N=16, NH=2, L=levels)

    def arguments(self, length: int) -> dict:
        operator = ls.RECURRENCES[self.name]
        drawn = operator.example(jax.random.key(0), T=length, **self.sizes)
        return {name: drawn[name] for name, spec in operator.arguments.items() if not spec.optional}

    def checked(self, found: dict[str, Callable]) -> tuple[dict[str, Callable], dict[str, float]]:
        """Those that agree with the token scan, and by how much all differ from it."""
        short = self.arguments(min(self.length, 512))
        if self.config.compile_only:
            for fn in found.values():
                jax.eval_shape(lambda a, fn=fn: fn(**a), short)  # imports what it uses
            return found, {}
        want = np.asarray(jax.jit(lambda a: ls.RECURRENCES[self.name](**a, form="scan")[0])(short), np.float64)
        errors = {label: agrees(fn, short, want) for label, fn in found.items()}
        for label in [label for label, error in errors.items() if not error < AGREEMENT]:
            print(f"{self.name} {label}: differs from the scan by {errors[label]:.1e}; not timed", file=sys.stderr)
        return {label: fn for label, fn in found.items() if errors[label] < AGREEMENT}, errors

    def rows(self) -> Iterator[dict]:
        """One per candidate and pass."""
        for which, programs in self.programs.items():
            runs = {} if self.config.compile_only else {label: run for label, (run, _) in programs.items()}
            times = minima(runs, self.config.rounds)
            for label, (_, compiling) in programs.items():
                row = dict(recurrence=self.name, length=self.length, which=which, candidate=label, **compiling)
                if label in times:
                    row |= dict(milliseconds=times[label] * 1e3, error=self.errors.get(label))
                yield row | dict(jax=jax.__version__)


def bench(config: Benchmark, path: pathlib.Path) -> list[dict]:
    """What is measured so far stands in `path` after every group."""
    peak, best, rows = 0.0, {}, []
    named = [(name, length) for name in config.recurrences for length in config.lengths]
    with tqdm.tqdm([*named] * config.sweeps, unit="group") as progress:
        for number, (name, length) in enumerate(progress):
            progress.set_postfix_str(f"{name} T={length}")
            if number % len(named) == 0 and not config.compile_only:
                peak = max(peak, peak_gflops())
                progress.write(f"1024 x 1024 products run at {peak:.0f} GFLOP/s here")
            for row in Group(name, length, config).rows():
                key = tuple(row[part] for part in ("recurrence", "length", "which", "candidate"))
                before = best.get(key, row)
                best[key] = row | {part: min(row[part], before[part]) for part in LEAST if part in row}
            part = path.with_name(path.name + ".part")
            rows = [derived(row, config, peak) for row in best.values()]
            part.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
            part.replace(path)
            for which in config.passes:
                own = [row for row in rows if (row["recurrence"], row["length"], row["which"]) == (name, length, which)]
                if own:
                    progress.write(table(own))
    return rows


def derived(row: dict, config: Benchmark, peak: float) -> dict:
    """The row with the wait for 100 gradients, or with the part of the peak that a chunk form reaches."""
    if "milliseconds" not in row:
        return row
    more, work = dict(peak_gflops=peak), arithmetic(row["recurrence"], config, row["length"])
    if row["which"] != "forward":
        more["compile_and_100_runs_s"] = row["compile_s"] + row["milliseconds"] / 10
    elif work and row["candidate"].startswith("chunk"):
        more["fraction_of_peak"] = work / row["milliseconds"] * 1e3 / peak
    return row | more


def table(rows: list[dict]) -> str:
    """One recurrence, length and pass: a line per candidate, times beside their ratio to our fastest chunk form's."""

    def cells(field: str, digits: int) -> list[str]:
        ours = min((row[field] for row in rows if row["candidate"].startswith("chunk") and field in row), default=None)
        ratio = lambda x: f" ({x / ours:.2f}x)" if ours else ""  # noqa: E731
        return [f"{row[field]:.{digits}f}{ratio(row[field])}" if field in row else "" for row in rows]

    columns = {
        f"{rows[0]['recurrence']} T={rows[0]['length']} {rows[0]['which']}": [row["candidate"] for row in rows],
        "run, ms": cells("milliseconds", 1),
        "compile, s": cells("compile_s", 2),
        "of processor": cells("compile_cpu_s", 2),
        "+100 runs, s": cells("compile_and_100_runs_s", 2),
        "of peak": [f"{row['fraction_of_peak']:.0%}" if "fraction_of_peak" in row else "" for row in rows],
    }
    filled = [[title, *column] for title, column in columns.items() if any(column)]
    lines = [f"{first:48s}" + "".join(f"{cell:17s}" for cell in rest) for first, *rest in zip(*filled, strict=True)]
    return "\n".join(line.rstrip() for line in lines)


def plot(rows: list[dict], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    passes = sorted({row["which"] for row in rows})
    figure, axes = pyplot.subplots(1, len(passes), figsize=(5.5 * len(passes) + 2.5, 5), squeeze=False)
    for axis, which in zip(axes[0], passes, strict=True):
        lines: dict[str, list] = {}
        for row in rows:
            soft = row["candidate"].startswith("soft")
            if row["which"] == which and (soft or row["candidate"].startswith("chunk")):
                line = lines.setdefault("softmax attention" if soft else row["recurrence"], [])
                line.append((row["length"], row["milliseconds"]))
        for number, (label, points) in enumerate(lines.items()):
            least = {length: min(ms for t, ms in points if t == length) for length, _ in points}
            style = dict(color="black", linewidth=2.5) if label == "softmax attention" else {}
            style |= dict(marker="osv^D"[number // 10], linestyle=("-", "--", ":")[number // 10 % 3])  # ten colours
            axis.plot(list(least), list(least.values()), label=label, **style)
        axis.set(xscale="log", yscale="log", xlabel="T (tokens)", ylabel="milliseconds (minimum)", title=which)
        axis.grid(True, which="both", alpha=0.3)
    axes[0][-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(config: Benchmark) -> None:
    unknown = [name for name in config.recurrences if name not in ls.RECURRENCES]
    if unknown:
        raise SystemExit(f"bench_recurrences: unknown recurrences {unknown}; known are {', '.join(ls.RECURRENCES)}")
    if min(config.rounds, config.sweeps) < 1:
        raise SystemExit(f"bench_recurrences: rounds={config.rounds}, sweeps={config.sweeps}; both are at least 1")
    if config.peers_path:
        sys.path.append(config.peers_path)
    out = pathlib.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = bench(config, out / "results.jsonl")
    print(f"wrote {out / 'results.jsonl'}")
    if not config.compile_only:
        plot(rows, out / "time_over_length.png")
        print(f"wrote {out / 'time_over_length.png'}")


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)  # on disk: what compiling takes is measured
    main(tyro.cli(Benchmark, description=__doc__))
