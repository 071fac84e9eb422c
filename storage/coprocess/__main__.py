"""What `process` starts: `python -I .../storage/coprocess/__main__.py sealing`, so that ps(1) says what it is.

Its standard input is the control channel. What comes there first is one packet with the memory file's descriptor, and, with a NUL between
each: its size, the number of the process that has started this one, and where modules are found: from there is all that follows.
"""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

#: Bytes of the packet at most.
_MOST = 1 << 20


def main() -> None:
    """Never returns."""
    if len(sys.argv) != 2:
        raise SystemExit("fusefs starts this by itself, to seal sectors and to put them on disks")
    with suppress(OSError):
        # As `ps -e` and top(1) show it.
        Path("/proc/self/comm").write_text(f"fusefs-{sys.argv[1]}")
    control = socket.socket(fileno=0)
    said, (memory,), _, _ = socket.recv_fds(control, _MOST, 1)
    size, parent, *sys.path[:] = os.fsdecode(said).split("\0")
    from storage.coprocess.serve import serve

    serve(control, memory, int(size), int(parent))


if __name__ == "__main__":
    main()
