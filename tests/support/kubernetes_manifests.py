"""What deploy/kuberay and deploy/mlflow may say: the fields in use, and no others."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator
from pydantic.alias_generators import to_camel


class Manifest(BaseModel):
    """An object whose every field is known."""

    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, strict=True)


class Metadata(Manifest):
    name: str = Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)
    namespace: str | None = None
    labels: dict[str, str] = {}


class LabelsOnly(Manifest):
    labels: dict[str, str]


class SecretKey(Manifest):
    name: str
    key: str
    optional: bool = False


class ValueFrom(Manifest):
    secret_key_ref: SecretKey | None = None
    config_map_key_ref: SecretKey | None = None

    @model_validator(mode="after")
    def _one(self) -> "ValueFrom":
        if (self.secret_key_ref is None) == (self.config_map_key_ref is None):
            raise ValueError("give one of secretKeyRef, configMapKeyRef")
        return self


class Variable(Manifest):
    name: str
    value: str | None = None
    value_from: ValueFrom | None = None

    @model_validator(mode="after")
    def _one(self) -> "Variable":
        if (self.value is None) == (self.value_from is None):
            raise ValueError(f"{self.name}: give one of value, valueFrom")
        return self


class Capabilities(Manifest):
    drop: list[Literal["ALL"]] = Field(min_length=1)


class ContainerSecurity(Manifest):
    allow_privilege_escalation: Literal[False]
    read_only_root_filesystem: bool | None = None
    capabilities: Capabilities


class SeccompProfile(Manifest):
    type: Literal["RuntimeDefault"]


class PodSecurity(Manifest):
    run_as_non_root: Literal[True]
    run_as_user: int = Field(gt=0)
    run_as_group: int = Field(gt=0)
    fs_group: int = Field(gt=0)
    fs_group_change_policy: Literal["OnRootMismatch", "Always"] | None = None
    seccomp_profile: SeccompProfile


class ContainerPort(Manifest):
    name: str
    container_port: int


class HttpGet(Manifest):
    path: str = Field(pattern="^/")
    port: str


class Exec(Manifest):
    command: list[str]


class Probe(Manifest):
    http_get: HttpGet | None = None
    exec: Exec | None = None
    initial_delay_seconds: int = 0
    period_seconds: int
    timeout_seconds: int = 1
    failure_threshold: int = 3


class Handler(Manifest):
    exec: Exec


class Lifecycle(Manifest):
    pre_stop: Handler


class Resources(Manifest):
    requests: dict[str, str] = Field(min_length=1)
    limits: dict[str, str] = Field(min_length=1)


class Mount(Manifest):
    name: str
    mount_path: str = Field(pattern="^/")
    read_only: bool = False


class Container(Manifest):
    name: str
    image: str
    working_dir: str | None = None
    command: list[str] | None = None
    args: list[str] | None = None
    env: list[Variable] = []
    lifecycle: Lifecycle | None = None
    ports: list[ContainerPort] = []
    startup_probe: Probe | None = None
    readiness_probe: Probe | None = None
    liveness_probe: Probe | None = None
    resources: Resources
    security_context: ContainerSecurity
    volume_mounts: list[Mount] = []


class Claim(Manifest):
    claim_name: str


class EmptyDir(Manifest):
    medium: Literal["Memory"] | None = None
    size_limit: str | None = None


class Item(Manifest):
    key: str
    path: str


class ConfigMapVolume(Manifest):
    name: str
    items: list[Item]


class Volume(Manifest):
    name: str
    persistent_volume_claim: Claim | None = None
    empty_dir: EmptyDir | None = None
    config_map: ConfigMapVolume | None = None

    @model_validator(mode="after")
    def _one(self) -> "Volume":
        sources = (self.persistent_volume_claim, self.empty_dir, self.config_map)
        if sum(source is not None for source in sources) != 1:
            raise ValueError(f"volume {self.name}: give one source")
        return self


class Toleration(Manifest):
    key: str
    operator: Literal["Exists", "Equal"]
    effect: Literal["NoSchedule", "NoExecute"]


class PodSpec(Manifest):
    restart_policy: Literal["Never"] | None = None
    automount_service_account_token: bool = True
    termination_grace_period_seconds: int = 30
    security_context: PodSecurity
    tolerations: list[Toleration] = []
    node_selector: dict[str, str] = {}
    containers: list[Container] = Field(min_length=1)
    volumes: list[Volume] = []


class PodTemplate(Manifest):
    metadata: LabelsOnly
    spec: PodSpec


class AuthOptions(Manifest):
    mode: Literal["token"]


class HeadGroup(Manifest):
    ray_start_params: dict[str, str]
    template: PodTemplate


class WorkerGroup(Manifest):
    group_name: str
    replicas: int
    min_replicas: int
    max_replicas: int
    ray_start_params: dict[str, str]
    template: PodTemplate


class AutoscalerOptions(Manifest):
    version: Literal["v2"]
    idle_timeout_seconds: int
    resources: Resources
    security_context: ContainerSecurity


class RayClusterSpec(Manifest):
    ray_version: str
    auth_options: AuthOptions
    enable_in_tree_autoscaling: bool = False
    autoscaler_options: AutoscalerOptions | None = None
    head_group_spec: HeadGroup
    worker_group_specs: list[WorkerGroup]


class SubmitterConfig(Manifest):
    backoff_limit: int


class RayJobSpec(Manifest):
    entrypoint: str
    job_id: str | None = None
    runtime_env_y_a_m_l: str | None = Field(default=None, alias="runtimeEnvYAML")
    submission_mode: Literal["K8sJobMode"]
    submitter_config: SubmitterConfig
    backoff_limit: Literal[0]
    shutdown_after_job_finishes: Literal[True]
    ttl_seconds_after_finished: int = Field(ge=0)
    pre_running_deadline_seconds: int = Field(gt=0)
    ray_cluster_spec: RayClusterSpec
    submitter_pod_template: PodTemplate


class RayJob(Manifest):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


class UpgradeStrategy(Manifest):
    type: Literal["NewCluster", "None"]


class RayServiceSpec(Manifest):
    upgrade_strategy: UpgradeStrategy
    ray_cluster_deletion_delay_seconds: int
    exclude_head_pod_from_serve_svc: Literal[True]
    serve_config_v2: str = Field(alias="serveConfigV2")
    ray_cluster_config: RayClusterSpec


class RayService(Manifest):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: RayServiceSpec


class Pod(Manifest):
    api_version: Literal["v1"]
    kind: Literal["Pod"]
    metadata: Metadata
    spec: PodSpec


class MatchLabels(Manifest):
    match_labels: dict[str, str]


class Strategy(Manifest):
    type: Literal["Recreate"]  # two versions at once would both migrate MLflow's tables


class DeploymentSpec(Manifest):
    replicas: int
    strategy: Strategy
    selector: MatchLabels
    template: PodTemplate


class Deployment(Manifest):
    api_version: Literal["apps/v1"]
    kind: Literal["Deployment"]
    metadata: Metadata
    spec: DeploymentSpec


class Storage(Manifest):
    storage: str


class StorageRequest(Manifest):
    requests: Storage


class ClaimSpec(Manifest):
    access_modes: list[Literal["ReadWriteMany", "ReadWriteOnce"]]
    storage_class_name: str
    resources: StorageRequest


class ClaimTemplate(Manifest):
    metadata: Metadata
    spec: ClaimSpec


class PersistentVolumeClaim(ClaimTemplate):
    api_version: Literal["v1"]
    kind: Literal["PersistentVolumeClaim"]


class StatefulSetSpec(Manifest):
    service_name: str
    replicas: int
    selector: MatchLabels
    template: PodTemplate
    volume_claim_templates: list[ClaimTemplate]


class StatefulSet(Manifest):
    api_version: Literal["apps/v1"]
    kind: Literal["StatefulSet"]
    metadata: Metadata
    spec: StatefulSetSpec


class ServicePort(Manifest):
    name: str
    port: int
    target_port: str


class ServiceSpec(Manifest):
    cluster_i_p: Literal["None"] | None = Field(default=None, alias="clusterIP")
    selector: dict[str, str]
    ports: list[ServicePort]


class Service(Manifest):
    api_version: Literal["v1"]
    kind: Literal["Service"]
    metadata: Metadata
    spec: ServiceSpec


class ConfigMap(Manifest):
    api_version: Literal["v1"]
    kind: Literal["ConfigMap"]
    metadata: Metadata
    data: dict[str, str]


class Namespace(Manifest):
    api_version: Literal["v1"]
    kind: Literal["Namespace"]
    metadata: Metadata


class Expression(Manifest):
    key: str
    operator: Literal["In", "NotIn"]
    values: list[str]


class Selector(Manifest):
    match_labels: dict[str, str] = {}
    match_expressions: list[Expression] = []

    def selects(self, labels: dict[str, str]) -> bool:
        """As Kubernetes does: every label and every expression; an empty selector takes all."""
        return all(labels.get(key) == value for key, value in self.match_labels.items()) and all(
            (labels.get(one.key) in one.values) == (one.operator == "In") for one in self.match_expressions
        )


class IpBlock(Manifest):
    cidr: str
    except_: list[str] = Field(default=[], alias="except")


class Peer(Manifest):
    namespace_selector: Selector | None = None
    pod_selector: Selector | None = None
    ip_block: IpBlock | None = None


class PolicyPort(Manifest):
    protocol: Literal["TCP", "UDP"]
    port: int


class IngressRule(Manifest):
    from_: list[Peer] = Field(default=[], alias="from")
    ports: list[PolicyPort] = []


class EgressRule(Manifest):
    to: list[Peer] = []
    ports: list[PolicyPort] = []


class NetworkPolicySpec(Manifest):
    pod_selector: Selector
    policy_types: list[Literal["Ingress", "Egress"]]
    ingress: list[IngressRule] = []
    egress: list[EgressRule] = []


class NetworkPolicy(Manifest):
    api_version: Literal["networking.k8s.io/v1"]
    kind: Literal["NetworkPolicy"]
    metadata: Metadata
    spec: NetworkPolicySpec


class ImageTag(Manifest):
    name: str
    new_name: str
    new_tag: str


class Target(Manifest):
    group: str
    version: str
    kind: str
    name: str | None = None


class Patch(Manifest):
    path: str
    target: Target


class Kustomization(Manifest):
    api_version: Literal["kustomize.config.k8s.io/v1beta1"]
    kind: Literal["Kustomization"]
    resources: list[str]
    images: list[ImageTag] = []
    patches: list[Patch] = []


class Operation(Manifest):
    """Of a JSON patch."""

    op: Literal["add", "replace", "remove"]
    path: str = Field(pattern="^/")
    value: JsonValue = None


class Compose(BaseModel):
    """What is used of Docker Compose, whose fields are in snake case."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Healthcheck(Compose):
    test: list[str]
    interval: str
    timeout: str
    retries: int
    start_period: str | None = None


