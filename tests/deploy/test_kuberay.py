"""Tests the Kubernetes manifests without a cluster: fields, pods, commands and the endpoint of the base and overlays."""

import importlib.metadata
import re
import shlex
import shutil
import subprocess

import pytest
import yaml
from ray.scripts.scripts import cli as ray_command_line

from deploy.api.auth import require_safe_exposure
from deploy.settings import Arguments
from tests.support.command_lines import parse_module
from tests.support.compose import compose_file
from tests.support.job_scripts import parse_with_click
from tests.support.kubernetes import (
    KUBERAY,
    STAGES,
    clusters,
    environment,
    gpu_group,
    mounts,
    named,
    of_kind,
    pods,
    read_documents,
    render,
    unknown_fields,
)
from tests.support.readme import REPOSITORY, text_of
from tests.support.serve_config import validated

OVERLAYS = ("small", "eight-nodes")
IMAGENET_LATENTS_BYTES = 1_281_167 * 2 * 8 * 32 * 32 * 2  # moments of images and mirror images, in float16


def bytes_of(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Gi|Mi)", quantity).groups()
    return int(number) * {"Gi": 2**30, "Mi": 2**20}[unit]


def ray_container(pod: dict) -> dict:
    [container] = pod["containers"]
    return container


# Documents.


def test_every_field_is_known():
    for path in KUBERAY.rglob("*.yaml"):
        for document in read_documents(path):
            if isinstance(document, dict):  # the others are patches, checked below once applied
                assert unknown_fields(document) == [], path


def test_every_rendered_field_is_known(overlay):
    for document in overlay:
        assert unknown_fields(document) == []


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("backoffLimit: 0", "backofLimit: 0", "RayJob.spec.backofLimit"),
        ("mode: token", "modus: token", "RayJob.spec.rayClusterSpec.authOptions.modus"),
        ("num-cpus: \"0\"", "num-cpus: 0", "RayJob.spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus"),
        ("value: eth0", "value: 0", "RayJob.spec.rayClusterSpec.headGroupSpec.template.spec.containers.env.value"),
        ("  tolerations:", "  toleration:", "RayJob.spec.rayClusterSpec.workerGroupSpecs.template.spec.toleration"),
    ],
)  # fmt: skip
def test_unknown_field_is_found(tmp_path, old, new, place):
    text = (KUBERAY / "base" / "train.yaml").read_text()
    assert old in text
    (tmp_path / "train.yaml").write_text(text.replace(old, new))
    [document] = read_documents(tmp_path / "train.yaml")
    assert place in unknown_fields(document)


def test_every_file_belongs_to_a_kustomization():
    used = set()
    for path in KUBERAY.rglob("kustomization.yaml"):
        [content] = read_documents(path)
        used |= {path, *(path.parent / patch["path"] for patch in content.get("patches", []))}
        used |= {path.parent / name for name in content["resources"] if (path.parent / name).is_file()}
    assert used == {path for path in KUBERAY.rglob("*") if path.is_file()}
    assert {path.name for path in (KUBERAY / "overlays").iterdir()} == set(OVERLAYS)


@pytest.mark.parametrize("name", OVERLAYS)
def test_rendering_matches_kustomize(name):
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("not checked against Kustomize: kubectl is not installed")
    folder = KUBERAY / "overlays" / name
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=60, check=True)

    def by_name(documents):
        return {
            (document["kind"], document["metadata"].get("namespace"), document["metadata"]["name"]): document
            for document in documents
        }

    assert by_name(yaml.safe_load_all(done.stdout)) == by_name(render(folder))


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("kustomization.yaml", "name: train", "name: trian"),
        ("encode.yaml", "Specs/1/replicas", "Specs/2/replicas"),
        ("encode.yaml", "Specs/1/minReplicas", "Specs/1/minReplica"),
    ],
)
def test_patch_without_a_target_is_refused(tmp_path, file, old, new):
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    path = tmp_path / "kuberay" / "overlays" / "small" / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises((AssertionError, KeyError, IndexError)):
        render(path.parent)


