"""Dumps and programs that are written out here, read without a compiler."""

import pytest

from pallas_kernels.profiler._hlo import Program
from pallas_kernels.profiler._schedule import UNITS, Schedule, parse_code, parse_utilisation

CODE = """= control target key start
LH: loop header
= control target key end

     0   :  { %s1 = smov 0  ;;  %s2 = smov 0 }
   0x1 LB: > { %s3 = sphi %s1, %s4 /* phi copy :: iteration index, stage = 0 */  ;;  %s4 = sadd.s32 1, %s3 }
   0x2   : > { %9 = sbr.rel (%p9) target bundleno = 16 (0x10), region = 7 }
   0x3   : > { %s5 = smov 2 }
   0x4   :  {}
   0x5   :  {}
   0x6   :  {}
   0x7 LB: >> { %s6 = sphi %s5, %s7  ;;  %s7 = sadd.s32 3, %s6 } /* Start region 5 */
   0x8   : >> { %p1 = scmp.ge.s32.totalorder %s7, 14 /* loop exit test */ /* a comment
over two lines */ }
   0x9   : >> { %8 = sbr.rel (!%p1) target bundleno = 7 (0x7), region = 5 }
   0xa   :  {}
   0xb   :  {}
   0xc   :  {}
   0xd   :  {}
   0xe   : > { %v1 = vld [vmem:[#allocation0]] }
   0xf   : > { %v2 = vadd.f32 %v1, %v1 }
  0x10 PF: > { %p2 = scmp.ge.s32.totalorder %s4, 6 /* loop exit test */ }
  0x11   : > { %10 = sbr.rel (!%p2) target bundleno = 1 (0x1), region = 9 }
  0x12   :  {}
  0x13   :  {}
  0x14   :  {}
  0x15   :  {}
  0x16   :  { %11 = vsyncpa [#allocation4], 1 }
"""


def test_loops_are_multiplied_and_the_pipeline_turns_a_few_times_more():
    code = parse_code(CODE, branch_delay=4)
    assert code.length == 0x17
    inner = next(loop for loop in code.loops if not loop.grid)
    assert (inner.start, inner.stop, inner.trips) == (7, 14, 4)  # 2, 5, 8, 11, and 14 leaves
    assert (code.grid.start, code.grid.stop, code.grid.trips) == (1, 0x16, 6)
    assert code.skipped == ((7, 16),)
    assert code.per_step == 21 + 3 * 7
    # four steps, two turns that jump from 0x2 over the kernel's own code, and what is outside the loop
    assert code.total(4) == 4 * 42 + 2 * (42 - (9 + 3 * 7)) + 2


def test_a_region_may_name_the_loop_as_the_last_dump_does():
    text = CODE.replace("target bundleno = 7 (0x7), region = 5", "target = $region5")
    text = text.replace("target bundleno = 16 (0x10), region = 7", "target = $region7")
    text = text.replace("6 /* loop exit test */ }", "6 /* loop exit test */ } /* Start/End empty region 7 */")
    assert parse_code(text, branch_delay=4) == parse_code(CODE, branch_delay=4)


def test_a_loop_of_unknown_length_counts_once():
    code = parse_code(CODE.replace("%s7, 14 /*", "%s7, %s99 /*"), branch_delay=4)
    assert code.per_step == 21
    assert [loop.trips for loop in code.loops] == [6, None]


def test_units():
    text = "== CAPACTIY:\nMXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU\n"
    text += "    4     3     4     2     1     3     3     1     1     2\n== UTILIZATION:\n"
    rows = ["4 0 0 0 0 0 0 0 0 0"] * 7 + ["0 0 2 0 0 0 0 0 0 1"] * 16
    capacity, busy = parse_utilisation(text + "\n".join(rows))
    assert dict(zip(UNITS, capacity, strict=True))["EUP"] == 1 and len(busy) == 23
    code = parse_code(CODE, branch_delay=4)
    schedule = Schedule("k", code, code, busy, capacity)
    assert schedule.unit_cycles()["MXU"] == 6 * 4 and schedule.unit_cycles()["VALU"] == 2 * (15 + 3 * 7)
    assert schedule.utilisation()["SALU"] == (15 + 3 * 7) / (2 * 42)
    with pytest.raises(ValueError, match="this profiler knows"):
        parse_utilisation(text.replace("EUP", "NEW"))


