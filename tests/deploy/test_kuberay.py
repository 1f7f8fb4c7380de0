"""The manifests for Kubernetes and the compose file: what can be said about them without a cluster."""

import copy
import dataclasses
import importlib.metadata
import importlib.util
import ipaddress
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import mlflow.cli
import pytest
import tyro
import yaml
from mlflow.server.security_utils import is_allowed_host_header
from pydantic import TypeAdapter, ValidationError
from ray.scripts.scripts import cli as ray_commands

import deploy.validate as validate
from deploy.api.schema import GenerateRequest
from deploy.jobs.__main__ import parse_arguments as parse_jobs
from pipelines.check import CheckJob
from pipelines.encode.job import EncodeJob
from pipelines.evaluate.job import EvaluateJob
from pipelines.train.run import parse_arguments
from tests.support import kubernetes_manifests
from tests.support.kubernetes_manifests import Container, Operation, PodSpec, RayClusterSpec, filled_in, parse

REPOSITORY = Path(__file__).parents[2]
KUBERAY, MLFLOW = REPOSITORY / "deploy" / "kuberay", REPOSITORY / "deploy" / "mlflow"
OVERLAYS = ("small", "eight-nodes")
STAGES = ("encode", "train", "evaluate", "serve")


@pytest.fixture(scope="module", params=("base", *(f"overlays/{name}" for name in OVERLAYS)))
def overlay(request) -> list[dict]:
    """The documents of the base and of an overlay, each of which must be coherent alone."""
    return validate.render(KUBERAY / request.param)


def of_kind(documents: list[dict], kind: str) -> list:
    return [parse(document) for document in documents if document["kind"] == kind]


def one(documents: list[dict], kind: str, name: str, namespace: str | None = None):
    (found,) = [
        document
        for document in of_kind(documents, kind)
        if document.metadata.name == name and namespace in (None, document.metadata.namespace)
    ]
    return found


def clusters(documents: list[dict]) -> dict[str, RayClusterSpec]:
    """{stage: its cluster}."""
    jobs = {job.metadata.name: job.spec.ray_cluster_spec for job in of_kind(documents, "RayJob")}
    return jobs | {"serve": one(documents, "RayService", "endpoint").spec.ray_cluster_config}


def pods(documents: list[dict]) -> Iterator[tuple[str, str, dict[str, str], PodSpec]]:
    """(namespace, what, labels, pod) of every pod that comes of the documents, with the labels that KubeRay adds."""
    for stage, cluster in clusters(documents).items():
        of_ray = {"ray.io/is-ray-node": "yes"}
        head = cluster.head_group_spec.template
        yield "meanflow", f"{stage} head", {**head.metadata.labels, **of_ray, "ray.io/node-type": "head"}, head.spec
        for group in cluster.worker_group_specs:
            labels = {**group.template.metadata.labels, **of_ray, "ray.io/node-type": "worker"}
            yield "meanflow", f"{stage} {group.group_name}", labels, group.template.spec
    for job in of_kind(documents, "RayJob"):
        template = job.spec.submitter_pod_template
        labels = {**template.metadata.labels, "ray.io/originated-from-crd": "RayJob"}
        yield "meanflow", f"{job.metadata.name} submitter", labels, template.spec
    for pod in of_kind(documents, "Pod"):
        yield pod.metadata.namespace, pod.metadata.name, pod.metadata.labels, pod.spec
    for kind in ("Deployment", "StatefulSet"):
        for owner in of_kind(documents, kind):
            template = owner.spec.template
            yield owner.metadata.namespace, owner.metadata.name, template.metadata.labels, template.spec


def command(job: kubernetes_manifests.RayJob) -> list[str]:
    words = shlex.split(job.spec.entrypoint)
    assert words[:2] == ["python", "-m"]
    return words[2:]


