"""Checks the MLflow deployments in deploy/kuberay and deploy/mlflow: options, addresses, volumes and secrets."""

import importlib.util
import re
from pathlib import Path
from urllib.parse import urlsplit

import mlflow.cli
import pytest
from mlflow.server.security_utils import is_allowed_host_header

from tests.support.compose import MLFLOW, compose_file, filled_in
from tests.support.kubernetes import KUBERAY, environment, mounts, named, pods, render
from tests.support.readme import text_of


@pytest.fixture(scope="module")
def manifests() -> list[dict]:
    """The manifests of the base. No overlay changes the MLflow server."""
    return render(KUBERAY / "base")


@pytest.fixture(scope="module")
def compose() -> dict:
    return compose_file()


def pod_spec(manifests: list[dict], kind: str, name: str) -> dict:
    return named(manifests, kind, name)["spec"]["template"]["spec"]


def server_options(words: list[str]) -> dict:
    """Parses the options with MLflow's CLI."""
    assert words[0] == "server"
    return mlflow.cli.server.make_context("server", words[1:]).params


def test_kubernetes_server_options_are_valid_and_allow_the_host_name_that_the_stages_use(manifests):
    settings = named(manifests, "ConfigMap", "mlflow-settings")["data"]
    [container] = pod_spec(manifests, "Deployment", "mlflow")["containers"]
    values = {
        name: settings[value["configMapKeyRef"]["key"]]
        for name, value in environment(container).items()
        if isinstance(value, dict)
        and "configMapKeyRef" in value
        and not value["configMapKeyRef"].get("optional", False)
    }
    options = server_options(filled_in(container["args"], values))
    assert options["serve_artifacts"]
    assert options["artifacts_destination"].startswith("s3://")
    assert (options["app_name"], options["port"]) == ("basic-auth", 5000)
    [address] = {
        environment(container)["MLFLOW_TRACKING_URI"]
        for pod in pods(manifests)
        for container in pod.spec["containers"]
        if "MLFLOW_TRACKING_URI" in environment(container)
    }
    name, namespace = urlsplit(address).hostname.split(".")[:2]
    [port] = named(manifests, "Service", name, namespace)["spec"]["ports"]
    assert port["port"] == urlsplit(address).port
    allowed = options["allowed_hosts"].split(",")
    for host in (urlsplit(address).netloc, "localhost:5000", "127.0.0.1:5000"):
        assert is_allowed_host_header(allowed, host), host
    for host in ("evil.example", "mlflow.evil.example:5000", "mlflow.mlflow.svc.cluster.local.evil.example:5000"):
        assert not is_allowed_host_header(allowed, host), host


def test_services_select_the_pods_and_files_are_written_to_volumes(manifests):
    for kind, name in (("Deployment", "mlflow"), ("StatefulSet", "mlflow-postgres")):
        spec, service = named(manifests, kind, name)["spec"], named(manifests, "Service", name, "mlflow")["spec"]
        assert service["selector"] == spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
        [container] = spec["template"]["spec"]["containers"]
        [port] = service["ports"]
        assert {one["name"]: one["containerPort"] for one in container["ports"]} == {port["targetPort"]: port["port"]}
        assert container["securityContext"]["readOnlyRootFilesystem"]
    # With a rolling update, two servers could migrate the tables at the same time.
    assert named(manifests, "Deployment", "mlflow")["spec"]["strategy"]["type"] == "Recreate"
    assert named(manifests, "StatefulSet", "mlflow-postgres")["spec"]["serviceName"] == "mlflow-postgres"
    pod = pod_spec(manifests, "Deployment", "mlflow")
    [container] = pod["containers"]
    paths, values = mounts(container), environment(container)
    assert paths[values["HOME"]] == paths[container["workingDir"]] == paths["/tmp"] == "scratch"
    folder, file = values["MLFLOW_AUTH_CONFIG_PATH"].rsplit("/", 1)
    [volume] = [volume for volume in pod["volumes"] if volume["name"] == paths[folder]]
    assert [item["path"] for item in volume["configMap"]["items"]] == [file]
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 300
    [container] = pod_spec(manifests, "StatefulSet", "mlflow-postgres")["containers"]
    assert mounts(container)[environment(container)["PGDATA"].rsplit("/", 1)[0]] == "data"


