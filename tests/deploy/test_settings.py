import re
import shlex

import pytest
import yaml
from pydantic import ValidationError

import deploy.app
from deploy.serve import DEPLOYMENTS, fast_path, parse_arguments, serve_config
from deploy.settings import API_SETTINGS, Arguments, apply_user_config, split_user_config
from tests.support.readme import text_of
from tests.support.serve_config import validated


def test_user_config_may_change_only_settings_of_its_deployment():
    arguments = Arguments(model="m", max_images=7)
    changed = apply_user_config(arguments, {"max_steps": 3}, API_SETTINGS)
    assert (changed.max_images, changed.max_steps) == (7, 3)
    with pytest.raises(ValueError, match="but got model, num_gpus;"):
        apply_user_config(arguments, {"num_gpus": 1, "model": "x"}, API_SETTINGS)
    with pytest.raises(ValidationError, match="rate_limit"):
        apply_user_config(arguments, {"rate_limit": "often"}, API_SETTINGS)


def test_batch_sizes_are_parsed_from_the_command_line_and_cover_max_batch_size():
    assert Arguments(model="m", batch_sizes="1,4,16").batch_sizes == [1, 4, 16]
    assert Arguments(model="m", compile=True, max_batch_size=12).batch_sizes == [1, 2, 4, 8, 12]
    assert Arguments(model="m").batch_sizes == []
    with pytest.raises(ValidationError, match=r"a size of at least max_batch_size = 16, but got \[1, 4\]"):
        Arguments(model="m", batch_sizes="1,4")


def test_topology_one_refuses_a_number_of_api_replicas():
    with pytest.raises(ValidationError, match="num_api_replicas 2 requires topology two"):
        Arguments(model="m", num_api_replicas=2)
    assert Arguments(model="m", topology="two", num_api_replicas=2).num_api_replicas == 2
    assert split_user_config({"model": "m", "max_steps": 3, "unknown": 1}) == (
        {"model": "m"},
        {"max_steps": 3, "unknown": 1},
    )


def test_deploy_serve_passes_on_what_was_given():
    words = [
        "folder",
        "--port",
        "8080",
        "--batch-sizes",
        "1",
        "4",
        "16",
        "--cors-origins",
        "https://a.org,http://b.org",
        "--api-keys",
        "alice",
    ]
    job = parse_arguments([*words, "0" * 64])
    config = serve_config(job)
    assert config["http_options"] == {"host": "127.0.0.1", "port": 8080, "keep_alive_timeout_s": 90}
    assert config["applications"][0]["args"] == {
        "model": "folder", "batch_sizes": [1, 4, 16], "cors_origins": ["https://a.org", "http://b.org"],
        "api_keys": {"alice": "0" * 64},
    }  # fmt: skip


def test_folders_of_a_served_model_are_absolute_and_other_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "generator").mkdir()
    for name, served in (
        ("generator", str(tmp_path / "generator")),
        ("models:/demo@champion", "models:/demo@champion"),
    ):
        words = [name, "--tracking-uri", "sqlite:///runs/mlflow.db"]
        [application] = serve_config(parse_arguments(words))["applications"]
        assert application["args"]["model"] == served
        assert application["args"]["tracking_uri"] == f"sqlite:///{tmp_path}/runs/mlflow.db"


@pytest.mark.parametrize("topology", ["one", "two"])
def test_config_names_the_deployments_and_keeps_mlflows_address(topology, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    words = ["models:/a@champion", "--topology", topology]
    _, settings = validated(yaml.safe_dump(serve_config(parse_arguments(words))))
    assert set(settings) == set(DEPLOYMENTS[topology])
    assert all(hasattr(deploy.app, name) for name in settings)
    assert {own.tracking_uri for own in settings.values()} == {"http://mlflow:5000"}
    [application] = serve_config(parse_arguments(["folder"]))["applications"]
    assert "tracking_uri" not in application["args"]


def test_the_image_sets_variables_of_the_fast_path(tmp_path):
    [line] = re.findall(r"^ENV (RAY_SERVE_.*\\\n.*)$", text_of("deploy/Dockerfile"), re.MULTILINE)
    image = dict(word.split("=", 1) for word in shlex.split(line.replace("\\\n", " ")))
    own = fast_path(tmp_path, {})
    assert len(image) == 6
    assert image == {name: own[name] for name in image}
    assert own["RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE"] == "1"


def test_the_fast_path_keeps_variables_that_are_set(tmp_path):
    variables = fast_path(tmp_path, {"RAY_SERVE_ENABLE_HA_PROXY": "0", "OTHER": "1"})
    assert variables["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    assert "OTHER" not in variables
    ports = {variables[f"RAY_SERVE_HAPROXY_{name}_PORT"] for name in ("STATS", "METRICS")}
    assert len(ports) == 2
    assert variables["RAY_SERVE_HAPROXY_SOCKET_PATH"].startswith(str(tmp_path))
