"""The whole pipeline on a laptop: draws the demo's images, then runs encode, train, evaluate and serve.

Each stage is a process of its own, started by the command that the README documents. Everything lies under --work,
which is made anew; when this ends, however it ends, no process of it is left.
"""

import contextlib
import ctypes
import json
import logging
import os
import random
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import yaml

from pipelines import storage
from pipelines.cluster import FAST_MALLOC
from pipelines.command_line import parse_command_line, run_command
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER
from pipelines.demo.judge import SHIPPED_JUDGE
from pipelines.errors import InputError

logger = logging.getLogger(__name__)

SERVE_CONFIG = Path(__file__).parents[2] / "deploy" / "serve.yaml"  # beside this package, in a checkout and installed
MARKER = ".meanflow-demo"
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The demo's sizes and places."""

    work: Path = Path("build/demo")
    """Folder for everything that the demo makes; an earlier demo's is replaced."""
    preset: str = "demo"
    """Training preset."""
    num_train: int = 8000
    """Training images to draw."""
    num_val: int = 1000
    """Held-out images to draw."""
    num_samples: int = 1000
    """Samples to measure."""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of sampling steps to evaluate."""
    num_workers: int | None = None
    """Training processes; one per GPU unless given, or two on a machine without."""
    port: int = 0
    """Port of the endpoint on 127.0.0.1; 0 takes a free one."""


@dataclass(frozen=True)
class StageResult:
    """A line of the closing table."""

    stage: str
    seconds: float
    made: str
    where: str


# Above the ports of Ray's workers, below those that systems give to whoever names none, as most of Ray's processes do.
ANY_PORT = range(20_000, 32_768)


def free_port(wanted: int) -> int:
    """A port that nothing listens on, on 127.0.0.1; for 0, one that nothing else will soon take by chance.

    Raises InputError where the wanted one is taken.
    """
    candidates = random.SystemRandom().sample(ANY_PORT, 100) if wanted == 0 else [wanted]
    for port in candidates:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError as error:
                refused = error
    raise InputError(f"port {candidates[-1]} on 127.0.0.1 is in use; choose another --port, or 0 for any") from refused


def prepare_work(work: Path) -> None:
    """An empty work folder. Raises InputError where something else than an earlier demo is in the way."""
    storage.output_location(str(work), "--work")
    if work.is_dir() and any(work.iterdir()) and not (work / MARKER).is_file():
        raise InputError(f"--work {work} holds something else than an earlier demo; name an empty or a new folder")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / MARKER).touch()


def adopt_orphans() -> None:
    """Makes this process the parent of its descendants' orphans (Linux), so that they can be ended by pid."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class Processes:
    """Runs commands, and leaves none of their descendants behind.

    Ray's daemons outlive the process that started them by design; after `adopt_orphans` they are found below this one.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment

    def start(self, command: list[str]) -> subprocess.Popen:
        """Starts a command in a session of its own, so that a terminal's interrupt reaches this process first."""
        logger.info("$ %s", shlex.join(command))
        return subprocess.Popen(command, env=self._environment, start_new_session=True)

    def run(self, command: list[str]) -> None:
        """Runs a command to its end. Raises InputError where it fails."""
        process = self.start(command)
        if process.wait() != 0:
            raise InputError(f"`{shlex.join(command)}` ended with exit code {process.returncode}; its output is above")
        self.end_all()

    def end_all(self, patience_seconds: float = 5.0) -> None:
        """Interrupts whatever still runs below this process, and kills what does not go."""
        for signal_number, patience in ((signal.SIGTERM, patience_seconds), (signal.SIGKILL, 5.0)):
            remaining = psutil.Process().children(recursive=True)
            for process in remaining:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal_number)
            _, alive = psutil.wait_procs(remaining, timeout=patience)
            if not alive and not psutil.Process().children(recursive=True):
                return


