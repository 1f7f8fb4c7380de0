"""Starts the endpoint: in this process without Ray, or with `serve run`."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import uvicorn
import yaml
from fastapi import FastAPI
from fastapi.testclient import TestClient

from deploy.api.routes import build_http_app
from deploy.api.service import ApiService
from deploy.replica.model_swap import ModelSwapper
from deploy.replica.service import GeneratorService
from deploy.serve import DEPLOYMENTS, fast_path
from deploy.settings import Arguments
from meanflow_core.autoencoder import load_autoencoder
from meanflow_core.generator import build_pipeline, save_generator
from meanflow_core.networks.dit import MeanFlowDiT
from meanflow_core.networks.improved_dit import ImprovedMeanFlowDiT
from meanflow_core.objectives.interface import build_objective
from meanflow_core.presets import PRESETS
from pipelines.demo import images
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER
from pipelines.demo.serving import free_port

WNIDS = [images.wnid(label) for label in range(10)]


def write_generator(
    folder: Path, seed: int = 0, *, supports_guidance: bool = False, preset: str = "demo_meanflow"
) -> Path:
    """Writes a generator of a tiny network with random weights and the demo's autoencoder: 10 classes, 64 pixels.

    preset: its objective decides how the generator samples.
    """
    torch.manual_seed(seed)
    size = {"sample_size": 8, "in_channels": 4, "num_classes": 10, "hidden_size": 48, "num_heads": 3}
    if supports_guidance:
        network = ImprovedMeanFlowDiT(**size, depth=3, aux_head_depth=1).for_sampling()
    else:
        network = MeanFlowDiT(**size, depth=2)
    with torch.no_grad():
        for parameter in network.parameters():
            # More noise for guided networks: with 0.05, even a guidance scale of 50 changes no uint8 pixel by more than 1.
            parameter.add_((0.2 if supports_guidance else 0.05) * torch.randn(parameter.shape))
    vae = load_autoencoder(str(SHIPPED_AUTOENCODER))
    loss = PRESETS[preset]().loss
    pipeline = build_pipeline(
        network.eval(),
        vae,
        images.CLASS_NAMES,
        wnids=WNIDS,
        prediction=loss.prediction,
        scheduler=build_objective(loss).scheduler(),
    )
    save_generator(pipeline, folder)
    return folder


class Recorded:
    """Keeps recorded metrics."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, float, dict]] = []

    def record(self, name: str, value: float = 1.0, tags: Any = None) -> None:
        self.entries.append((name, value, dict(tags or {})))

    def values(self, name: str) -> list[float]:
        return [value for recorded, value, _ in self.entries if recorded == name]


def make_service(arguments: Arguments, recorded: Recorded, **options: Any) -> GeneratorService:
    """The model side of the endpoint, without Ray. options: keyword arguments of ModelSwapper."""
    return GeneratorService(arguments, ModelSwapper(arguments.model, recorded, **options), recorded)


def build_api(arguments: Arguments, generator: GeneratorService) -> FastAPI:
    """The HTTP API, with the model side in the same process."""
    api = ApiService(generator, arguments, Recorded())
    api.reconfigure({})
    return build_http_app(api)


@contextlib.contextmanager
def in_process(arguments: Arguments) -> Iterator[TestClient]:
    """A client of the endpoint in this process, without Ray and sockets."""
    generator = make_service(arguments, Recorded())
    with TestClient(build_api(arguments, generator)) as client:
        client.portal.call(generator.reconfigure, {})
        yield client