def test_compose_server_is_reachable_only_from_this_machine(compose):
    service = compose["services"]["mlflow"]
    options = server_options(filled_in(service["command"][1:], {}))
    assert options["app_name"] == "basic-auth"
    assert is_allowed_host_header(options["allowed_hosts"].split(","), "localhost:5000")
    assert not is_allowed_host_header(options["allowed_hosts"].split(","), "evil.example:5000")
    assert filled_in(service["ports"], {}) == ["127.0.0.1:5000:5000"]
    assert [name for name, one in compose["services"].items() if "ports" in one] == ["mlflow"]
    assert compose["networks"]["database"]["internal"]
    assert compose["services"]["mlflow-postgres"]["networks"] == ["database"]


def test_compose_services_volumes_and_health_checks_are_consistent(compose):
    services = compose["services"]
    known = (
        "image user working_dir entrypoint command environment volumes tmpfs read_only cap_drop cap_add security_opt "
    )
    known += "networks network_mode ports depends_on healthcheck restart"
    for service in services.values():
        assert set(service) <= set(known.split())
        for dependency, condition in service.get("depends_on", {}).items():
            is_healthy = condition["condition"] == "service_healthy"
            assert ("healthcheck" in services[dependency]) == is_healthy, dependency
    assert "healthcheck" in services["mlflow"]
    named_volumes = {
        volume.split(":")[0] for one in services.values() for volume in one.get("volumes", []) if volume[0] != "."
    }
    assert named_volumes == set(compose["volumes"])


def test_compose_file_contains_no_secret_and_env_example_lists_every_variable(compose):
    text = (MLFLOW / "compose.yaml").read_text()
    lines = (MLFLOW / "env.example").read_text().splitlines()
    example = dict(line.split("=", 1) for line in lines if "=" in line and line[0] != "#")
    assert set(re.findall(r"\$\{(\w+)", text)) == set(example)
    for name, value in example.items():
        assert not value or not re.search("PASSWORD|SECRET|KEY", name), f"{name} has a value in env.example"
    required = set(re.findall(r"\$\{(\w+):\?", text))
    assert required == {name for name in example if re.search("PASSWORD|FLASK", name)}
    for service in compose["services"].values():
        for name, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|KEY_ID", name):
                assert value.startswith("${"), name
    assert "deploy/mlflow/.env" in text_of(".gitignore").splitlines()


def test_mlflow_reads_the_same_authentication_settings_in_both_deployments(monkeypatch, manifests, compose):
    text = (MLFLOW / "basic_auth.ini").read_text()
    assert named(manifests, "ConfigMap", "mlflow-settings")["data"]["basic_auth.ini"] == text
    # Loaded from its file, because its package imports dependencies that only the server's image contains.
    [folder] = importlib.util.find_spec("mlflow").submodule_search_locations
    spec = importlib.util.spec_from_file_location("mlflow_auth_config", Path(folder) / "server" / "auth" / "config.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("MLFLOW_AUTH_CONFIG_PATH", str(MLFLOW / "basic_auth.ini"))
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", "from the environment")
    config = module.read_auth_config()
    assert config.admin_password == "from the environment"
    assert not re.search(r"^\w*password", text, re.MULTILINE)
    words = compose["services"]["mlflow"]["command"]
    [container] = pod_spec(manifests, "Deployment", "mlflow")["containers"]
    for options in (words, container["args"]):
        assert f"--backend-store-uri={config.database_uri}" in options
    # tests/test_mlflow_server.py runs the compose file's options against a real PostgreSQL.
    assert {word.split("=")[0] for word in container["args"][1:]} == {word.split("=")[0] for word in words[2:]}
    address = urlsplit(config.database_uri)
    assert (address.password, address.hostname) == (None, "mlflow-postgres")
    assert address.hostname in compose["services"]
    assert named(manifests, "Service", address.hostname, "mlflow")["spec"]["ports"][0]["port"] == address.port
