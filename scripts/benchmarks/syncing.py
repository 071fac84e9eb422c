"""Does fsync reach the disk? Found out in the run itself, in two ways: by system calls, and by a kill -9 in the middle of work."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

from scripts.benchmarks.systems import Failed, System, is_mounted

#: System calls that make the disk write, and those that do where the file was opened so, or they are told to.
FLUSHES = ("fsync", "fdatasync", "sync_file_range", "msync", "syncfs", "sync")
WRITES = ("write", "writev", "pwrite64", "pwritev", "pwritev2")
#: What strace(1) writes with -f -o: the thread, the call, and its first argument where that is a descriptor.
_CALL = re.compile(r"^(\d+) +(\w+)\((\d+)?")
#: Writers that are at work when the processes are killed, for how many seconds each of them has been, and how long is waited for that.
WRITERS, AT_WORK, PATIENCE = 4, 0.5, 30.0


def flushes(system: System, length: int = 100) -> bool | None:
    """Do its processes flush anything while a program appends so many bytes and fsyncs? None: it cannot be found out (no strace).

    What goes by io_uring or io_submit(2) is not seen, nor what is written to a file opened so and closed at once."""
    pids = system.processes()
    if not pids or shutil.which("strace") is None:
        return None
    attached = [word for pid in pids for word in ("-p", str(pid))]
    output = system.base / "strace"
    tracer = subprocess.Popen(
        # Without signals: programs in Go send themselves many, which are no flushes.
        ["strace", "-f", "-s", "0", "-e", f"trace={','.join(FLUSHES + WRITES)}", "-e", "signal=none", "-o", output, *attached],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    time.sleep(1.0)
    try:
        path = system.path / "synced"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        marks = []
        for number in range(5):
            os.write(fd, b"%0*d\n" % (length - 1, number))
            before = output.stat().st_size
            os.fsync(fd)
            time.sleep(0.02)
            with open(output, encoding="ascii", errors="replace") as calls:
                calls.seek(before)
                marks.append(any(map(is_flush, calls)))
        os.close(fd)
        os.unlink(path)
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(10)
    # Every time: a flush now and then, of its own accord, is not what fsync promises.
    return all(marks)


def is_flush(line: str) -> bool:
    """Does this line of strace's tell of a call after which the disk has what it wrote?"""
    found = _CALL.match(line)
    if found is None:
        return False
    thread, call, fd = found.groups()
    if call in FLUSHES:
        return True
    return call in WRITES and ("RWF_DSYNC" in line or "RWF_SYNC" in line or (fd is not None and _is_synchronous(thread, fd)))


def _is_synchronous(thread: str, fd: str) -> bool:
    """Was the file opened so that each write of it is a flush?"""
    try:
        said = Path(f"/proc/{thread}/fdinfo/{fd}").read_text(encoding="ascii")
    except OSError:
        return False
    flags = re.search(r"^flags:\s+([0-7]+)", said, re.MULTILINE)
    return flags is not None and bool(int(flags[1], 8) & os.O_DSYNC)


class Writer(threading.Thread):
    """Appends lines that say their number, each with fsync, until that fails or it is told to stop."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.path = path
        #: Lines whose fsync has returned.
        self.acknowledged = 0
        self.error: OSError | None = None
        self.stopped = threading.Event()

    def run(self) -> None:
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                while not self.stopped.is_set():
                    os.write(fd, self.line(self.acknowledged))
                    os.fsync(fd)
                    self.acknowledged += 1
            finally:
                os.close(fd)
        except OSError as error:
            # Whoever served it is killed, as it should be.
            self.error = error

    def line(self, number: int) -> bytes:
        """Of different lengths, so that not each stands in a place where another could stand."""
        return b"%s %d %s\n" % (os.fsencode(self.path.name), number, b"x" * (number % 300))

    def survived(self) -> bool:
        """Is all that was acknowledged there, and then nothing but what was written next?"""
        wanted = b"".join(map(self.line, range(self.acknowledged)))
        found = self.path.read_bytes()
        return found.startswith(wanted) and self.line(self.acknowledged).startswith(found[len(wanted) :])


def survives_kill(system: System) -> bool:
    """Is what was fsync'd there after its processes were killed and it was mounted again? A file that nobody writes to any more, one that
    is long and was made with a few large writes, and logs that are being written to with fsync for each line. Failed: not found out."""
    path, large = system.path / "killed", system.path / "killed-large"
    content, much = os.urandom(300_000), os.urandom(1 << 20)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(fd, content[:200_000])
    os.fsync(fd)
    os.write(fd, content[200_000:])
    os.fsync(fd)
    other = os.open(large, os.O_WRONLY | os.O_CREAT, 0o644)
    for _ in range(9):
        os.write(other, much)
    os.fsync(other)
    writers = [Writer(system.path / f"killed-log{number}") for number in range(WRITERS)]
    try:
        for writer in writers:
            writer.start()
        _at_work(writers)
        system.kill()
    finally:
        for writer in writers:
            writer.stopped.set()
        for opened in (fd, other):
            with suppress(OSError):
                # Nobody answers any more, as it should be.
                os.close(opened)
    if is_mounted(system.mountpoint):
        subprocess.run(["umount", "-l", system.mountpoint], check=False, capture_output=True)
    for writer in writers:
        writer.join(10)
        if writer.is_alive():
            raise Failed(f"a write to {writer.path} has not ended though it was killed")
    time.sleep(0.3)
    made = [path, large, *(writer.path for writer in writers)]
    try:
        system.mount()
        system._wait(mounted=True)
        survived = path.read_bytes() == content and large.read_bytes() == 9 * much and all(writer.survived() for writer in writers)
        for one in made:
            one.unlink(missing_ok=True)
    except (Failed, OSError):
        # It cannot be mounted or read any more.
        return False
    return survived


def _at_work(writers: list[Writer]) -> None:
    """Each has been for a while. Failed: one could not."""
    deadline = time.monotonic() + PATIENCE
    while not all(writer.acknowledged for writer in writers):
        if time.monotonic() > deadline:
            raise Failed(f"no append was acknowledged within {PATIENCE:.0f} s")
        time.sleep(0.01)
    time.sleep(AT_WORK)
    for writer in writers:
        if not writer.is_alive():
            raise Failed(f"{writer.path} could not be written to: {writer.error}")
