"""A process that makes a volume with many files and then a checkpoint of it; says what that took.

python -m tests.checkpoint_child fill DIRECTORY FILES    a new volume with so many files
python -m tests.checkpoint_child measure DIRECTORY       a checkpoint of it  ->  one line of JSON
"""

from __future__ import annotations

import json
import resource
import stat
import sys
import threading
import time
from pathlib import Path

import trio

from tests.rig import host_dirs, make, opened

PER_DIRECTORY = 1000


def anonymous() -> int:
    """Bytes of this process that are in no file: what the map of LMDB is left out of."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not say RssAnon")


class Peak:
    """The most anonymous memory while it runs, looked at every few milliseconds from a thread."""

    def __enter__(self) -> Peak:
        self.bytes = anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.bytes = max(self.bytes, anonymous())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


async def fill(base: Path, files: int) -> None:
    await make(base / "v", host_dirs(base, 1))
    async with opened(base / "v") as volume:
        namespace = volume.namespace
        for number in range(files):
            if number % PER_DIRECTORY == 0:
                directory = namespace.mkdir(1, b"directory %06d" % (number // PER_DIRECTORY), 0o755, 0, 0)
                await volume.store.commit()
            ino = namespace.create(directory, b"a file of an ordinary name %09d" % number, stat.S_IFREG | 0o644, 1000, 1000)
            if number % 10 == 0:
                await namespace.append(ino, b"%d" % number)
        await volume.flush()


async def measure(base: Path) -> dict[str, float]:
    async with opened(base / "v") as volume:
        publisher = volume.publisher
        assert publisher is not None
        await publisher.publish()
        while publisher.draft.writing is not None:
            await publisher.draft.writing.wait()
        before = anonymous()
        started, cpu = time.monotonic(), time.process_time()
        slowest = 0.0
        with Peak() as peak:
            publisher.draft.begin_checkpoint()
            while publisher.draft.writing is not None:
                # How long the event loop is ever held up: what a program on the mount would wait.
                last = time.monotonic()
                await trio.sleep(0.002)
                slowest = max(slowest, time.monotonic() - last)
        base_checkpoint = publisher.draft.base
        assert base_checkpoint is not None
        return {
            "files": volume.namespace.regular_files(),
            "records": base_checkpoint.records,
            "stored_mib": base_checkpoint.stored / 2**20,
            "before_mib": before / 2**20,
            "peak_mib": peak.bytes / 2**20,
            "seconds": time.monotonic() - started,
            "cpu_seconds": time.process_time() - cpu,
            "longest_wait_ms": slowest * 1000,
            "maxrss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }


if __name__ == "__main__":
    if sys.argv[1] == "fill":
        trio.run(fill, Path(sys.argv[2]), int(sys.argv[3]))
    else:
        print(json.dumps(trio.run(measure, Path(sys.argv[2]))))
