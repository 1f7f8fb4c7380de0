"""The load of the serving benchmark, a locust file of one user: POST requests for one image each, of distinct seeds.

    python -m locust -f tests/benchmarks/_serve_load.py --headless --host URL --users 8 --run-time 20 --answers FILE

Closed loop, or with --requests-per-user a rate that answers do not slow down. After the run FILE holds the answers since
the warm-up: {"seconds": float, "rows": [[seconds since the warm-up, status or error's name, milliseconds, bytes]]}.
"""

import itertools
import json
import random
import time
from pathlib import Path

import gevent
from locust import FastHttpUser, constant_throughput, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment

seeds = itertools.count(random.randrange(2**40))  # no answer of one run may serve another from a cache
rows: list[tuple[float, str, float, int]] = []
times: dict[str, float] = {}


@events.init_command_line_parser.add_listener
def add_arguments(parser: LocustArgumentParser) -> None:
    """This file's own options."""
    parser.add_argument("--path", default="/generate")
    parser.add_argument("--answers", required=True, help="file for the answers")
    parser.add_argument("--warmup-seconds", type=float, default=0.0)
    parser.add_argument("--requests-per-user", type=float, default=0.0, help="a second; 0: the next after each answer")
    parser.add_argument("--num-classes", type=int, default=10)


@events.test_start.add_listener
def begin(environment: Environment, **_: object) -> None:
    """Starts the clock."""
    times["warm"] = time.perf_counter() + environment.parsed_options.warmup_seconds


@events.test_stopping.add_listener
def end(environment: Environment, **_: object) -> None:
    """Stops the clock: what is still under way is not counted."""
    times["end"] = time.perf_counter()


@events.request.add_listener
def note(
    response_time: float, response_length: int, exception: Exception | None, response: object, **_: object
) -> None:
    """Keeps an answer; locust's own statistics round milliseconds."""
    now = time.perf_counter()
    if now < times["warm"] or "end" in times:
        return
    status = getattr(response, "status_code", 0)
    rows.append((now - times["warm"], str(status or type(exception).__name__), response_time, response_length))


@events.quitting.add_listener
def write(environment: Environment, **_: object) -> None:
    """Writes what was kept."""
    content = {"seconds": times["end"] - times["warm"], "rows": rows}
    Path(environment.parsed_options.answers).write_text(json.dumps(content))


class ImageUser(FastHttpUser):
    """Asks for one image after another."""

    network_timeout = connection_timeout = 600.0

    def on_start(self) -> None:
        """Users of a given rate begin at random times of its period, or they would all ask at once for ever."""
        rate = self.environment.parsed_options.requests_per_user
        if rate:
            gevent.sleep(random.uniform(0.0, 1.0 / rate))

    def wait_time(self) -> float:
        """Seconds until the next request."""
        rate = self.environment.parsed_options.requests_per_user
        return constant_throughput(rate)(self) if rate else 0.0

    @task
    def generate(self) -> None:
        """One image of the next seed."""
        seed = next(seeds)
        options = self.environment.parsed_options
        self.client.post(options.path, json={"class": seed % options.num_classes, "seed": seed})
