"""What the counters of collectives read off a program's text."""

from hlo import Collective, collectives, counts

TEXT = """
%fused_computation.1 (param: f32[1,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} all-gather(%param), channel_id=1, dimensions={0}
}

%async_collective_fusion.2 (param.1: f32[1,4]) -> f32[8,4] {
  %e = f32[8,4]{1,0} all-gather(%param.1), channel_id=1, dimensions={0}
}

ENTRY %main (x: f32[1,4], y: bf16[2]) -> f32[8,4] {
  %b = (bf16[2]{0}, bf16[16]{0}) all-gather-start(%y), channel_id=2, dimensions={0}
  %c = bf16[16]{0} all-gather-done(%b)
  %d = (f32[], s32[3]{0}) all-reduce(%p, %q), channel_id=3, to_apply=%add
  %f = f32[8,4]{1,0} add(%a, %a)
  %g = f32[2]{0} collective-permute(%r), channel_id=1, source_target_pairs={{0,1}}
  %h = f32[2]{0} collective-permute(%g), channel_id=1, source_target_pairs={{1,2}}
}
"""


def test_every_collective_is_read_once():
    assert collectives(TEXT) == [
        Collective("all-gather", 128),
        Collective("all-gather", 32),
        Collective("all-reduce", 16),
        Collective("collective-permute", 8),
        Collective("collective-permute", 8),
    ]
    assert counts(TEXT) == {"all-gather": 2, "all-reduce": 1, "collective-permute": 2}
