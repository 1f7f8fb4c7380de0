"""Measures chunks of images on one device.

Images stay on the worker that generated or read them. A worker returns sums of features, and as many features and images
as `Chunk.kept` specifies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from meanflow_core.autoencoder import forbid_tf32
from meanflow_core.generator import load_pipeline
from meanflow_core.metrics import FeatureStatistics, ScoreSums
from pipelines.evaluate.chunks import Chunk
from pipelines.evaluate.job import MeasuringOptions
from pipelines.evaluate.sources import Models
from pipelines.evaluate.sums import SetSums
from pipelines.extractors.opening import Extractor, Features, open_extractor
from pipelines.latents.autoencoder import open_autoencoder
from pipelines.tracking.registry import fetch_generator


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """What a worker loads. All paths are absolute."""

    options: MeasuringOptions
    model: str | None = None
    """Generator, for samples and reconstructions."""
    tracking_uri: str | None = None
    autoencoder: str | None = None
    """Latent dataset whose autoencoder is loaded if there is no generator."""


class Measurer:
    """Generates or reads the images of a chunk on one device and sums their features. Works without a cluster."""

    def __init__(self, config: WorkerConfig, device: str) -> None:
        torch.set_num_threads(1)  # there is one worker per CPU
        forbid_tf32()  # reports record float32
        options = config.options
        self._batch_size = options.batch_size  # affects rounding, so reports record it
        self.extractor: Extractor = open_extractor(options.extractor, options.extractor_weights, device)
        self._models = _load_models(config, torch.device(device))

    def measure(self, chunk: Chunk) -> SetSums:
        """Computes the sums of a chunk."""
        sums = SetSums(chunk.set_name)
        features: list[Features] = []
        labels: list[torch.Tensor] = []
        rows: list[torch.Tensor] = []
        for batch in chunk.source.batches(self._models, self._batch_size):
            sums.num_unreadable += batch.num_unreadable
            if len(batch.pixels) == 0:
                continue
            sums.seconds += batch.seconds
            sums.num_images += len(batch.pixels)
            features.append(self.extractor(batch.pixels))
            labels += [] if batch.labels is None else [batch.labels]
            rows += [] if batch.rows is None else [batch.rows]
            logits = features[-1].logits
            if self.extractor.class_names is not None and logits is not None and batch.labels is not None:
                num_correct = int((logits.argmax(dim=1).cpu() == batch.labels).sum())
                sums.num_correct = num_correct + (sums.num_correct or 0)
            num_missing = chunk.kept.images - sum(map(len, sums.images))
            if num_missing:
                sums.images.append(_copy_to_cpu(batch.pixels[:num_missing]))
                if batch.labels is not None:
                    sums.labels.append(batch.labels[:num_missing])
        if features:
            _add_features(sums, chunk, features)
            if chunk.kept.features:
                sums.feature_labels = [torch.cat(labels)[: chunk.kept.features].clone()] if labels else []
                sums.feature_rows = [torch.cat(rows)[: chunk.kept.features].clone()] if rows else []
        return sums


def _load_models(config: WorkerConfig, device: torch.device) -> Models:
    if config.model is not None:
        pipeline = load_pipeline(fetch_generator(config.model, config.tracking_uri), device)
        return Models(device, pipeline, pipeline.vae)
    if config.autoencoder is not None:
        return Models(device, autoencoder=open_autoencoder(config.autoencoder).to(device))
    return Models(device)


def _add_features(sums: SetSums, chunk: Chunk, batches: Sequence[Features]) -> None:
    # Sum on the extractor's device: outer products of 2,048 features on a CPU thread take longer than a GPU forward.
    pooled = torch.cat([features.pooled for features in batches])
    sums.groups[chunk.group] = _statistics(pooled)
    if chunk.kept.features:
        sums.features.append(_copy_to_cpu(pooled[: chunk.kept.features]))
    logits = [features.logits for features in batches if features.logits is not None]
    if logits:
        sums.scores[chunk.group] = ScoreSums.of(torch.cat(logits).cpu())
    spatial = [features.spatial for features in batches if features.spatial is not None]
    if spatial:
        sums.spatial = _statistics(torch.cat(spatial))


def _statistics(features: torch.Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics.of(features)
    return FeatureStatistics(statistics.count, statistics.total.cpu(), statistics.outer.cpu())


def _copy_to_cpu(values: torch.Tensor) -> torch.Tensor:
    # A copy, because pickling a view pickles its whole storage.
    return values.to("cpu", copy=True)
