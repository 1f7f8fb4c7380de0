"""Waits for a condition."""

import time
from collections.abc import Callable
from typing import Any


def wait_until(
    condition: Callable[[], Any],
    seconds: float = 30.0,
    state: Callable[[], object] = str,
    interval_seconds: float = 0.1,
) -> Any:
    """Polls until `condition()` is true and returns its value. Otherwise fails after `seconds`, with `state()`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {state()}"
        time.sleep(interval_seconds)
    return value
