"""Servers on free ports, locust's load on them, and what happens above saturation; for the benchmark and the soak test."""

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch
import yaml

from meanflow_core.autoencoder import load_autoencoder
from meanflow_core.generator import build_pipeline, save_generator
from meanflow_core.networks import build_network
from meanflow_core.presets import demo
from pipelines.cluster import FAST_MALLOC
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER
from pipelines.demo.images import CLASS_NAMES
from pipelines.demo.serving import free_port

REPOSITORY = Path(__file__).parents[2]
BODY = {"class": 1, "seed": 1}


def write_small(folder: Path) -> Path:
    """A generator of the demo's size and random weights, 64 px."""
    torch.manual_seed(0)
    network = build_network(demo().network, sample_size=8, in_channels=4, num_classes=10).eval()
    save_generator(build_pipeline(network, load_autoencoder(str(SHIPPED_AUTOENCODER)), CLASS_NAMES), folder)
    return folder


@dataclass(frozen=True)
class Server:
    """A server that answers at url; pid is the first of its processes."""

    url: str
    pid: int


def post(url: str, body: dict) -> bytes:
    """The answer to a JSON body. Raises OSError unless it is a 200."""
    headers = {"content-type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=600) as answer:
        return answer.read()


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str], port: int, paths: list[str]) -> Iterator[Server]:
    """A server's processes, once every path answers; ended by pid at the end, all of them."""
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


def _wait_until_answered(url: str, process: subprocess.Popen, log: object, patience_seconds: float = 240.0) -> None:
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            post(url, BODY)
            return
        except OSError as error:
            if process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.5)
                continue
            said = error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else error
            log.seek(0)
            raise SystemExit(f"{url} does not answer: {said}\n{log.read()[-6000:]}") from error


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        everyone = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)
        for left in psutil.wait_procs(everyone, timeout=20)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
    process.kill()
    process.wait()


def serve_config(port: int, applications: list[dict]) -> dict:
    """deploy/serve.yaml, the settings of HTTP and logging included, with other applications.

    applications: of each its name, route_prefix, import_path and args.
    """
    config = yaml.safe_load((REPOSITORY / "deploy" / "serve.yaml").read_text())
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    template = {key: value for key, value in config["applications"][0].items() if key not in ("args", "deployments")}
    config["applications"] = [{**template, **application} for application in applications]
    return config


@contextlib.contextmanager
def serving(applications: list[dict]) -> Iterator[Server]:
    """A Ray of its own that serves applications (as in serve_config), once all of them answer /generate."""
    folder = tempfile.mkdtemp(prefix="mfs-", dir="/tmp")  # Unix sockets want short paths
    port = free_port(0)
    config = Path(folder, "serve.yaml")
    config.write_text(yaml.safe_dump(serve_config(port, applications)))
    environment = {
        "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": folder,
        "RAY_worker_niceness": "0",  # Ray's 15 lets the load, and all else on the machine, go before the replicas
    }  # fmt: skip
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(config)]
    paths = [f"{application['route_prefix'].rstrip('/')}/generate" for application in applications]
    try:
        with running(command, environment, port, paths) as server:
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def endpoint(generator: Path, **settings: object) -> dict:
    """Our application, for `serving`. settings: arguments of deploy.app:build_app."""
    return {
        "name": "meanflow", "route_prefix": "/", "import_path": "deploy.app:build_app",
        "args": {"model": str(generator), **settings},
        # In Ray's books alone: all share two cores, which a generator of two threads has to itself.
        "deployments": [{"name": "Api", "ray_actor_options": {"num_cpus": 0}}],
    }  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """What locust saw after its warm-up: rows of (second, status or error's name, milliseconds, bytes)."""

    seconds: float
    rows: list[tuple[float, str, float, int]]

    @property
    def good(self) -> list[tuple[float, str, float, int]]:
        """Those with status 200."""
        return [row for row in self.rows if row[1] == "200"]

    @property
    def statuses(self) -> dict[str, int]:
        """How many of each kind."""
        return dict(Counter(row[1] for row in self.rows))

    @property
    def per_second(self) -> float:
        """Images, where many come in a second."""
        return len(self.good) / self.seconds

    @property
    def per_second_by_batches(self) -> float:
        """Images, where few batches come: from the end of the first batch that was seen to the end of the last."""
        ends = sorted(row[0] for row in self.good)
        gaps = np.diff(ends)
        batch_ends = [*np.flatnonzero(gaps > gaps.max() / 2), len(ends) - 1]
        first, last = batch_ends[0], batch_ends[-1]
        return float((last - first) / (ends[last] - ends[first]))

    def milliseconds(self, percentile: float) -> float:
        """Latency of the 200s."""
        return float(np.percentile([row[2] for row in self.good], percentile))


