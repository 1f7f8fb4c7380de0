"""Sets of images, drawn or read, and measured on every device of the cluster in chunks that nothing else decides.

A set is cut into groups and chunks by its size alone; a chunk's sums are a function of the chunk, and are added up in
the chunks' order. So neither the number of workers nor the death of one changes a figure. No image need leave its
worker: what comes back are sums, and so many features and images as were asked for.
"""

import logging
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import pyarrow as pa
import ray
import torch
from diffusers import AutoencoderKL

from meanflow_core.autoencoder import decode_latents, forbid_tf32, reconstruct
from meanflow_core.generator import load_pipeline
from meanflow_core.latents import LatentNormalization
from meanflow_core.metrics import FeatureStatistics, ScoreSums, merged
from meanflow_core.pipeline import MeanFlowPipeline
from pipelines import storage
from pipelines.errors import InputError
from pipelines.evaluate.extractors import Extractor, Features, open_extractor
from pipelines.evaluate.sample_files import open_sample_file
from pipelines.evaluate.samples import SampleRule, Setting
from pipelines.images.decoding import decode_images
from pipelines.images.sources import ImageSlice
from pipelines.latents.autoencoder import open_autoencoder
from pipelines.latents.shards import read_shard
from pipelines.progress import Progress
from pipelines.tracking.registry import fetch_generator

logger = logging.getLogger(__name__)

NUM_GROUPS = 20  # of the jackknife: its error is then known to a sixth
NUM_SPLITS = 10  # of the Inception Score, as in the field
CHUNK_SIZE = 500  # rows whose sums travel together: 34 MB in Inception's features

Sums = TypeVar("Sums", FeatureStatistics, ScoreSums)


@dataclass(frozen=True)
class Images:
    """Some images of a chunk, with what is known of them."""

    pixels: torch.Tensor
    """uint8 (B, H, W, 3)."""
    labels: torch.Tensor | None
    """int64 (B,), where there are classes."""
    seconds: float = 0.0
    """Of network and decoder."""
    num_unreadable: int = 0
    """Left out."""


class Source(Protocol):
    """Where a chunk's images come from: pickled to the worker, and asked there."""

    def batches(self, worker: "Measurer", batch_size: int) -> Iterator[Images]:
        """The chunk's images in their order."""


@dataclass(frozen=True)
class Drawn:
    """Samples of the worker's generator, by index."""

    setting: Setting
    rule: SampleRule
    indices: np.ndarray

    def batches(self, worker: "Measurer", batch_size: int) -> Iterator[Images]:
        """As Source."""
        pipeline = worker.pipeline
        for start in range(0, len(self.indices), batch_size):
            rows = self.indices[start : start + batch_size]
            labels = self.rule.labels_of(rows, pipeline.transformer.config.num_classes)
            began = time.perf_counter()
            pixels = pipeline.images_from_seeds(
                labels.tolist(),
                self.rule.seeds_of(rows),
                self.setting.num_steps,
                guidance_scale=self.setting.guidance_scale,
                guidance_interval=self.setting.guidance_interval,
                solver=self.setting.solver,
            )
            if pixels.is_cuda:
                torch.cuda.synchronize()
            yield Images(pixels, torch.from_numpy(labels), time.perf_counter() - began)


@dataclass(frozen=True)
class Read:
    """Image files."""

    images: ImageSlice
    size: int
    """Side of the square that they are cropped to."""
    through_autoencoder: bool = False
    """Encoded by the worker's autoencoder, at the mean, and decoded again."""

    def batches(self, worker: "Measurer", batch_size: int) -> Iterator[Images]:
        """As Source; what cannot be read is left out and counted."""
        entries = self.images.entries["label"].to_pylist()
        pixels: list[np.ndarray] = []
        labels: list[int] = []
        unreadable = 0
        for row, (image, label) in enumerate(zip(decode_images(self.images, self.size), entries, strict=True)):
            if isinstance(image, Exception):
                unreadable += 1
            else:
                pixels.append(image)
                labels.append(label)
            if len(pixels) == batch_size or (row + 1 == len(entries) and (pixels or unreadable)):
                read = torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0, 1, 1, 3, dtype=torch.uint8)
                if self.through_autoencoder and pixels:
                    read = reconstruct(worker.autoencoder, read.to(worker.device))
                yield Images(read, torch.tensor(labels, dtype=torch.int64), num_unreadable=unreadable)
                pixels, labels, unreadable = [], [], 0