def test_every_stage_can_be_applied_alone_by_its_label(overlay):
    documents = {
        stage: [document for document in overlay if document["metadata"]["labels"].get("meanflow.stage") == stage]
        for stage in ("platform", "shell", *STAGES)
    }
    assert sum(map(len, documents.values())) == len(overlay)
    for stage in STAGES:
        [document] = documents[stage]
        assert document["kind"] == ("RayService" if stage == "serve" else "RayJob")
    for stage, cluster in clusters(overlay).items():
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            assert group["template"]["metadata"]["labels"] == {"meanflow.stage": stage}


def test_all_stages_use_one_image_and_the_projects_versions(overlay):
    images = {
        container["image"]
        for pod in pods(overlay)
        if pod.namespace == "meanflow"
        for container in pod.spec["containers"]
    }
    [kustomization] = read_documents(KUBERAY / "base" / "kustomization.yaml")
    [image] = kustomization["images"]
    assert images == {f"{image['newName']}:{image['newTag']}"}
    assert {cluster["rayVersion"] for cluster in clusters(overlay).values()} == {importlib.metadata.version("ray")}
    services = compose_file()["services"]
    for name, kind in (("mlflow", "Deployment"), ("mlflow-postgres", "StatefulSet")):
        [container] = named(overlay, kind, name)["spec"]["template"]["spec"]["containers"]
        assert container["image"] == services[name]["image"]
    assert services["mlflow"]["image"].endswith(f":v{importlib.metadata.version('mlflow')}-full")


# Pods.


def test_no_pod_runs_as_root_or_gains_privileges(overlay):
    found = list(pods(overlay))
    assert len(found) >= 15
    for pod in found:
        security = pod.spec["securityContext"]
        assert security["runAsNonRoot"] is True, pod.name
        assert min(security[field] for field in ("runAsUser", "runAsGroup", "fsGroup")) > 0, pod.name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, pod.name
        for container in pod.spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, pod.name
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, pod.name
    for namespace in of_kind(overlay, "Namespace"):
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_only_the_autoscaling_head_gets_a_token_of_the_api_server(overlay):
    mounted = {pod.name for pod in pods(overlay) if pod.spec.get("automountServiceAccountToken", True)}
    assert mounted == {"serve head"}
    assert clusters(overlay)["serve"]["enableInTreeAutoscaling"]


def test_ray_pods_run_as_the_images_user_with_volumes_for_storage_shared_memory_and_logs(overlay):
    [user] = re.findall(r"^USER (\d+)$", text_of("deploy/Dockerfile"), re.MULTILINE)
    for pod in pods(overlay):
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        if pod.name != "mlflow-postgres":  # it has a claim template
            for container in pod.spec["containers"]:
                assert set(mounts(container).values()) <= set(volumes), pod.name
        if pod.namespace == "meanflow":
            assert pod.spec["securityContext"]["runAsUser"] == int(user), pod.name
        if "ray.io/is-ray-node" not in pod.labels:
            continue
        container = ray_container(pod.spec)
        assert volumes[mounts(container)["/storage"]]["persistentVolumeClaim"]["claimName"] == "storage"
        assert "/tmp/ray" in mounts(container)
        shared = volumes[mounts(container)["/dev/shm"]]["emptyDir"]
        assert shared["medium"] == "Memory"
        memory = bytes_of(container["resources"]["limits"]["memory"])
        if pod.labels["ray.io/node-type"] == "worker":  # Ray's object store takes 30 % of the memory
            assert 0.3 * memory <= bytes_of(shared["sizeLimit"]) < 0.5 * memory, pod.name
        else:  # KubeRay's Service and the workers use these names
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert (ports["gcs-server"], ports["dashboard"]) == (6379, 8265), pod.name
        variables = environment(container)
        assert variables["HF_HOME"].startswith("/storage/")
        assert {"MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"} <= set(variables), (
            pod.name
        )
        assert not {"RAY_AUTH_TOKEN", "RAY_AUTH_MODE"} & set(variables)  # KubeRay sets them, from the cluster's Secret


