"""Checkpoints of a run: when one is saved, how Ray Train stores it, and which one a resumed run loads.

Once every worker has uploaded its files, Ray Train commits the checkpoint by adding its folder to a record. A crash
before the commit leaves an orphan folder, which the next start deletes.
"""

import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.train
from pyarrow import fs
from ray.train import Checkpoint, CheckpointUploadMode, Result

from meanflow_core.checkpoint import (
    STATE_FILE,
    describe_damage,
    load_train_state,
    require_known_format,
    save_train_state,
)
from meanflow_core.config import RunConfig
from meanflow_core.training import TrainState
from pipelines import storage
from pipelines.errors import InputError
from pipelines.private_interfaces import CHECKPOINT_NAME, CHECKPOINT_RECORD, checkpoint_record

logger = logging.getLogger(__name__)

LOCAL_PREFIX = "meanflow-ray-checkpoint-"


@dataclass(frozen=True, kw_only=True)
class CheckpointDue:
    """How to save the checkpoint that is due after a step."""

    wait: bool
    """Wait for the upload. Otherwise it runs in the background during the next steps."""
    validate: bool
    """Measure the errors on held-out data."""


def checkpoint_due(
    step: int, *, num_steps: int, interval_steps: int, stop_requested: bool, preemption_announced: bool
) -> CheckpointDue | None:
    """Returns how to save a checkpoint after step `step` (1-based); None if no checkpoint is due.

    A checkpoint is due every `interval_steps` steps, after the last step, on a stop request and on a preemption notice.
    After a stop request it is not validated, so that the run stops sooner.
    """
    is_urgent = stop_requested or preemption_announced or step == num_steps
    if not is_urgent and step % interval_steps != 0:
        return None
    return CheckpointDue(wait=is_urgent, validate=not stop_requested)


def save(
    state: TrainState,
    config: RunConfig,
    metrics: dict[str, float],
    extra: dict[str, Any],
    *,
    wait: bool,
    validate: bool = False,
) -> None:
    """Writes a checkpoint to local disk and passes it to Ray Train for upload. Every worker must call this.

    Without `wait`, the upload runs in the background; the next save waits for it. extra: as in `save_train_state`.
    Raises OSError if a file cannot be written. A failed upload ends the worker.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"{LOCAL_PREFIX}{os.getpid()}-"))
    try:
        save_train_state(state, config, folder, extra)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    ray.train.report(
        {"step": state.step, **metrics},
        checkpoint=Checkpoint.from_directory(str(folder)),
        checkpoint_upload_mode=CheckpointUploadMode.SYNC if wait else CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
        validation=validate,
    )


def restore(state: TrainState) -> dict[str, Any] | None:
    """Loads the run's last committed checkpoint and returns its `extra`; None if there is no checkpoint yet."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return load_train_state(state, Path(folder))


def delete_local_leftovers() -> None:
    """Deletes checkpoint files that killed workers left on this machine's disk."""
    for folder in Path(tempfile.gettempdir()).glob(f"{LOCAL_PREFIX}*"):
        process_id = folder.name.removeprefix(LOCAL_PREFIX).split("-")[0]
        if folder.is_dir() and process_id.isdigit() and not psutil.pid_exists(int(process_id)):
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Committed:
    """A run's committed checkpoints, from Ray's record."""

    latest: Checkpoint
    """The checkpoint that a resumed run loads."""
    step: int
    """Training steps completed at `latest`."""
    names: frozenset[str]
    """Folder names of all checkpoints in the record."""


def committed(filesystem: fs.FileSystem, run_path: str) -> Committed | None:
    """Reads Ray's record of a run; None if no checkpoint is committed yet. Raises InputError for an unreadable record."""
    if filesystem.get_file_info(f"{run_path}/{CHECKPOINT_RECORD}").type != fs.FileType.File:
        return None
    try:
        result = Result.from_path(run_path, storage_filesystem=filesystem)
    except Exception as error:  # Ray's private error types, for example for a record of another Ray version
        raise InputError(f"Ray cannot read {run_path}/{CHECKPOINT_RECORD}: {error}") from error
    if result.checkpoint is None:
        return None
    kept = [result.checkpoint, *(checkpoint for checkpoint, _ in result.best_checkpoints or [])]
    return Committed(
        latest=result.checkpoint,
        step=int((result.metrics or {})["step"]),
        names=frozenset(Path(checkpoint.path).name for checkpoint in kept),
    )


