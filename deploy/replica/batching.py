"""Batches the items of concurrent requests. All items of a batch belong to one group.

Unlike Ray Serve's `@serve.batch`, this batcher queues items by group (here: model, time grid and decoder), accepts
several items per request, drops the items of cancelled requests, and limits the queue.

When does a batch start? If only one request at a time was in progress during the last CONCURRENCY_MEMORY_SECONDS, at once.
Otherwise the oldest item waits up to `batch_wait_seconds` for others, unless the batch is full. Requests of all groups count.
Examples, with a wait of 5 ms:

- One user sends the next request after each answer: no request waits.
- 16 users do so: a batch of 16 ends, all 16 send the next request, and the first one waits up to 5 ms for the others.
- 15 of them stop: requests of the last one wait 5 ms each for 0.1 s, then no longer.
"""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

# Longer than callers take to receive an answer and to send their next request.
CONCURRENCY_MEMORY_SECONDS = 0.1

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class OverloadedError(Exception):
    """The queue is full, or the expected wait exceeds the request's timeout."""

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class DeadlineError(Exception):
    """The request timed out."""


@dataclass
class BatchLimits:
    """Limits that may change while the batcher runs."""

    max_batch_size: int
    """Maximum number of items per batch."""
    batch_wait_seconds: float
    """How long the oldest item waits for others while several requests are in progress."""
    max_queued_items: int
    """Maximum queue length. An empty queue accepts a request of any size."""


@dataclass(frozen=True)
class BatchedResults(Generic[ResultT]):
    """Results of one request, or those of its items that one batch has finished."""

    results: list[ResultT]
    """In the order of the request's items."""
    batch_infos: list[Any]
    """The info of each batch so far that held an item of this request."""
    queue_wait_seconds: float
    """From submission to the start of its first batch."""


OnResults = Callable[[list[int], BatchedResults], None]
"""Arguments: indices of a request's items that one batch has finished, and their results."""


@dataclass
class PendingRequest(Generic[ItemT, ResultT]):
    """A request whose items are queued or running."""

    group: Hashable
    items: Sequence[ItemT]
    arrival: float
    """time.monotonic() of submission."""
    done: asyncio.Future
    results: list[ResultT | None]
    num_missing: int
    on_results: OnResults | None = None
    first_batch_start: float | None = None
    batch_infos: list[Any] = field(default_factory=list)

    def finished(self, indices: Sequence[int]) -> BatchedResults[ResultT]:
        """The results of finished items."""
        assert self.first_batch_start is not None
        results = [self.results[index] for index in indices]
        return BatchedResults(
            results=[result for result in results if result is not None],
            batch_infos=list(self.batch_infos),
            queue_wait_seconds=self.first_batch_start - self.arrival,
        )


# run(group, items) -> (one result per item, info about the batch)
Run = Callable[[Any, list[ItemT]], Awaitable[tuple[Sequence[ResultT], Any]]]


