"""The report: whatever the run directory holds, one page that stands alone and tells it right."""

import json
import os
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mlt.checkpoint.save import Checkpointer
from mlt.errors import UserError
from mlt.report.goodput import CAUSES
from mlt.report.history import Series
from mlt.report.page import write_report
from mlt.report.plots import Line, Plot, draw
from mlt.report.sections import _TONES
from mlt.train.run_directory import RunDirectory

START = {"kind": "start", "step": 0, "time": 1000.0, "steps": 300, "jax": "0.10.2", "device": "cpu", "num_devices": 2}
VOID = {"meta", "link", "br", "img", "input", "hr"}


def row(step: int, **changes: float | None) -> dict:
    return {
        **{"step": step, "time": 1000.0 + step, "train/loss": 2 + 3 / step, "train/grad_norm": 1.5, "train/tokens": 4096 * step},
        **{"train/learning_rate": 3e-4, "throughput/tokens_per_second": 27_000.0, "throughput/step_seconds": 0.15},
        **{"data/wait_seconds": 0.015, "eval/loss": 2.5, "eval/bits_per_byte": 3.5},
        **changes,
    }


def make_run(path: Path, rows: list[dict] | None, *, tail: str = "", config: str | None = "train: {steps: 300}\n") -> Path:
    path.mkdir(exist_ok=True)
    if config is not None:
        (path / "config.yaml").write_text(config)
    if rows is not None:
        (path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rows) + tail)
    return path