def fetch(url: str, body: dict | None = None, timeout: float = 30.0) -> tuple[int, str, bytes]:
    """One HTTP request: status, content type and body, also of an error answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return response.status, response.headers.get_content_type(), response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get_content_type(), error.read()


def wait_until_healthy(url: str, server: subprocess.Popen, patience_seconds: float = 180.0) -> None:
    """Waits for /readyz. Raises InputError where the server ends or does not answer in time."""
    began = time.monotonic()
    while time.monotonic() - began < patience_seconds:
        if server.poll() is not None:
            raise InputError(f"serve ended with exit code {server.returncode} before it answered; its output is above")
        try:
            if fetch(f"{url}/readyz", timeout=5.0)[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise InputError(f"{url}/readyz did not answer within {patience_seconds:.0f} s")


def serve_and_ask(demo: Demo, processes: Processes, model: str, tracking_uri: str) -> str:
    """Serves the model, asks for an image, checks the answer, stops the server; says what happened."""
    port = free_port(demo.port)
    config = yaml.safe_load(SERVE_CONFIG.read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    config["applications"][0]["args"] = {"model": model, "tracking_uri": tracking_uri}  # a GPU, if any, unreserved
    config_path = demo.work.absolute() / "serve.yaml"
    config_path.write_text(yaml.safe_dump(config))
    server = processes.start([str(Path(sys.executable).with_name("serve")), "run", str(config_path)])
    url = f"http://127.0.0.1:{port}"
    wait_until_healthy(url, server)
    body = {"class": "star", "seed": 7, "num_images": 4}
    fetch(f"{url}/generate", body)
    began = time.perf_counter()
    status, content_type, content = fetch(f"{url}/generate", body)
    milliseconds = 1000.0 * (time.perf_counter() - began)
    if (status, content_type) != (200, "image/png"):
        raise InputError(f"POST /generate answered {status} {content_type}: {content[:300]!r}")
    (demo.work / "served.png").write_bytes(content)
    refused, _, message = fetch(f"{url}/generate", {**body, "class": "unicorn"})
    logger.info("POST %s/generate %s: 4 images in %.0f ms", url, json.dumps(body), milliseconds)
    logger.info("the same with class unicorn: %d %s", refused, message.decode())
    server.send_signal(signal.SIGINT)
    try:
        server.wait(timeout=60)
    except subprocess.TimeoutExpired as error:
        raise InputError("serve did not stop within 60 s of an interrupt") from error
    processes.end_all()
    return f"4 stars over HTTP in {milliseconds:.0f} ms"


def run_stages(demo: Demo, processes: Processes) -> dict:
    """Runs the stages in a row, prints the closing table, and returns the report."""
    work = demo.work.absolute()
    python = [sys.executable, "-m"]
    num_workers = demo.num_workers or torch.cuda.device_count() or 2
    results: list[StageResult] = []
    tracking_uri = f"sqlite:///{work}/runs/mlflow.db"
    model = f"models:/meanflow-{demo.preset}@champion"

    def stage(name: str, run: Callable[[], object], made: Callable[[], str], where: Path) -> None:
        logger.info("--- %s", name)
        began = time.monotonic()
        run()
        results.append(StageResult(name, time.monotonic() - began, made(), os.path.relpath(where)))

    def command(*arguments: str) -> Callable[[], object]:
        return lambda: processes.run(python + list(arguments))

    images, latents, report_folder = work / "images", work / "latents", work / "report"
    stage(
        "data",
        command("pipelines.demo.images", "--output", str(images),
                "--num-train", str(demo.num_train), "--num-val", str(demo.num_val)),
        lambda: f"{demo.num_train + demo.num_val} drawn JPEGs of 10 classes",
        images,
    )  # fmt: skip
    stage(
        "encode",
        command("pipelines.encode", "--images", str(images / "train"), "--output", str(latents),
                "--vae", str(SHIPPED_AUTOENCODER), "--image-size", "64"),
        lambda: f"{json.loads((latents / 'manifest.json').read_text())['num_samples']} latents and their mirror images",
        latents,
    )  # fmt: skip
    stage(
        "train",
        command("pipelines.train", demo.preset, "--data", str(latents), "--storage", str(work / "runs"),
                "--run-name", "demo", "--num-workers", str(num_workers), "--cache-dir", str(work / "cache")),
        lambda: f"a generator, registered as {model}",
        work / "runs" / "demo" / "generator",
    )  # fmt: skip
    stage(
        "evaluate",
        command("pipelines.evaluate", "--model", model, "--tracking-uri", tracking_uri,
                "--train-images", str(images / "train"), "--held-out-images", str(images / "val"),
                "--extractor", str(SHIPPED_JUDGE),
                "--output", str(report_folder), "--num-samples", str(demo.num_samples),
                "--steps", *(str(steps) for steps in demo.steps)),
        lambda: "table, grid, plot",
        report_folder,
    )  # fmt: skip
    served: list[str] = []
    stage(
        "serve",
        lambda: served.append(serve_and_ask(demo, processes, model, tracking_uri)),
        lambda: served[0],
        work / "served.png",
    )

    shutil.copy(report_folder / "samples.png", work / "samples.png")
    report = summarize(json.loads((report_folder / "report.json").read_text()), results)
    (work / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print()
    print((report_folder / "table.md").read_text())
    print(closing_table(results))
    print(f"\nsamples: {os.path.relpath(work / 'samples.png')}    report: {os.path.relpath(work / 'report.json')}")
    print(f"runs:    mlflow ui --backend-store-uri {tracking_uri}")
    return report


def summarize(evaluation: dict, results: list[StageResult]) -> dict:
    """The demo's report: the evaluation's main figures and the seconds of each stage."""
    samples = {entry["num_steps"]: entry for entry in evaluation["samples"]}
    return {
        "stage_seconds": {result.stage: round(result.seconds, 1) for result in results},
        "autoencoder_psnr": evaluation["autoencoder_psnr"],
        "real_accuracy": evaluation["held_out"]["accuracy"],
        "one_step_accuracy": samples[1]["accuracy"],
        "frechet_floor": evaluation["held_out"]["frechet"],
        "frechet_reconstruction": evaluation["reconstruction"]["frechet"],
        "frechet_one_step": samples[1]["frechet"],
        "diversity": samples[1]["diversity"],
        "nearest_train_ratio": samples[1]["nearest_train_ratio"],
        "by_steps": evaluation["samples"],
    }


def closing_table(results: list[StageResult]) -> str:
    """Stage, seconds, what it made, where it lies."""
    total = StageResult("all", sum(result.seconds for result in results), "", "")
    rows = [("stage", "seconds", "made", "where")]
    rows += [(result.stage, f"{result.seconds:.1f}", result.made, result.where) for result in [*results, total]]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main() -> None:
    """The command."""
    demo = parse_command_line(Demo, __doc__)
    if 1 not in demo.steps:
        raise InputError(f"--steps must hold 1, for the report is about one step, but got {demo.steps}")
    if demo.port:
        free_port(demo.port)
    prepare_work(demo.work)
    # A shell's background job begins with interrupts ignored, and would hand that down to the stages.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for end in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(end, lambda number, _: sys.exit(128 + number))  # as an interrupt: through the `finally` below
    # Unix sockets allow some 100 characters of path, so Ray's files cannot lie under --work.
    ray_folder = tempfile.mkdtemp(prefix="mfr-", dir="/tmp")
    inherited = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    processes = Processes(
        {
            **inherited,
            **FAST_MALLOC,
            "RAY_TMPDIR": ray_folder,
            # Ray's own authentication, without a file in the home folder.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONUNBUFFERED": "1",
        }
    )
    adopt_orphans()
    try:
        run_stages(demo, processes)
    finally:
        for end in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(end, signal.SIG_IGN)  # a second interrupt must not leave the work of the first half done
        processes.end_all()
        shutil.rmtree(ray_folder, ignore_errors=True)


if __name__ == "__main__":
    run_command(main)
