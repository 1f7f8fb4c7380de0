"""Flow matching, MeanFlow, MeanFlow along its own velocity and improved MeanFlow, side by side.

    python -m pipelines.comparison --data demo/latents --train-images demo/train --held-out-images demo/val \\
        --output comparison

Each is trained from several seeds, for the same number of steps and for the same number of operations, and measured at
several numbers of network calls. The same command again does what is missing. The distance is Fréchet's in the
features of a judge (pipelines/evaluate/judge.py), and not FID.
"""

import json
import logging
import os
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
from pipelines.cluster import Device, choose_gpus, start_ray
from pipelines.command_line import parse_command_line, run_command
from pipelines.compare.planar import draw_figure
from pipelines.compare.plots import BUDGET_TITLES, draw_grid, plot_comparison, plot_losses, spread, table
from pipelines.compare.scores import (
    TIMED_IMAGES,
    Point,
    draw_images,
    hardware,
    is_measured,
    measure,
    measure_all,
    points_of,
    read_quality,
    time_sampling,
    time_training,
)
from pipelines.compare.trainings import (
    BUDGETS,
    Budget,
    Data,
    Trial,
    is_trained,
    methods,
    planned_runs,
    read_record,
    step_costs,
    steps_of,
    train_all,
)
from pipelines.demo.judge import SHIPPED_JUDGE
from pipelines.errors import InputError
from pipelines.evaluate.judge import Judge, load_judge
from pipelines.evaluate.run import find_real_images, read_evenly
from pipelines.latents.autoencoder import open_autoencoder
from pipelines.latents.manifest import read_manifest
from pipelines.tracking.provenance import code_identity
from pipelines.tracking.run import Run

logger = logging.getLogger(__name__)

SETTINGS = "settings.json"
METHODS = tuple(methods(1))
EXPERIMENT = "meanflow-ray-comparison"
REPORT_FILES = ("report.json", "table.md", "comparison.png", "loss_curves.png", "samples.png", "paths.png")
GRID_IMAGES, GRID_COLUMNS = 8, 4


@dataclass(frozen=True, kw_only=True)
class CompareJob:
    """Train and measure all methods. More seeds, methods, budgets and calls may be asked for later."""

    data: str
    """Latent dataset of pipelines.encode: a path or URI."""
    train_images: str
    """Folder of class folders: the images that the latents were made of."""
    held_out_images: str
    """Folder of class folders: real images that nothing was trained on."""
    output: Path
    """Folder for everything that this makes; on a cluster, on storage that all machines share."""
    methods: tuple[str, ...] = METHODS
    """What to compare."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the trainings: initial parameters, order of the data, draws."""
    num_steps: int = 1200
    """Optimiser steps of every method, at equal steps."""
    budgets: tuple[Budget, ...] = BUDGETS
    """steps: as many steps for each; flops: as many operations for each."""
    flops_of: str | None = "flow_matching"
    """Method whose num_steps are the operations that each may spend; the dearest where none."""
    calls: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Numbers of network calls to sample with."""
    num_samples: int = 1000
    """Samples per number of calls, sample i of class i mod num_classes."""
    judge: Path = SHIPPED_JUDGE
    """Folder of the classifier that measures; the demo's unless given."""
    cache_dir: str = "none"
    """Folder on each node's own disk for its copy of the latents; "none" maps mounted storage itself."""
    timed_rounds: int = 7
    """Turns that every method has when times are taken, which are medians."""
    device: Device = "auto"
    """Train on GPUs, one each; where the cluster has some, unless said."""
    tracking_uri: str | None = None
    """MLflow address; MLFLOW_TRACKING_URI unless given. Without either, nothing is logged there."""

    def __post_init__(self) -> None:
        unknown = sorted({*self.methods, *([self.flops_of] if self.flops_of else [])} - {*METHODS})
        if unknown or not self.methods:
            raise ValueError(f"methods must be some of {', '.join(METHODS)}, but got {', '.join(unknown) or 'none'}")
        for name in ("seeds", "budgets", "calls"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} must name one or more, each once, but got {values}")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds must be at least 0, but got {self.seeds}")
        if min(self.calls) < 1:
            raise ValueError(f"calls must be at least 1, but got {self.calls}")
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, but got {self.num_steps}")
        if self.timed_rounds < 1:
            raise ValueError(f"timed_rounds must be at least 1, but got {self.timed_rounds}")
        if self.num_samples < 2:
            raise ValueError(f"num_samples must be at least 2, but got {self.num_samples}")


