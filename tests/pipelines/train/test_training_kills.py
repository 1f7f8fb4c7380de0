"""Training on a two-node cluster while workers, drivers, nodes and the MLflow server are killed."""

import contextlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import psutil
import pytest
import torch
from mlflow import MlflowClient
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from meanflow_core.presets.demo import debug
from pipelines import storage
from pipelines.demo import images
from pipelines.training import checkpoints
from pipelines.training.record import TRAINING_RECORD
from tests.core.test_world_sizes import without_key_bias
from tests.support.clusters import cluster_of_two, processes_of
from tests.support.latents import encode_demo_images
from tests.support.mlflow_server import Server
from tests.support.readme import REPOSITORY
from tests.support.training_checkpoints import differing, last_checkpoint, tensors_of, train_in_this_process

NUM_STEPS = 240
OPTIONS = [
    "--num-steps", str(NUM_STEPS), "--log-interval-steps", "5", "--checkpoint-interval-steps", "20",
    "--sample-interval-steps", "1000", "--num-workers", "2", "--max-failures", "20", "--global-batch-size", "256",
]  # fmt: skip
METRICS = ("loss", "squared_error_r_equals_t", "squared_error_r_below_t", "gradient_norm", "dudt_norm")

pytestmark = [pytest.mark.cluster, pytest.mark.soak, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        started = Server(tmp_path_factory.mktemp("mlflow"))
        started.start()
        yield started
        started.stop()


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    root = tmp_path_factory.mktemp("latents")
    images.write_folder(root / "images", num_train=200, num_val=10)
    return encode_demo_images(root / "images/train", root / "latents", 64)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("trainings")


@pytest.fixture(scope="module")
def cluster():
    """Two nodes with one CPU each. A test that removes the second node adds another."""
    with cluster_of_two(num_cpus=1) as started:
        yield started


class Training:
    """A training command that can be started several times."""

    def __init__(self, cluster, server, latents, root, name, *options):
        self.cluster, self.server, self.root, self.name = cluster, server, root, name
        self.folder = root / "runs" / name
        self._command = [
            sys.executable, "-m", "pipelines.train", "debug", "--data", str(latents), "--storage", str(root / "runs"),
            "--run-name", name, "--cache-dir", str(root / "cache"), "--model-name", name, *OPTIONS, *options,
        ]  # fmt: skip
        self._log = root / f"{name}.log"
        self.driver: subprocess.Popen | None = None

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def start(self):
        with open(self._log, "ab") as log:
            self.driver = subprocess.Popen(
                self._command, cwd=REPOSITORY, stdout=log, stderr=log,
                env={**os.environ, "RAY_ADDRESS": self.cluster.address, "RAY_TMPDIR": self.cluster.ray_folder,
                     "MLFLOW_TRACKING_URI": self.server.uri, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"},
            )  # fmt: skip

    def wait_for_step(self, step: int, patience_seconds: float = 240.0):
        """Waits until MLflow or the last checkpoint has reached a step."""
        began = time.monotonic()
        while self.step() < step:
            assert time.monotonic() - began < patience_seconds, self.log()[-6000:]
            assert self.driver.poll() is None, self.log()[-6000:]
            time.sleep(0.05)

    def step(self) -> int:
        """The last step in MLflow; while MLflow is down, the step of the last checkpoint."""
        try:
            data = MlflowClient(self.server.uri).get_run(self.run_id()).data.to_proto()
            return max([metric.step for metric in data.metrics if metric.key == "loss"], default=0)
        except Exception:
            return self.committed_step()

    def run_id(self) -> str:
        return json.loads((self.folder / TRAINING_RECORD).read_text())["mlflow_run_id"]

    def committed_step(self) -> int:
        known = checkpoints.committed(*storage.open_storage(str(self.folder)))
        return 0 if known is None else known.step

    def finish(self, code: int = 0, patience_seconds: float = 400.0):
        assert self.driver.wait(timeout=patience_seconds) == code, self.log()[-6000:]

    def workers(self) -> list[psutil.Process]:
        return processes_of(self.cluster.ray_folder, "RayTrainWorker")

    def tensors(self, num_steps: int = NUM_STEPS) -> dict[str, torch.Tensor]:
        """The tensors of the last checkpoint."""
        step, found = last_checkpoint(self.folder)
        assert step == num_steps
        return found

    def metrics(self) -> dict[str, list[tuple[int, float]]]:
        client = MlflowClient(self.server.uri)
        return {
            name: [(metric.step, metric.value) for metric in client.get_metric_history(self.run_id(), name)]
            for name in METRICS
        }


def check_same(training: Training, uninterrupted: Training):
    """Checks that a run matches the uninterrupted one bit for bit, and has one finished MLflow run with the same metrics."""
    assert differing(training.tensors(), uninterrupted.tensors()) == []
    check_history(training)
    assert training.metrics() == uninterrupted.metrics()


def check_history(training: Training, steps: Sequence[int] = range(5, NUM_STEPS + 1, 5)):
    client = MlflowClient(training.server.uri)
    experiment = client.get_experiment_by_name("meanflow-ray").experiment_id
    [run] = client.search_runs([experiment], f"attributes.run_name = '{training.name}'")
    assert run.info.run_id == training.run_id()
    assert run.info.status == "FINISHED"
    for name, history in training.metrics().items():
        assert [step for step, _ in history] == list(steps), name
    kept = [path for path in training.folder.iterdir() if path.name.startswith("checkpoint_2")]
    assert len(kept) == 2  # no orphans


@pytest.fixture(scope="module")
def uninterrupted(cluster, server, latents, root):
    """The uninterrupted run."""
    training = Training(cluster, server, latents, root, "uninterrupted")
    training.start()
    training.finish()
    check_history(training)
    return training


def fill_disk(training: Training):
    """Simulates a full disk by limiting the workers' files to 1 kB."""
    for worker in training.workers():
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))


