"""The lock on a volume's directory: one process at a time opens a volume (I5, on this machine).

flock(2) on VOLUME/lock, held as long as the file is open: it goes with the process, however that ends. The file's content, "PID what", is
only for the message that others read.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from storage.durable import from_os_error
from storage.errors import BadArgument, Busy
from storage.seams import Seams

LOCK_FILE = "lock"
POLL_SECONDS = 0.1


class VolumeLock:
    """Held from `acquire` to `release`."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK_FILE
        self._fd = -1

    async def acquire(self, seams: Seams, wait: float, what: str) -> None:
        """Busy, naming the holder, if it is still held after `wait` seconds. `what`: what this process is about to do."""
        try:
            # O_CLOEXEC is Python's default: no child ever holds the lock.
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        except (FileNotFoundError, NotADirectoryError):
            raise BadArgument(f"{self._path.parent} is not a fusefs volume: there is no such directory") from None
        except OSError as error:
            raise from_os_error(error, f"opening {self._path}") from error
        deadline = seams.clock.monotonic() + wait
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if seams.clock.monotonic() >= deadline:
                        holder = os.pread(fd, 200, 0).decode("utf-8", "replace").strip() or "another process"
                        raise Busy(f"{self._path.parent} is in use by process {holder}; unmount it or wait until it is done") from None
                    await seams.clock.sleep(POLL_SECONDS)
                else:
                    break
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()} ({what})\n".encode(), 0)
        except OSError as error:
            os.close(fd)
            raise from_os_error(error, f"locking {self._path}") from error
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def acquire_shared(self) -> bool:
        """Keep writers away, beside others who only read; False if there is a writer. Nothing is written; blocks for no longer than a
        system call. A volume whose lock nobody ever took has no writer.
        """
        try:
            fd = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            return True
        except OSError as error:
            raise from_os_error(error, f"opening {self._path}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        except OSError as error:
            os.close(fd)
            raise from_os_error(error, f"locking {self._path}") from error
        self._fd = fd
        return True

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
