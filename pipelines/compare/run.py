"""Runs a comparison: trains and measures what is missing, then writes the report."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from meanflow_core.autoencoder import reconstruct, weight_hash
from meanflow_core.generator import load_pipeline
from meanflow_core.metrics import FeatureStatistics
from pipelines import storage
from pipelines.cluster import choose_gpus, start_ray
from pipelines.compare.job import CompareJob
from pipelines.compare.measuring_trials import SamplingPoint, draw_images, measure, measure_all, missing_points
from pipelines.compare.methods import BUDGET_TITLES, Budget, Trial, build_methods, plan_trials, steps_in_budget
from pipelines.compare.plots import plot_losses, plot_quality, plot_samples
from pipelines.compare.results import collect_results, ratios
from pipelines.compare.table import table
from pipelines.compare.timing import NUM_TIMED_IMAGES, describe_hardware, time_sampling, time_training
from pipelines.compare.training_trials import is_trained, read_record, train_all
from pipelines.compare.velocity_figure import draw_velocities
from pipelines.errors import InputError
from pipelines.evaluate.judge import Judge, load_judge
from pipelines.evaluate.real_images import find_real_images, read_evenly
from pipelines.latents.autoencoder import open_autoencoder
from pipelines.latents.manifest import read_manifest
from pipelines.plan.cost import step_flops
from pipelines.tracking.provenance import code_identity
from pipelines.tracking.run import Run

logger = logging.getLogger(__name__)

SETTINGS = "settings.json"
EXPERIMENT = "meanflow-ray-comparison"
REPORT_FILES = ("report.json", "table.md", "comparison.png", "loss_curves.png", "samples.png", "paths.png")
NUM_GRID_IMAGES, NUM_GRID_COLUMNS = 8, 4


@dataclass(frozen=True, kw_only=True)
class RealImages:
    """The real images that measurements need."""

    num_train: int
    train: FeatureStatistics
    """Statistics of the training images' features."""
    held_out: torch.Tensor
    """(N, H, W, 3) uint8."""
    labels: torch.Tensor
    """(N,): class ids of the held-out images."""


def fixed_settings(job: CompareJob) -> dict[str, Any]:
    """Settings that a continued comparison must keep: all but methods, seeds, budgets and NFE."""
    fixed = {
        "num_steps": job.num_steps,
        "data.sha256": read_manifest(job.data).content_sha256,
        "train_images": storage.absolute(job.train_images),
        "held_out_images": storage.absolute(job.held_out_images),
        "judge_sha256": weight_hash(load_judge(job.judge)),
        "num_samples": job.num_samples,
        "flops_of": job.flops_of,
    }
    configs = {name: method.config.flat() for name, method in build_methods(1000).items()}  # steps depend on the budget
    flat = {f"{name}.{key}": value for name, config in configs.items() for key, value in config.items()}
    return dict(json.loads(json.dumps({**fixed, **flat})))


