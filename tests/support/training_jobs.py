"""Training jobs and small manifests for tests that read no latents."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from meanflow_core.presets.demo import debug
from pipelines.latents.manifest import Manifest
from pipelines.train.job import TrainJob
from tests.support.manifests import make_manifest


def small_manifest(num_samples: int = 400) -> Manifest:
    """A manifest of 4x8x8 latents in two classes. Its hashes are placeholders; no shards exist.

    Datasets store moments, mean and standard deviation, which have twice the channels of a latent.
    """
    return make_manifest([num_samples], moments_shape=(8, 8, 8), image_size=64)


def training_job(folder: Path, **changes: Any) -> TrainJob:
    """A job that trains the debug preset on FOLDER/latents as run "r" in FOLDER/runs."""
    options = {
        "data": str(folder / "latents"),
        "storage": str(folder / "runs"),
        "run_name": "r",
        "num_workers": 1,
        "config": debug(),
    }
    return TrainJob(**{**options, **changes})


def job_with_data(folder: Path, manifest: Manifest | None = None, **changes: Any) -> TrainJob:
    """Like `training_job`, but also writes the manifest to FOLDER/latents."""
    (folder / "latents").mkdir(exist_ok=True)
    (folder / "latents/manifest.json").write_text((manifest or small_manifest()).to_json())
    return training_job(folder, **changes)


def with_config(job: TrainJob, **changes: Any) -> TrainJob:
    """A copy of the job with fields of its TrainingConfig replaced."""
    return replace(job, config=replace(job.config, **changes))
