"""What the counters of collectives read off a program's text."""

from hlo import Collective, collectives, counts

TEXT = """
  %a = f32[8,4]{1,0} all-gather(%x), channel_id=1, dimensions={0}
  %b = (bf16[2]{0}, bf16[16]{0}) all-gather-start(%y), channel_id=2, dimensions={0}
  %c = bf16[16]{0} all-gather-done(%b)
  %d = (f32[], s32[3]{0}) all-reduce(%p, %q), channel_id=3, to_apply=%add
  %e = f32[8,4]{1,0} all-gather(%x), channel_id=1, dimensions={0}
  %f = f32[8,4]{1,0} add(%a, %a)
"""


def test_every_collective_is_read_once():
    assert collectives(TEXT) == [
        Collective("all-gather", 128),
        Collective("all-gather", 32),
        Collective("all-reduce", 16),
    ]
    assert counts(TEXT) == {"all-gather": 2, "all-reduce": 1}