def repair_record(filesystem: fs.FileSystem, run_path: str) -> None:
    """Rebuilds Ray's record from the complete checkpoints if the record or a listed checkpoint is missing or damaged.

    Ray writes its record in place, so a power failure may truncate it or leave a listed checkpoint missing. Ray refuses
    to start in either case. Only call this while no job trains the run. Raises InputError if no checkpoint is complete, or
    if a checkpoint has another format version.
    """
    has_record = filesystem.get_file_info(f"{run_path}/{CHECKPOINT_RECORD}").type == fs.FileType.File
    recorded = _recorded_names(filesystem, f"{run_path}/{CHECKPOINT_RECORD}") if has_record else None
    steps, damage = {}, {}  # by folder name
    for name in _checkpoint_folders(filesystem, run_path) | (recorded or set()):
        step_or_damage = _step_or_damage(filesystem, f"{run_path}/{name}")
        if isinstance(step_or_damage, int):
            steps[name] = step_or_damage
        else:
            damage[name] = step_or_damage
    if recorded is not None and recorded <= steps.keys():
        return
    if not steps:
        if not has_record:
            return  # no checkpoint was ever committed
        raise InputError(
            f"{run_path} has a record of checkpoints ({CHECKPOINT_RECORD}), but no complete checkpoint; delete this file to "
            f"train from the beginning, or choose another --run-name"
        )
    logger.warning("rebuilt Ray's record of checkpoints from the %d complete checkpoints", len(steps))
    for name in sorted(damage):
        logger.warning("ignored the damaged checkpoint %s: %s", name, damage[name])
    in_order = {name: steps[name] for name in sorted(steps, key=lambda name: (steps[name], name))}
    record = checkpoint_record(ray.__version__, in_order)
    storage.write_bytes(filesystem, f"{run_path}/{CHECKPOINT_RECORD}", json.dumps(record).encode())


def delete_orphans(filesystem: fs.FileSystem, run_path: str) -> list[str]:
    """Deletes checkpoint folders that are not in Ray's record, and returns their names.

    Only call this while no job trains the run. If an orphan has another format version, raises InputError and deletes
    nothing.
    """
    known = committed(filesystem, run_path)
    orphans = sorted(_checkpoint_folders(filesystem, run_path) - (known.names if known is not None else frozenset()))
    for name in orphans:
        _step_or_damage(filesystem, f"{run_path}/{name}")  # raises InputError for another format version
    for name in orphans:
        filesystem.delete_dir(f"{run_path}/{name}")
        logger.info("deleted %s, a checkpoint that was not committed before a crash", name)
    return orphans


def _checkpoint_folders(filesystem: fs.FileSystem, run_path: str) -> set[str]:
    listing = filesystem.get_file_info(fs.FileSelector(run_path, allow_not_found=True))
    return {
        info.base_name
        for info in listing
        if info.type == fs.FileType.Directory and CHECKPOINT_NAME.fullmatch(info.base_name) is not None
    }


def _recorded_names(filesystem: fs.FileSystem, path: str) -> set[str] | None:
    """Names of the checkpoints in Ray's record; None if it is damaged."""
    try:
        return {
            result["checkpoint_dir_name"]
            for result in json.loads(storage.read_bytes(filesystem, path))["checkpoint_results"]
        }
    except (ValueError, KeyError, TypeError):
        return None


def _step_or_damage(filesystem: fs.FileSystem, path: str) -> int | str:
    """Returns the step of a complete checkpoint, or a description of the damage. Checks file sizes, not contents.

    Raises InputError for another format version. Otherwise such a checkpoint would count as damaged and be deleted.
    """
    state_file = f"{path}/{STATE_FILE}"
    if filesystem.get_file_info(state_file).type != fs.FileType.File:
        return f"{state_file} is missing"
    try:
        content = json.loads(storage.read_bytes(filesystem, state_file))
    except ValueError:
        return f"{state_file} is damaged"
    try:
        require_known_format(content, path)
    except ValueError as error:
        raise InputError(str(error)) from error
    if not isinstance(content, dict) or not {"files", "step"} <= content.keys():
        return f"{state_file} is damaged"
    listing = filesystem.get_file_info(fs.FileSelector(path))
    damage = describe_damage(content["files"], {info.base_name: info.size for info in listing})
    return int(content["step"]) if damage is None else damage
