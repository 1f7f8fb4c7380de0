"""Progress of long work as plain log lines, with the rate and the time left."""

import logging
import time


def format_seconds(seconds: float) -> str:
    """93.4 -> "1m33s", 4000 -> "1h06m"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Progress:
    """Logs "encoded 512 of 9000 images, 310.2 images/s, 27s left" at most every `interval_seconds`.

    `start`: units completed before this process started (after a resume); the rate excludes them.
    """

    def __init__(
        self, logger: logging.Logger, verb: str, unit: str, total: int, *, start: int = 0, interval_seconds: float = 5.0
    ) -> None:
        self._logger = logger
        self._verb = verb
        self._unit = unit
        self._total = total
        self._start = start
        self._interval_seconds = interval_seconds
        self._began = self._last = time.monotonic()

    def update(self, done: int, note: str = "") -> None:
        """Logs a line if `interval_seconds` have passed since the last one, or the work is done."""
        now = time.monotonic()
        if done < self._total and now - self._last < self._interval_seconds:
            return
        self._last = now
        rate = (done - self._start) / max(now - self._began, 1e-9)  # units per second
        left = format_seconds((self._total - done) / rate) + " left" if rate > 0 and done < self._total else "done"
        self._logger.info(
            "%s %d of %d %s, %.1f %s/s, %s%s",
            self._verb, done, self._total, self._unit, rate, self._unit, left, f", {note}" if note else "",
        )  # fmt: skip
