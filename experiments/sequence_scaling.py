"""What does sequence parallelism cost, from 2 to 64 devices and from 16k to 2M tokens, and who wins where?

Command: `python -m experiments.sequence_scaling`; `--help` lists devices, lengths, methods and the constants of the
model. Hardware: none but a CPU. One layer, forward and backward, is compiled ahead of time for a slice of P TPU v5e
chips (needs libtpu; 5 to 20 s a program, `results.jsonl` is added to and a later run goes on from there), and
beside it timed on 8 simulated devices.

From the compiled programs: how many collectives run (those in loops times the loop's trips), the bytes each device
receives, the temporary memory. From the model, stated in `predict`: time = arithmetic at a fixed share of the peak plus
what of the messages it cannot hide, messages at a fixed latency and bandwidth.

Expected: the recurrences' bytes do not depend on T, those of ring attention and Ulysses grow with it. LASP-2 beats
LASP-1 beats ring attention at 2048k tokens on 64 devices (Sun et al. 2025, arXiv:2502.07563: +15.2% and +36.6%
throughput of a 1B model on A100s).

Measured (jax 0.12, `simple_gla`, 16 heads, K = V = 128, bfloat16; P=64 T=2M, forward and backward):

    method           collectives               a device receives   predicted
    lasp-2           2 all-gathers             128 MiB             4.3 ms
    lasp-1           126 permutes              126 MiB             4.5 ms
    tree             12 permutes               12 MiB, 63 in turn  4.3 ms
    all-scan         156 permutes              10 MiB              2.3 ms, of which 2.3 arithmetic
    ring attention   380 permutes              64768 MiB           25 s

The same bytes at 16k and at 2M tokens, and from 8 to 64 devices in proportion to P. The published direction holds:
lasp-2 is ahead of lasp-1, by 6% of the layer. On its size the model says otherwise: with the 60M parameters of a whole
block it is 0.2%, as 32k tokens a chip are 150 ms of other arithmetic. 2 us a hop is what a torus takes; 126 between
hosts would cost more. Ring attention is behind by three orders, not by a third: the model counts softmax's T^2
arithmetic, and what the published baseline computes is not known here. And on 64 chips the all-gather is no longer the
best: the pipelined all-scan moves a tenth of the bytes and hides behind the scores. 2M tokens on 8 chips do not fit in
XLA's chunk form: 27 GiB of temporaries, for 16.

Eight simulated devices on two cores (float32, 2 heads of 64, T=8192): lasp-2 30 ms, lasp-1 39, tree 33, all-scan 33,
ring attention 1434, Ulysses (8 heads of 16) 2639. They share memory: arithmetic counts there, messages hardly do.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from tqdm import tqdm

import lineax_seq as ls
from lineax_seq.parallel.cost import Link

RECURRENT = {"lasp-2": "all_gather", "lasp-1": "ring", "tree": "tree", "all-scan": "all_scan"}
ATTENTION = {"ring attention": "ring", "ulysses": "ulysses"}
PUBLISHED = {"lasp-1": 15.2, "ring attention": 36.6}  # percent by which LASP-2 is faster


@dataclasses.dataclass(frozen=True)
class Scaling:
    """What to compile and what to assume."""

    recurrence: str = "simple_gla"
    """A name of the registry with heads; attention layers get the same heads."""
    methods: tuple[str, ...] = (*RECURRENT, *ATTENTION)
    devices: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    """P, devices on the sequence axis."""
    lengths: tuple[int, ...] = (1 << 14, 1 << 17, 1 << 21)
    """T, tokens of the whole sequence."""
    heads: int = 16
    head_dim: int = 128
    """K = V."""
    generation: str = "v5e"
    peak: float = 197e12
    """FLOP per second of a chip, bfloat16."""
    efficiency: float = 0.4
    """The share of it that a layer reaches."""
    latency: float = Link.latency
    """Seconds a message takes however short."""
    bandwidth: float = Link.bandwidth
    """Bytes per second of a link in one direction."""
    block_parameters: int = 60_000_000
    """Parameters of the rest of a block (projections, MLP; a 1B model), for the comparison with the published run."""
    simulate: tuple[int, ...] = (1 << 12, 1 << 13)
    """T of the runs on 8 simulated devices; they take 2 heads of 64."""
    out: str = "runs/sequence_scaling"
    """Folder for results.jsonl and the plots."""


# ---- programs


def program(config: Scaling, method: str, mesh: Mesh, length: int, heads: int, dim: int, dtype):
    """`(function of global arrays -> gradients, arguments' shapes)` of one layer."""
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(None, "seq")))  # noqa: E731
    sizes = dict(B=1, T=length, H=heads, HV=heads, K=dim, V=dim)
    if method in RECURRENT:
        operator = ls.RECURRENCES[config.recurrence]
        args = jax.eval_shape(lambda: operator.example(jax.random.key(0), dtype=dtype, **sizes))
        args = {name: place(x) if operator.arguments[name].per_token else x for name, x in args.items()}
        call = ls.parallel.sequence_parallel(operator, mesh, strategy=RECURRENT[method])
        layer = lambda args: call(**args, implementation="xla")[0]  # noqa: E731
    else:
        args = {name: place(jax.ShapeDtypeStruct((1, length, heads, dim), dtype)) for name in "qkv"}
        shard = lambda q, k, v: ls.parallel.attention(q, k, v, axis_name="seq", strategy=ATTENTION[method])  # noqa: E731
        sharded = ls.parallel.over_time(shard, mesh)
        layer = lambda args: sharded(args["q"], args["k"], args["v"])  # noqa: E731
    return jax.grad(lambda args: layer(args).astype(jnp.float32).sum()), args


def collectives(text: str) -> dict[str, dict[str, float]]:
    """kind -> how often it runs and the bytes of its results on one device, loops counted by their trips."""
    bodies, loops, name = {}, {}, ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = "ENTRY" if line.startswith("ENTRY") else head.group(1)
            bodies[name] = []
        elif name:
            bodies[name].append(line)
            if loop := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                loops[loop.group(2)] = (name, loop.group(1))

    def runs(name: str) -> int:
        """How often a computation runs: its loop ends where the counter reaches the condition's constant."""
        if name not in loops:
            return 1
        outer, condition = loops[name]
        (limit,) = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(bodies[condition]))
        return int(limit) * runs(outer)

    found: dict[str, dict[str, float]] = {}
    seen, fused = set(), set(re.findall(r"calls=%?([\w.\-]+)", text))
    for name, lines in bodies.items():
        for line in lines:
            kinds = r"(all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter)(?:-start)?\("
            match = re.search(rf"= \(?(\w+)\[([\d,]*)\].*? {kinds}.*?channel_id=(\d+)", line)
            if not match or (name in fused and match.groups()[2:] in seen):  # an asynchronous one is in several fusions
                continue
            seen.add(match.groups()[2:])
            size = 1
            for dim in match.group(2).split(","):
                size *= int(dim or 1)
            size *= {"f32": 4, "bf16": 2, "s32": 4, "pred": 1, "f64": 8, "u32": 4}[match.group(1)]
            if size > 4:  # not the loss
                entry = found.setdefault(match.group(3), {"count": 0, "bytes": 0})
                entry["count"] += runs(name)
                entry["bytes"] += runs(name) * size
    return found


