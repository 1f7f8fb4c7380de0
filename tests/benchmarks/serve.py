"""Throughput and latency of the endpoint, relative to the bare pipeline and to other servers, and under overload.

    python tests/benchmarks/serve.py --json serve.json                          # about 45 minutes on 2 cores
    python tests/benchmarks/serve.py --json serve.json --parts small --seconds 10 --rounds 3

Locust requests one PNG at a time, with distinct seeds and all classes. Load, proxy and replicas share the machine.

- small: the demo's model, which takes milliseconds per image. Baselines: the bare pipeline (full batches, the replica's
  number of threads) and an empty application behind the same proxy.
  small_throughput_ratio = ours / (1 / (empty seconds per request + bare seconds per image)), at saturation;
  small_p50_excess_ms = ours - (empty p50 + a bare image), with one user.
- large: DiT-S/2 and an autoencoder of Stable Diffusion's size at 256 px, which dominate the time.
  large_throughput_ratio = ours at saturation / a bare loop of full batches.
- levers: the small model with Serve's fast path switched on piece by piece, each beside plain FastAPI around the same
  pipeline without batching. p50 and p99 with one user, images/s with 8 and 16 users, and the ratios to plain FastAPI.
- overload: twice the saturation, in both topologies. Statuses, latencies, and the memory of the server's processes.
- dit: diffusers' DiTPipeline with a network and an autoencoder of the large model's size (for more than 50 steps, in
  batches of --dit-long-batch images).

All weights are random. Compared measurements alternate, and figures are medians over --rounds.
"""

import argparse
import contextlib
import functools
import multiprocessing
import multiprocessing.pool
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # this checkout, even if another copy is installed

import torch
from _harness import main, write_demo_generator
from diffusers import AutoencoderKL

from deploy.api.encoding import encode_image
from meanflow_core.generator import build_pipeline, load_pipeline, save_generator
from meanflow_core.networks.building import build_network
from meanflow_core.pipeline import MeanFlowPipeline
from meanflow_core.presets.meanflow import dit_network
from pipelines.cluster import FAST_MALLOC
from pipelines.demo.serving import free_port
from tests.benchmarks._serve_server import (
    Answers,
    Server,
    endpoint,
    load,
    overload,
    running,
    serving,
)

PARTS = ("small", "levers", "large", "overload", "dit")
NOOP_PATH = "/noop/generate"
NUM_CLASSES_LARGE = 1000
RAYS_PROXY, RAYS_LOOP = {"RAY_SERVE_ENABLE_HA_PROXY": "0"}, {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "0"}
# Name, variables that replace those of the fast path, topology. From Serve's defaults to what is shipped.
LEVERS = (
    ("serve_defaults", RAYS_PROXY | RAYS_LOOP, "two"),
    ("throughput_optimized", RAYS_PROXY, "two"),
    ("haproxy", {}, "two"),
    ("shipped", {}, "one"),
)
BOUNDS = {
    "small_throughput_ratio": (">=", 0.75),
    "small_p50_excess_ms": ("<=", 10.0),
    "large_throughput_ratio": (">=", 0.85),
    "levers_shipped_p50_over_fastapi": ("<=", 1.2),
    "levers_shipped_p99_over_fastapi": ("<=", 1.5),
    "levers_shipped_16_users_over_fastapi": (">=", 2.2),
    "overload_one_other_answers": ("<=", 0.0),
    "overload_one_memory_growth": ("<=", 0.05),
    "overload_two_other_answers": ("<=", 0.0),
    "overload_two_memory_growth": ("<=", 0.05),
}


def report(line: str) -> None:
    """Prints a line of progress."""
    print(line, file=sys.stderr, flush=True)


def build_sd_autoencoder() -> AutoencoderKL:
    """An autoencoder of the size of Stable Diffusion's."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
    ).eval()  # fmt: skip


def write_large(folder: Path) -> Path:
    """Writes a generator of DiT-S/2 and an autoencoder of Stable Diffusion's size, 256 px."""
    torch.manual_seed(0)
    network = build_network(dit_network("S", 2), sample_size=32, in_channels=4, num_classes=NUM_CLASSES_LARGE).eval()
    names = [str(label) for label in range(NUM_CLASSES_LARGE)]
    save_generator(build_pipeline(network, build_sd_autoencoder(), names), folder)
    return folder