@pytest.mark.parametrize("seed", range(2))
def test_run_matches_the_uninterrupted_one_whatever_is_killed(cluster, server, latents, root, uninterrupted, seed):
    random.seed(seed)
    training = Training(cluster, server, latents, root, f"chaos-{seed}")
    training.start()
    # The server comes last, because its restart takes longer than the remaining steps.
    events = [*random.sample(["worker", "driver", "node", "disk"], 4), "server"]
    for number, event in enumerate(events):
        training.wait_for_step(5 + number * NUM_STEPS // 6 + random.randint(0, 10))
        print(f"step {training.step()}: {event}", flush=True)
        if event == "worker":
            random.choice(training.workers()).kill()
        elif event == "driver":
            training.driver.kill()
            training.driver.wait()
            training.start()
        elif event == "node":
            cluster.remove_second()
            cluster.add_second()
        elif event == "disk":
            fill_disk(training)
        else:
            server.stop()
            time.sleep(8.0)
            server.start()
    training.finish()
    check_same(training, uninterrupted)


def test_sigterm_saves_a_checkpoint_from_which_the_run_resumes(cluster, server, latents, root, uninterrupted):
    training = Training(cluster, server, latents, root, "terminated")
    training.start()
    training.wait_for_step(45)
    training.driver.send_signal(signal.SIGTERM)
    began = time.monotonic()
    training.finish(code=128 + signal.SIGTERM)
    print(f"ended {time.monotonic() - began:.1f} s after SIGTERM")
    stopped = int(re.search(r"stopped at step (\d+) with a checkpoint", training.log())[1])
    assert 45 <= stopped < NUM_STEPS
    assert training.committed_step() == stopped
    assert MlflowClient(server.uri).get_run(training.run_id()).info.status == "KILLED"
    training.start()
    training.finish()
    assert f"resumed at step {stopped}" in training.log()
    check_same(training, uninterrupted)


def test_second_job_of_the_same_run_is_refused(cluster, server, latents, root):
    options = ("--num-steps", "100000")
    training, second = (Training(cluster, server, latents, root, "claimed", *options) for _ in range(2))
    training.start()
    training.wait_for_step(5)
    second.start()
    second.finish(code=2)
    assert "another job of this cluster is training" in second.log()
    assert training.driver.poll() is None
    training.driver.send_signal(signal.SIGTERM)
    training.finish(code=128 + signal.SIGTERM)


def test_run_resumes_on_a_new_cluster_after_the_old_one_died(server, latents, root, uninterrupted):
    with cluster_of_two(num_cpus=1) as cluster:
        training = Training(cluster, server, latents, root, "restarted")
        training.start()
        training.wait_for_step(50)
        for process in processes_of(cluster.ray_folder):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        training.driver.wait()
    with cluster_of_two(num_cpus=1) as cluster:
        training.cluster = cluster
        training.start()
        training.finish()
    check_same(training, uninterrupted)


def test_preemption_notice_saves_a_checkpoint_at_once(cluster, server, latents, root, uninterrupted):
    training = Training(cluster, server, latents, root, "preempted", "--checkpoint-interval-steps", "1000")
    training.start()
    training.wait_for_step(10)
    assert training.committed_step() == 0
    deadline_ms = int((time.time() + 60) * 1000)
    GcsClient(cluster.address).drain_node(
        cluster.second.node_id, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "taken back", deadline_ms
    )
    began = time.monotonic()
    while training.committed_step() == 0:
        assert time.monotonic() - began < 60, training.log()[-6000:]
        time.sleep(0.1)
    saved = training.committed_step()
    print(f"saved the checkpoint of step {saved} {time.monotonic() - began:.1f} s after the notice")
    assert 10 <= saved < NUM_STEPS
    cluster.remove_second()
    cluster.add_second()
    training.finish()
    assert f"resumed at step {saved}" in training.log()
    assert training.metrics() == uninterrupted.metrics()
    assert differing(training.tensors(), uninterrupted.tensors()) == []


@pytest.mark.parametrize("parallelism", ["ddp", "fsdp2"])
def test_workers_may_leave_and_join_during_training(cluster, server, latents, root, parallelism):
    training = Training(
        cluster, server, latents, root, f"elastic-{parallelism}", "--min-workers", "1", "--resize-interval-seconds", "3",
        "--parallelism", parallelism, "--samples-per-pass", "1100", "--checkpoint-interval-steps", "4",
        "--global-batch-size", "4000", "--num-steps", "50", "--log-interval-steps", "1",
    )  # fmt: skip
    training.start()
    training.wait_for_step(8)
    cluster.remove_second()
    training.wait_for_step(14)
    cluster.add_second()
    training.finish()
    sizes = [int(found) for found in re.findall(r"rank \d+ of (\d+) workers", training.log())]
    assert 1 in sizes
    assert 2 in sizes[: sizes.index(1)]
    assert 2 in sizes[sizes.index(1) :]
    config = replace(debug(), global_batch_size=4000, num_steps=50)
    expected = train_in_this_process(latents, config)
    ours, theirs = training.tensors(50), tensors_of(expected.state)
    names = [name for name in theirs if name.startswith("network/")]
    whole = [
        torch.cat([without_key_bias(name, tensors[name]).flatten() for name in names]) for tensors in (ours, theirs)
    ]
    error = float((whole[0] - whole[1]).norm() / whole[1].norm())
    print(f"{parallelism}: 2, 1 and 2 workers against one process, relative difference after 50 steps: {error:.2g}")
    assert error < 1e-5
    check_history(training, list(range(1, 51)))
    logged = [value for _, value in training.metrics()["gradient_norm"]]
    assert logged == pytest.approx(expected.gradient_norms, rel=1e-4)


def test_nonfinite_gradient_fails_the_run_and_names_the_last_checkpoint(cluster, server, latents, root):
    training = Training(
        cluster, server, latents, root, "diverged", "--optimizer.learning-rate", "1e36", "--checkpoint-interval-steps", "1",
    )  # fmt: skip
    training.start()
    training.finish(code=1)
    [message] = [line for line in training.log().splitlines() if line.startswith("error: ")]
    step = int(re.search(r"the gradient of step (\d+) is not finite", message)[1])
    assert f"resumes from the checkpoint of step {step - 1} (" in message
    assert "--skip-nonfinite 1" in message
    assert training.committed_step() == step - 1
    assert MlflowClient(server.uri).get_run(training.run_id()).info.status == "FAILED"
