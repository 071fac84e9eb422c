"""Which processes serve a path, and how much memory they have, by /proc."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


def serving(path: Path) -> list[int]:
    """Those that have the path in their command line, and everything they started; not this process."""
    named = os.fsencode(path)
    found = [pid for pid, line in _all("cmdline") if pid != os.getpid() and has_argument(line, named)]
    if found:
        # The parent is the second field after the name, which may have anything in it: proc(5).
        parents = {pid: int(stat.rpartition(b")")[2].split()[1]) for pid, stat in _all("stat")}
        # It grows while it is walked: children of children too.
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid and child not in found]
    return found


def has_argument(line: bytes, wanted: bytes) -> bool:
    """Is it one of the arguments in a /proc/PID/cmdline, where a NUL ends each? Both may have spaces in them.

    Some programs (JuiceFS, to hide passwords) write a title over their arguments, in one piece: it stands between spaces there.
    """
    return any(b" %b " % wanted in b" %b " % argument for argument in line.split(b"\0"))


def memory(pids: Iterable[int]) -> int:
    """Anonymous and shared memory (of memfd_create(2), /dev/shm and the like), bytes; what several of them map is counted once.

    RssAnon and RssShmem of /proc/PID/status would count that for each of them. Of /proc/PID/smaps_rollup (Linux 5.3) each process has its
    share: a page that two map is half a page of each. Files are not in it, unless they are on a tmpfs.
    """
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
                sizes = {name: size.split() for name, _, size in (line.partition(b":") for line in file)}
        except OSError:
            # It ended meanwhile.
            continue
        total += sum(int(sizes[kind][0]) * 1024 for kind in (b"Pss_Anon", b"Pss_Shmem"))
    return total


class Peak:
    """The most memory that processes had while one was in there, as far as looks at them now and then tell. A look takes some milliseconds
    of one core; whose pages are counted waits for it where it maps new ones."""

    #: Seconds between two looks.
    EVERY = 0.25

    def __init__(self, find: Callable[[], Iterable[int]]) -> None:
        """`find`: the processes, anew where those known have ended."""
        self._find = find
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.bytes = 0

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        pids: list[int] = []
        while not self._ended.wait(self.EVERY):
            if not pids or not all(os.path.exists(f"/proc/{pid}") for pid in pids):
                pids = list(self._find())
            self.bytes = max(self.bytes, memory(pids))


def _all(name: str) -> Iterator[tuple[int, bytes]]:
    """Each process with that file of its directory."""
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            try:
                with open(f"/proc/{entry.name}/{name}", "rb") as file:
                    yield int(entry.name), file.read()
            except OSError:
                # It ended meanwhile.
                continue
