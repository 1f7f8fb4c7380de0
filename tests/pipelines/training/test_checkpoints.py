import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from pyarrow import fs

from meanflow_core.presets.demo import debug
from meanflow_core.training import build_train_state
from pipelines.errors import InputError
from pipelines.training import checkpoints
from pipelines.training.checkpoints import CheckpointDue, checkpoint_due
from tests.support.ray_records import checkpoint_name, write_checkpoint, write_checkpoints

LOCAL = fs.LocalFileSystem()


@pytest.mark.parametrize(
    ("step", "signals", "expected"),
    [
        (9, (False, False), None),
        (10, (False, False), CheckpointDue(wait=False, validate=True)),
        (25, (False, False), CheckpointDue(wait=True, validate=True)),  # the last step
        (9, (True, False), CheckpointDue(wait=True, validate=False)),
        (10, (True, False), CheckpointDue(wait=True, validate=False)),
        (9, (False, True), CheckpointDue(wait=True, validate=True)),
    ],
)
def test_checkpoint_is_due_every_interval_at_the_end_and_on_signals(step, signals, expected):
    stop_requested, preemption_announced = signals
    found = checkpoint_due(
        step, num_steps=25, interval_steps=10, stop_requested=stop_requested, preemption_announced=preemption_announced
    )
    assert found == expected


def test_last_checkpoint_comes_from_rays_record_and_not_from_the_newest_folder(tmp_path):
    assert checkpoints.committed(LOCAL, str(tmp_path / "run")) is None
    write_checkpoints(tmp_path, [10, 20])
    write_checkpoint(tmp_path, 30)
    found = checkpoints.committed(LOCAL, str(tmp_path))
    assert Path(found.latest.path).name == checkpoint_name(20)
    assert found.step == 20
    assert found.names == {checkpoint_name(10), checkpoint_name(20)}


