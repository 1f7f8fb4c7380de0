"""Resuming on a real Ray cluster after a worker is killed, with storage in an object store."""

import threading
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import ray
from mlflow import MlflowClient
from pyarrow import fs

from meanflow_core.presets.demo import debug
from pipelines import storage
from pipelines.errors import InputError
from pipelines.train import run as train_run
from pipelines.train.job import TrainJob
from pipelines.training import checkpoints
from pipelines.training.record import TRAINING_RECORD, read_record
from tests.support.latents import encode_demo_images
from tests.support.object_store import s3_bucket
from tests.support.training_checkpoints import differing, last_checkpoint, tensors_of, train_in_this_process

# Checkpoints fall within logging intervals. Steps are slow enough to kill the worker before the last one.
CONFIG = replace(
    debug(), num_steps=40, global_batch_size=128, log_interval_steps=5, checkpoint_interval_steps=4,
    sample_interval_steps=1000,
)  # fmt: skip
ORPHAN = "checkpoint_2026-01-01_00-00-00.000000"

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def latents(image_root, tmp_path_factory):
    return encode_demo_images(image_root / "train", tmp_path_factory.mktemp("resume") / "latents", 64)


def train_workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any("RayTrainWorker" in word for word in process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


class Killer(threading.Thread):
    """Kills the worker after the first committed checkpoint, and leaves an incomplete checkpoint folder behind."""

    def __init__(self, run_location: str) -> None:
        super().__init__(daemon=True)
        self._storage = storage.open_storage(run_location)
        self.killed_after_step: int | None = None

    def run(self) -> None:
        filesystem, folder = self._storage
        while (found := checkpoints.committed(filesystem, folder)) is None:
            time.sleep(0.05)
        storage.write_bytes(filesystem, f"{folder}/{ORPHAN}/state.json", b"{")
        [worker] = train_workers()
        worker.kill()
        self.killed_after_step = found.step


@pytest.mark.timeout(400)
def test_run_with_a_killed_worker_matches_an_uninterrupted_loop_bit_for_bit(
    latents, tmp_path, tracking_uri, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    with s3_bucket() as bucket:
        job = TrainJob(
            data=str(latents), storage=f"{bucket}/runs", run_name="killed", cpu_threads=1, device="cpu",
            cache_dir=str(tmp_path / "cache"), model_name="killed", config=CONFIG,
        )  # fmt: skip
        killer = Killer(job.run_location)
        killer.start()
        try:
            returned = train_run.train("debug", job)
        finally:
            ray.shutdown()
        killer.join(timeout=10.0)
        assert killer.killed_after_step < CONFIG.num_steps
        step, tensors = last_checkpoint(job.run_location)
        filesystem, folder = storage.open_storage(job.run_location)
        names = {info.base_name for info in filesystem.get_file_info(fs.FileSelector(folder))}
        record = read_record(job)
        with pytest.raises(InputError, match=r"other settings or data \(config.seed was 0, is now 5\)"):
            train_run.train("debug", replace(job, config=replace(CONFIG, seed=5)))

    expected = train_in_this_process(latents, CONFIG, num_threads=1)
    assert step == CONFIG.num_steps
    assert differing(tensors, tensors_of(expected.state)) == []
    assert {checkpoints.CHECKPOINT_RECORD, TRAINING_RECORD, "generator"} < names
    assert len([name for name in names if name.startswith("checkpoint_2")]) == 2
    assert ORPHAN not in names
    assert record == returned
    assert record.published.generator == f"{job.run_location}/generator"

    client = MlflowClient(tracking_uri)
    assert client.get_run(record.mlflow_run_id).info.status == "FINISHED"
    history = client.get_metric_history(record.mlflow_run_id, "gradient_norm")
    assert [metric.step for metric in history] == list(range(5, 41, 5))
    means = np.reshape(expected.gradient_norms, (8, 5)).mean(axis=1)
    np.testing.assert_allclose([metric.value for metric in history], means, rtol=1e-6)
