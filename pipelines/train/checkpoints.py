"""Checkpoints in a run's storage, through Ray Train: written, uploaded beside the steps, found by Ray's record.

A checkpoint is committed when all workers have uploaded their files and Ray has written its record; what a crash
leaves before that is an orphan, which nothing ever takes for a checkpoint, and which the next start deletes.
"""

import json
import logging
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray.train
from pyarrow import fs
from ray.train import Checkpoint, CheckpointUploadMode, Result, UserCallback

from meanflow_core.checkpoint import STATE_FILE, damage_of, load_train_state, require_known_state, save_train_state
from meanflow_core.config import TrainingConfig
from meanflow_core.training import TrainState
from pipelines import storage
from pipelines.errors import InputError

logger = logging.getLogger(__name__)

NAME = re.compile(r"checkpoint_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d\.\d+")  # what Ray calls a checkpoint's folder
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
    """Makes Ray's record of a run one of whole checkpoints alone, for Ray does not start with any other.

    A torn or missing record is replaced by the spare one, and checkpoints that are missing or torn, which a machine
    that died may leave, are taken out of it. Nobody may train the run. Raises InputError where nothing whole is left, or
    a later release wrote a checkpoint.
    """
    record, is_mended = _read_record(filesystem, f"{run_path}/{RECORD}"), False
    spare = _read_record(filesystem, f"{run_path}/{SPARE_RECORD}")
    if record is None:
        is_mended = filesystem.get_file_info(f"{run_path}/{RECORD}").type == fs.FileType.File or spare is not None
        if not is_mended:
            return  # nothing was ever committed
        if spare is None:
            raise InputError(
                f"{run_path}/{RECORD} is torn, and there is no spare; choose another --run-name, or remove it to begin anew"
            )
        record = spare
        logger.warning("Ray's record of the checkpoints is torn or missing: going on with the spare one")
    entries = list(zip(record["checkpoint_results"], record["checkpoint_report_indices"], strict=True))
    kept = []
    for result, index in entries:
        damage = _damage(filesystem, f"{run_path}/{result['checkpoint_dir_name']}")
        if damage is None:
            kept.append((result, index))
        else:
            logger.warning("checkpoint of step %s: %s; going on without it", result["metrics"].get("step"), damage)
    if entries and not kept:
        raise InputError(
            f"none of the {len(entries)} checkpoints in {run_path} is whole; choose another --run-name to begin anew"
        )
    if is_mended or len(kept) < len(entries):
        names = {result["checkpoint_dir_name"] for result, _ in kept}
        record["checkpoint_results"] = [result for result, _ in kept]
        record["checkpoint_report_indices"] = [index for _, index in kept]
        record["latest_checkpoint_result"] = max(kept, key=lambda entry: entry[1])[0] if kept else None
        pending = zip(record["pending_training_results"], record["pending_validation_specs"], strict=True)
        still = [(result, spec) for result, spec in pending if result["checkpoint_dir_name"] in names]
        record["pending_training_results"] = [result for result, _ in still]
        record["pending_validation_specs"] = [spec for _, spec in still]
        storage.write_bytes(filesystem, f"{run_path}/{RECORD}", json.dumps(record).encode())
    storage.write_bytes(filesystem, f"{run_path}/{SPARE_RECORD}", json.dumps(record).encode())


def _read_record(filesystem: fs.FileSystem, path: str) -> dict[str, Any] | None:
    """A record, or None where there is none that can be read."""
    if filesystem.get_file_info(path).type != fs.FileType.File:
        return None
    try:
        content = json.loads(storage.read_bytes(filesystem, path))
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _damage(filesystem: fs.FileSystem, path: str) -> str | None:
    """What is wrong with a checkpoint's files, by their sizes; None where they are whole.

    Raises InputError for one that a later release wrote: it must not be taken for a torn one, and deleted.
    """
    state_file = f"{path}/{STATE_FILE}"
    if filesystem.get_file_info(state_file).type != fs.FileType.File:
        return f"{state_file} is missing"
    try:
        content = json.loads(storage.read_bytes(filesystem, state_file))
    except ValueError:
        return f"{state_file} is torn"
    try:
        require_known_state(content, path)
    except ValueError as error:
        raise InputError(str(error)) from error
    if not isinstance(content, dict) or "files" not in content:
        return f"{state_file} is torn"
    listing = filesystem.get_file_info(fs.FileSelector(path))
    return damage_of(content["files"], {info.base_name: info.size for info in listing})


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
    """What Ray's record of a run says; None where it has none yet. Raises InputError where Ray cannot read it."""
    if filesystem.get_file_info(f"{run_path}/{RECORD}").type != fs.FileType.File:
        return None
    try:
        result = Result.from_path(run_path, storage_filesystem=filesystem)
    except Exception as error:  # Ray's own kinds, of a record of another release for one
        raise InputError(f"Ray cannot read {run_path}/{RECORD}: {error}") from error
    if result.checkpoint is None:
        return None
    kept = [result.checkpoint, *(checkpoint for checkpoint, _ in result.best_checkpoints or [])]
    return Committed(
        latest=result.checkpoint,
        step=int((result.metrics or {})["step"]),
        names=frozenset(Path(checkpoint.path).name for checkpoint in kept),
    )


def delete_orphans(filesystem: fs.FileSystem, run_path: str) -> list[str]:
    """Deletes checkpoint folders that Ray's record does not know, and returns their names.

    Only folders that Ray named, in a run that this project began; nobody may train it. Raises InputError, and deletes
    nothing, where a later release wrote one.
    """
    known = committed(filesystem, run_path)
    kept = known.names if known is not None else frozenset()
    listing = filesystem.get_file_info(fs.FileSelector(run_path, allow_not_found=True))
    orphans = [
        info.base_name
        for info in listing
        if info.type == fs.FileType.Directory and NAME.fullmatch(info.base_name) and info.base_name not in kept
    ]
    for name in orphans:
        _damage(filesystem, f"{run_path}/{name}")  # refuses what a later release wrote
    for name in orphans:
        filesystem.delete_dir(f"{run_path}/{name}")
        logger.info("deleted %s, which a crash left unfinished", name)
    return orphans
