"""How near the endpoint comes to the bare pipeline, what it does above its saturation, and what a user would take instead.

    python tests/benchmarks/serve.py --json serve.json                          # some half an hour on 2 cores
    python tests/benchmarks/serve.py --json serve.json --parts small --seconds 10 --rounds 3

locust asks for one PNG a request, of distinct seeds and all classes; load, proxy and replicas share the machine.

- small: the demo's model, whose image costs milliseconds. Beside the bare pipeline (full batches, the replica's threads)
  and an application of the same topology that does nothing:
  small_throughput_ratio = ours / (1 / (its seconds per request + bare seconds per image)), both at saturation;
  small_p50_excess_ms = ours - (its p50 + a bare image + the wait for a batch), with one user.
- large: DiT-S/2 and an autoencoder of Stable Diffusion's size at 256 px, where computing is all:
  large_throughput_ratio = ours at saturation / a bare loop of full batches.
- overload: twice the saturation, whatever the answers: their kinds, latencies, and the memory of the server's processes.
- peers: plain FastAPI around the same pipeline without batches (small), and diffusers' DiTPipeline of the same network's
  and autoencoder's sizes (large; more than 50 steps from one batch of --dit-long-batch images).

Random weights throughout. Phases that are compared take turns, and figures are medians over --rounds.
"""

import argparse
import contextlib
import functools
import io
import multiprocessing
import multiprocessing.pool
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # what lies here, also where another copy is installed

import torch
from _harness import main
from diffusers import AutoencoderKL
from PIL import Image

from meanflow_core.generator import build_pipeline, load_pipeline, save_generator
from meanflow_core.networks import build_network
from meanflow_core.pipeline import MeanFlowPipeline
from meanflow_core.presets import dit_network
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
    write_small,
)

PARTS = ("small", "large", "overload", "peers")
NOOP_PATH = "/noop/generate"
NUM_CLASSES_LARGE = 1000
WANTED = {
    "small_throughput_ratio": (">=", 0.75),
    "small_p50_excess_ms": ("<=", 10.0),
    "large_throughput_ratio": (">=", 0.85),
    "overload_other_answers": ("<=", 0.0),
    "overload_memory_growth": ("<=", 0.05),
}


class Clock:
    """Progress lines with the time left of what was planned."""

    def __init__(self, planned_seconds: float) -> None:
        self._began, self._planned = time.monotonic(), planned_seconds

    def say(self, what: str) -> None:
        """One line on stderr."""
        left = max(0.0, self._planned - (time.monotonic() - self._began))
        print(f"{what}, about {left:.0f} s left", file=sys.stderr, flush=True)


def planned_seconds(arguments: argparse.Namespace) -> float:
    """Of all parts that were asked for, with what servers take to start and end."""
    start, sweep = 50.0, len(arguments.users) * (arguments.seconds + 4)
    parts = {
        "small": start + arguments.rounds * (2 * sweep + 4 * (arguments.seconds + 4)),
        "large": start + arguments.rounds * 2.2 * (arguments.large_seconds + 20),
        "overload": start + 20 + arguments.overload_seconds,
        "peers": 2 * start + arguments.rounds * (2 * sweep + 2 * (arguments.seconds + 4)) + 400,
    }
    return sum(parts[part] for part in arguments.parts)


# Models.


def sd_autoencoder() -> AutoencoderKL:
    """One of the size of Stable Diffusion's."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
    ).eval()  # fmt: skip


def write_large(folder: Path) -> Path:
    """A DiT-S/2 and an autoencoder of Stable Diffusion's size, 256 px."""
    torch.manual_seed(0)
    network = build_network(dit_network("S", 2), sample_size=32, in_channels=4, num_classes=NUM_CLASSES_LARGE).eval()
    names = [str(label) for label in range(NUM_CLASSES_LARGE)]
    save_generator(build_pipeline(network, sd_autoencoder(), names), folder)
    return folder


# Bare loops, each in a process of its own whose number of threads is the replica's.


@functools.cache
def _pipeline(folder: str, num_threads: int) -> MeanFlowPipeline:
    torch.set_num_threads(num_threads)
    return load_pipeline(Path(folder))


