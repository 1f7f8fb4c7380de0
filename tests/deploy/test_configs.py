"""Every YAML file that a user hands to Ray, checked by Ray's own schema."""

from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from deploy.schema import Arguments

REPOSITORY = Path(__file__).parents[2]


def test_serve_config_is_valid_and_listens_on_loopback():
    content = yaml.safe_load((REPOSITORY / "deploy" / "serve.yaml").read_text())
    config = ServeDeploySchema.model_validate(content)
    assert config.http_options.host == "127.0.0.1"  # Serve's own default here is every interface
    assert config.applications[0].import_path == "deploy.app:build_app"
    Arguments.model_validate(config.applications[0].args)
    assert set(content) <= set(ServeDeploySchema.model_fields)  # Serve lets misspelt keys pass


def test_cluster_config_is_valid():
    content = yaml.safe_load((REPOSITORY / "ray_cluster.yaml").read_text())
    validate_config(prepare_config(content))
