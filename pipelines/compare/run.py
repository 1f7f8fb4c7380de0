"""Runs a comparison: trains and measures what is missing, then writes the report."""

import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from pipelines.compare.report import collect_results, settings_of, table, title_of
from pipelines.compare.velocity_figure import draw_velocities
from pipelines.errors import InputError
from pipelines.evaluate.job import EvaluateJob, ReferenceJob
from pipelines.evaluate.judge import load_judge
from pipelines.evaluate.make_reference import make_reference
from pipelines.evaluate.real_images import find_real_images
from pipelines.evaluate.samples import SampleRule, Setting
from pipelines.evaluate.sources import GeneratedSamples, Models
from pipelines.latents.manifest import Manifest, read_manifest
from pipelines.plan.cost import num_parameters, num_sampling_parameters
from pipelines.progress import Progress
from pipelines.sweep.evaluations import evaluate_once
from pipelines.sweep.experiments import flops_of_step, train_experiments
from pipelines.sweep.parent_run import begin_or_resume, ends_run
from pipelines.tracking.run import Run
from pipelines.train.job import TrainJob
from pipelines.train.record import TrainingRecord

logger = logging.getLogger(__name__)

REPORT_FILES = ("report.json", "table.md", "comparison.png", "samples.png", "paths.png")
NUM_GRID_IMAGES, NUM_GRID_COLUMNS = 8, 4


def compare(job: CompareJob) -> dict[str, Any]:
    """Trains and measures what is missing, writes the report's files, and returns the report.

    Raises InputError for invalid input, RunError if a training fails.
    """
    job = replace(
        job,
        data=storage.absolute(job.data),
        train_images=storage.absolute(job.train_images),
        held_out_images=storage.absolute(job.held_out_images),
        judge=storage.absolute(job.judge),
        output=Path(storage.output_location(str(job.output), "--output")),
    )
    manifest = read_manifest(job.data)
    entrants = plan_entrants(job, lambda config: flops_of_step(config, manifest))
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
    require_judged_classes(job, manifest)
    parameters = {"data": storage.redact(job.data), "num_steps": job.num_steps, "baseline": job.baseline}
    run = begin_or_resume(str(job.output), common.experiment, parameters)
    with ends_run(run):
        make_reference_once(job, manifest)
        trained = train_experiments(distinct_experiments(entrants), common, run, job.max_concurrent)
        trained.require_all()
        records = trained.records
        reports = evaluate_entrants(job, entrants, records)
        report = build_report(job, manifest, entrants, records, reports)
        write_report(job, report, entrants, records)
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
    for location in (job.train_images, job.held_out_images):
        find_real_images(location, manifest.class_names)


def reference_of(job: CompareJob) -> Path:
    """The file with the statistics of the training images."""
    return job.output / "reference.npz"


def make_reference_once(job: CompareJob, manifest: Manifest) -> None:
    """Computes the statistics of the training images in the judge's features."""
    if reference_of(job).is_file():
        return
    reference = ReferenceJob(
        images=job.train_images,
        image_size=manifest.recipe.image_size,
        extractor=job.judge,
        output=str(reference_of(job)),
        num_features=0,
        device=job.device,
    )
    make_reference(reference)


