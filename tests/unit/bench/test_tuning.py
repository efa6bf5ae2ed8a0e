"""The search for block sizes without a GPU: its candidates, its descent on a made-up clock, the file it keeps, its dry run."""

import argparse
import json
import subprocess
import sys

import pytest
from mlt_kernels import tuned
from tool_files import TOOLS, tool

from mlt.bench import tuning

SHAPE = (("K", 64), ("V", 128), ("item_bytes", 2), ("vector", False))
FORWARD, KEYS = (tuned.Key("linear_recurrence", "triton_gpu", name, SHAPE) for name in ("forward", "keys"))
RULES = {FORWARD: {"values": 64, "warps": 8, "stages": 3}, KEYS: {"keys": 64, "warps": 4, "stages": 2}}


def words(**changes):
    return argparse.Namespace(**({"ops": ["diagonal_recurrence"], "suite": ["small"], "backend": ["pallas_gpu"]} | changes))


def test_candidates_differ_in_one_size_and_fit_a_table():
    found = [*tuning.candidates(KEYS, RULES[KEYS])]
    assert {"keys": 32, "warps": 4, "stages": 2} in found
    assert all(sum(sizes[name] != RULES[KEYS][name] for name in sizes) == 1 for sizes in found)
    assert max(sizes["keys"] for sizes in found) == 64, "128 would not divide K"
    assert {sizes["stages"] for sizes in found} == {1, 2, 3, 4}
    for sizes in found:
        line = {"op": KEYS.op, "backend": KEYS.backend, "kernel": KEYS.kernel, "shape": dict(SHAPE), "sizes": sizes}
        assert tuned.checked(line) == (KEYS, sizes)


def test_the_descent_keeps_what_is_faster_and_refuses_what_fails():
    def seconds(sizes):
        if sizes[KEYS]["warps"] == 16:
            return None, "wrong: out is 1 off"
        cost = abs(sizes[FORWARD]["values"] - 32) + abs(sizes[KEYS]["warps"] - 8) + 0.1 * abs(sizes[KEYS]["stages"] - 1)
        return 100.0 + cost, ""

    found = tuning.descend(RULES, seconds)
    assert found.sizes[FORWARD] == RULES[FORWARD] | {"values": 32}
    assert found.sizes[KEYS] == RULES[KEYS] | {"warps": 8}, "a tenth of a percent may be the clock"
    assert (found.rule, found.best) == (136.1, 100.1)
    assert found.refused == ["keys warps=16: wrong: out is 1 off"]
    assert found.tried == sum(len([*tuning.candidates(key, sizes)]) for key, sizes in RULES.items())


def test_without_a_time_of_the_rule_nothing_is_searched():
    found = tuning.descend(RULES, lambda sizes: (None, "refuses: no"))
    assert (found.best, found.tried, found.refused) == (None, 0, ["refuses: no"])


def test_the_file_is_a_table_and_a_second_start_goes_on_with_it(tmp_path):
    script = tool("tune_gpu")
    path, said, searched = tmp_path / "made" / "card.json", [], []

    def search(row, backend, rules, known):
        searched.append((row.name, backend, sorted(key.kernel for key in rules), len(known)))
        if row.op == "selective_scan":
            raise RuntimeError("the device is gone")
        return tuning.Found({key: sizes | {"channels": 32} for key, sizes in rules.items()}, rule=2e-3, best=1e-3, tried=3)

    asked = words(out=path, ops=["diagonal_recurrence", "selective_scan"])
    script.run(asked, search, said.append)
    assert [name for _, _, names, _ in searched for name in names] == ["walk", "backward", "forward"]
    table = json.loads(path.read_text())
    assert {"device", "card", "versions"} <= table.keys()
    assert [record.get("best_ms", record.get("why")) for record in table["rows"]] == [1.0, "RuntimeError: the device is gone"]
    assert [*tuned.load(path).values()] == [{"channels": 32}]
    script.run(asked, search, said.append)
    assert len(searched) == 2, "every row is in the file"
    script.run(words(out=path, suite=["small", "std"]), search, said.append)
    assert len(searched) == 2, "the larger row launches the same kernel at the same shape"
    assert json.loads(path.read_text())["rows"][-1]["why"] == "all its kernels are in the table"
    path.write_text(json.dumps(table | {"card": "another"}))
    with pytest.raises(ValueError, match="begin another file"):
        script.run(asked, search, said.append)


def test_a_candidate_that_is_searched_is_what_is_lowered(monkeypatch):
    """The clock sees the sizes in force while it compiles, whatever the table says."""
    seen = []

    def tried(row, backend, wanted):
        rules, _ = tuning.asked(row, backend)
        (key,) = rules
        sizes = tuned.sizes(*key[:3], dict(key.shape), rules[key])
        seen.append(sizes["channels"])
        return argparse.Namespace(why="", both=float(sizes["channels"]))

    monkeypatch.setattr(tuning.accelerator, "tried", tried)
    monkeypatch.setattr(tuning.accelerator, "portable", lambda row: None)
    ((row, backend),) = tool("tune_gpu").chosen(words())
    rules, _ = tuning.asked(row, backend)
    found = tuning.search(row, backend, rules, {})
    assert seen == [64, 16, 32, 128, 256]
    assert [*found.sizes.values()] == [{"channels": 16}]


def test_the_dry_run_needs_no_gpu():
    said = []
    assert tool("tune_gpu").dry_run(words(), said.append)
    text = "\n".join(said)
    assert "pallas_gpu: lowers" in text
    assert "walk {'item_bytes': 2}: channels=64; 4 candidates" in text
    assert text.count("walk channels=") == 4
    assert text.count(": lowers") == 5


def test_the_command_refuses_what_it_cannot_do():
    for arguments, why in (
        (["--out", "never_made"], "sees no GPU"),
        (["attention", "--dry-run"], "no kernels with tables: attention"),
    ):
        done = subprocess.run([sys.executable, TOOLS / "tune_gpu.py", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert why in done.stderr