class Batcher(Generic[ItemT, ResultT]):
    """Queues items and runs one batch at a time. For use on one event loop; no method blocks."""

    def __init__(
        self,
        run: Run,
        limits: BatchLimits,
        cost: Callable[[Any], float] = lambda group: 1.0,
        on_batch: Callable[[list[float]], None] = lambda queue_wait_seconds: None,
    ) -> None:
        """cost: relative cost of one item of a group; the batcher measures the seconds per unit of cost.

        on_batch: called after each batch with the queue wait of each item.
        """
        self.limits = limits
        self._run = run
        self._cost = cost
        self._on_batch = on_batch
        # Groups take turns: each moves to the end after its batch, so that a long queue does not block the others.
        self._queues: dict[Hashable, deque[tuple[PendingRequest[ItemT, ResultT], int]]] = {}
        self._arrival = asyncio.Event()
        self._loop_task: asyncio.Task | None = None
        self._seconds_per_cost: float | None = None
        self._num_in_progress = 0  # requests
        self._last_concurrent_time = -math.inf  # time.monotonic() when two requests were last in progress at once

    @property
    def num_queued(self) -> int:
        """Number of queued items."""
        return sum(len(queue) for queue in self._queues.values())

    async def submit(
        self,
        group: Hashable,
        items: Sequence[ItemT],
        timeout_seconds: float,
        on_results: OnResults | None = None,
    ) -> BatchedResults[ResultT]:
        """Returns the results of a request's items. Cancelling the call removes its queued items.

        on_results: called after each batch that held items of the request.

        Raises OverloadedError at once if the queue is full or too slow, DeadlineError at the timeout, and the error of
        any batch that held one of its items.
        """
        self._check_load(group, len(items), timeout_seconds)
        loop = asyncio.get_running_loop()
        if self._loop_task is None or self._loop_task.done():
            self._loop_task = loop.create_task(self._run_batches())
        request: PendingRequest[ItemT, ResultT] = PendingRequest(
            group=group,
            items=items,
            arrival=time.monotonic(),
            done=loop.create_future(),
            results=[None] * len(items),
            num_missing=len(items),
            on_results=on_results,
        )
        self._queues.setdefault(group, deque()).extend((request, index) for index in range(len(items)))
        self._arrival.set()
        self._num_in_progress += 1
        self._note_concurrency()
        try:
            async with asyncio.timeout(timeout_seconds):
                await request.done
        except TimeoutError as error:
            self._remove(request)
            raise DeadlineError(f"not done within {timeout_seconds:g} s") from error
        except BaseException:
            self._remove(request)
            del request  # as in `_run_batch`
            raise
        finally:
            self._note_concurrency()
            self._num_in_progress -= 1
        return request.finished(range(len(items)))

    def _note_concurrency(self) -> None:
        """Remembers the time if two requests are in progress now."""
        if self._num_in_progress > 1:
            self._last_concurrent_time = time.monotonic()

    def _check_load(self, group: Hashable, num_items: int, timeout_seconds: float) -> None:
        """Raises OverloadedError if a request cannot be accepted now."""
        num_queued = self.num_queued
        if num_queued and num_queued + num_items > self.limits.max_queued_items:
            raise OverloadedError(
                f"{num_queued} images are queued, and the limit is {self.limits.max_queued_items}; try again later",
                max(self._estimate_seconds(math.inf) / 2.0, 0.1),
            )
        # Groups take turns: while this group runs `num_turns` batches, each other group runs at most as many.
        size = self.limits.max_batch_size
        num_turns = len(self._queues.get(group, ())) // size + 1
        wait = self._estimate_seconds(num_turns * size)
        if wait > timeout_seconds:
            raise OverloadedError(
                f"the expected wait of {wait:.1f} s exceeds the request's timeout; try again later",
                wait - timeout_seconds / 2.0,
            )

    def _estimate_seconds(self, max_items_per_group: float) -> float:
        """Expected seconds to run at most `max_items_per_group` queued items of each group, at the recent rate."""
        costs = (min(len(queue), max_items_per_group) * self._cost(group) for group, queue in self._queues.items())
        return sum(costs) * (self._seconds_per_cost or 0.0)

    def _remove(self, request: PendingRequest[ItemT, ResultT]) -> None:
        """Removes a request's items from the queue."""
        queue = self._queues.get(request.group)
        if queue is None or not request.num_missing:
            return
        remaining = deque(entry for entry in queue if entry[0] is not request)
        if remaining:
            self._queues[request.group] = remaining
        else:
            del self._queues[request.group]

    async def _next_group(self) -> Hashable | None:
        """Waits until a group has a full batch, or its oldest item has waited long enough. None if all queues empty."""
        while self._queues:
            pause = math.inf
            now = time.monotonic()
            is_alone = now - self._last_concurrent_time >= CONCURRENCY_MEMORY_SECONDS
            wait = 0.0 if is_alone else self.limits.batch_wait_seconds
            for group, queue in self._queues.items():
                remaining = queue[0][0].arrival + wait - now
                if len(queue) >= self.limits.max_batch_size or remaining <= 0.0:
                    return group
                pause = min(pause, remaining)
            self._arrival.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._arrival.wait()
        return None

    async def _run_batches(self) -> None:
        """Runs batches until the queues are empty."""
        while (group := await self._next_group()) is not None:
            queue = self._queues[group]
            entries = [queue.popleft() for _ in range(min(len(queue), self.limits.max_batch_size))]
            if not queue:
                del self._queues[group]
            await self._run_batch(group, entries)
            if group in self._queues:
                self._queues[group] = self._queues.pop(group)  # to the end

    async def _run_batch(self, group: Hashable, entries: list[tuple[PendingRequest[ItemT, ResultT], int]]) -> None:
        start = time.monotonic()
        requests = list({id(request): request for request, _ in entries}.values())
        for request in requests:
            if request.first_batch_start is None:
                request.first_batch_start = start
        try:
            results, info = await self._run(group, [request.items[index] for request, index in entries])
        except Exception as error:  # any error concerns only the requests in this batch
            for request in requests:
                if not request.done.done():
                    request.done.set_exception(error)
                self._remove(request)  # before the next batch takes more of its items
            # The error's traceback references this frame, and through `request.done` this frame would reference the error:
            # a cycle that keeps the batch's device memory until a garbage collection.
            del entries, requests, request
            return
        rate = (time.monotonic() - start) / (len(entries) * self._cost(group))
        self._seconds_per_cost = rate if self._seconds_per_cost is None else 0.8 * self._seconds_per_cost + 0.2 * rate
        done: dict[int, list[int]] = {id(request): [] for request in requests}
        for (request, index), result in zip(entries, results, strict=True):
            request.results[index] = result
            request.num_missing -= 1
            done[id(request)].append(index)
        for request in requests:
            request.batch_infos.append(info)
            if request.on_results is not None and not request.done.done():
                indices = done[id(request)]
                try:
                    request.on_results(indices, request.finished(indices))
                except Exception as error:  # it concerns this request only
                    request.done.set_exception(error)
                    self._remove(request)
            if not request.num_missing and not request.done.done():
                request.done.set_result(None)
        self._on_batch([start - request.arrival for request, _ in entries])
