"""Held: files that were read a moment ago and are still open, so that one block of a shard costs one system call instead of fifteen.

A file is held for `LIFE` seconds from when it was opened, however often it is read, and is then closed by a timer: a disk can be unmounted
a moment after the last read, what happens to the path is seen a moment later, and what was replaced or removed is not read any more at
once (its link count is 0).
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable

from storage.errors import FusefsError

log = logging.getLogger("fusefs.hosts")

#: Seconds.
LIFE = 1.0
#: Files held at a time.
FILES = 64
#: Files that are not opened briefly after one that took too long, at most; see `BriefOpening`.
UNASKED = 64


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
        self._closed = False

    def find(self, name: str) -> HeldFile | None:
        """Not for longer than a call takes."""
        file = self._files.get(name)
        return file if file is not None and time.monotonic() - file.opened < LIFE else None

    def __contains__(self, name: str) -> bool:
        """Is it here, for however long it has been?"""
        return name in self._files

    def hold(self, name: str, file: HeldFile) -> None:
        """From now on `find` finds it, unless nobody could close it in time."""
        with self._lock:
            if self._closed or not self._run():
                return
            old = self._files.pop(name, None)
            self._files[name] = file
            oldest = self._files.pop(next(iter(self._files))) if len(self._files) > FILES else None
        del old, oldest

    def drop(self, name: str) -> None:
        """It is not what the name stands for any more."""
        with self._lock:
            file = self._files.pop(name, None)
        del file

    def close(self) -> None:
        """Let go of everything now, and hold nothing any more."""
        with self._lock:
            self._closed = True
            files, self._files = self._files, {}
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        files.clear()

    def _run(self) -> bool:
        """With the lock: will what is held be closed?"""
        if self._timer is None:
            timer = threading.Timer(LIFE, self._sweep)
            timer.daemon = True
            timer.name = "fusefs-held"
            try:
                timer.start()
            except RuntimeError as error:
                log.debug("nothing is kept open: %s", error)
                return False
            self._timer = timer
        return True

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


class BriefOpening:
    """Opens files to be held for the event loop, which waits for it, but never long: a disk that hangs holds up nobody.

    A file that was not read lately costs a walk of some fifteen system calls. In a thread whose end the event loop is woken for, that and
    what follows takes five times as long as the disk does; and in the event loop itself nothing may be opened, for that can hang. Where a
    file takes longer than whoever asks for it has patience the next is not asked for, then the next two, and so on.
    """

    def __init__(self, hold: Callable[[str], object]) -> None:
        """`hold`, in the thread, opens the named file and holds it; FusefsError."""
        self._hold = hold
        #: Guards what follows, which the event loop only looks at.
        self._lock = threading.Lock()
        self._closed = False
        #: Names, each with a lock that is released when it is done; None: end. None itself while there is no thread.
        self._names: queue.SimpleQueue[tuple[str, threading.Lock] | None] | None = None
        #: The event loop's: the lock of the last one, while nobody has seen its end.
        self._pending: threading.Lock | None = None
        #: The event loop's: those that are not to be asked for now, and were the last time.
        self._left = self._pause = 0

    def start(self) -> None:
        """Have the thread, which takes waiting: from another thread, before it is of use."""
        if self._names is not None:
            return
        with self._lock:
            if self._closed or self._names is not None:
                return
            names: queue.SimpleQueue[tuple[str, threading.Lock] | None] = queue.SimpleQueue()
            try:
                threading.Thread(target=self._serve, args=(names,), name="fusefs-opening", daemon=True).start()
            except RuntimeError as error:
                log.debug("files are opened as usual: %s", error)
                return
            self._names = names

    def open(self, name: str, patience: float) -> bool:
        """In the event loop: was it seen to end within so many seconds? Whether the file is held then is to be looked at."""
        names = self._names
        if names is None:
            return False
        if self._left:
            self._left -= 1
            return False
        if self._pending is not None:
            if not self._pending.acquire(blocking=False):
                return False
            self._pending = None
        done = threading.Lock()
        done.acquire()
        names.put((name, done))
        if not done.acquire(timeout=patience):
            self._pending = done
            self._left = self._pause = min(UNASKED, 2 * self._pause or 1)
            return False
        self._pause = 0
        return True

    def close(self) -> None:
        """The thread ends, as soon as nothing hangs, and there is none any more."""
        with self._lock:
            self._closed = True
            names, self._names = self._names, None
        if names is not None:
            names.put(None)

    def _serve(self, names: queue.SimpleQueue[tuple[str, threading.Lock] | None]) -> None:
        while (asked := names.get()) is not None:
            name, done = asked
            try:
                self._hold(name)
            except FusefsError as error:
                log.debug("not opened ahead of the read that says so: %s", error)
            except Exception:
                log.exception("bug in opening %s", name)
            finally:
                done.release()
