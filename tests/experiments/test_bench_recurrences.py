"""The CPU benchmark: what it writes, and that it times nothing that is wrong."""

import dataclasses
import json

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
    assert "wrong" not in group.runs["forward"] and "chunk" in group.runs["forward"]
    assert "differs from the scan by 1.0e-02" in capsys.readouterr().err


def test_the_least_of_all_sweeps_counts(tmp_path, monkeypatch):
    """And the best peak, whichever sweep saw it."""
    config = dataclasses.replace(TINY, lengths=(32,), passes=("forward",), softmax=False, sweeps=3)
    seconds = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(bench_recurrences, "minima", lambda runs, args, rounds: dict.fromkeys(runs, next(seconds)))
    monkeypatch.setattr(bench_recurrences, "peak_gflops", iter([10.0, 30.0, 20.0]).__next__)
    rows = bench_recurrences.bench(config, tmp_path / "results.jsonl")
    assert {row["candidate"]: row["milliseconds"] for row in rows} == {"scan": 1000.0, "chunk": 1000.0}
    assert {row["peak_gflops"] for row in rows} == {30.0}


@pytest.mark.parametrize(("changes", "why"), [(dict(recurrences=("gal",)), "unknown"), (dict(sweeps=0), "at least 1")])
def test_what_makes_no_sense_is_refused(changes, why):
    with pytest.raises(SystemExit, match=why):
        bench_recurrences.main(dataclasses.replace(TINY, **changes))
