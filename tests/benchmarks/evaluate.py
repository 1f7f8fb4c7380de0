"""How near the evaluation comes to the bare pipeline, and what memory it needs.

    python tests/benchmarks/evaluate.py --json evaluate.json                  # some three minutes
    python tests/benchmarks/evaluate.py --json evaluate.json --only memory    # 2,000 and 20,000 samples

- stage_over_bare: images per second of the whole stage (sampling, decoding, features, sums), from its first chunk to its
  last, over those of as many processes that call the pipeline in a loop; the latter before and after the former.
- memory: the peak of the sum of PSS of all processes of a job, at two numbers of samples.

The demo's network, autoencoder and judge, random weights: the smaller the generator, the more all else weighs.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _harness import main
from _harness import run_stage as run_job

from meanflow_core.autoencoder import load_autoencoder
from meanflow_core.generator import build_pipeline, load_pipeline, save_generator
from meanflow_core.networks import build_network
from meanflow_core.presets import demo
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER
from pipelines.demo.images import CLASS_NAMES

BATCH = 50


def write_generator(folder: Path) -> None:
    """A generator of the demo's size."""
    torch.manual_seed(0)
    network = build_network(demo().network, sample_size=8, in_channels=4, num_classes=10).eval()
    save_generator(build_pipeline(network, load_autoencoder(str(SHIPPED_AUTOENCODER)), CLASS_NAMES), folder)


def write_reference(path: Path) -> None:
    """Statistics of 64 features of nothing."""
    np.savez(path, mu=np.zeros(64), sigma=np.eye(64))


def _bare(generator: str, num_batches: int, started: object) -> float:
    torch.set_num_threads(1)
    pipeline = load_pipeline(Path(generator))
    labels = [index % 10 for index in range(BATCH)]
    pipeline.images_from_seeds(labels, list(range(BATCH)))
    started.wait()
    began = time.perf_counter()
    for number in range(num_batches):
        pipeline.images_from_seeds(labels, list(range(number * BATCH, (number + 1) * BATCH)))
    return num_batches * BATCH / (time.perf_counter() - began)


def bare_images_per_second(generator: Path, num_processes: int, num_batches: int) -> float:
    """As many processes as the stage has workers, of one thread each, beside each other."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(num_processes) as pool:
        started = manager.Barrier(num_processes)
        rates = pool.starmap(_bare, [(str(generator), num_batches, started)] * num_processes, chunksize=1)
    return sum(rates)


def run_stage(arguments: list[str], peak: list[float] | None = None) -> list[tuple[float, int]]:
    """(time, images done) at each chunk of the stage's own command."""
    return run_job("pipelines.evaluate", "pipelines.evaluate.measuring", "measured", arguments, peak)


def stage_arguments(work: Path, count: int, num_workers: int) -> list[str]:
    """Of the stage's command."""
    return [
        "--model", str(work / "generator"), "--reference", str(work / "reference.npz"), "--steps", "1",
        "--num-samples", str(count), "--batch-size", str(BATCH), "--num-workers", str(num_workers),
        "--num-precision-recall", "1000", "--output", str(work / f"report-{count}"),
    ]  # fmt: skip


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """The figures that were asked for."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_generator(work / "generator")
        write_reference(work / "reference.npz")
        if "stage" in arguments.only:
            batches = arguments.images // (2 * BATCH * arguments.workers)
            bare = [bare_images_per_second(work / "generator", arguments.workers, batches)]
            seen = run_stage(stage_arguments(work, arguments.images, arguments.workers))
            bare.append(bare_images_per_second(work / "generator", arguments.workers, batches))
            # While every worker has work: before the first line they start, at the end they run out of chunks.
            (began, first), (ended, last) = seen[0], next(line for line in seen if line[1] >= 0.9 * arguments.images)
            stage = (last - first) / (ended - began)
            report = json.loads((work / f"report-{arguments.images}" / "report.json").read_text())
            figures |= {
                "bare_images_per_second": statistics.mean(bare),
                "stage_images_per_second": stage,
                "stage_over_bare": stage / statistics.mean(bare),
                "sampling_seconds_share": report["samples"][0]["seconds_per_image"] * stage / arguments.workers,
            }
        if "memory" in arguments.only:
            for count in arguments.memory_samples:
                peak: list[float] = []
                run_stage(stage_arguments(work, count, arguments.workers), peak)
                figures[f"peak_gigabytes_at_{count}"] = peak[0]
            few, many = (figures[f"peak_gigabytes_at_{count}"] for count in arguments.memory_samples)
            figures["peak_memory_growth"] = many / few
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=8000, help="samples to draw")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=["stage"], choices=["stage", "memory"])
    parser.add_argument("--memory-samples", type=int, nargs=2, default=[2000, 20_000])
    main(measure, {"stage_over_bare": (">=", 0.9), "peak_memory_growth": ("<=", 1.15)}, parser)