# Bare loops. Each runs in a process of its own with as many threads as the replica.


@functools.cache
def _pipeline(folder: str, num_threads: int) -> MeanFlowPipeline:
    torch.set_num_threads(num_threads)
    return load_pipeline(Path(folder))


def time_bare_batch(folder: str, num_threads: int, batch_size: int, seconds: float) -> float:
    """Median seconds of a batch."""
    pipeline = _pipeline(folder, num_threads)
    labels = [index % 10 for index in range(batch_size)]
    durations: list[float] = []
    pipeline.images_from_seeds(labels, list(range(batch_size)))
    while sum(durations) < seconds or len(durations) < 3:
        started = time.perf_counter()
        pipeline.images_from_seeds(labels, list(range(len(durations), len(durations) + batch_size)))
        durations.append(time.perf_counter() - started)
    return statistics.median(durations)


def measure_png_bytes(folder: str, num_threads: int) -> int:
    """Median size of a PNG."""
    images = _pipeline(folder, num_threads).images_from_seeds(list(range(10)), list(range(10))).numpy()
    return round(statistics.median(len(encode_image(image)) for image in images))


def time_dit_image(num_threads: int, num_steps: int, batch_size: int) -> float:
    """Seconds per image of diffusers' DiTPipeline with its default guidance."""
    from tests.benchmarks._serve_peers import build_dit_pipeline

    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    pipeline = build_dit_pipeline(build_sd_autoencoder())
    labels = list(range(batch_size))
    pipeline(labels, num_inference_steps=1)
    started = time.perf_counter()
    pipeline(labels, num_inference_steps=num_steps)
    return (time.perf_counter() - started) / batch_size


@contextlib.contextmanager
def bare_process() -> Iterator[multiprocessing.pool.Pool]:
    """A process for bare loops. glibc reads the servers' memory settings when it starts."""
    os.environ.update(FAST_MALLOC)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool
        pool.close()
        pool.join()


# Served.


class Rounds:
    """Collects the values of each round by name."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        """Adds the value of one round."""
        self._values.setdefault(name, []).append(value)

    def medians(self) -> dict[str, float]:
        """Median of each name."""
        return {name: statistics.median(values) for name, values in self._values.items()}


def saturate(server: Server, path: str, arguments: argparse.Namespace, name: str) -> Answers:
    """The load with the most images per second over all numbers of users."""
    loads = []
    for users in arguments.users:
        answers = load(server.url, users, arguments.seconds, path=path)
        p50 = answers.milliseconds(50)
        report(f"{name}: {users} users, {answers.per_second:.1f}/s, p50 {p50:.1f} ms, {answers.statuses}")
        loads.append(answers)
    return max(loads, key=lambda answers: answers.per_second)


def measure_single_user(server: Server, path: str, arguments: argparse.Namespace, name: str) -> float:
    """p50 in milliseconds with one user."""
    p50 = load(server.url, 1, arguments.seconds, path=path).milliseconds(50)
    report(f"{name}: one user, p50 {p50:.1f} ms")
    return p50


def small_endpoint(folder: Path, arguments: argparse.Namespace, topology: str = "one") -> dict:
    """The endpoint with the small model."""
    return endpoint(
        folder,
        topology=topology,
        cpu_threads=1,
        max_batch_size=arguments.small_batch,
        batch_wait_seconds=arguments.batch_wait_seconds,
    )


def _add_small_bare(
    bare: multiprocessing.pool.Pool, folder: Path, arguments: argparse.Namespace, rounds: Rounds
) -> None:
    full, single = (
        bare.apply(time_bare_batch, (str(folder), 1, batch_size, arguments.seconds / 4))
        for batch_size in (arguments.small_batch, 1)
    )
    rounds.add("small_bare_seconds_per_image", full / arguments.small_batch)
    rounds.add("small_bare_single_ms", 1e3 * single)


def _add_small_served(server: Server, arguments: argparse.Namespace, rounds: Rounds) -> None:
    noop = saturate(server, NOOP_PATH, arguments, "small, empty")
    rounds.add("small_noop_seconds_per_request", 1.0 / noop.per_second)
    ours = saturate(server, "/generate", arguments, "small, ours")
    rounds.add("small_images_per_second", ours.per_second)
    rounds.add("small_saturated_p50_ms", ours.milliseconds(50))
    rounds.add("small_answer_bytes", ours.median_bytes)
    for name, path in (("noop", NOOP_PATH), ("ours", "/generate")):
        rounds.add(f"small_{name}_p50_ms", measure_single_user(server, path, arguments, f"small, {name}"))


def measure_small(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Compares bare pipeline, empty application and ours in turns, the last two behind the same proxy."""
    rounds = Rounds()
    with bare_process() as bare:
        noop = {
            "name": "noop", "route_prefix": "/noop", "import_path": "tests.benchmarks._serve_peers:build_noop",
            "args": {"num_bytes": bare.apply(measure_png_bytes, (str(folder), 1))},
        }  # fmt: skip
        with serving([small_endpoint(folder, arguments), noop]) as server:
            for number in range(1, arguments.rounds + 1):
                report(f"small, round {number} of {arguments.rounds}")
                _add_small_bare(bare, folder, arguments, rounds)
                _add_small_served(server, arguments, rounds)
                _add_small_bare(bare, folder, arguments, rounds)  # again, because the machine drifts within a round
    figures = rounds.medians()
    expected = 1.0 / (figures["small_noop_seconds_per_request"] + figures["small_bare_seconds_per_image"])
    expected_ms = figures["small_noop_p50_ms"] + figures["small_bare_single_ms"]
    return figures | {
        "small_throughput_ratio": figures["small_images_per_second"] / expected,
        "small_p50_excess_ms": figures["small_ours_p50_ms"] - expected_ms,
    }


