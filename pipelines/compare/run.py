"""Runs a comparison: trains and measures what is missing, then writes the report."""

import json
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow import MlflowClient

from meanflow_core.generator import load_pipeline
from pipelines import storage
from pipelines.compare.job import BUDGET_TITLES, CompareJob
from pipelines.compare.plan import Entrant, distinct_experiments, plan_entrants
from pipelines.compare.plots import plot_quality, plot_samples
from pipelines.compare.report import Reports, collect_results, table, title_of
from pipelines.compare.velocity_figure import draw_velocities
from pipelines.errors import InputError
from pipelines.evaluate.job import EvaluateJob, ReferenceJob
from pipelines.evaluate.make_reference import make_reference
from pipelines.evaluate.real_images import find_real_images
from pipelines.evaluate.samples import SampleRule, Setting
from pipelines.evaluate.sources import GeneratedSamples, Models
from pipelines.judge.network import load_judge
from pipelines.latents.manifest import Manifest, read_manifest
from pipelines.plan.cost import num_parameters, num_sampling_parameters
from pipelines.progress import Progress
from pipelines.sweep.evaluations import evaluate_once
from pipelines.sweep.experiments import flops_of_step, train_experiments
from pipelines.sweep.parent_run import begin_or_resume
from pipelines.tracking.run import Run
from pipelines.train.job import TrainJob
from pipelines.training.record import TrainingRecord

logger = logging.getLogger(__name__)

REPORT_FILES = ("report.json", "table.md", "comparison.png", "samples.png", "paths.png")
RECORDED_OPTIONS = ("methods", "adapt", "baseline", "from_baseline", "seeds", "num_steps", "budgets", "num_samples")
NUM_GRID_IMAGES, NUM_GRID_COLUMNS = 8, 4


@dataclass(frozen=True)
class Measured:
    """Trained and evaluated entrants."""

    entrants: Sequence[Entrant]
    records: dict[str, TrainingRecord]
    """{experiment: record}."""
    reports: Reports
    """{experiment: reports}: by Euler's method last, and before it a velocity's by Heun's."""


def compare(job: CompareJob) -> dict[str, Any]:
    """Trains and measures what is missing, writes the report's files, and returns the report.

    Raises InputError for invalid input, RunError if a training fails.
    """
    job = replace(job, output=Path(storage.output_location(str(job.output), "--output")))
    manifest = read_manifest(job.data)
    entrants = plan_entrants(job, lambda config: flops_of_step(config, manifest))
    require_judged_classes(job, manifest)
    common = TrainJob(
        data=job.data,
        storage=str(job.output / "runs"),
        run_name=job.output.name,
        model_name=job.output.name,
        config=entrants[0].experiment.config,
        cpu_threads=1,
        cache_dir=job.cache_dir,
        keep_checkpoints=1,
        device=job.device,
    )
    parameters = {"data": storage.redact(job.data), "num_steps": job.num_steps, "baseline": job.baseline}
    run = begin_or_resume(str(job.output), common.experiment, parameters)
    with run.ends():
        reference = make_reference_once(job, manifest)
        trained = train_experiments(distinct_experiments(entrants), common, run, job.max_concurrent)
        trained.require_all()
        measured = Measured(entrants, trained.records, evaluate_all(job, entrants, trained.records, reference))
        report = build_report(job, manifest, measured)
        write_report(job, report, measured)
        log_report(job, report, run)
    return report


def require_judged_classes(job: CompareJob, manifest: Manifest) -> None:
    """Raises InputError if the judge or the real images have other classes than the latents, before anything is trained."""
    judged = load_judge(Path(job.judge)).config.class_names
    if list(judged) != list(manifest.class_names):
        raise InputError(
            f"the judge in {job.judge} was trained on the classes {', '.join(judged)}, but the latents have "
            f"{', '.join(manifest.class_names)}; choose a --judge trained on those"
        )
    find_real_images(job.held_out_images, manifest.class_names)


def make_reference_once(job: CompareJob, manifest: Manifest) -> str:
    """Computes the statistics of the training images in the judge's features, and returns their file."""
    file = job.output / "reference.npz"
    if not file.is_file():
        size = manifest.recipe.image_size
        options = ReferenceJob(output=str(file), images=job.train_images, image_size=size, extractor=job.judge)
        make_reference(replace(options, num_features=0, device=job.device))
    return str(file)


