"""Where a coprocess works: not on the core on which the event loop is at work.

Why: Linux wakes a process beside the one that wakes it, unless it knows of an idle core; and in a virtual machine it takes a core that has
halted for one that the hypervisor gave to others (`available_idle_cpu` asks `vcpu_is_preempted`). So both coprocesses ran on the event
loop's core, and it waited for them, while another core stood still (figures: docs/performance.md).

    event loop   at work on core 0      ->  whatever it asks for is done on all cores but 0
                 idle, or cannot be seen ->  on all cores: it is in nobody's way, and a check of all sectors needs every core
"""

from __future__ import annotations

import os
from time import monotonic
from typing import Protocol

#: Of the time since it was last looked at, the share from which on the event loop is at work. Writing takes it 0.5 to 0.7.
BUSY = 0.3
#: Seconds in which what was seen holds: about what a sector takes. A look costs 20 us.
LOOK = 0.004
#: The field of /proc/PID/stat that says on which core it was last, from the end of the name; proc(5) counts it as the 39th.
_PROCESSOR = 36


class Loop(Protocol):
    """Whoever is to be kept clear of."""

    def core(self) -> int | None:
        """See `EventLoop`."""
        ...


class EventLoop:
    """The main thread of the process that has started this one, as the kernel tells of it."""

    def __init__(self, pid: int) -> None:
        self._stat = _opened(f"/proc/{pid}/task/{pid}/stat")
        self._times = _opened(f"/proc/{pid}/task/{pid}/schedstat")
        self._looked, self._ran = 0.0, 0
        self._core: int | None = None

    def core(self) -> int | None:
        """Where it is at work, as of LOOK seconds ago at most. None: it is not, or the kernel does not say. Does not raise."""
        now = monotonic()
        passed = now - self._looked
        if passed < LOOK or self._stat is None or self._times is None:
            return self._core
        try:
            # Nanoseconds of CPU time.
            ran = int(os.pread(self._times, 64, 0).split()[0])
            busy = ran - self._ran >= BUSY * passed * 1e9
            # Two threads may look at once: then one of them takes a short time for a whole one, until the next look.
            self._looked, self._ran = now, ran
            self._core = int(os.pread(self._stat, 1024, 0).rpartition(b")")[2].split()[_PROCESSOR]) if busy else None
        except (OSError, ValueError, IndexError):
            # It has ended, or this kernel tells it otherwise.
            self._core = None
        return self._core


class Aside:
    """One thread's cores. For that thread only."""

    def __init__(self, loop: Loop, process: int) -> None:
        """`process`: its own. The main thread, which never goes aside, has all cores there are: what taskset(1), a cpuset or hotplug say
        shows there, whatever this thread has been told since."""
        self._loop, self._process = loop, process
        self._away_from: int | None = None

    def step(self) -> None:
        """Away from the event loop, if that is at work; else back. With one core nothing happens. Does not raise."""
        core = self._loop.core()
        if core == self._away_from:
            return
        self._away_from = core
        try:
            cores = os.sched_getaffinity(self._process)
            os.sched_setaffinity(0, cores - {core} or cores)
        except OSError:
            # It may not, or has other cores by now: the kernel has seen to that.
            return


def _opened(path: str) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