@functools.cache
def slice_of(generation: str, count: int) -> Mesh:
    """A mesh of the chips of a whole slice, as square as it can be: what the TPU compiler wants."""
    from jax.experimental import topologies

    rows = 1 << (count.bit_length() - 1) // 2
    topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{generation}:{rows}x{count // rows}")
    return Mesh(topology.devices, ("seq",), axis_types=(AxisType.Auto,))


def compile_ahead(config: Scaling, method: str, count: int, length: int) -> dict:
    mesh = slice_of(config.generation, count)
    step, args = program(config, method, mesh, length, config.heads, config.head_dim, jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(step).lower(args)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"temporaries \(([\d.]+)G\) exceeds", str(error))
        if needed is None:
            raise
        return {"collectives": None, "temp_bytes": float(needed.group(1)) * 2**30}  # too much for a chip
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None, "the TPU compiler tells both"
    return {"collectives": collectives(text), "temp_bytes": memory.temp_size_in_bytes}


# ---- the model


def flops(config: Scaling, method: str, count: int, length: int) -> tuple[float, float]:
    """Forward and backward FLOP of the slowest device, and those that no message has to wait for."""
    C, K, V, n, heads = 64, config.head_dim, config.head_dim, length / count, config.heads
    if method == "ring attention":  # shards in order: the last device attends to everything
        return 3.5 * 4 * K * n * (length - n / 2) * heads, 0
    if method == "ulysses":
        return 3.5 * 4 * K * length * length / 2 * heads / count, 0
    if ls.RECURRENCES[config.recurrence].recurrence.monoid.probe is None:
        total = 2 * C * (K + V) + 4 * K * V + 6 * C * K + 4 * C * V + 10 * K * V
        return total * n * heads, (2 * C * (K + V) + 4 * C * (K + V)) * n * heads  # scores and what follows from them
    total = 6 * C * K + 4 * C * V + 6 * K * V + 12 * C * K + 10 * C * V + 16 * K * V
    return (total + 8 * K * V + 4 * K * K) * n * heads, 2 * C * (K + V) * n * heads


def predict(config: Scaling, row: dict) -> dict:
    """Seconds: arithmetic, messages, and the layer with what of the messages the arithmetic cannot hide."""
    total, free = (f / (config.peak * config.efficiency) for f in flops(config, row["method"], row["P"], row["T"]))
    share = (row["P"] - 1) / row["P"]
    factor = {"all-gather": share, "all-to-all": share, "reduce-scatter": share, "all-reduce": 2 * share}
    if row["method"] == "tree":  # on a ring of links a message over d chips keeps d links busy
        factor["collective-permute"] = (row["P"] - 1) / math.ceil(math.log2(row["P"]))
    messages = sum(
        c["count"] * config.latency + factor.get(kind, 1) * c["bytes"] / config.bandwidth
        for kind, c in row["collectives"].items()
    )
    hidden = total if row["method"] == "ring attention" else free  # its hops run beside the products of the last one
    return {"arithmetic": total, "messages": messages, "seconds": total + max(0.0, messages - hidden)}


def compare(config: Scaling, rows: list[dict]) -> None:
    """LASP-2 against the others as published: throughput of whole blocks at the most devices and tokens."""
    largest = max((row["P"], row["T"]) for row in rows)
    at = {row["method"]: predict(config, row)["seconds"] for row in rows if (row["P"], row["T"]) == largest}
    rest = 6 * config.block_parameters * largest[1] / largest[0] / (config.peak * config.efficiency)
    for method, seconds in at.items():
        if "lasp-2" not in at or method == "lasp-2":
            continue
        layer, block = (100 * ((seconds + r) / (at["lasp-2"] + r) - 1) for r in (0.0, rest))
        published = f", published {PUBLISHED[method]:+.1f}%" if method in PUBLISHED else ""
        print(
            f"P={largest[0]} T={largest[1]}: lasp-2 over {method}: layer {layer:+.1f}%, block {block:+.1f}%{published}"
        )


# ---- simulated devices


def simulated(config: Scaling) -> list[dict]:
    """Milliseconds of a step on 8 devices that share this machine's cores: the arithmetic of all, and no real link."""
    mesh = jax.make_mesh((8,), ("seq",), devices=jax.devices("cpu")[:8], axis_types=(AxisType.Auto,))
    rows = []
    for length in config.simulate:
        steps = {}
        for method in config.methods:
            heads = 8 if method == "ulysses" else 2
            step, shapes = program(config, method, mesh, length, heads, 64 * 2 // heads, jnp.float32)
            keys = jax.random.split(jax.random.key(0), len(shapes))
            args = {n: jax.random.normal(k, x.shape) / 8 for k, (n, x) in zip(keys, shapes.items(), strict=True)}
            if "g" in args:
                args["g"] = -jnp.abs(args["g"])
            steps[method] = jax.jit(step), args
        best = dict.fromkeys(steps, float("inf"))
        for turn in range(4):  # the first one compiles
            for method, (step, args) in steps.items():
                start = time.perf_counter()
                jax.block_until_ready(step(args))
                if turn:
                    best[method] = min(best[method], time.perf_counter() - start)
        rows += [{"method": m, "P": 8, "T": length, "milliseconds": 1e3 * s} for m, s in best.items()]
        print(f"simulated T={length}: " + "  ".join(f"{m} {1e3 * s:.0f} ms" for m, s in best.items()), flush=True)
    return rows


# ---- output


def plot(config: Scaling, rows: list[dict], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    largest = max(row["P"] for row in rows)
    figure, axes = pyplot.subplots(1, 4, figsize=(20, 4.5))
    received = lambda row: sum(c["bytes"] for c in row["collectives"].values())  # noqa: E731
    tokens = lambda row: row["T"] / predict(config, row)["seconds"]  # noqa: E731
    views = [
        ("T", "P", largest, received, "bytes a device receives"),
        ("T", "P", largest, lambda row: row["temp_bytes"], "temporary bytes"),
        ("T", "P", largest, tokens, "predicted tokens per second"),
        ("P", "T", max(row["T"] for row in rows), tokens, "predicted tokens per second"),
    ]
    for axis, (along, fixed, value, measure, label) in zip(axes, views, strict=True):
        for method in config.methods:
            points = sorted((r[along], measure(r)) for r in rows if r["method"] == method and r[fixed] == value)
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=method)
        axis.set(xscale="log", yscale="log", xlabel=along, ylabel=label, title=f"{fixed}={value}")
        axis.grid(True, which="both", alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(config: Scaling) -> None:
    unknown = [m for m in config.methods if m not in RECURRENT | ATTENTION]
    if unknown or config.recurrence not in ls.RECURRENCES:
        known = f"{', '.join(RECURRENT | ATTENTION)}; {', '.join(ls.RECURRENCES)}"
        raise SystemExit(f"sequence_scaling: unknown {unknown or config.recurrence}; known are {known}")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask
    jax.config.update("jax_num_cpu_devices", 8)
    out = pathlib.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    times = simulated(config) if config.simulate else []

    results, key = out / "results.jsonl", ("recurrence", "heads", "head_dim", "method", "P", "T")
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    fixed = {"recurrence": config.recurrence, "heads": config.heads, "head_dim": config.head_dim}
    wanted: list[dict[str, Any]] = [
        fixed | {"method": m, "P": count, "T": length}
        for count in config.devices
        for length in config.lengths
        for m in config.methods
        if m != "ulysses" or config.heads % count == 0
    ]
    done = {tuple(row[k] for k in key) for row in rows}
    todo = [w for w in wanted if tuple(w[k] for k in key) not in done]
    for row in tqdm(todo, desc="compiling", unit="program", disable=not todo):
        row |= compile_ahead(config, row["method"], row["P"], row["T"])
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
    names = {tuple(w[k] for k in key) for w in wanted}
    rows = [row for row in rows if tuple(row[k] for k in key) in names]
    for row in sorted(rows, key=lambda r: (r["P"], r["T"])):
        label = f"P={row['P']:<3d} T={row['T']:<8d} {row['method']:15s}"
        if row["collectives"] is None:
            print(f"{label} does not fit: {row['temp_bytes'] / 2**20:.0f} MiB of temporaries")
            continue
        count = " ".join(f"{c['count']:.0f} {kind}" for kind, c in row["collectives"].items())
        volume = sum(c["bytes"] for c in row["collectives"].values()) / 2**20
        seconds = predict(config, row)["seconds"]
        print(
            f"{label} {count:34s} {volume:9.1f} MiB  "
            f"temp {row['temp_bytes'] / 2**20:8.0f} MiB  predicted {1e3 * seconds:9.2f} ms"
        )
    rows = [row for row in rows if row["collectives"] is not None]
    compare(config, rows)
    plot(config, rows, out / "scaling.png")
    if times:
        (out / "simulated.json").write_text(json.dumps(times, indent=1))
    print(f"wrote {results} and {out / 'scaling.png'}")


if __name__ == "__main__":
    main(tyro.cli(Scaling, description=__doc__))
