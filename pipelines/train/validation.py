"""Held-out errors of a training's checkpoints, beside its steps where the cluster has room for it.

The moving average's squared errors on latents of images that training did not see, with draws that never change: the
same numbers as training's own, so that the distance of the two curves is overfitting.
"""

import functools
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray
import torch
from ray.train import Checkpoint, ValidationConfig, ValidationTaskConfig

from meanflow_core.checkpoint import load_average, read_state_file
from meanflow_core.config import TrainingConfig
from meanflow_core.draws import draw_step_record
from meanflow_core.latents import LatentNormalization, sample_latents
from meanflow_core.loss import meanflow_loss
from meanflow_core.networks import AnyNetwork, build_network
from pipelines.command_line import set_up_logging
from pipelines.errors import InputError
from pipelines.latents.autoencoder import open_autoencoder
from pipelines.latents.cache import open_latents
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.manifest import Manifest, read_manifest
from pipelines.tracking.run import Run
from pipelines.train.job import TrainJob

logger = logging.getLogger(__name__)

SEED = 20_250_519  # of the draws, whatever the training's
MAX_ROWS = 4096
MAX_SECONDS = 1800.0  # for a checkpoint; the next ones wait
MLFLOW_PATIENCE_SECONDS = 600.0
ROWS_AT_ONCE = 64


def check(location: str, training: Manifest) -> None:
    """Raises InputError where held-out latents cannot be compared with the training's."""
    held_out = read_manifest(location)
    for what, theirs, ours in (
        ("autoencoder", held_out.recipe.vae_sha256, training.recipe.vae_sha256),
        ("classes", held_out.class_names, training.class_names),
        ("shape", held_out.latent_shape, training.latent_shape),
    ):
        if theirs != ours:
            raise InputError(
                f"--validation-data {location} has another {what} than the training's latents; encode both alike"
            )


def validates_beside(job: TrainJob, *, use_gpu: bool) -> bool:
    """Whether the cluster has a CPU, and on GPUs a GPU, that training leaves free."""
    if job.validation_data is None:
        return False
    resources = ray.cluster_resources()
    kind = "GPU" if use_gpu else "CPU"
    return min(resources.get("CPU", 0), resources.get(kind, 0)) >= job.num_workers + 1


def config(job: TrainJob, tracking_uri: str, run_id: str, *, use_gpu: bool) -> ValidationConfig:
    """What Ray Train runs on every checkpoint, as a task of its own."""
    return ValidationConfig(
        functools.partial(validate, job=job, tracking_uri=tracking_uri, run_id=run_id),
        task_config=ValidationTaskConfig(timeout_s=MAX_SECONDS),
        ray_remote_kwargs={"num_cpus": 1, "num_gpus": 1 if use_gpu else 0},
    )


def validate(checkpoint: Checkpoint, job: TrainJob, tracking_uri: str, run_id: str) -> dict[str, float]:
    """Measures a checkpoint and logs the figures to MLflow at its step; returns them."""
    set_up_logging()
    assert job.validation_data is not None
    dataset = open_latents(job.validation_data, job.cache_dir, mirrored=False)
    network = build_network(job.config.network, **dataset.manifest.network_sizes)
    with checkpoint.as_directory() as folder:
        step = int(read_state_file(Path(folder))["step"])
        load_average(network, job.config.ema_decays[0], Path(folder))
    normalization = LatentNormalization.from_vae_config(open_autoencoder(job.validation_data).config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = held_out_errors(network.eval().to(device), dataset, normalization, job.config)
    run = Run(tracking_uri, run_id)
    run.log_metrics(figures, step)
    run.flush(MLFLOW_PATIENCE_SECONDS)
    logger.info("step %d on held-out images: %s", step, ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))
    return figures


@torch.no_grad()
def held_out_errors(
    network: AnyNetwork, dataset: LatentDataset, normalization: LatentNormalization, config: TrainingConfig
) -> dict[str, float]:
    """Mean squared errors, summed over C, H, W, of rows with r = t and of rows with r < t, of at most 4,096 images."""
    rows = np.linspace(0, len(dataset) - 1, num=min(len(dataset), MAX_ROWS), dtype=np.int64)
    loss = replace(config.loss, label_drop_probability=0.0)
    sums, counts = dict.fromkeys(("equals", "below"), 0.0), dict.fromkeys(("equals", "below"), 0)
    device = next(network.parameters()).device
    for number, start in enumerate(range(0, len(rows), ROWS_AT_ONCE)):
        chosen = rows[start : start + ROWS_AT_ONCE]
        moments, labels = dataset.read(chosen, np.zeros(len(chosen), bool))
        record = draw_step_record(
            loss, seed=SEED, step=number, num_rows=len(chosen), latent_shape=dataset.manifest.latent_shape
        )
        below = record.r < record.t
        record = record.to(device)
        latents = sample_latents(torch.from_numpy(moments).to(device), record.posterior_noise, normalization)
        errors = meanflow_loss(
            network, network, latents, torch.from_numpy(labels).to(device), record, loss,
            null_label=network.config.num_classes, global_num_rows=len(chosen), separate_derivative=True,
        ).squared_error.cpu()  # fmt: skip
        for name, which in (("equals", ~below), ("below", below)):
            sums[name] += float(errors[which].sum())
            counts[name] += int(which.sum())
    return {f"validation/squared_error_r_{name}_t": sums[name] / counts[name] for name in sums if counts[name]}
