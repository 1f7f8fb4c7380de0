"""Training jobs and manifests of small datasets, for tests that need no latents."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from meanflow_core.presets import debug
from pipelines.latents.manifest import Manifest
from pipelines.train.job import TrainJob
from tests.support.manifests import make_manifest


def small_manifest(num_samples: int = 400) -> Manifest:
    """4x8x8 latents of two classes, with hashes that belong to no data."""
    return make_manifest([num_samples], moments_shape=(8, 8, 8), image_size=64)


def training_job(folder: Path, **changes: Any) -> TrainJob:
    """The debug preset's training of run "r" in FOLDER/runs, on FOLDER/latents."""
    options = {"data": str(folder / "latents"), "storage": str(folder / "runs"), "run_name": "r", "config": debug()}
    return TrainJob(**{**options, **changes})


def job_with_data(folder: Path, manifest: Manifest | None = None, **changes: Any) -> TrainJob:
    """As `training_job`, with a dataset that consists of its manifest."""
    (folder / "latents").mkdir(exist_ok=True)
    (folder / "latents/manifest.json").write_text((manifest or small_manifest()).to_json())
    return training_job(folder, **changes)


def with_config(job: TrainJob, **changes: Any) -> TrainJob:
    """The job with changes to its configuration."""
    return replace(job, config=replace(job.config, **changes))
