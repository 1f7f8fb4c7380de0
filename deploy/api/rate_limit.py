"""Rate limits: images per caller over sliding windows."""

import math

import limits
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter


class RateLimiter:
    """Counts images per caller, in this process.

    rate: for example "600/minute" or "10/second;10000/day"; None sets no limit.
    """

    def __init__(self, rate: str | None) -> None:
        self._rates = [] if rate is None else limits.parse_many(rate)
        self._storage = MemoryStorage()
        self._limiter = SlidingWindowCounterRateLimiter(self._storage)

    def seconds_until_allowed(self, caller: str, num_images: int) -> float | None:
        """Counts the images and returns None if they are within the rates. Otherwise returns the seconds to wait.

        Returns infinity if `num_images` alone exceeds a rate.
        """
        if any(num_images > rate.amount for rate in self._rates):
            return math.inf
        exceeded = [rate for rate in self._rates if not self._limiter.test(rate, caller, cost=num_images)]
        if exceeded:
            return max(0.1, *(self._seconds_until_room(rate, caller, num_images) for rate in exceeded))
        for rate in self._rates:
            self._limiter.hit(rate, caller, cost=num_images)
        return None

    def _seconds_until_room(self, rate: limits.RateLimitItem, caller: str, num_images: int) -> float:
        """Seconds until the rate allows the images. A window's count fades linearly to 0 over the next window."""
        window, max_counted = rate.get_expiry(), rate.amount - num_images
        previous_count, _, current_count, expires_in = self._storage.get_sliding_window(rate.key_for(caller), window)
        seconds_left = expires_in - window
        if current_count <= max_counted and previous_count:
            return seconds_left - (max_counted - current_count) * window / previous_count
        return seconds_left + window * (1.0 - max_counted / max(current_count, 1))
