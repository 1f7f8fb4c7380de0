"""Train: what a rank and the driver do beside the mathematics of a step."""

import math
import multiprocessing
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from mlflow import MlflowClient
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
from results import Experiment, Timing, format_seconds, fractions, repeated, scaled, timed
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from meanflow_core.objectives.interface import build_objective
from meanflow_core.presets.demo import debug
from meanflow_core.presets.meanflow import xl2
from meanflow_core.training import StepMetrics, build_train_state, contiguous_share
from pipelines.latents.sample_order import samples_of_step
from pipelines.tracking.run import Run
from pipelines.training import stopping
from pipelines.training.metrics import IntervalMetrics, NonfiniteDetector

BATCH_SIZE = 1024
LATENT_SHAPE = (4, 32, 32)
CPU = torch.device("cpu")
CONFIG = xl2()
NAMES = build_objective(CONFIG.loss).metric_names
STEP_SECONDS = 0.02
WRITE = "write through the outbox to sqlite"
UNHIDDEN = "broadcast of the signals without computation to hide it"
# For the metrics that MLflow stores in a day.
STEPS_PER_SECOND = 2.0
NUM_NODES, GPUS_PER_NODE, METRICS_PER_GPU = 4, 8, 5  # those of MLflow's GPUMonitor
SYSTEM_ROWS_PER_DAY = 86_400 / 60  # `SystemMetrics` logs once a minute


def experiments(num_images: int) -> dict[str, Experiment]:
    """The experiments of this part."""
    ranks = (8, 64, 512)
    return {
        "samples": Experiment(
            measure=measure_samples, sizes=fractions(num_images), unit="images", simulated="nothing"
        ),
        "draws": Experiment(
            measure=measure_draws, sizes=ranks, unit="ranks", simulated="the other ranks; this is the last one",
            limits={"draws and record of a rank, B = 1,024": (64, 2e-3)},
        ),
        "control": Experiment(
            measure=measure_control, sizes=(2, 4, 8), unit="ranks",
            simulated="the step, by 20 ms of sleep; the actor that holds the stop request; Ray's preemption notices",
            limits={"control traffic of a step": (8, 1e-3)},
        ),
        "metrics": Experiment(
            measure=measure_metrics, sizes=ranks, unit="ranks", simulated="the other ranks, by torch's fake process group"
        ),
        "mlflow": Experiment(
            measure=measure_mlflow, sizes=fractions(scaled(20_000, num_images, 400)), unit="metrics",
            simulated=f"a day of {STEPS_PER_SECOND:g} steps/s on {NUM_NODES} nodes of {GPUS_PER_NODE} GPUs; sqlite is real",
        ),
    }  # fmt: skip


def measure_samples(num_images: int) -> dict[str, Timing]:
    """The samples of a step, with and without the permutation of a new epoch."""
    timings = {
        "samples of an epoch's first step": repeated(lambda seed: samples_of_step(seed, 0, BATCH_SIZE, num_images), 10)
    }
    last = max(1, num_images // BATCH_SIZE - 1)
    timings["samples of a later step"] = repeated(
        lambda number: samples_of_step(0, 1 + number % last, BATCH_SIZE, num_images), 200
    )
    return timings


def measure_draws(num_ranks: int) -> dict[str, Timing]:
    """The draws of a step's global batch, and the record of a rank's share."""
    objective = build_objective(CONFIG.loss)
    start, stop = contiguous_share(BATCH_SIZE, num_ranks - 1, num_ranks)

    def draw(step: int) -> None:
        draws = objective.draw(seed=0, step=step, num_rows=BATCH_SIZE, latent_shape=LATENT_SHAPE)
        objective.record(draws, start, stop)

    return {"draws and record of a rank, B = 1,024": repeated(draw, 50)}


def step_metrics(seed: int) -> StepMetrics:
    """Made-up metrics of a step."""
    sums = torch.rand(1 + 2 * len(NAMES), generator=torch.Generator().manual_seed(seed))
    return StepMetrics(sums=sums, gradient_norm=torch.tensor(1.0))


def measure_control(num_ranks: int) -> dict[str, Timing]:
    """The signals and the metrics of a step, over Gloo among processes of this machine."""
    context = multiprocessing.get_context("fork")
    timings: multiprocessing.Queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=control_rank, args=(rank, num_ranks, folder, timings)) for rank in range(num_ranks)
        ]
        for rank in ranks:
            rank.start()
        results = [timings.get(timeout=300) for _ in ranks]
        for rank in ranks:
            rank.join()
    worst = {step: max((result[step] for result in results), key=lambda timing: timing.seconds) for step in results[0]}
    # Gloo broadcasts along a binomial tree: log2(W) messages one after another (gloo/broadcast.cc).
    hop_seconds = worst[UNHIDDEN].seconds / math.log2(num_ranks)
    at_512 = f"512 ranks at {format_seconds(hop_seconds)} a hop: {format_seconds(9 * hop_seconds)}"
    worst[UNHIDDEN] = replace(worst[UNHIDDEN], note=f"{worst[UNHIDDEN].note}; {at_512}")
    return worst


