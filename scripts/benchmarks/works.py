"""What is done to each system, in groups. A group leaves nothing behind; what it measures goes out by name.

| group | measures |
|---|---|
| file | sequential write in 128 KiB and 1 MiB with fsync; sequential read cold and warm; random 4 KiB and 64 KiB reads cold, 4 KiB warm |
| appends | appends of 100 B, one fsync at the end, and of 200 B with an fsync each: one writer, eight writers |
| small | create, stat, list, read (cold) and unlink of 4 KiB files |
| tree | cp -r and rm -r of a source tree |
| latency | from an append to when a reader that looks all the time has seen it |
| staging | a volume on SeaweedFS: sequential write in 128 KiB with fsync; from then on until it is uploaded, beside obstore alone |

Rates are per second (MiB, operations, files); what is named in seconds is a time.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmarks.seaweed import FusefsSeaweed, ObstoreAlone
from scripts.benchmarks.systems import ON_SEAWEEDFS, ROOT, System, cold_machine

MIB = 1 << 20
Results = dict[str, float]


@dataclass(frozen=True)
class Sizes:
    """How much is done: whole, or a quick look."""

    file: int = 256 * MIB
    random_reads: int = 1500
    appends: int = 400_000
    synced: int = 1500
    files: int = 1500
    latencies: int = 200
    staged: int = 256 * MIB


QUICK = Sizes(32 * MIB, 200, 50_000, 200, 200, 40, 128 * MIB)


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


def file_group(system: System, sizes: Sizes) -> Results:
    """See the module."""
    results: Results = {}
    # Not compressible, and no two blocks alike.
    block = os.urandom(MIB)
    for name, size in (("write 1 MiB", MIB), ("write 128 KiB", 128 << 10)):
        path = system.path / f"file{size}"
        pieces = [memoryview(block)[at : at + size] for at in range(0, MIB, size)]
        seconds = timed(lambda path=path, pieces=pieces: _write(path, pieces, sizes.file // MIB))  # type: ignore[misc]
        results[name] = sizes.file / MIB / seconds
    os.unlink(system.path / f"file{MIB}")
    if not system.stores:
        os.unlink(system.path / f"file{128 << 10}")
        return results
    system.cold()
    path = system.path / f"file{128 << 10}"
    results["read cold"] = sizes.file / MIB / timed(lambda: _read(path))
    results["read warm"] = sizes.file / MIB / timed(lambda: _read(path))
    dice = random.Random(1)  # noqa: S311
    for name, size in (("random 4 KiB cold", 4096), ("random 64 KiB cold", 65536)):
        system.cold()
        places = [dice.randrange(sizes.file // size) * size for _ in range(sizes.random_reads if size == 4096 else sizes.random_reads // 4)]
        results[name] = len(places) / timed(lambda places=places, size=size: _read_at(path, places, size))  # type: ignore[misc]
    # What a system keeps itself: its own cache, or that of the disk below. The kernel's pages of the mount go.
    near = [dice.randrange(min(sizes.file, 64 * MIB) // 4096) * 4096 for _ in range(sizes.random_reads)]
    _read(path, min(sizes.file, 64 * MIB))
    _forget(path)
    results["random 4 KiB warm"] = len(near) / timed(lambda: _read_at(path, near, 4096))
    os.unlink(path)
    return results


def _write(path: Path, pieces: list[memoryview], rounds: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for _ in range(rounds):
            for piece in pieces:
                os.write(fd, piece)
        os.fsync(fd)
    finally:
        os.close(fd)


def _read(path: Path, limit: int = 1 << 62) -> None:
    fd = os.open(path, os.O_RDONLY)
    buffer = bytearray(MIB)
    try:
        got = 0
        while got < limit and (count := os.readv(fd, [buffer])):
            got += count
    finally:
        os.close(fd)


def _read_at(path: Path, places: list[int], size: int) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    try:
        for place in places:
            if len(os.pread(fd, size, place)) != size:
                raise RuntimeError(f"{path}: less than {size} bytes at {place}")
    finally:
        os.close(fd)


def _forget(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def append_group(system: System, sizes: Sizes) -> Results:
    """See the module."""
    results: Results = {}
    for writers in (1, 8):
        suffix = "" if writers == 1 else f", {writers} writers"
        results[f"append 100 B{suffix}"] = _append(system, writers, 100, sizes.appends // writers, "last")
        results[f"append 200 B + fsync{suffix}"] = _append(system, writers, 200, sizes.synced // (1 if writers == 1 else 4), "every")
    return results


def appender() -> Path:
    """The compiled writer."""
    source = ROOT / "scripts/benchmarks/appender.c"
    binary = Path(os.environ.get("TMPDIR", "/tmp")) / f"fusefs-appender-{os.getuid()}"  # noqa: S108
    if not binary.exists() or binary.stat().st_mtime < source.stat().st_mtime:
        subprocess.run(["gcc", "-O2", "-o", binary, source], check=True)
    return binary


def _append(system: System, writers: int, size: int, count: int, sync: str) -> float:
    """Appends a second, all writers together."""
    command = [str(appender())]
    paths = [system.path / f"log{at}" for at in range(writers)]
    before = time.perf_counter()
    processes = [subprocess.Popen([*command, str(path), str(size), str(count), sync], stdout=subprocess.PIPE) for path in paths]
    outputs = [process.communicate()[0] for process in processes]
    seconds = time.perf_counter() - before
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{system.name}: an appender failed")
    if writers == 1:
        # Its own time: starting it is not what is measured.
        seconds = float(outputs[0])
    for path in paths:
        if os.stat(path).st_size != size * count:
            raise RuntimeError(f"{path} has {os.stat(path).st_size} bytes instead of {size * count}")
        os.unlink(path)
    return writers * count / seconds


def small_group(system: System, sizes: Sizes) -> Results:
    """See the module."""
    directory = system.path / "small"
    directory.mkdir()
    content = os.urandom(4096)
    names = [os.fspath(directory / f"file{number}") for number in range(sizes.files)]
    results = {"create 4 KiB": len(names) / timed(lambda: _create(names, content))}
    if system.stores:
        system.cold()
    else:
        cold_machine()
    results["list"] = len(names) / timed(lambda: _expect(len(os.listdir(directory)), len(names)))
    results["stat"] = len(names) / timed(lambda: [os.stat(name) for name in names])
    if system.stores:
        system.cold()
    else:
        cold_machine()
    results["read 4 KiB cold"] = len(names) / timed(lambda: _read_all(names))
    results["unlink"] = len(names) / timed(lambda: _unlink(names))
    directory.rmdir()
    return results


def _create(names: list[str], content: bytes) -> None:
    for name in names:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(fd, content)
        os.close(fd)


def _read_all(names: list[str]) -> None:
    for name in names:
        fd = os.open(name, os.O_RDONLY)
        _expect(len(os.read(fd, 8192)), 4096)
        os.close(fd)


def _unlink(names: list[str]) -> None:
    for name in names:
        os.unlink(name)


def _expect(found: int, wanted: int) -> None:
    if found != wanted:
        raise RuntimeError(f"{found} where {wanted} should be")


def tree_group(system: System, sizes: Sizes) -> Results:  # noqa: ARG001  a tree has its own size
    """See the module."""
    if not system.stores:
        return {}
    source = ROOT / "storage"
    files = sum(len(names) for _, _, names in os.walk(source))
    target = system.path / "tree"
    copied = timed(lambda: subprocess.run(["cp", "-r", source, target], check=True))
    removed = timed(lambda: subprocess.run(["rm", "-r", target], check=True, stdin=subprocess.DEVNULL))
    return {"cp -r": files / copied, "rm -r": files / removed}


def latency_group(system: System, sizes: Sizes) -> Results:
    """See the module."""
    if not system.stores:
        return {}
    path = system.path / "watched"
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    reader = os.open(path, os.O_RDONLY)
    seen: list[float] = []
    written: list[float] = []

    def watch() -> None:
        while len(seen) < sizes.latencies:
            if os.read(reader, 4096):
                seen.append(time.perf_counter())

    thread = threading.Thread(target=watch)
    thread.start()
    for number in range(sizes.latencies):
        written.append(time.perf_counter())
        os.write(fd, b"%099d\n" % number)
        deadline = time.monotonic() + 10
        while len(seen) <= number:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{system.name}: an append was not seen within 10 s")
            time.sleep(0)
    thread.join()
    os.close(fd)
    os.close(reader)
    os.unlink(path)
    return {"append to seen, us": statistics.median((b - a) * 1e6 for a, b in zip(written, seen, strict=True))}


def staging_group(system: System, sizes: Sizes) -> Results:
    """See the module."""
    if isinstance(system, ObstoreAlone):
        return {"upload behind": system.upload(sizes.staged)}
    path = system.path / "staged"
    block = memoryview(os.urandom(MIB))
    pieces = [block[at : at + (128 << 10)] for at in range(0, MIB, 128 << 10)]
    try:
        results = {"write into staging": sizes.staged / MIB / timed(lambda: _write(path, pieces, sizes.staged // MIB))}
        if isinstance(system, FusefsSeaweed):
            results["upload behind"] = system.upload_behind()
    finally:
        path.unlink(missing_ok=True)
    if isinstance(system, FusefsSeaweed):
        system.settle()
    return results


GROUPS: dict[str, Callable[[System, Sizes], Results]] = {
    "file": file_group,
    "appends": append_group,
    "small": small_group,
    "tree": tree_group,
    "latency": latency_group,
    ON_SEAWEEDFS: staging_group,
}
#: Of these less is better.
TIMES = {"append to seen, us"}
