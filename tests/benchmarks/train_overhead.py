"""Overhead of the trainer compared with a bare training loop.

    python tests/benchmarks/train_overhead.py --json train_overhead.json

The trainer is `python -m pipelines.train demo` with one worker and, by default, one thread: it prepares the batches of every
step, uses DDP, updates the moving average, logs metrics to MLflow (SQLite) every 25 steps, logs system metrics, and saves a
checkpoint every 200 steps. Its seconds per step are the mean from the first logged metrics (step 25) to the last. The bare
loop has as many threads and runs only network, loss, backward and Adam, on prepared batches. The two run in turns.
With --threads 2 on two cores, Ray's own processes compete with the training for the cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from _harness import main
from mlflow import MlflowClient

from meanflow_core.autoencoder import load_autoencoder
from meanflow_core.latents import LatentNormalization
from meanflow_core.presets.demo import demo
from meanflow_core.training import build_train_state, train_step
from pipelines.demo import images
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER
from pipelines.latents.cache import open_latents
from pipelines.tracking.run import Run
from pipelines.train.batches import BatchSource
from pipelines.training.record import TRAINING_RECORD

INTERVAL, CHECKPOINT_INTERVAL = 25, 200


def make_latents(folder: Path, count: int) -> Path:
    """Encodes demo images."""
    images.write_folder(folder / "images", num_train=count, num_val=10)
    subprocess.run(
        [sys.executable, "-m", "pipelines.encode", "--images", str(folder / "images/train"), "--output",
         str(folder / "latents"), "--vae", str(SHIPPED_AUTOENCODER), "--image-size", "64"],
        check=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return folder / "latents"


class BareLoop:
    """Training steps alone, on prepared batches."""

    def __init__(self, latents: Path, folder: Path, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._config = replace(demo(), num_steps=10**6)
        dataset = open_latents(str(latents), str(folder / "cache"))
        device = torch.device("cpu")
        source = BatchSource(dataset, self._config, rank=0, world_size=1, device=device)
        self._batches = [source.batches(step) for step in range(16)]
        self._state = build_train_state(self._config, sample_size=8, in_channels=4, num_classes=10, device=device)
        self._state.ema_networks = {}
        self._normalization = LatentNormalization.from_vae_config(load_autoencoder(str(SHIPPED_AUTOENCODER)).config)

    def seconds_per_step(self, num_steps: int) -> float:
        """Takes `num_steps` steps; returns their mean duration."""
        began = time.perf_counter()
        for step in range(num_steps):
            batches = self._batches[step % len(self._batches)]
            train_step(self._state, self._state.network, batches, self._normalization, self._config)
        return (time.perf_counter() - began) / num_steps


def train(latents: Path, folder: Path, name: str, num_steps: int, num_threads: int) -> float:
    """Runs the trainer; returns its seconds per step."""
    subprocess.run(
        [sys.executable, "-m", "pipelines.train", "demo", "--data", str(latents), "--storage", str(folder / "runs"),
         "--run-name", name, "--num-workers", "1", "--cpu-threads", str(num_threads), "--cache-dir", str(folder / "cache"),
         "--num-steps", str(num_steps), "--log-interval-steps", str(INTERVAL),
         "--checkpoint-interval-steps", str(CHECKPOINT_INTERVAL), "--sample-interval-steps", "100000"],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    run_id = json.loads((folder / "runs" / name / TRAINING_RECORD).read_text())["mlflow_run_id"]
    rows = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db").get_metric_history(run_id, "loss")
    first, last = rows[0], rows[-1]
    return (last.timestamp - first.timestamp) / 1000.0 / (last.step - first.step)


def logging_microseconds(folder: Path, num_calls: int = 200) -> float:
    """Median duration of a call that logs the metrics of an interval."""
    run = Run.begin(f"sqlite:///{folder}/logging.db", "logging", "logging", {})
    seconds = []
    for step in range(num_calls):
        began = time.perf_counter()
        run.log_metrics({f"metric_{index}": float(step) for index in range(15)}, step)
        seconds.append(time.perf_counter() - began)
        time.sleep(0.005)
    run.end("FINISHED")
    return statistics.median(seconds) * 1e6


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Medians over the repetitions."""
    num_steps = 2 * CHECKPOINT_INTERVAL + INTERVAL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        latents = make_latents(folder, 1000)
        bare = BareLoop(latents, folder, arguments.threads)
        bare.seconds_per_step(20)
        loops, runs = [bare.seconds_per_step(100)], []
        for repeat in range(arguments.repeats):
            runs.append(train(latents, folder, f"run-{repeat}", num_steps, arguments.threads))
            loops.append(bare.seconds_per_step(100))
            print(f"repetition {repeat + 1} of {arguments.repeats}: trainer {runs[-1]:.4f} s per step, "
                  f"bare loop {loops[-1]:.4f}", file=sys.stderr)  # fmt: skip
        microseconds = logging_microseconds(folder)
    loop, run = statistics.median(loops), statistics.median(runs)
    return {
        "trainer_steps_per_second": 1.0 / run,
        "bare_loop_steps_per_second": 1.0 / loop,
        "trainer_over_bare_loop": loop / run,  # ratio of speeds, not of durations
        "spread_of_bare_loop": float(np.ptp(loops) / loop),
        "logging_call_microseconds": microseconds,
        "logging_share_of_a_step": microseconds * 1e-6 / INTERVAL / run,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of trainer and bare loop")
    parser.add_argument("--threads", type=int, default=1, help="compute threads of both")
    main(measure, {"trainer_over_bare_loop": (">=", 0.93)}, parser)