class Page(HTMLParser):
    """Reads a page and fails on unbalanced tags, repeated ids and anything that would be fetched."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.labels: list[str] = []
        self.text = ""
        self.feed(path.read_text())
        self.close()
        assert not self.open
        assert len(set(self.ids)) == len(self.ids)
        assert all(reference.startswith("#") and reference[1:] in self.ids for reference in self.references)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"script in {tag} {name}"
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "data", "action"):
                self.references.append(value or "")
            if name == "aria-label":
                self.labels.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data
        else:
            assert "url(" not in data
            assert "@import" not in data


def read(path: Path) -> Page:
    page = Page(path)
    assert "script" not in page.tags
    assert "http://" not in path.read_text()
    assert "https://" not in path.read_text()
    return page


def test_a_whole_run(tmp_path):
    run = make_run(
        tmp_path / "my run",
        [START, row(100), row(200), {**START, "step": 200, "time": 2000.0, "jax": "0.12.0"}, row(300, time=2060.0)],
        tail='{"step": 400, "tra',
    )
    (run / "plan.txt").write_text("linear_recurrence: chunked")
    samples = [{"step": 200, "prompt": "", "text": "early"}, {"step": 300, "prompt": "import ", "text": "os\n\x00 sys"}]
    (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    with Checkpointer(run / "checkpoints") as checkpoints:
        checkpoints.save(300, {"w": jnp.ones(3)}, data={}, meta={"tokens": 1_228_800})
    path = write_report(run)
    assert path == run / "report.html"
    page = read(path)
    assert page.tags.count("figure") == page.tags.count("svg") == 6
    for text in ("my run", "complete", "of 300", "1.23M", "4m 20s", "1 restart", "2.010", "3.500", "27k", "2 x cpu"):
        assert text in page.text, text
    for text in (
        "early",
        "import os\n\ufffd sys",
        "linear_recurrence: chunked",
        "train: {steps: 300}",
        "0.12.0",
        "checkpoints/300",
    ):
        assert text in page.text, text
    (loss,) = (label for label in page.labels if label.startswith("Loss"))
    assert "train: 2.03 at step 100, 2.01 at step 300, lowest 2.01, highest 2.03" in loss
    assert "Dotted lines" in page.text
    assert sorted(os.listdir(run)) == ["checkpoints", "config.yaml", "metrics.jsonl", "plan.txt", "report.html", "samples.jsonl"]


@pytest.mark.parametrize(
    ("rows", "figures", "texts"),
    [
        (None, 0, ["No metrics yet", "no step yet"]),
        ([], 0, ["No metrics yet"]),
        ([START], 0, ["No metrics yet", "0.10.2"]),
        ([START, row(1)], 6, ["stopped at step 1"]),
        ([START, row(1), row(2)], 6, ["stopped at step 2"]),
        ([row(1, **{"train/loss": None}), row(2)], 6, ["train/loss is not finite at step 1", "Crosses"]),
        ([START, row(1, **{"train/loss": None, "train/grad_norm": None})], 6, ["train/grad_norm is not finite at step 1"]),
        (
            [START, {"step": 5, "time": 1.0, "odd/one": 0.0}, {"step": 6, "time": 1.0, "odd/one": -1e30}],
            1,
            ["odd/one", "No metrics"],
        ),
    ],
)
def test_a_run_cut_short_anywhere_has_a_report(tmp_path, rows, figures, texts):
    page = read(write_report(make_run(tmp_path / "run", rows)))
    assert page.tags.count("figure") == figures
    for text in texts:
        assert text in page.text, text


def test_where_the_time_went_and_what_went_wrong(tmp_path):
    rollback = {"kind": "rollback", "step": 4, "time": 5.0, "from_step": 8, "first_skipped": 6}
    rows = [START, row(3, **{"guard/skipped_steps": 0.0}), rollback, row(9, **{"alarm/checkpoint_failures": 2})]
    run = make_run(tmp_path / "run", rows)
    (run / "logs").mkdir()
    spent = [
        {"kind": "start", "step": 0, "time": 1.0},
        {"step": 8, "time": 50.0, "seconds": {"startup": 10.0, "step": 80.0}},
        {"kind": "rollback", "step": 4, "time": 50.0},
        {"step": 9, "time": 60.0, "seconds": {"step": 10.0}},
    ]
    (run / "logs" / "goodput.jsonl").write_text("".join(json.dumps(part) + "\n" for part in spent))
    page = read(write_report(run))
    for text in ("went back from step 8 to step 4", "alarm/checkpoint_failures raised, last at step 9", "Goodput 50.0 %"):
        assert text in page.text, text
    for text in ("steps rolled back", "40 s", "40.0 %", "start-up and restore"):
        assert text in page.text, text
    assert "guard/skipped_steps" not in page.text
    assert "saving" not in page.text
    assert "goodput50 %of the time" in page.text  # the tile, too, is of the whole run
    html = (run / "report.html").read_text()
    for cause, tone in (("training steps", "good"), ("steps rolled back", "bad"), ("start-up and restore", "k6")):
        assert f'<span class="key block {tone}">{cause}</span>' in html
        assert re.search(f'<i class="{tone}" style="width:[0-9.]+%" title="{cause}: ', html)


def test_every_cause_of_spent_time_has_a_colour_of_its_own_unless_it_is_a_loss():
    tones = [_TONES[cause] for cause in CAUSES if _TONES[cause] != "bad"]
    assert len(set(tones)) == len(tones)
    style = files("mlt.report").joinpath("page.css").read_text()
    assert all(f".{tone} {{ --tone" in style for tone in {*tones, "bad"})


def test_lines_are_named_by_the_numbers_that_differ(tmp_path):
    names = [f"router/layers.{layer}.sub_layers.1/load" for layer in (1, 3)]
    html = write_report(make_run(tmp_path / "run", [START, row(1, **dict.fromkeys(names, 0.5))])).read_text()
    assert re.findall(r'<span class="key k\d">(layers[^<]*)</span>', html) == ["layers 1", "layers 3"]


def test_a_run_in_progress_says_so(tmp_path):
    run = RunDirectory(tmp_path / "run")
    with run.lock():
        make_run(run.path, [START, row(100)])
        assert "running" in read(write_report(run.path)).text
    assert "stopped at step 100" in read(write_report(run.path)).text


def test_nothing_in_the_files_becomes_markup(tmp_path):
    evil = '<script>alert(1)</script>"><img src=x onerror=alert(2)>&amp;'
    rows = [{**START, "host": evil, evil: 1}, row(1, **{evil: 1.0})]
    run = make_run(tmp_path / "<b>&run", rows, config=f"# {evil}\n")
    (run / "plan.txt").write_text(evil)
    (run / "samples.jsonl").write_text(json.dumps({"step": 1, "prompt": evil, "text": evil}) + "\n")
    page = read(write_report(run))
    assert "img" not in page.tags
    assert page.text.count(evil) >= 7


def test_a_long_run_makes_a_small_page_and_keeps_its_spikes(tmp_path):
    rows = [START, *(row(step, **{f"moe/blocks.{i}/load": 0.1 * i for i in range(12)}) for step in range(1, 20_001))]
    rows[12_345]["train/loss"] = 99.0
    path = write_report(make_run(tmp_path / "run", rows))
    page = read(path)
    assert path.stat().st_size < 1_500_000
    assert page.tags.count("figure") == 7
    assert "moe/blocks.*/load 12 of them" in page.text
    assert any("highest 99" in label for label in page.labels)


def test_a_line_is_drawn_where_its_values_are():
    figure = draw(Plot("x", [Line("a", Series(np.array([0.0, 10.0, 30.0]), np.array([1.0, 2.0, 4.0])))]))
    (path,) = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--line1\); stroke-width', figure)
    points = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", path), float)
    assert len(points) == 3
    across, up = np.diff(points, axis=0).T
    assert across[1] == pytest.approx(2 * across[0], rel=1e-3)
    assert across[0] > 0
    assert up[1] == pytest.approx(2 * up[0], rel=1e-3)
    assert up[0] < 0


def test_colours_and_fonts_come_from_the_page():
    figure = draw(
        Plot("x", [Line("a", Series(np.arange(100.0), np.arange(100.0))), Line("b", Series(np.arange(3.0), np.ones(3)))])
    )
    assert not re.findall(r"#[0-9a-f]{6}", figure)
    assert "font-family" not in figure
    assert "DejaVu" not in figure


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        write_report(tmp_path)
    assert os.listdir(tmp_path) == []
