"""Trains trials: each in one process, several at a time as Ray tasks."""

import json
import logging
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from meanflow_core.generator import build_pipeline, save_generator
from meanflow_core.latents import LatentNormalization
from meanflow_core.networks.interface import NetworkModel
from meanflow_core.objectives.interface import build_objective
from meanflow_core.pipeline import MeanFlowPipeline
from meanflow_core.training import build_train_state, read_means, train_step
from pipelines.command_line import set_up_logging
from pipelines.compare.methods import Trial
from pipelines.errors import RunError
from pipelines.latents.autoencoder import open_autoencoder
from pipelines.latents.cache import open_latents
from pipelines.plan.cost import step_flops
from pipelines.progress import Progress
from pipelines.train.batches import BatchSource

logger = logging.getLogger(__name__)

RECORD = "trial.json"
NUM_CURVE_POINTS = 50  # few enough that each point averages over many steps, which reduces noise


def is_trained(trial: Trial, folder: Path) -> bool:
    """Whether `folder` contains the complete result of this trial."""
    return (folder / trial.name / RECORD).is_file()


def read_record(trial: Trial, folder: Path) -> dict[str, Any]:
    """The record of a trained trial."""
    return dict(json.loads((folder / trial.name / RECORD).read_text()))


class LossCurve:
    """Mean squared errors over successive intervals of a training run."""

    def __init__(self, metric_names: Sequence[str], num_steps: int) -> None:
        self._names = metric_names
        self._interval = max(1, num_steps // NUM_CURVE_POINTS)
        self._num_steps = num_steps
        self._pending: list[torch.Tensor] = []
        self.points: list[dict[str, float | None]] = []

    def add(self, step: int, sums: torch.Tensor) -> None:
        """Adds `StepMetrics.sums` of a 0-based step. Reads them once per interval, because each read waits for the device."""
        self._pending.append(sums)
        if (step + 1) % self._interval and step + 1 < self._num_steps:
            return
        means = read_means(self._names, torch.stack(self._pending).double().sum(dim=0))
        errors = {name: means.get(name) for name in ("squared_error_r_equals_t", "squared_error_r_below_t")}
        self.points.append({"step": step + 1, **errors})
        self._pending.clear()


def train_trial(
    trial: Trial, data: str, cache_dir: str, folder: Path, device: torch.device | None = None
) -> dict[str, Any]:
    """Trains in this process, writes folder/<trial's name>/ atomically, and returns the trial's record.

    The folder holds the generator with averaged parameters, and the record: configuration, loss curve, training time, FLOPs
    and parameter counts. A complete trial is not trained again.

    Raises InputError if the latents cannot be opened, RuntimeError if parameters are not finite after training.
    """
    if is_trained(trial, folder):
        return read_record(trial, folder)
    device = device or torch.device("cpu")
    config = trial.config
    dataset = open_latents(data, cache_dir)
    vae = open_autoencoder(data)
    normalization = LatentNormalization.from_vae_config(vae.config)
    sizes = dataset.manifest.network_sizes
    state = build_train_state(config, **sizes, device=device)
    source = BatchSource(dataset, config, rank=0, world_size=1, device=device)
    curve = LossCurve(build_objective(config.loss).metric_names, config.num_steps)
    progress = Progress(logger, f"{trial.name}: trained", "steps", config.num_steps, interval_seconds=30.0)
    started = time.perf_counter()
    for step in range(config.num_steps):
        metrics = train_step(state, state.network, source.batches(step), normalization, config)
        curve.add(step, metrics.sums)
        error = curve.points[-1]["squared_error_r_equals_t"] if curve.points else None
        progress.update(step + 1, f"squared error {error:.2f}" if error is not None else "")
    seconds = time.perf_counter() - started
    if not all(bool(torch.isfinite(parameter).all()) for parameter in state.ema_network.parameters()):
        raise RuntimeError(f"{trial.name}: the parameters are not finite after {config.num_steps} steps")
    network = state.ema_network.for_sampling().cpu()
    record = {
        "trial": trial.name,
        "method": trial.method,
        "seed": trial.seed,
        "num_steps": config.num_steps,
        "config": config.flat(),
        "data_sha256": dataset.manifest.content_sha256,
        "step_flops": step_flops(config, **sizes),
        "num_parameters": _num_parameters(state.network),
        "num_parameters_sampling": _num_parameters(network),
        "seconds": seconds,
        "device": str(device),
        "loss_curve": curve.points,
    }
    pipeline = build_pipeline(
        network,
        vae,
        dataset.manifest.class_names,
        wnids=dataset.manifest.wnids,
        prediction=config.loss.prediction,
        scheduler=build_objective(config.loss).scheduler(),
        sampling=config.sampling,
    )
    _write_trial(trial, folder, pipeline, record)
    return read_record(trial, folder)


def _write_trial(trial: Trial, folder: Path, pipeline: MeanFlowPipeline, record: dict[str, Any]) -> None:
    """Writes the trial's folder atomically, by a rename."""
    partial = folder / f"{trial.name}.{uuid.uuid4().hex}.partial"
    save_generator(pipeline, partial / "generator")
    (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    try:
        partial.rename(folder / trial.name)
    except OSError:
        if not is_trained(trial, folder):
            raise
        shutil.rmtree(partial)  # Ray ran the task twice; the other copy finished first with the same result


def _num_parameters(network: NetworkModel) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _train_task(trial: Trial, data: str, cache_dir: str, folder: Path) -> str:
    set_up_logging()
    torch.set_num_threads(1)
    train_trial(trial, data, cache_dir, folder, torch.device("cuda" if ray.get_gpu_ids() else "cpu"))
    return trial.name


def train_all(
    trials: Iterable[Trial],
    data: str,
    cache_dir: str,
    folder: Path,
    flops_per_step: dict[str, float],
    *,
    use_gpu: bool,
) -> None:
    """Trains the missing trials in order, each as a Ray task with one thread, and one GPU if use_gpu.

    Ray retries a task whose process or node dies. Raises RunError if a trial fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.partial"):
        shutil.rmtree(leftover)
    trials = list(trials)
    missing = [trial for trial in trials if not is_trained(trial, folder)]
    logger.info("%d of %d trials to train", len(missing), len(trials))
    gigaflops = {trial.name: trial.num_steps * flops_per_step[trial.method] / 1e9 for trial in missing}
    progress = Progress(logger, "trained", "gigaflop", round(sum(gigaflops.values())))
    task = ray.remote(num_cpus=1, num_gpus=1 if use_gpu else 0, max_retries=5)(_train_task)
    pending = [task.remote(trial, data, cache_dir, folder) for trial in missing]
    done: list[str] = []
    for name in as_completed(pending):
        done.append(name)
        progress.update(round(sum(gigaflops[name] for name in done)), f"{len(done)} of {len(missing)} trials")


def as_completed(pending: list[ray.ObjectRef]) -> Iterator[str]:
    """Yields the results of tasks as they complete. Raises RunError if one fails."""
    while pending:
        finished, pending = ray.wait(pending)
        try:
            names = ray.get(finished)
        except ray.exceptions.RayError as error:
            logger.error("%s", error)
            reason = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
            raise RunError(
                f"a trial failed: {reason}; finished trials are kept; rerun the same command to resume"
            ) from error
        yield from names
