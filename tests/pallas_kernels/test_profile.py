"""The command line and the report: what is written, compared, drawn, refused."""

import dataclasses
import importlib.util
import json

import pytest

from pallas_kernels import profile
from pallas_kernels._shared import block_sizes
from pallas_kernels.profiler import _programs, _targets, _tune
from pallas_kernels.profiler._measure import measure
from pallas_kernels.profiler._report import Part, Report
from pallas_kernels.tpu._block_sizes import choose

compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed: pip install libtpu"
)


def part(**changes) -> Part:
    busy = {"MXU": 0.9, "VALU": 0.2, "VLOAD": 0.1}
    default = dict(name="k", kind="kernel", runs=1, steps=10, cycles=100, bundles=80, total_cycles=1000.0)
    default |= dict(total_bundles=800.0, hbm_bytes=54600, hbm_cycles=100.0, vmem_bytes=4096, utilisation=busy)
    default |= dict(least_matrix_cycles=900.0, spills=0, fills=0, unknown_loops=0)
    return Part(**{**default, **changes})


MEMORY = {"argument": 30000, "output": 24600, "alias": 0, "temp": 0, "code": 1}


def whole(*parts: Part) -> Report:
    return Report("a kernel", "v5e", (10, "token-head"), parts, MEMORY, 100.0, versions={"jax": "1"})


def test_what_binds():
    assert part().binds == "MXU"
    assert part(hbm_cycles=2000.0).binds == "HBM"
    assert part(utilisation={"MXU": 0.3, "VALU": 0.4}).binds == "latency"


def test_totals_add_up():
    report = whole(part(), part(name="late", kind="copy-start", total_cycles=0.0, hbm_cycles=50.0, utilisation={}))
    totals = report.totals
    assert totals["time_cycles_each"] == 100.0  # what the compiler starts by itself runs beside
    assert totals["hbm_cycles_each"] == 15.0 and totals["binds"] == "MXU"
    assert totals["times_the_roofline"] == 1000 / 1800
    assert totals["milliseconds"] == pytest.approx(1000 / 1.5e9 * 1e3)
    flooded = whole(part(), part(name="late", kind="copy-start", total_cycles=0.0, hbm_cycles=5000.0, utilisation={}))
    assert flooded.totals["binds"] == "HBM" and flooded.totals["time_cycles_each"] == 510.0


def test_a_report_survives_its_file():
    report = whole(part())
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    with pytest.raises(ValueError, match="write it again"):
        Report.from_json({"title": "x"})


def test_comparison():
    text = profile.compare(whole(part()), whole(part(total_cycles=3000.0)))
    assert "time_cycles_each" in text and "3.00" in text
    with pytest.raises(ValueError, match="per call, wanted per token-head"):
        profile.compare(whole(part()), dataclasses.replace(whole(part()), per=(1, "call")))


@compiler
def test_the_command_line(tmp_path, capsys):
    arguments = ["--kernel", "hand_counted:example", "--target", "v5e,v6e"]
    files = ["--json", str(tmp_path / "a.json"), "--picture", str(tmp_path / "a.png")]
    assert profile.main([*arguments, *files]) == 0
    first = capsys.readouterr()
    assert "product.1" in first.out and "on v6e" in first.out and "compiling 2/2" in first.err
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    written = json.loads((tmp_path / "a.json").read_text())
    assert [one["target"] for one in written] == ["v5e", "v6e"]
    assert written[0]["totals"]["least_matrix_cycles_each"] == 4 * 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png"]
    # against the file just written: the same again
    assert profile.main([*arguments, "--against", str(tmp_path / "a.json")]) == 0
    ratios = [
        line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("  time_cycles_each")
    ]
    assert ratios == ["1.00", "1.00"]


@compiler
def test_a_recurrence_against_xla(capsys):
    arguments = ["--recurrence", "hgrn", "--shape", "B=1,T=1024,D=512", "--against", "xla", "--json", "-"]
    assert profile.main(arguments) == 0
    out = capsys.readouterr().out
    (report,) = json.loads(out[: out.index("\n]") + 2])
    assert report["per"] == [1024, "token"]
    assert any("vector_forward" in one["name"] for one in report["parts"])
    # x, g and the outputs once each, the states
    assert report["totals"]["hbm_bytes"] == pytest.approx(3 * 2 * 1024 * 512, rel=0.01)
    ratio = next(line.split()[-1] for line in out.splitlines() if line.startswith("  time_cycles_each"))
    assert float(ratio) > 2  # a token loop or a scan of doublings reads everything many times


