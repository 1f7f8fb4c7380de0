"""Errors of each checkpoint on held-out images, measured in a Ray task while training continues.

Validation computes the same squared errors as the training log, but of the moving average, on held-out latents and with
fixed random draws. A gap between the training and validation curves shows overfitting.
"""

import functools
import logging
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray
import torch
from ray.train import Checkpoint, ValidationConfig, ValidationTaskConfig

from meanflow_core.checkpoint import load_average, read_state_file
from meanflow_core.config import TrainingConfig
from meanflow_core.latents import LatentNormalization, sample_latents
from meanflow_core.networks.building import build_network
from meanflow_core.networks.interface import NetworkModel
from meanflow_core.objectives.interface import build_objective
from pipelines.command_line import set_up_logging
from pipelines.errors import InputError
from pipelines.latents.autoencoder import open_autoencoder
from pipelines.latents.cache import open_latents
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.manifest import Manifest, read_manifest
from pipelines.tracking.run import Run
from pipelines.train.job import TrainJob

logger = logging.getLogger(__name__)

SEED = 20_250_519  # seed of the draws; independent of the training seed
MAX_SAMPLES = 4096
BATCH_SIZE = 64
TIMEOUT_SECONDS = 1800.0  # per checkpoint; checkpoints are validated one after another
MLFLOW_PATIENCE_SECONDS = 600.0


def require_comparable(location: str, training: Manifest) -> None:
    """Raises InputError if held-out and training latents differ in autoencoder, classes or shape."""
    held_out = read_manifest(location)
    for what, theirs, ours in (
        ("autoencoder", held_out.recipe.vae_sha256, training.recipe.vae_sha256),
        ("classes", held_out.class_names, training.class_names),
        ("shape", held_out.latent_shape, training.latent_shape),
    ):
        if theirs != ours:
            raise InputError(
                f"--validation-data {location} differs from --data in {what}; encode both with the same options"
            )


def has_spare_resources(job: TrainJob) -> bool:
    """Whether training leaves a CPU free (and a GPU, if it trains on GPUs)."""
    resources = ray.cluster_resources()
    kind = "GPU" if job.device == "gpu" else "CPU"
    return min(resources.get("CPU", 0), resources.get(kind, 0)) >= job.workers + 1


def ray_config(job: TrainJob, tracking_uri: str, run_id: str) -> ValidationConfig:
    """Returns the configuration for Ray Train to run `validate` as a separate task."""
    return ValidationConfig(
        functools.partial(validate, job=job, tracking_uri=tracking_uri, run_id=run_id),
        task_config=ValidationTaskConfig(timeout_s=TIMEOUT_SECONDS),
        ray_remote_kwargs={"num_cpus": 1, "num_gpus": 1 if job.device == "gpu" else 0},
    )


def validate(checkpoint: Checkpoint, job: TrainJob, tracking_uri: str, run_id: str) -> dict[str, float]:
    """Measures a checkpoint's errors, logs them to MLflow at its step, and returns them."""
    set_up_logging()
    assert job.validation_data is not None
    dataset = open_latents(job.validation_data, job.cache_dir, mirrored=False)
    network = build_network(job.config.network, **dataset.manifest.network_sizes)
    with checkpoint.as_directory() as folder:
        step = int(read_state_file(Path(folder))["step"])
        load_average(network, job.config.ema_decays[0], Path(folder))
    # The training's, even if the held-out images were encoded with another one.
    normalization = LatentNormalization.from_vae_config(open_autoencoder(job.data).config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    errors = held_out_errors(network.eval().to(device), dataset, normalization, job.config, step)
    run = Run(tracking_uri, run_id)
    run.log_metrics(errors, step)
    run.flush(MLFLOW_PATIENCE_SECONDS)
    logger.info("step %d on held-out images: %s", step, ", ".join(f"{k} {v:.4g}" for k, v in errors.items()))
    return errors


@torch.no_grad()
def held_out_errors(
    network: NetworkModel,
    dataset: LatentDataset,
    normalization: LatentNormalization,
    config: TrainingConfig,
    step: int,
) -> dict[str, float]:
    """Returns the objective's squared errors, summed over C, H, W and averaged over images.

    Uses at most `MAX_SAMPLES` evenly spaced images. step: number of steps that the network was trained for.
    """
    chosen = np.linspace(0, len(dataset) - 1, num=min(len(dataset), MAX_SAMPLES), dtype=np.int64)
    objective = build_objective(replace(config.loss_at(step), label_drop_probability=0.0))
    device = next(network.parameters()).device
    totals: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for number, start in enumerate(range(0, len(chosen), BATCH_SIZE)):
        indices = chosen[start : start + BATCH_SIZE]
        moments, labels = dataset.read(indices, np.zeros(len(indices), bool))
        draws = objective.draw(
            seed=SEED, step=number, num_rows=len(indices), latent_shape=dataset.manifest.latent_shape
        )
        record = objective.record(draws, 0, len(indices)).to(device)
        latents = sample_latents(torch.from_numpy(moments).to(device), record.posterior_noise, normalization)
        output = objective.loss(
            network, network, latents, torch.from_numpy(labels).to(device), record,
            null_label=network.config.num_classes, global_num_rows=len(indices), separate_derivative=True,
        )  # fmt: skip
        for name, mean in output.metrics.items():
            if name.startswith("squared_error"):
                totals[name] += float(mean.total)
                counts[name] += int(mean.num_samples)
    return {f"validation/{name}": totals[name] / count for name, count in counts.items() if count}