def evaluate_entrants(
    job: CompareJob, entrants: Sequence[Entrant], records: Mapping[str, TrainingRecord]
) -> dict[str, list[dict[str, Any]]]:
    """{experiment: reports} of the generators: by Euler's method last, and before it a velocity's by Heun's.

    The first generator's last report also has the real images.
    """
    experiments = {entrant.experiment.name: entrant.experiment for entrant in entrants}
    progress = Progress(logger, "evaluated", "images", len(experiments) * len(job.nfe) * job.num_samples)
    held_out: str | None = job.held_out_images
    reports: dict[str, list[dict[str, Any]]] = {}
    for name, experiment in experiments.items():
        euler = EvaluateJob(
            output=job.output,
            model="",  # `evaluate_once` replaces model and output
            reference=str(reference_of(job)),
            extractor=job.judge,
            held_out_images=held_out,
            steps=tuple(sorted(job.nfe)),
            num_samples=job.num_samples,
            num_precision_recall=0,
            device=job.device,
        )
        jobs = {"euler": euler}
        half = tuple(nfe // 2 for nfe in sorted(job.nfe) if nfe % 2 == 0)  # two evaluations a step
        if experiment.config.loss.prediction == "velocity" and half:
            jobs = {"heun": replace(euler, steps=half, solvers=("heun",), held_out_images=None), **jobs}
        folder = job.output / "evaluations"
        reports[name] = [
            evaluate_once(records[name], each, f"{folder}/{name}-{key}.json") for key, each in jobs.items()
        ]
        held_out = None
        progress.update(
            len(reports) * len(job.nfe) * job.num_samples, f"{len(reports)} of {len(experiments)} generators"
        )
    return reports


def build_report(
    job: CompareJob,
    manifest: Manifest,
    entrants: Sequence[Entrant],
    records: Mapping[str, TrainingRecord],
    reports: Mapping[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    """The report as JSON values: real images, results and costs."""
    first = reports[entrants[0].experiment.name][-1]
    of_first_budget = [entrant for entrant in entrants if entrant.budget == job.budgets[0]]
    report = {
        **settings_of(job),
        "distance": first["protocol"]["distance"],
        "held_out": first["held_out"],
        "reconstruction": first["reconstruction"],
        "machine": "{device}, {workers} workers".format(**first["machine"]),
        "results": collect_results(entrants, reports),
        "costs": [
            costs_of(method, [e for e in of_first_budget if e.method == method], manifest, records, reports)
            for method in job.methods
        ],
    }
    return dict(json.loads(json.dumps(report)))


def costs_of(
    method: str,
    entrants: Sequence[Entrant],
    manifest: Manifest,
    records: Mapping[str, TrainingRecord],
    reports: Mapping[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    """A method's parameters, FLOPs and times. Times are medians over the logged intervals and the seeds."""
    config, rates, seconds = entrants[0].experiment.config, [], dict[str, list[float]]()
    for entrant in entrants:
        record = records[entrant.experiment.name]
        history = MlflowClient(record.tracking_uri).get_metric_history(record.mlflow_run_id, "images_per_second")
        rates += [metric.value for metric in history]
        for entry in reports[entrant.experiment.name][-1]["samples"]:
            seconds.setdefault(str(entry["num_function_evaluations"]), []).append(entry["seconds_per_image"])
    return {
        "method": method,
        "step_flops": flops_of_step(config, manifest),
        "seconds_per_step": config.global_batch_size / statistics.median(rates),
        "num_parameters": num_parameters(config.network, **manifest.network_sizes),
        "num_parameters_sampling": num_sampling_parameters(config.network, **manifest.network_sizes),
        "milliseconds_per_image": {nfe: 1000.0 * statistics.median(values) for nfe, values in seconds.items()},
    }


def write_report(
    job: CompareJob, report: dict[str, Any], entrants: Sequence[Entrant], records: Mapping[str, TrainingRecord]
) -> None:
    """Writes REPORT_FILES. The samples are those of the first budget and seed."""
    # Every third sample: eight different classes of the demo's ten.
    indices = 3 * np.arange(NUM_GRID_IMAGES)
    rule, samples = SampleRule(base_seed=0, labels="balanced"), {}
    for entrant in entrants:
        if (entrant.budget, entrant.seed) == (job.budgets[0], job.seeds[0]):
            published = records[entrant.experiment.name].published
            assert published is not None
            device = torch.device("cpu")
            models = Models(device, load_pipeline(Path(published.generator), device))
            samples[title_of(entrant.method)] = {
                nfe: np.concatenate(
                    [
                        batch.pixels.numpy()
                        for batch in GeneratedSamples(Setting(num_steps=nfe), rule, indices).batches(
                            models, len(indices)
                        )
                    ]
                )
                for nfe in report["nfe"]
            }
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