@dataclass(frozen=True)
class Decoded:
    """A shard of a latent dataset, by its path there, decoded at the posterior's mean by the worker's autoencoder."""

    dataset: str
    shard: str

    def batches(self, worker: "Measurer", batch_size: int) -> Iterator[Images]:
        """As Source."""
        filesystem, root = storage.open_storage(self.dataset)
        shard = read_shard(filesystem, f"{root}/{self.shard}")
        means = np.split(shard.moments, 2, axis=1)[0]
        for start in range(0, len(means), batch_size):
            rows = slice(start, start + batch_size)
            yield Images(worker.decode_raw(means[rows]), torch.from_numpy(shard.labels[rows].astype(np.int64)))


@dataclass(frozen=True)
class Stored:
    """Rows of a file of samples, on a disk that the workers share."""

    path: Path
    rows: slice

    def batches(self, worker: "Measurer", batch_size: int) -> Iterator[Images]:
        """As Source."""
        images = open_sample_file(self.path)[self.rows]
        for start in range(0, len(images), batch_size):
            yield Images(torch.from_numpy(np.array(images[start : start + batch_size])), None)


@dataclass(frozen=True)
class Chunk:
    """A piece of work: what a worker does in one call, and what is lost when it dies."""

    set_name: str
    group: int
    num_rows: int
    source: Source
    """Where its images come from."""
    num_features: int = 0
    """First rows whose features come back."""
    num_images: int = 0
    """First rows that come back as images."""


def _add_to(sums: dict[int, Sums], key: int, part: Sums) -> None:
    sums[key] = sums[key] + part if key in sums else part


