"""Does fsync reach the disk? Found out in the run itself, in two ways: by system calls, and by a kill -9."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress

from scripts.benchmarks.systems import Failed, System, is_mounted

#: System calls that make the disk write.
FLUSHES = "fsync,fdatasync,sync_file_range,msync,syncfs,sync"


def flushes(system: System) -> bool | None:
    """Do its processes flush anything while a program appends and fsyncs? None: it cannot be found out (no strace)."""
    pids = system.processes()
    if not pids or shutil.which("strace") is None:
        return None
    attached = [word for pid in pids for word in ("-p", str(pid))]
    output = system.base / "strace"
    tracer = subprocess.Popen(
        # Without signals: programs in Go send themselves many, which are no flushes.
        ["strace", "-f", "-e", f"trace={FLUSHES}", "-e", "signal=none", "-o", output, *attached],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    time.sleep(1.0)
    try:
        path = system.path / "synced"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        marks = []
        for number in range(5):
            os.write(fd, b"%099d\n" % number)
            before = output.stat().st_size
            os.fsync(fd)
            time.sleep(0.02)
            marks.append(output.stat().st_size > before)
        os.close(fd)
        os.unlink(path)
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(10)
    # Every time: a flush now and then, of its own accord, is not what fsync promises.
    return all(marks)


def survives_kill(system: System) -> bool:
    """Is what was fsync'd there after its processes were killed and it was mounted again?"""
    path = system.path / "killed"
    content = os.urandom(300_000)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(fd, content[:200_000])
    os.fsync(fd)
    os.write(fd, content[200_000:])
    os.fsync(fd)
    system.kill()
    with suppress(OSError):
        # Nobody answers any more, as it should be.
        os.close(fd)
    if is_mounted(system.mountpoint):
        subprocess.run(["umount", "-l", system.mountpoint], check=False, capture_output=True)
    time.sleep(0.3)
    try:
        system.mount()
        system._wait(mounted=True)
        with open(path, "rb") as file:
            survived = file.read() == content
        os.unlink(path)
    except (Failed, OSError):
        return False
    return survived
