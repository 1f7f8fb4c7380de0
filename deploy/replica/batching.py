"""Batches the items of concurrent requests. All items of a batch belong to one group.

Unlike Ray Serve's `@serve.batch`, this batcher queues items by group (here: model, time grid and decoder), accepts
several items per request, drops the items of cancelled requests, and limits the queue.

When does a batch start? A request that is alone starts at once. With company, the oldest item waits up to
`batch_wait_seconds` for others, unless the batch is full. Company means that two or more requests were unfinished at once in
the last COMPANY_SECONDS. Examples, with a wait of 5 ms:

- One user, who sends the next request after each answer: no request ever waits.
- 16 such users: a batch of 16 ends, all 16 send the next request, and the first to come waits up to 5 ms for the others.
- One of them goes on alone: the first 0.1 s of requests wait 5 ms each, then none.
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
COMPANY_SECONDS = 0.1

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
    """How long the oldest item waits for others while requests have company."""
    max_queued_items: int
    """Maximum queue length. An empty queue accepts a request of any size."""


OnResults = Callable[[list[int], list[Any], Any, float], None]
"""Arguments: indices of a request's items that one batch has finished, their results, the batch's info, and the seconds that
the request waited for its first batch."""


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


@dataclass(frozen=True)
class BatchedResults(Generic[ResultT]):
    """Results of one request."""

    results: list[ResultT]
    """One per item, in the request's order."""
    batch_infos: list[Any]
    """The info of each batch that held an item of this request."""
    queue_wait_seconds: float
    """From submission to the start of its first batch."""


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
        self._num_unfinished = 0  # requests
        self._last_company = -math.inf  # time.monotonic() when two requests were last unfinished at once

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
        self._num_unfinished += 1
        self._note_company()
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
            self._note_company()
            self._num_unfinished -= 1
        assert request.first_batch_start is not None
        return BatchedResults(
            results=[result for result in request.results if result is not None],
            batch_infos=request.batch_infos,
            queue_wait_seconds=request.first_batch_start - request.arrival,
        )

    def _note_company(self) -> None:
        """Remembers the time if two requests are unfinished now."""
        if self._num_unfinished > 1:
            self._last_company = time.monotonic()

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
            wait = self.limits.batch_wait_seconds if now - self._last_company < COMPANY_SECONDS else 0.0
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
                assert request.first_batch_start is not None
                indices = done[id(request)]
                results_of_request = [request.results[index] for index in indices]
                try:
                    request.on_results(indices, results_of_request, info, request.first_batch_start - request.arrival)
                except Exception as error:  # it concerns this request only
                    request.done.set_exception(error)
                    self._remove(request)
            if not request.num_missing and not request.done.done():
                request.done.set_result(None)
        self._on_batch([start - request.arrival for request, _ in entries])
