"""Checks the manifests of deploy/kuberay against KubeRay's own schemas, and for what the API server drops in silence.

    git clone --depth 1 --branch v1.7.0 https://github.com/ray-project/kuberay
    python -m deploy.validate --crds kuberay/ray-operator/config/crd/bases

Renders the base and every overlay, and checks in each RayJob and RayService: the schema, keys that it does not know, what
the operator would refuse, and the Serve config with the application's arguments. Prints what is wrong, one a line: where
it was rendered, which document, and where in it; exits with 1 if anything is. Rules in the schemas that are written in
CEL are left to the API server.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from pydantic import ValidationError
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from deploy.settings import API_SETTINGS, GENERATOR_SETTINGS, Arguments, apply_user_config

KUBERAY = Path(__file__).with_name("kuberay")
SETTINGS = {"ImageGenerator": GENERATOR_SETTINGS, "Api": API_SETTINGS}
KUSTOMIZATION_FIELDS = {"apiVersion", "kind", "resources", "images", "patches"}
MAX_NAME = 47  # of a RayJob or RayService, beyond which KubeRay refuses it
# Strings for the schemas, and checked by the operator alone.
CHOICES = {
    "submissionMode": ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    "upgradeStrategy.type": ("NewCluster", "NewClusterWithIncrementalUpgrade", "None"),
}
FREE_FORM = ("x-kubernetes-preserve-unknown-fields", "x-kubernetes-embedded-resource")

Document = dict[str, Any]


def read_documents(path: Path) -> list[Document]:
    """The documents of a YAML file. Raises ValueError where it is no YAML, or a document is no object."""
    try:
        documents = [document for document in yaml.safe_load_all(path.read_text()) if document is not None]
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not all(isinstance(document, dict) for document in documents):
        raise ValueError(f"{path} must hold objects, but has a document that is none")
    return documents


def title(document: Document) -> str:
    """Its kind and name."""
    return f"{document.get('kind')} {document.get('metadata', {}).get('name')}"


def render(folder: Path) -> list[Document]:
    """What `kubectl kustomize FOLDER` gives, as far as this repository needs it: resources, JSON patches, images.

    Raises ValueError for a kustomization that says more, names a file that is not there, or patches what is not there.
    """
    path = folder / "kustomization.yaml"
    if not path.is_file():
        raise ValueError(f"no kustomization.yaml in {folder}")
    (content,) = read_documents(path)
    unknown = set(content) - KUSTOMIZATION_FIELDS
    if unknown:
        raise ValueError(f"{path}: known here are {', '.join(sorted(KUSTOMIZATION_FIELDS))}, but got {unknown}")
    documents: list[Document] = []
    for resource in content["resources"]:
        found = folder / resource
        if not found.exists():
            raise ValueError(f"{path}: resource {resource} does not exist")
        documents += render(found) if found.is_dir() else [unshared(one) for one in read_documents(found)]
    for patch in content.get("patches", []):
        _apply_patch(folder, patch, documents)
    for image in content.get("images", []):
        for container in (container for document in documents for container in containers_of(document)):
            if container.get("image") == image["name"]:
                container["image"] = f"{image.get('newName', image['name'])}:{image['newTag']}"
    return documents


def unshared(value: Any) -> Any:
    """A copy in which what a YAML alias repeats is an object of its own, so that a patch of one place changes no other."""
    if isinstance(value, dict):
        return {key: unshared(inner) for key, inner in value.items()}
    return [unshared(inner) for inner in value] if isinstance(value, list) else value


def containers_of(value: Any) -> Iterator[dict[str, Any]]:
    """Every container of a manifest, wherever its pod stands."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("containers", "initContainers") and isinstance(inner, list):
                yield from inner
            yield from containers_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from containers_of(inner)


def _apply_patch(folder: Path, patch: Document, documents: list[Document]) -> None:
    target = patch["target"]
    api_version = f"{target['group']}/{target['version']}"
    chosen = [
        document
        for document in documents
        if (document["apiVersion"], document["kind"]) == (api_version, target["kind"])
        and target.get("name") in (None, document["metadata"]["name"])
    ]
    if not chosen:
        raise ValueError(f"{folder}: nothing is {target}, which {patch['path']} patches")
    path = folder / patch["path"]
    if not path.is_file():
        raise ValueError(f"{folder}: patch {patch['path']} does not exist")
    for document in chosen:
        for operation in yaml.safe_load(path.read_text()):
            _apply_operation(document, operation, f"{path}, on {title(document)}")


