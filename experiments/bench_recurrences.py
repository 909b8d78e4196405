"""How fast is every recurrence in every form on this machine, beside softmax attention and beside peers?

Command: `python -m experiments.bench_recurrences` (`make bench`); `--help` lists recurrences, lengths and shapes.
Each candidate first has to agree with our token scan; then all candidates of a recurrence and length take turns, and
the minimum over the rounds counts, so that a noisy machine disturbs them alike. Results: a table, one JSON line per
measurement, and a plot of time over T.

Expected: the chunk form beats the token scan forward and backward from T = 256 on; softmax attention is ahead for
short sequences and falls behind where its quadratic cost overtakes.
"""

import dataclasses
import importlib.util
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Literal

import jax
import numpy as np
import tyro

import lineax_seq as ls

AGREEMENT = 1e-3  # relative rms against our scan that a candidate must reach to be timed


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
    """Turns that every candidate gets; the minimum counts."""
    scan_limit: int = 8192
    """Longest T for the token scan's backward pass, which keeps every state."""
    softmax: bool = True
    peers_path: str = ""
    """Folder with packages to compare with, if they are not in the environment."""
    out: str = "runs/bench"
    """Folder for results.jsonl and time_over_length.png."""


# ---- the same recurrences in other JAX packages, where they are installed
# `pip install --no-deps --ignore-requires-python --target FOLDER jax-linear-attention equinox deltanet-tpu mamba2-jax`
# and `--peers-path FOLDER` bring those known here. Each builder gives `fn(**arguments) -> o` on our arguments.


def _jla(kind: str, rename: Callable[[dict], tuple[tuple, dict]]) -> Callable:
    def build():
        from jla import ops

        def fn(**a):
            args, kwargs = rename(a)
            return ops.linear_attention(kind, *args, impl="chunked", output_final_state=True, **kwargs)[0]

        return fn

    return build


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
    "simple_gla": [("jax-linear-attention", "jla", _jla("simple_gla", _qkv("g")))],
    "ssd": [
        ("jax-linear-attention", "jla", _jla("simple_gla", _ssd_of_jla)),
        ("mamba2-jax", "mamba2_jax", _mamba2_jax),
    ],
    "gla": [
        ("jax-linear-attention", "jla", _jla("gla", _qkv("g"))),
        ("deltanet-tpu", "deltanet_tpu", _deltanet_tpu("chunk_gla", "g")),
    ],
    "delta_rule": [("jax-linear-attention", "jla", _jla("deltanet", _qkv("beta")))],
    "gated_delta_rule": [
        ("jax-linear-attention", "jla", _jla("gated_deltanet", _qkv("g", "beta"))),
        ("deltanet-tpu", "deltanet_tpu", _deltanet_tpu("chunk_gdn", "g", "beta")),
    ],
    "kda": [
        ("jax-linear-attention", "jla", _jla("kda", _qkv("g", "beta"))),
        ("deltanet-tpu", "deltanet_tpu", _deltanet_tpu("chunk_kda", "g", "beta")),
    ],
}


def installed_peers(name: str) -> dict[str, Callable]:
    """peer -> `fn(**arguments) -> o`, for the peers of recurrence `name` that can be imported."""
    return {
        peer: build() for peer, module, build in PEERS.get(name, ()) if importlib.util.find_spec(module) is not None
    }


# ---- timing


def candidates(name: str, config: Benchmark, length: int) -> dict[str, Callable]:
    """label -> fn(**arguments) -> o."""
    operator = ls.RECURRENCES[name]
    found = {}
    for form in config.forms:
        for size in (config.chunk_sizes or (None,)) if form == "chunk" else (None,):
            label = form if size is None else f"{form} C={size}"
            found[label] = lambda form=form, size=size, **a: operator(**a, form=form, chunk_size=size)[0]
    return found | installed_peers(name)


def softmax_attention(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def compiled(fn: Callable, args: dict, which: str) -> Callable:
    if which == "forward":
        return jax.jit(fn).lower(**args).compile()
    loss = lambda args: fn(**args).sum()  # noqa: E731
    return (lambda run: lambda **args: run(args))(jax.jit(jax.grad(loss)).lower(args).compile())


def minima(runs: dict[str, Callable], args: dict[str, dict], rounds: int) -> dict[str, float]:
    """Seconds: the least over `rounds`, all candidates taking turns."""
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(rounds + 1):  # the first one warms up
        for label, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(**args[label]))
            if turn:
                best[label] = min(best[label], time.perf_counter() - start)
    return best


