"""Logs a report to MLflow: metrics and files to the run that trained the model, and tags to its registered version."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.evaluate.inputs import Generator
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.samples import Setting
from pipelines.tracking.registry import REGISTRY_SCHEMES, WEIGHTS_TAG, find_run, tag_generator
from pipelines.tracking.run import Run

logger = logging.getLogger(__name__)

LOGGED_METRICS = (
    "frechet", "frechet_standard_error", "inception_score", "precision", "recall", "spatial_frechet", "accuracy",
    "probe_accuracy", "diversity", "nearest_train_ratio", "nearest_train_feature_ratio",
)  # fmt: skip


def log_report(job: EvaluateJob, generator: Generator | None, report: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Logs to the run that trained the model, or to a new run if there is none.

    Does nothing if there is neither a training run nor an MLflow address. generator: None if a sample file was measured.
    """
    tracking_uri = job.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    training_run = None if generator is None else _training_run(job, generator, tracking_uri)
    if training_run is None and tracking_uri is None:
        logger.info("no MLflow address given; the report is only in %s", job.output)
        return
    run = training_run or _new_run(job, report, str(tracking_uri))
    family = metric_family(job.model, None if generator is None else generator.ema_decay)
    settings = [Setting(num_steps=1)] if generator is None else job.settings
    for setting, entry in zip(settings, report["samples"], strict=True):
        prefix = f"{family}/{setting.variant_slug}/" if setting.variant_slug else f"{family}/"
        metrics = {f"{prefix}{key}": entry[key] for key in LOGGED_METRICS if key in entry}
        run.log_metrics(metrics, setting.num_steps)  # sampling steps as MLflow's step, for its charts
    for path in files:
        run.log_file(path, family)
    run.flush()
    if training_run is not None:
        weights = report["protocol"]["generator"]["transformer_sha256"]
        location = f"runs:/{run.run_id}/{family}/report.json"
        tag_generator(run, weights, "evaluate.", version_tags(report, settings, location))
    else:
        run.end("FINISHED")
    logger.info("logged to MLflow run %s at %s", run.run_id, run.tracking_uri)


def _training_run(job: EvaluateJob, generator: Generator, tracking_uri: str | None) -> Run | None:
    assert job.model is not None
    if job.model.startswith(REGISTRY_SCHEMES):
        return find_run(job.model, tracking_uri)
    return find_run(str(generator.folder), job.tracking_uri)  # default: the address in its provenance


def metric_family(model: str | None, ema_decay: float | None) -> str:
    """Prefix of an evaluation's metric names, before the slash: "evaluate", or "evaluate-ema-DECAY".

    Training publishes its main generator as `generator/` and registers it. Metrics of other EMA decays are logged to the
    same run. Their prefix contains the decay, so that they do not replace the main generator's metrics.
    """
    is_main = model is None or model.startswith(REGISTRY_SCHEMES) or Path(model).name == "generator"
    return "evaluate" if is_main or ema_decay is None else f"evaluate-ema-{ema_decay:g}"


def _new_run(job: EvaluateJob, report: Mapping[str, Any], tracking_uri: str) -> Run:
    protocol = report["protocol"]
    parameters = {"model": report["model"], "num_samples": protocol["num_samples"], "seed": job.seed}
    tags = {WEIGHTS_TAG: protocol["generator"]["transformer_sha256"]} if "generator" in protocol else {}
    return Run.begin(tracking_uri, "meanflow-ray", "evaluate", parameters, tags)


def version_tags(report: Mapping[str, Any], settings: Sequence[Setting], location: str) -> dict[str, str]:
    """Tags of the registered model version: location of the latest report, and the distance of each setting."""
    protocol = report["protocol"]
    tags = {
        "evaluate.report": location,
        "evaluate.distance": protocol["distance"],
        "evaluate.num_samples": str(protocol["num_samples"]),
        "evaluate.reference_sha256": protocol["reference"]["sha256"],
    }
    for setting, entry in zip(settings, report["samples"], strict=True):
        steps = f"{setting.num_steps}-step{'s' * (setting.num_steps > 1)}"
        variant = f".{setting.variant_slug}" if setting.variant_slug else ""
        tags[f"evaluate.frechet.{steps}{variant}"] = f"{entry['frechet']:.4g} +- {entry['frechet_standard_error']:.2g}"
    return tags
