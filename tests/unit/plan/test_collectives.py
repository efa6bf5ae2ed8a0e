"""Bytes of collectives, read from the text of a compiled program."""

import pytest

from mlt.plan.collectives import collectives

PROGRAM = """HloModule m

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  {line}
}}

ENTRY %main (a: f32[8]) -> f32[8] {{
  %loop = (s32[], f32[8]) while(%init), condition=%c, body=%body, backend_config={{"known_trip_count":{{"n":"5"}}}}
}}
"""
GROUPS = "replica_groups={{0,1,2,3}}, dimensions={0}"


@pytest.mark.parametrize(
    ("line", "nbytes"),
    [
        ("%x = f32[8,4]{1,0} all-gather(%p), " + GROUPS, 128),
        ("%x = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%p), " + GROUPS, 128),
        ("%x = ((f32[8,4], bf16[16]), (f32[2,4], /*index=5*/bf16[4])) reduce-scatter-start(%p, %q), " + GROUPS, 40),
        ("%x = (f32[8,4]{1,0}, f32[4]{0}) all-reduce-start(%p, %q), " + GROUPS, 144),
        ("%x = (f32[8], f32[8], u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}", 32),
    ],
)
def test_a_loops_collectives_count_as_often_as_it_runs(line, nbytes):
    (found,) = collectives(PROGRAM.format(line=line))
    assert (found.times, found.bytes) == (5, 5 * nbytes)
    assert found.group == (None if "permute" in line else 4)