def settings(job: CompareJob) -> dict[str, Any]:
    """What must stay as it is for an output to be continued: all but which methods, seeds, budgets and calls."""
    configs = {name: method.config.flat() for name, method in methods(1000).items()}  # their steps vary with budgets
    fixed = {
        "num_steps": job.num_steps,
        "data.sha256": read_manifest(job.data).content_sha256,
        "train_images": storage.absolute(job.train_images),
        "held_out_images": storage.absolute(job.held_out_images),
        "judge_sha256": weight_hash(load_judge(job.judge)),
        "num_samples": job.num_samples,
        "flops_of": job.flops_of,
    }
    flat = {f"{name}.{key}": value for name, config in configs.items() for key, value in config.items()}
    return dict(json.loads(json.dumps({**fixed, **flat})))


def begin_or_continue(output: Path, wanted: dict[str, Any]) -> None:
    """Writes an output's settings, or compares them with those that it was begun with.

    Raises InputError, naming every difference, where they are others, or the folder holds something else.
    """
    if not (output / SETTINGS).is_file():
        if output.is_dir() and any(output.iterdir()):
            raise InputError(f"--output {output} holds something else than a comparison; name an empty or a new folder")
        output.mkdir(parents=True, exist_ok=True)
        filesystem, path = storage.open_storage(str(output / SETTINGS))
        storage.write_bytes(filesystem, path, (json.dumps(wanted, indent=2) + "\n").encode())
        return
    begun = json.loads((output / SETTINGS).read_text())
    different = [key for key in sorted({*begun, *wanted}) if begun.get(key) != wanted.get(key)]
    if different:
        changes = "; ".join(f"{key} was {begun.get(key)}, is {wanted.get(key)}" for key in different)
        raise InputError(f"--output {output} was begun with other settings ({changes}); choose another --output")


@dataclass(frozen=True, kw_only=True)
class RealImages:
    """The real images, as far as the measures need them."""

    num_train: int
    """Training images."""
    train: FeatureStatistics
    """Of their features."""
    held_out: torch.Tensor
    """(N, H, W, 3) uint8."""
    labels: torch.Tensor
    """(N,): the held-out images' classes."""


def look_at_real_images(job: CompareJob, judge: Judge) -> RealImages:
    """Reads the real images.

    Raises InputError where the images, the latents and the judge do not know the same classes, or are of other sizes.
    """
    names = list(read_manifest(job.data).class_names)
    if names != list(judge.config.class_names):
        raise InputError(
            f"the judge in {job.judge} knows the classes {', '.join(judge.config.class_names)}, but the latents' are "
            f"{', '.join(names)}; name a --judge that was trained on them"
        )
    size = judge.config.image_size
    sources = [find_real_images(location, names) for location in (job.train_images, job.held_out_images)]
    (train, _), (held_out, labels) = (read_evenly(source, size, len(source[2])) for source in sources)
    logger.info("looking at %d training and %d held-out images", len(train), len(held_out))
    statistics = FeatureStatistics.of(judge.look_at(train).features)
    return RealImages(num_train=len(train), train=statistics, held_out=held_out, labels=labels)