def evaluate_all(
    job: CompareJob, entrants: Sequence[Entrant], records: dict[str, TrainingRecord], reference: str
) -> Reports:
    """The reports of all generators; see `Measured.reports`. The last one of the first also has the real images."""
    experiments = {entrant.experiment.name: entrant.experiment for entrant in entrants}
    images_each = len(job.nfe) * job.num_samples
    progress = Progress(logger, "evaluated", "images", len(experiments) * images_each)
    euler = EvaluateJob(
        output=job.output,
        model="",  # `evaluate_once` replaces model and output
        reference=reference,
        extractor=job.judge,
        held_out_images=job.held_out_images,
        steps=tuple(sorted(job.nfe)),
        labels="balanced",
        num_samples=job.num_samples,
        num_precision_recall=0,
        device=job.device,
    )
    half = tuple(nfe // 2 for nfe in euler.steps if nfe % 2 == 0)  # Heun's method takes two evaluations a step
    reports: dict[str, list[dict[str, Any]]] = {}
    for name, experiment in experiments.items():
        jobs = {"euler": euler}
        if experiment.config.loss.prediction == "velocity" and half:
            jobs = {"heun": replace(euler, steps=half, solvers=("heun",), held_out_images=None), **jobs}
        folder = job.output / "evaluations"
        reports[name] = [
            evaluate_once(records[name], options, f"{folder}/{name}-{solver}.json") for solver, options in jobs.items()
        ]
        euler = replace(euler, held_out_images=None)
        progress.update(len(reports) * images_each, f"{len(reports)} of {len(experiments)} generators")
    return reports


def build_report(job: CompareJob, manifest: Manifest, measured: Measured) -> dict[str, Any]:
    """The report as JSON values: real images, results and costs."""
    first = measured.reports[measured.entrants[0].experiment.name][-1]
    report = {
        **{name: getattr(job, name) for name in RECORDED_OPTIONS},
        "nfe": sorted(job.nfe),
        "distance": first["protocol"]["distance"],
        "held_out": first["held_out"],
        "reconstruction": first["reconstruction"],
        "machine": "{device}, {workers} workers".format(**first["machine"]),
        "results": collect_results(measured.entrants, measured.reports),
        "costs": [costs_of(method, job.budgets[0], manifest, measured) for method in job.methods],
    }
    return dict(json.loads(json.dumps(report)))


def costs_of(method: str, budget: str, manifest: Manifest, measured: Measured) -> dict[str, Any]:
    """A method's parameters, FLOPs and times. Times are medians over the logged intervals and the seeds."""
    experiments = [e.experiment for e in measured.entrants if (e.method, e.budget) == (method, budget)]
    rates, seconds = [], dict[str, list[float]]()
    for experiment in experiments:
        record = measured.records[experiment.name]
        history = MlflowClient(record.tracking_uri).get_metric_history(record.mlflow_run_id, "images_per_second")
        rates += [metric.value for metric in history]
        for entry in measured.reports[experiment.name][-1]["samples"]:
            seconds.setdefault(str(entry["num_function_evaluations"]), []).append(entry["seconds_per_image"])
    config = experiments[0].config
    return {
        "method": method,
        "step_flops": flops_of_step(config, manifest),
        "seconds_per_step": config.global_batch_size / statistics.median(rates),
        "num_parameters": num_parameters(config.network, **manifest.network_sizes),
        "num_parameters_sampling": num_sampling_parameters(config.network, **manifest.network_sizes),
        "milliseconds_per_image": {nfe: 1000.0 * statistics.median(values) for nfe, values in seconds.items()},
    }


def write_report(job: CompareJob, report: dict[str, Any], measured: Measured) -> None:
    """Writes REPORT_FILES. The samples are those of the first budget and seed."""
    # Every third sample: eight different classes of the demo's ten.
    indices, rule, samples = 3 * np.arange(NUM_GRID_IMAGES), SampleRule(base_seed=0, labels="balanced"), {}
    for entrant in measured.entrants:
        if (entrant.budget, entrant.seed) == (job.budgets[0], job.seeds[0]):
            published = measured.records[entrant.experiment.name].published
            assert published is not None
            models = Models(torch.device("cpu"), load_pipeline(Path(published.generator)))
            batches = {
                nfe: GeneratedSamples(Setting(num_steps=nfe), rule, indices).batches(models, NUM_GRID_IMAGES)
                for nfe in report["nfe"]
            }
            samples[title_of(entrant.method)] = {nfe: next(batch).pixels.numpy() for nfe, batch in batches.items()}
    title = f"the same {NUM_GRID_IMAGES} seeds and classes in every cell, not selected; {BUDGET_TITLES[job.budgets[0]]}"
    plot_samples(samples, job.output / "samples.png", num_columns=NUM_GRID_COLUMNS, title=title)
    plot_quality(report, job.output / "comparison.png")
    draw_velocities(job.output / "paths.png")
    (job.output / "table.md").write_text(table(report))
    (job.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def log_report(job: CompareJob, report: dict[str, Any], run: Run) -> None:
    """Logs results and files to the comparison's MLflow run."""
    for result in report["results"]:  # the NFE is the metric's step, so that MLflow draws the curve
        name = f"evaluate/{result['budget']}/{result['method'].rpartition(':')[2]}/{result['solver']}"
        run.log_metrics({f"{name}/{key}": result[key]["mean"] for key in ("frechet", "accuracy")}, result["nfe"])
    for file in REPORT_FILES:
        run.log_file(job.output / file, "comparison")
    logger.info("logged to MLflow run %s at %s", run.run_id, run.tracking_uri)
