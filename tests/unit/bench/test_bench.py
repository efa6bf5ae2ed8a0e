"""Benches without a long run: costs against hand-computed floors, gates that must fail, and the GPU script's plan."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels import dispatch
from tool_files import tool

from mlt.bench import floor, gate, measure, peers, rows, suites
from mlt.bench.run import bench
from mlt.errors import UserError

STANDARD = suites.rows("std")
ROOT = pathlib.Path(__file__).parents[3]


def small_row():
    return rows.convolution("small", B=1, T=33, D=8, dtype=jnp.float32)


def test_costs_by_hand():
    """B 2, T 64, 3 heads of 16, chunks of 16, float32: products of one token and head, and every array once."""
    row = rows.recurrence("r", "gated_delta", B=2, T=64, H=3, K=16, V=16, C=16, dtype=jnp.float32)
    forward, backward = row.costs()
    tokens = 2 * 64 * 3
    assert forward.flops == pytest.approx(tokens * (6 * 256 + 16 * 5 * 16 + 2 * 16 * 16 / 3))
    assert forward.bytes == tokens * 4 * (4 * 16 + 2)  # q, k, v, o and two gates
    assert backward.bytes == tokens * 4 * (7 * 16 + 4)
    causal, _ = rows.attention("a", B=2, T=64, N=3, H=16, dtype=jnp.bfloat16).costs()
    assert causal.flops == 2 * 3 * (64 * 64 / 2) * 4 * 16
    packed = rows.attention("a", B=2, T=512, N=3, H=16, pack=True, dtype=jnp.bfloat16)
    assert packed.costs()[0].flops == 2 * 3 * sum(n * n / 2 for n in packed.documents) * 4 * 16


@pytest.mark.parametrize(
    ("name", "milliseconds"),
    [
        ("gated delta B8 T4k H32 D128", (0.252, 0.534)),
        ("SSD B8 T2k H64 P64 N128", (0.066, 0.154)),
        ("RG-LRU B8 T4k E4096", (0.187, 0.312)),
        ("attention B8 T2k N32 H128", (0.348, 0.870)),
        ("cross-entropy T8k D2048 V131072", (5.567, 16.70)),
    ],
)
def test_floors_of_published_shapes(name, milliseconds):
    """H200, computed independently from the shapes."""
    (row,) = [row for row in STANDARD if row.name == name]
    found = [1e3 * floor.seconds(cost, floor.KNOWN["H200"])[0] for cost in row.costs()]
    assert found == pytest.approx(milliseconds, rel=0.01)


def test_every_op_has_rows():
    for suite in ("cpu", "std"):
        with_cases = {op for op in dispatch.ops() if (ROOT / "kernels" / "mlt_kernels" / op / "cases.py").exists()}
        assert with_cases <= {row.op for row in suites.rows(suite)}


def test_a_right_backend_passes_and_a_wrong_one_has_no_time():
    row = small_row()
    (right,) = measure.gated(row, ["chunked"])
    assert right.why == ""
    assert 0 < right.error < 1e-5

    def off(arrays, *, implementation=None):
        return row.call(arrays, implementation=implementation) * (1.0 if implementation == "reference" else 1.001)

    wrong = dataclasses.replace(row, call=off, small=lambda: dataclasses.replace(row, call=off))
    (found,) = measure.on_cpu(wrong, ["chunked"])
    assert "wrong: " in found.why
    assert found.both is None


def test_padding_is_left_out_of_the_comparison_but_must_be_finite():
    real = np.array([[True, True, False]])
    wanted = (np.ones((1, 3, 2)), {"x": np.ones((1, 3, 2))})
    found = (np.array([[[1, 1], [1, 1], [5, 5]]]), {"x": np.ones((1, 3, 2)) * [[[1], [1.5], [9]]]})
    assert gate.errors(found, wanted, real) == {"out": 0.0, "d x": 0.5}
    bad = (np.where(real[..., None], 1.0, np.nan) * np.ones((1, 3, 2)), found[1])
    assert gate.errors(bad, wanted, real)["out"] == float("inf")


def test_a_peer_that_differs_has_no_time():
    row = small_row()

    def make(factor):
        return lambda row: lambda a: factor * row.call(a, implementation="reference")

    same, other = (peers.Peer(str(x), "jax", make(x)) for x in (1.0, 1.01))

    def absent(row):
        raise peers.Missing("not installed")

    found = measure.on_cpu(row, ["chunked"], [same, other, peers.Peer("absent", "jax", absent)], repeats=1)
    assert [bool(one.rounds) for one in found] == [True, True, False, False]
    assert "differs from ours" in found[2].why
    assert found[3].why == "Missing: not installed"


def test_unknown_words_name_the_nearest():
    with pytest.raises(UserError, match="no op 'atention'; did you mean 'attention'"):
        bench("atention")
    with pytest.raises(UserError, match="no backend 'chunkd'; did you mean 'chunked'"):
        bench("attention", backends=["chunkd"])
    with pytest.raises(UserError, match="no suite 'stdd'; did you mean 'std'"):
        bench("attention", suite="stdd")


def test_bench_prints_error_time_and_floor():
    said = []
    assert bench("causal_conv", backends=["chunked"], say=said.append)
    text = "\n".join(said)
    assert "GB/s copy" in text
    assert "mlt chunked" in text
    assert "floor" in text


def test_the_gpu_plan_needs_no_gpu():
    script = tool("bench_gpu")
    words = script.argparse.Namespace(suite=["small"], only=["RG-LRU"])
    said = []
    assert script.dry_run(words, said.append)
    text = "\n".join(said)
    assert "mlt chunked: lowers" in text
    assert "mlt pallas_gpu: lowers" in text
    assert "mlt triton_gpu: " in text
    assert "tpu" not in text
    assert "peer fla chunk_hgrn" in text
    assert "floor 0.047" in text


def test_the_gpu_script_refuses_to_run_without_a_gpu():
    asked = [sys.executable, str(ROOT / "tools" / "bench_gpu.py"), "--out", "never_made"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "sees no GPU" in done.stderr


def test_a_record_becomes_a_line():
    script = tool("bench_gpu")
    row = small_row()
    ours = measure.Measured(row, "mlt chunked", error=1e-6, forward=2e-3, both=6e-3)
    peer = measure.Measured(row, "theirs", error=1e-6, forward=4e-3, both=8e-3)
    failed = measure.Measured(row, "broken", why="ImportError: no")
    records = [script.as_record(found, (1e-3, 3e-3), "memory/memory") for found in (ours, peer, failed)]
    lines = script.markdown(["# card"], records).splitlines()
    assert "| small | mlt chunked | 1.0e-06 | 2.000 | 2.0 | 6.000 | 2.0 | 0.75 |" in lines
    assert "| small | broken | no time: ImportError: no | | | | | |" in lines


def test_the_error_table_marks_what_is_wrong():
    script = tool("error_table")
    line = script.Line("chunked", "float32", "as given")
    line.add("one", {"out": 1e-7, "d q": 3e-4}, {})
    line.add("two", {"out": 2e-7, "d q": float("nan")}, {"d q": 1.0})
    assert line.bad() == ["d q"]
    text = script.section("op", [script.Table("", [line], [], {"pallas_gpu": "no GPU"})], "command")
    assert "nan !" in text
    assert "Command: `command`. Above its limit: 1 values" in text
    assert "`pallas_gpu` did not run: no GPU" in text


def test_the_error_table_tells_what_its_inputs_decide():
    """Only what the last place of the inputs moves as much is theirs, and it hides nothing else."""
    script = tool("error_table")
    line = script.Line("chunked", "float32", "as given")
    line.add("one", {"out": 4e-4}, {"out": 2e-4})
    assert line.bad() == []
    found = script.Amplified("float32", "as given", "one", "out", {"chunked": 4e-4, "reference": 1e-6}, 2e-4)
    text = script.section("op", [script.Table("Under stress", [line], [found], {})], "command")
    assert "### Under stress" in text
    assert "4.0e-04 ~ (one)" in text
    assert "| float32 | as given | one | 1 | out | 4.0e-04 | 1.0e-06 | 2.0e-04 | 2.0 |" in text
    line.add("two", {"out": 2e-5}, {"out": 1e-6})
    assert line.bad() == ["out"]
    harsh = script.Line("chunked", "float32", "as given", factor=script.STRESSED)
    harsh.add("three", {"out": 4e-5}, {"out": 5e-6})
    assert harsh.bad() == []
    assert "2.0e-05 !** (two)" in script.section("op", [script.Table("", [line], [found], {})], "command")


def test_the_error_table_keeps_other_ops(tmp_path):
    """A report grows by ops, each with its own date and command; one that is run again replaces its section."""
    script = tool("error_table")
    path = tmp_path / "cpu.md"
    assert script.sections_of(path) == {}
    for op, command in (("b", "first"), ("a", "first"), ("b", "second")):
        path.write_text(script.report(script.sections_of(path) | {op: script.section(op, [], command)}))
    text = path.read_text()
    assert text.index("## a") < text.index("## b")
    assert text.count("Command: `first`") == text.count("Command: `second`") == 1


def test_the_error_table_moves_inputs_by_one_unit():
    script = tool("error_table")
    rng = np.random.default_rng(0)
    given = {
        "x": jnp.asarray(rng.standard_normal(50), jnp.float32).at[0].set(0),
        "y": jnp.ones(9, jnp.bfloat16),
        "i": jnp.arange(3),
    }
    moved = script.shaken(given, 0)
    x, y = np.asarray(given["x"]), moved["x"]
    assert y[0] == 0
    assert set(np.where(y > x, np.nextafter(x, np.float32(np.inf)) == y, np.nextafter(x, -np.float32(np.inf)) == y)[1:]) == {True}
    assert set(np.asarray(moved["y"], np.float32)) == {1 - 2.0**-8, 1 + 2.0**-7}
    assert (np.asarray(moved["i"]) == np.arange(3)).all()


def test_the_error_table_measures_an_op():
    script = tool("error_table")
    (table,) = script.measure("causal_conv", ["chunked"], first_only=True)
    assert table.refused == {}
    assert table.amplified == []
    assert {line.dtype for line in table.lines} == {"float32", "bfloat16"}
    assert all(set(line.errors) == {"out", "more", "d x", "d kernel"} and not line.bad() for line in table.lines)


def test_pins_nothing_once_jax_has_begun():
    from mlt.bench import clock

    assert "jax" in sys.modules
    assert jax.default_backend() == "cpu"
    assert clock.pin() is None