def bytes_of(quantity: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(Gi|Mi)", quantity).groups()
    return int(number) * {"Gi": 2**30, "Mi": 2**20}[unit]


# Every file.


def test_every_file_is_of_a_known_form_and_has_no_field_that_nobody_knows():
    files = sorted(path for path in [*KUBERAY.rglob("*"), *MLFLOW.rglob("*.yaml")] if path.is_file())
    assert len(files) >= 18
    for path in files:
        assert path.suffix == ".yaml", path
        documents = list(yaml.safe_load_all(path.read_text()))
        if path.name == "compose.yaml":
            kubernetes_manifests.ComposeFile.model_validate(documents[0])
        elif isinstance(documents[0], list):
            TypeAdapter(list[Operation]).validate_python(documents[0])
        else:
            for document in documents:
                parse(document)


@pytest.mark.parametrize(
    ("path", "name", "wrong"),
    [
        (["spec", "rayClusterSpec", "authOptions"], "mode", "modus"),
        (["spec", "rayClusterSpec", "headGroupSpec", "template", "spec"], "securityContext", "securitycontext"),
        (["spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0], "env", "envs"),
        (["spec"], "runtimeEnvYAML", "runtimeEnvYaml"),
        (["spec"], "backoffLimit", "backofLimit"),
    ],
)
def test_a_wrong_field_name_is_caught(path, name, wrong):
    (document,) = validate.read_documents(KUBERAY / "base" / "train.yaml")
    parse(document)
    place = document
    for part in path:
        place = place[part]
    place[wrong] = place.pop(name)
    with pytest.raises(ValidationError, match=wrong):
        parse(document)


# Kustomize.


def test_every_file_of_the_folder_is_part_of_a_kustomization():
    used = set()
    for folder in validate.kustomizations():
        (content,) = validate.read_documents(folder / "kustomization.yaml")
        kustomization = parse(content)
        used |= {folder / "kustomization.yaml"}
        used |= {folder / name for name in kustomization.resources if (folder / name).is_file()}
        used |= {folder / patch.path for patch in kustomization.patches}
    assert used == {path for path in KUBERAY.rglob("*") if path.is_file()}
    assert {folder.name for folder in validate.kustomizations()} == {"base", *OVERLAYS}


@pytest.mark.parametrize("name", OVERLAYS)
def test_rendering_is_what_kustomize_gives(name):
    kustomize = shutil.which("kustomize") or shutil.which("kubectl")
    if kustomize is None:
        pytest.skip("NOT CHECKED AGAINST KUSTOMIZE: neither kustomize nor kubectl is installed")
    build = [kustomize, "build" if kustomize.endswith("kustomize") else "kustomize"]
    folder = KUBERAY / "overlays" / name
    done = subprocess.run([*build, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

    def by_name(documents):
        return {
            (one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]): one for one in documents if one
        }

    assert by_name(yaml.safe_load_all(done.stdout)) == by_name(validate.render(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("../../base", "../../bass"), "bass does not exist"),
        (lambda text: text.replace("name: train", "name: trian"), "nothing is .*trian"),
        (lambda text: text.replace("path: train.yaml", "path: trian.yaml"), "patch trian.yaml does not exist"),
        (lambda text: text + "namePrefix: x-\n", "namePrefix"),
    ],
)
def test_a_kustomization_that_names_what_is_not_there_is_refused(tmp_path, change, message):
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    path = tmp_path / "kuberay" / "overlays" / "small" / "kustomization.yaml"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        validate.render(path.parent)


@pytest.mark.parametrize(
    ("old", "new"), [("Specs/1/replicas", "Specs/2/replicas"), ("Specs/1/minReplicas", "Specs/1/minReplica")]
)
def test_a_patch_of_a_place_that_is_not_there_is_refused(tmp_path, old, new):
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    path = tmp_path / "kuberay" / "overlays" / "small" / "encode.yaml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=rf"encode.yaml, on RayJob encode: there is no .*{new}"):
        validate.render(path.parent)


def test_a_patch_changes_its_own_place_and_none_that_shares_an_anchor_with_it(tmp_path):
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    path = tmp_path / "kuberay" / "overlays" / "small" / "train.yaml"
    place = "/spec/rayClusterSpec/headGroupSpec/template/spec/containers/0/env/0/value"
    path.write_text(f"- {{op: replace, path: {place}, value: http://other:5000}}\n")
    train = one(validate.render(path.parent), "RayJob", "train").spec.ray_cluster_spec
    head, worker = train.head_group_spec.template.spec, train.worker_group_specs[0].template.spec
    assert head.containers[0].env[0].value == "http://other:5000"
    assert worker.containers[0].env[0].value == "http://mlflow.mlflow.svc.cluster.local:5000"


def test_one_image_serves_all_stages(overlay):
    images = {
        container.image for _, what, _, pod in pods(overlay) if "mlflow" not in what for container in pod.containers
    }
    (content,) = validate.read_documents(KUBERAY / "base" / "kustomization.yaml")
    (image,) = parse(content).images
    assert images == {f"{image.new_name}:{image.new_tag}"}


def test_every_document_belongs_to_a_stage_so_that_each_can_be_applied_alone(overlay):
    labels = {validate.title(document): document["metadata"]["labels"].get("meanflow.stage") for document in overlay}
    assert set(labels.values()) == {"platform", "shell", *STAGES}
    for stage in STAGES:
        assert [title for title, label in labels.items() if label == stage] == [
            "RayService endpoint" if stage == "serve" else f"RayJob {stage}"
        ]
    for stage, cluster in clusters(overlay).items():
        for template in [cluster.head_group_spec.template, *(group.template for group in cluster.worker_group_specs)]:
            assert template.metadata.labels == {"meanflow.stage": stage}


# Pods.


def test_no_pod_runs_as_root_or_gains_privileges(overlay):
    found = list(pods(overlay))
    assert len(found) >= 15
    for _, what, _, pod in found:
        # The models allow nothing else; what they leave open:
        raw = pod.security_context
        assert (raw.run_as_non_root, raw.seccomp_profile.type) == (True, "RuntimeDefault"), what
        for container in pod.containers:
            assert container.security_context.allow_privilege_escalation is False, what
            assert container.security_context.capabilities.drop == ["ALL"], what
    for namespace in of_kind(overlay, "Namespace"):
        assert namespace.metadata.labels["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize(
    ("name", "value"),
    [("runAsNonRoot", False), ("runAsUser", 0), ("seccompProfile", {"type": "Unconfined"}), ("fsGroup", 0)],
)
def test_a_pod_that_is_less_careful_is_refused(name, value):
    (document,) = validate.read_documents(KUBERAY / "base" / "shell.yaml")
    parse(document)
    document["spec"]["securityContext"][name] = value
    with pytest.raises(ValidationError, match=name):
        parse(document)


def test_only_the_head_that_scales_has_the_api_servers_token(overlay):
    mounted = {what for _, what, _, pod in pods(overlay) if pod.automount_service_account_token}
    assert mounted == {"serve head"}
    assert one(overlay, "RayService", "endpoint").spec.ray_cluster_config.enable_in_tree_autoscaling


def test_every_mount_has_its_volume_and_every_ray_node_its_shared_memory(overlay):
    for _, what, _, pod in pods(overlay):
        volumes = {volume.name: volume for volume in pod.volumes}
        if what == "mlflow-postgres":
            volumes["data"] = None  # its claim template
        for container in pod.containers:
            mounts = {mount.mount_path: mount.name for mount in container.volume_mounts}
            assert set(mounts.values()) <= set(volumes), what
            if not container.name.startswith("ray-"):
                continue
            shared, memory = volumes[mounts["/dev/shm"]].empty_dir, bytes_of(container.resources.limits["memory"])
            assert shared.medium == "Memory"
            if "head" not in what:  # where Ray's object store takes 30 % of the memory
                assert 0.3 * memory <= bytes_of(shared.size_limit) < 0.5 * memory, what
            assert mounts["/storage"] == "storage"
            assert volumes["storage"].persistent_volume_claim.claim_name == "storage"


def test_gpus_are_requested_as_they_are_limited_and_their_taint_is_borne(overlay):
    for stage, cluster in clusters(overlay).items():
        head = cluster.head_group_spec
        assert head.ray_start_params["num-cpus"] == "0", stage
        assert "nvidia.com/gpu" not in head.template.spec.containers[0].resources.limits
        gpu = next(group for group in cluster.worker_group_specs if group.group_name == "gpu")
        resources = gpu.template.spec.containers[0].resources
        assert int(resources.limits["nvidia.com/gpu"]) >= 1
        assert [toleration.key for toleration in gpu.template.spec.tolerations] == ["nvidia.com/gpu"]
        for group in cluster.worker_group_specs:
            for container in group.template.spec.containers:
                assert container.resources.requests == container.resources.limits, (stage, group.group_name)


def test_versions_are_those_of_the_project(overlay):
    for cluster in clusters(overlay).values():
        assert cluster.ray_version == importlib.metadata.version("ray")
    wanted = f":v{importlib.metadata.version('mlflow')}-full"
    services = compose().services
    assert one(overlay, "Deployment", "mlflow").spec.template.spec.containers[0].image.endswith(wanted)
    assert services["mlflow"].image.endswith(wanted)
    postgres = one(overlay, "StatefulSet", "mlflow-postgres").spec.template.spec.containers[0].image
    assert services["mlflow-postgres"].image == postgres


def test_ray_pods_run_as_the_images_user_and_keep_logs_and_downloads_on_volumes(overlay):
    (user,) = re.findall(r"^USER (\d+)$", (REPOSITORY / "deploy" / "Dockerfile").read_text(), re.MULTILINE)
    for _, what, labels, pod in pods(overlay):
        if not labels.keys() & {"ray.io/is-ray-node", "ray.io/originated-from-crd"}:
            continue
        assert pod.security_context.run_as_user == int(user), what
        (container,) = pod.containers
        if "ray.io/is-ray-node" in labels:
            assert "/tmp/ray" in {mount.mount_path for mount in container.volume_mounts}, what
            values = {variable.name: variable.value for variable in container.env}
            assert values["HF_HOME"].startswith("/storage/"), what
        if labels.get("ray.io/node-type") == "head":  # KubeRay's Service and its address for workers go by these names
            ports = {port.name: port.container_port for port in container.ports}
            assert (ports["gcs-server"], ports["dashboard"]) == (6379, 8265), what
            assert container.resources.requests == container.resources.limits, what


def test_storage_is_written_by_many_and_a_nodes_cache_holds_imagenet(overlay):
    assert one(overlay, "PersistentVolumeClaim", "storage").spec.access_modes == ["ReadWriteMany"]
    (claim,) = one(overlay, "StatefulSet", "mlflow-postgres").spec.volume_claim_templates
    assert claim.spec.access_modes == ["ReadWriteOnce"]
    volumes = {volume.name: volume for volume in clusters(overlay)["train"].worker_group_specs[0].template.spec.volumes}
    assert bytes_of(volumes["cache"].empty_dir.size_limit) > 1_281_167 * 2 * 8 * 32 * 32 * 2  # moments, mirrored too


def test_jobs_wait_for_nodes_that_are_still_to_be_started(overlay):
    for job in of_kind(overlay, "RayJob"):
        assert job.spec.pre_running_deadline_seconds >= 1800
        assert job.spec.ttl_seconds_after_finished >= 300  # for a look at the pods of one that failed


# Secrets.


def documented_secrets() -> dict[tuple[str, str], set[str]]:
    """{(namespace, name): keys} of the Secrets that the page makes."""
    found = {}
    for line in page_commands():
        if line.startswith("kubectl create secret generic "):
            words = shlex.split(line)
            keys = {word.removeprefix("--from-literal=").split("=")[0] for word in words if "--from-literal=" in word}
            found[words[words.index("--namespace") + 1], words[4]] = keys
    return found


def test_every_secret_that_a_pod_wants_is_made_by_the_page_and_none_stands_in_a_file(overlay):
    secrets = documented_secrets()
    wanted = set()
    for namespace, what, _, pod in pods(overlay):
        for container in pod.containers:
            for variable in container.env:
                secret = variable.value_from and variable.value_from.secret_key_ref
                if secret:
                    wanted.add((namespace, secret.name))
                    if not secret.optional or (namespace, secret.name) in secrets:
                        assert secret.key in secrets[namespace, secret.name], what
                elif re.search("PASSWORD|SECRET|TOKEN|KEY_ID", variable.name):
                    raise AssertionError(f"{what}: {variable.name} stands in the file")
    assert wanted >= set(secrets)
    assert not [document for document in overlay if document["kind"] == "Secret"]


def test_ray_pods_know_mlflow_and_who_they_are(overlay):
    for _, what, labels, pod in pods(overlay):
        if "ray.io/is-ray-node" in labels:
            names = {variable.name for variable in pod.containers[0].env}
            assert names >= {"MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"}, what
            assert not names & {"RAY_AUTH_TOKEN", "RAY_AUTH_MODE"}, what  # KubeRay's, of the cluster's own Secret


# Commands.


def test_entrypoints_are_understood_by_the_real_parsers_and_fit_each_other(overlay):
    jobs = {job.metadata.name: job for job in of_kind(overlay, "RayJob")}
    module, *words = command(jobs["encode"])
    assert module == "pipelines.encode"
    encode = tyro.cli(EncodeJob, args=words)
    module, *words = command(jobs["train"])
    assert module == "pipelines.train"
    preset, train = parse_arguments(words)
    module, *words = command(jobs["evaluate"])
    assert module == "pipelines.evaluate"
    evaluate = tyro.cli(EvaluateJob, args=words)

    assert {encode.device, train.device, evaluate.device} == {"gpu"}
    assert train.data == encode.output
    assert evaluate.train_images == encode.images
    served = yaml.safe_load(one(overlay, "RayService", "endpoint").spec.serve_config_v2)["applications"][0]["args"][
        "model"
    ]
    assert evaluate.model == served == f"models:/meanflow-{preset}@champion"
    # On what outlives the pods, but for the cache, which is the node's own.
    for place in (encode.images, encode.output, train.storage, str(evaluate.output)):
        assert place.startswith("/storage/")
    gpu = jobs["train"].spec.ray_cluster_spec.worker_group_specs[0]
    (container,) = gpu.template.spec.containers
    assert train.num_workers == gpu.replicas * int(container.resources.limits["nvidia.com/gpu"])
    cache = next(mount for mount in container.volume_mounts if train.cache_dir.startswith(f"{mount.mount_path}/"))
    assert next(volume for volume in gpu.template.spec.volumes if volume.name == cache.name).empty_dir.medium is None


def test_a_stopped_training_has_time_for_its_checkpoint():
    (document,) = validate.read_documents(KUBERAY / "base" / "train.yaml")
    assert yaml.safe_load(document["spec"]["runtimeEnvYAML"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "300"}}


@pytest.mark.parametrize("stage", ["train", "serve"])
def test_ray_is_told_of_a_worker_that_is_taken_away_while_the_pod_is_still_there(overlay, stage):
    pod = clusters(overlay)[stage].worker_group_specs[0].template.spec
    *shell, script = pod.containers[0].lifecycle.pre_stop.exec.command
    assert shell == ["bash", "-c"]
    tell, wait = (shlex.split(part) for part in script.split("&&"))
    assert tell[:2] == ["ray", "drain-node"]
    options = ray_commands.commands["drain-node"].make_context("drain-node", tell[2:]).params
    # Without --node-id: the node that asks. Only this reason makes Ray Train's notice.
    assert (options["node_id"], options["reason"]) == (None, "DRAIN_NODE_REASON_PREEMPTION")
    assert wait == ["sleep", str(options["deadline_remaining_seconds"])]
    assert options["deadline_remaining_seconds"] >= 90
    assert pod.termination_grace_period_seconds >= options["deadline_remaining_seconds"] + 20


def test_a_head_that_is_taken_away_stops_its_training_first(overlay):
    job = one(overlay, "RayJob", "train").spec
    pod = job.ray_cluster_spec.head_group_spec.template.spec
    words = pod.containers[0].lifecycle.pre_stop.exec.command
    assert words[:3] == ["python", "-m", "deploy.jobs"]
    asked = parse_jobs(words[3:])
    assert (asked.command, asked.id) == ("stop", job.job_id)
    assert urlsplit(asked.address).port == 8265
    assert pod.termination_grace_period_seconds >= 120


def test_a_lost_submitter_ends_no_job(overlay):
    for job in of_kind(overlay, "RayJob"):
        assert job.spec.submitter_config.backoff_limit >= 10


def test_the_shell_outlives_a_copy_of_a_day(overlay):
    (container,) = one(overlay, "Pod", "shell").spec.containers
    assert container.command == ["sleep", "infinity"]


# The endpoint.


def serve_config(overlay) -> dict:
    return yaml.safe_load(one(overlay, "RayService", "endpoint").spec.serve_config_v2)


def test_the_serve_config_is_that_of_deploy_serve_but_for_what_must_differ(overlay):
    config = serve_config(overlay)
    assert validate.serve_problems(yaml.safe_dump(config)) == []
    wanted = yaml.safe_load((REPOSITORY / "deploy" / "serve.yaml").read_text())
    wanted["proxy_location"] = "EveryNode"  # KubeRay's Service leads to the workers
    wanted["http_options"]["host"] = "0.0.0.0"
    arguments, mine = wanted["applications"][0]["args"], config["applications"][0]["args"]
    del arguments["tracking_uri"]  # MLFLOW_TRACKING_URI is in the pods
    keys = config["applications"][0]["deployments"][1]["user_config"].pop("api_keys")
    assert list(keys.values()) == ["0" * 64]  # nobody's: closed until somebody's stands there
    if mine["model"] == "models:/meanflow-b4@champion":  # one GPU
        mine["model"] = arguments["model"]
        scaling = config["applications"][0]["deployments"][0]["autoscaling_config"]
        assert scaling["max_replicas"] == 1
        scaling["max_replicas"] = wanted["applications"][0]["deployments"][0]["autoscaling_config"]["max_replicas"]
    assert config == wanted


def test_the_endpoint_starts_with_its_keys_and_never_without(overlay):
    from deploy.api.auth import require_safe_exposure
    from deploy.settings import API_SETTINGS, Arguments, apply_user_config

    config = serve_config(overlay)
    application = config["applications"][0]
    arguments = Arguments.model_validate(application["args"])
    settings = application["deployments"][1]["user_config"]
    require_safe_exposure(apply_user_config(arguments, settings, API_SETTINGS), config["http_options"]["host"])
    with pytest.raises(ValueError, match="api_keys"):
        require_safe_exposure(arguments, config["http_options"]["host"])


def test_as_many_gpus_may_come_as_replicas_are_wanted_and_a_replica_may_finish(overlay):
    service = one(overlay, "RayService", "endpoint").spec
    (group,) = service.ray_cluster_config.worker_group_specs
    scaling = serve_config(overlay)["applications"][0]["deployments"][0]["autoscaling_config"]
    assert (group.min_replicas, group.max_replicas) == (scaling["min_replicas"], scaling["max_replicas"])
    drain = 70  # drain_seconds unless given
    assert service.ray_cluster_deletion_delay_seconds > drain
    assert group.template.spec.termination_grace_period_seconds > drain
    assert (service.upgrade_strategy.type == "None") == (scaling["max_replicas"] == 1)


def test_probes_ask_the_application_on_workers_alone(overlay):
    paths = set(re.findall(r'@api\.get\("(/\w+)"', (REPOSITORY / "deploy" / "http.py").read_text()))
    cluster = clusters(overlay)["serve"]
    head, worker = cluster.head_group_spec.template.spec, cluster.worker_group_specs[0].template.spec
    container: Container = worker.containers[0]
    assert (container.startup_probe.http_get.path, container.readiness_probe.http_get.path) == ("/readyz", "/healthz")
    assert {"/readyz", "/healthz"} <= paths
    startup, readiness = container.startup_probe, container.readiness_probe
    assert startup.period_seconds * startup.failure_threshold >= 1800  # loading, and compiling for each size of batch
    assert readiness.period_seconds * readiness.failure_threshold <= 15
    assert container.liveness_probe is None  # KubeRay's own, of the raylet
    # KubeRay waits for the head before it hands over what these would ask for.
    assert (head.containers[0].startup_probe, head.containers[0].readiness_probe) == (None, None)
    port = serve_config(overlay)["http_options"]["port"]
    for one_container in (head.containers[0], container):
        assert {port.name: port.container_port for port in one_container.ports}["serve"] == port


# The network.


@dataclasses.dataclass(frozen=True)
class Place:
    namespace: str
    labels: tuple[tuple[str, str], ...] = ()

    @classmethod
    def pod(cls, documents: list[dict], name: str) -> "Place":
        namespace, _, labels, _ = next(found for found in pods(documents) if found[1] == name)
        return cls(namespace, tuple(sorted(labels.items())))


def allows(policies: list[kubernetes_manifests.NetworkPolicy], source: Place, target: Place, port: int) -> bool:
    """Whether a connection gets through, as Kubernetes adds the policies up: both ends must let it."""
    return _lets(policies, source, target, port, "Egress") and _lets(policies, target, source, port, "Ingress")


def _lets(policies, own: Place, other: Place, port: int, direction: str) -> bool:
    chosen = [
        policy
        for policy in policies
        if policy.metadata.namespace == own.namespace
        and policy.spec.pod_selector.selects(dict(own.labels))
        and direction in policy.spec.policy_types
    ]
    if not chosen:
        return True
    rules = [
        (rule.from_ if direction == "Ingress" else rule.to, rule.ports)
        for policy in chosen
        for rule in (policy.spec.ingress if direction == "Ingress" else policy.spec.egress)
    ]
    return any(
        (not peers or any(_is(peer, own, other) for peer in peers))
        and (not ports or port in [one.port for one in ports])
        for peers, ports in rules
    )


def _is(peer: kubernetes_manifests.Peer, own: Place, other: Place) -> bool:
    if peer.ip_block is not None:
        return False  # pods have private addresses, which every block here leaves out
    if peer.namespace_selector is None:
        in_namespace = other.namespace == own.namespace
    else:
        in_namespace = peer.namespace_selector.selects({"kubernetes.io/metadata.name": other.namespace})
    return in_namespace and (peer.pod_selector is None or peer.pod_selector.selects(dict(other.labels)))


OPERATOR = Place("kuberay-system", (("app.kubernetes.io/name", "kuberay-operator"),))
STRANGER = Place("default")
INGRESS = Place("ingress-nginx")
PROMETHEUS = Place("monitoring")
DNS = Place("kube-system", (("k8s-app", "kube-dns"),))


def test_the_network_lets_through_what_the_stages_need(overlay):
    policies = of_kind(overlay, "NetworkPolicy")

    def at(name):
        return Place.pod(overlay, name)

    for stage in STAGES:
        head, gpu = at(f"{stage} head"), at(f"{stage} gpu")
        for source, target in ((head, gpu), (gpu, head), (gpu, gpu)):
            assert allows(policies, source, target, 23456), stage
        assert allows(policies, OPERATOR, head, 8265), stage
        assert allows(policies, gpu, at("mlflow"), 5000), stage
        assert allows(policies, head, at("mlflow"), 5000), stage
        assert allows(policies, gpu, DNS, 53), stage
        assert allows(policies, PROMETHEUS, gpu, 8080), stage
        if stage != "serve":
            assert allows(policies, at(f"{stage} submitter"), head, 8265), stage
            assert allows(policies, at(f"{stage} submitter"), DNS, 53), stage
    assert allows(policies, OPERATOR, at("serve head"), 8000)
    assert allows(policies, INGRESS, at("serve gpu"), 8000)
    assert allows(policies, at("mlflow"), at("mlflow-postgres"), 5432)
    assert allows(policies, at("mlflow"), DNS, 53)


def test_the_network_lets_nothing_else_through(overlay):
    policies = of_kind(overlay, "NetworkPolicy")

    def at(name):
        return Place.pod(overlay, name)

    for stage in STAGES:
        for target in (at(f"{stage} head"), at(f"{stage} gpu")):
            for port in (8265, 6379, 10001, 52365, 8000, 23456):
                assert not allows(policies, STRANGER, target, port), (stage, port)
                assert not allows(policies, at("shell"), target, port), (stage, port)
                assert not allows(policies, at("mlflow"), target, port), (stage, port)
                if (stage, port) != ("serve", 8000):
                    assert not allows(policies, INGRESS, target, port), (stage, port)
        # Strangers ask the endpoint; what they might make of it reaches no training.
        if stage != "serve":
            for port in (8265, 6379, 23456):
                assert not allows(policies, at("serve gpu"), at(f"{stage} head"), port)
    for source in (STRANGER, INGRESS, at("shell"), at("encode submitter"), Place("mlflow")):
        assert not allows(policies, source, at("mlflow"), 5000)
    for source in (STRANGER, at("train gpu"), at("serve gpu"), Place("mlflow")):
        assert not allows(policies, source, at("mlflow-postgres"), 5432)
    assert not allows(policies, at("train gpu"), STRANGER, 443)
    for target in (at("shell"), at("train submitter")):
        for source in (STRANGER, INGRESS, at("train gpu"), at("serve gpu")):
            assert not allows(policies, source, target, 8000)


def test_what_goes_out_goes_to_the_internet_and_no_private_address(overlay):
    blocks = [
        peer.ip_block
        for policy in of_kind(overlay, "NetworkPolicy")
        for rule in policy.spec.egress
        for peer in rule.to
        if peer.ip_block is not None
    ]
    assert [block.cidr for block in blocks] == ["0.0.0.0/0"] * 2
    ports = {
        tuple(port.port for port in rule.ports)
        for policy in of_kind(overlay, "NetworkPolicy")
        for rule in policy.spec.egress
        if not rule.to or rule.to[0].ip_block is not None
    }
    assert ports == {(443,), (443, 6443)}  # object stores and the hub; the API server
    for block in blocks:
        for private in ("10.1.2.3", "172.20.0.1", "192.168.1.1", "169.254.169.254"):
            assert any(ipaddress.ip_address(private) in ipaddress.ip_network(cidr) for cidr in block.except_), private


# MLflow.


def compose() -> kubernetes_manifests.ComposeFile:
    return kubernetes_manifests.ComposeFile.model_validate(yaml.safe_load((MLFLOW / "compose.yaml").read_text()))


def server_options(words: list[str]) -> dict:
    """As MLflow's own command understands them."""
    assert words[0] == "server"
    return mlflow.cli.server.make_context("server", words[1:]).params


def test_mlflow_understands_its_options_and_answers_to_the_name_that_the_stages_call(overlay):
    settings = one(overlay, "ConfigMap", "mlflow-settings").data
    (container,) = one(overlay, "Deployment", "mlflow").spec.template.spec.containers
    values = {
        variable.name: settings[variable.value_from.config_map_key_ref.key]
        for variable in container.env
        if variable.value_from is not None
        and variable.value_from.config_map_key_ref is not None
        and not variable.value_from.config_map_key_ref.optional
    }
    options = server_options(filled_in(container.args, values))
    assert options["serve_artifacts"]
    assert options["artifacts_destination"].startswith("s3://")
    assert options["app_name"] == "basic-auth"
    allowed = options["allowed_hosts"].split(",")
    addresses = {
        variable.value
        for _, _, _, pod in pods(overlay)
        for variable in pod.containers[0].env
        if variable.name == "MLFLOW_TRACKING_URI"
    }
    (address,) = addresses
    name, namespace = urlsplit(address).hostname.split(".")[:2]
    (port,) = one(overlay, "Service", name, namespace).spec.ports
    assert port.port == urlsplit(address).port
    for host in (urlsplit(address).netloc, "localhost:5000", "127.0.0.1:5000"):
        assert is_allowed_host_header(allowed, host), host
    for host in ("evil.example", "mlflow.evil.example:5000", "mlflow.mlflow.svc.cluster.local.evil.example:5000"):
        assert not is_allowed_host_header(allowed, host), host


def test_mlflows_services_lead_to_its_pods_and_its_files_lie_where_it_may_write(overlay):
    for kind, name in (("Deployment", "mlflow"), ("StatefulSet", "mlflow-postgres")):
        spec, service = one(overlay, kind, name).spec, one(overlay, "Service", name, "mlflow").spec
        assert service.selector == spec.selector.match_labels == spec.template.metadata.labels
        (container,) = spec.template.spec.containers
        (port,) = service.ports
        assert {one.name: one.container_port for one in container.ports} == {port.target_port: port.port}
        assert container.security_context.read_only_root_filesystem
    assert one(overlay, "StatefulSet", "mlflow-postgres").spec.service_name == "mlflow-postgres"
    (container,) = one(overlay, "Deployment", "mlflow").spec.template.spec.containers
    mounts = {mount.mount_path: mount.name for mount in container.volume_mounts}
    values = {variable.name: variable.value for variable in container.env}
    assert mounts[values["HOME"]] == mounts[container.working_dir] == mounts["/tmp"] == "scratch"
    folder, file = values["MLFLOW_AUTH_CONFIG_PATH"].rsplit("/", 1)
    volumes = {volume.name: volume for volume in one(overlay, "Deployment", "mlflow").spec.template.spec.volumes}
    assert [item.path for item in volumes[mounts[folder]].config_map.items] == [file]
    probe = container.startup_probe
    assert probe.period_seconds * probe.failure_threshold >= 300
    assert (
        server_options(filled_in(container.args, dict.fromkeys(("ARTIFACTS_DESTINATION", "ALLOWED_HOSTS"), "x")))[
            "port"
        ]
        == 5000
    )
    (container,) = one(overlay, "StatefulSet", "mlflow-postgres").spec.template.spec.containers
    mounts = {mount.mount_path: mount.name for mount in container.volume_mounts}
    values = {variable.name: variable.value for variable in container.env}
    assert mounts[values["PGDATA"].rsplit("/", 1)[0]] == "data"


def test_mlflow_in_compose_is_understood_and_reached_from_this_machine_alone():
    service = compose().services["mlflow"]
    options = server_options(filled_in(service.command[1:], {}))
    assert options["app_name"] == "basic-auth"
    assert is_allowed_host_header(options["allowed_hosts"].split(","), "localhost:5000")
    assert not is_allowed_host_header(options["allowed_hosts"].split(","), "evil.example:5000")
    (published,) = filled_in(service.ports, {})
    assert published == "127.0.0.1:5000:5000"
    assert [name for name, one in compose().services.items() if one.ports] == ["mlflow"]
    assert compose().networks["database"].internal
    assert compose().services["mlflow-postgres"].networks == ["database"]


def test_compose_has_healthchecks_and_no_secret_and_its_example_names_every_variable():
    text = (MLFLOW / "compose.yaml").read_text()
    example = dict(
        line.split("=", 1)
        for line in (MLFLOW / "env.example").read_text().splitlines()
        if "=" in line and line[0] != "#"
    )
    assert set(re.findall(r"\$\{(\w+)", text)) == set(example)
    for name, value in example.items():
        assert not value or not re.search("PASSWORD|SECRET|KEY", name), f"{name} has a value in the example"
    required = set(re.findall(r"\$\{(\w+):\?", text))
    assert required == {name for name in example if re.search("PASSWORD|FLASK", name)}
    for service in compose().services.values():
        for name, value in service.environment.items():
            if re.search("PASSWORD|SECRET|KEY_ID", name):
                assert value.startswith("${"), name
        for dependency, condition in service.depends_on.items():
            assert (compose().services[dependency].healthcheck is not None) == (
                condition.condition == "service_healthy"
            )
    assert compose().services["mlflow"].healthcheck is not None
    assert "deploy/mlflow/.env" in (REPOSITORY / ".gitignore").read_text().splitlines()
    named = {volume.split(":")[0] for one in compose().services.values() for volume in one.volumes if volume[0] != "."}
    assert named == set(compose().volumes)


def test_authentication_is_set_up_as_mlflow_reads_it_and_alike_in_both_places(monkeypatch, overlay):
    text = (MLFLOW / "basic_auth.ini").read_text()
    assert one(overlay, "ConfigMap", "mlflow-settings").data["basic_auth.ini"] == text
    # Alone: the package around it imports what only the server's image has.
    found = importlib.util.find_spec("mlflow")
    path = Path(found.submodule_search_locations[0]) / "server" / "auth" / "config.py"
    spec = importlib.util.spec_from_file_location("mlflow_auth_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("MLFLOW_AUTH_CONFIG_PATH", str(MLFLOW / "basic_auth.ini"))
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", "of the environment")
    config = module.read_auth_config()
    assert config.admin_password == "of the environment"
    assert "password" not in text.replace("password's", "")
    words = compose().services["mlflow"].command
    assert f"--backend-store-uri={config.database_uri}" in words
    args = one(overlay, "Deployment", "mlflow").spec.template.spec.containers[0].args
    assert f"--backend-store-uri={config.database_uri}" in args
    # Those of the compose file are tried against a real PostgreSQL by tests/test_mlflow_server.py.
    assert {word.split("=")[0] for word in args[1:]} == {word.split("=")[0] for word in words[2:]}
    address = urlsplit(config.database_uri)
    assert (address.password, address.hostname) == (None, "mlflow-postgres")
    assert address.hostname in compose().services
    assert one(overlay, "Service", address.hostname, "mlflow").spec.ports[0].port == address.port


# The check against KubeRay's schemas, on a small one of the same form.


def small_schema(*values) -> dict:
    """A schema that these values fit, and that knows no key besides theirs."""
    if isinstance(values[0], dict):
        keys = {key: [value[key] for value in values if key in value] for key in itertools.chain(*values)}
        return {"type": "object", "properties": {key: small_schema(*inner) for key, inner in keys.items()}}
    if isinstance(values[0], list):
        items = list(itertools.chain(*values))
        return {"type": "array", "items": small_schema(*items) if items else {}}
    return {"type": {bool: "boolean", int: "integer", str: "string"}[type(values[0])]}


@pytest.fixture
def crds(tmp_path) -> Path:
    """A folder with definitions of RayJob and RayService."""
    folder = tmp_path / "crds"
    folder.mkdir()
    for kind, name in (("RayJob", "train"), ("RayService", "endpoint")):
        document = next(
            one for one in validate.render(KUBERAY / "base") if (one["kind"], one["metadata"]["name"]) == (kind, name)
        )
        schema = small_schema(document)
        definition = {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "spec": {
                "group": "ray.io",
                "names": {"kind": kind},
                "versions": [{"name": "v1", "schema": {"openAPIV3Schema": schema}}],
            },
        }
        (folder / f"ray.io_{kind.lower()}s.yaml").write_text(yaml.safe_dump(definition))
    return folder


def problems_of(crds: Path, change, kind: str, name: str) -> list[str]:
    schemas = validate.read_schemas(crds)
    document = next(
        copy.deepcopy(one)
        for one in validate.render(KUBERAY / "base")
        if (one["kind"], one["metadata"]["name"]) == (kind, name)
    )
    schema = schemas[document["apiVersion"], kind]
    assert validate.schema_problems(document, schema) == []
    change(document["spec"])
    return validate.schema_problems(document, schema) or validate.operator_problems(document)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda spec: spec.update(backofLimit=1), "$.spec.backofLimit: unknown key"),
        (
            lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0].update(
                envs=[]
            ),
            "$.spec.rayClusterSpec.workerGroupSpecs[0].template.spec.containers[0].envs: unknown key",
        ),
        (lambda spec: spec.update(backoffLimit="0"), "$.spec.backoffLimit: '0' is not of type 'integer'"),
        (lambda spec: spec.update(shutdownAfterJobFinishes=False), "wants shutdownAfterJobFinishes"),
        (
            lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].update(replicas=9),
            "$.spec.rayClusterSpec.workerGroupSpecs[0]: must have minReplicas <= replicas <= maxReplicas, but got 1, 9, 1",
        ),
        (
            lambda spec: spec.update(submissionMode="HttpMode"),
            "$.spec.submissionMode: must be one of K8sJobMode, HTTPMode",
        ),
        (lambda spec: spec["rayClusterSpec"].pop("rayVersion"), "$.spec.rayClusterSpec.authOptions: wants rayVersion"),
    ],
)
def test_the_check_against_schemas_tells_what_is_wrong_and_where(crds, change, told):
    (line,) = problems_of(crds, change, "RayJob", "train")
    assert told in line


