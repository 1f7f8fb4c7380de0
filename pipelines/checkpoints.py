"""Checkpoints in a run's storage, through Ray Train: written, uploaded beside the steps, found by Ray's record.

A checkpoint is committed when all workers have uploaded their files and Ray has written its record; what a crash
leaves before that is an orphan, which nothing ever takes for a checkpoint, and which the next start deletes.
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
import ray.train
from pyarrow import fs
from ray.train import Checkpoint, CheckpointUploadMode, Result, UserCallback

from meanflow_core.checkpoint import load_train_state, save_train_state
from meanflow_core.config import TrainingConfig
from meanflow_core.training import TrainState
from pipelines import storage
from pipelines.command import InputError

logger = logging.getLogger(__name__)

PREFIX = "checkpoint_"  # of the folders that Ray makes in a run's
RECORD = "checkpoint_manager_snapshot.json"  # Ray's, which it writes in place
SPARE_RECORD = "checkpoint_manager_snapshot.spare.json"
SCRATCH = "meanflow-ray-checkpoint-"


def report(
    state: TrainState,
    config: TrainingConfig,
    metrics: dict[str, float],
    extra: dict[str, Any],
    *,
    wait: bool,
    validate: bool = False,
) -> None:
    """Saves a checkpoint and has it uploaded; every worker must call this.

    The upload goes on beside the next steps unless `wait`; a next one waits for it. `extra` as in `save_train_state`.
    Raises OSError where a file cannot be written; an upload that fails ends the worker.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"{SCRATCH}{os.getpid()}-"))
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
    """Restores the run's last committed checkpoint, and returns its `extra`; None where there is none yet."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return load_train_state(state, Path(folder))


def delete_scratch() -> None:
    """Deletes what killed workers of this machine left on its disk."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        owner = folder.name.removeprefix(SCRATCH).split("-")[0]
        if folder.is_dir() and owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


class SpareRecord(UserCallback):
    """Keeps a copy of Ray's record, written whole or not at all, after every checkpoint.

    Ray writes its record in place: a machine that dies at that moment leaves half of one, and Ray would not go on.
    """

    def __init__(self, run_location: str) -> None:
        self._run_location = run_location

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Ray calls it in its controller, when its own record is written."""
        if checkpoint is not None:
            filesystem, path = storage.open_storage(self._run_location)
            storage.write_bytes(
                filesystem, f"{path}/{SPARE_RECORD}", storage.read_bytes(filesystem, f"{path}/{RECORD}")
            )


def mend_record(filesystem: fs.FileSystem, run_path: str) -> None:
    """Puts the spare record in the place of a torn one. Raises InputError where there is no spare."""
    if filesystem.get_file_info(f"{run_path}/{RECORD}").type != fs.FileType.File:
        return
    try:
        json.loads(storage.read_bytes(filesystem, f"{run_path}/{RECORD}"))
    except ValueError as error:
        if filesystem.get_file_info(f"{run_path}/{SPARE_RECORD}").type != fs.FileType.File:
            raise InputError(
                f"{run_path}/{RECORD} is torn, and no checkpoint was ever committed; remove it, or choose another "
                f"--run-name"
            ) from error
        logger.warning("Ray's record of the checkpoints is torn; going on with that of the checkpoint before")
        spare = json.loads(storage.read_bytes(filesystem, f"{run_path}/{SPARE_RECORD}"))
        # A validation that ended since may have had an old checkpoint deleted, and Ray refuses a record of such.
        kept = [
            (result, index)
            for result, index in zip(spare["checkpoint_results"], spare["checkpoint_report_indices"], strict=True)
            if filesystem.get_file_info(f"{run_path}/{result['checkpoint_dir_name']}").type == fs.FileType.Directory
        ]
        spare["checkpoint_results"] = [result for result, _ in kept]
        spare["checkpoint_report_indices"] = [index for _, index in kept]
        storage.write_bytes(filesystem, f"{run_path}/{RECORD}", json.dumps(spare).encode())


@dataclass(frozen=True)
class Committed:
    """A run's committed checkpoints, by Ray's record."""

    latest: Checkpoint
    """The one that a resume begins with."""
    step: int
    """Its step."""
    names: frozenset[str]
    """Folder names of all that are kept."""


def committed(filesystem: fs.FileSystem, run_path: str) -> Committed | None:
    """What Ray's record of a run says; None where it has none yet."""
    try:
        result = Result.from_path(run_path, storage_filesystem=filesystem)
    except RuntimeError:  # no such run, or no record in it
        return None
    if result.checkpoint is None:
        return None
    kept = [result.checkpoint, *(checkpoint for checkpoint, _ in result.best_checkpoints or [])]
    return Committed(
        latest=result.checkpoint,
        step=int((result.metrics or {})["step"]),
        names=frozenset(Path(checkpoint.path).name for checkpoint in kept),
    )


def delete_orphans(filesystem: fs.FileSystem, run_path: str) -> list[str]:
    """Deletes checkpoint folders that Ray's record does not know, and returns their names. Nobody may train the run."""
    known = committed(filesystem, run_path)
    kept = known.names if known is not None else frozenset()
    listing = filesystem.get_file_info(fs.FileSelector(run_path, allow_not_found=True))
    orphans = [
        info.base_name
        for info in listing
        if info.type == fs.FileType.Directory and info.base_name.startswith(PREFIX) and info.base_name not in kept
    ]
    for name in orphans:
        filesystem.delete_dir(f"{run_path}/{name}")
        logger.info("deleted %s, which a crash left unfinished", name)
    return orphans
