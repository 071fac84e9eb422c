"""What must not grow with what is stored: time to mount and unmount, the rate of listing, the time of an append, memory."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import trio

from scripts.benchmarks import processes
from scripts.benchmarks.systems import PASSPHRASE, REST, Failed, Fusefs, drop_caches
from storage.errors import FusefsError

#: Entries of the directories that are listed.
SMALL = 1000
#: Changes between two commits while a volume is made.
SLICE = 5000
#: Mounts of each volume.
TURNS = 5
#: What memory is measured as.
MEMORY = "memory, anonymous and shared, MiB"


class Grown(Fusefs):
    """A volume with `files` files of a line each, made through the library."""

    def __init__(self, base: Path, files: int) -> None:
        super().__init__(base, f"fusefs {files} files")
        self.files = files
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
            for directory, count in ((b"small", min(SMALL, self.files)), (b"large", max(0, self.files - SMALL))):
                parent = names.mkdir(1, directory, 0o755, 0, 0)
                for number in range(count):
                    ino = names.create(parent, b"file%d" % number, stat.S_IFREG | 0o644, 0, 0)
                    await names.append(ino, b"a line of text\n")
                    if number % SLICE == SLICE - 1:
                        await volume.commit()
                        self.making = max(self.making, processes.memory([os.getpid()]) - before)
            await volume.flush()
            self.making = max(self.making, processes.memory([os.getpid()]) - before)

    def turn(self) -> dict[str, float]:
        """Mounted with nothing in any cache, listed, and unmounted."""
        drop_caches()
        before = time.perf_counter()
        self.mount()
        results = {"mount, s": time.perf_counter() - before}
        time.sleep(REST)
        for name in ("small", "large"):
            before = time.perf_counter()
            count = sum(1 for _ in os.scandir(self.path / name))
            if count:
                results[f"list {count}, entries/s"] = count / (time.perf_counter() - before)
        results[MEMORY] = self.memory() / 2**20
        before = time.perf_counter()
        self.unmount()
        results["unmount, s"] = time.perf_counter() - before
        return results


def grown(base: Path, counts: Sequence[int]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Of volumes with so many files: seconds to mount and to unmount, entries a second listed, MiB of memory afterwards; and why of those
    that are not among them.

    Each volume in its turn, and so on; medians of `TURNS`, or of those there were before one failed.
    """
    left_out: dict[str, str] = {}
    found: dict[str, list[dict[str, float]]] = {}
    making: dict[str, float] = {}
    with ExitStack() as volumes:
        systems = [Grown(base, count) for count in dict.fromkeys(counts)]
        for system in systems:
            volumes.callback(system.stop)
        for turn in range(TURNS + 1):
            for system in systems:
                title = f"{system.files} files"
                if title in left_out:
                    continue
                try:
                    if turn == 0:
                        system.start()
                        system.unmount()
                        making[title] = system.making / 2**20
                    else:
                        found.setdefault(title, []).append(system.turn())
                except (Failed, FusefsError, OSError) as error:
                    # The others, and what was measured before, stay worth having.
                    left_out[title] = f"{f'turn {turn} of {TURNS}' if turn else 'making it'}: {error}"
                    system.stop()
    medians = {
        title: {"memory while it is made, MiB": making[title], **{what: median(turn[what] for turn in turns) for what in turns[0]}}
        for title, turns in found.items()
        if turns
    }
    return medians, left_out


def appended(base: Path, total: int) -> dict[str, dict[str, float]]:
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
        return {
            f"{total} appends": {
                "first tenth, appends/s": rates[0],
                "last tenth, appends/s": rates[-1],
                MEMORY: system.memory() / 2**20,
            }
        }
    finally:
        system.stop()
