"""Throughput of the evaluation relative to the bare pipeline, and its peak memory.

    python tests/benchmarks/evaluate.py --json evaluate.json                  # about three minutes
    python tests/benchmarks/evaluate.py --json evaluate.json --only memory    # 2,000 and 20,000 samples

- stage_over_bare: images per second of the whole stage (sampling, decoding, features, sums) from its first chunk to its
  last, divided by that of as many processes that only call the pipeline. The latter is measured before and after.
- memory: peak of the sum of PSS over all processes of a job, for two numbers of samples.

Uses the demo's network with random weights, its autoencoder and its judge, because overheads weigh most for small models.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import torch
from _harness import main, run_stage, write_demo_generator

from meanflow_core.generator import load_pipeline
from pipelines.demo.judge import SHIPPED_JUDGE

BATCH_SIZE = 50


def _bare_rate(generator: str, num_batches: int, start: Barrier) -> float:
    torch.set_num_threads(1)
    pipeline = load_pipeline(Path(generator))
    labels = [index % 10 for index in range(BATCH_SIZE)]
    pipeline.images_from_seeds(labels, list(range(BATCH_SIZE)))
    start.wait()
    started = time.perf_counter()
    for number in range(num_batches):
        pipeline.images_from_seeds(labels, list(range(number * BATCH_SIZE, (number + 1) * BATCH_SIZE)))
    return num_batches * BATCH_SIZE / (time.perf_counter() - started)


def bare_images_per_second(generator: Path, num_processes: int, num_batches: int) -> float:
    """Total rate of processes that call the pipeline in a loop, with one thread each."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(num_processes) as pool:
        start = manager.Barrier(num_processes)
        rates = pool.starmap(_bare_rate, [(str(generator), num_batches, start)] * num_processes, chunksize=1)
    return sum(rates)


def run_evaluation(
    work: Path, count: int, num_workers: int, peak: list[float] | None = None
) -> list[tuple[float, int]]:
    """Runs the command; returns (time, images done) after each chunk. peak: receives the peak memory in GB."""
    arguments = [
        "--model", str(work / "generator"), "--reference", str(work / "reference.npz"), "--steps", "1",
        "--extractor", str(SHIPPED_JUDGE), "--num-samples", str(count), "--batch-size", str(BATCH_SIZE),
        "--num-workers", str(num_workers), "--num-precision-recall", "1000", "--output", str(work / f"report-{count}"),
    ]  # fmt: skip
    return run_stage("pipelines.evaluate.__main__", "pipelines.evaluate.measuring", "measured", arguments, peak)


def measure_throughput(work: Path, num_images: int, num_workers: int) -> dict[str, float]:
    """Rates of the stage and of the bare pipeline."""
    num_batches = num_images // (2 * BATCH_SIZE * num_workers)
    bare = [bare_images_per_second(work / "generator", num_workers, num_batches)]
    progress = run_evaluation(work, num_images, num_workers)
    bare.append(bare_images_per_second(work / "generator", num_workers, num_batches))
    # Only while every worker has work: they start before the first line, and run out of chunks at the end.
    (started, first), (ended, last) = progress[0], next(line for line in progress if line[1] >= 0.9 * num_images)
    stage = (last - first) / (ended - started)
    report = json.loads((work / f"report-{num_images}" / "report.json").read_text())
    return {
        "bare_images_per_second": statistics.mean(bare),
        "stage_images_per_second": stage,
        "stage_over_bare": stage / statistics.mean(bare),
        "sampling_seconds_share": report["samples"][0]["seconds_per_image"] * stage / num_workers,
    }


def measure_memory(work: Path, counts: tuple[int, int], num_workers: int) -> dict[str, float]:
    """Peak memory for two numbers of samples."""
    peaks: list[float] = []
    for count in counts:
        peak: list[float] = []
        run_evaluation(work, count, num_workers, peak)
        peaks += peak
    figures = {f"peak_gigabytes_at_{count}": peak for count, peak in zip(counts, peaks, strict=True)}
    return {**figures, "peak_memory_growth": peaks[1] / peaks[0]}


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """All requested figures."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_demo_generator(work / "generator")
        np.savez(work / "reference.npz", mu=np.zeros(64), sigma=np.eye(64))
        if "stage" in arguments.only:
            figures |= measure_throughput(work, arguments.images, arguments.workers)
        if "memory" in arguments.only:
            figures |= measure_memory(work, tuple(arguments.memory_samples), arguments.workers)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=8000, help="samples to draw")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=["stage"], choices=["stage", "memory"])
    parser.add_argument("--memory-samples", type=int, nargs=2, default=[2000, 20_000])
    main(measure, {"stage_over_bare": (">=", 0.9), "peak_memory_growth": ("<=", 1.15)}, parser)
