"""Requests to batches: rows that ask for the same steps share a network call, whoever sent them.

Ray Serve's own batching puts whatever arrives together into one batch. Here rows wait by group (the time grid and the
decoder), a request may bring several, those whose caller has gone leave the queue, and the queue is bounded.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

RowT = TypeVar("RowT")
ResultT = TypeVar("ResultT")


class OverloadedError(Exception):
    """The queue is full, or too long for the caller's deadline."""

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class DeadlineError(Exception):
    """The caller's time was over before its rows were done."""


@dataclass
class BatchLimits:
    """What may be changed while the batcher runs."""

    max_batch_size: int
    """Most rows of a batch."""
    batch_wait_seconds: float
    """Longest time that the oldest row waits for others, while nothing runs."""
    max_queued_rows: int
    """Rows that may wait; a request that meets an empty queue is taken whatever its size."""


@dataclass(frozen=True)
class BatchReport:
    """One batch, for metrics."""

    rows: int
    seconds: float
    queue_wait_seconds: list[float]
    """Of each row."""


@dataclass
class Ticket(Generic[RowT, ResultT]):
    """A request's rows on their way."""

    group: Hashable
    rows: Sequence[RowT]
    arrived: float
    done: asyncio.Future
    results: list[ResultT | None]
    missing: int
    started: float | None = None
    parts: list[Any] = field(default_factory=list)
    """What the batches said of themselves, one entry per batch that had a row of this request."""


@dataclass(frozen=True)
class Finished(Generic[ResultT]):
    """A request's results."""

    results: list[ResultT]
    """In the order of its rows."""
    parts: list[Any]
    """What each of its batches said of itself."""
    queue_wait_seconds: float
    """Until its first row's batch began."""


# run(group, rows) -> (a result per row, what the batch says of itself)
Run = Callable[[Any, list[RowT]], Awaitable[tuple[Sequence[ResultT], Any]]]