def agrees(fn: Callable, args: dict, want: np.ndarray) -> float:
    got = np.asarray(jax.jit(fn)(**args), np.float64)
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


def bench(config: Benchmark) -> list[dict]:
    rows = []
    width = config.heads * config.key_dim
    sizes = dict(B=config.batch, H=config.heads, HV=config.heads, K=config.key_dim, V=config.value_dim, D=width, N=16)
    for name in config.recurrences:
        operator = ls.RECURRENCES[name]
        required = [argument for argument, spec in operator.arguments.items() if not spec.optional]
        for length in config.lengths:
            sizes["L"] = (length - 1).bit_length() + 1  # levels of log-linear attention, which its short check shares
            args = operator.example(jax.random.key(0), T=length, **sizes)
            args = {argument: args[argument] for argument in required}  # peers know no others
            found = candidates(name, config, length)
            short = operator.example(jax.random.key(0), T=min(length, 512), **sizes)
            short = {argument: short[argument] for argument in required}
            want = np.asarray(jax.jit(lambda short: operator(**short, form="scan")[0])(short), np.float64)  # noqa: B023
            errors = {label: agrees(fn, short, want) for label, fn in found.items()}
            for label, error in errors.items():
                if not error < AGREEMENT:
                    print(f"{name} {label}: differs from the scan by {error:.1e}; not timed", file=sys.stderr)
                    del found[label]
            for which in config.passes:
                skip = which != "forward" and length > config.scan_limit
                fns = {label: fn for label, fn in found.items() if not (skip and label == "scan")}
                runs = {label: compiled(fn, args, which) for label, fn in fns.items()}
                inputs = dict.fromkeys(runs, args)
                if config.softmax and length <= config.scan_limit:
                    qkv = ls.linear_attention.example(jax.random.key(1), T=length, **sizes)
                    runs["softmax attention"] = compiled(softmax_attention, qkv, which)
                    inputs["softmax attention"] = qkv
                best = minima(runs, inputs, config.rounds)
                for label, seconds in best.items():
                    rows.append(
                        dict(recurrence=name, length=length, which=which, candidate=label, milliseconds=seconds * 1e3)
                        | dict(error=errors.get(label), jax=jax.__version__, device=jax.devices()[0].device_kind)
                    )
                print_group(name, length, which, best)
    return rows


def print_group(name: str, length: int, which: str, best: dict[str, float]) -> None:
    ours = min((s for label, s in best.items() if label.startswith("chunk")), default=min(best.values()))
    line = "  ".join(f"{label} {s * 1e3:.1f} ms ({s / ours:.2f}x)" for label, s in best.items())
    print(f"{name:28s} T={length:<6d} {which:17s} {line}", flush=True)


def plot(rows: list[dict], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    passes = sorted({row["which"] for row in rows})
    figure, axes = pyplot.subplots(1, len(passes), figsize=(6.5 * len(passes), 5), squeeze=False)
    for axis, which in zip(axes[0], passes, strict=True):
        lines: dict[str, list] = {}
        for row in rows:
            if row["which"] == which and (row["candidate"].startswith("chunk") or row["candidate"].startswith("soft")):
                soft = row["candidate"].startswith("soft")
                lines.setdefault("softmax attention" if soft else row["recurrence"], []).append(
                    (row["length"], row["milliseconds"])
                )
        for label, points in lines.items():
            least = {length: min(ms for t, ms in points if t == length) for length, _ in points}
            style = dict(color="black", linewidth=2.5) if label == "softmax attention" else {}
            axis.plot(list(least), list(least.values()), marker="o", label=label, **style)
        axis.set(xscale="log", yscale="log", xlabel="T (tokens)", ylabel="milliseconds (minimum)", title=which)
        axis.grid(True, which="both", alpha=0.3)
    axes[0][-1].legend(fontsize=7, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(config: Benchmark) -> None:
    unknown = [name for name in config.recurrences if name not in ls.RECURRENCES]
    if unknown:
        raise SystemExit(f"bench_recurrences: unknown recurrences {unknown}; known are {', '.join(ls.RECURRENCES)}")
    if config.peers_path:
        sys.path.append(config.peers_path)
    rows = bench(config)
    out = pathlib.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot(rows, out / "time_over_length.png")
    print(f"wrote {out / 'results.jsonl'} and {out / 'time_over_length.png'}")


if __name__ == "__main__":
    main(tyro.cli(Benchmark, description=__doc__))
