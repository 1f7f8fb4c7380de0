import asyncio
import time

import pytest

from deploy.replica.batching import Batcher, BatchLimits, DeadlineError, OverloadedError


class Worker:
    """Runs batches of (seconds, rows) and keeps what it ran."""

    def __init__(self, seconds=0.0):
        self.seconds = seconds
        self.batches = []
        self.running = 0

    async def __call__(self, group, rows):
        assert self.running == 0, "one batch at a time"
        self.running += 1
        self.batches.append((group, list(rows)))
        await asyncio.sleep(self.seconds)
        self.running -= 1
        if "bad" in rows:
            raise RuntimeError("a bad row")
        return [f"{group}:{row}" for row in rows], len(rows)


def batcher_of(worker, size=4, wait=0.02, queued=100, **options):
    return Batcher(worker, BatchLimits(size, wait, queued), **options)


def test_rows_of_one_group_share_batches_and_come_back_in_their_order():
    worker = Worker()

    async def run():
        batcher = batcher_of(worker)
        return await asyncio.gather(*(batcher.submit("g", [f"{i}a", f"{i}b", f"{i}c"], 5.0) for i in range(3)))

    finished = asyncio.run(run())
    assert [one.results for one in finished] == [[f"g:{i}{letter}" for letter in "abc"] for i in range(3)]
    assert [len(rows) for _, rows in worker.batches] == [4, 4, 1]
    assert [one.parts for one in finished] == [[4], [4, 4], [4, 1]]  # what its batches said of themselves


def test_other_groups_are_other_batches_the_oldest_first():
    worker = Worker()

    async def run():
        batcher = batcher_of(worker)
        await asyncio.gather(*(batcher.submit(group, [index], 5.0) for index, group in enumerate("abab")))

    asyncio.run(run())
    assert worker.batches == [("a", [0, 2]), ("b", [1, 3])]


def test_a_lone_row_waits_for_others_and_a_full_batch_does_not():
    worker = Worker()

    async def seconds_of(rows):
        batcher = batcher_of(worker, wait=0.5)
        began = time.monotonic()
        await batcher.submit("g", rows, 5.0)
        return time.monotonic() - began

    assert asyncio.run(seconds_of([1])) >= 0.5
    assert asyncio.run(seconds_of([1, 2, 3, 4])) < 0.45


def test_a_full_batch_goes_before_an_older_row_that_still_waits():
    worker = Worker()

    async def run():
        batcher = batcher_of(worker, wait=0.1)
        first = asyncio.create_task(batcher.submit("a", [0], 5.0))
        await asyncio.sleep(0.01)
        await batcher.submit("b", [1, 2, 3, 4], 5.0)
        assert not first.done()
        await first

    asyncio.run(run())
    assert [group for group, _ in worker.batches] == ["b", "a"]


def test_whoever_is_cancelled_leaves_the_queue():
    worker = Worker(seconds=0.3)

    async def run():
        batcher = batcher_of(worker, size=2, wait=0.0)
        running = asyncio.create_task(batcher.submit("g", [1, 2], 5.0))
        await asyncio.sleep(0.02)
        gone = asyncio.create_task(batcher.submit("g", ["gone", "gone"], 5.0))
        stays = asyncio.create_task(batcher.submit("g", [3, 4], 5.0))
        await asyncio.sleep(0.01)
        assert batcher.num_queued == 4
        gone.cancel()
        await asyncio.sleep(0)
        assert batcher.num_queued == 2
        await asyncio.gather(running, stays)
        with pytest.raises(asyncio.CancelledError):
            await gone

    asyncio.run(run())
    assert worker.batches == [("g", [1, 2]), ("g", [3, 4])]


