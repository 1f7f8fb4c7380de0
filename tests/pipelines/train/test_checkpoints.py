import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from pyarrow import fs
from ray.train import Checkpoint

from meanflow_core.autoencoder import weight_hash
from meanflow_core.checkpoint import FORMAT_VERSION
from meanflow_core.generator import save_generator
from meanflow_core.presets import debug
from meanflow_core.training import build_train_state
from pipelines.demo import images
from pipelines.errors import InputError
from pipelines.train import checkpoints
from pipelines.train import run as train_run
from pipelines.train.job import TrainJob
from tests.support.manifests import make_manifest

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
        (run / name / "shard-1.safetensors").write_bytes(b"12345")
        (run / name / "state.json").write_text(
            json.dumps({"format_version": FORMAT_VERSION, "files": {"shard-1.safetensors": 5}})
        )
    (run / checkpoints.RECORD).write_text(json.dumps(content))


A, B, C = (f"checkpoint_2026-11-25_20-00-0{number}.123456" for number in range(3))


def test_last_checkpoint_is_the_records_and_not_the_youngest_folder(tmp_path):
    run = tmp_path / "run"
    assert checkpoints.committed(LOCAL, str(run)) is None
    run.mkdir()
    assert checkpoints.committed(LOCAL, str(run)) is None
    write_record(run, [A, B])
    (run / C).mkdir()
    found = checkpoints.committed(LOCAL, str(run))
    assert Path(found.latest.path).name == B
    assert found.step == 20
    assert found.names == {A, B}


def test_orphans_of_a_crash_are_deleted_and_nothing_else(tmp_path):
    run = tmp_path / "run"
    assert checkpoints.delete_orphans(LOCAL, str(run)) == []
    write_record(run, [A, B])
    others = {"generator", "checkpoint_mine", f"{C}.kept"}
    for name in (C, *others):
        (run / name).mkdir()
        (run / name / "file").write_text("x")
    assert checkpoints.delete_orphans(LOCAL, str(run)) == [C]
    assert {path.name for path in run.iterdir()} == {A, B, checkpoints.RECORD, *others}


def spare_of(run, names):
    write_record(run, names)
    checkpoints.SpareRecord(str(run)).after_report(None, [], Checkpoint(str(run / names[-1])))


@pytest.mark.parametrize("damage", ["torn", "empty", "missing", "of another kind"])
def test_record_that_cannot_be_read_is_replaced_by_that_of_the_checkpoint_before(tmp_path, caplog, damage):
    run = tmp_path / "run"
    checkpoints.mend_record(LOCAL, str(run))  # nothing there yet
    spare_of(run, [A, B])
    checkpoints.mend_record(LOCAL, str(run))
    assert caplog.text == ""
    record = run / checkpoints.RECORD
    if damage == "missing":
        record.unlink()
    else:
        record.write_text({"torn": record.read_text()[:40], "empty": "", "of another kind": "[]"}[damage])
    checkpoints.mend_record(LOCAL, str(run))
    assert "going on with the spare one" in caplog.text
    found = checkpoints.committed(LOCAL, str(run))
    assert (Path(found.latest.path).name, found.names) == (B, {A, B})


@pytest.mark.parametrize(
    "damage", ["a shorter file", "no file", "no state.json", "half of state.json", "another state.json", "no folder"]
)
def test_checkpoint_that_is_not_whole_is_left_out_for_the_one_before(tmp_path, caplog, damage):
    run = tmp_path / "run"
    spare_of(run, [A, B])
    if damage == "a shorter file":
        (run / B / "shard-1.safetensors").write_bytes(b"1234")
    elif damage == "no file":
        (run / B / "shard-1.safetensors").unlink()
    elif damage == "no state.json":
        (run / B / "state.json").unlink()
    elif damage == "half of state.json":
        (run / B / "state.json").write_text('{"files": {"sh')
    elif damage == "another state.json":
        (run / B / "state.json").write_text("[]")
    else:
        shutil.rmtree(run / B)
    checkpoints.mend_record(LOCAL, str(run))
    assert "going on without it" in caplog.text
    found = checkpoints.committed(LOCAL, str(run))
    assert (Path(found.latest.path).name, found.step, found.names) == (A, 10, {A})
    assert (run / checkpoints.SPARE_RECORD).read_text() == (run / checkpoints.RECORD).read_text()


def test_checkpoint_of_another_format_version_is_refused_and_kept(tmp_path):
    spare_of(tmp_path, [A, B])
    record = (tmp_path / checkpoints.RECORD).read_text()
    (tmp_path / B / "state.json").write_text(json.dumps({"format_version": 1}))
    with pytest.raises(InputError, match="has format version 1, but this release reads version"):
        checkpoints.mend_record(LOCAL, str(tmp_path))
    assert (tmp_path / checkpoints.RECORD).read_text() == record
    write_record(tmp_path, [A])
    with pytest.raises(InputError, match="has format version 1"):
        checkpoints.delete_orphans(LOCAL, str(tmp_path))
    assert (tmp_path / B).is_dir()