def begin_or_continue(output: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a new output folder, or checks that those of an existing one are the same.

    Raises InputError if settings differ, and lists them; or if the folder holds something else.
    """
    if not (output / SETTINGS).is_file():
        if output.is_dir() and any(output.iterdir()):
            raise InputError(
                f"--output {output} holds something other than a comparison; choose an empty or a new folder"
            )
        filesystem, path = storage.open_storage(str(output / SETTINGS))
        storage.write_bytes(filesystem, path, (json.dumps(settings, indent=2) + "\n").encode())
        return
    previous = json.loads((output / SETTINGS).read_text())
    different = [key for key in sorted({*previous, *settings}) if previous.get(key) != settings.get(key)]
    if different:
        changes = "; ".join(f"{key} was {previous.get(key)}, is {settings.get(key)}" for key in different)
        raise InputError(f"--output {output} was started with other settings ({changes}); choose another --output")


def read_real_images(job: CompareJob, judge: Judge) -> RealImages:
    """Reads the real images. Raises InputError if images, latents and judge differ in their classes."""
    names = list(read_manifest(job.data).class_names)
    if names != list(judge.config.class_names):
        raise InputError(
            f"the judge in {job.judge} was trained on the classes {', '.join(judge.config.class_names)}, but the "
            f"latents have {', '.join(names)}; choose a --judge trained on those"
        )
    size = judge.config.image_size
    sources = [find_real_images(location, names) for location in (job.train_images, job.held_out_images)]
    (train, _), (held_out, labels) = (read_evenly(source, size, len(source[2])) for source in sources)
    logger.info("extracting features of %d training images", len(train))
    statistics = FeatureStatistics.of(judge.predict(train).features)
    return RealImages(num_train=len(train), train=statistics, held_out=held_out, labels=labels)


def compare(job: CompareJob) -> dict[str, Any]:
    """Trains and measures what is missing, writes the report's files, and returns the report.

    Raises InputError for invalid input, RunError if a trial fails.
    """
    output = Path(storage.output_location(str(job.output), "--output"))
    folder, data = output / "trials", storage.absolute(job.data)
    judge = load_judge(job.judge)
    settings = fixed_settings(job)
    real = read_real_images(job, judge)
    begin_or_continue(output, settings)
    sizes = read_manifest(data).network_sizes
    flops_per_step = {name: step_flops(method.config, **sizes) for name, method in build_methods(1).items()}
    steps = {budget: steps_in_budget(budget, job.num_steps, flops_per_step, job.flops_of) for budget in job.budgets}
    trials = plan_trials(steps.values(), job.methods, job.seeds, flops_per_step)
    if not all(is_trained(trial, folder) and not missing_points(trial, folder, job.nfe) for trial in trials):
        start_ray(needed_cpus=1)
        use_gpu = choose_gpus(job.device)
        train_all(trials, data, job.cache_dir, folder, flops_per_step, use_gpu=use_gpu)
        measure_all(trials, folder, job.nfe, job.judge.absolute(), real.train, job.num_samples, use_gpu=use_gpu)
        ray.shutdown()  # frees the machine for the timings
    report = build_report(job, real, judge, steps, trials, folder, data)
    write_report(job, report, output, folder, steps[job.budgets[0]])
    log_report(job, report)
    return report


def build_report(
    job: CompareJob,
    real: RealImages,
    judge: Judge,
    steps: dict[Budget, dict[str, int]],
    trials: list[Trial],
    folder: Path,
    data: str,
) -> dict[str, Any]:
    """The report as JSON values: real images, results, ratios, loss curves and costs."""
    results = collect_results(steps, job.methods, job.seeds, job.nfe, folder)
    vae = open_autoencoder(data)
    reconstructions = torch.cat([reconstruct(vae, batch) for batch in real.held_out.split(100)])
    records = [
        {**read_record(trial, folder), "budgets": [b for b in job.budgets if steps[b][trial.method] == trial.num_steps]}
        for trial in trials
    ]
    report = {
        "num_train_images": real.num_train,
        "held_out": asdict(measure(judge, real.train, real.held_out, real.labels)),
        "reconstruction": asdict(measure(judge, real.train, reconstructions, real.labels)),
        "num_steps": job.num_steps,
        "num_samples": job.num_samples,
        "seeds": job.seeds,
        "nfe": sorted(job.nfe),
        "budgets": job.budgets,
        "flops_of": job.flops_of,
        "results": results,
        "ratios": ratios(results),
        "trials": records,
        **measure_costs(job, data, steps[job.budgets[0]], folder),
    }
    return dict(json.loads(json.dumps(report)))


def measure_costs(job: CompareJob, data: str, steps: dict[str, int], folder: Path) -> dict[str, Any]:
    """Times each method's training step and sampling in this process, with one thread or on the first GPU."""
    logger.info("timing training steps and sampling")
    device = torch.device("cuda" if torch.cuda.is_available() and job.device != "cpu" else "cpu")
    timed_nfe = sorted({min(job.nfe), max(job.nfe)})
    records = {
        method: read_record(Trial(method=method, seed=job.seeds[0], num_steps=steps[method]), folder)
        for method in job.methods
    }
    generators = {method: folder / record["trial"] / "generator" for method, record in records.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = time_training(job.methods, data, job.cache_dir, device, job.timed_rounds)
        sampling = time_sampling(generators, timed_nfe, device, job.timed_rounds)
        hardware = describe_hardware(device)
    finally:
        torch.set_num_threads(threads)
    return {
        "hardware": hardware,
        "timed_nfe": timed_nfe,
        "num_timed_images": NUM_TIMED_IMAGES,
        "decoder_milliseconds_per_image": sampling.decoder,
        "methods": [
            {
                "name": method,
                "title": build_methods(1)[method].title,
                **{key: record[key] for key in ("step_flops", "num_parameters", "num_parameters_sampling")},
                "seconds_per_step": seconds[method],
                "milliseconds_per_image": {str(count): sampling.by_nfe[count][method] for count in timed_nfe},
            }
            for method, record in records.items()
        ],
    }


def write_report(job: CompareJob, report: dict[str, Any], output: Path, folder: Path, steps: Mapping[str, int]) -> None:
    """Writes REPORT_FILES; samples are those of the first seed and the first budget."""
    samples = {}
    for method in job.methods:
        trial = Trial(method=method, seed=job.seeds[0], num_steps=steps[method])
        pipeline = load_pipeline(folder / trial.name / "generator")
        # Every third sample: eight different classes of the ten.
        indices = [3 * number for number in range(NUM_GRID_IMAGES)]
        samples[build_methods(1)[method].title] = {
            count: np.asarray(draw_images(pipeline, SamplingPoint(solver="euler", nfe=count), indices))
            for count in job.nfe
        }
    title = BUDGET_TITLES[job.budgets[0]]
    plot_samples(
        samples,
        output / "samples.png",
        num_columns=NUM_GRID_COLUMNS,
        subtitle=f"the same {NUM_GRID_IMAGES} seeds and classes in every cell, not selected; {title}",
    )
    plot_quality(report, output / "comparison.png")
    plot_losses(report, output / "loss_curves.png")
    draw_velocities(output / "paths.png")
    (output / "table.md").write_text(table(report))
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def log_report(job: CompareJob, report: dict[str, Any]) -> None:
    """Logs results and files to MLflow, if a tracking URI is given."""
    tracking_uri = job.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not tracking_uri:
        logger.info("no MLflow tracking URI given; the report is only in %s", job.output)
        return
    logged = ("num_steps", "num_samples", "seeds", "budgets", "flops_of")
    parameters = {"data": job.data, "methods": job.methods, **{key: report[key] for key in logged}}
    run = Run.begin(tracking_uri, EXPERIMENT, job.output.absolute().name, parameters, code_identity())
    for result in report["results"]:  # the NFE is the metric's step, so that MLflow draws the curve
        name = f"evaluate/{result['budget']}/{result['method']}/{result['solver']}"
        run.log_metrics({f"{name}/{key}": result[key]["mean"] for key in ("frechet", "accuracy")}, result["nfe"])
    for file in REPORT_FILES:
        run.log_file(job.output / file, "comparison")
    run.end("FINISHED")
    logger.info("logged to MLflow run %s at %s", run.run_id, run.tracking_uri)