class Condition(Compose):
    condition: Literal["service_healthy", "service_completed_successfully"]


class ComposeService(Compose):
    image: str
    user: str | None = None
    working_dir: str | None = None
    entrypoint: list[str] | None = None
    command: list[str] | None = None
    environment: dict[str, str] = {}
    volumes: list[str] = []
    tmpfs: list[str] = []
    read_only: bool = False
    cap_drop: list[str] = []
    cap_add: list[str] = []
    security_opt: list[str] = []
    networks: list[str] = []
    network_mode: Literal["none"] | None = None
    ports: list[str] = []
    depends_on: dict[str, Condition] = {}
    healthcheck: Healthcheck | None = None
    restart: Literal["unless-stopped", "no"]


class Network(Compose):
    internal: bool = False


class ComposeFile(Compose):
    name: str
    services: dict[str, ComposeService]
    networks: dict[str, Network]
    volumes: dict[str, dict[str, str]]


KINDS: dict[str, type[Manifest]] = {
    model.__name__: model
    for model in (
        RayJob, RayService, Pod, Deployment, StatefulSet, Service, ConfigMap, Namespace, NetworkPolicy,
        PersistentVolumeClaim, Kustomization,
    )
}  # fmt: skip


def parse(document: dict[str, Any]) -> Any:
    """The document as its kind's model. Raises ValueError for a kind that is not in use."""
    kind = document.get("kind")
    if kind not in KINDS:
        raise ValueError(f"known kinds are {', '.join(KINDS)}, but got {kind!r}")
    return KINDS[kind].model_validate(document)


def filled_in(words: Iterable[str], values: Mapping[str, str]) -> list[str]:
    """The words with $(NAME), ${NAME:-default} and ${NAME:?message} replaced."""

    def value(match):
        name, sign, rest = match.groups()
        assert values.get(name) or sign == ":-", f"{name} is nowhere"
        return values.get(name) or rest

    return [re.sub(r"\$[({](\w+)(?:(:[-?])([^)}]*))?[)}]", value, word) for word in words]
