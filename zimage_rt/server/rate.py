"""Rates per key: a sliding window of a minute, and the time after which a request is admitted."""

from __future__ import annotations

import math

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

WINDOW_SECONDS = 60
# Units of one megapixel-step: the library counts whole numbers, and small images are a hundredth of it.
UNITS = 1000


class Rates:
    """Counts per key over the last minute, in memory. Used by the event loop's thread alone."""

    def __init__(self) -> None:
        self._storage = MemoryStorage()
        self._limiter = SlidingWindowCounterRateLimiter(self._storage)

    def spend(self, kind: str, key: str, amount: int, cost: int = 1) -> int:
        """Count `cost` against `amount` per minute.

        Returns:
            0 if it was counted; otherwise nothing was, and the same cost will be admitted after so many seconds.
        """
        item = RateLimitItemPerMinute(amount)
        if self._limiter.hit(item, kind, key, cost=cost):
            return 0
        previous, _, current, ends = self._storage.get_sliding_window(item.key_for(kind, key), WINDOW_SECONDS)
        return seconds_until(amount, cost, previous, current, ends - WINDOW_SECONDS)


def seconds_until(amount: int, cost: int, previous: int, current: int, left: float) -> int:
    """Whole seconds after which a sliding window admits a cost, if nothing else comes.

    The window counts the current minute and the share of the previous one that is still inside:
    `previous * left / 60 + current`, whose whole part plus the cost is at most `amount`.

    Args:
        amount: per minute, at least `cost`.
        cost: of the request.
        previous, current: what the previous and the current minute have counted.
        left: seconds until the current minute ends.
    """
    free = amount - cost + 1  # the count must fall below it
    if current < free:
        wait = left - (free - current) * WINDOW_SECONDS / previous if previous else 0.0
    else:
        wait = left + WINDOW_SECONDS * (1 - free / current)
    return max(1, math.floor(wait) + 1)
