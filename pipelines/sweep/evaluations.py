"""Evaluates generators with `meanflow evaluate`, each once: a report is kept as a file and found again."""

import json
import logging
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pyarrow import fs

from pipelines import storage
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.run import evaluate
from pipelines.training.record import TrainingRecord

logger = logging.getLogger(__name__)

UNRELATED_OPTIONS = ("output", "num_workers", "device")  # a kept report is valid whatever they are


def evaluate_once(record: TrainingRecord, job: EvaluateJob, location: str) -> dict[str, Any]:
    """Evaluates a trained generator, and returns its report. Returns the kept one if it is of the same training and job.

    The report is also logged to the training's MLflow run. job: the options; model, MLflow address and output folder are
    replaced. location: JSON file that keeps the report. Raises InputError for invalid input.
    """
    assert record.published is not None
    job = replace(job, model=record.published.generator, tracking_uri=record.tracking_uri)
    options = {name: value for name, value in asdict(job).items() if name not in UNRELATED_OPTIONS}
    key = {"mlflow_run_id": record.mlflow_run_id, "step": record.published.step, "options": options}
    key = json.loads(json.dumps(key, default=str))
    filesystem, path = storage.open_storage(location)
    if filesystem.get_file_info(path).type == fs.FileType.File:
        kept = json.loads(storage.read_bytes(filesystem, path))
        if kept["evaluated"] == key:
            return dict(kept["report"])
    logger.info("evaluating %s", job.model)
    with tempfile.TemporaryDirectory() as scratch:
        report = evaluate(replace(job, output=Path(scratch)))
    content = json.dumps({"evaluated": key, "report": report}, indent=2) + "\n"
    storage.write_bytes(filesystem, path, content.encode())
    return report
