"""Helpers shared by the benchmarks: command line, interleaved timing, running a stage as a job, JSON results."""

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
from collections.abc import Callable
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


def watch_memory(pid: int, peak: list[float], stop: threading.Event) -> None:
    """Records the peak of process_tree_gigabytes in peak[0] until `stop` is set."""
    peak.append(0.0)
    while not stop.wait(0.5):
        peak[0] = max(peak[0], process_tree_gigabytes(pid))


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
    stop = threading.Event()
    watcher = threading.Thread(target=watch_memory, args=(job.pid, peak, stop))
    if peak is not None:  # reading PSS slows the job down
        watcher.start()
    assert job.stderr is not None
    progress, lines = [], []
    for line in job.stderr:
        lines.append(line)
        match = re.search(rf"{verb} (\d+) of", line)
        if match:
            progress.append((time.monotonic(), int(match[1])))
    stop.set()
    if peak is not None:
        watcher.join()
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