def _bare(folder: str, num_threads: int, batch_size: int, seconds: float) -> float:
    """Median seconds of a batch."""
    pipeline = _pipeline(folder, num_threads)
    labels = [index % 10 for index in range(batch_size)]
    taken: list[float] = []
    pipeline.images_from_seeds(labels, list(range(batch_size)))
    while sum(taken) < seconds or len(taken) < 3:
        began = time.perf_counter()
        pipeline.images_from_seeds(labels, list(range(len(taken), len(taken) + batch_size)))
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _png_bytes(folder: str, num_threads: int) -> int:
    """Median size of an image."""
    sizes = []
    for image in _pipeline(folder, num_threads).images_from_seeds(list(range(10)), list(range(10))).numpy():
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG")
        sizes.append(buffer.tell())
    return round(statistics.median(sizes))


def _dit(num_threads: int, num_steps: int, batch_size: int) -> float:
    """Seconds per image of diffusers' DiTPipeline, guided as it is unless asked otherwise."""
    from tests.benchmarks._serve_peers import build_dit_pipeline

    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    pipeline = build_dit_pipeline(sd_autoencoder())
    labels = list(range(batch_size))
    pipeline(labels, num_inference_steps=1)
    began = time.perf_counter()
    pipeline(labels, num_inference_steps=num_steps)
    return (time.perf_counter() - began) / batch_size


@contextlib.contextmanager
def bare_process() -> Iterator[multiprocessing.pool.Pool]:
    """A process for bare loops, with the servers' memory settings, which glibc reads when a process starts."""
    os.environ.update(FAST_MALLOC)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool
        pool.close()
        pool.join()


# Served.


class Rounds:
    """What was seen in each round, by name; figures are medians."""

    def __init__(self) -> None:
        self._seen: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        """One round's."""
        self._seen.setdefault(name, []).append(value)

    def medians(self) -> dict[str, float]:
        """Of all names."""
        return {name: statistics.median(values) for name, values in self._seen.items()}


def saturation(server: Server, path: str, arguments: argparse.Namespace, clock: Clock, what: str) -> Answers:
    """The best of the numbers of users."""
    best: Answers | None = None
    for users in arguments.users:
        seen = load(server.url, users, arguments.seconds, path=path)
        clock.say(
            f"{what}: {users} users, {seen.per_second:.1f}/s, p50 {seen.milliseconds(50):.1f} ms, {seen.statuses}"
        )
        if best is None or seen.per_second > best.per_second:
            best = seen
    assert best is not None
    return best


def small_endpoint(folder: Path, arguments: argparse.Namespace) -> dict:
    """Our application around the small model."""
    return endpoint(
        folder, cpu_threads=1, max_batch_size=arguments.small_batch, batch_wait_seconds=arguments.batch_wait_seconds
    )


def _small_bare(bare: multiprocessing.pool.Pool, folder: Path, arguments: argparse.Namespace, rounds: Rounds) -> None:
    full, single = (
        bare.apply(_bare, (str(folder), 1, batch_size, arguments.seconds / 4))
        for batch_size in (arguments.small_batch, 1)
    )
    rounds.add("small_bare_seconds_per_image", full / arguments.small_batch)
    rounds.add("small_bare_single_ms", 1e3 * single)


def _small_served(server: Server, arguments: argparse.Namespace, clock: Clock, rounds: Rounds) -> None:
    noop = saturation(server, NOOP_PATH, arguments, clock, "small, no-op")
    rounds.add("small_noop_seconds_per_request", 1.0 / noop.per_second)
    ours = saturation(server, "/generate", arguments, clock, "small, ours")
    rounds.add("small_images_per_second", ours.per_second)
    rounds.add("small_saturated_p50_ms", ours.milliseconds(50))
    rounds.add("small_answer_bytes", statistics.median(row[3] for row in ours.good))
    for name, path in (("noop", NOOP_PATH), ("ours", "/generate")):
        p50 = load(server.url, 1, arguments.seconds, path=path).milliseconds(50)
        rounds.add(f"small_{name}_p50_ms", p50)
        clock.say(f"small, {name}: one user, p50 {p50:.1f} ms")