def test_validation_of_a_checkpoint_that_is_left_out_is_forgotten(tmp_path):
    run = tmp_path / "run"
    write_record(run, [A, B])
    content = json.loads((run / checkpoints.RECORD).read_text())
    content |= {
        "pending_training_results": list(content["checkpoint_results"]),
        "pending_validation_specs": [True, True],
    }
    (run / checkpoints.RECORD).write_text(json.dumps(content))
    shutil.rmtree(run / B)
    checkpoints.mend_record(LOCAL, str(run))
    mended = json.loads((run / checkpoints.RECORD).read_text())
    assert [result["checkpoint_dir_name"] for result in mended["pending_training_results"]] == [A]
    assert mended["pending_validation_specs"] == [True]
    assert checkpoints.committed(LOCAL, str(run)).names == {A}


def test_run_without_anything_whole_is_refused(tmp_path):
    (tmp_path / checkpoints.RECORD).write_text("")
    with pytest.raises(InputError, match="is torn, and there is no spare; choose another --run-name"):
        checkpoints.mend_record(LOCAL, str(tmp_path))
    write_record(tmp_path / "run", [A])
    shutil.rmtree(tmp_path / "run" / A)
    with pytest.raises(InputError, match="none of the 1 checkpoints in .* is whole"):
        checkpoints.mend_record(LOCAL, str(tmp_path / "run"))


def test_record_of_another_release_of_ray_is_an_input_error(tmp_path):
    write_record(tmp_path, [A])
    content = json.loads((tmp_path / checkpoints.RECORD).read_text())
    content.pop("pending_training_results")
    (tmp_path / checkpoints.RECORD).write_text(json.dumps(content | {"ray_version": "1.0"}))
    with pytest.raises(InputError, match="Ray cannot read .*1.0"):
        checkpoints.committed(LOCAL, str(tmp_path))


def test_scratch_of_dead_workers_alone_is_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = tmp_path / f"{checkpoints.SCRATCH}{2**22 + 1}-abc"  # above any pid
    living = tmp_path / f"{checkpoints.SCRATCH}{os.getpid()}-abc"
    for folder in (dead, living, tmp_path / "other"):
        folder.mkdir()
    checkpoints.delete_scratch()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([living.name, "other"])


def test_disk_that_is_full_is_not_left_fuller(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    state = build_train_state(debug(), sample_size=8, in_channels=4, num_classes=10, device=torch.device("cpu"))
    with pytest.raises(TypeError, match="not JSON serializable"):  # as late as a full disk
        checkpoints.report(state, debug(), {}, {"what": object()}, wait=True)
    assert list(tmp_path.iterdir()) == []


def job_in(folder, **changes):
    return TrainJob(data=str(folder / "latents"), storage=str(folder), run_name="run", **{"config": debug(), **changes})


def test_run_that_is_at_its_end_goes_on_and_one_that_is_past_it_is_refused(tmp_path):
    write_record(tmp_path / "run", [A, B])  # 20 steps
    manifest = make_manifest([5], moments_shape=(8, 8, 8), image_size=64)
    at_end = job_in(tmp_path, config=replace(debug(), num_steps=20))
    assert train_run._require_resumable(at_end, manifest, {}) is None
    with pytest.raises(InputError, match="has taken 20 steps already, more than num_steps 19"):
        train_run._require_resumable(job_in(tmp_path, config=replace(debug(), num_steps=19)), manifest, {})


def test_run_without_a_checkpoint_begins_with_the_same_network_or_not_at_all(tmp_path, pipeline, vae):
    save_generator(pipeline, tmp_path / "generator")
    vae.save_pretrained(tmp_path / "latents/vae")
    network = replace(debug().network, hidden_size=48, num_heads=3, patch_size=2)
    job = job_in(tmp_path, init_from=str(tmp_path / "generator"), config=replace(debug(), network=network))
    manifest = replace(make_manifest([5], moments_shape=(8, 8, 8), image_size=64), class_names=list(images.CLASS_NAMES))
    wanted = weight_hash(pipeline.transformer)
    assert weight_hash(train_run._require_resumable(job, manifest, {"init_sha256": wanted})) == wanted
    with pytest.raises(InputError, match="is not the network that run run was begun with"):
        train_run._require_resumable(job, manifest, {"init_sha256": "of another"})


def test_failure_says_where_the_same_command_goes_on(tmp_path):
    job = job_in(tmp_path, skip_nonfinite=3)
    assert train_run._way_on(job) == "there is no checkpoint yet: the same command begins anew"
    write_record(tmp_path / "run", [A, B])
    assert train_run._way_on(job).startswith(f"the last good checkpoint is of step 20, {tmp_path}/run/{B}: ")
    assert "--skip-nonfinite 4 skips such a step" in train_run._about_nonfinite(job, 21)
    (tmp_path / "run" / checkpoints.RECORD).write_text("{")
    assert "its checkpoints cannot be read now" in train_run._way_on(job)
