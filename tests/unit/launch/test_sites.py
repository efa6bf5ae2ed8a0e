"""Every problem of a site file at once, with the nearest names; and jobs that are refused before anything is started."""

import pathlib

import pytest

from mlt.config.problems import ConfigError
from mlt.errors import UserError
from mlt.launch.spec import load_site

ROOT = pathlib.Path(__file__).parents[3]


def problems(path) -> str:
    with pytest.raises(ConfigError) as error:
        load_site(path)
    return str(error.value)


def test_all_problems_at_once(site):
    text = problems(
        site(
            'class = "mlt.launch.slurm.Slurm"',
            "ndoes = 2",
            "tasks_per_node = 3",
            "gpus_per_node = 8",
            'time = "tomorrow"',
            'max_losses = "3"',
            'options = ["exclusive", "--nodes=4", "--gres=gpu:8"]',
            "[environment]",
            'PYTHONPATH = "x"',
        )
    )
    for words in ("ndoes", "did you mean nodes?", "max_losses = '3': must be an integer", "write 3 without quotes"):
        assert words in text, text


def test_all_broken_rules_at_once(site):
    text = problems(
        site(
            'class = "mlt.launch.slurm.Slurm"',
            "nodes = 0",
            "tasks_per_node = 3",
            "gpus_per_node = 8",
            'time = "tomorrow"',
            'options = ["exclusive", "--nodes=4", "--gres=gpu:8", "--gres=nvme:1"]',
            "[environment]",
            'PYTHONPATH = "x"',
            '"A B" = "x"',
        )
    )
    assert "8 config problems" in text, text
    for words in ("nodes = 0", "must divide gpus_per_node = 8", "tomorrow", "options[0]", "options[1]", "options[2]"):
        assert words in text, text
    assert "environment.PYTHONPATH" in text
    assert "options[3]" not in text


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["nodes = 2"], ["class: must name the launcher", "mlt.launch.slurm.Slurm"]),
        (['class = "mlt.launch.slurm.Slrum"'], ["Slrum", "Slurm"]),
        (['class = "mlt.optim.adamw.AdamW"'], ["must be a LaunchSpec"]),
        (['class = "mlt.launch.spec.RestartingSpec"'], ["only a base class"]),
        (['class = "mlt.launch.kubernetes.Kubernetes"', 'image = "mlt:latest"'], ["volume_claim", "is required"]),
        (
            ['class = "mlt.launch.kubernetes.Kubernetes"', 'image = "a/mlt"', 'volume_claim = "v"', 'runs = "/tmp"', 'cpu = "x"'],
            ["may change between restarts", "must lie below mount = /runs", "no quantity"],
        ),
        (['class = "mlt.launch.local.Local"', "processes = 0"], ["processes = 0", "must be at least 1"]),
        (
            ['class = "mlt.launch.local.Local"', "[environment]", 'CUDA_VISIBLE_DEVICES = "1"'],
            ["CUDA_VISIBLE_DEVICES", "use platform and devices_per_process"],
        ),
    ],
)
def test_what_is_wrong_is_named(site, lines, says):
    text = problems(site(*lines))
    for words in says:
        assert words in text, text


def test_no_toml_and_no_file(site, tmp_path):
    with pytest.raises(UserError, match=r"site\.toml: no valid TOML: .*line 2"):
        load_site(site('class = "mlt.launch.local.Local"', "processes ="))
    with pytest.raises(UserError, match=r"absent\.toml cannot be read"):
        load_site(tmp_path / "absent.toml")


def test_the_mesh_must_use_all_devices(dry_run):
    with pytest.raises(UserError, match=r"gives 16 devices, but mesh: fsdp=4 makes 4; .*mesh\.fsdp=16"):
        dry_run(ROOT / "launch" / "slurm.toml", "--set", "mesh.fsdp=4")


def test_a_broken_config_is_refused(dry_run, site):
    with pytest.raises(ConfigError, match=r"data\.batch_size = 5"):
        dry_run(site('class = "mlt.launch.local.Local"', "processes = 2"), "--set", "mesh.fsdp=2", "--set", "data.batch_size=5")


def test_a_run_directory_of_another_config_is_refused(dry_run, site, tmp_path):
    from mlt.config.dump import to_yaml
    from mlt.config.load import load_config

    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(to_yaml(load_config(ROOT / "tests/faults/tiny.py", args=["steps=30"])))
    with pytest.raises(UserError, match=r"train\.steps: 30 -> 24"):
        dry_run(site('class = "mlt.launch.local.Local"'), "--run-dir", run_dir)


def test_pods_need_the_volume_and_short_names(dry_run, site):
    path = site('class = "mlt.launch.kubernetes.Kubernetes"', 'image = "mlt:1"', 'volume_claim = "v"')
    with pytest.raises(UserError, match="does not lie on the volume v"):
        dry_run(path, "--run-dir", "/tmp/run")
    with pytest.raises(UserError, match="more than 40 characters"):
        dry_run(path, "--run-dir", "/runs/" + "x" * 41)


def test_data_may_lie_on_another_machine(dry_run, site):
    source = 'data.source={class: mlt.data.text_files.TextFiles, paths: ["/absent/*.txt"]}'
    pods = site('class = "mlt.launch.kubernetes.Kubernetes"', 'image = "mlt:1"', 'volume_claim = "v"')
    assert "/absent/*.txt" in dry_run(pods, "--set", source)
    with pytest.raises(ConfigError, match="absent"):
        dry_run(site('class = "mlt.launch.local.Local"'), "--set", source)
