"""A JobSet: pods of one indexed Job that are started together, and again together, by the codes they end with.

Needs Kubernetes 1.31 and JobSet 0.10.1 or newer (the chart of 0.10.0 lacks onJobFailureMessagePatterns). The manifest holds the
resolved config; the image holds the code.
"""

import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import yaml

from mlt.config.base import FrozenMap
from mlt.config.problems import Problem
from mlt.errors import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USER, UserError
from mlt.launch.spec import Job, LaunchSpec, at_least

_WORKERS, _CONTAINER, _PORT = "workers", "mlt", 8476
_CONFIG_DIR = "/etc/mlt"
_LONGEST_NAME = 40  # of a JobSet whose pods' names, and so host names, stay below 64 characters
_BY_POLICY = "PodFailurePolicy"  # the reason that Kubernetes gives for a Job that its podFailurePolicy ended


class Kubernetes(LaunchSpec):
    """A Kubernetes cluster with JobSet.

    Attributes:
        image: container image with mlt in it, with a tag or digest of its own: it is the code of every restart.
        volume_claim: PersistentVolumeClaim, ReadWriteMany, that holds the run directories.
        mount: where it is mounted in the pods.
        pods: machines.
        accelerators_per_pod: of each; 0 asks for none and computes on the CPU.
        accelerator: what the cluster calls them.
        cpu: cores of each pod; None asks for none, as with memory.
        memory: of each pod, such as 512Gi.
        shared_memory: size of /dev/shm, which NCCL uses; None leaves the container's own.
        max_restarts: restarts after lost processes, in all; one that was preempted and has saved does not count.
        grace_seconds: time to save when a pod is asked to end.
        namespace: of all objects; None takes the one kubectl is set to.
        node_selector: labels that the machines must have.
        tolerations: keys of taints that the pods put up with.
        labels: of the JobSet, such as a queue's name.
        annotations: of the JobSet.
        secret: name of a Secret whose entries become variables, such as WANDB_API_KEY; None for none.
    """

    runs: str = "/runs"
    image: str
    volume_claim: str
    mount: str = "/runs"
    pods: int = 1
    accelerators_per_pod: int = 0
    accelerator: str = "nvidia.com/gpu"
    cpu: str | None = None
    memory: str | None = None
    shared_memory: str | None = None
    max_restarts: int = 10
    grace_seconds: int = 300
    namespace: str | None = None
    node_selector: Mapping[str, str] = FrozenMap({})
    tolerations: tuple[str, ...] = ()
    labels: Mapping[str, str] = FrozenMap({})
    annotations: Mapping[str, str] = FrozenMap({})
    secret: str | None = None

    @property
    def num_devices(self) -> int:
        return self.pods * (self.accelerators_per_pod or self.cpu_devices())

    @property
    def shares_files(self) -> bool:
        return False

    def run_dir(self, name: str) -> PurePosixPath:
        return PurePosixPath(self.runs, name)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from at_least(self, 1, "pods", "grace_seconds")
        yield from at_least(self, 0, "accelerators_per_pod", "max_restarts")
        tag = re.search(r"(@sha256:[0-9a-f]{64}|:[\w][\w.-]*)$", self.image)
        if tag is None or tag[0] == ":latest":
            ways = "give a tag that is never moved, or image@sha256:..."
            yield Problem("image", self.image, "may change between restarts, and the code with it", ways)
        if not PurePosixPath(self.mount).is_absolute():
            yield Problem("mount", self.mount, "must be an absolute path")
        elif not PurePosixPath(self.runs).is_relative_to(self.mount):
            yield Problem("runs", self.runs, f"must lie below mount = {self.mount}, or checkpoints end with their pods")
        for name in ("cpu", "memory", "shared_memory"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?", value):
                yield Problem(name, value, "is no quantity of Kubernetes", "write such as 500m, 16 or 512Gi")

    def describe(self, job: Job) -> str:
        return yaml.dump_all(
            self.manifest(job), Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=110, allow_unicode=True
        )

    def submit(self, job: Job, say: Callable[[str], None]) -> int:
        text = self.describe(job)
        try:
            done = subprocess.run(["kubectl", "create", "-f", "-"], input=text, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise UserError("there is no kubectl here; print the manifest with --dry-run, and create it elsewhere") from None
        space = f" -n {self.namespace}" if self.namespace else ""
        if done.returncode:
            raise UserError(
                f"kubectl refuses the job: {done.stderr.strip()}\nif it is there from an earlier launch, delete that first "
                f"(its checkpoints stay): kubectl delete{space} jobset/{job.name} configmap/{job.name}-config\n"
                "where no cluster is reached (kubectl cluster-info), print the manifest with --dry-run and create it elsewhere"
            )
        say(
            f"{done.stdout.strip()}\n"
            f"  kubectl logs{space} -f -l jobset.sigs.k8s.io/jobset-name={job.name} --prefix    follow\n"
            f"  kubectl get{space} jobset {job.name}    state and restarts\n"
            f"  kubectl delete{space} jobset/{job.name} configmap/{job.name}-config    save, and end"
        )
        return 0

    def manifest(self, job: Job) -> list[dict[str, Any]]:
        """The ConfigMap and the JobSet.

        Raises:
            UserError: the run directory does not lie on the volume, or its name is too long.
        """
        if not job.run_dir.is_relative_to(self.mount):
            raise UserError(
                f"--run-dir {job.run_dir} does not lie on the volume {self.volume_claim}, which is mounted at {self.mount}: "
                "its checkpoints would end with the pod"
            )
        if len(job.name) > _LONGEST_NAME:
            raise UserError(
                f"the run's name {job.name} has more than {_LONGEST_NAME} characters; give a --run-dir with a shorter one"
            )
        place = {"namespace": self.namespace} if self.namespace else {}
        labels = {"app.kubernetes.io/name": "mlt", **self.labels}
        config = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": f"{job.name}-config", **place, "labels": {"app.kubernetes.io/name": "mlt"}},
            "immutable": True,
            "data": {"config.yaml": job.config_text},
        }
        notes = {"annotations": dict(self.annotations)} if self.annotations else {}
        jobset = {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {"name": job.name, **place, "labels": labels, **notes},
            "spec": {
                # JobSet makes the headless service of this name, which gives pod i the name <name>-workers-0-<i>.<name>.
                "network": {"enableDNSHostnames": True, "subdomain": job.name, "publishNotReadyAddresses": True},
                "failurePolicy": self._after_a_job(),
                "replicatedJobs": [{"name": _WORKERS, "replicas": 1, "template": {"spec": self._job(job)}}],
            },
        }
        return [config, jobset]

    def _after_a_job(self) -> dict[str, Any]:
        """What follows the end of the Job: the message tells which rule of `_after_a_pod` ended it."""
        final = f"exit code ({EXIT_FAILED}|{EXIT_USER}) "
        return {
            "maxRestarts": self.max_restarts,
            "rules": [
                {
                    "name": "failedByItself",
                    "action": "FailJobSet",
                    "onJobFailureReasons": [_BY_POLICY],
                    "onJobFailureMessagePatterns": [final],
                },
                {
                    "name": "savedOrPreempted",
                    "action": "RestartJobSetAndIgnoreMaxRestarts",
                    "onJobFailureReasons": [_BY_POLICY],
                },
                {"name": "lostProcess", "action": "RestartJobSet"},
            ],
        }

    def _after_a_pod(self) -> dict[str, Any]:
        """What a pod's end means; every other code, 70 among them, counts against backoffLimit, which is 0."""

        def ended_with(*codes: int) -> dict[str, Any]:
            return {"containerName": _CONTAINER, "operator": "In", "values": list(codes)}

        return {
            "rules": [
                {"action": "FailJob", "onExitCodes": ended_with(EXIT_FAILED, EXIT_USER)},
                {"action": "FailJob", "onExitCodes": ended_with(EXIT_PREEMPTED)},
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        }

    def _job(self, job: Job) -> dict[str, Any]:
        return {
            "completionMode": "Indexed",
            "completions": self.pods,
            "parallelism": self.pods,
            "backoffLimit": 0,
            "podFailurePolicy": self._after_a_pod(),
            "template": {"spec": self._pod(job)},
        }

    def _pod(self, job: Job) -> dict[str, Any]:
        mounts = [{"name": "config", "mountPath": _CONFIG_DIR}, {"name": "runs", "mountPath": self.mount}]
        volumes: list[dict[str, Any]] = [
            {"name": "config", "configMap": {"name": f"{job.name}-config"}},
            {"name": "runs", "persistentVolumeClaim": {"claimName": self.volume_claim}},
        ]
        if self.shared_memory is not None:
            mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
            volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": self.shared_memory}})
        container: dict[str, Any] = {
            "name": _CONTAINER,
            "image": self.image,
            "command": ["mlt", "train", f"{_CONFIG_DIR}/config.yaml", "--run-dir", str(job.run_dir)],
            "env": [{"name": name, "value": value} for name, value in self._variables(job).items()],
        }
        if self.secret is not None:
            container["envFrom"] = [{"secretRef": {"name": self.secret}}]
        if resources := self._resources():
            container["resources"] = resources
        pod: dict[str, Any] = {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": self.grace_seconds,
            "containers": [container | {"volumeMounts": mounts}],
            "volumes": volumes,
        }
        if self.node_selector:
            pod["nodeSelector"] = dict(self.node_selector)
        if self.tolerations:
            pod["tolerations"] = [{"key": key, "operator": "Exists"} for key in self.tolerations]
        return pod

    def _resources(self) -> dict[str, Any]:
        asked = {name: value for name in ("cpu", "memory") if (value := getattr(self, name)) is not None}
        if not self.accelerators_per_pod:
            return {"requests": asked} if asked else {}
        limits = {self.accelerator: str(self.accelerators_per_pod)}
        return ({"requests": asked} if asked else {}) | {"limits": limits}

    def _variables(self, job: Job) -> dict[str, str]:
        variables = self.variables(job)
        if not self.accelerators_per_pod:
            variables |= {"JAX_PLATFORMS": "cpu"}
        if self.pods > 1:
            # JOB_COMPLETION_INDEX, which Kubernetes sets, says which of them a pod is.
            first = f"{job.name}-{_WORKERS}-0-0.{job.name}"
            variables |= {"MLT_COORDINATOR": f"{first}:{_PORT}", "MLT_NUM_PROCESSES": str(self.pods)}
        return variables


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as they are, and no references between equal parts."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _write_text)