def small(folder: Path, arguments: argparse.Namespace, clock: Clock) -> dict[str, float]:
    """Bare, nothing and ours in turns, the latter two behind the same proxy."""
    rounds = Rounds()
    with bare_process() as bare:
        noop = {
            "name": "noop", "route_prefix": "/noop", "import_path": "tests.benchmarks._serve_peers:build_noop",
            "args": {"num_bytes": bare.apply(_png_bytes, (str(folder), 1))},
        }  # fmt: skip
        with serving([small_endpoint(folder, arguments), noop]) as server:
            for number in range(1, arguments.rounds + 1):
                clock.say(f"small, round {number} of {arguments.rounds}")
                _small_bare(bare, folder, arguments, rounds)
                _small_served(server, arguments, clock, rounds)
                _small_bare(bare, folder, arguments, rounds)  # before and after: the machine drifts within a round
    figures = rounds.medians()
    expected = 1.0 / (figures["small_noop_seconds_per_request"] + figures["small_bare_seconds_per_image"])
    expected_ms = figures["small_noop_p50_ms"] + figures["small_bare_single_ms"] + 1e3 * arguments.batch_wait_seconds
    return figures | {
        "small_throughput_ratio": figures["small_images_per_second"] / expected,
        "small_p50_excess_ms": figures["small_ours_p50_ms"] - expected_ms,
    }


def large(folder: Path, arguments: argparse.Namespace, clock: Clock) -> dict[str, float]:
    """A bare loop and ours in turns."""
    rounds, batch_size = Rounds(), arguments.large_batch
    # So slow a model keeps a queue of several batches waiting for longer than a deadline for people allows.
    application = endpoint(folder, cpu_threads=arguments.large_threads, max_batch_size=batch_size, deadline_seconds=600)
    with bare_process() as bare, serving([application]) as server:
        for number in range(1, arguments.rounds + 1):
            job = (str(folder), arguments.large_threads, batch_size, arguments.large_seconds)
            full = bare.apply(_bare, job)
            rounds.add("large_bare_images_per_second", batch_size / full)
            clock.say(f"large, round {number}: bare {batch_size / full:.3f} images/s")
            seen = load(
                server.url, 3 * batch_size, arguments.large_seconds,
                warmup_seconds=1.5 * full, num_classes=NUM_CLASSES_LARGE,
            )  # fmt: skip
            rounds.add("large_images_per_second", seen.per_second_by_batches)
            rounds.add("large_answer_bytes", statistics.median(row[3] for row in seen.good))
            clock.say(f"large, round {number}: ours {seen.per_second_by_batches:.3f} images/s, {seen.statuses}")
    figures = rounds.medians()
    ratio = figures["large_images_per_second"] / figures["large_bare_images_per_second"]
    return figures | {"large_throughput_ratio": ratio}


def overloaded(folder: Path, arguments: argparse.Namespace, clock: Clock) -> dict[str, float]:
    """Twice the saturation."""
    seen = overload(folder, arguments.overload_seconds)
    answers = seen.answers
    clock.say(f"overload: {answers.statuses}")
    return {
        "overload_saturation_per_second": seen.saturation,
        "overload_answers_per_second": len(answers.rows) / answers.seconds,
        "overload_images_per_second": answers.per_second,
        "overload_images": len(answers.good),
        "overload_429": answers.statuses.get("429", 0),
        "overload_other_answers": seen.num_others,
        "overload_p50_ms": answers.milliseconds(50),
        "overload_p99_ms": answers.milliseconds(99),
        "overload_megabytes_second_quarter": seen.memory.quarter(2),
        "overload_megabytes_end": seen.memory.quarter(4),
        "overload_memory_growth": seen.memory.growth,
    }


@contextlib.contextmanager
def plain_fastapi(folder: Path) -> Iterator[Server]:
    """The small model behind one process of uvicorn."""
    port = free_port(0)
    command = [
        sys.executable, "-m", "uvicorn", "tests.benchmarks._serve_peers:build_plain", "--factory",
        "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning",
    ]  # fmt: skip
    environment = {"MEANFLOW_GENERATOR": str(folder), "MEANFLOW_THREADS": "1"}
    with running(command, environment, port, ["/generate"]) as server:
        yield server