REFUSALS = {
    "no such recurrence": (["--recurrence", "simple_gal"], "did you mean 'simple_gla'"),
    "no such target": (["--recurrence", "gla", "--target", "v7"], "wanted one of ['v5e'"),
    "size that is none": (["--recurrence", "gla", "--shape", "B=1,T=x"], "got 'T=x', wanted LETTER=NUMBER"),
    "size that lacks": (["--recurrence", "gla", "--shape", "B=1,T=8"], "lacks H, K, V of gla"),
    "no such pass": (["--recurrence", "gla", "--pass", "back"], "wanted forward or backward"),
    "no such module": (["--kernel", "no_such_module:f"], "is it on PYTHONPATH"),
    "no such function": (["--kernel", "hand_counted:nothing"], "nothing"),
    "no function at all": (["--kernel", "hand_counted"], "wanted MODULE:FUNCTION"),
    "no example": (["--kernel", "builtins:dict"], "wanted (function, arguments)"),
    "no file": (["--kernel", "hand_counted:example", "--against", "none.json"], "no file none.json"),
    "xla of what": (["--kernel", "hand_counted:example", "--against", "xla"], "needs --recurrence"),
    "nothing to trace": (["--kernel", "hand_counted:example", "--trace", "x"], "no TPU to trace"),
    "nothing to tune": (["--recurrence", "hgrn", "--tune", "--shape", "B=1,T=8,D=8,H=1,K=8"], "no block sizes"),
    "tuned as another": (["--recurrence", "lightnet", "--tune"], "no block sizes of its own"),
    "tune what": (["--kernel", "hand_counted:example", "--tune"], "wanted --recurrence"),
}


@compiler
@pytest.mark.parametrize(("arguments", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(profile._measure, "tpu_here", lambda: False)
    assert profile.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_the_compilers_absence(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert profile.main(["--recurrence", "gla"]) == 1
    assert "pip install libtpu" in capsys.readouterr().err


def test_help_says_what_the_numbers_are(capsys):
    with pytest.raises(SystemExit):
        profile.main(["--help"])
    out = capsys.readouterr().out
    assert "--tune" in out and "trip count" in out and "examples:" in out


def test_measuring_and_tracing(tmp_path):
    import hand_counted

    fn, args = hand_counted.plain, hand_counted.REGISTER
    assert 0 < measure(fn, args, repeats=2, trace=tmp_path) < 1e4
    assert list(tmp_path.rglob("*.xplane.pb"))


@compiler
@pytest.mark.slow
def test_tuning_writes_what_dispatch_reads(tmp_path, monkeypatch):
    table, said = tmp_path / "block_sizes.json", []
    table.write_text(json.dumps([{"kernel": "other", "device": "d", "K": 1, "V": 1, "dtype": "f", "chunk": 64}]))
    sizes = dict(B=1, T=256, H=16, K=128, V=128)
    rows = _tune.tune("simple_gla", "v5e", sizes, backward=False, table=table, say=said.append)
    costs = [row["source"]["predicted_cycles_per_token_head"] for row in rows]
    choices = _programs.tunable("scalar_decay").block_sizes(sizes)
    assert costs == sorted(costs) and len(said) == len(choices) and said[0].startswith("1/")
    written = json.loads(table.read_text())
    assert written[: len(rows)] == rows and written[-1]["kernel"] == "other"
    monkeypatch.setattr(block_sizes, "TABLE", table)
    block_sizes.rows.cache_clear()
    facts = dict(K=128, V=128, dtype="bfloat16")
    chosen = choose("scalar_decay", _targets.TARGETS["v5e"].kind, 16, 16, **facts)
    assert (chosen.chunk, chosen.heads) == (rows[0]["chunk"], rows[0]["heads"])
    block_sizes.rows.cache_clear()
