"""Every file that a user hands to Ray or Grafana, checked by Ray's own schema, or against what there is."""

import json
import re
import subprocess
from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from deploy.metrics import METRICS
from deploy.settings import API_SETTINGS, GENERATOR_SETTINGS, Arguments, apply_user_config

REPOSITORY = Path(__file__).parents[2]


def test_serve_config_is_valid_and_listens_on_loopback():
    content = yaml.safe_load((REPOSITORY / "deploy" / "serve.yaml").read_text())
    config = ServeDeploySchema.model_validate(content)
    assert config.http_options.host == "127.0.0.1"  # Serve's own default here is every interface
    assert config.applications[0].import_path == "deploy.app:build_app"
    arguments = Arguments.model_validate(config.applications[0].args)
    for deployment in config.applications[0].deployments:
        allowed = {"ImageGenerator": GENERATOR_SETTINGS, "Api": API_SETTINGS}[deployment.name]
        apply_user_config(arguments, deployment.user_config, allowed)
    assert set(content) <= set(ServeDeploySchema.model_fields)  # Serve lets misspelt keys pass


def test_cluster_config_is_valid():
    content = yaml.safe_load((REPOSITORY / "ray_cluster.yaml").read_text())
    validate_config(prepare_config(content))


def test_settings_that_the_serve_config_only_suggests_are_valid_too():
    text = (REPOSITORY / "deploy" / "serve.yaml").read_text()
    suggested = re.sub(r"^( +)# (?=(model|rate_limit|api_keys):|  alice:)", r"\1", text, flags=re.MULTILINE)
    assert suggested.count("alice:") == 1
    config = ServeDeploySchema.model_validate(yaml.safe_load(suggested))
    arguments = Arguments.model_validate(config.applications[0].args)
    generator, api = (deployment.user_config for deployment in config.applications[0].deployments)
    assert apply_user_config(arguments, generator, GENERATOR_SETTINGS).model == "models:/meanflow-xl2/4"
    assert set(apply_user_config(arguments, api, API_SETTINGS).api_keys) == {"alice"}


def test_the_dashboard_asks_for_metrics_that_there_are():
    dashboard = json.loads((REPOSITORY / "deploy" / "grafana" / "endpoint.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    found = re.findall(r"ray_(meanflow_\w+?)(_bucket|_sum|_count)?\{[^}]*\}", "\n".join(asked))
    assert {name for name, _ in found} == set(METRICS)  # and none is left out
    for name, suffix in found:
        assert bool(suffix) == (METRICS[name].kind == "histogram"), name
    for labels in re.findall(
        r"by \(([^)]*)\) \((?:rate\(|increase\()?ray_(meanflow_\w+?)(?:_bucket)?\{", "\n".join(asked)
    ):
        by, name = labels
        assert by in {"le", "replica", *METRICS[name].tags}, (by, name)


def test_metrics_are_recorded_under_the_names_and_tags_of_the_table():
    source = "".join(path.read_text() for path in (REPOSITORY / "deploy").rglob("*.py"))
    assert set(re.findall(r'record\(\s*"(meanflow_\w+)"', source)) == set(METRICS)


def test_every_yaml_in_the_repository_is_of_a_kind_that_a_test_validates():
    """Serve's config here; clusters, jobs, and Kubernetes with MLflow's compose file in the tests of those names."""
    listed = subprocess.run(
        ["git", "ls-files", "*.yaml", "*.yml"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    found = set(listed.stdout.split())
    validated = {"ray_cluster.yaml", "deploy/clusters/gcp.yaml", "deploy/clusters/local.yaml", "deploy/serve.yaml"}
    validated |= {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "deploy/jobs").glob("*.yaml")}
    validated |= {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "deploy/kuberay").rglob("*.yaml")}
    assert found == validated | {"deploy/mlflow/compose.yaml"}
