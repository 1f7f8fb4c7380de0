"""Splits a set of images into chunks, the units of work of the workers.

Chunks depend only on the size of the set, and the sums of a chunk only on the chunk. Therefore results do not depend on
the number of workers, nor on whether a worker dies and its chunk is processed again.
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

CHUNK_SIZE = 500  # images per chunk: 67 MB of sums in Inception's features, half of them spatial


class Kept(NamedTuple):
    """How many feature vectors and images of a set or chunk workers return, in addition to the sums."""

    features: int = 0
    images: int = 0


NOTHING_KEPT = Kept()


@dataclass(frozen=True)
class Chunk:
    """Consecutive images of a set, processed in one call of a worker."""

    set_name: str
    group: int
    """Jackknife group that the images belong to."""
    num_images: int
    source: Source
    kept: Kept
    """How many features and images to return, starting with the chunk's first image."""


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


def num_kept_between(num_kept: int, num_images: int, start: int, stop: int) -> int:
    """How many of the images [start, stop) to keep if `num_kept` are spread evenly over all `num_images`."""
    kept = min(num_kept, num_images)
    return stop * kept // num_images - start * kept // num_images


def make_chunks(set_name: str, parts: Sequence[tuple[Span, Source]], kept: Kept = NOTHING_KEPT) -> list[Chunk]:
    """Makes one chunk per part. Spans must be consecutive and start at 0. `kept` is spread evenly over the chunks."""
    num_images = parts[-1][0].stop if parts else 0
    return [
        Chunk(
            set_name,
            span.group,
            span.stop - span.start,
            source,
            Kept(*(num_kept_between(count, num_images, span.start, span.stop) for count in kept)),
        )
        for span, source in parts
    ]


def generated_chunks(
    set_name: str, setting: Setting, rule: SampleRule, num_samples: int, kept: Kept = NOTHING_KEPT
) -> list[Chunk]:
    """Samples 0 to num_samples - 1 of the generator."""
    parts = [(span, GeneratedSamples(setting, rule, np.arange(span.start, span.stop))) for span in spans(num_samples)]
    return make_chunks(set_name, parts, kept)


def image_file_chunks(
    set_name: str, images: ImageSource, size: int, kept: Kept = NOTHING_KEPT, *, shuffle: bool = False
) -> list[Chunk]:
    """All images of a source, cropped to `size`.

    shuffle: read class folders in a fixed random order, so that every jackknife group and score split sees all classes.
    Parquet and tar files are always read in their own order, because random access to them is slow.
    """
    _, listing, index = images
    order = np.arange(len(index))
    if shuffle and listing.format == "folders":
        order = np.random.default_rng(0).permutation(order)
    parts: list[tuple[Span, Source]] = []
    for span in spans(len(index)):
        rows = order[span.start : span.stop]
        parts.append((span, ImageFiles(ImageSlice.of(*images, rows), size, rows)))
    return make_chunks(set_name, parts, kept)


def sample_file_chunks(set_name: str, path: Path, num_images: int, kept: Kept = NOTHING_KEPT) -> list[Chunk]:
    """The first `num_images` images of a sample file."""
    parts = [(span, SampleFileRows(path, slice(span.start, span.stop))) for span in spans(num_images)]
    return make_chunks(set_name, parts, kept)


def decoded_chunks(set_name: str, dataset: str, manifest: Manifest, kept: Kept = NOTHING_KEPT) -> list[Chunk]:
    """All shards of a latent dataset, decoded. One chunk per shard."""
    num_shards = manifest.num_shards
    edges = np.cumsum([0, *manifest.shard_num_samples]).tolist()
    parts = [
        (Span(number * NUM_GROUPS // num_shards, start, stop), DecodedShard(dataset, shard_name(number)))
        for number, (start, stop) in enumerate(itertools.pairwise(edges))
    ]
    return make_chunks(set_name, parts, kept)