def results(job: CompareJob, steps: dict[Budget, dict[str, int]], runs_folder: Path) -> list[dict[str, Any]]:
    """A line for each budget, method, solver and number of calls: what all seeds measured, each and together."""
    lines = []
    for budget, by_method in steps.items():
        for method in job.methods:
            runs = [Trial(method=method, seed=seed, num_steps=by_method[method]) for seed in job.seeds]
            for point in points_of(runs[0].config, job.calls):
                found = [read_quality(runs_folder / run.name, point) for run in runs]
                measured = [quality for quality in found if quality is not None]
                assert len(measured) == len(runs)
                lines.append(
                    {
                        "budget": budget,
                        "method": method,
                        "num_steps": by_method[method],
                        "solver": point.solver,
                        "calls": point.calls,
                        "frechet": spread([quality.frechet for quality in measured]),
                        "accuracy": spread([quality.accuracy for quality in measured]),
                        "by_seed": [
                            {"seed": seed, **asdict(quality)} for seed, quality in zip(job.seeds, measured, strict=True)
                        ],
                    }
                )
    return lines


def ratios(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fréchet distances of each MeanFlow in one call over flow matching's by Euler in the most calls, and in one.

    The ratio of seed k is that of both methods' seed k. Nothing where flow matching or one call was not measured.
    """
    euler = {
        (line["budget"], line["method"], line["calls"]): [entry["frechet"] for entry in line["by_seed"]]
        for line in lines
        if line["solver"] == "euler"
    }
    most = max(calls for _, _, calls in euler)
    found = []
    for (budget, method, calls), mine in euler.items():
        bases = [euler.get((budget, "flow_matching", count)) for count in (most, 1)]
        if calls != 1 or method == "flow_matching" or bases[0] is None or bases[1] is None:
            continue
        over = [spread([a / b for a, b in zip(mine, base, strict=True)]) for base in bases if base is not None]
        found.append({"budget": budget, "method": method, "over_most_calls": over[0], "over_one_call": over[1]})
    return found


def sample_blocks(
    job: CompareJob, steps: dict[str, int], runs_folder: Path, num_images: int
) -> dict[str, dict[int, np.ndarray]]:
    """{method's title: {calls: the first images of its first seed's generator}}, drawn anew."""
    blocks = {}
    for method in job.methods:
        run = Trial(method=method, seed=job.seeds[0], num_steps=steps[method])
        pipeline = load_pipeline(runs_folder / run.name / "generator")
        # Every third class: ten in a row of four by two would show the same two in every column.
        indices = [3 * number for number in range(num_images)]
        blocks[methods(1)[method].title] = {
            calls: draw_images(pipeline, Point(solver="euler", calls=calls), indices).numpy() for calls in job.calls
        }
    return blocks


def compare(job: CompareJob) -> dict[str, Any]:
    """Trains and measures what is missing, writes the report's files, and returns the report.

    Raises InputError for unfit input.
    """
    output = Path(storage.output_location(str(job.output), "--output"))
    runs_folder = output / "runs"
    data = Data(latents=storage.absolute(job.data), cache_dir=job.cache_dir)
    wanted = settings(job)
    judge = load_judge(job.judge)
    real = look_at_real_images(job, judge)
    begin_or_continue(output, wanted)
    costs = step_costs(data.network_sizes)
    steps = {budget: steps_of(budget, job.num_steps, costs, job.flops_of) for budget in job.budgets}
    runs = planned_runs(steps.values(), job.methods, job.seeds, costs)
    draw_figure(output / "paths.png")

    if not all(is_trained(run, runs_folder) and is_measured(run, runs_folder, job.calls) for run in runs):
        start_ray(needed_cpus=1)
        use_gpu = choose_gpus(job.device)
        train_all(runs, data, runs_folder, costs, use_gpu=use_gpu)
        measure_all(runs, runs_folder, job.calls, job.judge.absolute(), real.train, job.num_samples, use_gpu=use_gpu)
        ray.shutdown()  # so that nothing else runs here while times are taken

    lines = results(job, steps, runs_folder)
    vae = open_autoencoder(data.latents)
    reconstructions = torch.cat([reconstruct(vae, batch) for batch in real.held_out.split(100)])
    report = {
        "num_train_images": real.num_train,
        "held_out": asdict(measure(judge, real.train, real.held_out, real.labels)),
        "reconstruction": asdict(measure(judge, real.train, reconstructions, real.labels)),
        "num_steps": job.num_steps,
        "num_samples": job.num_samples,
        "seeds": job.seeds,
        "calls": sorted(job.calls),
        "budgets": job.budgets,
        "flops_of": job.flops_of,
        "results": lines,
        "ratios": ratios(lines),
        "runs": [
            {
                **read_record(run, runs_folder),
                "budgets": [b for b in job.budgets if steps[b][run.method] == run.num_steps],
            }
            for run in runs
        ],
        **costs_of(job, data, steps[job.budgets[0]], runs_folder),
    }
    report = json.loads(json.dumps(report))
    title = BUDGET_TITLES[job.budgets[0]]
    draw_grid(
        sample_blocks(job, steps[job.budgets[0]], runs_folder, GRID_IMAGES),
        output / "samples.png",
        num_columns=GRID_COLUMNS,
        subtitle=f"the same {GRID_IMAGES} seeds and classes in every cell, not selected; {title}",
    )
    plot_comparison(report, output / "comparison.png")
    plot_losses(report, output / "loss_curves.png")
    (output / "table.md").write_text(table(report))
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    _log(job, report)
    return report


def costs_of(job: CompareJob, data: Data, steps: dict[str, int], runs_folder: Path) -> dict[str, Any]:
    """What each method's training and sampling cost here, in turns, so that it is this process's to have the machine.

    One thread, as the trainings have; the first GPU where there is one.
    """
    logger.info("taking times")
    device = torch.device("cuda" if torch.cuda.is_available() and job.device != "cpu" else "cpu")
    timed_calls = sorted({min(job.calls), max(job.calls)})
    records = {
        method: read_record(Trial(method=method, seed=job.seeds[0], num_steps=steps[method]), runs_folder)
        for method in job.methods
    }
    generators = {method: runs_folder / record["run"] / "generator" for method, record in records.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = time_training(job.methods, data, device, job.timed_rounds)
        milliseconds, decoder = time_sampling(generators, timed_calls, device, job.timed_rounds)
        machine = hardware(device)
    finally:
        torch.set_num_threads(threads)
    kept = ("step_flops", "num_parameters", "num_parameters_sampling")
    return {
        "hardware": machine,
        "timed_calls": timed_calls,
        "timed_images": TIMED_IMAGES,
        "decoder_milliseconds_per_image": decoder,
        "methods": [
            {
                "name": method,
                "title": methods(1)[method].title,
                **{key: record[key] for key in kept},
                "seconds_per_step": seconds[method],
                "milliseconds_per_image": {str(calls): milliseconds[calls][method] for calls in timed_calls},
            }
            for method, record in records.items()
        ],
    }


def _log(job: CompareJob, report: dict[str, Any]) -> None:
    tracking_uri = job.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not tracking_uri:
        logger.info("no MLflow address given, so the report is in %s alone", job.output)
        return
    kept = ("num_steps", "num_samples", "seeds", "budgets", "flops_of")
    parameters = {"data": job.data, "methods": job.methods, **{key: report[key] for key in kept}}
    run = Run.begin(tracking_uri, EXPERIMENT, job.output.absolute().name, parameters, code_identity())
    for line in report["results"]:  # the number of calls is the metric's step: MLflow draws the curve
        name = f"evaluate/{line['budget']}/{line['method']}/{line['solver']}"
        figures = {f"{name}/{key}": line[key]["mean"] for key in ("frechet", "accuracy")}
        run.log_metrics(figures, line["calls"])
    for file in REPORT_FILES:
        run.log_file(job.output / file, "comparison")
    run.end("FINISHED")
    logger.info("logged to MLflow run %s at %s", run.run_id, run.tracking_uri)


def main() -> None:
    """The command."""
    job = parse_command_line(CompareJob, __doc__)
    print(table(compare(job)), end="")
    print(f"report: {job.output}")


if __name__ == "__main__":
    run_command(main)
