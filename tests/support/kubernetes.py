"""Renders the manifests of deploy/kuberay as Kustomize does, finds unknown fields in them, and looks up their parts."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.readme import REPOSITORY

KUBERAY = REPOSITORY / "deploy" / "kuberay"
STAGES = ("encode", "train", "evaluate", "serve")
Document = dict[str, Any]

# {field: allowed subfields}, for every field in use. For a list, the subfields are those of its items.
FIELDS = {
    "RayJob": "apiVersion kind metadata spec",
    "RayService": "apiVersion kind metadata spec",
    "Pod": "apiVersion kind metadata spec",
    "Deployment": "apiVersion kind metadata spec",
    "StatefulSet": "apiVersion kind metadata spec",
    "Service": "apiVersion kind metadata spec",
    "PersistentVolumeClaim": "apiVersion kind metadata spec",
    "NetworkPolicy": "apiVersion kind metadata spec",
    "ConfigMap": "apiVersion kind metadata data",
    "Namespace": "apiVersion kind metadata",
    "Kustomization": "apiVersion kind resources images patches",
    "metadata": "name namespace labels",
    "RayJob.spec": "entrypoint jobId runtimeEnvYAML submissionMode submitterConfig submitterPodTemplate backoffLimit "
    "shutdownAfterJobFinishes ttlSecondsAfterFinished preRunningDeadlineSeconds rayClusterSpec",
    "RayService.spec": "upgradeStrategy rayClusterDeletionDelaySeconds excludeHeadPodFromServeSvc serveConfigV2 "
    "rayClusterConfig",
    "Deployment.spec": "replicas strategy selector template",
    "StatefulSet.spec": "serviceName replicas selector template volumeClaimTemplates",
    "Service.spec": "clusterIP selector ports",
    "NetworkPolicy.spec": "podSelector policyTypes ingress egress",
    "claim.spec": "accessModes storageClassName resources",
    "pod.spec": "restartPolicy automountServiceAccountToken terminationGracePeriodSeconds securityContext tolerations "
    "nodeSelector containers volumes",
    "submitterConfig": "backoffLimit",
    "upgradeStrategy": "type",
    "strategy": "type",
    "rayClusterSpec": "rayVersion authOptions headGroupSpec workerGroupSpecs",
    "rayClusterConfig": "rayVersion authOptions enableInTreeAutoscaling autoscalerOptions headGroupSpec workerGroupSpecs",
    "authOptions": "mode",
    "autoscalerOptions": "version idleTimeoutSeconds resources securityContext",
    "headGroupSpec": "rayStartParams template",
    "workerGroupSpecs": "groupName replicas minReplicas maxReplicas rayStartParams template",
    "template": "metadata spec",
    "submitterPodTemplate": "metadata spec",
    "volumeClaimTemplates": "metadata spec",
    "securityContext": "runAsNonRoot runAsUser runAsGroup fsGroup fsGroupChangePolicy seccompProfile "
    "allowPrivilegeEscalation capabilities readOnlyRootFilesystem",
    "seccompProfile": "type",
    "capabilities": "drop",
    "tolerations": "key operator effect",
    "containers": "name image workingDir command args env lifecycle ports startupProbe readinessProbe livenessProbe "
    "resources securityContext volumeMounts",
    "env": "name value valueFrom",
    "valueFrom": "secretKeyRef configMapKeyRef",
    "secretKeyRef": "name key optional",
    "configMapKeyRef": "name key optional",
    "lifecycle": "preStop",
    "preStop": "exec",
    "exec": "command",
    "startupProbe": "httpGet exec initialDelaySeconds periodSeconds timeoutSeconds failureThreshold",
    "readinessProbe": "httpGet exec initialDelaySeconds periodSeconds timeoutSeconds failureThreshold",
    "livenessProbe": "httpGet exec initialDelaySeconds periodSeconds timeoutSeconds failureThreshold",
    "httpGet": "path port",
    "ports": "name containerPort port targetPort protocol",
    "resources": "requests limits",
    "volumeMounts": "name mountPath readOnly",
    "volumes": "name persistentVolumeClaim emptyDir configMap",
    "persistentVolumeClaim": "claimName",
    "emptyDir": "medium sizeLimit",
    "configMap": "name items",
    "items": "key path",
    "selector": "app matchLabels",
    "podSelector": "matchLabels matchExpressions",
    "namespaceSelector": "matchLabels",
    "matchExpressions": "key operator values",
    "ingress": "from ports",
    "egress": "to ports",
    "from": "podSelector namespaceSelector ipBlock",
    "to": "podSelector namespaceSelector ipBlock",
    "ipBlock": "cidr except",
    "images": "name newName newTag",
    "patches": "path target",
    "target": "group version kind name",
}
# Maps with arbitrary keys, whose values must be strings.
STRINGS = ("labels", "matchLabels", "data", "rayStartParams", "requests", "limits", "nodeSelector")
POD_OWNERS = ("Pod", "template", "submitterPodTemplate")
CLAIM_OWNERS = ("PersistentVolumeClaim", "volumeClaimTemplates")


def unknown_fields(document: Document) -> list[str]:
    """Paths of fields that are unknown to the API server and of values that must be strings but are not."""
    return list(_unknown_fields(document, document["kind"], document["kind"]))


def _unknown_fields(value: Any, name: str, path: str) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _unknown_fields(item, name, path)
    elif isinstance(value, dict) and name in STRINGS:
        yield from (f"{path}.{key}" for key, inner in value.items() if not isinstance(inner, str))
    elif isinstance(value, dict):
        for key, inner in value.items():
            child = key
            if key == "spec":
                child = "pod.spec" if name in POD_OWNERS else "claim.spec" if name in CLAIM_OWNERS else f"{name}.spec"
            if key not in FIELDS.get(name, "").split() or (name == "env" and key == "value" and type(inner) is not str):
                yield f"{path}.{key}"
            else:
                yield from _unknown_fields(inner, child, f"{path}.{key}")


def read_documents(path: Path) -> list[Document]:
    """The documents of a YAML file. YAML aliases become copies, so that a patch changes only its target path."""
    return [json.loads(json.dumps(document)) for document in yaml.safe_load_all(path.read_text())]


def render(folder: Path) -> list[Document]:
    """The output of `kubectl kustomize`. Supports what this repository uses: resources, JSON patches and images."""
    [kustomization] = read_documents(folder / "kustomization.yaml")
    documents: list[Document] = []
    for name in kustomization["resources"]:
        path = folder / name
        documents += render(path) if path.is_dir() else read_documents(path)
    for patch in kustomization.get("patches", []):
        target = patch["target"]
        version = f"{target['group']}/{target['version']}"
        chosen = [
            document
            for document in documents
            if (document["apiVersion"], document["kind"]) == (version, target["kind"])
            and target.get("name") in (None, document["metadata"]["name"])
        ]
        assert chosen, f"{folder}: {patch['path']} matches no document"
        for operation in yaml.safe_load((folder / patch["path"]).read_text()):
            for document in chosen:
                _replace(document, operation)
    for image in kustomization.get("images", []):
        for pod in pods(documents):
            for container in pod.spec["containers"]:
                if container["image"] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
    return documents


def _replace(document: Document, operation: Document) -> None:
    """Applies a `replace` operation of a JSON patch (RFC 6902). Raises KeyError or IndexError if its path is missing."""
    assert set(operation) == {"op", "path", "value"}
    assert operation["op"] == "replace"
    place: Any = document
    *parents, last = operation["path"].removeprefix("/").split("/")
    for part in parents:
        place = place[int(part) if isinstance(place, list) else part]
    place[last]  # must exist
    place[last] = operation["value"]


def named(documents: list[Document], kind: str, name: str, namespace: str | None = None) -> Document:
    """The only document of this kind and name."""
    [found] = [
        document
        for document in documents
        if (document["kind"], document["metadata"]["name"]) == (kind, name)
        and namespace in (None, document["metadata"].get("namespace"))
    ]
    return found


def of_kind(documents: list[Document], kind: str) -> list[Document]:
    """All documents of this kind."""
    return [document for document in documents if document["kind"] == kind]


def clusters(documents: list[Document]) -> dict[str, Document]:
    """{stage: spec of its Ray cluster}."""
    jobs = {job["metadata"]["name"]: job["spec"]["rayClusterSpec"] for job in of_kind(documents, "RayJob")}
    return jobs | {"serve": named(documents, "RayService", "endpoint")["spec"]["rayClusterConfig"]}


def gpu_group(cluster: Document) -> Document:
    """The worker group with GPUs."""
    [group] = [group for group in cluster["workerGroupSpecs"] if group["groupName"] == "gpu"]
    return group


@dataclass(frozen=True)
class Pod:
    """A pod that the documents create, with the labels that KubeRay adds."""

    namespace: str
    name: str
    labels: dict[str, str]
    spec: Document


def pods(documents: list[Document]) -> Iterator[Pod]:
    """All pods that the documents create."""
    for stage, cluster in clusters(documents).items():
        groups = [("head", cluster["headGroupSpec"])]
        groups += [(group["groupName"], group) for group in cluster["workerGroupSpecs"]]
        for name, group in groups:
            labels = {"ray.io/is-ray-node": "yes", "ray.io/node-type": "head" if name == "head" else "worker"}
            template = group["template"]
            yield Pod("meanflow", f"{stage} {name}", template["metadata"]["labels"] | labels, template["spec"])
    for job in of_kind(documents, "RayJob"):
        template = job["spec"]["submitterPodTemplate"]
        labels = template["metadata"]["labels"] | {"ray.io/originated-from-crd": "RayJob"}
        yield Pod("meanflow", f"{job['metadata']['name']} submitter", labels, template["spec"])
    for pod in of_kind(documents, "Pod"):
        yield Pod(pod["metadata"]["namespace"], pod["metadata"]["name"], pod["metadata"]["labels"], pod["spec"])
    for kind in ("Deployment", "StatefulSet"):
        for owner in of_kind(documents, kind):
            template = owner["spec"]["template"]
            metadata = owner["metadata"]
            yield Pod(metadata["namespace"], metadata["name"], template["metadata"]["labels"], template["spec"])


def environment(container: Document) -> dict[str, Any]:
    """{variable: its `value` or `valueFrom`}."""
    return {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in container.get("env", [])}


def mounts(container: Document) -> dict[str, str]:
    """{mount path: name of the volume}."""
    return {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
