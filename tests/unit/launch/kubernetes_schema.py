"""The part of the JobSet, Job, Pod and ConfigMap schemas that our manifests use: every field known, typed and required.

Written by hand after the published schemas (JobSet v1alpha2, Kubernetes 1.31), which are too large to keep here: what
is not listed is refused.
"""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
LabelValue = Annotated[str, Field(pattern=r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$", max_length=63)]
LabelKey = Annotated[str, Field(pattern=r"^([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")]
Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Part):
    name: Name
    namespace: Name | None = None
    labels: dict[LabelKey, LabelValue] = {}
    annotations: dict[LabelKey, str] = {}


class ConfigMap(Part):
    apiVersion: Literal["v1"]
    kind: Literal["ConfigMap"]
    metadata: Metadata
    immutable: bool
    data: dict[Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]+$")], str]


class Variable(Part):
    name: VariableName
    value: str


class Named(Part):
    name: Name


class EnvFrom(Part):
    secretRef: Named


class Resources(Part):
    requests: dict[LabelKey, Quantity] = {}
    limits: dict[LabelKey, Quantity] = {}


class VolumeMount(Part):
    name: Name
    mountPath: Annotated[str, Field(pattern=r"^/[^:]*$")]


class Container(Part):
    name: Name
    image: Annotated[str, Field(min_length=1)]
    command: list[str]
    env: list[Variable]
    envFrom: list[EnvFrom] = []
    resources: Resources = Resources()
    volumeMounts: list[VolumeMount]


class Claim(Part):
    claimName: Name


class EmptyDir(Part):
    medium: Literal["", "Memory"]
    sizeLimit: Quantity


class Volume(Part):
    name: Name
    configMap: Named | None = None
    persistentVolumeClaim: Claim | None = None
    emptyDir: EmptyDir | None = None

    @model_validator(mode="after")
    def one_source(self):
        assert sum(x is not None for x in (self.configMap, self.persistentVolumeClaim, self.emptyDir)) == 1
        return self


class Toleration(Part):
    key: LabelKey
    operator: Literal["Exists", "Equal"]


class PodSpec(Part):
    restartPolicy: Literal["Never", "OnFailure"]
    terminationGracePeriodSeconds: Annotated[int, Field(ge=0)]
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume]
    nodeSelector: dict[LabelKey, LabelValue] = {}
    tolerations: list[Toleration] = []

    @model_validator(mode="after")
    def mounts_exist(self):
        names = {volume.name for volume in self.volumes}
        assert {mount.name for container in self.containers for mount in container.volumeMounts} == names
        return self


class PodTemplate(Part):
    spec: PodSpec


class OnExitCodes(Part):
    containerName: Name
    operator: Literal["In", "NotIn"]
    values: Annotated[list[Annotated[int, Field(ge=1, le=255)]], Field(min_length=1, max_length=255)]

    @model_validator(mode="after")
    def ordered(self):
        assert self.values == sorted(set(self.values)), "values must be ordered and unique"
        return self


class PodCondition(Part):
    type: str
    status: Literal["True", "False", "Unknown"]


class PodFailureRule(Part):
    action: Literal["FailJob", "FailIndex", "Ignore", "Count"]
    onExitCodes: OnExitCodes | None = None
    onPodConditions: Annotated[list[PodCondition], Field(max_length=20)] | None = None

    @model_validator(mode="after")
    def one_requirement(self):
        assert (self.onExitCodes is None) != (self.onPodConditions is None)
        return self


class PodFailurePolicy(Part):
    rules: Annotated[list[PodFailureRule], Field(min_length=1, max_length=20)]


class JobSpec(Part):
    completionMode: Literal["Indexed", "NonIndexed"]
    completions: Annotated[int, Field(ge=1)]
    parallelism: Annotated[int, Field(ge=0)]
    backoffLimit: Annotated[int, Field(ge=0)]
    podFailurePolicy: PodFailurePolicy
    template: PodTemplate

    @model_validator(mode="after")
    def policy_fits(self):
        pod = self.template.spec
        assert pod.restartPolicy == "Never", "a podFailurePolicy needs restartPolicy Never"
        names = {container.name for container in pod.containers}
        for rule in self.podFailurePolicy.rules:
            assert rule.onExitCodes is None or rule.onExitCodes.containerName in names
        return self


class JobTemplate(Part):
    spec: JobSpec


class ReplicatedJob(Part):
    name: Name
    replicas: Annotated[int, Field(ge=1)]
    template: JobTemplate


class FailureRule(Part):
    name: Annotated[str, Field(pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", max_length=128)]
    action: Literal[
        "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob", "RestartJobAndIgnoreMaxRestarts"
    ]
    onJobFailureReasons: list[
        Literal["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"]
    ] = []
    onJobFailureMessagePatterns: list[str] = []

    @model_validator(mode="after")
    def unique(self):
        for values in (self.onJobFailureReasons, self.onJobFailureMessagePatterns):
            assert len(set(values)) == len(values), values
        return self

    @model_validator(mode="after")
    def patterns_compile(self):
        for pattern in self.onJobFailureMessagePatterns:
            re.compile(pattern)
        return self


class FailurePolicy(Part):
    maxRestarts: Annotated[int, Field(ge=0)]
    rules: list[FailureRule] = []


class Network(Part):
    enableDNSHostnames: bool
    subdomain: Name
    publishNotReadyAddresses: bool


class JobSetSpec(Part):
    network: Network
    failurePolicy: FailurePolicy
    replicatedJobs: Annotated[list[ReplicatedJob], Field(min_length=1)]


class JobSet(Part):
    apiVersion: Literal["jobset.x-k8s.io/v1alpha2"]
    kind: Literal["JobSet"]
    metadata: Metadata
    spec: JobSetSpec

    @model_validator(mode="after")
    def pods_have_host_names(self):
        for job in self.spec.replicatedJobs:
            last = job.template.spec.completions - 1
            longest = f"{self.metadata.name}-{job.name}-{job.replicas - 1}-{last}"
            assert len(longest) + len("-12345") <= 63, longest
        return self
