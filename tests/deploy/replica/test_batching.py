import asyncio
import statistics
import time

import pytest

from deploy.replica.batching import CONCURRENCY_MEMORY_SECONDS, Batcher, BatchLimits, DeadlineError, OverloadedError


class Runner:
    """Sleeps for a number of seconds per batch, and records the batches."""

    def __init__(self, seconds=0.0):
        self.seconds = seconds
        self.batches = []
        self.running = 0

    async def __call__(self, group, items):
        assert self.running == 0, "one batch at a time"
        self.running += 1
        self.batches.append((group, list(items)))
        await asyncio.sleep(self.seconds)
        self.running -= 1
        if "bad" in items:
            raise RuntimeError("a bad item")
        return [f"{group}:{item}" for item in items], len(items)


def batcher_of(runner, size=4, wait=0.02, queued=100, **options):
    return Batcher(runner, BatchLimits(size, wait, queued), **options)


async def have_concurrency(batcher):
    """Two requests at once, so that the next one waits for others."""
    await asyncio.gather(*(batcher.submit("other", [0, 1], 5.0) for _ in range(2)))


def test_items_of_one_group_share_batches_and_return_in_order():
    runner = Runner()

    async def run():
        batcher = batcher_of(runner)
        return await asyncio.gather(*(batcher.submit("g", [f"{i}a", f"{i}b", f"{i}c"], 5.0) for i in range(3)))

    results = asyncio.run(run())
    assert [one.results for one in results] == [[f"g:{i}{letter}" for letter in "abc"] for i in range(3)]
    assert [len(items) for _, items in runner.batches] == [4, 4, 1]
    assert [one.batch_infos for one in results] == [[4], [4, 4], [4, 1]]


def test_groups_have_batches_of_their_own_oldest_first():
    runner = Runner()

    async def run():
        batcher = batcher_of(runner)
        await asyncio.gather(*(batcher.submit(group, [index], 5.0) for index, group in enumerate("abab")))

    asyncio.run(run())
    assert runner.batches == [("a", [0, 2]), ("b", [1, 3])]


def test_a_lone_request_starts_at_once_and_one_of_several_waits_for_others():
    async def run():
        batcher = batcher_of(Runner(), wait=0.3)

        async def wait_of(items):
            return (await batcher.submit("g", items, 5.0)).queue_wait_seconds

        alone = await wait_of([1])
        together = await asyncio.gather(wait_of([1]), wait_of([2]))
        just_after = await wait_of([1])
        await have_concurrency(batcher)
        full = await wait_of([1, 2, 3, 4])
        await asyncio.sleep(CONCURRENCY_MEMORY_SECONDS)
        return alone, min(together), just_after, full, await wait_of([1])

    alone, together, just_after, full, much_later = asyncio.run(run())
    assert max(alone, full, much_later) < 0.1
    assert min(together, just_after) >= 0.3


@pytest.mark.parametrize(("num_users", "smallest_mean"), [(1, 1.0), (8, 7.0)])
def test_users_who_return_after_each_answer_share_batches_and_one_user_never_waits(num_users, smallest_mean):
    runner = Runner(seconds=0.03)

    async def user(batcher):
        waits = []
        for _ in range(12):
            waits.append((await batcher.submit("g", [0], 5.0)).queue_wait_seconds)
            await asyncio.sleep(0.002)  # the way to the user and back
        return waits

    async def run():
        batcher = batcher_of(runner, size=8, wait=0.02)
        return [wait for waits in await asyncio.gather(*(user(batcher) for _ in range(num_users))) for wait in waits]

    waits = asyncio.run(run())
    sizes = [len(items) for _, items in runner.batches]
    assert sum(sizes) / len(sizes) >= smallest_mean
    assert statistics.median(waits) < (0.005 if num_users == 1 else 0.06)  # a wait, and a batch that already runs


def test_a_full_batch_overtakes_an_older_item_that_still_waits():
    runner = Runner()

    async def run():
        batcher = batcher_of(runner, wait=0.1)
        await have_concurrency(batcher)
        runner.batches.clear()
        first = asyncio.create_task(batcher.submit("a", [0], 5.0))
        await asyncio.sleep(0.01)
        await batcher.submit("b", [1, 2, 3, 4], 5.0)
        assert not first.done()
        await first

    asyncio.run(run())
    assert [group for group, _ in runner.batches] == ["b", "a"]


def test_the_wait_of_the_oldest_group_is_not_extended_by_a_younger_one():
    runner = Runner()

    async def run():
        batcher = batcher_of(runner, wait=0.5)
        await have_concurrency(batcher)
        start = time.monotonic()
        first = asyncio.create_task(batcher.submit("a", [0], 5.0))
        await asyncio.sleep(0.4)
        second = asyncio.create_task(batcher.submit("b", [1], 5.0))
        await first
        seconds = time.monotonic() - start
        await second
        return seconds

    assert 0.5 <= asyncio.run(run()) < 0.85


def test_a_cancelled_request_leaves_the_queue():
    runner = Runner(seconds=0.2)

    async def run():
        batcher = batcher_of(runner, size=2, wait=0.0)
        running = asyncio.create_task(batcher.submit("g", [1, 2], 5.0))
        await asyncio.sleep(0.02)
        cancelled = asyncio.create_task(batcher.submit("g", ["gone", "gone"], 5.0))
        other = asyncio.create_task(batcher.submit("g", [3, 4], 5.0))
        await asyncio.sleep(0.01)
        assert batcher.num_queued == 4
        cancelled.cancel()
        await asyncio.sleep(0)
        assert batcher.num_queued == 2
        await asyncio.gather(running, other)
        with pytest.raises(asyncio.CancelledError):
            await cancelled

    asyncio.run(run())
    assert runner.batches == [("g", [1, 2]), ("g", [3, 4])]


