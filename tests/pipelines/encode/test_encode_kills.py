"""The encode stage on a cluster of two nodes, while its driver, its workers and a node are killed."""

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
from tests.support.latents import assert_same, encode_drawn, read_shards
from tests.support.readme import REPOSITORY

NUM_IMAGES, ROWS_PER_SHARD = 2000, 32
OPTIONS = ["--image-size", "64", "--rows-per-shard", str(ROWS_PER_SHARD), "--num-workers", "2"]

pytestmark = [pytest.mark.cluster, pytest.mark.soak]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Two thousand images, and the dataset that an uninterrupted run makes of them."""
    root = tmp_path_factory.mktemp("kills")
    images.write_folder(root / "images", num_train=NUM_IMAGES, num_val=10)
    (root / "images/train/d0000004/d0000004_104.JPEG").write_bytes(b"torn")
    encode_drawn(root / "images/train", root / "wanted", ROWS_PER_SHARD)
    return root


@pytest.fixture
def cluster():
    """A head and a second node."""
    with cluster_of_two(num_cpus=2) as started:
        yield started


class Encoding:
    """A job that is started again and again until it is done."""

    def __init__(self, cluster: Cluster, drawn: Path, output: Path):
        self.cluster, self.output = cluster, output
        self._command = [
            sys.executable, "-m", "pipelines.encode", "--images", str(drawn / "images/train"),
            "--output", str(output), "--vae", str(SHIPPED_AUTOENCODER), *OPTIONS,
        ]  # fmt: skip
        self._log = open(output.with_suffix(".log"), "ab")  # noqa: SIM115  # closed with the process
        self.driver: subprocess.Popen | None = None

    def log(self) -> str:
        return self.output.with_suffix(".log").read_text(errors="replace")[-6000:]

    def start(self):
        """Starts the driver unless it runs."""
        if self.driver is None or self.driver.poll() is not None:
            self.driver = subprocess.Popen(
                self._command, cwd=REPOSITORY, stdout=self._log, stderr=self._log,
                env={**os.environ, "RAY_ADDRESS": self.cluster.address, "RAY_TMPDIR": self.cluster.ray_folder},
            )  # fmt: skip

    def num_shards(self) -> int:
        return len(list((self.output / "shards").glob("*.arrow"))) if self.output.exists() else 0

    def wait_for_shards(self, count: int, patience_seconds: float = 240.0):
        """Waits until so many shards are there, starting the driver again where it failed."""
        began = time.monotonic()
        while self.num_shards() < count:
            assert time.monotonic() - began < patience_seconds, self.log()
            if self.driver is None or self.driver.poll() is not None:
                assert self.driver is None or self.driver.returncode != 0, self.log()
                self.start()
            time.sleep(0.05)

    def finish(self, patience_seconds: float = 240.0) -> int:
        """Runs to the end, and returns how often it had to be started for that."""
        for attempt in range(1, 6):
            self.start()
            if self.driver.wait(timeout=patience_seconds) == 0:
                return attempt
        raise AssertionError(self.log())

    def kill(self, what: str):
        """SIGKILL to the driver, to an actor that encodes, or to the second node's raylet, which then comes back."""
        if what == "driver":
            self.driver.kill()
            self.driver.wait()
        elif what == "node":
            self.cluster.remove_second()
            self.cluster.add_second()
        else:
            encoders = processes_of(self.cluster.ray_folder, "ray::MapWorker")
            if encoders:
                random.choice(encoders).send_signal(signal.SIGKILL)

    def check_what_is_there(self):
        """No file under a shard's name is half of one."""
        for shard in read_shards(self.output):
            assert shard.content_sha256() == shard.summary.sha256
            assert len(shard.labels) + len(shard.summary.rejected) in (ROWS_PER_SHARD, NUM_IMAGES % ROWS_PER_SHARD)


def check_result(encoding: Encoding, drawn: Path):
    manifest = read_manifest(str(encoding.output))
    assert (manifest.num_samples, manifest.num_rejected) == (NUM_IMAGES - 1, 1)
    assert_same(encoding.output, drawn / "wanted")
    assert not list((encoding.output / "shards").glob("*.partial"))


@pytest.mark.timeout(600)
def test_driver_that_is_killed_goes_on_where_it_stopped(cluster, drawn, tmp_path):
    encoding = Encoding(cluster, drawn, tmp_path / "latents")
    encoding.wait_for_shards(random.randint(2, 20))
    encoding.kill("driver")
    kept = {path: path.stat().st_mtime_ns for path in (encoding.output / "shards").glob("*.arrow")}
    assert not (encoding.output / "manifest.json").exists()
    assert encoding.finish() == 1
    check_result(encoding, drawn)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # what was done was not done again


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(2))
def test_driver_workers_and_node_killed_at_random_moments_lose_and_repeat_no_image(cluster, drawn, tmp_path, seed):
    random.seed(seed)
    kills = random.sample(["driver", "worker", "node"] * 3, 9)
    encoding = Encoding(cluster, drawn, tmp_path / "latents")
    total = -(-NUM_IMAGES // ROWS_PER_SHARD)
    for number, what in enumerate(kills):
        encoding.wait_for_shards(1 + number * total // (len(kills) + 1))
        time.sleep(random.uniform(0.0, 1.0))
        print(f"{encoding.num_shards()} of {total} shards: kill the {what}", flush=True)
        encoding.kill(what)
        encoding.check_what_is_there()
    encoding.finish()
    check_result(encoding, drawn)
