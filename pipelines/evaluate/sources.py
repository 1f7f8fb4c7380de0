"""Sources of images: a generator, image files, the shards of a latent dataset, or a file of samples.

B images of a batch, H W image size.
"""

import itertools
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from meanflow_core.autoencoder import Autoencoder, decode_latents, reconstruct
from meanflow_core.latents import LatentNormalization
from meanflow_core.pipeline import MeanFlowPipeline
from pipelines import storage
from pipelines.evaluate.sample_files import open_sample_file
from pipelines.evaluate.samples import SampleRule, Setting
from pipelines.images.decoding import decode_images
from pipelines.images.sources import ImageSlice
from pipelines.latents.shards import read_shard

logger = logging.getLogger(__name__)

UINT8_RULE = "clamp(127.5 x + 128, 0, 255), truncated"  # how decoded images become uint8; recorded in reports


@dataclass(frozen=True)
class ImageBatch:
    """A batch of images."""

    pixels: torch.Tensor
    """uint8 (B, H, W, 3)."""
    labels: torch.Tensor | None = None
    """int64 (B,). None if there are no classes."""
    rows: torch.Tensor | None = None
    """int64 (B,): rows of the images in their source's index. None if the images are not files."""
    seconds: float = 0.0
    """Time spent in the network and the decoder."""
    num_unreadable: int = 0
    """Images skipped because they could not be read."""


@dataclass(frozen=True)
class Models:
    """The models that a worker has loaded, all on one device."""

    device: torch.device
    pipeline: MeanFlowPipeline | None = None
    autoencoder: Autoencoder | None = None


class Source(Protocol):
    """Images of one chunk. Sources are pickled and sent to the workers."""

    def batches(self, models: Models, batch_size: int) -> Iterator[ImageBatch]:
        """Yields the images in order."""


@dataclass(frozen=True)
class GeneratedSamples:
    """Samples of the worker's generator, by sample index."""

    setting: Setting
    rule: SampleRule
    indices: np.ndarray

    def batches(self, models: Models, batch_size: int) -> Iterator[ImageBatch]:
        """See Source."""
        pipeline = models.pipeline
        assert pipeline is not None
        for start in range(0, len(self.indices), batch_size):
            indices = self.indices[start : start + batch_size]
            labels = self.rule.labels_of(indices, pipeline.transformer.config.num_classes)
            started = time.perf_counter()
            pixels = pipeline.images_from_seeds(
                labels.tolist(),
                self.rule.seeds_of(indices),
                self.setting.num_steps,
                guidance_scale=self.setting.guidance_scale,
                guidance_interval=self.setting.guidance_interval,
                solver=self.setting.solver,
            )
            if pixels.is_cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            yield ImageBatch(pixels, torch.from_numpy(labels), seconds=seconds)


@dataclass(frozen=True)
class ImageFiles:
    """Image files, cropped to squares."""

    images: ImageSlice
    size: int
    """Side of the square in pixels."""
    rows: np.ndarray
    """Rows of the images in their source's index: int64, one per image."""
    reconstruct: bool = False
    """Encode and decode the images with the worker's autoencoder, at the posterior mean."""

    def batches(self, models: Models, batch_size: int) -> Iterator[ImageBatch]:
        """See Source. Skips and counts unreadable images."""
        labels = self.images.entries["label"].to_pylist()
        decoded = zip(decode_images(self.images, self.size), labels, self.rows.tolist(), strict=True)
        while batch := list(itertools.islice(decoded, batch_size)):
            readable = [entry for entry in batch if not isinstance(entry[0], Exception)]
            problems = [image for image, _, _ in batch if isinstance(image, Exception)]
            if problems:
                logger.warning("skipped %d unreadable images: %s", len(problems), problems[0])
            array = np.array([image for image, _, _ in readable], dtype=np.uint8).reshape(-1, self.size, self.size, 3)
            pixels = torch.from_numpy(array)
            if self.reconstruct and readable:
                assert models.autoencoder is not None
                pixels = reconstruct(models.autoencoder, pixels.to(models.device))
            batch_labels = torch.tensor([label for _, label, _ in readable], dtype=torch.int64)
            rows = torch.tensor([row for _, _, row in readable], dtype=torch.int64)
            yield ImageBatch(pixels, batch_labels, rows, num_unreadable=len(problems))


@dataclass(frozen=True)
class DecodedShard:
    """A shard of a latent dataset, decoded at the posterior mean by the worker's autoencoder."""

    dataset: str
    shard: str
    """Path in the dataset."""

    @torch.no_grad()
    def batches(self, models: Models, batch_size: int) -> Iterator[ImageBatch]:
        """See Source."""
        assert models.autoencoder is not None
        normalization = LatentNormalization.from_vae_config(models.autoencoder.config)
        filesystem, root = storage.open_storage(self.dataset)
        shard = read_shard(filesystem, f"{root}/{self.shard}")
        means = np.split(shard.moments, 2, axis=1)[0]  # (N, C, H, W), not normalized
        for start in range(0, len(means), batch_size):
            rows = slice(start, start + batch_size)
            latents = torch.tensor(means[rows], dtype=torch.float32, device=models.device)
            pixels = decode_latents(models.autoencoder, normalization.normalize(latents))
            yield ImageBatch(pixels, torch.from_numpy(shard.labels[rows].astype(np.int64)))


@dataclass(frozen=True)
class SampleFileRows:
    """Images of a sample file, on a disk that all workers can read."""

    path: Path
    rows: slice

    def batches(self, models: Models, batch_size: int) -> Iterator[ImageBatch]:
        """See Source."""
        images = open_sample_file(self.path)[self.rows]
        for start in range(0, len(images), batch_size):
            yield ImageBatch(torch.from_numpy(np.array(images[start : start + batch_size])))
