"""Runs the demo's stages one after another and reports their results."""

import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines import storage
from pipelines.cluster import FAST_MALLOC
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER
from pipelines.demo.job import Demo
from pipelines.demo.judge import SHIPPED_JUDGE
from pipelines.demo.processes import Processes, adopt_orphans
from pipelines.demo.serving import free_port, serve_and_request
from pipelines.errors import InputError

MARKER = ".meanflow-demo"
LOGS = "logs"
STAGES = {
    "data": "drawn images of ten classes",
    "encode": "images to latents",
    "train": "latents to a generator",
    "evaluate": "samples, measured with a judge",
    "serve": "images over HTTP",
}


@dataclass(frozen=True)
class StageResult:
    """A row of the summary table."""

    stage: str
    seconds: float
    result: str
    location: str


def prepare_work(work: Path) -> None:
    """Makes an empty work folder. Raises InputError if it holds anything other than an earlier demo."""
    storage.output_location(str(work), "--work")
    if work.is_dir() and any(work.iterdir()) and not (work / MARKER).is_file():
        raise InputError(f"--work {work} holds something other than an earlier demo; choose an empty or a new folder")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / MARKER).touch()


def run_stages(demo: Demo, processes: Processes) -> dict:
    """Runs the stages one after another, prints their summary, and returns the report."""
    work = demo.work.absolute()
    num_workers = demo.num_workers or torch.cuda.device_count() or 2
    results: list[StageResult] = []
    tracking_uri = f"sqlite:///{work}/runs/mlflow.db"
    candidate, model = (f"models:/meanflow-{demo.preset}@{alias}" for alias in ("candidate", "champion"))

    def stage(name: str, run: Callable[[], object], result: Callable[[], str], location: Path) -> None:
        print(f"{len(results) + 1} of {len(STAGES)}: {name}, {STAGES[name]}", flush=True)
        started = time.monotonic()
        run()
        found = StageResult(name, time.monotonic() - started, result(), os.path.relpath(location))
        results.append(found)
        print(f"  {found.result}: {found.location}, {found.seconds:.0f} s", flush=True)

    def command(name: str, module: str, *arguments: str) -> Callable[[], object]:
        return lambda: processes.run(name, [sys.executable, "-m", module, *arguments])

    print(
        f"{len(STAGES)} stages, about 13 minutes on two CPU cores; their logs are in {os.path.relpath(work / LOGS)}",
        flush=True,
    )

    images, latents, report_folder = work / "images", work / "latents", work / "report"
    stage(
        "data",
        command("data", "pipelines.demo.images", "--output", str(images),
                "--num-train", str(demo.num_train), "--num-val", str(demo.num_val)),
        lambda: f"{demo.num_train + demo.num_val} synthetic JPEGs of 10 classes",
        images,
    )  # fmt: skip
    stage(
        "encode",
        command("encode", "pipelines.encode", "--images", str(images / "train"), "--output", str(latents),
                "--vae", str(SHIPPED_AUTOENCODER), "--image-size", "64"),
        lambda: f"{json.loads((latents / 'manifest.json').read_text())['num_samples']} latents and their mirror images",
        latents,
    )  # fmt: skip
    stage(
        "train",
        command("train", "pipelines.train", demo.preset, "--data", str(latents), "--storage", str(work / "runs"),
                "--run-name", "demo", "--num-workers", str(num_workers), "--cache-dir", str(work / "cache")),
        lambda: f"a generator, registered as {candidate}",
        work / "runs" / "demo" / "generator",
    )  # fmt: skip
    stage(
        "evaluate",
        command("evaluate", "pipelines.evaluate", "--model", candidate, "--promote", "--tracking-uri", tracking_uri,
                "--extractor", str(SHIPPED_JUDGE),
                "--train-images", str(images / "train"), "--held-out-images", str(images / "val"),
                "--output", str(report_folder), "--num-samples", str(demo.num_samples), "--labels", "balanced",
                "--steps", *(str(steps) for steps in demo.steps)),
        lambda: "table, grid, plot",
        report_folder,
    )  # fmt: skip
    served: list[str] = []
    stage(
        "serve",
        lambda: served.append(serve_and_request(work, demo.port, processes, model, tracking_uri)),
        lambda: served[0],
        work / "served.png",
    )

    return report_demo(work, results, tracking_uri)


def report_demo(work: Path, results: list[StageResult], tracking_uri: str) -> dict:
    """Writes samples.png and report.json into the work folder, prints the summary, and returns the report."""
    report_folder = work / "report"
    shutil.copy(report_folder / "samples.png", work / "samples.png")
    report = summarize(json.loads((report_folder / "report.json").read_text()), results)
    (work / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print()
    print((report_folder / "table.md").read_text())
    print(summary_table(results))
    print(f"\nsamples: {os.path.relpath(work / 'samples.png')}    report: {os.path.relpath(work / 'report.json')}")
    print(f"runs:    mlflow ui --backend-store-uri {tracking_uri}")
    print(f"serve:   meanflow serve {os.path.relpath(work / 'runs' / 'demo' / 'generator')}")
    return report


def summarize(evaluation: dict, results: list[StageResult]) -> dict:
    """The demo's report: main figures of the evaluation, and seconds of each stage."""
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


def summary_table(results: list[StageResult]) -> str:
    """A table of the stages with their seconds, results and locations."""
    total = StageResult("all", sum(result.seconds for result in results), "", "")
    rows = [("stage", "seconds", "result", "location")]
    rows += [(result.stage, f"{result.seconds:.1f}", result.result, result.location) for result in [*results, total]]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def run_demo(demo: Demo) -> None:
    """Runs the demo, and always ends all of its processes. Raises InputError if the port or the folder is taken."""
    if demo.port:
        free_port(demo.port)
    prepare_work(demo.work)
    # A shell starts background jobs with SIGINT ignored, and child processes would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # so that `finally` runs
    # Paths of Unix sockets are limited to about 100 characters, so Ray's files cannot be in --work.
    ray_folder = tempfile.mkdtemp(prefix="mfr-", dir="/tmp")
    inherited = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    processes = Processes(
        {
            **inherited,
            **FAST_MALLOC,
            "RAY_TMPDIR": ray_folder,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),  # keeps Ray from writing a token file to the home folder
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONUNBUFFERED": "1",
        },
        demo.work.absolute() / LOGS,
    )
    adopt_orphans()
    try:
        run_stages(demo, processes)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # a second interrupt must not stop the cleanup
        processes.end_all()
        shutil.rmtree(ray_folder, ignore_errors=True)
