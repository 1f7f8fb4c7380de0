"""The encode stage on a cluster of two nodes while its driver, its workers and a node are killed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from pipelines.demo import images
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER
from pipelines.latents.manifest import read_manifest
from tests.support.clusters import cluster_of_two, processes_of
from tests.support.latents import assert_same, encode_demo_images, read_shards
from tests.support.readme import REPOSITORY

NUM_IMAGES, IMAGES_PER_SHARD = 1200, 32
NUM_SHARDS = -(-NUM_IMAGES // IMAGES_PER_SHARD)
MAX_STARTS = 5
TIMEOUT_SECONDS = 240.0

pytestmark = [pytest.mark.cluster, pytest.mark.soak]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """1200 images, one of them unreadable, and the dataset of an uninterrupted job."""
    root = tmp_path_factory.mktemp("kills")
    images.write_folder(root / "images", num_train=NUM_IMAGES, num_val=10)
    (root / "images/train/d0000004/d0000004_104.JPEG").write_bytes(b"truncated")
    encode_demo_images(root / "images/train", root / "expected", IMAGES_PER_SHARD)
    return root


@pytest.fixture(scope="module")
def cluster():
    with cluster_of_two(num_cpus=2) as started:
        yield started


class Encoding:
    """A job whose driver is started again after every failure."""

    def __init__(self, cluster: Cluster, drawn: Path, output: Path):
        self.cluster, self.drawn, self.output = cluster, drawn, output
        self._command = [
            sys.executable, "-m", "pipelines.encode", "--images", str(drawn / "images/train"),
            "--output", str(output), "--vae", str(SHIPPED_AUTOENCODER), "--image-size", "64",
            "--images-per-shard", str(IMAGES_PER_SHARD), "--num-workers", "2",
        ]  # fmt: skip
        self._log = output.with_suffix(".log")
        self.driver: subprocess.Popen | None = None

    def log(self) -> str:
        return self._log.read_text(errors="replace")[-6000:]

    def start(self):
        """Starts the driver unless it is running."""
        if self.driver is None or self.driver.poll() is not None:
            environment = {**os.environ, "RAY_ADDRESS": self.cluster.address, "RAY_TMPDIR": self.cluster.ray_folder}
            with open(self._log, "ab") as log:
                self.driver = subprocess.Popen(self._command, cwd=REPOSITORY, stdout=log, stderr=log, env=environment)

    def num_shards(self) -> int:
        return len(list((self.output / "shards").glob("*.arrow")))

    def wait_for_shards(self, count: int):
        """Waits for a number of shards, restarting a failed driver."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while self.num_shards() < count:
            assert time.monotonic() < deadline, self.log()
            assert self.driver is None or self.driver.poll() != 0, self.log()
            self.start()
            time.sleep(0.05)

    def finish(self) -> int:
        """Runs to the end. Returns the number of starts."""
        for num_starts in range(1, MAX_STARTS + 1):
            self.start()
            if self.driver.wait(timeout=TIMEOUT_SECONDS) == 0:
                return num_starts
        raise AssertionError(self.log())

    def kill(self, target: str):
        """Sends SIGKILL to the driver, to an encoding actor, or to the second node, which is then replaced."""
        if target == "driver":
            self.driver.kill()
            self.driver.wait()
        elif target == "node":
            self.cluster.remove_second()
            self.cluster.add_second()
        else:
            actors = processes_of(self.cluster.ray_folder, "ray::MapWorker")
            if actors:
                random.choice(actors).send_signal(signal.SIGKILL)

    def check_shards(self):
        """Every file under a shard's name is complete."""
        for shard in read_shards(self.output):
            assert shard.content_sha256() == shard.summary.sha256
            assert len(shard.labels) + len(shard.summary.rejected) in (IMAGES_PER_SHARD, NUM_IMAGES % IMAGES_PER_SHARD)

    def check_result(self):
        """The dataset equals that of the uninterrupted job."""
        manifest = read_manifest(str(self.output))
        assert (manifest.num_samples, manifest.num_rejected) == (NUM_IMAGES - 1, 1)
        assert_same(self.output, self.drawn / "expected")
        assert not list((self.output / "shards").glob("*.partial"))


@pytest.mark.timeout(900)
def test_killed_job_continues_with_the_missing_shards(cluster, drawn, tmp_path):
    encoding = Encoding(cluster, drawn, tmp_path / "latents")
    encoding.wait_for_shards(random.randint(2, 12))
    encoding.kill("driver")
    kept = {path: path.stat().st_mtime_ns for path in (encoding.output / "shards").glob("*.arrow")}
    assert not (encoding.output / "manifest.json").exists()
    assert encoding.finish() == 1
    encoding.check_result()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.timeout(1800)
def test_random_kills_of_driver_workers_and_node_lose_and_repeat_no_image(cluster, drawn, tmp_path):
    random.seed(0)
    targets = random.sample(["driver", "worker", "node"] * 2, 6)
    encoding = Encoding(cluster, drawn, tmp_path / "latents")
    for number, target in enumerate(targets):
        encoding.wait_for_shards(1 + number * NUM_SHARDS // (len(targets) + 1))
        time.sleep(random.uniform(0.0, 1.0))
        print(f"{encoding.num_shards()} of {NUM_SHARDS} shards: kill the {target}", flush=True)
        encoding.kill(target)
        encoding.check_shards()
    encoding.finish()
    encoding.check_result()
