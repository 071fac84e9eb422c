"""A limit on how often something is said in the log."""

from __future__ import annotations

import time
from collections.abc import Callable


class RateLimit:
    """A token bucket: `burst` messages at once, then `per_second`; counts what it keeps back."""

    def __init__(self, burst: int, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst = float(burst)
        self._rate = per_second
        self._clock = clock
        self._tokens = float(burst)
        self._last = clock()
        self._skipped = 0

    def admit(self) -> int | None:
        """None: say nothing now. Else: say it, together with this number of messages kept back since the last one."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._last) * self._rate)
        self._last = now
        if self._tokens < 1:
            self._skipped += 1
            return None
        self._tokens -= 1
        skipped, self._skipped = self._skipped, 0
        return skipped