def _apply_operation(document: Document, operation: Document, where: str) -> None:
    """One operation of RFC 6902: add, replace or remove."""
    parts = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    value: Any = document
    for part in parts[:-1]:
        value = _child(value, part, operation, where)
    last, kind = parts[-1], operation["op"]
    if kind not in ("add", "replace", "remove"):
        raise ValueError(f"{where}: op must be add, replace or remove, but got {kind!r}")
    if kind != "add":
        _child(value, last, operation, where)
    if isinstance(value, list):
        position = len(value) if last == "-" else int(last)
        if kind == "add":
            value.insert(position, operation["value"])
        elif kind == "replace":
            value[position] = operation["value"]
        else:
            del value[position]
    elif kind == "remove":
        del value[last]
    else:
        value[last] = operation["value"]


def _child(value: Any, part: str, operation: Document, where: str) -> Any:
    try:
        return value[int(part)] if isinstance(value, list) else value[part]
    except (KeyError, IndexError, ValueError, TypeError):
        raise ValueError(f"{where}: there is no {operation['path']}") from None


def read_schemas(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """{(apiVersion, kind): OpenAPI schema} of the custom resource definitions in a folder.

    Raises ValueError where those of RayJob and RayService are not there.
    """
    schemas = {}
    for path in sorted(folder.glob("*.yaml")):
        for definition in read_documents(path):
            if definition.get("kind") != "CustomResourceDefinition":
                continue
            spec = definition["spec"]
            for version in spec["versions"]:
                key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
                schemas[key] = version["schema"]["openAPIV3Schema"]
    missing = {("ray.io/v1", "RayJob"), ("ray.io/v1", "RayService")} - set(schemas)
    if missing:
        names = ", ".join(f"{kind} {version}" for version, kind in sorted(missing))
        raise ValueError(
            f"{folder} must hold KubeRay's custom resource definitions, but has none of {names}; they are in "
            f"ray-operator/config/crd/bases of its repository"
        )
    return schemas


def schema_problems(document: Document, schema: dict[str, Any]) -> list[str]:
    """What is wrong with a document by its schema, and what the API server would drop because the schema is silent."""
    found = []
    for error in jsonschema.Draft7Validator(closed(schema)).iter_errors(document):
        if error.validator == "additionalProperties":
            unknown = [key for key in error.instance if key not in error.schema.get("properties", {})]
            found += [f"{error.json_path}.{key}: unknown key, which the API server drops" for key in unknown]
        else:
            found.append(f"{error.json_path}: {error.message}")
    return sorted(found)


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with an error for each key that it does not name."""
    if any(schema.get(name) for name in FREE_FORM):
        return schema
    made = dict(schema)
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            made[name] = closed(schema[name])
    if "properties" in schema:
        made["properties"] = {key: closed(inner) for key, inner in schema["properties"].items()}
        made.setdefault("additionalProperties", False)
    return made


def operator_problems(document: Document) -> list[str]:
    """What KubeRay v1.7 refuses though its schema allows it; the object then stands there, and nothing happens."""
    found, spec, name = [], document["spec"], document["metadata"]["name"]
    if len(name) > MAX_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        found.append(f"$.metadata.name: must be a DNS label of at most {MAX_NAME} characters, but got {name!r}")
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        found.append("$.spec.ttlSecondsAfterFinished: wants shutdownAfterJobFinishes")
    for path, allowed in CHOICES.items():
        value: Any = spec
        for part in path.split("."):
            value = value.get(part, {})
        if value and value not in allowed:
            found.append(f"$.spec.{path}: must be one of {', '.join(allowed)}, but got {value!r}")
    key = "rayClusterSpec" if document["kind"] == "RayJob" else "rayClusterConfig"
    cluster = spec.get(key)
    if cluster is None:
        return [*found, f"$.spec.{key}: must be there"]
    if cluster.get("authOptions", {}).get("mode") == "token" and "rayVersion" not in cluster:
        found.append(f"$.spec.{key}.authOptions: wants rayVersion")
    for number, group in enumerate(cluster.get("workerGroupSpecs", [])):
        fewest, most = group.get("minReplicas"), group.get("maxReplicas")
        if fewest is None or most is None or not fewest <= group.get("replicas", fewest) <= most:
            found.append(
                f"$.spec.{key}.workerGroupSpecs[{number}]: must have minReplicas <= replicas <= maxReplicas, but got "
                f"{fewest}, {group.get('replicas')}, {most}"
            )
    return found


def serve_problems(text: str) -> list[str]:
    """What is wrong with a Serve config: by Serve's schema, by keys that it passes over, by the application's arguments."""
    content = yaml.safe_load(text)
    try:
        config = ServeDeploySchema.model_validate(content)
    except ValidationError as error:
        return _of_pydantic(error, "")
    kept = config.model_dump(exclude_unset=True, mode="json")
    found = [f"{path}: unknown key, which Serve passes over" for path in _lost_keys(content, kept, "")]
    for number, application in enumerate(config.applications):
        path = f"applications[{number}]"
        try:
            arguments = Arguments.model_validate(application.args)
        except ValidationError as error:
            found += _of_pydantic(error, f"{path}.args.")
            continue
        for place, deployment in enumerate(content["applications"][number].get("deployments", [])):
            found += _deployment_problems(deployment, arguments, f"{path}.deployments[{place}]")
    return found


def _deployment_problems(deployment: Document, arguments: Arguments, path: str) -> list[str]:
    found = []
    allowed = SETTINGS.get(deployment["name"])
    if allowed is None:
        return [f"{path}.name: must be one of {', '.join(SETTINGS)}, but got {deployment['name']!r}"]
    try:
        apply_user_config(arguments, deployment.get("user_config"), allowed)
    except ValidationError as error:
        found += _of_pydantic(error, f"{path}.user_config.")
    except ValueError as error:
        found.append(f"{path}.user_config: {error}")
    scaling = deployment.get("autoscaling_config")
    if isinstance(scaling, dict):  # which Serve's schema takes as it comes, and Serve reads when it is too late
        try:
            AutoscalingConfig.model_validate(scaling)
        except ValidationError as error:
            found += _of_pydantic(error, f"{path}.autoscaling_config.")
        found += [
            f"{path}.autoscaling_config.{key}: unknown key, which Serve passes over"
            for key in scaling
            if key not in AutoscalingConfig.model_fields
        ]
    return found


def _of_pydantic(error: ValidationError, prefix: str) -> list[str]:
    return [
        f"{prefix}{'.'.join(str(part) for part in one['loc']) or '(all)'}: {one['msg']}"
        for one in error.errors(include_input=False, include_url=False)
    ]


def _lost_keys(given: Any, kept: Any, path: str) -> list[str]:
    if isinstance(given, dict) and isinstance(kept, dict):
        found = []
        for key, inner in given.items():
            here = f"{path}.{key}".lstrip(".")
            found += [here] if key not in kept else _lost_keys(inner, kept[key], here)
        return found
    if isinstance(given, list) and isinstance(kept, list):
        return [
            lost
            for i, (one, other) in enumerate(zip(given, kept, strict=True))
            for lost in _lost_keys(one, other, f"{path}[{i}]")
        ]
    return []


def kustomizations(folder: Path = KUBERAY) -> list[Path]:
    """The folders with a kustomization, the base first."""
    return sorted(path.parent for path in folder.rglob("kustomization.yaml"))


def problems(schemas: dict[tuple[str, str], dict[str, Any]], folder: Path = KUBERAY) -> list[str]:
    """Everything that is wrong with the Ray documents of the base and of every overlay, one a line."""
    found = []
    for kustomization in kustomizations(folder):
        where = kustomization.relative_to(folder)
        try:
            documents = render(kustomization)
        except ValueError as error:
            found.append(f"{where}: {error}")
            continue
        for document in documents:
            if not document["apiVersion"].startswith("ray.io/"):
                continue
            schema = schemas.get((document["apiVersion"], document["kind"]))
            if schema is None:
                found.append(f"{where}, {title(document)}: KubeRay has no {document['kind']} {document['apiVersion']}")
                continue
            wrong = schema_problems(document, schema) or operator_problems(document)
            if not wrong and document["kind"] == "RayService":
                wrong = [f"$.spec.serveConfigV2, {line}" for line in serve_problems(document["spec"]["serveConfigV2"])]
            found += [f"{where}, {title(document)}: {line}" for line in wrong]
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.validate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--crds", type=Path, required=True, help="folder with KubeRay's ray.io_*.yaml")
    parser.add_argument("--manifests", type=Path, default=KUBERAY, help="folder of kustomizations; the project's own")
    arguments = parser.parse_args()
    try:
        schemas = read_schemas(arguments.crds)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    found = problems(schemas, arguments.manifests)
    for line in found:
        print(line)
    if found:
        raise SystemExit(1)
    number = sum(
        document["apiVersion"].startswith("ray.io/")
        for folder in kustomizations(arguments.manifests)
        for document in render(folder)
    )
    print(f"{number} Ray documents of {len(kustomizations(arguments.manifests))} kustomizations are valid")


if __name__ == "__main__":
    main()
