"""Starts servers on free ports and sends load with locust, for the serving benchmark and the overload test."""

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import psutil
import yaml

from deploy.serve import ServeJob, fast_path, serve_config
from deploy.settings import Arguments
from pipelines.cluster import FAST_MALLOC
from pipelines.demo.serving import free_port
from tests.benchmarks._harness import sampled_memory

REPOSITORY = Path(__file__).parents[2]
BODY = json.dumps({"class": 1, "seed": 1}).encode()
START_TIMEOUT_SECONDS = 240.0


@dataclass(frozen=True)
class Server:
    """A running server. `pid` is its main process."""

    url: str
    pid: int


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str], port: int, paths: list[str]) -> Iterator[Server]:
    """Starts a server, waits until it answers on every path, and ends all of its processes on exit."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=log, stderr=log, start_new_session=True,
            env={**inherited, **FAST_MALLOC, "PYTHONPATH": str(REPOSITORY), **environment},
        )  # fmt: skip
        url = f"http://127.0.0.1:{port}"
        try:
            for path in paths:
                _wait_until_answered(url + path, process, log)
            yield Server(url, process.pid)
        finally:
            _end(process)


def _wait_until_answered(url: str, process: subprocess.Popen, log: IO[str]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    request = urllib.request.Request(url, BODY, {"content-type": "application/json"})
    while True:
        try:
            with urllib.request.urlopen(request, timeout=600):
                return
        except OSError as error:
            if process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.5)
                continue
            reason = error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else error
            log.seek(0)
            raise SystemExit(f"{url} does not answer: {reason}\n{log.read()[-6000:]}") from error


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)
        for child in psutil.wait_procs(children, timeout=20)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


@contextlib.contextmanager
def serving(applications: list[dict], levers: dict[str, str] | None = None) -> Iterator[Server]:
    """Starts a local Ray cluster as `deploy.serve` does, but with these applications, and waits until all are ready.

    applications: configs with name, route_prefix, import_path and args. Each must have a route /generate.
    levers: variables that replace those of the fast path.
    """
    folder = tempfile.mkdtemp(prefix="mfs-", dir="/tmp")  # Unix socket paths must be short
    port = free_port(0)
    config = serve_config(ServeJob(arguments=Arguments(model="replaced"), port=port)) | {"applications": applications}
    config_file = Path(folder, "serve.yaml")
    config_file.write_text(yaml.safe_dump(config))
    environment = {
        "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": folder,
        "RAY_worker_niceness": "0",  # with Ray's default of 15, the load generator would have priority over the replicas
        **fast_path(Path(folder), levers or {}),
    }  # fmt: skip
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "--address", "local", str(config_file)]
    paths = [f"{application['route_prefix'].rstrip('/')}/generate" for application in applications]
    try:
        with running(command, environment, port, paths) as server:
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def endpoint(generator: Path, **arguments: object) -> dict:
    """The config of the endpoint's application for `serving`. `arguments` are those of deploy.app:build_app."""
    # Otherwise Api would reserve a CPU, and on two cores a generator with two threads could not be scheduled.
    api = [{"name": "Api", "ray_actor_options": {"num_cpus": 0}}] if arguments.get("topology") == "two" else []
    return {
        "name": "meanflow", "route_prefix": "/", "import_path": "deploy.app:build_app",
        "args": {"model": str(generator), **arguments},
        "deployments": api,
    }  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """Responses after the warm-up. `rows` contains (second, status or exception name, milliseconds, bytes)."""

    seconds: float
    rows: list[tuple[float, str, float, int]]

    @property
    def good(self) -> list[tuple[float, str, float, int]]:
        """Responses with status 200."""
        return [row for row in self.rows if row[1] == "200"]

    @property
    def statuses(self) -> dict[str, int]:
        """Number of responses of each status."""
        return dict(Counter(row[1] for row in self.rows))

    @property
    def num_unexpected(self) -> int:
        """Number of responses that are neither an image nor a 429."""
        return sum(count for status, count in self.statuses.items() if status not in ("200", "429"))

    @property
    def per_second(self) -> float:
        """Images per second. Accurate if many images finish each second."""
        return len(self.good) / self.seconds

    @property
    def per_second_by_batches(self) -> float:
        """Images per second between the ends of the first and last batch. For measurements with few batches."""
        ends = sorted(row[0] for row in self.good)
        gaps = np.diff(ends)
        batch_ends = [*np.flatnonzero(gaps > gaps.max() / 2), len(ends) - 1]
        first, last = batch_ends[0], batch_ends[-1]
        return float((last - first) / (ends[last] - ends[first]))

    @property
    def median_bytes(self) -> float:
        """Median size of an image file."""
        return statistics.median(row[3] for row in self.good)

    def milliseconds(self, percentile: float) -> float:
        """A percentile of the latency of images."""
        return float(np.percentile([row[2] for row in self.good], percentile))


def load(
    url: str, users: int, seconds: float, *, path: str = "/generate", warmup_seconds: float = 2.0,
    requests_per_user: float = 0.0, num_classes: int = 10,
) -> Answers:  # fmt: skip
    """Sends load with locust for `seconds` after the warm-up.

    requests_per_user: requests per second of each user; 0 sends the next request after each response (closed loop).
    """
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder, "answers.json")
        command = [
            sys.executable, "-m", "locust", "-f", str(Path(__file__).with_name("_serve_load.py")), "--headless",
            "--only-summary", "--exit-code-on-error", "0", "--host", url, "--path", path, "--answers", str(answers),
            "--users", str(users), "--spawn-rate", str(users), "--run-time", f"{round(seconds + warmup_seconds)}s",
            "--warmup-seconds", str(warmup_seconds), "--requests-per-user", str(requests_per_user),
            "--num-classes", str(num_classes),
        ]  # fmt: skip
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if not answers.exists():
            raise SystemExit(f"locust failed: {result.stderr[-3000:]}")
        content = json.loads(answers.read_text())
    responses = Answers(content["seconds"], [tuple(row) for row in content["rows"]])
    if not responses.good:
        raise SystemExit(f"no image from {url}{path}: {responses.statuses} {result.stderr[-3000:]}")
    return responses


@dataclass(frozen=True)
class Overload:
    """Result of an overload test."""

    saturation: float
    """The endpoint's maximum throughput in images per second."""
    answers: Answers
    memory: list[float]
    """Memory of the server's processes over time, in GB."""

    def memory_in_quarter(self, number: int) -> float:
        """Median of one quarter of the memory's samples, 1 to 4."""
        return float(np.median(np.array_split(self.memory, 4)[number - 1]))

    @property
    def memory_growth(self) -> float:
        """Relative growth from the second quarter to the last. Excludes the first, while pools and caches fill."""
        return self.memory_in_quarter(4) / self.memory_in_quarter(2) - 1.0


def overload(generator: Path, seconds: float, topology: str = "one") -> Overload:
    """Measures the endpoint's saturation throughput with 32 users and then sends twice as many requests per second."""
    requests_per_user = 0.25  # low enough that latencies of up to four seconds do not reduce the request rate
    # The queue is short enough (one or two seconds of work) that latencies stay below four seconds.
    with serving([endpoint(generator, max_queued_images=64, topology=topology)]) as server:
        saturation = load(server.url, 32, 10.0).per_second
        users = max(1, round(2.0 * saturation / requests_per_user))
        with sampled_memory(server.pid, max(1.0, seconds / 40)) as memory:
            answers = load(
                server.url, users, seconds, requests_per_user=requests_per_user, warmup_seconds=1.0 / requests_per_user
            )
        return Overload(saturation, answers, memory)
