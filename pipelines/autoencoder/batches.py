"""The training images of a worker: decoded crops in random order, without end.

A worker whose share fits into `CACHE_BYTES` decodes every image once. Otherwise it decodes in every epoch, with threads that
work ahead: it visits slices of the index in random order, and mixes their images in a buffer of `CACHE_BYTES`. Slices keep
reads from Parquet and tars sequential.
"""

import itertools
import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from pipelines.errors import InputError
from pipelines.images.decoding import SLICE_SIZE, decode_images
from pipelines.images.index import ImageSource
from pipelines.images.sources import ImageSlice

logger = logging.getLogger(__name__)


CACHE_BYTES = 1 << 30  # of uint8 pixels per worker: 87,000 images at 64x64, 5,400 at 256x256
MIN_SLICES = 8  # per worker, so that small sets are shared evenly


def worker_slices(num_images: int, rank: int, world_size: int) -> list[np.ndarray]:
    """The index's rows that a worker trains on, in slices of neighbours. Every row belongs to one worker."""
    size = max(1, min(SLICE_SIZE, num_images // (MIN_SLICES * world_size)))
    return np.split(np.arange(num_images), range(size, num_images, size))[rank::world_size]


class ImageStream:
    """Endless random order of a worker's images. Each appears once per epoch, about once if they are mixed in a buffer."""

    def __init__(
        self,
        source: ImageSource,
        image_size: int,
        *,
        seed: tuple[int, ...],
        rank: int,
        world_size: int,
        num_threads: int = 1,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """seed: the order is a function of it, of the rank and of the number of workers."""
        self._source = source
        self._image_size = image_size
        self._random = np.random.default_rng([*seed, rank])
        self._slices = worker_slices(len(source[2]), rank, world_size)
        self._num_threads = num_threads
        self._capacity = max(1, cache_bytes // (3 * image_size**2))  # images

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Yields uint8 (batch_size, S, S, 3). Raises InputError if no image of the worker can be read."""
        images = self._cached() if sum(map(len, self._slices)) <= self._capacity else self._mixed()
        while True:
            yield np.stack(list(itertools.islice(images, batch_size)))

    def _cached(self) -> Iterator[np.ndarray]:
        pixels = list(self._epoch())
        while True:
            for row in self._random.permutation(len(pixels)):
                yield pixels[row]

    def _mixed(self) -> Iterator[np.ndarray]:
        buffer: list[np.ndarray] = []
        while True:
            for image in self._epoch():
                if len(buffer) < self._capacity:
                    buffer.append(image)
                    continue
                slot = self._random.integers(self._capacity)
                yield buffer[slot]
                buffer[slot] = image

    def _epoch(self) -> Iterator[np.ndarray]:
        """Decodes the slices in random order and yields their readable images."""
        num_images = 0
        waiting: deque[Future[list[np.ndarray]]] = deque()
        order = iter(self._random.permutation(len(self._slices)))
        with ThreadPoolExecutor(self._num_threads) as threads:
            for number in itertools.islice(order, self._num_threads + 1):
                waiting.append(threads.submit(self._decode, self._slices[number]))
            while waiting:
                decoded = waiting.popleft().result()
                for number in itertools.islice(order, 1):
                    waiting.append(threads.submit(self._decode, self._slices[number]))
                num_images += len(decoded)
                yield from decoded
        if num_images == 0:
            raise InputError(f"none of the training images in {self._source[1].location} can be read")

    def _decode(self, rows: np.ndarray) -> list[np.ndarray]:
        part = ImageSlice.of(*self._source, rows)
        images = []
        names = part.entries["sample_id"].to_pylist()
        for name, image in zip(names, decode_images(part, self._image_size), strict=True):
            if isinstance(image, Exception):
                logger.warning("left out unreadable %s: %s", name, image)
            else:
                images.append(image)
        return images
