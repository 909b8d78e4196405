"""The real TPU compiler on this machine: cycle counts against kernels counted by hand, and what it says to bad ones."""

import functools
import importlib.util

import hand_counted
import pytest

from pallas_kernels.profiler import _programs
from pallas_kernels.profiler._aot import Compiled, CompileError, compile_all, compile_and_schedule
from pallas_kernels.profiler._report import report
from pallas_kernels.profiler._targets import TARGETS

compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed: pip install libtpu"
)
VECTOR = dict(B=1, T=600, D=256, N=16)


@pytest.fixture(scope="module")
def counted() -> dict[str, Compiled]:
    """Everything that one process compiles for these tests."""
    chain = lambda trips: functools.partial(hand_counted.chain, trips=trips)  # noqa: E731
    jobs = {
        "product": (hand_counted.product, hand_counted.product_shapes(1024, 128, 128), "v5e"),
        "saturated": (hand_counted.product, hand_counted.product_shapes(512, 1024, 1024), "v6e"),
        "chain 20": (chain(20), hand_counted.REGISTER, "v5e"),
        "chain 60": (chain(60), hand_counted.REGISTER, "v5e"),
        "chain 60 on 7x": (chain(60), hand_counted.REGISTER, "tpu7x"),
        "loop": ("hand_counted:scan_of_products", hand_counted.product_shapes(1024, 128, 128), "v5e"),
    }
    return dict(zip(jobs, compile_all(list(jobs.values())), strict=True))


def kernel(compiled: Compiled, name: str):
    return compiled.kernels[next(key for key in compiled.kernels if name in key)]


@compiler
def test_matrix_cycles_of_a_product(counted):
    # 256 x 128 by 128 x 128 a step, at 131,072 flop a cycle
    assert kernel(counted["product"], "product").unit_cycles()["MXU"] / 4 == 2 * 256 * 128 * 128 / 131_072
    # 256 x 1024 by 1024 x 1024 a step: nothing else takes longer, the schedule is its matrix cycles
    saturated = kernel(counted["saturated"], "product")
    floor = 2 * 256 * 1024 * 1024 / TARGETS["v6e"].flops
    assert saturated.unit_cycles()["MXU"] / 2 == floor
    assert floor < saturated.cycles < 1.6 * floor


@compiler
def test_a_rolled_loop_counts_its_trips(counted):
    for name, trips in (("chain 20", 20), ("chain 60", 60), ("chain 60 on 7x", 60)):
        schedule = kernel(counted[name], "chain")
        (loop,) = schedule.timed.loops
        assert loop.trips == trips and schedule.unit_cycles()["EUP"] == trips, name
        assert schedule.cycles - trips * (loop.stop - loop.start) == schedule.timed.length - (loop.stop - loop.start)
    short, long = (kernel(counted[name], "chain") for name in ("chain 20", "chain 60"))
    (loop,) = short.timed.loops
    assert long.cycles - short.cycles == 40 * (loop.stop - loop.start)
    # a tanh takes a handful of cycles, the loop's branch as many
    assert 8 <= loop.stop - loop.start <= 40


@compiler
def test_steps_and_bytes_of_a_grid(counted):
    (call,) = counted["product"].calls
    assert call.steps == 4
    assert call.moved == (1024 * 128 * 2, 128 * 128 * 2, 1024 * 128 * 4)  # b is read once, as its block stays
    schedule = kernel(counted["product"], "product")
    assert schedule.timed.grid.trips == 4 + 2  # the pipeline fills and empties
    assert 4 * schedule.cycles < schedule.timed.total(4) < 5 * schedule.cycles


@compiler
def test_waits_are_cycles_and_no_bundles(counted):
    schedule = kernel(counted["product"], "product")
    assert schedule.bundles < schedule.cycles / 2  # one step's products have nothing to hide their latency behind


@compiler
def test_a_loop_around_a_kernel(counted):
    part = next(p for p in report("loop", counted["loop"]).parts if p.kind == "kernel")
    assert (part.runs, part.steps) == (5, 4)


@compiler
def test_the_report_of_a_product(counted):
    found = report("product", counted["product"], (1024, "row"))
    moved = 1024 * 128 * 2 + 128 * 128 * 2 + 1024 * 128 * 4
    assert found.totals["hbm_bytes"] == moved
    assert found.least_hbm_cycles == pytest.approx(moved / TARGETS["v5e"].bytes_per_cycle, rel=1e-6)
    assert found.totals["least_matrix_cycles_each"] == 4 * 64 / 1024
    (part,) = found.parts
    assert part.hbm_cycles > part.total_cycles or part.binds == "latency"
    assert "product" in found.table()


@compiler
def test_the_compilers_own_refusal_and_the_next_job():
    jobs = [
        (hand_counted.too_large, hand_counted.REGISTER, "v5e"),
        (hand_counted.product, hand_counted.product_shapes(256, 128, 128), "v5p"),
    ]
    refused, compiled = compile_all(jobs)
    assert isinstance(refused, CompileError) and "vmem" in str(refused).lower()
    assert kernel(compiled, "product").cycles > 0


def test_what_another_process_cannot_import():
    with pytest.raises(ValueError, match="cannot be imported"):
        compile_and_schedule(lambda x: x, hand_counted.REGISTER, "v5e")
    with pytest.raises(ValueError, match="did you mean 'v5e'"):
        compile_and_schedule(hand_counted.product, hand_counted.REGISTER, "v5ee")
    with pytest.raises(ValueError, match="no_such"):
        compile_and_schedule("hand_counted:no_such", hand_counted.REGISTER, "v5e")


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install libtpu"):
        compile_and_schedule(hand_counted.product, hand_counted.product_shapes(256, 128, 128), "v5e")


def compile_recurrences(names, targets, **options):
    jobs = []
    for name in names:
        fn, args = _programs.recurrence(name, "mosaic_tpu", VECTOR, backward=True, **options)
        jobs += [(fn, args, target) for target in targets]
    for (fn, _, target), compiled in zip(jobs, compile_all(jobs), strict=True):
        assert isinstance(compiled, Compiled), f"{fn.args[0]} on {target}: {compiled}"
        names = [key for key in compiled.kernels if "forward" in key or "backward" in key]
        assert len(names) == 2, f"{fn.args[0]} on {target}: {names}"


@compiler
def test_the_vector_family_compiles():
    compile_recurrences(["hgrn"], ["v5e"])


@compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["hgrn", "rg_lru", "mamba"])
def test_the_vector_family_compiles_everywhere(name, dtype):
    compile_recurrences([name], TARGETS, dtype=dtype)


@compiler
@pytest.mark.slow
def test_decoding_compiles_everywhere():
    results = compile_all([(*hand_counted.decode_job(), target) for target in TARGETS])
    for target, compiled in zip(TARGETS, results, strict=True):
        assert isinstance(compiled, Compiled), f"{target}: {compiled}"
        assert kernel(compiled, "decode").cycles > 0
        assert compiled.memory["alias"] >= 4 * 2 * 16 * 128 * 128, "the state is not updated in place"
