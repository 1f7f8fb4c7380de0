"""The interfaces of Ray and MLflow that are not public: each still exists, and no other module uses one."""

import ast
import importlib
import inspect
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from mlflow import MlflowClient
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

import deploy.app
import deploy.private_interfaces
from pipelines import private_interfaces

ROOT = Path(__file__).parents[1]
MODULES = ("pipelines/private_interfaces.py", "deploy/private_interfaces.py")
PRIVATE = re.compile(
    r"_internal\b|_private\b|_raylet|\b(ray|mlflow)[\w.]* import _|_base_exc|serve\.context|core\.generated|RAY_JOB_CONFIG"
)


def is_parameter(function, *names):
    return set(names) <= set(inspect.signature(function).parameters)


def submitted_job():
    from ray._private.runtime_env import constants

    return constants.RAY_JOB_CONFIG_JSON_ENV_VAR == private_interfaces.SUBMITTED_JOB


def cleaner_logger():
    module = importlib.import_module(private_interfaces.CLEANER_LOGGER)
    is_found = module.logger.name == private_interfaces.CLEANER_LOGGER and hasattr(module, "PlacementGroupCleaner")
    return is_found and f'name="{private_interfaces.CLEANER_THREAD}"' in inspect.getsource(module)


def token_logger():
    module = importlib.import_module(private_interfaces.TOKEN_LOGGER)
    return module.logger.name == private_interfaces.TOKEN_LOGGER


def ray_data_console():

    names = [type(handler).__name__ for handler in logging.getLogger("ray.data").handlers]
    return private_interfaces.RAY_DATA_CONSOLE in names


def ray_train_context_logger():
    module = importlib.import_module("ray.train.v2._internal.execution.context")
    loggers = [value for value in vars(module).values() if isinstance(value, logging.Logger)]
    return private_interfaces.ray_train_context_logger() in [found.name for found in loggers]


def checkpoint_name():
    from ray.train.v2._internal.util import date_str

    return private_interfaces.CHECKPOINT_NAME.fullmatch(f"checkpoint_{date_str(include_ms=True)}") is not None


def checkpoint_record():
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState

    content = private_interfaces.checkpoint_record(ray.__version__, {"checkpoint_a": 1, "checkpoint_b": 2})
    state = _CheckpointManagerState(**content)
    is_whole = set(content) == set(_CheckpointManagerState.model_fields)
    names = [result.checkpoint_dir_name for result in state.checkpoint_results]
    is_same = names == ["checkpoint_a", "checkpoint_b"] and state.latest_checkpoint_result.metrics == {"step": 2}
    return is_whole and is_same and CHECKPOINT_MANAGER_SNAPSHOT_FILENAME == private_interfaces.CHECKPOINT_RECORD


def original_error():
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    cause = ValueError("cause")
    return private_interfaces.original_error(UserExceptionWithTraceback(cause, "traceback")) is cause


def system_metrics_monitor():
    source = inspect.getsource(SystemMetricsMonitor)
    names = ("_shutdown_event", "monitors", "sampling_interval", "samples_before_logging")
    methods = ("monitor", "collect_metrics", "aggregate_metrics", "publish_metrics")
    has_methods = all(hasattr(SystemMetricsMonitor, name) for name in methods)
    return has_methods and all(f"self.{name}" in source for name in names)


def log_model_artifacts():
    return is_parameter(MlflowClient.log_model_artifacts, "model_id", "local_dir")


def http_host():
    from ray.serve._private.client import ServeControllerClient
    from ray.serve.config import HTTPOptions
    from ray.serve.context import _get_global_client

    with pytest.MonkeyPatch.context() as patch:
        running = SimpleNamespace(http_config=HTTPOptions(host="10.0.0.1"))
        patch.setattr("ray.serve.context._get_global_client", lambda raise_if_no_controller_running: running)
        is_found = deploy.private_interfaces.http_host() == "10.0.0.1"
    return (
        is_found
        and is_parameter(_get_global_client, "raise_if_no_controller_running")
        and isinstance(ServeControllerClient.http_config, property)
    )


def deploy_config():
    from ray.serve._private.client import ServeControllerClient
    from ray.serve.schema import ServeDeploySchema

    return is_parameter(ServeControllerClient.deploy_apps, "config", "_blocking") and callable(
        ServeDeploySchema.model_validate
    )


def gcs_client():
    from ray._raylet import GcsClient, InnerGcsClient

    return callable(GcsClient) and all(hasattr(InnerGcsClient, name) for name in ("get_all_node_info", "drain_node"))


def preemption_reason():
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    return DrainNodeReason.Name(deploy.private_interfaces.preemption_reason()) == "DRAIN_NODE_REASON_PREEMPTION"


def serve_build_asgi_app():
    from ray.serve._private.replica import SERVE_BUILD_ASGI_APP_METHOD

    return hasattr(deploy.app.Api.func_or_class, SERVE_BUILD_ASGI_APP_METHOD)


@pytest.mark.parametrize(
    "check",
    [
        submitted_job,
        cleaner_logger,
        token_logger,
        ray_data_console,
        ray_train_context_logger,
        checkpoint_name,
        checkpoint_record,
        original_error,
        system_metrics_monitor,
        log_model_artifacts,
        http_host,
        deploy_config,
        gcs_client,
        preemption_reason,
        serve_build_asgi_app,
    ],
    ids=lambda check: check.__name__,
)
def test_private_interface_is_unchanged(check):
    assert check(), f"this version of Ray or MLflow has changed {check.__name__}; mend private_interfaces.py"


def private_uses(path):
    """Lines that name a private interface, and imports of one that may span several lines."""
    text = path.read_text()
    yield from (line.strip() for line in text.splitlines() if PRIVATE.search(line))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for name in (f"{module}{alias.name}" for alias in node.names):
                if name.split(".")[0] in ("ray", "mlflow") and "._" in name:
                    yield f"import of {name}"


def test_no_other_module_uses_a_private_interface():
    uses = [
        f"{path.relative_to(ROOT)}: {use}"
        for package in ("meanflow_core", "pipelines", "deploy")
        for path in Path(ROOT / package).rglob("*.py")
        if str(path.relative_to(ROOT)) not in MODULES
        for use in private_uses(path)
    ]
    assert uses == []
