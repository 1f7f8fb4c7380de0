"""Helpers of the benchmarks: command line, interleaved timing, memory sampling, running a stage, JSON results."""

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved_medians(functions: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each function. Calls are interleaved (A B A B), so that drift affects all functions equally."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    started = time.perf_counter()
    for round_index in range(warmup + rounds):
        if round_index:
            left = (time.perf_counter() - started) / round_index * (warmup + rounds - round_index)
            print(f"round {round_index + 1} of {warmup + rounds}, about {left:.0f} s left", file=sys.stderr)
        for name, function in functions.items():
            synchronize()
            function_started = time.perf_counter()
            function()
            synchronize()
            if round_index >= warmup:
                seconds[name].append(time.perf_counter() - function_started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def process_tree_gigabytes(pid: int) -> float:
    """Total PSS of a process and its descendants, in GB. PSS counts pages shared by several processes only once."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total / 1e9


@contextlib.contextmanager
def sampled_memory(pid: int, interval_seconds: float) -> Iterator[list[float]]:
    """Yields a list that receives process_tree_gigabytes(pid) in every interval until the `with` block ends."""
    samples: list[float] = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(interval_seconds):
            samples.append(process_tree_gigabytes(pid))

    watcher = threading.Thread(target=sample)
    watcher.start()
    try:
        yield samples
    finally:
        stop.set()
        watcher.join()


def write_demo_generator(folder: Path) -> Path:
    """Writes a generator of 64x64 images with the demo preset's network and random weights."""
    # Imported here, because other benchmarks need neither diffusers nor the demo.
    from meanflow_core.autoencoder import load_autoencoder
    from meanflow_core.generator import build_pipeline, save_generator
    from meanflow_core.networks.building import build_network
    from meanflow_core.presets.demo import demo
    from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER
    from pipelines.demo.images import CLASS_NAMES

    torch.manual_seed(0)
    network = build_network(demo().network, sample_size=8, in_channels=4, num_classes=10).eval()
    save_generator(build_pipeline(network, load_autoencoder(str(SHIPPED_AUTOENCODER)), CLASS_NAMES), folder)
    return folder


# Runs a stage's own command, logs every progress message, and limits the object store.
LAUNCHER = """
import functools, importlib, sys, ray
from pipelines.command_line import run_command
stage, progress = (importlib.import_module(name) for name in sys.argv[1:3])
progress.Progress = functools.partial(progress.Progress, interval_seconds=0.0)
ray.init = functools.partial(ray.init, object_store_memory=300 * 2**20)
sys.argv[:3] = [stage.__name__]
run_command(stage.main)
"""


def run_stage(
    module: str, progress_module: str, verb: str, arguments: list[str], peak: list[float] | None = None
) -> list[tuple[float, int]]:
    """Runs a stage as a job; returns (time, number of images) for each progress line "VERB 512 of 9000 images, ...".

    progress_module: the module whose Progress logs these lines. peak: receives the peak memory of the job, in GB.
    """
    from pipelines.cluster import FAST_MALLOC  # imported here, because other benchmarks run without Ray

    ray_folder = tempfile.mkdtemp(prefix="mfb-", dir="/tmp")
    environment = {
        **os.environ, **FAST_MALLOC, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": ray_folder, "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    job = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, module, progress_module, *arguments],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert job.stderr is not None
    progress, lines = [], []
    # Without `peak`, memory is not read, because reading PSS slows the job down.
    with contextlib.nullcontext([]) if peak is None else sampled_memory(job.pid, 0.5) as memory:
        for line in job.stderr:
            lines.append(line)
            if match := re.search(rf"{verb} (\d+) of", line):
                progress.append((time.monotonic(), int(match[1])))
    if peak is not None:
        peak.append(max(memory))
    if job.wait() != 0:
        raise SystemExit("".join(lines[-30:]))
    shutil.rmtree(ray_folder, ignore_errors=True)
    return progress


def machine() -> dict[str, object]:
    """Hardware and software versions, reported with the results."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main(
    measure: Callable[[argparse.Namespace], dict[str, float]],
    bounds: dict[str, tuple[str, float]],
    parser: argparse.ArgumentParser | None = None,
) -> None:
    """Runs `measure`, prints its results with their bounds, writes them as JSON and exits with 1 if a bound is missed.

    bounds: {name of a result: (">=" or "<=", bound)}.
    """
    parser = parser or argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, required=True, help="output file for the results")
    arguments = parser.parse_args()
    figures = measure(arguments)
    is_any_missed = False
    for name, value in figures.items():
        verdict = ""
        if name in bounds:
            relation, bound = bounds[name]
            holds = value <= bound if relation == "<=" else value >= bound
            is_any_missed |= not holds
            verdict = f"   must be {relation} {bound:g}: {'holds' if holds else 'MISSED'}"
        print(f"{name:48s} {value:10.4g}{verdict}")
    content = {
        "figures": figures,
        "bounds": {name: list(bound) for name, bound in bounds.items()},
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "machine": machine(),
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    raise SystemExit(1 if is_any_missed else 0)