@contextlib.contextmanager
def over_http(arguments: Arguments) -> Iterator[str]:
    """The URL of the endpoint in this process, without Ray, on a local port."""
    generator = make_service(arguments, Recorded())
    port = free_port(0)
    server = uvicorn.Server(
        uvicorn.Config(build_api(arguments, generator), host="127.0.0.1", port=port, log_level="error")
    )

    async def serve() -> None:
        await generator.reconfigure({})
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def fetch(
    url: str,
    body: bytes | None = None,
    timeout: float = 60.0,
    key: str | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (names in lower case) and content of one response. HTTP errors are returned, not raised."""
    sent = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {}) | (headers or {})
    request = urllib.request.Request(url, body, sent)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()


@dataclass
class RunningEndpoint:
    """A `serve run` process and its children."""

    url: str
    server: subprocess.Popen
    folder: Path
    config: dict
    dashboard: str
    log: Path
    metrics_port: int

    @property
    def api(self) -> str:
        """The deployment with the HTTP API."""
        return DEPLOYMENTS[self._topology][0]

    @property
    def generator(self) -> str:
        """The deployment with the model."""
        return DEPLOYMENTS[self._topology][-1]

    @property
    def _topology(self) -> str:
        return str(self.config["applications"][0]["args"].get("topology", "one"))

    def processes(self, word: str = "") -> list[psutil.Process]:
        """The descendants of `serve run` with a word in their command lines."""
        found = []
        for process in psutil.Process(self.server.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any(word in part for part in process.cmdline()):
                    found.append(process)
        return found

    def running_replicas(self, deployment: str) -> list[dict]:
        """The replicas of a deployment that receive requests: replica_id, pid and more."""
        applications = json.loads(fetch(f"{self.dashboard}/api/serve/applications/")[2])["applications"]
        replicas = applications["meanflow"]["deployments"][deployment]["replicas"]
        return [replica for replica in replicas if replica["state"] == "RUNNING"]

    def wait_until(self, holds: Callable[[int, bytes], object], seconds: float = 120.0) -> None:
        """Polls /readyz until `holds(status, content)` is true."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.server.poll() is None, self.log.read_text()[-4000:]
            with contextlib.suppress(OSError):
                status, _, content = fetch(f"{self.url}/readyz", timeout=10.0)
                if holds(status, content):
                    return
            time.sleep(0.2)
        raise AssertionError(f"not within {seconds} s; the log ends with {self.log.read_text()[-4000:]}")

    def deploy(self, config: dict) -> None:
        """Applies another configuration through the API that `serve deploy` calls."""
        headers = {"content-type": "application/json"}
        url = f"{self.dashboard}/api/serve/applications/"
        request = urllib.request.Request(url, json.dumps(config).encode(), headers, method="PUT")
        urllib.request.urlopen(request, timeout=60).close()


def _stop(endpoint: RunningEndpoint) -> None:
    """Stops `serve run`, and kills the processes that outlive it."""
    processes = endpoint.processes()
    endpoint.server.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        endpoint.server.wait(timeout=60)
    _, alive = psutil.wait_procs(processes, timeout=20)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    endpoint.server.kill()


@contextlib.contextmanager
def running_endpoint(arguments: dict | None = None, deployments: list[dict] | None = None) -> Iterator[RunningEndpoint]:
    """Starts the endpoint by `serve run`, on its own Ray cluster, and stops every process on exit.

    Without a model, it serves a new generator with random weights.
    """
    folder = Path(tempfile.mkdtemp(prefix="mfe-", dir="/tmp"))  # Unix sockets require short paths
    arguments = arguments or {}
    if "model" not in arguments:
        arguments["model"] = str(write_generator(folder / "generator"))
    port, dashboard_port, metrics_port = free_port(0), free_port(0), free_port(0)
    application = {
        "name": "meanflow", "route_prefix": "/", "import_path": "deploy.app:build_app", "args": arguments,
        "deployments": deployments or [],
    }  # fmt: skip
    config = {
        "proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": port}, "applications": [application],
    }  # fmt: skip
    path, log = folder / "serve.yaml", folder / "log"
    path.write_text(yaml.safe_dump(config))
    environment = {
        **os.environ,
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    environment |= fast_path(folder, environment)
    # `ray.init` starts a head on the chosen ports; `serve run` joins it.
    program = (
        "import ray, sys; "
        f"ray.init(num_cpus=4, include_dashboard=True, dashboard_port={dashboard_port}, "
        f"_metrics_export_port={metrics_port}, object_store_memory=150 * 2**20, log_to_driver=True); "
        f"sys.argv = ['serve', 'run', {str(path)!r}]; "
        "from ray.serve.scripts import cli; cli()"
    )
    with open(log, "wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-c", program], cwd=folder, env=environment, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    running = RunningEndpoint(
        f"http://127.0.0.1:{port}", server, folder, config, f"http://127.0.0.1:{dashboard_port}", log,
        metrics_port,
    )  # fmt: skip
    try:
        running.wait_until(lambda status, _: status == 200)
        yield running
    finally:
        _stop(running)
        shutil.rmtree(folder, ignore_errors=True)