def test_cancelling_a_running_request_does_not_affect_the_others_in_its_batch():
    async def run():
        batcher = batcher_of(Runner(seconds=0.05), size=2, wait=0.0)
        cancelled, same_batch, next_batch = (asyncio.create_task(batcher.submit("g", [i], 1.0)) for i in range(3))
        await asyncio.sleep(0.02)
        cancelled.cancel()
        return await asyncio.gather(same_batch, next_batch)

    assert [one.results for one in asyncio.run(run())] == [["g:1"], ["g:2"]]


def test_a_request_past_its_timeout_fails_and_leaves_the_queue():
    runner = Runner(seconds=0.3)

    async def run():
        batcher = batcher_of(runner, size=1, wait=0.0)
        first = asyncio.create_task(batcher.submit("g", [1], 5.0))
        await asyncio.sleep(0.01)
        with pytest.raises(DeadlineError, match=r"not done within 0.05 s"):
            await batcher.submit("g", ["late"], 0.05)
        await first
        await asyncio.sleep(0.05)
        assert batcher.num_queued == 0

    asyncio.run(run())
    assert runner.batches == [("g", [1])]


def test_a_full_queue_refuses_at_once():
    runner = Runner(seconds=0.05)

    async def run():
        batcher = batcher_of(runner, size=2, wait=0.0, queued=4)
        await batcher.submit("g", range(20), 5.0)  # an empty queue accepts any size
        running = asyncio.create_task(batcher.submit("g", [1, 2], 5.0))
        await asyncio.sleep(0.01)
        waiting = asyncio.create_task(batcher.submit("g", range(3), 5.0))
        await asyncio.sleep(0)
        num_before = len(runner.batches)
        with pytest.raises(OverloadedError, match="3 images are queued, and the limit is 4") as refused:
            await batcher.submit("g", [1, 2], 5.0)
        assert len(runner.batches) == num_before
        assert refused.value.retry_after_seconds >= 0.03
        await batcher.submit("g", [1], 5.0)  # one more fits
        await asyncio.gather(running, waiting)

    asyncio.run(run())


def test_a_long_queue_neither_blocks_nor_overloads_another_group():
    runner = Runner(seconds=0.04)

    async def run():
        batcher = batcher_of(runner, size=2, wait=0.0)
        await batcher.submit("long", [0], 60.0)  # measures the rate: 40 ms per item
        long = asyncio.create_task(batcher.submit("long", range(50), 60.0))
        await asyncio.sleep(0.01)
        await batcher.submit("short", [0], 1.5)  # has the next turn
        await batcher.submit("short", [1], 1.5)
        with pytest.raises(OverloadedError, match="exceeds the request's timeout"):
            await batcher.submit("long", [0], 0.5)
        long.cancel()

    asyncio.run(run())
    assert [group for group, _ in runner.batches[1:5]] == ["long", "short", "long", "short"]


def test_retry_after_follows_the_recent_rate_and_the_cost_of_each_group():
    async def run():
        batcher = batcher_of(Runner(), wait=0.0, queued=100, cost=lambda group: {"cheap": 1.0, "expensive": 2.0}[group])
        batcher._run = Runner(seconds=0.2)
        start = time.monotonic()
        await batcher.submit("expensive", range(4), 5.0)  # 0.2 s for a cost of 8
        seconds_per_cost = (time.monotonic() - start) / 8
        tasks = [
            asyncio.create_task(batcher.submit(group, range(num_items), 60.0))
            for group, num_items in (("expensive", 4), ("expensive", 40), ("cheap", 40))
        ]
        await asyncio.sleep(0.01)
        refusals = []
        for num_items, timeout in ((30, 60.0), (1, 1.0)):
            with pytest.raises(OverloadedError) as refused:
                await batcher.submit("expensive", range(num_items), timeout)
            refusals.append(refused.value.retry_after_seconds)
        for task in tasks:
            task.cancel()
        return [refusal / seconds_per_cost for refusal in refusals], 1.0 / seconds_per_cost

    (full, late), timeout = asyncio.run(run())
    assert full == pytest.approx((40 * 2 + 40 * 1) / 2, rel=0.3)  # half of the queue is done by then
    assert late == pytest.approx(120 - timeout / 2, rel=0.3)  # the rest takes half of the timeout by then


def test_a_failed_batch_fails_only_the_requests_in_it():
    runner = Runner()

    async def run():
        batcher = batcher_of(runner, size=2)
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
    assert runner.batches == [("g", [1, 2]), ("g", ["bad", 3]), ("g", [5])]  # the failed request's last item is dropped


def test_limits_change_while_the_batcher_runs():
    runner = Runner()

    async def run():
        batcher = batcher_of(runner, size=2, wait=0.0)
        await batcher.submit("g", range(4), 5.0)
        batcher.limits = BatchLimits(4, 0.0, 100)
        await batcher.submit("g", range(4), 5.0)

    asyncio.run(run())
    assert [len(items) for _, items in runner.batches] == [2, 2, 4]


def test_queue_waits_are_reported_per_item_and_per_request():
    waits = []

    async def run():
        batcher = batcher_of(Runner(seconds=0.03), size=2, wait=0.0, on_batch=waits.append)
        return await batcher.submit("g", range(3), 5.0)

    finished = asyncio.run(run())
    assert [len(batch) for batch in waits] == [2, 1]
    assert waits[1][0] >= 0.03
    assert finished.queue_wait_seconds == waits[0][0]  # until its first batch started
