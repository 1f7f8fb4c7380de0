"""Writing and registering the generators of a finished training."""

from pathlib import Path

import torch
from pyarrow import fs
from ray.train import (
    Checkpoint,
)

from meanflow_core.autoencoder import weight_hash
from meanflow_core.checkpoint import load_average
from meanflow_core.generator import for_sampling, save_generator
from meanflow_core.networks import build_network
from pipelines import storage
from pipelines.latents.autoencoder import open_autoencoder
from pipelines.latents.manifest import Manifest
from pipelines.tracking.registry import WEIGHTS_TAG
from pipelines.train.job import TrainJob
from pipelines.train.worker import pipeline_of


def build_generator(job: TrainJob, manifest: Manifest, checkpoint: Checkpoint, folder: Path) -> dict[str, str]:
    """Writes the generator of a checkpoint: the moving average, the autoencoder, the scheduler, the class names.

    Returns {"transformer_sha256", "vae_sha256"}: the hashes of its weights.
    """
    with torch.random.fork_rng(devices=[]):
        network = build_network(job.config.network, **manifest.network_sizes).eval()
    with checkpoint.as_directory() as source:
        load_average(network, job.config.ema_decays[0], Path(source))
    pipeline = pipeline_of(for_sampling(network), open_autoencoder(job.data), manifest, job.config)
    save_generator(pipeline, folder, portable=job.portable)
    return {WEIGHTS_TAG: weight_hash(pipeline.transformer), "vae_sha256": weight_hash(pipeline.vae)}


def _publish(job: TrainJob, folder: Path) -> str:
    """Puts a generator's files into the run's folder, model_index.json last, and returns its location."""
    location = f"{job.run_location}/generator"
    filesystem, target = storage.open_storage(location)
    stale = f"{target}/model_index.json"
    if filesystem.get_file_info(stale).type == fs.FileType.File:
        filesystem.delete_file(stale)  # nobody may open a mixture of the old generator and the new
    files = sorted(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.name == "model_index.json"
    )
    for path in files:
        relative = path.relative_to(folder).as_posix()
        storage.write_bytes(filesystem, f"{target}/{relative}", path.read_bytes())
    return location
