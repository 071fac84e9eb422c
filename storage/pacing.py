"""Pacing: bytes per second. `Pace`, of what runs in the background, so that it leaves room for those who wait for theirs; `Uplink`, of
everything that is sent to hosts."""

from __future__ import annotations

import trio

from storage.seams import Clock

#: Seconds of a rate that may go out at once after a pause: short, so that nobody else on the line notices.
SMOOTH = 0.2
#: Who comes back within so many seconds was sending meanwhile: up to one piece is then to its credit. Later, nothing is.
PAUSE = 10.0


class Pace:
    """A leaky bucket over bytes (as in Turner, "New directions in communications", 1986). One event loop's tasks.

    The wait for something's bytes is before it goes out, not before what follows: so the rate holds from the first byte after a pause on.
    What goes out in the background can wait, and the first ones of a few workers, of 4 MiB each, would be seconds of a slow line.
    """

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
        credit = max(SMOOTH, size / self.rate) if now - self._free_at <= PAUSE else 0.0
        self._free_at = max(self._free_at, now - credit) + size / self.rate
        if self._free_at > now:
            await self._clock.sleep(self._free_at - now)


#: The part of the upload rate that what is urgent may use without waiting for the rest.
URGENT_SHARE = 0.5
#: Objects of metadata up to so many bytes are urgent; superblocks always are.
URGENT_SIZE = 64 * 1024
#: A new rate is noticed within so many seconds.
_NOTICE = 1.0


class Uplink:
    """The way to the hosts: everything that is sent there goes through, and at most `rate` bytes per second. One event loop's tasks.

        bulk     sectors, merges, repair, large metadata    first come, first served, each when all before it has gone out at that rate
        urgent   superblocks, small metadata                waits only for the urgent before it, up to half of the rate; bulk pays

    An object goes out in one piece, as fast as the host takes it; the next one waits until the rate has made up for it. So over a time t
    at most t * rate bytes and one object are sent, and a superblock never stands behind a queue of sectors. Waiting here counts in no
    host's time limit and in no latency.
    """

    def __init__(self, clock: Clock, rate: float | None = None) -> None:
        """`rate`: bytes per second; None: as fast as it goes."""
        self._clock = clock
        self._rate = rate
        #: Monotonic times at which all of it, and what is urgent of it, has gone out at that rate.
        self._free_at = 0.0
        self._urgent_at = 0.0
        #: Fair: whoever asks first goes first, whatever their sizes.
        self._bulk = trio.Lock()
        #: Bytes that went through.
        self.sent = 0

    @property
    def rate(self) -> float | None:
        """May be set at any time; what waits is told within a second."""
        return self._rate

    @rate.setter
    def rate(self, rate: float | None) -> None:
        if rate == self._rate:
            return
        now = self._clock.monotonic()
        if self._rate is not None and rate is not None:
            # What is owed is bytes, not seconds.
            self._free_at = now + (self._free_at - now) * self._rate / rate if self._free_at > now else self._free_at
            self._urgent_at = now + (self._urgent_at - now) * self._rate / rate if self._urgent_at > now else self._urgent_at
        else:
            self._free_at = self._urgent_at = now
        self._rate = rate

    async def take(self, size: int, *, urgent: bool = False) -> None:
        """Returns when `size` bytes more may go out. As long a wait as the rate makes it; cancelled, it has taken nothing."""
        if self._rate is None:
            # The usual case, without a checkpoint. Nobody else waits either.
            self._go(size, urgent=urgent)
            return
        if urgent:
            while (wait := self._wait(self._urgent_at)) > 0:
                await self._clock.sleep(wait)
            self._go(size, urgent=True)
            return
        async with self._bulk:
            # Again after each sleep: what is urgent goes before, and the rate may be another by then.
            while (wait := self._wait(self._free_at)) > 0:
                await self._clock.sleep(wait)
            self._go(size, urgent=False)

    def _wait(self, until: float) -> float:
        return 0.0 if self._rate is None else min(until - self._clock.monotonic(), _NOTICE)

    def _go(self, size: int, *, urgent: bool) -> None:
        """No await since it was seen to be free."""
        self.sent += size
        if self._rate is None:
            return
        earliest = self._clock.monotonic() - SMOOTH
        self._free_at = max(self._free_at, earliest) + size / self._rate
        if urgent:
            self._urgent_at = max(self._urgent_at, earliest) + size / (self._rate * URGENT_SHARE)
