"""Whether the event loop may wait for the disk itself.

To hand a small commit to the journal's thread and come back costs about as much as its flush on a good disk (docs/performance.md). So where
the last PROOF flushes all took less than SLOW, a small commit is written and flushed on the event loop. The first flush that takes longer
ends that, until as many quick ones have been seen from the thread. What is held up meanwhile would have been held up by the same disk
anyway: LMDB's pages are read on the event loop, and nothing can be acknowledged without the journal.
"""

from __future__ import annotations

#: Seconds. Half of what one step of the event loop may take.
SLOW = 0.0005
#: Flushes in a row.
PROOF = 64
#: Bytes of tails, and operations, of a commit that the event loop seals and writes itself: up to 100 us of work beside the flush.
SMALL = 32 * 1024
FEW = 100


class Flushes:
    """How long the journal's flushes take."""

    def __init__(self) -> None:
        self._quick = 0

    def took(self, seconds: float) -> None:
        """A small commit was written and flushed in so many seconds."""
        self._quick = self._quick + 1 if seconds < SLOW else 0

    @property
    def quick(self) -> bool:
        return self._quick >= PROOF