def test_a_cluster_without_tokens_needs_no_version(crds):
    def change(spec):
        spec["rayClusterSpec"]["authOptions"]["mode"] = "disabled"
        del spec["rayClusterSpec"]["rayVersion"]

    assert problems_of(crds, change, "RayJob", "train") == []


def test_a_key_is_known_where_the_schema_takes_any_and_unknown_in_what_such_keys_hold():
    inner = {"type": "object", "properties": {"known": {"type": "integer"}}}
    schema = {
        "type": "object",
        "properties": {
            "labels": {"type": "object", "additionalProperties": inner},
            "free": {"type": "object", "properties": {}, "x-kubernetes-preserve-unknown-fields": True},
            "list": {"type": "array", "items": inner},
            "metadata": {"type": "object"},
        },
    }
    fine = {"labels": {"any": {"known": 1}}, "free": {"x": 1}, "list": [{"known": 1}], "metadata": {"name": "x"}}
    assert validate.schema_problems(fine, schema) == []
    wrong = {"labels": {"any": {"unknown": 1}}, "list": [{}, {"unknown": 1}]}
    assert validate.schema_problems(wrong, schema) == [
        "$.labels.any.unknown: unknown key, which the API server drops",
        "$.list[1].unknown: unknown key, which the API server drops",
    ]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("num_gpus: 1", "num_gpu: 1", "applications[0].args.num_gpu: Extra inputs"),
        ("precision: bfloat16", "precision: float8", "applications[0].args.precision"),
        ("proxy_location", "proxy_locations", "proxy_locations: unknown key, which Serve passes over"),
        ("host: 0.0.0.0", "hots: 0.0.0.0", "http_options.hots: unknown key, which Serve passes over"),
        ("min_replicas: 1", "min_replica: 1", "autoscaling_config.min_replica: unknown key"),
        ("deadline_seconds: 60", "deadline: 60", "deployments[1].user_config: user_config may only set"),
        ("name: ImageGenerator", "name: Generator", "deployments[0].name: must be one of ImageGenerator, Api"),
        ("max_replicas: 8", "max_replicas: 0", "deployments[0].autoscaling_config.max_replicas: Input should be"),
    ],
)
def test_a_serve_config_that_is_wrong_is_told_where(old, new, told):
    (document,) = validate.read_documents(KUBERAY / "base" / "serve.yaml")
    text = document["spec"]["serveConfigV2"]
    assert validate.serve_problems(text) == []
    assert old in text
    assert told in "\n".join(validate.serve_problems(text.replace(old, new)))