@dataclass
class Measured:
    """The sums of a chunk, or of a whole set."""

    set_name: str
    groups: dict[int, FeatureStatistics] = field(default_factory=dict)
    """By group."""
    scores: dict[int, ScoreSums] = field(default_factory=dict)
    """By group, where the extractor classifies."""
    spatial: FeatureStatistics | None = None
    num_right: int | None = None
    """Images whose class the extractor saw, where its classes are theirs."""
    features: list[torch.Tensor] = field(default_factory=list)
    """(n, D) each, of the rows that were asked for."""
    images: list[torch.Tensor] = field(default_factory=list)
    """uint8 (n, H, W, 3) each."""
    labels: list[torch.Tensor] = field(default_factory=list)
    """int64 (n,) each, of the images that came back."""
    seconds: float = 0.0
    num_rows: int = 0
    num_unreadable: int = 0

    def add(self, other: "Measured") -> None:
        """Adds the sums of a later chunk."""
        for group, statistics in other.groups.items():
            _add_to(self.groups, group, statistics)
        for group, score in other.scores.items():
            _add_to(self.scores, group, score)
        if other.spatial is not None:
            self.spatial = other.spatial if self.spatial is None else self.spatial + other.spatial
        if other.num_right is not None:
            self.num_right = other.num_right + (self.num_right or 0)
        self.features += other.features
        self.images += other.images
        self.labels += other.labels
        self.seconds += other.seconds
        self.num_rows += other.num_rows
        self.num_unreadable += other.num_unreadable

    @property
    def statistics(self) -> FeatureStatistics:
        """Of the whole set."""
        return merged([self.groups[group] for group in sorted(self.groups)])

    @property
    def splits(self) -> list[ScoreSums]:
        """The scores' sums in NUM_SPLITS parts by order of the samples; fewer where there are fewer groups."""
        per_split: dict[int, ScoreSums] = {}
        for group in sorted(self.scores):
            _add_to(per_split, group * NUM_SPLITS // NUM_GROUPS, self.scores[group])
        return list(per_split.values())


@dataclass(frozen=True, kw_only=True)
class MeasuringPlan:
    """What a worker opens."""

    extractor: str
    extractor_weights: Path | None
    model: str | None
    """Generator, for samples and reconstructions."""
    tracking_uri: str | None
    autoencoder: str | None = None
    """Folder of the autoencoder that decodes moments, where there is no generator."""
    batch_size: int
    """Images per call of network, decoder and extractor. Part of the protocol: rounding depends on it."""
    cpu_threads: int
    """Threads of a worker on a CPU: as the batch size."""


class Measurer:
    """Draws or reads a chunk's images on one device, and sums up their features. A plain callable: it needs no cluster."""

    def __init__(self, plan: MeasuringPlan, device: str) -> None:
        torch.set_num_threads(plan.cpu_threads)
        forbid_tf32()  # the protocol says float32
        self._plan = plan
        self.device = torch.device(device)
        self._extractor: Extractor = open_extractor(plan.extractor, plan.extractor_weights, self.device)
        self._pipeline: MeanFlowPipeline | None = None
        if plan.model is not None:
            self._pipeline = load_pipeline(fetch_generator(plan.model, plan.tracking_uri), self.device)
        self._autoencoder = self._pipeline.vae if self._pipeline is not None else None
        if plan.autoencoder is not None:
            self._autoencoder = open_autoencoder(plan.autoencoder).to(self.device)

    @property
    def pipeline(self) -> MeanFlowPipeline:
        """The generator."""
        assert self._pipeline is not None
        return self._pipeline

    @property
    def autoencoder(self) -> AutoencoderKL:
        """The generator's, or the one that was named."""
        assert self._autoencoder is not None
        return self._autoencoder

    @torch.no_grad()
    def decode_raw(self, means: np.ndarray) -> torch.Tensor:
        """Unscaled means (B, C, H, W) -> images uint8 (B, H, W, 3)."""
        normalization = LatentNormalization.from_vae_config(self.autoencoder.config)
        raw = torch.tensor(means, dtype=torch.float32, device=self.device)
        return decode_latents(self.autoencoder, normalization.normalize(raw))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """{"chunk": [a pickled Chunk]} -> {"measured": [a pickled Measured]}."""
        chunk: Chunk = pickle.loads(batch["chunk"][0])  # our own, from this job's driver
        return {"measured": np.array([pickle.dumps(self.measure(chunk))], dtype=object)}

    def measure(self, chunk: Chunk) -> Measured:
        """The sums of a chunk."""
        measured = Measured(chunk.set_name)
        seen: list[Features] = []
        for images in chunk.source.batches(self, self._plan.batch_size):
            measured.num_unreadable += images.num_unreadable
            measured.seconds += images.seconds
            if len(images.pixels) == 0:
                continue
            seen.append(self._extractor(images.pixels))
            measured.num_rows += len(images.pixels)
            logits = seen[-1].logits
            if logits is not None and self._extractor.class_names is not None and images.labels is not None:
                right = int((logits.argmax(dim=1).cpu() == images.labels).sum())
                measured.num_right = right + (measured.num_right or 0)
            wanted = max(0, chunk.num_images - sum(map(len, measured.images)))
            if wanted:
                measured.images.append(_on_cpu_alone(images.pixels[:wanted]))
                if images.labels is not None:
                    measured.labels.append(images.labels[:wanted])
        if seen:
            self._add_sums(measured, chunk, seen)
        return measured

    def _add_sums(self, measured: Measured, chunk: Chunk, seen: Sequence[Features]) -> None:
        # On the extractor's device: on a GPU, the products of 2,048 features would keep a CPU's thread longer than it.
        pooled = torch.cat([features.pooled for features in seen])
        measured.groups[chunk.group] = _on_cpu(FeatureStatistics.of(pooled))
        if chunk.num_features:
            measured.features.append(_on_cpu_alone(pooled[: chunk.num_features]))
        logits = [features.logits for features in seen if features.logits is not None]
        if logits:
            measured.scores[chunk.group] = ScoreSums.of(torch.cat(logits).cpu())
        spatial = [features.spatial for features in seen if features.spatial is not None]
        if spatial:
            measured.spatial = _on_cpu(FeatureStatistics.of(torch.cat(spatial)))


def _on_cpu_alone(rows: torch.Tensor) -> torch.Tensor:
    # A pickled view takes all that it is a view of along, and keeps it where it arrives.
    return rows.to("cpu", copy=True)


def _on_cpu(statistics: FeatureStatistics) -> FeatureStatistics:
    return FeatureStatistics(statistics.count, statistics.total.cpu(), statistics.outer.cpu())


def spans(num_rows: int) -> list[tuple[int, int, int]]:
    """(group, start, stop) of a set's chunks: NUM_GROUPS equal groups, each in chunks of at most CHUNK_SIZE rows."""
    edges = [
        (group, group * num_rows // NUM_GROUPS, (group + 1) * num_rows // NUM_GROUPS) for group in range(NUM_GROUPS)
    ]
    return [
        (group, start, min(start + CHUNK_SIZE, last))
        for group, first, last in edges
        for start in range(first, last, CHUNK_SIZE)
    ]


def cut(
    set_name: str,
    parts: Sequence[tuple[int, int, int]],
    source: Callable[[int, int], Source],
    *,
    num_features: int = 0,
    num_images: int = 0,
) -> list[Chunk]:
    """The chunks of a set, of `parts` (group, start, stop) that follow each other from row 0 on.

    source: of the rows [start, stop). num_features, num_images: how many come back, spread evenly over the chunks.
    """
    num_rows = parts[-1][2] if parts else 0
    return [
        Chunk(
            set_name,
            group,
            stop - start,
            source(start, stop),
            num_features=share(num_features, num_rows, start, stop),
            num_images=share(num_images, num_rows, start, stop),
        )
        for group, start, stop in parts
    ]


def share(wanted: int, num_rows: int, start: int, stop: int) -> int:
    """How many of the rows [start, stop) are kept where `wanted` of `num_rows` are, spread evenly over the chunks."""
    kept = min(wanted, num_rows)
    return stop * kept // num_rows - start * kept // num_rows


def measure_sets(
    chunks: Sequence[Chunk],
    plan: MeasuringPlan,
    *,
    num_workers: int,
    use_gpu: bool,
    on_chunk: Callable[[Measured], None] = lambda measured: None,
) -> dict[str, Measured]:
    """Measures all chunks on the cluster; the sums of each set, added up in the order of its chunks.

    on_chunk sees every chunk's result in that order, and may take its images away. Raises InputError as the extractor
    and the generator do.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = None  # one chunk, one block
    rows = [pa.table({"chunk": pa.array([pickle.dumps(chunk)], pa.large_binary())}) for chunk in chunks]
    results = ray.data.from_arrow(rows).map_batches(
        Measurer,
        batch_size=None,
        fn_constructor_args=(plan, "cuda" if use_gpu else "cpu"),
        compute=ray.data.ActorPoolStrategy(size=min(num_workers, len(chunks))),
        num_gpus=1 if use_gpu else 0,
        num_cpus=0 if use_gpu else 1,
    )
    total = sum(chunk.num_rows for chunk in chunks)
    progress, done = Progress(logger, "measured", "images", total), 0
    sets: dict[str, Measured] = {}
    try:
        for row in results.iter_rows():
            measured: Measured = pickle.loads(row["measured"])  # our own, from this job's workers
            on_chunk(measured)
            done += measured.num_rows + measured.num_unreadable
            sets.setdefault(measured.set_name, Measured(measured.set_name)).add(measured)
            progress.update(done, f"now at {measured.set_name}")
    except ray.exceptions.RayError as error:
        raise _cause(error) from error
    assert done == total
    return sets


def _cause(error: BaseException) -> BaseException:
    """What a worker raised of ours, where that is what ended the job."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, InputError):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    return error
