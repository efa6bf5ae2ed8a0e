"""Forecasts beside the program that XLA makes of the same step for eight simulated devices."""

import pathlib

import pytest

from mlt.config.load import load_config
from mlt.parallel.mesh import Layout
from mlt.plan.collectives import collectives
from mlt.plan.forecast import traced_step, walked
from mlt.train.setup import build_optimizer, describe_model, step_options
from mlt.train.state import abstract_batch, abstract_state
from mlt.train.step import jit_train_step

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("family", "degrees"),
    [("transformer", {"fsdp": 2, "tensor": 2, "context": 2}), ("gated_deltanet", {"fsdp": 4, "context": 2})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bytes_held_and_sent_are_those_of_the_compiled_program(family, degrees):
    layout = Layout(**degrees)
    path, args = ROOT / f"configs/families/{family}.py", ["sequence_length=2048", "batch_size=8"]
    config = load_config(path, args=args, sets=["remat.mode=sub_layer"])
    config = config.replace(mesh=layout)
    held, tally = walked(traced_step(config, layout.abstract_rules()), layout, "cpu")

    rules, specs = layout.rules(), describe_model(config)
    optimizer = build_optimizer(config, specs)
    state, batch = abstract_state(specs, optimizer, rules), abstract_batch(rules, 8, 2048)
    program = jit_train_step(state, optimizer, step_options(config, rules, specs)).trace(state, batch).lower().compile()

    # XLA for CPUs makes more of what is elementwise than XLA for GPUs, to which `tools/plan_accuracy.py` compares.
    assert 0.8 < program.memory_analysis().temp_size_in_bytes / held.nbytes < 2.0
    # What is written out in shard_map is the program's to the byte: heads for tokens, states and their maps, halos.
    sent = collectives(program.as_text())
    for kind in ("all-to-all", "collective-permute"):
        share = (degrees["context"] - 1) / degrees["context"] if kind == "all-to-all" else 1
        wanted = share * sum(one.bytes for one in sent if one.kind == kind)
        found = sum(nbytes for (name, axes), nbytes in tally.crossings.items() if name == kind and axes == ("context",))
        assert found == pytest.approx(wanted, rel=0.02), kind
    assert any(kind in ("all-to-all", "collective-permute") for kind, _ in tally.crossings)