def test_what_is_not_done_by_its_deadline_fails_and_leaves_the_queue():
    worker = Worker(seconds=0.5)

    async def run():
        batcher = batcher_of(worker, size=1, wait=0.0)
        first = asyncio.create_task(batcher.submit("g", [1], 5.0))
        await asyncio.sleep(0.01)
        with pytest.raises(DeadlineError, match=r"not done within 0.05 s"):
            await batcher.submit("g", ["late"], 0.05)
        await first
        await asyncio.sleep(0.05)
        assert batcher.num_queued == 0

    asyncio.run(run())
    assert worker.batches == [("g", [1])]


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again():
    worker = Worker(seconds=0.05)

    async def run():
        batcher = batcher_of(worker, size=2, wait=0.0, queued=4)
        await batcher.submit("g", range(20), 5.0)  # the queue was empty: taken, whatever its size
        running = asyncio.create_task(batcher.submit("g", [1, 2], 5.0))
        await asyncio.sleep(0.01)
        waiting = asyncio.create_task(batcher.submit("g", range(3), 5.0))
        await asyncio.sleep(0)
        before = len(worker.batches)
        with pytest.raises(OverloadedError, match="3 images wait already, and at most 4 may") as refused:
            await batcher.submit("g", [1, 2], 5.0)
        assert len(worker.batches) == before  # it waited for none
        assert refused.value.retry_after_seconds >= 0.03
        await batcher.submit("g", [1], 5.0)  # one more fits
        await asyncio.gather(running, waiting)

    asyncio.run(run())


def test_what_would_miss_its_deadline_is_refused_at_once():
    worker = Worker(seconds=0.05)

    async def run():
        batcher = batcher_of(worker, size=1, wait=0.0)
        await batcher.submit("g", [0], 5.0)  # 50 ms a row, as of now
        waiting = asyncio.create_task(batcher.submit("g", range(10), 5.0))
        await asyncio.sleep(0.01)
        with pytest.raises(OverloadedError, match="longer than a request may"):
            await batcher.submit("g", [1], 0.2)
        await waiting

    asyncio.run(run())


def test_a_request_with_much_to_do_keeps_nobody_out():
    worker = Worker(seconds=0.01)

    async def run():
        batcher = batcher_of(worker, size=2, wait=0.0)
        much = asyncio.create_task(batcher.submit("much", range(20), 5.0))
        await asyncio.sleep(0.005)
        await batcher.submit("little", [0], 5.0)
        await batcher.submit("little", [1], 5.0)
        assert not much.done()
        await much

    asyncio.run(run())
    assert [group for group, _ in worker.batches[:4]] == ["much", "little", "much", "little"]


def test_a_request_with_much_to_do_has_nobody_refused_for_a_wait_that_it_would_not_have():
    worker = Worker(seconds=0.06)

    async def run():
        batcher = batcher_of(worker, size=2, wait=0.0)
        await batcher.submit("much", [0], 60.0)  # 60 ms a row, as of now
        much = asyncio.create_task(batcher.submit("much", range(50), 60.0))
        await asyncio.sleep(0.01)
        await batcher.submit("little", [0], 2.0)  # its turn is the next
        with pytest.raises(OverloadedError, match="longer than a request may"):
            await batcher.submit("much", [0], 2.0)
        much.cancel()

    asyncio.run(run())
    assert [group for group, _ in worker.batches[:3]] == ["much", "much", "little"]


def test_the_wait_is_estimated_by_what_rows_of_each_group_cost():
    worker = Worker(seconds=0.04)

    async def run():
        batcher = batcher_of(worker, size=1, wait=0.0, cost=lambda group: {"cheap": 1.0, "dear": 10.0}[group])
        began = time.monotonic()
        await batcher.submit("dear", [0], 5.0)  # 40 ms, or what the machine makes of it, for ten; so 4 ms for one
        dear = time.monotonic() - began
        running = asyncio.create_task(batcher.submit("dear", [0, 1, 2], 5.0))
        waiting = asyncio.create_task(batcher.submit("cheap", range(10), 5.0))
        await asyncio.sleep(0.005)
        assert batcher.expected_wait_seconds == pytest.approx(2 * dear + 10 * dear / 10, rel=0.3)
        running.cancel()
        waiting.cancel()

    asyncio.run(run())