def test_orphans_are_deleted_and_other_folders_kept(tmp_path):
    assert checkpoints.delete_orphans(LOCAL, str(tmp_path / "run")) == []
    write_checkpoints(tmp_path, [10, 20])
    others = {"generator", "checkpoint_mine", f"{checkpoint_name(30)}.kept"}
    for name in (checkpoint_name(30), *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    assert checkpoints.delete_orphans(LOCAL, str(tmp_path)) == [checkpoint_name(30)]
    kept = {checkpoint_name(10), checkpoint_name(20), checkpoints.CHECKPOINT_RECORD, *others}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_intact_record_is_not_rewritten(tmp_path, caplog):
    checkpoints.repair_record(LOCAL, str(tmp_path / "run"))  # the folder does not exist yet
    write_checkpoints(tmp_path, [10, 20])
    write_checkpoint(tmp_path, 30)  # complete, but not committed
    before = (tmp_path / checkpoints.CHECKPOINT_RECORD).read_bytes()
    checkpoints.repair_record(LOCAL, str(tmp_path))
    assert (tmp_path / checkpoints.CHECKPOINT_RECORD).read_bytes() == before
    assert caplog.text == ""


@pytest.mark.parametrize("damage", ["half", "empty", "missing", "another kind"])
def test_damaged_record_is_rebuilt_from_complete_checkpoints(tmp_path, caplog, damage):
    write_checkpoints(tmp_path, [10, 20])
    record = tmp_path / checkpoints.CHECKPOINT_RECORD
    if damage == "missing":
        record.unlink()
    else:
        record.write_text({"half": record.read_text()[:40], "empty": "", "another kind": "[]"}[damage])
    checkpoints.repair_record(LOCAL, str(tmp_path))
    assert "rebuilt Ray's record of checkpoints from the 2 complete checkpoints" in caplog.text
    found = checkpoints.committed(LOCAL, str(tmp_path))
    assert (Path(found.latest.path).name, found.step) == (checkpoint_name(20), 20)
    assert found.names == {checkpoint_name(10), checkpoint_name(20)}


@pytest.mark.parametrize(
    "damage", ["shorter file", "no file", "no state.json", "half of state.json", "another state.json", "no folder"]
)
def test_run_continues_from_the_checkpoint_before_a_damaged_one(tmp_path, caplog, damage):
    write_checkpoints(tmp_path, [10, 20])
    last = tmp_path / checkpoint_name(20)
    if damage == "shorter file":
        (last / "shard-1.safetensors").write_bytes(b"1234")
    elif damage == "no file":
        (last / "shard-1.safetensors").unlink()
    elif damage == "no state.json":
        (last / "state.json").unlink()
    elif damage == "half of state.json":
        (last / "state.json").write_text('{"files": {"sh')
    elif damage == "another state.json":
        (last / "state.json").write_text("[]")
    else:
        shutil.rmtree(last)
    checkpoints.repair_record(LOCAL, str(tmp_path))
    assert f"ignored the damaged checkpoint {checkpoint_name(20)}" in caplog.text
    found = checkpoints.committed(LOCAL, str(tmp_path))
    assert (Path(found.latest.path).name, found.step, found.names) == (checkpoint_name(10), 10, {checkpoint_name(10)})


def test_run_without_a_complete_checkpoint_is_refused(tmp_path):
    write_checkpoints(tmp_path, [10])
    shutil.rmtree(tmp_path / checkpoint_name(10))
    with pytest.raises(InputError, match="but no complete checkpoint"):
        checkpoints.repair_record(LOCAL, str(tmp_path))
    (tmp_path / checkpoints.CHECKPOINT_RECORD).write_text("")
    with pytest.raises(InputError, match="but no complete checkpoint"):
        checkpoints.repair_record(LOCAL, str(tmp_path))


def test_checkpoint_of_another_format_version_is_refused_and_kept(tmp_path):
    write_checkpoints(tmp_path, [10, 20])
    record = (tmp_path / checkpoints.CHECKPOINT_RECORD).read_text()
    (tmp_path / checkpoint_name(20) / "state.json").write_text(json.dumps({"format_version": 1}))
    with pytest.raises(InputError, match="has format version 1, but this release reads version"):
        checkpoints.repair_record(LOCAL, str(tmp_path))
    assert (tmp_path / checkpoints.CHECKPOINT_RECORD).read_text() == record
    (tmp_path / checkpoints.CHECKPOINT_RECORD).unlink()
    with pytest.raises(InputError, match="has format version 1"):
        checkpoints.delete_orphans(LOCAL, str(tmp_path))
    assert (tmp_path / checkpoint_name(20)).is_dir()


def test_record_of_another_ray_version_is_refused(tmp_path):
    write_checkpoints(tmp_path, [10])
    content = json.loads((tmp_path / checkpoints.CHECKPOINT_RECORD).read_text())
    content.pop("pending_training_results")
    (tmp_path / checkpoints.CHECKPOINT_RECORD).write_text(json.dumps(content | {"ray_version": "1.0"}))
    with pytest.raises(InputError, match=r"Ray cannot read .*1\.0"):
        checkpoints.committed(LOCAL, str(tmp_path))


def test_local_files_of_dead_workers_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = tmp_path / f"{checkpoints.LOCAL_PREFIX}{2**22 + 1}-abc"  # above any process id
    alive = tmp_path / f"{checkpoints.LOCAL_PREFIX}{os.getpid()}-abc"
    for folder in (dead, alive, tmp_path / "other"):
        folder.mkdir()
    checkpoints.delete_local_leftovers()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([alive.name, "other"])


def test_failed_save_leaves_no_local_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    state = build_train_state(debug(), sample_size=8, in_channels=4, num_classes=10, device=torch.device("cpu"))
    with pytest.raises(TypeError, match="not JSON serializable"):  # in the last write, like a full disk
        checkpoints.save(state, debug(), {}, {"what": object()}, wait=True)
    assert list(tmp_path.iterdir()) == []
