"""What must not grow with what is stored: time to mount and unmount, the rate of listing, the time of an append, memory."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import trio

from scripts.benchmarks import processes
from scripts.benchmarks.systems import PASSPHRASE, Fusefs, drop_caches

#: Entries of the directories that are listed.
SMALL = 1000
#: Changes between two commits while a volume is made.
SLICE = 5000
#: What memory is measured as.
MEMORY = "memory, anonymous and shared, MiB"


class Grown(Fusefs):
    """A volume with `files` files of a line each, made through the library."""

    def __init__(self, base: Path, files: int) -> None:
        super().__init__(base, f"fusefs {files} files")
        self._files = files
        #: Bytes of memory, anonymous and shared, that making them took at most, beside what the benchmark itself had before.
        self.making = 0

    def make(self) -> None:
        super().make()
        trio.run(self._fill)

    async def _fill(self) -> None:
        import storage

        before = processes.memory([os.getpid()])
        async with storage.open_volume(self.base / "volume", passphrase=PASSPHRASE) as volume:
            names = volume.namespace
            for directory, count in ((b"small", min(SMALL, self._files)), (b"large", max(0, self._files - SMALL))):
                parent = names.mkdir(1, directory, 0o755, 0, 0)
                for number in range(count):
                    ino = names.create(parent, b"file%d" % number, stat.S_IFREG | 0o644, 0, 0)
                    await names.append(ino, b"a line of text\n")
                    if number % SLICE == SLICE - 1:
                        await volume.commit()
                        self.making = max(self.making, processes.memory([os.getpid()]) - before)
            await volume.flush()
            self.making = max(self.making, processes.memory([os.getpid()]) - before)


def grown(base: Path, files: int) -> dict[str, float]:
    """Of a volume with so many files: seconds to mount and to unmount, entries a second listed, MiB of memory afterwards."""
    system = Grown(base, files)
    try:
        system.start()
        system.unmount()
        drop_caches()
        before = time.perf_counter()
        system.mount()
        mounted = time.perf_counter() - before
        results = {"memory while it is made, MiB": system.making / 2**20, "mount, s": mounted}
        for name in ("small", "large"):
            path = system.path / name
            before = time.perf_counter()
            count = sum(1 for _ in os.scandir(path))
            if count:
                results[f"list {count}, entries/s"] = count / (time.perf_counter() - before)
        results[MEMORY] = system.memory() / 2**20
        before = time.perf_counter()
        system.unmount()
        results["unmount, s"] = time.perf_counter() - before
        return results
    finally:
        system.stop()


def appended(base: Path, total: int) -> dict[str, float]:
    """One log of `total` appends of 100 B: the rate over the first and over the last tenth."""
    system = Fusefs(base, "fusefs long log")
    line = b"%099d\n" % 0
    try:
        system.start()
        fd = os.open(system.path / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        rates = []
        for _ in range(10):
            before = time.perf_counter()
            for _ in range(total // 10):
                os.write(fd, line)
            os.fsync(fd)
            rates.append(total // 10 / (time.perf_counter() - before))
        os.close(fd)
        return {"first tenth, appends/s": rates[0], "last tenth, appends/s": rates[-1], MEMORY: system.memory() / 2**20}
    finally:
        system.stop()
