"""The record of a training (training.json in its output): configuration, MLflow run, result.

A training can only be resumed with the recorded configuration. The result is written last and completes the output.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from pyarrow import fs

from pipelines import storage
from pipelines.autoencoder.job import AutoencoderJob
from pipelines.errors import InputError

RECORD = "training.json"
# Options that may change on resume: where and how the same training runs, and what it reports.
RESUMABLE_OPTIONS = (
    "output", "num_workers", "device", "cpu_threads", "log_interval_steps", "checkpoint_interval_steps", "max_failures",
    "experiment",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Result:
    """Measurements of a finished autoencoder."""

    psnr: float
    """Of held-out images as uint8, in dB."""
    num_held_out: int
    """Number of measured images."""
    num_parameters: int
    """Of encoder and decoder together."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """The content of training.json."""

    config: dict[str, Any]
    """Options that must not change on resume."""
    tracking_uri: str
    """MLflow tracking URI."""
    mlflow_run_id: str
    """ID of the MLflow run."""
    code: dict[str, str]
    """Commit and package versions when the training was started."""
    result: Result | None = None
    """None while training has not finished."""


def configuration(job: AutoencoderJob) -> dict[str, Any]:
    """The options that must not change on resume."""
    return {name: value for name, value in asdict(job).items() if name not in RESUMABLE_OPTIONS}


def read_record(job: AutoencoderJob) -> Record | None:
    """Reads the record of an output; None if the output does not exist or is empty.

    Raises InputError for a folder of something else, a damaged record, and a training with another configuration.
    """
    filesystem, folder = storage.open_storage(job.output)
    path = f"{folder}/{RECORD}"
    if filesystem.get_file_info(path).type != fs.FileType.File:
        if filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True)):
            raise InputError(f"{job.output} is not empty and has no {RECORD}; choose another --output")
        return None
    try:
        content = json.loads(storage.read_bytes(filesystem, path))
        result = content.pop("result")
        record = Record(**content, result=None if result is None else Result(**result))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{job.output}/{RECORD} is damaged ({error}); choose another --output") from error
    now = configuration(job)
    changed = [key for key in sorted({*record.config, *now}) if record.config.get(key) != now.get(key)]
    if changed:
        changes = "; ".join(f"{key} was {record.config.get(key)}, is now {now.get(key)}" for key in changed)
        raise InputError(
            f"{job.output} was started with another configuration ({changes}); undo these changes to resume it, or "
            f"choose another --output"
        )
    return record


def write_record(job: AutoencoderJob, record: Record) -> None:
    """Writes training.json, atomically."""
    filesystem, folder = storage.open_storage(job.output)
    storage.write_bytes(filesystem, f"{folder}/{RECORD}", (json.dumps(asdict(record), indent=2) + "\n").encode())
