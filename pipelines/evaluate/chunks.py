"""Cuts a set of images into chunks, the units of work of the workers.

Chunks depend on the size of the set alone, and a chunk's sums on the chunk alone. So neither the number of workers nor
the death of one changes a result.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.evaluate.real_images import ImageSource
from pipelines.evaluate.samples import SampleRule, Setting
from pipelines.evaluate.sources import DecodedShard, GeneratedSamples, ImageFiles, SampleFileRows, Source
from pipelines.evaluate.sums import NUM_GROUPS
from pipelines.images.sources import ImageSlice
from pipelines.latents.manifest import Manifest, shard_name

CHUNK_SIZE = 500  # images per chunk: 34 MB of sums in Inception's features


@dataclass(frozen=True)
class Chunk:
    """Consecutive images of a set, processed by one call of a worker. If the worker dies, the chunk is processed again."""

    set_name: str
    group: int
    """Jackknife group that the images belong to."""
    num_images: int
    source: Source
    num_features_kept: int = 0
    """Leading images whose features are returned."""
    num_images_kept: int = 0
    """Leading images that are returned."""


class Span(NamedTuple):
    """Images [start, stop) of a set, all in one jackknife group."""

    group: int
    start: int
    stop: int


def spans(num_images: int) -> list[Span]:
    """Splits a set into NUM_GROUPS equal groups, and each group into spans of at most CHUNK_SIZE images."""
    edges = [group * num_images // NUM_GROUPS for group in range(NUM_GROUPS + 1)]
    return [
        Span(group, start, min(start + CHUNK_SIZE, stop))
        for group, (first, stop) in enumerate(itertools.pairwise(edges))
        for start in range(first, stop, CHUNK_SIZE)
    ]


def share(num_kept: int, num_images: int, start: int, stop: int) -> int:
    """How many of the images [start, stop) to keep, if `num_kept` of `num_images` are kept evenly over the chunks."""
    kept = min(num_kept, num_images)
    return stop * kept // num_images - start * kept // num_images


def make_chunks(
    set_name: str, parts: Sequence[tuple[Span, Source]], *, num_features_kept: int = 0, num_images_kept: int = 0
) -> list[Chunk]:
    """One chunk per part. The spans must be consecutive and start at 0; kept features and images are spread evenly."""
    num_images = parts[-1][0].stop if parts else 0
    return [
        Chunk(
            set_name,
            span.group,
            span.stop - span.start,
            source,
            num_features_kept=share(num_features_kept, num_images, span.start, span.stop),
            num_images_kept=share(num_images_kept, num_images, span.start, span.stop),
        )
        for span, source in parts
    ]


def generated_chunks(
    set_name: str,
    setting: Setting,
    rule: SampleRule,
    num_samples: int,
    *,
    num_features_kept: int = 0,
    num_images_kept: int = 0,
) -> list[Chunk]:
    """Samples 0 to num_samples - 1 of the generator."""
    parts = [(span, GeneratedSamples(setting, rule, np.arange(span.start, span.stop))) for span in spans(num_samples)]
    return make_chunks(set_name, parts, num_features_kept=num_features_kept, num_images_kept=num_images_kept)


def image_file_chunks(
    set_name: str,
    images: ImageSource,
    size: int,
    *,
    shuffle: bool = False,
    num_features_kept: int = 0,
    num_images_kept: int = 0,
) -> list[Chunk]:
    """All images of a source, cropped to `size`.

    shuffle: read class folders in a fixed random order, so that every jackknife group and score split sees all classes.
    Parquet files and tars are always read in their own order, the only fast one.
    """
    _, listing, index = images
    order = np.arange(len(index))
    if shuffle and listing.format == "folders":
        order = np.random.default_rng(0).permutation(order)
    parts = [
        (span, ImageFiles(ImageSlice.of(*images, order[span.start : span.stop]), size)) for span in spans(len(index))
    ]
    return make_chunks(set_name, parts, num_features_kept=num_features_kept, num_images_kept=num_images_kept)


def sample_file_chunks(set_name: str, path: Path, num_images: int, *, num_features_kept: int = 0) -> list[Chunk]:
    """The first `num_images` images of a sample file."""
    parts = [(span, SampleFileRows(path, slice(span.start, span.stop))) for span in spans(num_images)]
    return make_chunks(set_name, parts, num_features_kept=num_features_kept)


def decoded_chunks(set_name: str, dataset: str, manifest: Manifest, *, num_features_kept: int = 0) -> list[Chunk]:
    """All shards of a latent dataset, decoded. One chunk per shard."""
    num_shards = len(manifest.shard_rows)
    edges = np.cumsum([0, *manifest.shard_rows]).tolist()
    parts = [
        (Span(number * NUM_GROUPS // num_shards, start, stop), DecodedShard(dataset, shard_name(number)))
        for number, (start, stop) in enumerate(itertools.pairwise(edges))
    ]
    return make_chunks(set_name, parts, num_features_kept=num_features_kept)
