"""Runs a sweep: trains and evaluates the variants, then writes their table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mlflow import MlflowClient

from pipelines import storage
from pipelines.evaluate.job import EvaluateJob
from pipelines.sweep.evaluations import evaluate_once
from pipelines.sweep.experiments import Experiment, train_experiments
from pipelines.sweep.grid import Variant
from pipelines.sweep.job import SweepJob
from pipelines.sweep.parent_run import begin_or_resume
from pipelines.tracking.registry import make_champion
from pipelines.training.record import TrainingRecord

Scores = dict[tuple[str, int], float]  # {(metric, number of sampling steps or 0): value}; the first one ranks


def sweep(preset: str, job: SweepJob, variants: Sequence[Variant]) -> str:
    """Trains and evaluates the variants, and returns their table, best first.

    Raises InputError for invalid input, and RunError if variants fail, after the table of the others has been written.
    """
    folder = storage.output_location(job.train.storage, "--storage").rstrip("/")
    output = f"{folder}/{job.train.run_name}"
    model_name = job.train.model_name or f"meanflow-{job.train.run_name}"
    common = replace(job.train, storage=f"{output}/runs", model_name=model_name, cpu_threads=job.train.cpu_threads or 1)
    parameters = {"preset": preset, "vary": " ".join(job.vary), "data": storage.redact(job.train.data)}
    experiments = [Experiment(name=variant.name, preset=preset, config=variant.config) for variant in variants]
    run = begin_or_resume(output, job.train.experiment, parameters, folder)
    with run.ends():
        trained = train_experiments(experiments, common, run, job.max_concurrent)
        scores = {
            name: score(record, job, f"{output}/evaluations/{name}.json") for name, record in trained.records.items()
        }
        ranked = sorted(scores, key=lambda name: _rank(scores[name]))
        text = table(variants, {name: scores[name] for name in ranked}, trained.failures)
        print(text, end="")
        storage.write_bytes(*storage.open_storage(f"{output}/table.md"), text.encode())
        run.log_text(text, "table.md")
        for name, values in scores.items():
            for (metric, num_steps), value in values.items():
                run.log_metrics({f"evaluate/{name}/{metric}": value}, num_steps)
        if ranked:
            best = make_champion(run, model_name, trained.records[ranked[0]].mlflow_run_id)
            print(f"best: {ranked[0]}, {best}")
        trained.require_all()
    return text


def score(record: TrainingRecord, job: SweepJob, location: str) -> Scores:
    """The distances of a generator at each number of steps. Without a reference, the sum of its squared errors."""
    if job.reference is not None:
        evaluation = EvaluateJob(
            output=Path(),
            model="",  # `evaluate_once` replaces model and output
            reference=job.reference,
            extractor=job.extractor,
            steps=job.steps,
            num_samples=job.num_samples,
            device=job.train.device,
        )
        entries = evaluate_once(record, evaluation, location)["samples"]
        return {
            (key, entry["num_steps"]): entry[key]
            for key in ("frechet", "accuracy")
            for entry in entries
            if key in entry
        }
    metrics = MlflowClient(record.tracking_uri).get_run(record.mlflow_run_id).data.metrics
    is_validated = any(key.startswith("validation/") for key in metrics)
    prefix = "validation/" if is_validated else ""
    shown = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
    # Not the loss, whose adaptive weight makes it nearly constant; nor the errors by time, whose names have a slash.
    errors = [value for key, value in shown.items() if key.startswith("squared_error") and "/" not in key]
    return {("validation_error" if is_validated else "training_error", 0): sum(errors or [metrics["loss"]])}


def _rank(scores: Scores) -> float:
    first = next(iter(scores.values()))
    return first if math.isfinite(first) else math.inf


def table(variants: Sequence[Variant], scores: Mapping[str, Scores], failures: Mapping[str, str]) -> str:
    """The variants in the order of their scores, then the failed ones, as Markdown."""
    fields = list(variants[0].values)
    metrics = list(next(iter(scores.values()), {}))
    titles = [f"{key}, {steps} step{'s' * (steps > 1)}" if steps else key.replace("_", " ") for key, steps in metrics]
    lines = [f"| {' | '.join([*fields, *titles])} |", "|" + "---|" * (len(fields) + len(titles))]
    values = {variant.name: list(variant.values.values()) for variant in variants}
    for name, entry in scores.items():
        lines.append(f"| {' | '.join([*values[name], *(f'{entry[metric]:.4g}' for metric in metrics)])} |")
    lines += [f"| {' | '.join([*values[name], *['failed'] * len(metrics)])} |" for name in failures]
    return "\n".join(lines) + "\n"
