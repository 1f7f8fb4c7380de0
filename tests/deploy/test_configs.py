"""Checks deploy/serve.yaml and the Grafana dashboard, and that every YAML file in the repository has a test."""

import json
import re

import pytest

from deploy.metrics import METRICS
from tests.support.environments import tracked_files
from tests.support.readme import text_of
from tests.support.serve_config import validated


def test_serve_config_is_valid_reaches_all_nodes_and_refuses_everybody():
    config, settings = validated(text_of("deploy/serve.yaml"))
    assert config["http_options"]["host"] == "0.0.0.0"  # on 127.0.0.1, replicas of other nodes could not be reached
    assert settings["Api"].api_keys == {"nobody": "0" * 64}
    assert config["applications"][0]["import_path"] == "deploy.app:build_app"


def test_commented_out_settings_in_serve_config_are_valid():
    text = text_of("deploy/serve.yaml")
    uncommented = re.sub(r"^( +)# (?=(model|rate_limit):)", r"\1", text, flags=re.MULTILINE)
    assert uncommented != text
    _, settings = validated(uncommented)
    assert settings["ImageGenerator"].model == "models:/meanflow-xl2/4"
    assert settings["Api"].rate_limit == "600/minute"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("num_gpus: 1", "num_gpu: 1"),
        ("precision: bfloat16", "precision: float8"),
        ("proxy_location", "proxy_locations"),
        ("host: 0.0.0.0", "hots: 0.0.0.0"),
        ("min_replicas: 1", "min_replica: 1"),
        ("max_replicas: 8", "max_replicas: 0"),
        ("deadline_seconds: 60", "deadline: 60"),
        ("name: ImageGenerator", "name: Generator"),
    ],
)
def test_invalid_serve_config_is_rejected(old, new):
    text = text_of("deploy/serve.yaml")
    assert old in text
    with pytest.raises((AssertionError, ValueError, KeyError)):
        validated(text.replace(old, new))


def test_dashboard_shows_every_metric_and_groups_by_existing_labels():
    dashboard = json.loads(text_of("deploy/grafana/endpoint.json"))
    queries = "\n".join(target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", []))
    metrics = re.findall(r"ray_(meanflow_\w+?)(_bucket|_sum|_count)?\{[^}]*\}", queries)
    assert {name for name, _ in metrics} == set(METRICS)
    for name, suffix in metrics:
        assert bool(suffix) == (METRICS[name].kind == "histogram"), name
    grouped = r"by \(([^)]*)\) \((?:rate\(|increase\()?ray_(meanflow_\w+?)(?:_bucket)?\{"
    for label, name in re.findall(grouped, queries):
        assert label in {"le", "replica", *METRICS[name].tags}, (label, name)


def test_every_metric_is_recorded():
    source = "".join(text_of(name) for name in tracked_files() if name.startswith("deploy/") and name.endswith(".py"))
    assert set(re.findall(r'record\(\s*"(meanflow_\w+)"', source)) == set(METRICS)


def test_every_yaml_file_has_a_test():
    files = {name for name in tracked_files() if name.endswith((".yaml", ".yml"))}
    tested = {
        "deploy/serve.yaml",  # this file
        "ray_cluster.yaml", "deploy/clusters/gcp.yaml", "deploy/clusters/local.yaml",  # test_clusters.py
        "deploy/jobs/runtime_env.yaml",  # test_jobs.py
        "deploy/mlflow/compose.yaml",  # test_mlflow_deployments.py
        ".github/workflows/ci.yml", ".github/ISSUE_TEMPLATE/bug.yml", ".github/ISSUE_TEMPLATE/feature.yml",
        ".pre-commit-config.yaml",  # tests/test_contributing.py
    }  # fmt: skip
    # test_kuberay.py checks the rest.
    assert {name for name in files if not name.startswith("deploy/kuberay/")} == tested
