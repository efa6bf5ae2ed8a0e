"""`--mesh` says what is wrong with it, and collectives are read out of a program's text."""

import jax
import pytest

from mlt.errors import UserError
from mlt.parallel.mesh import Layout
from mlt.plan.collectives import collectives, summary
from mlt.verify.run import parse_layout, simulate

PROGRAM = """HloModule step, entry_computation_layout={()->f32[4]{0}}

%body (arg: (s32[], f32[2,8])) -> (s32[], f32[2,8]) {
  %ag = f32[2,8]{1,0} all-gather(%x), channel_id=1, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={1}
  %alone = f32[2,8]{1,0} all-reduce(%x), channel_id=2, replica_groups={{0},{1}}, to_apply=%add
}

%cond (arg: (s32[], f32[2,8])) -> pred[] {
  %lt = pred[] compare(%a, %b), direction=LT
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %loop = (s32[], f32[2,8]) while(%init), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %start = (f32[4]{0}, f32[4]{0}) collective-permute-start(%p), source_target_pairs={{0,1}}, metadata={op_name="jit(step)/halo"}
  %two = (f32[4]{0}, bf16[8]{0}) all-reduce(%p, %q), replica_groups=[1,8]<=[8], to_apply=%add
}
"""


def test_a_layout_is_read():
    found = parse_layout("context=4, fsdp=2", Layout(carry="ring", tensor=8))
    assert (found.context, found.fsdp, found.tensor, found.carry) == (4, 2, 1, "ring")


@pytest.mark.parametrize(("text", "message"), [("depth=2", "no axis 'depth'"), ("fsdp=x", "fsdp must be a number of shards")])
def test_a_layout_that_is_none_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_layout(text, Layout())


def test_too_few_devices():
    assert jax.device_count() == 8  # and from here on they are what they are
    with pytest.raises(UserError, match="needs 512 devices, and 8 cpu"):
        simulate(512)


def test_collectives_of_a_program():
    found = collectives(PROGRAM)
    assert [(c.kind, c.times, c.bytes) for c in found] == [
        ("all-gather", 3, 3 * 64),
        ("collective-permute", 1, 16),
        ("all-reduce", 1, 32),
    ]
    assert found[1].source == "jit(step)/halo"
    assert "all-gather                3 times            192 bytes   in loops 3 times 192 bytes" in summary(found)
