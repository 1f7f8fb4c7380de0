"""Measures sets of images with a pool of Ray actors, one per device.

The sums of a chunk, 67 MB in Inception's features, stay on the workers: they are added there in groups of FAN_IN, and the
driver receives one sum per jackknife group. The order of the additions depends on the number of chunks alone, so the
results have the same bits for any number of workers.
"""

import logging
import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import ray
from ray.actor import ActorHandle

from pipelines.cluster import WAITING_SECONDS, choose_gpus, describe_waiting, num_gpus, start_ray
from pipelines.errors import InputError
from pipelines.evaluate.chunks import Chunk
from pipelines.evaluate.job import MeasuringOptions
from pipelines.evaluate.measuring import Measurer, WorkerConfig
from pipelines.evaluate.sums import SetSums, add_sums
from pipelines.progress import Progress

logger = logging.getLogger(__name__)

FAN_IN = 8  # sums that one task adds


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

    on_chunk: called for every chunk in order, with everything but the sums of its features; it may remove its images.
    Raises a worker's InputError, for example if the worker cannot load the extractor.
    """
    num_images = sum(chunk.num_images for chunk in chunks)
    progress, num_done = Progress(logger, "measured", "images", num_images), 0
    sets: dict[str, SetSums] = {}
    pool = WorkerPool(config, workers, len(chunks))
    trees: dict[tuple[str, int], SumTree] = defaultdict(lambda: SumTree(pool.add))  # by set and jackknife group
    totals: dict[tuple[str, int], ray.ObjectRef] = {}
    num_missing = Counter((chunk.set_name, chunk.group) for chunk in chunks)
    try:
        for chunk, result in zip(chunks, pool.measure(chunks), strict=True):
            key = chunk.set_name, chunk.group
            on_chunk(result.kept)
            sets.setdefault(chunk.set_name, SetSums(chunk.set_name)).add(result.kept)
            trees[key].add(result.sums)
            num_missing[key] -= 1
            if not num_missing[key]:
                totals[key] = trees.pop(key).total()  # now, to free the memory of its parts
            num_done += result.kept.num_images + result.kept.num_unreadable
            progress.update(num_done, f"now {chunk.set_name}")
        for (name, _), total in totals.items():
            sets[name].add(ray.get(total))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from error
        raise
    assert num_done == num_images
    return sets


@dataclass(frozen=True)
class ChunkResult:
    """What a worker returns of a chunk."""

    kept: SetSums
    """Its counts, and the features and images kept from it."""
    sums: ray.ObjectRef
    """The sums of its features, a SetSums on the worker's node."""


class ChunkWorker:
    """A `Measurer` as a Ray actor. If the actor dies, Ray restarts it and repeats its chunk."""

    def __init__(self, config: WorkerConfig, device: str) -> None:
        self._config, self._device = config, device
        self._measurer: Measurer | None = None

    def load(self) -> None:
        """Loads the models. Not done by the constructor, because Ray would not pass on its InputError."""
        self._measurer = Measurer(self._config, self._device)

    def measure(self, chunk: Chunk) -> tuple[SetSums, SetSums]:
        """Measures a chunk. Returns its counts and kept images, and the sums of its features."""
        if self._measurer is None:  # the actor was restarted
            self.load()
        assert self._measurer is not None
        return self._measurer.measure(chunk).split()

    def add(self, *parts: SetSums) -> SetSums:
        """The sums of consecutive parts of a set."""
        return add_sums(*parts)


class WorkerPool:
    """The actors, as far as the cluster has room for them."""

    def __init__(self, config: WorkerConfig, workers: Workers, num_chunks: int) -> None:
        actor_class = ray.remote(ChunkWorker).options(
            num_gpus=1 if workers.use_gpu else 0,
            num_cpus=0 if workers.use_gpu else 1,
            max_restarts=-1,
            max_task_retries=-1,
        )
        device = "cuda" if workers.use_gpu else "cpu"
        self._use_gpu = workers.use_gpu
        self._actors = [actor_class.remote(config, device) for _ in range(min(workers.num_workers, num_chunks))]
        self._loaded: list[ActorHandle] = []
        self._num_added = 0

    def measure(self, chunks: Sequence[Chunk]) -> Iterator[ChunkResult]:
        """Yields the results of all chunks in order. An actor receives chunks as soon as it has loaded its models."""
        loading: dict[ray.ObjectRef, ActorHandle] = {actor.load.remote(): actor for actor in self._actors}
        measuring: dict[ray.ObjectRef, tuple[ActorHandle, int]] = {}
        waiting, sums = deque(range(len(chunks))), {}
        finished: dict[int, SetSums] = {}
        num_yielded = 0
        while num_yielded < len(chunks):
            timeout = None if self._loaded else WAITING_SECONDS
            ready, _ = ray.wait([*loading, *measuring], num_returns=1, timeout=timeout)
            if not ready:
                logger.warning(describe_waiting(len(self._actors), use_gpu=self._use_gpu))
                continue
            [reference] = ready
            kept = ray.get(reference)
            if reference in loading:
                actor = loading.pop(reference)
                self._loaded.append(actor)
            else:
                actor, number = measuring.pop(reference)
                finished[number] = kept
            if waiting:
                following = waiting.popleft()
                reference, sums[following] = actor.measure.options(num_returns=2).remote(chunks[following])
                measuring[reference] = actor, following
            while num_yielded in finished:
                yield ChunkResult(finished.pop(num_yielded), sums.pop(num_yielded))
                num_yielded += 1

    def add(self, references: Sequence[ray.ObjectRef]) -> ray.ObjectRef:
        """Adds sums on one of the actors, after its current chunk. They take turns.

        Not in tasks of their own: the actors hold all CPUs, and Ray starts a process for every task that needs none.
        """
        self._num_added += 1
        actor = self._loaded[self._num_added % len(self._loaded)]
        added: ray.ObjectRef = actor.add.remote(*references)
        return added


@dataclass
class SumTree:
    """Adds sums in a tree. Its shape depends on the number of sums alone."""

    add_on_worker: Callable[[Sequence[ray.ObjectRef]], ray.ObjectRef]
    """Adds sums on a worker."""
    _levels: list[list[ray.ObjectRef]] = field(default_factory=list)
    """Sums that are not added yet: level k has sums of FAN_IN ** k chunks."""

    def add(self, reference: ray.ObjectRef) -> None:
        """Adds the sums of the next chunk."""
        for level in self._levels:
            level.append(reference)
            if len(level) < FAN_IN:
                return
            reference = self.add_on_worker(tuple(level))
            level.clear()
        self._levels.append([reference])

    def total(self) -> ray.ObjectRef:
        """The sums of all chunks."""
        return self.add_on_worker([reference for level in reversed(self._levels) for reference in level])
