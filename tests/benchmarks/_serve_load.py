"""Load of the serving benchmark, a locust file: POST requests for one image each, with distinct seeds.

    python -m locust -f tests/benchmarks/_serve_load.py --headless --host URL --users 8 --run-time 20 --answers FILE

By default a closed loop; --requests-per-user sets a rate that slow responses do not lower. FILE receives the responses
after the warm-up: {"seconds": float, "rows": [[seconds, status or name of the error, milliseconds, bytes]]}.
"""

import itertools
import json
import random
import time
from pathlib import Path

import gevent
from locust import FastHttpUser, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment

seeds = itertools.count(random.randrange(2**40))  # distinct in each run, so that no cache can answer
rows: list[tuple[float, str, float, int]] = []
times: dict[str, float] = {}


@events.init_command_line_parser.add_listener
def add_arguments(parser: LocustArgumentParser) -> None:
    """Adds this file's options."""
    parser.add_argument("--path", default="/generate")
    parser.add_argument("--answers", required=True, help="output file")
    parser.add_argument("--warmup-seconds", type=float, default=0.0)
    parser.add_argument("--requests-per-user", type=float, default=0.0, help="per second; 0: as soon as possible")
    parser.add_argument("--num-classes", type=int, default=10)


@events.test_start.add_listener
def start_clock(environment: Environment, **_: object) -> None:
    """Notes when the warm-up ends."""
    times["warm"] = time.perf_counter() + environment.parsed_options.warmup_seconds


@events.test_stopping.add_listener
def stop_clock(environment: Environment, **_: object) -> None:
    """Notes the end; later responses do not count."""
    times["end"] = time.perf_counter()


@events.request.add_listener
def record_response(
    response_time: float, response_length: int, exception: Exception | None, response: object, **_: object
) -> None:
    """Keeps a response. Locust's own statistics round milliseconds."""
    now = time.perf_counter()
    if now < times["warm"] or "end" in times:
        return
    status = getattr(response, "status_code", 0)
    rows.append((now - times["warm"], str(status or type(exception).__name__), response_time, response_length))


@events.quitting.add_listener
def write_responses(environment: Environment, **_: object) -> None:
    """Writes the output file."""
    content = {"seconds": times["end"] - times["warm"], "rows": rows}
    Path(environment.parsed_options.answers).write_text(json.dumps(content))


class ImageUser(FastHttpUser):
    """Requests one image after another."""

    network_timeout = connection_timeout = 600.0

    def on_start(self) -> None:
        """With a rate, users start at random times of its period; otherwise all would send at the same time forever."""
        rate = self.environment.parsed_options.requests_per_user
        if rate:
            gevent.sleep(random.uniform(0.0, 1.0 / rate))
        self._due = time.perf_counter()

    def wait_time(self) -> float:
        """Seconds until the next request. Not locust's constant_throughput, whose first period includes on_start's sleep."""
        rate = self.environment.parsed_options.requests_per_user
        if not rate:
            return 0.0
        self._due = max(self._due + 1.0 / rate, time.perf_counter())
        return self._due - time.perf_counter()

    @task
    def generate(self) -> None:
        """Requests one image."""
        seed = next(seeds)
        options = self.environment.parsed_options
        self.client.post(options.path, json={"class": seed % options.num_classes, "seed": seed})