def test_the_command_ends_well_for_what_is_well_and_badly_for_what_is_not(crds, tmp_path, monkeypatch, capsys):
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    # Encode and evaluate have what train's small schema does not know: a group more, an environment less.
    base = tmp_path / "kuberay" / "base" / "kustomization.yaml"
    base.write_text(re.sub(r"  - (encode|evaluate).yaml\n", "", base.read_text()))
    for name in OVERLAYS:
        shutil.rmtree(tmp_path / "kuberay" / "overlays" / name)
    arguments = ["validate", "--crds", str(crds), "--manifests", str(tmp_path / "kuberay")]
    monkeypatch.setattr(sys, "argv", arguments)
    validate.main()
    assert capsys.readouterr().out == "2 Ray documents of 1 kustomizations are valid\n"
    train = tmp_path / "kuberay" / "base" / "train.yaml"
    train.write_text(train.read_text().replace("  backoffLimit: 0", "  backofLimit: 0"))
    with pytest.raises(SystemExit) as ended:
        validate.main()
    assert ended.value.code == 1
    assert (
        capsys.readouterr().out == "base, RayJob train: $.spec.backofLimit: unknown key, which the API server drops\n"
    )
    monkeypatch.setattr(sys, "argv", ["validate", "--crds", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        validate.main()
    assert ended.value.code == 2
    assert "must hold KubeRay's custom resource definitions" in capsys.readouterr().err


# The page.


def page_commands() -> list[str]:
    text = (REPOSITORY / "docs" / "kubernetes.md").read_text()
    return [
        line
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
        if line and not line.startswith("#")
    ]


def test_the_page_applies_folders_and_stages_that_there_are():
    lines = page_commands()
    applied = []
    for words in (shlex.split(line) for line in lines if line.startswith("kubectl apply")):
        for option in ("-k", "-f"):
            if option in words:
                assert (REPOSITORY / words[words.index(option) + 1]).exists(), words
        if "-l" in words:
            key, stage = words[words.index("-l") + 1].split("=")
            assert key == "meanflow.stage"
            applied.append(stage)
    assert list(dict.fromkeys(applied)) == ["platform", "shell", *STAGES]
    # Without -l all stages would start.
    assert not [line for line in lines if "apply -k" in line and "-l meanflow.stage=" not in line]


def test_what_the_page_names_is_there():
    documents = validate.render(KUBERAY / "overlays" / "small")
    there = {(one["kind"].lower(), one["metadata"]["name"]) for one in documents}
    there |= {("job", name) for kind, name in there if kind == "rayjob"}  # KubeRay's submitter
    there |= {("service", "endpoint-serve-svc"), ("deployment", "kuberay-operator")}  # KubeRay's own
    named = 0
    for line in page_commands():
        for kind, name in re.findall(r"\b(deployment|service|job|pod|rayjob|rayservice)/([\w-]+)", line):
            assert (kind, name) in there, line
            named += 1
        match = re.search(
            r"(?:get|delete) (rayjob|rayservice|persistentvolumeclaim|pod|secret) ([a-z][\w -]*?)(?: -|$)", line
        )
        if match and match[1] != "secret":
            for name in match[2].split():
                assert (match[1], name) in there, line
                named += 1
        for name, key in re.findall(r"get secret ([\w-]+) -o jsonpath='\{\.data\.([\w-]+)\}'", line):
            assert any(key in keys for (_, secret), keys in documented_secrets().items() if secret == name), line
            named += 1
    assert named >= 15


def test_the_pages_own_commands_are_understood_by_their_parsers():
    lines = page_commands()
    check = shlex.split(next(line for line in lines if "pipelines.check" in line))
    assert tyro.cli(CheckJob, args=check[check.index("pipelines.check") + 1 :]).data == "/storage/latents"
    validation = shlex.split(next(line for line in lines if "deploy.validate" in line))
    assert validation[:4] == ["python", "-m", "deploy.validate", "--crds"]
    body = shlex.split(next(line for line in lines if "/generate" in line))
    assert GenerateRequest.model_validate(json.loads(body[body.index("-d") + 1])).seed == 7
    assert "python -m deploy.keys alice" in lines
    stopping = shlex.split(next(line for line in lines if "deploy.jobs" in line))
    asked = parse_jobs(stopping[stopping.index("deploy.jobs") + 1 :])
    assert (asked.command, asked.id) == ("stop", "train")
    for line in lines:
        for name in re.findall(r"deploy/[\w./-]+", line):
            assert (REPOSITORY / name).exists() or name == "deploy/mlflow/.env", line
    users = next(line for line in lines if "users/create" in line)
    routes = (
        Path(importlib.util.find_spec("mlflow").submodule_search_locations[0]) / "server" / "auth" / "routes.py"
    ).read_text()
    assert '"/mlflow/users/create"' in routes
    assert "/api/2.0/mlflow/users/create" in users