HLO = """HloModule jit_f, is_scheduled=true

%body (p: (s32[], f32[64,8,128])) -> (s32[], f32[64,8,128]) {
  %p = (s32[], f32[64,8,128]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[64,8,128]{2,1,0:T(8,128)} get-tuple-element(%p), index=1
  %fusion.1 = f32[8,128]{1,0:T(8,128)} fusion(%x, %i), kind=kLoop, calls=%slice_it
  %on_chip = f32[8,128]{1,0:T(8,128)S(1)} custom-call(%fusion.1), custom_call_target="tpu_custom_call", backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"98304"}]}
  %row = f32[1,8,128]{2,1,0:T(8,128)} bitcast(%fusion.1)
  %fusion.2 = (f32[64,8,128]{2,1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) fusion(%x, %row, %i), kind=kLoop, calls=%write_it
  ROOT %t = (s32[], f32[64,8,128]{2,1,0:T(8,128)}) tuple(%i, %x)
}

%slice_it (a: f32[64,8,128], b: s32[]) -> f32[8,128] {
  %a = f32[64,8,128]{2,1,0:T(8,128)} parameter(0)
  %b = s32[] parameter(1)
  %s = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%a, %b), dynamic_slice_sizes={1,8,128}
  ROOT %r = f32[8,128]{1,0:T(8,128)} bitcast(%s)
}

%write_it (e: f32[64,8,128], f: f32[1,8,128], h: s32[]) -> (f32[64,8,128], f32[8,128]) {
  %e = f32[64,8,128]{2,1,0:T(8,128)} parameter(0)
  %f = f32[1,8,128]{2,1,0:T(8,128)} parameter(1)
  %h = s32[] parameter(2)
  %u = f32[64,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%e, %f, %h)
  %n = f32[8,128]{1,0:T(8,128)} bitcast(%f)
  ROOT %both = (f32[64,8,128]{2,1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) tuple(%u, %n)
}

%sort_it (m: f32[8,128]) -> (f32[8,128], f32[8,128]) {
  %m = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %sorted = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) sort(%m, %m), dimensions={1}
}

%cheap (c: f32[8,128]) -> f32[8,128] {
  %c = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %small = f32[8,128]{1,0:T(8,128)} negate(%c)
}

%dear (d: f32[8,128]) -> f32[8,128] {
  %d = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %large = f32[8,128]{1,0:T(8,128)} exponential(%d)
}

ENTRY %main (x: f32[64,8,128], w: pred[], y: f32[8,128]) -> f32[8,128] {
  %x.1 = f32[64,8,128]{2,1,0:T(8,128)} parameter(0)
  %w = pred[] parameter(1)
  %y = f32[8,128]{1,0:T(8,128)} parameter(2)
  %fusion.3 = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) fusion(%y), kind=kCustom, calls=%sort_it
  %zero = s32[] constant(0)
  %tuple = (s32[], f32[64,8,128]{2,1,0:T(8,128)}) tuple(%zero, %x.1)
  %while = (s32[], f32[64,8,128]{2,1,0:T(8,128)}) while(%tuple), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"64"}}
  ROOT %choice = f32[8,128]{1,0:T(8,128)} conditional(%w, %y, %y), true_computation=%cheap, false_computation=%dear
}
"""  # noqa: E501


def test_a_program_is_what_runs_how_often():
    uses = {use.name: use for use in Program(HLO).uses(lambda use: 2.0 if use.name == "large" else 1.0)}
    assert {name: use.count for name, use in uses.items()} == {
        "fusion.1": 64,
        "on_chip": 64,
        "fusion.2": 64,
        "fusion.3": 1,
        "large": 1,
    }
    kilobytes = 8 * 128 * 4
    assert uses["fusion.1"].hbm_bytes == 2 * kilobytes + 4  # the slice, what becomes of it, and the index
    assert uses["fusion.2"].hbm_bytes == 3 * kilobytes + 4  # a slice read, written in place, and its copy
    assert uses["fusion.3"].hbm_bytes == 3 * kilobytes  # read once, both results of one instruction
    assert uses["on_chip"].hbm_bytes == kilobytes  # its result stays on the chip
    assert uses["on_chip"].is_kernel and uses["on_chip"].vmem_bytes == 98304


def test_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("nothing")
