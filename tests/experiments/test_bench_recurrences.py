"""The CPU benchmark: what it writes, and that it times nothing that is wrong."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from experiments import bench_recurrences
from experiments.bench_recurrences import Benchmark

TINY = Benchmark(("simple_gla",), (32, 64), heads=1, key_dim=16, value_dim=16, rounds=1, sweeps=2, scan_limit=32)


def test_a_run_leaves_rows_and_a_plot(tmp_path, capsys):
    bench_recurrences.main(dataclasses.replace(TINY, out=str(tmp_path)))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    keys = [tuple(row[part] for part in ("recurrence", "length", "which", "candidate")) for row in rows]
    assert len(keys) == len(set(keys)) and all(row["milliseconds"] > 0 for row in rows)
    timed = {key[1:] for key in keys}
    assert {(32, "forward+backward", "scan"), (64, "forward+backward", "chunk"), (64, "forward", "scan")} <= timed
    assert (64, "forward+backward", "scan") not in timed and (64, "forward", "softmax attention") not in timed
    assert (tmp_path / "time_over_length.png").stat().st_size > 10_000
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "time_over_length.png"}


def test_what_differs_from_the_scan_is_not_timed(monkeypatch, capsys):
    real = bench_recurrences.candidates

    def more(name, config):
        found = real(name, config)
        return found | {"wrong": lambda **a: 1.01 * found["chunk"](**a)}

    monkeypatch.setattr(bench_recurrences, "candidates", more)
    group = bench_recurrences.Group("simple_gla", 64, TINY)
    assert "wrong" not in group.programs["forward"] and "chunk" in group.programs["forward"]
    assert "differs from the scan by 1.0e-02" in capsys.readouterr().err


def test_the_least_of_all_sweeps_counts(tmp_path, monkeypatch):
    """Of running and of compiling, each by itself; and the best peak, whichever sweep saw it."""
    config = dataclasses.replace(TINY, lengths=(32,), forms=("chunk",), softmax=False, sweeps=3)
    seconds = iter([3.0, 4.0, 1.0, 5.0, 2.0, 6.0])  # forward, forward+backward, forward, ...
    compiling = iter([(9.0, 1.0), (8.0, 7.0), (2.0, 3.0), (6.0, 5.0), (4.0, 2.0), (7.0, 9.0)])
    monkeypatch.setattr(bench_recurrences, "minima", lambda runs, rounds: dict.fromkeys(runs, next(seconds)))
    monkeypatch.setattr(bench_recurrences, "peak_gflops", iter([10.0, 30.0, 20.0]).__next__)

    def compiled(fn, args, which):
        return None, dict(zip(("compile_s", "compile_cpu_s"), next(compiling), strict=True))

    monkeypatch.setattr(bench_recurrences, "compiled", compiled)
    forward, both = bench_recurrences.bench(config, tmp_path / "results.jsonl")
    assert (forward["milliseconds"], forward["compile_s"], forward["compile_cpu_s"]) == (1000, 2, 1)
    assert (both["milliseconds"], both["compile_s"], both["compile_cpu_s"]) == (4000, 6, 5)
    assert both["compile_and_100_runs_s"] == 406 and "compile_and_100_runs_s" not in forward
    assert forward["peak_gflops"] == both["peak_gflops"] == 30


def test_compiling_is_traced_anew():
    """What was traced before, here the same call, is not had for nothing."""
    traced = []

    def fn(x):
        traced.append(x)
        return x

    for which in ("forward", "forward+backward"):
        run, seconds = bench_recurrences.compiled(jax.jit(fn), dict(x=jnp.ones(())), which)
        assert jax.tree.leaves(run()) == [1.0] and set(seconds) == {"compile_s", "compile_cpu_s"}
    assert len(traced) == 2 and min(seconds.values()) > 0


def test_compiling_alone_runs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_recurrences, "agrees", None)
    monkeypatch.setattr(bench_recurrences, "peak_gflops", None)
    config = dataclasses.replace(TINY, lengths=(32,), sweeps=1, compile_only=True, out=str(tmp_path))
    bench_recurrences.main(config)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["candidate"] for row in rows} == {"scan", "chunk", "softmax attention"} and len(rows) == 6
    assert all(row["compile_s"] > 0 and row["compile_cpu_s"] > 0 and "milliseconds" not in row for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


def test_the_table_has_what_was_measured():
    """Times beside their ratio to the chunk form's, blanks where nothing was measured, no column without any."""
    common = dict(recurrence="gla", length=64, which="forward")
    rows = [
        common | dict(candidate="chunk", milliseconds=2.0, compile_s=0.5, compile_cpu_s=1.0),
        common | dict(candidate="peer", milliseconds=5.0),
    ]
    title, ours, peer = bench_recurrences.table(rows).splitlines()
    assert [" ".join(line.split()) for line in (title, ours, peer)] == [
        "gla T=64 forward run, ms compile, s of processor",
        "chunk 2.0 (1.00x) 0.50 (1.00x) 1.00 (1.00x)",
        "peer 5.0 (2.50x)",
    ]


@pytest.mark.parametrize(("changes", "why"), [(dict(recurrences=("gal",)), "unknown"), (dict(sweeps=0), "at least 1")])
def test_what_makes_no_sense_is_refused(changes, why):
    with pytest.raises(SystemExit, match=why):
        bench_recurrences.main(dataclasses.replace(TINY, **changes))
