"""Pacing: bytes per second of what runs in the background, so that it leaves room for those who wait for theirs."""

from __future__ import annotations

from storage.seams import Clock

#: Seconds of the rate that may go out at once after a pause.
BURST = 1.0


class Pace:
    """A leaky bucket over bytes (as in Turner, "New directions in communications", 1986). One event loop's tasks."""

    def __init__(self, clock: Clock, rate: float | None) -> None:
        """`rate`: bytes per second; None: as fast as it goes."""
        self._clock = clock
        self.rate = rate
        #: Monotonic time at which everything taken so far has gone out at that rate.
        self._free_at = 0.0

    async def take(self, size: int) -> None:
        """Returns when `size` bytes more may go out. Whoever asks first goes first; a wait is as long as the rate makes it."""
        now = self._clock.monotonic()
        if self.rate is None:
            return
        # No await in between: each caller has a place of its own in time.
        begin = max(self._free_at, now - BURST)
        self._free_at = begin + size / self.rate
        if begin > now:
            await self._clock.sleep(begin - now)
