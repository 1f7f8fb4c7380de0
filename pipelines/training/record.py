"""The record of a run (training.json): its experiment, MLflow run and published generator.

A run can only be resumed with the recorded experiment.
"""

import json
import logging
from dataclasses import asdict, dataclass
from typing import Any

from pyarrow import fs

from meanflow_core.config import RunConfig, flatten
from pipelines import storage
from pipelines.cluster import Device
from pipelines.errors import InputError
from pipelines.tracking.provenance import code_identity
from pipelines.tracking.run import Run
from pipelines.training.job import RunJob

logger = logging.getLogger(__name__)

TRAINING_RECORD = "training.json"
# Settings that may change on resume: the run's length, its intervals, and how the same computation is executed.
RESUMABLE_SETTINGS = (
    "num_steps",
    "log_interval_steps",
    "checkpoint_interval_steps",
    "sample_interval_steps",
    "measure_interval_steps",
    "activation_checkpointing",
    "decoder_checkpointing",
    "compile",
)


@dataclass(frozen=True, kw_only=True)
class Published:
    """The published generator of a run."""

    step: int
    """Training steps completed at its checkpoint."""
    generator: str
    """Location of its folder."""
    model: str
    """Its MLflow model URI."""


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """The content of training.json."""

    identity: dict[str, Any]
    """Settings and hashes that must not change on resume, as nested JSON values."""
    preset: str
    """Name of the preset."""
    num_steps: int
    """`num_steps` when the run was started."""
    init_sha256: str | None
    """Hash of the initial network's weights; None for random initialization."""
    device: Device
    """Device of the workers, which a resumed run keeps."""
    mlflow_run_id: str
    """ID of its MLflow run."""
    tracking_uri: str
    """MLflow tracking URI."""
    code: dict[str, str]
    """Commit and package versions when the run was started."""
    published: Published | None = None
    """The published generator; None while training has not finished."""


def build_record(
    job: RunJob, preset: str, num_steps: int, identity: dict[str, Any], run: Run, init_sha256: str | None
) -> TrainingRecord:
    """The record of a new run. The arguments are its fields."""
    return TrainingRecord(
        identity=identity,
        preset=preset,
        num_steps=num_steps,
        init_sha256=init_sha256,
        device=job.device,
        mlflow_run_id=run.run_id,
        tracking_uri=run.tracking_uri,
        code=code_identity(),
    )


def read_record(job: RunJob) -> TrainingRecord | None:
    """Reads a run's training.json; None for a new run. Raises InputError for a damaged file, or a folder without one."""
    filesystem, folder = storage.open_storage(job.run_location)
    path = f"{folder}/{TRAINING_RECORD}"
    if filesystem.get_file_info(path).type == fs.FileType.File:
        try:
            content = json.loads(storage.read_bytes(filesystem, path))
            published = content.pop("published")
            return TrainingRecord(**content, published=None if published is None else Published(**published))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{job.run_location}/{TRAINING_RECORD} is damaged or from another release ({error}); choose another "
                f"--run-name"
            ) from error
    if filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True)):
        raise InputError(
            f"{job.run_location} is not a training run (it has no {TRAINING_RECORD}); choose another --run-name "
            f"or --storage"
        )
    return None


def write_record(job: RunJob, record: TrainingRecord) -> None:
    """Writes a run's training.json, atomically."""
    filesystem, folder = storage.open_storage(job.run_location)
    content = json.dumps(asdict(record), indent=2) + "\n"
    storage.write_bytes(filesystem, f"{folder}/{TRAINING_RECORD}", content.encode())


def require_run_name(name: str) -> None:
    """Raises InputError for a run name that is no valid folder name."""
    if not name.strip() or "/" in name or name.startswith("."):
        raise InputError(f"--run-name must not be empty, contain a slash or start with a dot, but got {name!r}")


def config_identity(config: RunConfig) -> dict[str, Any]:
    """The settings of a configuration that must not change on resume."""
    return {name: value for name, value in config.as_dict().items() if name not in RESUMABLE_SETTINGS}


def require_same_experiment(job: RunJob, config: RunConfig, identity: dict[str, Any], record: TrainingRecord) -> None:
    """Raises InputError if `identity` is not the recorded one.

    Logs a warning if the code has changed, or if a new num_steps moves the learning rate's cool-down.
    """
    before, now = flatten(record.identity), flatten(identity)
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if changed:
        changes = "; ".join(f"{key} was {before.get(key)}, is now {now.get(key)}" for key in changed)
        raise InputError(
            f"run {job.run_name} in {job.storage} was started with other settings or data ({changes}); undo these changes "
            f"to resume it, or choose another --run-name"
        )
    changed_code = [
        f"{name} was {record.code.get(name)}, is now {value}"
        for name, value in code_identity().items()
        if record.code.get(name) != value
    ]
    if changed_code:
        logger.warning(
            "the code has changed since the run was started, so results may differ: %s", "; ".join(changed_code)
        )
    if config.optimizer.cooldown_steps and record.num_steps != config.num_steps:
        logger.warning(
            "num_steps was %d, is now %d: the learning rate's cool-down moves to the new end of the run",
            record.num_steps,
            config.num_steps,
        )


def resume_run(record: TrainingRecord) -> Run:
    """Marks a record's MLflow run as running again. Raises InputError if MLflow has no such run."""
    run = Run(record.tracking_uri, record.mlflow_run_id)
    run.resume()
    return run
