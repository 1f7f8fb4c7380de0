"""Measures sets of images with a pool of Ray actors, one per device.

Images stay on the worker that generated or read them. A worker returns sums of features, and as many features and images
as `Chunk.kept` specifies.
"""

import logging
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray
import torch

from meanflow_core.autoencoder import forbid_tf32
from meanflow_core.generator import load_pipeline
from meanflow_core.metrics import FeatureStatistics, ScoreSums
from pipelines.cluster import choose_gpus, num_gpus, start_ray
from pipelines.errors import InputError
from pipelines.evaluate.chunks import Chunk
from pipelines.evaluate.extractors import Extractor, Features, open_extractor
from pipelines.evaluate.job import MeasuringOptions
from pipelines.evaluate.sources import Models
from pipelines.evaluate.sums import SetSums
from pipelines.latents.autoencoder import open_autoencoder
from pipelines.progress import Progress
from pipelines.tracking.registry import fetch_generator

logger = logging.getLogger(__name__)


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

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """{"chunk": [a pickled Chunk]} -> {"sums": [pickled SetSums]}."""
        chunk: Chunk = pickle.loads(batch["chunk"][0])  # trusted: from this job's driver
        return {"sums": np.array([pickle.dumps(self.measure(chunk))], dtype=object)}

    def measure(self, chunk: Chunk) -> SetSums:
        """Computes the sums of a chunk."""
        sums = SetSums(chunk.set_name)
        features: list[Features] = []
        for batch in chunk.source.batches(self._models, self._batch_size):
            sums.num_unreadable += batch.num_unreadable
            if len(batch.pixels) == 0:
                continue
            sums.seconds += batch.seconds
            sums.num_images += len(batch.pixels)
            features.append(self.extractor(batch.pixels))
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


@dataclass(frozen=True)
class Workers:
    """Number and device of the workers."""

    num_workers: int
    use_gpu: bool


def start_cluster(options: MeasuringOptions) -> Workers:
    """Starts or joins a Ray cluster, and chooses the number and device of the workers.

    Raises InputError if this machine has fewer GPUs than requested.
    """
    start_ray(needed_cpus=(options.num_workers or os.cpu_count() or 1) + 1)
    default = (num_gpus() if options.device != "cpu" else 0) or os.cpu_count() or 1
    num_workers = options.num_workers or default
    return Workers(num_workers, choose_gpus(options.device, num_workers))


def measure_sets(
    chunks: Sequence[Chunk],
    config: WorkerConfig,
    workers: Workers,
    on_chunk: Callable[[SetSums], None] = lambda sums: None,
) -> dict[str, SetSums]:
    """Measures all chunks on the cluster. Returns the sums of each set, added in the order of its chunks.

    on_chunk: called with the sums of every chunk in order; it may remove their images. Raises a worker's InputError, for
    example if the worker cannot load the extractor.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = None  # keep one chunk per block
    rows = [pa.table({"chunk": pa.array([pickle.dumps(chunk)], pa.large_binary())}) for chunk in chunks]
    results = ray.data.from_arrow(rows).map_batches(
        Measurer,
        batch_size=None,
        fn_constructor_args=(config, "cuda" if workers.use_gpu else "cpu"),
        compute=ray.data.ActorPoolStrategy(size=min(workers.num_workers, len(chunks))),
        num_gpus=1 if workers.use_gpu else 0,
        num_cpus=0 if workers.use_gpu else 1,
    )
    num_images = sum(chunk.num_images for chunk in chunks)
    progress, num_done = Progress(logger, "measured", "images", num_images), 0
    sets: dict[str, SetSums] = {}
    try:
        for row in results.iter_rows():
            sums: SetSums = pickle.loads(row["sums"])  # trusted: from this job's workers
            on_chunk(sums)
            num_done += sums.num_images + sums.num_unreadable
            sets.setdefault(sums.set_name, SetSums(sums.set_name)).add(sums)
            progress.update(num_done, f"last chunk: {sums.set_name}")
    except ray.exceptions.RayError as error:
        input_error = _input_error(error)
        if input_error is None:
            raise
        raise input_error from error
    assert num_done == num_images
    return sets


def _input_error(error: BaseException) -> InputError | None:
    """Finds a worker's InputError in an exception's chain of causes. None if there is none."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    return None
