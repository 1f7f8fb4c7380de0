"""Serve: the page of many classes, and a long queue."""

import asyncio
import pickle

from results import Experiment, Timing, fractions, repeated, scaled

from deploy.replica.batching import Batcher, BatchLimits, DeadlineError
from deploy.replica.class_index import ClassIndex, class_entries
from tests.support.api import stub_endpoint


def experiments(num_images: int) -> dict[str, Experiment]:
    """The experiments of this part."""
    return {
        "classes": Experiment(
            measure=measure_classes, sizes=fractions(scaled(21_000, num_images, 40)), unit="classes",
            simulated="the generator; HTTP, by FastAPI's test client",
        ),
        "queue": Experiment(
            measure=measure_queue, sizes=fractions(scaled(10_000, num_images, 40)), unit="rows",
            simulated="the engine, which computes nothing",
        ),
    }  # fmt: skip


def measure_classes(num_classes: int) -> dict[str, Timing]:
    """Builds the index of classes, and asks for the page."""
    names = {label: f"class {label}, synonym {label}" for label in range(num_classes)}
    wnids = {str(label): f"n{label:08d}" for label in names}
    entries = class_entries(names, wnids, num_classes)
    timings = {
        "build the index of classes": repeated(
            lambda number: ClassIndex(class_entries(names, wnids, num_classes)), 3, warmup=1
        ),
        "classes from the replica to the API, pickled": repeated(
            lambda number: pickle.loads(pickle.dumps(entries)), 5, warmup=1
        ),
    }
    with stub_endpoint() as endpoint:
        endpoint.generator.classes = entries
        pages = {"GET /classes": {}, "GET /classes with search and limit": {"search": "7", "limit": 10}}
        for step, query in pages.items():
            timings[step] = repeated(lambda number, query=query: endpoint.client.get("/classes", params=query), 5)
        assert len(endpoint.client.get("/classes").json()) == num_classes
    return timings


def measure_queue(num_rows: int) -> dict[str, Timing]:
    """Queues rows as requests of one row: all served, all timed out, and all in one request."""
    steps = {
        "serve requests of one row": serve_all,
        "serve one request of all rows": serve_one_request,
        "time out requests of one row": time_out_all,
    }
    return {
        step: repeated(lambda number, function=function: asyncio.run(function(num_rows)), 3, warmup=1)
        for step, function in steps.items()
    }


async def nothing(group: str, items: list[int]) -> tuple[list[int], None]:
    """An engine that computes nothing."""
    return items, None


async def never(group: str, items: list[int]) -> tuple[list[int], None]:
    """An engine that hangs."""
    await asyncio.sleep(3600.0)
    return items, None


def limits(num_rows: int) -> BatchLimits:
    """The default limits, with a queue that is long enough."""
    return BatchLimits(max_batch_size=16, batch_wait_seconds=0.005, max_queued_items=num_rows)


async def serve_all(num_rows: int) -> None:
    """Serves concurrent requests of one row."""
    batcher = Batcher(nothing, limits(num_rows))
    results = await asyncio.gather(*(batcher.submit("group", [row], 3600.0) for row in range(num_rows)))
    assert [result.results for result in results] == [[row] for row in range(num_rows)]


async def serve_one_request(num_rows: int) -> None:
    """Serves one request of all rows."""
    result = await Batcher(nothing, limits(num_rows)).submit("group", range(num_rows), 3600.0)
    assert result.results == list(range(num_rows))


async def time_out_all(num_rows: int) -> None:
    """Lets all requests time out behind an engine that hangs."""
    batcher = Batcher(never, limits(num_rows))
    timeouts = [batcher.submit("group", [row], 0.5) for row in range(num_rows)]
    outcomes = await asyncio.gather(*timeouts, return_exceptions=True)
    assert all(isinstance(outcome, DeadlineError) for outcome in outcomes)
