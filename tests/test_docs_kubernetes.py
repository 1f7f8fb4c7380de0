"""Checks that the stages, objects, secrets and files named in the commands of docs/how-to/kubernetes.md exist."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from tests.support.command_lines import parse_command
from tests.support.kubernetes import KUBERAY, STAGES, environment, of_kind, pods, render
from tests.support.readme import REPOSITORY, text_of


def page_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", text_of("docs/how-to/kubernetes.md"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


def documented_secrets() -> dict[tuple[str, str], set[str]]:
    """{(namespace, name): keys} of the Secrets that the page creates."""
    found = {}
    for line in page_commands():
        if line.startswith("kubectl create secret generic "):
            words = shlex.split(line)
            keys = {word.removeprefix("--from-literal=").split("=")[0] for word in words if "--from-literal=" in word}
            found[words[words.index("--namespace") + 1], words[4]] = keys
    return found


@pytest.fixture(scope="module")
def documents() -> list[dict]:
    return render(KUBERAY / "overlays" / "small")


def test_page_applies_the_stages_in_order_and_one_at_a_time():
    lines = page_commands()
    stages = []
    for line in lines:
        if line.startswith("kubectl apply -k"):
            folder, option, label = shlex.split(line)[3:]
            assert (REPOSITORY / folder / "kustomization.yaml").is_file(), line
            assert option == "-l"
            stages.append(label.removeprefix("meanflow.stage="))
    assert list(dict.fromkeys(stages)) == ["platform", "shell", *STAGES]
    # Without -l, all stages would start.
    assert [line for line in lines if "-k " in line and "-l " not in line] == [
        "kubectl apply --dry-run=server -k deploy/kuberay/overlays/small"
    ]


def test_every_secret_used_by_pods_is_created_by_the_page(documents):
    secrets = documented_secrets()
    used = set()
    for pod in pods(documents):
        for container in pod.spec["containers"]:
            for name, value in environment(container).items():
                if isinstance(value, dict) and "secretKeyRef" in value:
                    secret = value["secretKeyRef"]
                    used.add((pod.namespace, secret["name"]))
                    if not secret.get("optional") or (pod.namespace, secret["name"]) in secrets:
                        assert secret["key"] in secrets[pod.namespace, secret["name"]], pod.name
                else:
                    assert not re.search("PASSWORD|SECRET|TOKEN|KEY_ID", name), (
                        f"{pod.name} contains the value of {name}"
                    )
    assert set(secrets) <= used
    assert of_kind(documents, "Secret") == []


def test_objects_that_the_page_names_exist(documents):
    existing = {(document["kind"].lower(), document["metadata"]["name"]) for document in documents}
    existing |= {("job", name) for kind, name in existing if kind == "rayjob"}  # KubeRay's submitter
    existing |= {("service", "endpoint-serve-svc"), ("deployment", "kuberay-operator")}  # KubeRay's own
    secrets = {(name, key) for (_, name), keys in documented_secrets().items() for key in keys}
    named = []
    for line in page_commands():
        named += re.findall(r"\b(deployment|service|job|pod|rayjob|rayservice)/([\w-]+)", line)
        if listed := re.search(
            r"(?:get|delete) (rayjob|rayservice|persistentvolumeclaim|pod) ([a-z][\w -]*?)(?: -|$)", line
        ):
            named += [(listed[1], name) for name in listed[2].split()]
        for secret in re.findall(r"get secret ([\w-]+) -o jsonpath='\{\.data\.([\w-]+)\}'", line):
            assert secret in secrets, line
    assert len(named) >= 15
    assert set(named) <= existing


def test_project_and_ray_commands_of_the_page_parse():
    own = []
    for line in page_commands():
        if found := re.search(r"(?:^|-- |&& )(?:env \S+ )?((?:python|ray|meanflow) .*)", line):
            own.append(parse_command(found[1]))
        elif "/generate" in line:
            own.append(parse_command(line))
        for name in re.findall(r"deploy/[\w./-]+", line):
            assert (REPOSITORY / name).exists() or name == "deploy/mlflow/.env", line
    assert len(own) == 4  # check the cluster, stop a job, create a key, request an image
    [line] = [line for line in page_commands() if "users/create" in line]
    [folder] = importlib.util.find_spec("mlflow").submodule_search_locations
    assert '"/mlflow/users/create"' in (Path(folder) / "server" / "auth" / "routes.py").read_text()
    assert "/api/2.0/mlflow/users/create" in line
