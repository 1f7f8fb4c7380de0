import pytest
from pydantic import ValidationError

from deploy.serve import fast_path, parse_arguments, serve_config
from deploy.settings import API_SETTINGS, Arguments, apply_user_config, split_user_config


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


def test_the_fast_path_keeps_variables_that_are_set(tmp_path):
    variables = fast_path(tmp_path, {"RAY_SERVE_ENABLE_HA_PROXY": "0", "OTHER": "1"})
    assert variables["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    assert "OTHER" not in variables
    ports = {variables[f"RAY_SERVE_HAPROXY_{name}_PORT"] for name in ("STATS", "METRICS")}
    assert len(ports) == 2
    assert variables["RAY_SERVE_HAPROXY_SOCKET_PATH"].startswith(str(tmp_path))
