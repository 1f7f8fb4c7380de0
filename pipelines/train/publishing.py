"""The generators of a finished training."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray.train import Checkpoint

from meanflow_core.autoencoder import Autoencoder, weight_hash
from meanflow_core.checkpoint import load_average
from meanflow_core.config import TrainingConfig
from meanflow_core.generator import build_pipeline, save_generator
from meanflow_core.generator_folder import write_provenance
from meanflow_core.networks.building import build_network
from meanflow_core.networks.interface import NetworkModel
from meanflow_core.objectives.interface import build_objective
from meanflow_core.pipeline import MeanFlowPipeline
from pipelines import storage
from pipelines.latents.autoencoder import open_autoencoder
from pipelines.latents.manifest import Manifest
from pipelines.tracking.registry import WEIGHTS_TAG
from pipelines.tracking.run import Run
from pipelines.train.job import TrainJob
from pipelines.train.model_card import write_card
from pipelines.training.publishing import publish_averages
from pipelines.training.record import Published

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FinishedTraining:
    """Inputs for writing the generators of a finished run."""

    job: TrainJob
    """The job, with absolute locations."""
    preset: str
    """Name of the preset."""
    manifest: Manifest
    """Manifest of the latent dataset."""
    checkpoint: Checkpoint
    """The last checkpoint."""
    step: int
    """Training steps completed at `checkpoint`."""


def training_pipeline(
    network: NetworkModel, vae: Autoencoder, manifest: Manifest, config: TrainingConfig
) -> MeanFlowPipeline:
    """Builds a diffusers pipeline from a network, with the run's class names and sampling settings."""
    return build_pipeline(
        network,
        vae,
        manifest.class_names,
        wnids=manifest.wnids,
        prediction=config.loss.prediction,
        scheduler=build_objective(config.loss).scheduler(),
        sampling=config.sampling,
    )


def publish_generators(training: FinishedTraining, run: Run) -> Published:
    """Writes the generator of every moving average into the run's folder, and registers the first in MLflow.

    The first is `generator/`, the others are `generator-ema-DECAY/`. Raises RunError if MLflow cannot register it.
    """
    job = training.job
    tags = {
        "data": storage.redact(job.data),
        "data.sha256": training.manifest.content_sha256,
        "preset": training.preset,
        "step": str(training.step),
    }
    return publish_averages(
        job,
        job.config.ema_decays,
        lambda decay, folder: write_generator(training, decay, run, folder),
        run,
        name=job.registered_name(training.preset),
        step=training.step,
        tags=tags,
    )


def write_generator(training: FinishedTraining, decay: float, run: Run, folder: Path) -> dict[str, str]:
    """Writes the generator of a moving average with its model card and provenance.

    Returns the SHA-256 hashes of its weights, under "transformer_sha256" and "vae_sha256".
    """
    job, manifest = training.job, training.manifest
    with torch.random.fork_rng(devices=[]):
        network = build_network(job.config.network, **manifest.network_sizes).eval()
    with training.checkpoint.as_directory() as checkpoint:
        load_average(network, decay, Path(checkpoint))
    pipeline = training_pipeline(network.for_sampling(), open_autoencoder(job.data), manifest, job.config)
    save_generator(pipeline, folder, portable=job.portable)
    provenance: dict[str, Any] = {
        "run_id": run.run_id,
        "tracking_uri": storage.redact(run.tracking_uri),
        "preset": training.preset,
        "step": training.step,
        "ema_decay": decay,
        "data": storage.redact(job.data),
        "data_sha256": manifest.content_sha256,
    }
    write_provenance(folder, provenance)
    write_card(
        folder,
        name=job.registered_name(training.preset),
        config=job.config,
        manifest=manifest,
        init_from=job.init_from,
        provenance=provenance,
    )
    return {WEIGHTS_TAG: weight_hash(pipeline.transformer), "vae_sha256": weight_hash(pipeline.vae)}