def measure_large(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Compares a bare loop and ours in turns."""
    rounds, batch_size = Rounds(), arguments.large_batch
    # A queue of several batches of such a slow model exceeds the default deadline.
    application = endpoint(folder, cpu_threads=arguments.large_threads, max_batch_size=batch_size, deadline_seconds=600)
    with bare_process() as bare, serving([application]) as server:
        for number in range(1, arguments.rounds + 1):
            job = (str(folder), arguments.large_threads, batch_size, arguments.large_seconds)
            batch_seconds = bare.apply(time_bare_batch, job)
            rounds.add("large_bare_images_per_second", batch_size / batch_seconds)
            report(f"large, round {number}: bare {batch_size / batch_seconds:.3f} images/s")
            answers = load(
                server.url, 3 * batch_size, arguments.large_seconds,
                warmup_seconds=1.5 * batch_seconds, num_classes=NUM_CLASSES_LARGE,
            )  # fmt: skip
            rounds.add("large_images_per_second", answers.per_second_by_batches)
            rounds.add("large_answer_bytes", answers.median_bytes)
            report(f"large, round {number}: ours {answers.per_second_by_batches:.3f} images/s, {answers.statuses}")
    figures = rounds.medians()
    ratio = figures["large_images_per_second"] / figures["large_bare_images_per_second"]
    return figures | {"large_throughput_ratio": ratio}


def measure_overload(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Measures the endpoint at twice its saturation, in both topologies."""
    figures: dict[str, float] = {}
    for topology in ("one", "two"):
        result = overload(folder, arguments.overload_seconds, topology)
        answers = result.answers
        report(f"overload, topology {topology}: {answers.statuses}")
        figures |= {
            f"overload_{topology}_{name}": value
            for name, value in {
                "saturation_per_second": result.saturation,
                "answers_per_second": len(answers.rows) / answers.seconds,
                "images_per_second": answers.per_second,
                "images": len(answers.good),
                "429": answers.statuses.get("429", 0),
                "other_answers": answers.num_unexpected,
                "p50_ms": answers.milliseconds(50),
                "p99_ms": answers.milliseconds(99),
                "gigabytes_second_quarter": result.memory_in_quarter(2),
                "gigabytes_end": result.memory_in_quarter(4),
                "memory_growth": result.memory_growth,
            }.items()
        }
    return figures


@contextlib.contextmanager
def plain_fastapi(folder: Path) -> Iterator[Server]:
    """The small model behind one uvicorn process."""
    port = free_port(0)
    command = [
        sys.executable, "-m", "uvicorn", "tests.benchmarks._serve_peers:build_plain", "--factory",
        "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning",
    ]  # fmt: skip
    environment = {"MEANFLOW_GENERATOR": str(folder), "MEANFLOW_THREADS": "1"}
    with running(command, environment, port, ["/generate"]) as server:
        yield server


def measure_levers(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Compares the endpoint and plain FastAPI in turns, for each of the levers."""
    figures: dict[str, float] = {}
    for lever, variables, topology in LEVERS:
        rounds = Rounds()
        application = small_endpoint(folder, arguments, topology)
        with plain_fastapi(folder) as plain, serving([application], variables) as ours:
            for number in range(1, arguments.rounds + 1):
                for name, server in (("fastapi", plain), ("ours", ours)):
                    alone = load(server.url, 1, arguments.seconds)
                    rounds.add(f"{name}_p50_ms", alone.milliseconds(50))
                    rounds.add(f"{name}_p99_ms", alone.milliseconds(99))
                    together = {users: load(server.url, users, arguments.seconds).per_second for users in (8, 16)}
                    for users, rate in together.items():
                        rounds.add(f"{name}_{users}_users", rate)
                    report(
                        f"levers, {lever}, round {number}, {name}: p50 {alone.milliseconds(50):.1f} ms, p99 "
                        f"{alone.milliseconds(99):.1f} ms, images/s {together[8]:.1f} and {together[16]:.1f}"
                    )
        medians = rounds.medians()
        figures |= {f"levers_{lever}_{name}": value for name, value in medians.items()}
        for name in ("p50", "p99", "8_users", "16_users"):
            unit = "_ms" if name.startswith("p") else ""
            ratio = medians[f"ours_{name}{unit}"] / medians[f"fastapi_{name}{unit}"]
            figures[f"levers_{lever}_{name}_over_fastapi"] = ratio
    return figures


def compare_with_dit(images_per_second: float, arguments: argparse.Namespace) -> dict[str, float]:
    """Compares a bare loop of diffusers' pipeline with many steps with our served one-step images."""
    figures = {}
    with bare_process() as bare:
        for steps in arguments.dit_steps:
            batch_size = arguments.large_batch if steps <= 50 else arguments.dit_long_batch
            seconds = bare.apply(time_dit_image, (arguments.large_threads, steps, batch_size))
            report(f"DiTPipeline: {steps} steps, a batch of {batch_size}, {seconds:.1f} s per image")
            figures[f"dit_{steps}_seconds_per_image"] = seconds
            figures[f"dit_{steps}_batch"] = batch_size
            figures[f"dit_{steps}_over_ours_served"] = seconds * images_per_second
    return figures


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """The figures of the requested parts."""
    # A third busy process can slow two threads of a bare loop down six times.
    figures = {"load_average_before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory(prefix="mfs-") as name:
        small_folder = write_demo_generator(Path(name, "small"))
        if "small" in arguments.parts:
            figures |= measure_small(small_folder, arguments)
        if "levers" in arguments.parts:
            figures |= measure_levers(small_folder, arguments)
        if "overload" in arguments.parts:
            figures |= measure_overload(small_folder, arguments)
        if "large" in arguments.parts or "dit" in arguments.parts:  # DiTPipeline is compared with the large model
            figures |= measure_large(write_large(Path(name, "large")), arguments)
        if "dit" in arguments.parts:
            figures |= compare_with_dit(figures["large_images_per_second"], arguments)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--rounds", type=int, default=2, help="turns of each comparison")
    parser.add_argument("--seconds", type=float, default=15.0, help="per measurement of the small model")
    parser.add_argument("--users", type=int, nargs="+", default=[8, 16, 32], help="tried to find the saturation")
    parser.add_argument("--small-batch", type=int, default=16)
    parser.add_argument("--batch-wait-seconds", type=float, default=0.005)
    parser.add_argument("--large-batch", type=int, default=4)
    parser.add_argument("--large-seconds", type=float, default=75.0, help="per measurement of the large model")
    parser.add_argument("--large-threads", type=int, default=2)
    parser.add_argument("--overload-seconds", type=float, default=60.0)
    parser.add_argument("--dit-steps", type=int, nargs="+", default=[25, 250])
    parser.add_argument(
        "--dit-long-batch", type=int, default=1, help="batch size for more than 50 steps, which take minutes per image"
    )
    main(measure, BOUNDS, parser)
