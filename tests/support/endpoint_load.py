"""Sends concurrent requests to a running endpoint and checks the responses."""

import collections
import json
import random
import threading
import time
from pathlib import Path

import numpy as np

from meanflow_core.generator import load_pipeline
from tests.support.api import pixels
from tests.support.endpoint import RunningEndpoint, fetch
from tests.support.waiting import wait_until

CLASS, SEEDS = 8, range(40)


def expected_images(generator: Path) -> np.ndarray:
    """The images of CLASS for SEEDS, int64 (40, 64, 64, 3)."""
    return load_pipeline(generator).images_from_seeds([CLASS] * len(SEEDS), list(SEEDS)).numpy().astype(int)


def generate(url: str, seed: int) -> tuple[int, dict[str, str], bytes]:
    """Requests one image of CLASS; returns the status, headers and body."""
    return fetch(f"{url}/generate", json.dumps({"class": CLASS, "seed": seed}).encode())


class Load:
    """Requests images from several threads inside a `with` block, and compares them with the expected ones."""

    def __init__(self, url: str, expected: dict[str, np.ndarray], num_clients: int) -> None:
        """expected: {model: expected_images}."""
        self.url, self.expected = url, expected
        self.outcomes: collections.Counter = collections.Counter()
        """{(status, model) or exception name: count}."""
        self.wrong_images: list[tuple[int, str]] = []
        self.retried: collections.Counter = collections.Counter()
        """{status of a retry: count}."""
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(index,)) for index in range(num_clients)]

    @property
    def num_answers(self) -> int:
        return sum(self.outcomes.values())

    def wait_for_answers(self, count: int) -> None:
        """Waits for `count` more answers."""
        target = self.num_answers + count
        while self.num_answers < target:
            time.sleep(0.05)

    def _run(self, index: int) -> None:
        draw = random.Random(index)
        while not self._stop.is_set():
            seed = draw.choice(SEEDS)
            try:
                status, headers, content = generate(self.url, seed)
            except Exception as error:  # a broken or hanging connection
                self.outcomes[type(error).__name__] += 1
                continue
            self.outcomes[status, headers.get("x-model")] += 1
            if status == 200:
                if np.abs(pixels(content) - self.expected[headers["x-model"]][seed]).max() > 1:
                    self.wrong_images.append((seed, headers["x-model"]))
            else:
                assert "error" in json.loads(content), content
                time.sleep(float(headers.get("retry-after", 0)))
                self.retried[generate(self.url, seed)[0]] += 1

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=90)
        assert not any(thread.is_alive() for thread in self._threads), "a request did not finish within 90 s"


def served_models(endpoint: RunningEndpoint) -> set[str]:
    """Sends 20 requests and returns the models that answered; none if a replica died during a request."""
    try:
        return {generate(endpoint.url, 1)[1].get("x-model") for _ in range(20)}
    except OSError:
        return set()


def wait_for_models(endpoint: RunningEndpoint, *models: str, seconds: float = 120.0) -> None:
    """Waits until 20 requests in a row are answered by exactly these models."""
    wait_until(lambda: served_models(endpoint) == set(models), seconds, lambda: served_models(endpoint))


def wait_for_replicas(endpoint: RunningEndpoint, count: int, seconds: float = 180.0) -> None:
    """Waits until `count` replicas of the generator are running."""

    def running() -> list[dict]:
        return endpoint.running_replicas(endpoint.generator)

    wait_until(lambda: len(running()) == count, seconds, running)