def control_rank(rank: int, num_ranks: int, folder: str, timings: "multiprocessing.Queue") -> None:
    """One rank of `measure_control`."""
    stopping.ray.get = lambda result: result
    stopping.PREEMPTION_POLL_SECONDS = math.inf
    request = SimpleNamespace(poll=SimpleNamespace(remote=lambda: False))
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks)
    monitor = stopping.SignalMonitor(request, rank)
    metrics, nonfinite = IntervalMetrics(NAMES, CPU), NonfiniteDetector()
    made_up = step_metrics(rank)

    def control(step: int) -> None:
        metrics.add(made_up, 0.0)
        nonfinite.add(step, made_up)
        monitor.poll()

    result = {"control traffic of a step": repeated(control, 100, pause_seconds=STEP_SECONDS)}
    monitor.close()
    stopping.BROADCAST_SECONDS = 0.0  # after every step
    monitor = stopping.SignalMonitor(request, rank)
    result[UNHIDDEN] = repeated(lambda step: monitor.poll(), 200)
    monitor.close()
    timings.put(result)
    distributed.barrier()  # no rank leaves while another one still waits


def measure_metrics(num_ranks: int) -> dict[str, Timing]:
    """A rank's metrics of a logging interval, and rank 0's sums of all ranks in a checkpoint."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    state = build_train_state(debug(), sample_size=8, in_channels=4, num_classes=10, device=CPU)
    metrics, made_up = IntervalMetrics(NAMES, CPU), step_metrics(0)
    return {
        "add a step's metrics": repeated(lambda number: metrics.add(made_up, 0.0), 500),
        "read an interval's metrics": repeated(lambda number: metrics.read(CONFIG, state, 1.0), 50),
        "save and restore the interval": repeated(lambda number: metrics.restore(metrics.state(), 0), 20),
    }


def metrics_per_day() -> tuple[float, float]:
    """Numbers of metrics that a day of training logs: the trainer's, and the nodes'."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    state = build_train_state(debug(), sample_size=8, in_channels=4, num_classes=10, device=CPU)
    metrics = IntervalMetrics(NAMES, CPU)
    metrics.add(step_metrics(0), 0.0)
    num_metrics = len(metrics.read(CONFIG, state, 1.0))
    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for monitor in monitors:
        monitor.collect_metrics()
    per_node = sum(len(monitor.metrics) for monitor in monitors) + GPUS_PER_NODE * METRICS_PER_GPU
    intervals = 86_400 * STEPS_PER_SECOND / CONFIG.log_interval_steps
    return intervals * num_metrics, SYSTEM_ROWS_PER_DAY * per_node * NUM_NODES


def measure_mlflow(num_metrics: int) -> dict[str, Timing]:
    """Writes metrics through the outbox to sqlite, and computes the share of a day that this takes."""
    timings: dict[str, Timing] = {}
    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{Path(folder) / 'mlflow.db'}"
        run = Run(uri, MlflowClient(uri).create_run("0").info.run_id)
        run.log_metrics({"warm_up": 0.0}, 0)
        assert run.flush()
        keys = [f"metric_{number}" for number in range(50)]
        with timed(timings, WRITE):
            for step in range(num_metrics // len(keys)):
                run.log_metrics(dict.fromkeys(keys, 1.0), step)
            assert run.flush(3600.0)
    trained, system = metrics_per_day()
    share = timings[WRITE].seconds / num_metrics * (trained + system) / 86_400
    note = f"a day: {trained:,.0f} metrics of the trainer, {system:,.0f} of the nodes, {share:.2%} of it to write"
    return {WRITE: replace(timings[WRITE], note=note)}