def against_fastapi(folder: Path, arguments: argparse.Namespace, clock: Clock) -> dict[str, float]:
    """Ours and plain FastAPI in turns."""
    rounds = Rounds()
    with plain_fastapi(folder) as plain, serving([small_endpoint(folder, arguments)]) as ours:
        for number in range(1, arguments.rounds + 1):
            for name, server in (("fastapi", plain), ("ours_beside_fastapi", ours)):
                best = saturation(server, "/generate", arguments, clock, f"peers, round {number}, {name}")
                rounds.add(f"peers_{name}_images_per_second", best.per_second)
                p50 = load(server.url, 1, arguments.seconds).milliseconds(50)
                rounds.add(f"peers_{name}_p50_ms", p50)
                clock.say(f"peers, round {number}, {name}: one user, p50 {p50:.1f} ms")
    figures = rounds.medians()
    rate, plain_rate = (figures[f"peers_{name}_images_per_second"] for name in ("ours_beside_fastapi", "fastapi"))
    p50, plain_p50 = (figures[f"peers_{name}_p50_ms"] for name in ("ours_beside_fastapi", "fastapi"))
    return figures | {"peers_throughput_over_fastapi": rate / plain_rate, "peers_p50_over_fastapi": p50 / plain_p50}


def against_dit(images_per_second: float, arguments: argparse.Namespace, clock: Clock) -> dict[str, float]:
    """diffusers' many steps in a bare loop beside our one, served."""
    figures = {}
    with bare_process() as bare:
        for steps in arguments.dit_steps:
            batch_size = arguments.large_batch if steps <= 50 else arguments.dit_long_batch
            seconds = bare.apply(_dit, (arguments.large_threads, steps, batch_size))
            clock.say(f"peers, DiTPipeline: {steps} steps, a batch of {batch_size}, {seconds:.1f} s per image")
            figures[f"peers_dit_{steps}_seconds_per_image"] = seconds
            figures[f"peers_dit_{steps}_batch"] = batch_size
            figures[f"peers_dit_{steps}_over_ours_served"] = seconds * images_per_second
    return figures


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """The figures that were asked for."""
    # What others ran: two threads of a bare loop beside a third process may take six times as long.
    figures = {"load_average_before": os.getloadavg()[0]}
    if "peers" in arguments.parts and "large" not in arguments.parts:
        arguments.parts.append("large")  # whose figure DiTPipeline's are compared with
    clock = Clock(planned_seconds(arguments))
    with tempfile.TemporaryDirectory(prefix="mfs-") as name:
        small_folder = write_small(Path(name, "small"))
        if "small" in arguments.parts:
            figures |= small(small_folder, arguments, clock)
        if "overload" in arguments.parts:
            figures |= overloaded(small_folder, arguments, clock)
        if "large" in arguments.parts:
            figures |= large(write_large(Path(name, "large")), arguments, clock)
        if "peers" in arguments.parts:
            figures |= against_fastapi(small_folder, arguments, clock)
            figures |= against_dit(figures["large_images_per_second"], arguments, clock)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--rounds", type=int, default=2, help="turns of what is compared")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement with the small model")
    parser.add_argument("--users", type=int, nargs="+", default=[8, 16, 32], help="tried in search of saturation")
    parser.add_argument("--small-batch", type=int, default=16)
    parser.add_argument("--batch-wait-seconds", type=float, default=0.005)
    parser.add_argument("--large-batch", type=int, default=4)
    parser.add_argument("--large-seconds", type=float, default=75.0, help="of each measurement with the large model")
    parser.add_argument("--large-threads", type=int, default=2)
    parser.add_argument("--overload-seconds", type=float, default=60.0)
    parser.add_argument("--dit-steps", type=int, nargs="+", default=[25, 250])
    parser.add_argument(
        "--dit-long-batch", type=int, default=1, help="images of a call of more than 50 steps: minutes each"
    )
    main(measure, WANTED, parser)
