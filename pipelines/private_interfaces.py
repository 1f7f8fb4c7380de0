"""All interfaces of Ray and MLflow that these pipelines use although they are not public.

An upgrade may change any of them without notice. tests/test_private_interfaces.py checks each one and names those that are
broken. Imports nothing of Ray or MLflow, so that `--help` is quick.
"""

import importlib.util
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the driver of a submitted job
# Warns in every command that a local cluster asks for a token, which the user can ignore.
TOKEN_LOGGER = "ray._private.authentication.authentication_token_setup"
CLEANER_THREAD = "PlacementGroupCleanerMonitor"
CLEANER_LOGGER = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
CHECKPOINT_NAME = re.compile(
    r"checkpoint_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d\.\d+"
)  # Ray Train's name for a checkpoint folder
CHECKPOINT_RECORD = "checkpoint_manager_snapshot.json"  # Ray Train's record of the committed checkpoints
RAY_DATA_CONSOLE = "PlainRayHandler"  # class of the handler with which Ray Data logs to the terminal
CONTEXT_MODULE = "train/v2/_internal/execution/context.py"

# Used where they are subclassed or called:
#   mlflow.system_metrics.system_metrics_monitor.SystemMetricsMonitor    tracking/system_metrics.py
#   MlflowClient.log_model_artifacts                                     tracking/registry.py


def ray_train_context_logger() -> str:
    """Name of the logger of Ray Train's module for checkpoints: the path of its file."""
    ray = importlib.util.find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    return str(Path(ray.origin).parent / CONTEXT_MODULE)


def original_error(worker_failure: BaseException) -> BaseException:
    """The error that a worker raised, out of one of `TrainingFailedError.worker_failures`."""
    found: BaseException = getattr(worker_failure, "_base_exc", worker_failure)
    return found


def checkpoint_record(ray_version: str, steps: Mapping[str, int]) -> dict[str, Any]:
    """The content of CHECKPOINT_RECORD. steps: step of each committed checkpoint by its folder's name, oldest first."""
    results = [{"checkpoint_dir_name": name, "metrics": {"step": step}} for name, step in steps.items()]
    empty: dict[str, Sequence[str]] = {
        "pending_training_results": [],
        "pending_validation_specs": [],
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
    return {
        "ray_version": ray_version,
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(results))),
        "latest_checkpoint_result": results[-1],
        "current_report_index": len(results),
        **empty,
    }


def quiet_ray_data() -> None:
    """Keeps Ray Data's plans and its advice for developers out of the terminal; its log file has them. Warnings remain."""
    for handler in logging.getLogger("ray.data").handlers:
        if type(handler).__name__ == RAY_DATA_CONSOLE:
            handler.setLevel(logging.WARNING)
            handler.addFilter(_is_not_about_progress_bars)
    warnings.filterwarnings("ignore", message="The minimum number of concurrent actors")


def _is_not_about_progress_bars(record: logging.LogRecord) -> bool:
    return "Progress bars disabled" not in record.getMessage()
