"""The manifest against the schemas that the cluster would check it by, and what its rules make of each end of a pod."""

import json
import pathlib
import re

import pytest
import yaml
from pydantic import ValidationError

from mlt.config.dump import to_yaml
from mlt.config.load import load_config
from mlt.config.run import RunConfig

ROOT = pathlib.Path(__file__).parents[3]
SITES = {
    "example": (ROOT / "launch" / "kubernetes.toml").read_text(),
    "one pod of cores": 'class = "mlt.launch.kubernetes.Kubernetes"\nimage = "mlt:1"\nvolume_claim = "v"\n',
    "everything": """
        class = "mlt.launch.kubernetes.Kubernetes"
        image = "place/mlt@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
        volume_claim = "v"
        pods = 2
        accelerators_per_pod = 4
        accelerator = "google.com/tpu"
        cpu = "500m"
        memory = "1.5Gi"
        namespace = "training"
        secret = "wandb"
        node_selector = {"kubernetes.io/arch" = "amd64"}
        labels = {"kueue.x-k8s.io/queue-name" = "queue"}
        annotations = {"alpha.jobset.sigs.k8s.io/exclusive-topology" = "rack"}
    """,
}


@pytest.fixture(scope="module")
def config_text() -> str:
    return to_yaml(load_config(ROOT / "tests" / "faults" / "tiny.py", root=RunConfig))


@pytest.fixture
def manifest(dry_run, site):
    """The parsed manifest of a site's text."""

    def parse(text: str) -> list[dict]:
        devices = {"example": 32, "everything": 8}.get(next((n for n, t in SITES.items() if t == text), ""), 1)
        words = ("--run-dir", "/runs/Tiny_1", "--set", f"mesh.fsdp={devices}", "--set", "data.batch_size=32")
        return list(yaml.safe_load_all(dry_run(site(text), *words)))

    return parse


@pytest.mark.parametrize("name", SITES)
def test_the_manifest_fits_the_schemas(manifest, schema, name):
    config, jobset = manifest(SITES[name])
    schema.ConfigMap.model_validate(config)
    schema.JobSet.model_validate(jobset)


def job_of(jobset: dict) -> dict:
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


@pytest.mark.parametrize(
    "change",
    [
        lambda jobset: job_of(jobset).update(backOffLimit=0),
        lambda jobset: job_of(jobset)["template"]["spec"].update(restartPolicy="OnFailure"),
        lambda jobset: job_of(jobset)["podFailurePolicy"]["rules"][0]["onExitCodes"].update(containerName="other"),
        lambda jobset: jobset["metadata"].update(name="Tiny"),
    ],
)
def test_the_schemas_refuse_what_the_cluster_would(manifest, schema, change):
    _, jobset = manifest(SITES["example"])
    change(jobset)
    with pytest.raises(ValidationError):
        schema.JobSet.model_validate(jobset)


FREE_MAPS = ("labels", "annotations", "nodeSelector", "requests", "limits", "data")


def places(node, path=()):
    """(where, mapping or list) of everything in a manifest that holds something."""
    if isinstance(node, dict | list):
        yield path, node
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from places(value, (*path, key))


def changed(manifest: dict, path: tuple, key, value) -> dict:
    copy = json.loads(json.dumps(manifest))
    node = copy
    for step in path:
        node = node[step]
    node[key] = value
    return copy


@pytest.mark.parametrize("name", SITES)
def test_the_schemas_leave_no_field_unknown_and_no_type_open(manifest, schema, name):
    """A stray field anywhere, and a value of another type anywhere, are refused: what is not listed does not pass."""
    for text, model in zip(manifest(SITES[name]), (schema.ConfigMap, schema.JobSet), strict=True):
        for path, node in places(text):
            if isinstance(node, dict) and path[-1:] not in [(free,) for free in FREE_MAPS]:
                with pytest.raises(ValidationError):
                    model.model_validate(changed(text, path, "strayField", "x"))
            for key, value in node.items() if isinstance(node, dict) else enumerate(node):
                other = [7.5] if not isinstance(value, list) else "x"
                with pytest.raises(ValidationError):
                    model.model_validate(changed(text, path, key, other))


def test_the_config_comes_back(manifest, config_text):
    config, _ = manifest(SITES["one pod of cores"])
    expected = yaml.safe_load(config_text)
    expected["data"]["batch_size"] = 32
    assert yaml.safe_load(config["data"]["config.yaml"]) == expected


def ends(jobset: dict, code: int, disrupted: bool = False) -> str:
    """What JobSet does after a pod ended with `code`: as the controllers of Kubernetes and JobSet go through the rules."""
    job = job_of(jobset)
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        if code in rule.get("onExitCodes", {}).get("values", ()):
            reason = "PodFailurePolicy"
            message = f"Container mlt for pod a/b failed with exit code {code} matching FailJob rule at index {index}"
            break
        if disrupted and "onPodConditions" in rule:
            reason, message = (
                "PodFailurePolicy",
                f"Pod a/b has condition DisruptionTarget matching FailJob rule at index {index}",
            )
            break
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        if rule.get("onJobFailureReasons") and reason not in rule["onJobFailureReasons"]:
            continue
        patterns = rule.get("onJobFailureMessagePatterns")
        if not patterns or any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize(
    ("code", "disrupted", "action"),
    [
        (2, False, "FailJobSet"),
        (1, False, "FailJobSet"),
        (75, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (75, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (70, False, "RestartJobSet"),
        (137, False, "RestartJobSet"),
        (139, False, "RestartJobSet"),
    ],
)
def test_each_end_of_a_pod_has_its_consequence(manifest, code, disrupted, action):
    _, jobset = manifest(SITES["example"])
    assert ends(jobset, code, disrupted) == action


def test_pods_find_the_first_by_its_name(manifest):
    _, jobset = manifest(SITES["example"])
    container = job_of(jobset)["template"]["spec"]["containers"][0]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert variables["MLT_COORDINATOR"] == "tiny-1-workers-0-0.tiny-1:8476"
    assert jobset["metadata"]["name"] == jobset["spec"]["network"]["subdomain"] == "tiny-1"
    assert variables["MLT_NUM_PROCESSES"] == "4"
    assert "MLT_PROCESS_ID" not in variables
