"""Telling people what the append-only rules refused: program, file, offset and reason, in the log (rate-limited) and in `status`."""

from __future__ import annotations

import logging
from pathlib import Path

from fusefs.backing import Backing
from fusefs.ratelimit import RateLimit
from storage import Refusal

log = logging.getLogger(__name__)


def program_of(pid: int) -> str:
    """Name of the program with this process id, "pid N" where it is gone (or was the kernel: 0)."""
    if pid <= 0:
        return "kernel"
    try:
        comm = Path(f"/proc/{pid}/comm").read_bytes()
    except OSError:
        return f"pid {pid}"
    return comm.decode("utf-8", "backslashreplace").strip() or f"pid {pid}"


def readable(path: bytes) -> str:
    """A path for people: undecodable bytes and control characters escaped, so that a name cannot forge a log line."""
    text = path.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Refusals:
    """Where handlers report refusals."""

    def __init__(self, volume: Backing) -> None:
        self._volume = volume
        self._limit = RateLimit(burst=10, per_second=0.5)

    def report(self, pid: int, ino: int, name: bytes | None, offset: int, reason: str) -> None:
        """`ino`, or the entry `name` of directory `ino`, was to be changed by process `pid` in a way that is refused."""
        path = self._volume.namespace.path_of(ino)
        if path is None:
            shown = f"inode {ino} (no name any more)"
        elif name is None:
            shown = readable(path) or "/"
        else:
            shown = readable(path + b"/" + name if path else name)
        refusal = Refusal(when_ns=self._volume.seams.clock.time_ns(), program=program_of(pid), path=shown, offset=offset, reason=reason)
        self._volume.record_refusal(refusal)
        skipped = self._limit.admit()
        if skipped is not None:
            more = f" ({skipped} refusals before it not logged)" if skipped else ""
            log.warning("refused: %s, %s at offset %d: %s%s", refusal.program, shown, offset, reason, more)
