"""The driver: prepares a refinement, runs it on Ray Train workers, and publishes the generators."""

import json
import logging
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException

from pipelines import storage
from pipelines.cluster import start_ray
from pipelines.errors import InputError
from pipelines.extractors.opening import absolute_extractor
from pipelines.refine.costs import describe
from pipelines.refine.inputs import Generator, Metric, class_counts, open_generator, open_metrics
from pipelines.refine.job import RefineJob
from pipelines.refine.plots import plot_distances
from pipelines.refine.publishing import FinishedRefinement, publish_generators
from pipelines.refine.worker import WorkerTask, refine_worker
from pipelines.tracking.provenance import code_identity
from pipelines.tracking.registry import REGISTRY_SCHEMES, find_version
from pipelines.tracking.run import Run
from pipelines.training.driver import claim_run, open_run, run_workers, with_workers
from pipelines.training.record import (
    TrainingRecord,
    build_record,
    config_identity,
    read_record,
    require_run_name,
    require_same_experiment,
    write_record,
)

logger = logging.getLogger(__name__)

DISTANCES_FILE = "distances.png"


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Validated inputs of a refinement."""

    job: RefineJob
    """The job with absolute locations."""
    generator: Generator
    metrics: list[Metric]
    class_counts: list[int]
    record: TrainingRecord | None
    """Record of the run to resume; None for a new run."""

    @property
    def identity(self) -> dict[str, Any]:
        """The settings and hashes that must not change on resume."""
        content = {
            "command": "pipelines.refine",
            "config": config_identity(self.job.config),
            "generator_sha256": self.generator.weights_sha256,
            "class_counts": self.class_counts,
            "metrics": {
                metric.key: {
                    "weight": metric.weight,
                    "extractor": metric.extractor.identity,
                    "reference_sha256": metric.reference.sha256,
                }
                for metric in self.metrics
            },
        }
        return dict(json.loads(json.dumps(content)))


def refine(preset: str, job: RefineJob) -> TrainingRecord:
    """Starts or resumes a refinement, runs it to its end, publishes its generators, and returns its record.

    Raises InputError for invalid input, RunError if it fails, and SystemExit if it is stopped.
    """
    ready = prepare(job)
    start_ray(needed_cpus=ready.job.num_workers or 1)
    job = with_workers(ready.job, ready.job.config.global_batch_size, ready.record)
    if job.config.measure_samples < job.workers:
        raise InputError(
            f"measure_samples must be at least the {job.workers} workers, but got {job.config.measure_samples}"
        )
    stop_request = claim_run(job, job.config.num_steps, ready.record)
    run, record = open_run(job, ready.record, lambda tracking_uri: _begin_run(job, preset, ready, tracking_uri))
    with run.ends():
        task = WorkerTask(
            job=job,
            tracking_uri=run.tracking_uri,
            run_id=run.run_id,
            stop_request=stop_request,
            class_counts=ready.class_counts,
        )
        checkpoint, step = run_workers(refine_worker, task)
        if record.published is not None and record.published.step == step:
            logger.info("the generators of step %d are already published", step)
            return record
        finished = FinishedRefinement(
            job=job, preset=preset, generator=ready.generator, metrics=ready.metrics, checkpoint=checkpoint, step=step
        )
        record = replace(record, published=publish_generators(finished, run))
        write_record(job, record)
        try:
            _plot(job, ready.metrics, run)
        except MlflowException as error:
            logger.warning("%s is missing, because MLflow does not answer: %s", DISTANCES_FILE, error)
        return record


def dry_run(preset: str, job: RefineJob) -> str:
    """Describes the refinement and its costs. Raises InputError for invalid input."""
    ready = prepare(job)
    return describe(preset, ready.job, ready.generator, ready.metrics)


def prepare(job: RefineJob) -> Preparation:
    """Resolves locations and opens all inputs. Writes nothing. Raises InputError for invalid input."""
    require_run_name(job.run_name)
    job = _with_absolute_locations(job)
    job = _with_fixed_version(job)
    generator = open_generator(job)
    if job.config.decoder_checkpointing and not generator.pipeline.vae._supports_gradient_checkpointing:
        raise InputError(
            f"--decoder-checkpointing is not possible with {type(generator.pipeline.vae).__name__}; to save memory, use "
            f"--samples-per-pass"
        )
    metrics = open_metrics(job, generator.pipeline.image_size)
    if generator.was_multi_step:
        logger.warning(
            "%s was trained for sampling in many steps: its one-step images are blurred averages. The refinement turns it "
            "into a one-step generator, which no longer samples in many steps",
            job.model,
        )
    counts = class_counts(job, generator)
    record = read_record(job)
    ready = Preparation(job=job, generator=generator, metrics=metrics, class_counts=counts, record=record)
    if record is not None:
        require_same_experiment(job, job.config, ready.identity, record)
    return ready


def _with_fixed_version(job: RefineJob) -> RefineJob:
    """Replaces an alias by the version that it now has, because it may move while the workers start."""
    if not (job.model.startswith("models:/") and "@" in job.model):
        return job
    version = find_version(job.model, os.environ.get("MLFLOW_TRACKING_URI"))
    if version is None:
        raise InputError(f"--model {job.model} is not registered; check its name and MLFLOW_TRACKING_URI")
    return replace(job, model=version.uri)


def _with_absolute_locations(job: RefineJob) -> RefineJob:
    """Returns the job with absolute locations, because Ray's processes run in other working directories."""
    return replace(
        job,
        model=job.model if job.model.startswith(REGISTRY_SCHEMES) else storage.absolute(job.model),
        storage=storage.output_location(job.storage, "--storage").rstrip("/"),
        extractors=tuple(absolute_extractor(name) for name in job.extractors),
        held_out_extractors=tuple(absolute_extractor(name) for name in job.held_out_extractors),
        references=tuple(storage.absolute(location) for location in job.references),
        held_out_references=tuple(storage.absolute(location) for location in job.held_out_references),
        extractor_weights=job.extractor_weights and job.extractor_weights.absolute(),
        data=job.data and storage.absolute(job.data),
    )


def _begin_run(job: RefineJob, preset: str, ready: Preparation, tracking_uri: str) -> tuple[Run, TrainingRecord]:
    """Creates a new refinement's MLflow run and record."""
    parameters = {
        "preset": preset,
        **job.config.flat(),
        "model": storage.redact(job.model),
        "model.transformer_sha256": ready.generator.weights_sha256,
        "trained_on": ", ".join(metric.label for metric in ready.metrics if metric.weight is not None),
        "held_out": ", ".join(metric.label for metric in ready.metrics if metric.weight is None),
        "num_workers": job.workers,
        "samples_per_pass": job.samples_per_pass,
    }
    run = Run.begin(tracking_uri, job.experiment, job.run_name, parameters, code_identity())
    run.log_dict(ready.identity, "configuration.json")
    return run, build_record(job, preset, job.config.num_steps, ready.identity, run, ready.generator.weights_sha256)


def _plot(job: RefineJob, metrics: list[Metric], run: Run) -> None:
    """Plots all measured distances against the step, in the run's folder and in MLflow."""
    run.flush()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / DISTANCES_FILE
        histories = {metric.key: run.client.get_metric_history(run.run_id, metric.key) for metric in metrics}
        points = {
            key: {point.step: point.value for point in sorted(history, key=lambda point: point.step)}
            for key, history in histories.items()
        }
        plot_distances(points, file)
        run.log_file(file, "refinement")
        filesystem, folder = storage.open_storage(job.run_location)
        storage.write_bytes(filesystem, f"{folder}/{DISTANCES_FILE}", file.read_bytes())
        run.flush()
