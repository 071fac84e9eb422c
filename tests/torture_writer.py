"""A program that writes to a mount until it is killed, and keeps a journal of what it is about to do and of what was acknowledged.

The journal lies outside of the mount. Nothing but the standard library: it starts in a moment.

    python -m tests.torture_writer DIRECTORY JOURNAL STATE SEED FIRST

STATE is JSON, what is in DIRECTORY: path to [incarnation, size], or to null for a directory. An incarnation is one life of a file: its
content is `content(SEED, incarnation)`, as far as it was written. FIRST is the first number of a new one.

The journal, a JSON list per line, each written before what it says, or after it where it is in the past tense:

    create PATH INC         open(O_CREAT | O_EXCL)
    grow INC END            write up to END
    synced INC END          fsync(file) returned
    named DIRECTORY         fsync(directory) returned
    replace SOURCE TARGET   rename over an existing file
    move SOURCE TARGET      rename to a new name
    remove PATH
    rewrite PATH INC        open(O_TRUNC)
    mkdir PATH
    failed ERRNO STEP       an error; the end
"""

from __future__ import annotations

import functools
import json
import os
import random
import sys
import time
from pathlib import Path

#: No incarnation is longer.
LONGEST = 160 * 1024
MOST_FILES = 30
_SIZES = (0, 1, 100, 700, 4096, 5000, 20_000, 66_000)


@functools.lru_cache(maxsize=64)
def content(seed: str, incarnation: int) -> bytes:
    """All that this incarnation can ever have."""
    return random.Random(f"{seed}/{incarnation}").randbytes(LONGEST)


class Writer:
    def __init__(self, root: Path, journal: Path, state: Path, seed: str, first: int) -> None:
        self._root = root
        self._journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        known: dict[str, list[int] | None] = json.loads(state.read_text())
        self._files = {path: (one[0], one[1]) for path, one in known.items() if one is not None}
        self._directories = ["", *(path for path, one in known.items() if one is None)]
        self._seed = seed
        self._next = first
        self._random = random.Random(f"{seed}/writer/{first}")
        self._step = ""

    def run(self) -> int:
        parent = os.getppid()
        try:
            # Not longer than whoever started it.
            while os.getppid() == parent:
                self.step()
                if self._random.random() < 0.1:
                    time.sleep(self._random.random() * 0.02)
        except OSError as error:
            self._note("failed", error.errno, f"{self._step}: {error}")
        return 1

    # ---- what it does

    def step(self) -> None:
        chance = self._random.random
        if not self._files or (len(self._files) < MOST_FILES and chance() < 0.25):
            self.create()
            return
        what = chance()
        if what < 0.45:
            self.append()
        elif what < 0.70:
            self.replace()
        elif what < 0.80:
            self.remove()
        elif what < 0.88:
            self.move()
        elif what < 0.96:
            self.rewrite()
        elif len(self._directories) < 4:
            self.mkdir()

    def create(self) -> None:
        self._step = "create"
        path = self._new_path()
        fd, inc = self._new(path)
        try:
            self._grow(fd, inc, 0, self._size())
            if self._often(0.6):
                self._sync(fd, inc)
        finally:
            os.close(fd)
        self._files[path] = (inc, self._end)
        self._name_sometimes(path, 0.5)

    def append(self) -> None:
        self._step = "append"
        path = self._any_file()
        inc, size = self._files[path]
        cached = self._random.random() < 0.6
        fd = os.open(self._root / path, os.O_WRONLY | (os.O_APPEND if cached else 0))
        try:
            for _ in range(self._random.randint(1, 4)):
                length = min(self._size(), LONGEST - size)
                os.lseek(fd, size, os.SEEK_SET)
                self._grow(fd, inc, size, length)
                size = self._end
                self._files[path] = (inc, size)
                if self._often(0.5):
                    self._sync(fd, inc)
        finally:
            os.close(fd)

    def replace(self) -> None:
        self._step = "replace"
        target = self._any_file()
        source = f"{target}.tmp{self._next}"
        fd, inc = self._new(source)
        try:
            self._grow(fd, inc, 0, self._size())
            if self._often(0.7):
                self._sync(fd, inc)
        finally:
            os.close(fd)
        self._note("replace", source, target)
        os.rename(self._root / source, self._root / target)
        self._files[target] = (inc, self._end)
        self._name_sometimes(target, 0.6)

    def remove(self) -> None:
        self._step = "remove"
        path = self._any_file()
        self._note("remove", path)
        os.unlink(self._root / path)
        del self._files[path]
        self._name_sometimes(path, 0.7)

    def move(self) -> None:
        self._step = "move"
        source, target = self._any_file(), self._new_path()
        self._note("move", source, target)
        os.rename(self._root / source, self._root / target)
        self._files[target] = self._files.pop(source)
        self._name_sometimes(target, 1.0)
        self._name_sometimes(source, 1.0)

    def rewrite(self) -> None:
        self._step = "rewrite"
        path = self._any_file()
        inc = self._number()
        self._note("rewrite", path, inc)
        fd = os.open(self._root / path, os.O_WRONLY | os.O_TRUNC)
        try:
            self._files[path] = (inc, 0)
            self._grow(fd, inc, 0, self._size())
            self._files[path] = (inc, self._end)
            if self._often(0.6):
                self._sync(fd, inc)
        finally:
            os.close(fd)

    def mkdir(self) -> None:
        self._step = "mkdir"
        path = f"d{self._number()}"
        self._note("mkdir", path)
        os.mkdir(self._root / path)
        # Before anything is in it: what it holds could not be told apart otherwise.
        self._name("")
        self._directories.append(path)

    # ---- parts

    def _often(self, chance: float) -> bool:
        return self._random.random() < chance

    def _size(self) -> int:
        return self._random.randint(0, self._random.choice(_SIZES))

    def _number(self) -> int:
        self._next += 1
        return self._next

    def _any_file(self) -> str:
        return self._random.choice(list(self._files))

    def _new_path(self) -> str:
        return os.path.join(self._random.choice(self._directories), f"f{self._number()}")

    def _new(self, path: str) -> tuple[int, int]:
        inc = self._number()
        self._note("create", path, inc)
        return os.open(self._root / path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_APPEND if inc % 2 else 0), 0o644), inc

    def _grow(self, fd: int, inc: int, start: int, length: int) -> None:
        self._end = start + length
        self._note("grow", inc, self._end)
        view = memoryview(content(self._seed, inc))[start : self._end]
        while view:
            view = view[os.write(fd, view) :]

    def _sync(self, fd: int, inc: int) -> None:
        end = self._end
        os.fsync(fd)
        self._note("synced", inc, end)

    def _name_sometimes(self, path: str, chance: float) -> None:
        if self._often(chance):
            self._name(os.path.dirname(path))

    def _name(self, directory: str) -> None:
        fd = os.open(self._root / directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        self._note("named", directory)

    def _note(self, *what: object) -> None:
        # One write: there or not, whatever kills us.
        os.write(self._journal, json.dumps(what).encode() + b"\n")


def main() -> int:
    directory, journal, state, seed, first = sys.argv[1:]
    return Writer(Path(directory), Path(journal), Path(state), seed, int(first)).run()


if __name__ == "__main__":
    sys.exit(main())