def load(
    url: str, users: int, seconds: float, *, path: str = "/generate", warmup_seconds: float = 2.0,
    requests_per_user: float = 0.0, num_classes: int = 10,
) -> Answers:  # fmt: skip
    """Locust's users against a server, for so long after the warm-up. requests_per_user: a second; 0 is a closed loop."""
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
    seen = Answers(content["seconds"], [tuple(row) for row in content["rows"]])
    if not seen.good:
        raise SystemExit(f"no image came from {url}{path}: {seen.statuses} {result.stderr[-3000:]}")
    return seen


def family_megabytes(pid: int) -> float:
    """Sum of PSS over a process and its descendants: pages that several share are counted once."""
    total = 0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total / 1e6


@dataclass
class MemoryLog:
    """Megabytes of a server's processes, while a block runs."""

    pid: int
    samples: list[tuple[float, float]] = field(default_factory=list)

    @contextlib.contextmanager
    def watch(self, interval_seconds: float) -> Iterator[None]:
        """Samples (second, megabytes) until the block ends."""
        stop, began = threading.Event(), time.monotonic()

        def sample() -> None:
            while not stop.wait(interval_seconds):
                self.samples.append((time.monotonic() - began, family_megabytes(self.pid)))

        watcher = threading.Thread(target=sample)
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()

    def quarter(self, number: int) -> float:
        """Median of one quarter, from 1, of the samples."""
        length = len(self.samples) / 4
        chosen = self.samples[int((number - 1) * length) : max(int(number * length), int((number - 1) * length) + 1)]
        return statistics.median(megabytes for _, megabytes in chosen)

    @property
    def growth(self) -> float:
        """Of the last quarter over the second, as a fraction: the first still fills pools and caches."""
        return self.quarter(4) / self.quarter(2) - 1.0


@dataclass(frozen=True)
class Overload:
    """An endpoint under more than it can do."""

    saturation: float
    answers: Answers
    memory: MemoryLog

    @property
    def num_others(self) -> int:
        """Answers that are neither an image nor a 429."""
        return sum(count for status, count in self.answers.statuses.items() if status not in ("200", "429"))


def overload(
    generator: Path,
    seconds: float,
    *,
    factor: float = 2.0,
    saturation_seconds: float = 10.0,
    saturation_users: int = 32,
) -> Overload:
    """Starts the endpoint, finds its saturation, and sends `factor` times as much for so long, answers or none."""
    requests_per_user = 0.25  # so that a user whose answer takes up to four seconds still keeps its rate
    # A queue of a second or two: behind a longer one those users would wait, and ask for less than was meant.
    with serving([endpoint(generator, max_queued_images=64)]) as server:
        saturation = load(server.url, saturation_users, saturation_seconds).per_second
        users = max(1, round(factor * saturation / requests_per_user))
        memory = MemoryLog(server.pid)
        with memory.watch(max(1.0, seconds / 40)):
            answers = load(
                server.url, users, seconds, requests_per_user=requests_per_user, warmup_seconds=1.0 / requests_per_user
            )
        return Overload(saturation, answers, memory)