def test_only_workers_take_tasks_and_requests_equal_limits(overlay):
    for stage, cluster in clusters(overlay).items():
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", stage
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            resources = ray_container(group["template"]["spec"])["resources"]
            assert resources["requests"] == resources["limits"], stage
            has_gpus = "nvidia.com/gpu" in resources["limits"]
            assert has_gpus == (group.get("groupName") == "gpu"), stage
            tolerated = [toleration["key"] for toleration in group["template"]["spec"].get("tolerations", [])]
            assert tolerated == (["nvidia.com/gpu"] if has_gpus else []), stage
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], stage


def test_storage_is_shared_and_the_node_cache_holds_imagenet(overlay):
    assert named(overlay, "PersistentVolumeClaim", "storage")["spec"]["accessModes"] == ["ReadWriteMany"]
    [claim] = named(overlay, "StatefulSet", "mlflow-postgres")["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    volumes = gpu_group(clusters(overlay)["train"])["template"]["spec"]["volumes"]
    [cache] = [volume["emptyDir"] for volume in volumes if volume["name"] == "cache"]
    assert "medium" not in cache
    assert bytes_of(cache["sizeLimit"]) > IMAGENET_LATENTS_BYTES


# Jobs.


def test_entrypoints_parse_and_agree_with_each_other(overlay):
    jobs = {}
    for job in of_kind(overlay, "RayJob"):
        stage = job["metadata"]["name"]
        python, flag, module, *words = shlex.split(job["spec"]["entrypoint"])
        assert (python, flag, module) == ("python", "-m", f"pipelines.{stage}")
        jobs[stage] = parse_module(module, words)
    encode, (preset, train), evaluate = jobs["encode"], jobs["train"], jobs["evaluate"]
    assert {encode.device, train.device, evaluate.device} == {"gpu"}
    assert train.data == encode.output
    assert evaluate.train_images == encode.images
    config, _ = validated(named(overlay, "RayService", "endpoint")["spec"]["serveConfigV2"])
    assert evaluate.model == f"models:/meanflow-{preset}@candidate"
    assert evaluate.promote
    assert config["applications"][0]["args"]["model"] == f"models:/meanflow-{preset}@champion"
    for place in (encode.images, encode.output, train.storage, str(evaluate.output)):
        assert place.startswith("/storage/")  # outlives the pods
    group = gpu_group(clusters(overlay)["train"])
    container = ray_container(group["template"]["spec"])
    assert train.num_workers == group["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert "cache" in {name for path, name in mounts(container).items() if train.cache_dir.startswith(f"{path}/")}


def test_jobs_wait_for_nodes_and_survive_a_lost_submitter(overlay):
    for job in of_kind(overlay, "RayJob"):
        spec = job["spec"]
        assert spec["preRunningDeadlineSeconds"] >= 1800
        assert spec["ttlSecondsAfterFinished"] >= 300  # time to look at the pods of a failed job
        assert spec["shutdownAfterJobFinishes"] is True  # KubeRay requires it for ttlSecondsAfterFinished
        assert (spec["submissionMode"], spec["backoffLimit"]) == ("K8sJobMode", 0)
        assert spec["submitterConfig"]["backoffLimit"] >= 10


def test_stopped_or_evicted_head_writes_a_checkpoint_first(overlay):
    job = named(overlay, "RayJob", "train")["spec"]
    assert yaml.safe_load(job["runtimeEnvYAML"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "300"}}
    pod = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    env, address, ray, *words = ray_container(pod)["lifecycle"]["preStop"]["exec"]["command"]
    assert (env, address, ray) == ("env", "RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265", "ray")
    stop = parse_with_click(ray_command_line, words)
    assert (stop.info_name, stop.params["job_id"], stop.params["no_wait"]) == ("stop", job["jobId"], False)
    assert pod["terminationGracePeriodSeconds"] >= 120


@pytest.mark.parametrize("stage", ["train", "serve"])
def test_evicted_worker_is_drained_before_it_ends(overlay, stage):
    pod = gpu_group(clusters(overlay)[stage])["template"]["spec"]
    *shell, script = ray_container(pod)["lifecycle"]["preStop"]["exec"]["command"]
    assert shell == ["bash", "-c"]
    drain, wait = (shlex.split(part) for part in script.split("&&"))
    options = parse_with_click(ray_command_line, drain[1:]).params
    # Without --node-id, the node drains itself. Ray Train reacts to this reason only.
    assert (options["node_id"], options["reason"]) == (None, "DRAIN_NODE_REASON_PREEMPTION")
    seconds = options["deadline_remaining_seconds"]
    assert wait == ["sleep", str(seconds)]
    assert 90 <= seconds <= pod["terminationGracePeriodSeconds"] - 20


def test_shell_runs_until_it_is_deleted(overlay):
    assert ray_container(named(overlay, "Pod", "shell")["spec"])["command"] == ["sleep", "infinity"]


# The endpoint.


def test_serve_config_differs_from_deploy_serve_only_where_it_must(overlay):
    config, _ = validated(named(overlay, "RayService", "endpoint")["spec"]["serveConfigV2"])
    expected = yaml.safe_load((REPOSITORY / "deploy" / "serve.yaml").read_text())
    expected["proxy_location"] = "EveryNode"  # KubeRay's Service routes requests to the workers
    arguments, own = expected["applications"][0]["args"], config["applications"][0]["args"]
    del arguments["tracking_uri"]  # the pods set MLFLOW_TRACKING_URI
    if own["model"] == "models:/meanflow-b4@champion":  # the overlay for one GPU
        own["model"] = arguments["model"]
        for application in (config, expected):
            del application["applications"][0]["deployments"][0]["autoscaling_config"]["max_replicas"]
    assert config == expected


def test_endpoint_starts_with_api_keys_only(overlay):
    config, settings = validated(named(overlay, "RayService", "endpoint")["spec"]["serveConfigV2"])
    host = config["http_options"]["host"]
    require_safe_exposure(settings["Api"], host)
    with pytest.raises(ValueError, match="api_keys"):
        require_safe_exposure(Arguments.model_validate(config["applications"][0]["args"]), host)


def test_gpu_pods_match_replicas_and_outlive_their_requests(overlay):
    service = named(overlay, "RayService", "endpoint")["spec"]
    config, settings = validated(service["serveConfigV2"])
    group = gpu_group(service["rayClusterConfig"])
    scaling = config["applications"][0]["deployments"][0]["autoscaling_config"]
    assert (group["minReplicas"], group["maxReplicas"]) == (scaling["min_replicas"], scaling["max_replicas"])
    drain = settings["ImageGenerator"].drain_seconds
    assert service["rayClusterDeletionDelaySeconds"] > drain
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > drain
    # An upgrade through a second cluster needs twice the GPUs.
    assert (service["upgradeStrategy"]["type"] == "None") == (scaling["max_replicas"] == 1)


def test_only_workers_have_probes_that_ask_the_application(overlay):
    cluster = clusters(overlay)["serve"]
    head = ray_container(cluster["headGroupSpec"]["template"]["spec"])
    worker = ray_container(gpu_group(cluster)["template"]["spec"])
    startup, readiness = worker["startupProbe"], worker["readinessProbe"]
    assert (startup["httpGet"]["path"], readiness["httpGet"]["path"]) == ("/readyz", "/healthz")
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1800  # loading, and compiling per batch size
    assert readiness["periodSeconds"] * readiness["failureThreshold"] <= 15
    assert "livenessProbe" not in worker  # KubeRay probes the raylet
    # KubeRay submits the Serve config only once the head is ready, so the head cannot wait for the application.
    assert not {"startupProbe", "readinessProbe"} & set(head)
    config, _ = validated(named(overlay, "RayService", "endpoint")["spec"]["serveConfigV2"])
    for container in (head, worker):
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["serve"] == config["http_options"]["port"]
