"""`mlt plan`: devices by name, what is printed, and what is refused."""

import json
import pathlib

import pytest
from click.testing import CliRunner

from mlt.cli import cli
from mlt.config.load import load_config
from mlt.errors import UserError
from mlt.plan.devices import GIB, KNOWN, parse_pool
from mlt.plan.devices_text import plan_devices
from mlt.plan.forecast import forecast
from mlt.plan.layouts import candidates

ROOT = pathlib.Path(__file__).parents[3]
TRANSFORMER = ROOT / "configs/families/transformer.py"


def published(*sets, size="8b", rows=64):
    return load_config(TRANSFORMER, args=[f"size={size}", f"batch_size={rows}"], sets=sets)


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [("64xH200", 64, "H200"), ("8 * h100", 8, "H100"), ("256xTPU v5p", 256, "v5p"), ("1xgb200", 1, "GB200")],
)
def test_devices_have_a_number_and_a_kind(text, count, name):
    pool = parse_pool(text)
    assert (pool.count, pool.device) == (count, KNOWN[name])


@pytest.mark.parametrize(
    ("text", "says"),
    [("64", "such as 64xH200"), ("0xH100", "must be a number"), ("8xH20", "did you mean H200"), ("8xRTX", "A100")],
)
def test_unknown_devices_are_refused_with_those_there_are(text, says):
    with pytest.raises(UserError, match=says):
        parse_pool(text)


def test_an_eight_billion_model_over_eight_devices():
    one = forecast(published("mesh.fsdp=8", rows=8), parse_pool("8xH200"))
    state = 4 * 8.03e9 / 8
    assert one.classes["parameters"] == pytest.approx(state, rel=0.01)
    assert one.classes["optimizer state"] == pytest.approx(2 * state, rel=0.01)
    assert one.classes["gradients"] >= state
    assert one.fits
    # Layer inputs of both sub-layers in bfloat16 are kept, nothing else of that size.
    assert one.classes["kept for the backward pass"] == pytest.approx(64 * 8192 * 4096 * 2, rel=0.15)
    # Forward, backward and a forward again: a third more than the model's own.
    assert one.flops / one.model_flops == pytest.approx(4 / 3, rel=0.02)
    weights = dict.fromkeys(("all-gather", "reduce-scatter"), 0.0)
    for crossing in one.crossings:
        weights[crossing.kind] = weights.get(crossing.kind, 0) + crossing.nbytes
    # bfloat16 weights for the forward and the backward pass; float32 gradients.
    assert weights["all-gather"] == pytest.approx(2 * 2 * 8.03e9 * 7 / 8, rel=0.3)
    assert weights["reduce-scatter"] == pytest.approx(4 * 8.03e9 * 7 / 8, rel=0.3)
    assert one.least_seconds < one.most_seconds


def test_what_keeps_less_holds_less_and_offloaded_inputs_go_to_the_host():
    plans = {
        name: forecast(published("mesh.fsdp=8", *sets, size="1b", rows=8), parse_pool("8xH100"))
        for name, sets in {
            "none": ["remat.mode=none"],
            "sub_layer": [],
            "offload": ['remat.offload=["sub_layer_in"]'],
            "context": ["mesh.fsdp=2", "mesh.context=4"],
        }.items()
    }
    kept = {name: plan.classes["kept for the backward pass"] + plan.classes["in use at once"] for name, plan in plans.items()}
    assert kept["none"] > 3 * kept["sub_layer"]
    assert kept["offload"] < kept["sub_layer"] - 0.9 * 2 * 16 * 8192 * 2048 * 2
    host = [crossing for crossing in plans["offload"].crossings if crossing.over == "host"]
    assert sum(crossing.nbytes for crossing in host) == pytest.approx(2 * 2 * 16 * 8192 * 2048 * 2, rel=0.01)
    assert plans["context"].flops == pytest.approx(plans["sub_layer"].flops, rel=0.05)


def test_axes_reach_over_links_or_the_network_by_where_they_lie():
    one = forecast(published("mesh.fsdp=4", "mesh.tensor=8", size="1b", rows=8), parse_pool("32xH100"))
    assert {crossing.over for crossing in one.crossings if crossing.axes == ("tensor",)} == {"links"}
    assert {crossing.over for crossing in one.crossings if "fsdp" in crossing.axes} == {"network"}


def test_layouts_multiply_to_the_devices_and_leave_out_what_the_model_has_not():
    found = list(candidates(published(), parse_pool("64xH100")))
    assert all(layout.num_devices == 64 and layout.expert == 1 and layout.tensor <= 8 for layout in found)
    assert len(set(found)) == len(found) > 10


def test_one_that_does_not_fit_says_what_is_too_large_and_what_would_do():
    config = published("mesh.fsdp=8", "remat.mode=none", rows=16)
    text, fits = plan_devices(config, "8xH100")
    assert not fits
    assert "does NOT fit: " in text
    assert "most of it kept for the backward pass" in text
    assert "with --set remat.mode=sub_layer: fits" in text


def run(*words):
    return CliRunner().invoke(cli, ["plan", str(TRANSFORMER), *words])


def test_the_command_searches_where_the_mesh_is_open_and_speaks_json():
    done = run("--arg", "size=1b", "--arg", "batch_size=8", "--devices", "8xH200", "--layouts", "2", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert len(told["layouts"]) == 2
    first, second = told["layouts"]
    assert first["fits"]
    assert sum(first["bytes"].values()) == first["total_bytes"] <= first["usable_bytes"] < 141 * GIB
    assert sum(first["step_seconds"]) <= sum(second["step_seconds"])


def test_the_exit_code_says_that_nothing_fits():
    done = run("--arg", "size=8b", "--arg", "batch_size=8", "--devices", "1xA100")
    assert done.exit_code == 1
    assert "more devices" in done.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--devices", "8xH200", "--set", "mesh.fsdp=4"], "fsdp=4 makes 4 devices, and --devices names 8"),
        (["--devices", "8xH20"], "did you mean H200"),
        (["--devices", "7xH200"], "no layout over 7 x H200 can run"),
        (
            ["--devices", "8xv5p", "--set", "mesh.fsdp=8", "--compile", "--arg", "batch_size=8"],
            "--compile knows H100 and H200, not v5p",
        ),
    ],
)
def test_bad_words_are_one_message(words, says):
    done = run(*words)
    assert isinstance(done.exception, UserError)
    assert says in str(done.exception)
