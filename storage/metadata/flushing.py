"""Whether the event loop may wait for the disk itself, and for how long.

To hand a small commit to the journal's thread, leave the handler and come back costs more than its flush on a good disk
(docs/performance.md). Three ways, by what the last flushes took:

    quick       PROOF in a row took less than SLOW (FIRST of them, as long as none was slow since the mount): the event loop writes and
                flushes by itself, without a thread
    mixed       the thread does it, and the event loop waits for it, but not longer than PATIENCE. Whatever takes longer is left to the
                thread, and requests are answered meanwhile
    slow        HOPELESS in a row were slow: nobody waits for the thread but who asked

The first slow one ends `quick`. What is held up meanwhile would have been held up by the same disk anyway: LMDB's pages are read on the
event loop, and nothing can be acknowledged without the journal.
"""

from __future__ import annotations

#: Seconds. Half of what one step of the event loop may take.
SLOW = 0.0005
#: Flushes in a row.
FIRST, PROOF, HOPELESS = 8, 64, 8
#: Seconds.
PATIENCE = 0.0003
#: Bytes of tails, and operations, of a commit that the event loop seals and writes itself: up to 100 us of work beside the flush.
SMALL = 32 * 1024
FEW = 100


class Flushes:
    """How long the journal's flushes take."""

    def __init__(self) -> None:
        #: Quick ones in a row, and how many of them it takes; slow ones in a row.
        self._quick, self._wanted, self._slow = 0, FIRST, 0

    def took(self, seconds: float) -> None:
        """A small commit was written and flushed in so many seconds."""
        if seconds < SLOW:
            self._quick += 1
            self._slow = 0
        else:
            self._quick = 0
            self._wanted = PROOF
            self._slow += 1

    @property
    def quick(self) -> bool:
        """The event loop may do the next one."""
        return self._quick >= self._wanted

    @property
    def patience(self) -> float:
        """Seconds the event loop may wait for the thread to do it."""
        return PATIENCE if self._slow < HOPELESS else 0.0
