import json
import os
import tempfile
from pathlib import Path

import pytest
import ray
from pyarrow import fs
from ray.train import Checkpoint

from pipelines import checkpoints
from pipelines.command import InputError

LOCAL = fs.LocalFileSystem()


def write_record(run, names):
    """A record as Ray writes it, of these checkpoints, and their folders."""
    results = [
        {"version": 0, "checkpoint_dir_name": name, "metrics": {"step": 10 * (index + 1)}}
        for index, name in enumerate(names)
    ]
    content = {
        "ray_version": ray.__version__,
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(names))),
        "latest_checkpoint_result": results[-1],
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(names),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
    for name in names:
        (run / name).mkdir(parents=True, exist_ok=True)
    (run / checkpoints.RECORD).write_text(json.dumps(content))


def test_last_checkpoint_is_the_records_and_not_the_youngest_folder(tmp_path):
    run = tmp_path / "run"
    assert checkpoints.committed(LOCAL, str(run)) is None
    run.mkdir()
    assert checkpoints.committed(LOCAL, str(run)) is None
    write_record(run, ["checkpoint_a", "checkpoint_b"])
    (run / "checkpoint_z").mkdir()
    found = checkpoints.committed(LOCAL, str(run))
    assert Path(found.latest.path).name == "checkpoint_b"
    assert found.step == 20
    assert found.names == {"checkpoint_a", "checkpoint_b"}


def test_orphans_of_a_crash_are_deleted_and_nothing_else(tmp_path):
    run = tmp_path / "run"
    assert checkpoints.delete_orphans(LOCAL, str(run)) == []
    write_record(run, ["checkpoint_a", "checkpoint_b"])
    for name in ("checkpoint_z", "generator"):
        (run / name).mkdir()
        (run / name / "file").write_text("x")
    assert checkpoints.delete_orphans(LOCAL, str(run)) == ["checkpoint_z"]
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoint_a", "checkpoint_b", checkpoints.RECORD, "generator",
    ]  # fmt: skip


def test_torn_record_is_replaced_by_that_of_the_checkpoint_before(tmp_path, caplog):
    run = tmp_path / "run"
    checkpoints.mend_record(LOCAL, str(run))  # nothing there yet
    write_record(run, ["checkpoint_0", "checkpoint_a"])
    spare = checkpoints.SpareRecord(str(run))
    spare.after_report(None, [], None)
    assert not (run / checkpoints.SPARE_RECORD).exists()
    spare.after_report(None, [], Checkpoint(str(run / "checkpoint_a")))
    checkpoints.mend_record(LOCAL, str(run))
    assert "torn" not in caplog.text
    (run / checkpoints.RECORD).write_text((run / checkpoints.RECORD).read_text()[:40])
    (run / "checkpoint_0").rmdir()
    checkpoints.mend_record(LOCAL, str(run))
    assert "torn" in caplog.text
    found = checkpoints.committed(LOCAL, str(run))
    assert Path(found.latest.path).name == "checkpoint_a"
    assert found.names == {"checkpoint_a"}


def test_torn_record_without_a_spare_is_refused(tmp_path):
    (tmp_path / checkpoints.RECORD).write_text("")
    with pytest.raises(InputError, match="is torn, and no checkpoint was ever committed; remove it"):
        checkpoints.mend_record(LOCAL, str(tmp_path))


def test_scratch_of_dead_workers_alone_is_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = tmp_path / f"{checkpoints.SCRATCH}{2**22 + 1}-abc"  # above any pid
    living = tmp_path / f"{checkpoints.SCRATCH}{os.getpid()}-abc"
    for folder in (dead, living, tmp_path / "other"):
        folder.mkdir()
    checkpoints.delete_scratch()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([living.name, "other"])
