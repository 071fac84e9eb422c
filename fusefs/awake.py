"""Cores kept from halting while a program waits for one answer after the other.

On a virtual machine a core with nothing to do halts, and its hypervisor gives it back only after some 20 us, with cold caches. An append
with fsync halts cores several times. Linux has two idle states in such a guest (the driver `haltpoll`): halted, and looking for something
to do. PM QoS is how a process asks for the second: who has written 0 to /dev/cpu_dma_latency wants to be woken at once, for as long as the
file is open or until another number is written (Documentation/power/pm_qos_interface.rst).

That costs: cores that would have halted look for work instead. So it is asked for only
    where        the idle driver is `haltpoll`. On a real machine a core is awake within a microsecond or two
    when         fsyncs come within GAP seconds of each other, for the ROW-th time, as those of a program do that sends the next one right
                 after each answer. Listings and streams gain little by it
    how long     until nothing has come for QUIET seconds (`Receiver`), or, where there is other work, no fsync for WATCH seconds, which is
                 looked at every WATCH seconds (`watch`)
Mounts by others than root have no access to the file, and do without; so does `-o noawake`. While the process is stopped, or its event loop
waits for a disk that hangs, nobody takes it back: cores stay awake until it goes on, or ends.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter

import trio

log = logging.getLogger(__name__)

DEVICE = Path("/dev/cpu_dma_latency")
DRIVER = Path("/sys/devices/system/cpu/cpuidle/current_driver")
#: What is written there: a signed number of microseconds, of this machine's byte order. The second is Linux' own for "any"
#: (PM_QOS_CPU_LATENCY_LAT_DEFAULT_VALUE).
AT_ONCE, ANY = (number.to_bytes(4, sys.byteorder, signed=True) for number in (0, 2_000_000_000))
#: Questions that come within GAP seconds each, so many of them, are a row. One program on a disk that takes longer has no use for this.
GAP, ROW = 0.002, 8
#: Seconds.
QUIET, WATCH = 0.002, 0.05


class Awake:
    """One for each mount. `wanted`: as its options say."""

    def __init__(self, wanted: bool = False, device: Path = DEVICE, driver: Path = DRIVER) -> None:
        self._wanted, self._device, self._driver = wanted, device, driver
        self._fd = -1
        #: Cores are kept from halting now.
        self.held = False
        self._last, self._row = 0.0, 0
        self._begun = trio.Event()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Meanwhile it can be asked for. Where it cannot be had, nothing is done."""
        if self._wanted and self._halts():
            with suppress(OSError):
                self._fd = os.open(self._device, os.O_WRONLY | os.O_CLOEXEC)
        try:
            yield
        finally:
            self._close()

    def _halts(self) -> bool:
        with suppress(OSError):
            return self._driver.read_text().strip() == "haltpoll"
        return False

    def asked(self) -> None:
        """A program waits for an answer to what it may ask again right after it."""
        if self._fd < 0:
            return
        now = perf_counter()
        self._row = self._row + 1 if now - self._last < GAP else 1
        self._last = now
        if self._row >= ROW and not self.held:
            self._hold()

    def _hold(self) -> None:
        self.held = True
        self._begun.set()
        self._write(AT_ONCE)

    def release(self) -> None:
        """Cores may halt again."""
        if self.held:
            self.held = False
            self._row = 0
            self._write(ANY)

    def _write(self, number: bytes) -> None:
        try:
            os.write(self._fd, number)
        except OSError as error:
            log.info("cores are not kept from halting: %s: %s", self._device, error)
            self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self.held = -1, False

    async def watch(self) -> None:
        """For ever: see that they are not kept awake for longer than anybody asks."""
        while True:
            # As long as nobody asks.
            await self._begun.wait()
            self._begun = trio.Event()
            while self.held:
                await trio.sleep(WATCH)
                if perf_counter() - self._last > WATCH:
                    self.release()
