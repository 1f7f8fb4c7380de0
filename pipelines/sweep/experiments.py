"""Trains experiments: a Ray task per experiment runs the driver of `meanflow train`, several at a time.

A driver takes no CPU of Ray's, so that its workers cannot wait for a CPU that drivers hold.
"""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from meanflow_core.config import TrainingConfig
from pipelines.cluster import choose_gpus, start_ray
from pipelines.command_line import set_up_logging
from pipelines.errors import InputError, RunError
from pipelines.latents.manifest import Manifest, read_manifest
from pipelines.plan.cost import step_flops
from pipelines.progress import Progress
from pipelines.tracking.run import Run
from pipelines.train import run
from pipelines.train.job import TrainJob
from pipelines.train.prepare import prepare, with_absolute_locations
from pipelines.training import stopping
from pipelines.training.record import TrainingRecord, read_record

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
MAX_DRIVER_RETRIES = 3  # of a driver whose process or node is lost; its run goes on from the last checkpoint


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One training run of a sweep or comparison."""

    name: str
    """Name of the run and of its folder."""
    preset: str
    """Preset that the configuration is a variant of."""
    config: TrainingConfig
    """The full configuration."""
    init_from: str | None = None
    """Experiment whose generator is the initial network."""


@dataclass(frozen=True)
class Trained:
    """The experiments after training."""

    records: dict[str, TrainingRecord]
    """{name: record} of those that are finished."""
    failures: dict[str, str]
    """{name: reason} of the others."""

    def require_all(self) -> None:
        """Raises RunError if experiments failed."""
        if self.failures:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.failures.items())
            raise RunError(
                f"{len(self.failures)} of {len(self.failures) + len(self.records)} experiments failed ({reasons}); the same "
                f"command keeps the others and tries these again"
            )


def train_experiments(
    experiments: Sequence[Experiment], common: TrainJob, parent: Run, max_concurrent: int | None = None
) -> Trained:
    """Trains the experiments that are not finished. One that fails does not stop the others.

    common: the other options of every training; its storage is the folder of all runs. parent: the MLflow run that contains
    theirs. max_concurrent: trainings at a time. Default: as many as the cluster has CPUs or GPUs for.
    Raises InputError for invalid input, and SystemExit after SIGTERM, when the running ones have saved a checkpoint.
    """
    num_workers = common.num_workers or common.min_workers or 1  # not all GPUs: several experiments train at a time
    common = replace(with_absolute_locations(common), parent_run_id=parent.run_id, num_workers=num_workers)
    start_ray(needed_cpus=num_workers)
    use_gpu = choose_gpus(common.device, common.min_workers or num_workers)
    common = replace(common, device="gpu" if use_gpu else "cpu")
    trainings = _Trainings(experiments, common, parent.tracking_uri, max_concurrent)
    with _stop_requested() as stop:
        while trainings.are_left(starting=not stop.is_set()):
            if stop.is_set():
                trainings.request_stop()
            else:
                trainings.start()
            trainings.collect()
    if stop.is_set():
        print("stopped with checkpoints; the same command resumes from them", flush=True)
        raise SystemExit(128 + signal.SIGTERM)
    return Trained(trainings.records, trainings.failures)


class _Trainings:
    """The experiments that wait, are being trained, are finished or have failed."""

    def __init__(
        self, experiments: Sequence[Experiment], common: TrainJob, tracking_uri: str, max_concurrent: int | None
    ) -> None:
        self._jobs = {experiment.name: _job_of(experiment, common) for experiment in experiments}
        assert len(self._jobs) == len(experiments), "names of experiments must differ"
        self.records = {name: record for name, job in self._jobs.items() if (record := finished_record(job))}
        self.failures: dict[str, str] = {}
        self._running: dict[ray.ObjectRef, Experiment] = {}
        self._max_concurrent = max_concurrent
        # With RAY_ADDRESS, a driver counts the cluster's GPUs instead of its own, of which it has none.
        self._variables = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "MLFLOW_TRACKING_URI": tracking_uri}
        manifest = read_manifest(common.data)
        self._gigaflops = {
            experiment.name: 1 + int(flops_of_step(experiment.config, manifest) * experiment.config.num_steps / 1e9)
            for experiment in experiments
        }
        self._done = sum(self._gigaflops[name] for name in self.records)
        total = sum(self._gigaflops.values())
        self._progress = Progress(logger, "trained", "gigaflop", total, start=self._done)
        self._waiting = [experiment for experiment in experiments if experiment.name not in self.records]
        # The longest first, counting those that start from them, so that none of them runs alone at the end.
        followers = dict.fromkeys(self._jobs, 0)
        for experiment in experiments:
            if experiment.init_from is not None:
                followers[experiment.init_from] += self._gigaflops[experiment.name]
        self._waiting.sort(key=lambda experiment: -self._gigaflops[experiment.name] - followers[experiment.name])
        logger.info("%d of %d experiments to train", len(self._waiting), len(experiments))

    def are_left(self, *, starting: bool) -> bool:
        """Whether experiments are being trained, or will be started."""
        return bool(self._running or (starting and self._waiting))

    def start(self) -> None:
        """Starts as many experiments as there is room for."""
        for experiment in list(self._waiting):
            start = experiment.init_from
            if start in self.failures:
                self._waiting.remove(experiment)
                self.failures[experiment.name] = f"{start}, which it starts from, failed"
            elif (start is None or start in self.records) and len(self._running) < self._capacity(experiment):
                self._waiting.remove(experiment)
                self._running[self._start(experiment)] = experiment

    def collect(self) -> None:
        """Waits for a moment, and takes the results of the experiments that have ended."""
        if not self._running:
            return
        for reference in ray.wait(list(self._running), timeout=POLL_SECONDS)[0]:
            name = self._running.pop(reference).name
            error = _error_of(reference)
            record = finished_record(self._jobs[name]) if error is None else None
            if record is None:
                self.failures[name] = error or "its training record is missing"
                logger.error("experiment %s failed: %s", name, self.failures[name])
                continue
            self.records[name] = record
            self._done += self._gigaflops[name]
            self._progress.update(self._done, f"{len(self.records)} of {len(self._jobs)} experiments, last {name}")

    def request_stop(self) -> None:
        """Requests that the experiments save a checkpoint and stop."""
        for experiment in self._running.values():
            stopping.request_stop(self._jobs[experiment.name].run_location)

    def _capacity(self, experiment: Experiment) -> int:
        """How many such trainings may run at a time."""
        job = self._jobs[experiment.name]
        available = ray.cluster_resources().get("GPU" if job.device == "gpu" else "CPU", 0)
        validates = job.validation_data is not None  # in a task of its own
        return self._max_concurrent or max(1, int(available) // (job.workers + validates))

    def _start(self, experiment: Experiment) -> ray.ObjectRef:
        logger.info("training %s", experiment.name)
        environment = {"env_vars": self._variables}
        task = ray.remote(num_cpus=0, max_retries=MAX_DRIVER_RETRIES, runtime_env=environment)(_train)
        return task.options(name=f"train {experiment.name}").remote(experiment.preset, self._jobs[experiment.name])


def finished_record(job: TrainJob) -> TrainingRecord | None:
    """The record of a run that has published its last step. None if there is still something to do.

    Raises InputError if the run was trained with other settings.
    """
    record = read_record(job)
    if record is None or record.published is None or record.published.step != job.config.num_steps:
        return None
    return prepare(job).record


def _job_of(experiment: Experiment, common: TrainJob) -> TrainJob:
    initial = None if experiment.init_from is None else f"{common.storage}/{experiment.init_from}/generator"
    return replace(common, run_name=experiment.name, config=experiment.config, init_from=initial or common.init_from)


def flops_of_step(config: TrainingConfig, manifest: Manifest) -> float:
    """Training FLOPs of a step. Counted once for all configurations that differ in neither network, objective nor batch.

    Raises InputError if the network does not fit the data.
    """
    counted = TrainingConfig(network=config.network, loss=config.loss, global_batch_size=config.global_batch_size)
    try:
        return step_flops(counted, **manifest.network_sizes)
    except ValueError as error:
        raise InputError(str(error)) from error


def _train(preset: str, job: TrainJob) -> None:
    """The Ray task of an experiment."""
    set_up_logging()
    logging.getLogger("pipelines").setLevel(logging.WARNING)  # the worker logs the progress
    try:
        run.train(preset, job)
    except SystemExit as stop:  # would end Ray's worker process
        raise RunError("stopped before its end") from stop


def _error_of(reference: ray.ObjectRef) -> str | None:
    """What a driver failed with. None if it succeeded."""
    try:
        ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, (InputError, RunError)):
            return str(cause)
        logger.error("%s", error)
        return f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}"
    except ray.exceptions.RayError as error:
        return f"{type(error).__name__}: {error}"
    return None


@contextlib.contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """An event that the first SIGTERM sets. A second one ends the process."""
    stop = threading.Event()

    def on_sigterm(number: int, frame: Any) -> None:
        if stop.is_set():
            raise SystemExit(128 + signal.SIGTERM)
        logger.warning("stop requested: saving checkpoints first")
        stop.set()

    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