class Batcher(Generic[RowT, ResultT]):
    """Gathers rows and runs one batch at a time. For one event loop; nothing in it blocks."""

    def __init__(
        self,
        run: Run,
        limits: BatchLimits,
        cost: Callable[[Any], float] = lambda group: 1.0,
        on_batch: Callable[[BatchReport], None] = lambda report: None,
    ) -> None:
        """cost: what a row of a group takes beside a row of another; the pace is learnt."""
        self.limits = limits
        self._run = run
        self._cost = cost
        self._on_batch = on_batch
        # In the order of their turns: a group that ran goes to the end, so that one with much to do keeps nobody out.
        self._queues: dict[Hashable, deque[tuple[Ticket[RowT, ResultT], int]]] = {}
        self._arrival = asyncio.Event()
        self._loop_task: asyncio.Task | None = None
        self._seconds_per_cost: float | None = None

    @property
    def num_queued(self) -> int:
        """Rows that wait."""
        return sum(len(queue) for queue in self._queues.values())

    @property
    def expected_wait_seconds(self) -> float:
        """How long the rows that wait now will take, by the pace of late."""
        return self._seconds_of_queues(math.inf)

    def _seconds_of_queues(self, most: float) -> float:
        """What at most so many rows of each group will take."""
        return sum(min(len(queue), most) * self._cost(group) for group, queue in self._queues.items()) * (
            self._seconds_per_cost or 0.0
        )

    def _seconds_until_turn(self, group: Hashable) -> float:
        """How long a row of a group that came now would wait: between its group's turns, each other group has one."""
        size = self.limits.max_batch_size
        rows = (len(self._queues.get(group, ())) // size + 1) * size
        return self._seconds_of_queues(rows)

    def _admit(self, group: Hashable, num_rows: int, timeout_seconds: float) -> None:
        queued = self.num_queued
        if queued and queued + num_rows > self.limits.max_queued_rows:
            raise OverloadedError(
                f"{queued} images wait already, and at most {self.limits.max_queued_rows} may; try again later",
                max(self.expected_wait_seconds / 2.0, 0.1),
            )
        wait = self._seconds_until_turn(group)
        if wait > timeout_seconds:
            raise OverloadedError(
                f"the images that go first take about {wait:.1f} s, longer than a request may; try again later",
                wait - timeout_seconds / 2.0,
            )

    async def submit(self, group: Hashable, rows: Sequence[RowT], timeout_seconds: float) -> Finished[ResultT]:
        """The results of a request's rows, which share batches with others of the same group.

        Raises OverloadedError at once where the queue is full, DeadlineError where the time is over first, and whatever
        the batch of one of its rows raised. Whoever cancels this takes the rows that still wait out of the queue.
        """
        self._admit(group, len(rows), timeout_seconds)
        if self._loop_task is None or self._loop_task.done():
            self._loop_task = asyncio.get_running_loop().create_task(self._work())
        ticket: Ticket[RowT, ResultT] = Ticket(
            group=group,
            rows=rows,
            arrived=time.monotonic(),
            done=asyncio.get_running_loop().create_future(),
            results=[None] * len(rows),
            missing=len(rows),
        )
        self._queues.setdefault(group, deque()).extend((ticket, index) for index in range(len(rows)))
        self._arrival.set()
        try:
            async with asyncio.timeout(timeout_seconds):
                await ticket.done
        except TimeoutError as error:
            self._forget(ticket)
            raise DeadlineError(f"not done within {timeout_seconds:g} s") from error
        except BaseException:
            self._forget(ticket)
            del ticket  # as in `_run_batch`
            raise
        assert ticket.started is not None
        return Finished(
            results=[result for result in ticket.results if result is not None],
            parts=ticket.parts,
            queue_wait_seconds=ticket.started - ticket.arrived,
        )

    def _forget(self, ticket: Ticket[RowT, ResultT]) -> None:
        """Takes a request's rows out of the queue."""
        queue = self._queues.get(ticket.group)
        if queue is None or not ticket.missing:
            return
        left = deque(entry for entry in queue if entry[0] is not ticket)
        if left:
            self._queues[ticket.group] = left
        else:
            del self._queues[ticket.group]

    def _next_group(self, now: float) -> tuple[Hashable | None, float]:
        """The group whose turn it is and that need not wait any more, or None and how long until there is one."""
        pause = float("inf")
        for group, queue in self._queues.items():
            left = queue[0][0].arrived + self.limits.batch_wait_seconds - now
            if len(queue) >= self.limits.max_batch_size or left <= 0.0:
                return group, 0.0
            pause = min(pause, left)
        return None, pause

    async def _work(self) -> None:
        """Runs batches for as long as rows wait."""
        while self._queues:
            group, pause = self._next_group(time.monotonic())
            if group is None:
                self._arrival.clear()
                try:
                    async with asyncio.timeout(pause):
                        await self._arrival.wait()
                except TimeoutError:
                    pass
                continue
            queue = self._queues[group]
            entries = [queue.popleft() for _ in range(min(len(queue), self.limits.max_batch_size))]
            if not queue:
                del self._queues[group]
            await self._run_batch(group, entries)
            left = self._queues.pop(group, None)
            if left:
                self._queues[group] = left

    async def _run_batch(self, group: Hashable, entries: list[tuple[Ticket[RowT, ResultT], int]]) -> None:
        began = time.monotonic()
        for ticket, _ in entries:
            ticket.started = began if ticket.started is None else ticket.started
        tickets = list({id(ticket): ticket for ticket, _ in entries}.values())
        try:
            results, about = await self._run(group, [ticket.rows[index] for ticket, index in entries])
        except Exception as error:  # whatever it is, it belongs to those whose rows were in the batch
            for ticket in tickets:
                if not ticket.done.done():
                    ticket.done.set_exception(error)
                self._forget(ticket)  # before the next batch takes more of its rows
            # The error's traceback holds this frame. Through it, the error would hold itself, and what the batch had on the
            # device, until some garbage collection.
            del entries, tickets, ticket
            return
        seconds = time.monotonic() - began
        pace = seconds / (len(entries) * self._cost(group))
        self._seconds_per_cost = pace if self._seconds_per_cost is None else 0.8 * self._seconds_per_cost + 0.2 * pace
        for (ticket, index), result in zip(entries, results, strict=True):
            ticket.results[index] = result
            ticket.missing -= 1
        for ticket in tickets:
            ticket.parts.append(about)
            if not ticket.missing and not ticket.done.done():
                ticket.done.set_result(None)
        self._on_batch(BatchReport(len(entries), seconds, [began - ticket.arrived for ticket, _ in entries]))