def test_a_failed_batch_fails_those_in_it_and_nobody_else():
    worker = Worker()

    async def run():
        batcher = batcher_of(worker, size=2)
        answers = await asyncio.gather(
            batcher.submit("g", [1, 2], 5.0), batcher.submit("g", ["bad", 3, 4], 5.0), batcher.submit("g", [5], 5.0),
            return_exceptions=True,
        )  # fmt: skip
        assert batcher.num_queued == 0
        return answers

    first, second, third = asyncio.run(run())
    assert first.results == ["g:1", "g:2"]
    assert isinstance(second, RuntimeError)
    assert third.results == ["g:5"]


def test_limits_change_while_it_runs():
    worker = Worker()

    async def run():
        batcher = batcher_of(worker, size=2, wait=0.0)
        await batcher.submit("g", range(4), 5.0)
        batcher.limits = BatchLimits(4, 0.0, 100)
        await batcher.submit("g", range(4), 5.0)

    asyncio.run(run())
    assert [len(rows) for _, rows in worker.batches] == [2, 2, 4]


def test_each_batch_is_reported_with_the_waits_of_its_rows():
    reports = []

    async def run():
        batcher = batcher_of(Worker(seconds=0.03), size=2, wait=0.0, on_batch=reports.append)
        await batcher.submit("g", range(3), 5.0)

    asyncio.run(run())
    assert [report.rows for report in reports] == [2, 1]
    assert reports[1].queue_wait_seconds[0] >= 0.03
    assert reports[0].seconds >= 0.03


def test_a_failed_request_takes_its_other_rows_along():
    worker = Worker()

    async def run():
        batcher = batcher_of(worker, size=2, wait=0.0)
        with pytest.raises(RuntimeError, match="a bad row"):
            await batcher.submit("g", ["bad", 2, 3, 4, 5], 5.0)
        await batcher.submit("g", [6], 5.0)

    asyncio.run(run())
    assert worker.batches == [("g", ["bad", 2]), ("g", [6])]


def test_whoever_is_cancelled_while_its_batch_runs_takes_nobody_along():
    worker = Worker(seconds=0.05)

    async def run():
        batcher = batcher_of(worker, size=2, wait=0.0)
        gone, beside, after = (asyncio.create_task(batcher.submit("g", [row], 1.0)) for row in range(3))
        await asyncio.sleep(0.02)
        gone.cancel()
        return await asyncio.gather(beside, after)

    assert [finished.results for finished in asyncio.run(run())] == [["g:1"], ["g:2"]]


def test_the_wait_is_told_until_the_first_row_began():
    async def run():
        batcher = batcher_of(Worker(seconds=0.2), size=1, wait=0.0)
        return await batcher.submit("g", range(4), 60.0)

    assert asyncio.run(run()).queue_wait_seconds < 0.2


def test_the_oldest_row_of_several_groups_is_not_kept_waiting_for_a_younger_one():
    worker = Worker()

    async def run():
        batcher = batcher_of(worker, wait=0.5)
        began = time.monotonic()
        first = asyncio.create_task(batcher.submit("a", [0], 5.0))
        await asyncio.sleep(0.4)
        second = asyncio.create_task(batcher.submit("b", [1], 5.0))
        await first
        seconds = time.monotonic() - began
        await second
        return seconds

    assert 0.5 <= asyncio.run(run()) < 0.85


def test_times_to_come_again_follow_the_pace_of_late():
    async def run():
        batcher = batcher_of(Worker(), size=4, wait=0.0, queued=100)
        batcher._run = Worker(seconds=0.4)
        await batcher.submit("g", range(4), 5.0)  # 0.1 s a row
        running = asyncio.create_task(batcher.submit("g", range(4), 60.0))
        waiting = asyncio.create_task(batcher.submit("g", range(80), 60.0))
        await asyncio.sleep(0.01)
        refusals = []
        for rows, timeout in ((range(30), 60.0), ([1], 4.0)):
            with pytest.raises(OverloadedError) as refused:
                await batcher.submit("g", rows, timeout)
            refusals.append(refused.value.retry_after_seconds)
        for task in (running, waiting):
            task.cancel()
        return refusals

    full, late = asyncio.run(run())
    assert 3.5 < full < 6.0  # half of what waits is done by then
    assert 5.5 < late < 10.0  # what waits then is done in half of its time
