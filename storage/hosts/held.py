"""Held: files that were read a moment ago and are still open, so that one block of a shard costs one system call instead of fifteen.

A file is held for `LIFE` seconds from when it was opened, however often it is read, and is then closed by a timer: a disk can be unmounted
a moment after the last read, what happens to the path is seen a moment later, and what was replaced or removed is not read any more at
once (its link count is 0).
"""

from __future__ import annotations

import os
import threading
import time

#: Seconds.
LIFE = 1.0
#: Files held at a time.
FILES = 64


class HeldFile:
    """An open file. Closed when nobody has it any more: whoever reads keeps it open."""

    __slots__ = ("fd", "opened")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.opened = time.monotonic()

    def __del__(self) -> None:
        os.close(self.fd)


class Held:
    """Of one directory. From threads, and from the event loop: nothing here waits."""

    def __init__(self) -> None:
        # Guards what follows. Nothing is closed under it: that may take a while.
        self._lock = threading.Lock()
        self._files: dict[str, HeldFile] = {}
        #: Runs while anything is held.
        self._timer: threading.Timer | None = None

    def find(self, name: str) -> HeldFile | None:
        """Not for longer than a call takes."""
        file = self._files.get(name)
        return file if file is not None and time.monotonic() - file.opened < LIFE else None

    def hold(self, name: str, file: HeldFile) -> None:
        """From now on `find` finds it."""
        with self._lock:
            old = self._files.pop(name, None)
            self._files[name] = file
            oldest = self._files.pop(next(iter(self._files))) if len(self._files) > FILES else None
            self._run()
        del old, oldest

    def drop(self, name: str) -> None:
        """It is not what the name stands for any more."""
        with self._lock:
            file = self._files.pop(name, None)
        del file

    def close(self) -> None:
        """Let go of everything now."""
        with self._lock:
            files, self._files = self._files, {}
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        files.clear()

    def _run(self) -> None:
        """With the lock."""
        if self._timer is None:
            self._timer = threading.Timer(LIFE, self._sweep)
            self._timer.daemon = True
            self._timer.name = "fusefs-held"
            self._timer.start()

    def _sweep(self) -> None:
        """In the timer's thread: close what has been held for long enough."""
        now = time.monotonic()
        with self._lock:
            self._timer = None
            old = {name: file for name, file in self._files.items() if now - file.opened >= LIFE}
            for name in old:
                del self._files[name]
            if self._files:
                self._run()
        old.clear()
