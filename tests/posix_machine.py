"""The same operations on a mount and on a local directory, everything compared. Overwriting is left out: there the two differ on purpose.

`run_machine(root, model, remount, steps)` is used by tests/test_mount_machine.py; the search for steps is Hypothesis'.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

NAMES = ["a", "b", "c", "dir", "dir/a", "dir/b", "dir/sub", "dir/sub/a", "other", "other/a"]
PATHS = st.sampled_from(NAMES)
#: Steps from one remount to the next, at least: one right after another shows nothing, and takes as long as a hundred other steps.
BETWEEN_REMOUNTS = 6
SIZES = st.one_of(st.integers(0, 50), st.sampled_from([4095, 4096, 4097, 70_000, 300_000]))


def pattern(seed: int, size: int) -> bytes:
    """Bytes that tell where they came from."""
    unit = f"<{seed}:{size}>".encode()
    return (unit * (size // len(unit) + 1))[:size]


def outcome(call: Callable[[], object]) -> object:
    """What a program sees: the result, or the errno."""
    try:
        return ("ok", call())
    except OSError as error:
        return ("errno", error.errno)


def tree(root: Path) -> dict[str, object]:
    """Everything below root that must be equal."""
    found: dict[str, object] = {}
    for directory, names, files in os.walk(root):
        for name in names + files:
            path = Path(directory, name)
            status = path.lstat()
            key = str(path.relative_to(root))
            if stat.S_ISREG(status.st_mode):
                found[key] = (stat.filemode(status.st_mode), status.st_nlink, status.st_size, path.read_bytes())
            elif stat.S_ISLNK(status.st_mode):
                found[key] = (stat.filemode(status.st_mode), os.readlink(path))
            else:
                found[key] = (stat.filemode(status.st_mode), sorted(os.listdir(path)))
    return found


def make_machine(fresh: Callable[[], tuple[Path, Path, Callable[[], None]]]) -> type[RuleBasedStateMachine]:
    """`fresh()` gives (empty directory on the mount, empty local directory, remount)."""

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.mount, self.model, self.remount_now = fresh()
            self.seed = 0
            self.handles: list[tuple[int, int, int, bool]] = []
            #: local inode -> holes never written, as [start, end).
            self.holes: dict[int, list[tuple[int, int]]] = {}
            self.steps_mounted = 0

        def both(self, call: Callable[[Path], object]) -> object:
            there, here = outcome(lambda: call(self.mount)), outcome(lambda: call(self.model))
            assert there == here
            return here

        def data(self, size: int) -> bytes:
            self.seed += 1
            return pattern(self.seed, size)

        @rule(path=PATHS, size=SIZES)
        def create(self, path: str, size: int) -> None:
            data = self.data(size)

            def call(root: Path) -> None:
                fd = os.open(root / path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                try:
                    os.write(fd, data)
                finally:
                    os.close(fd)

            self.both(call)

        @rule(path=PATHS, size=SIZES, count=st.integers(1, 5))
        def append(self, path: str, size: int, count: int) -> None:
            data = self.data(size)

            def call(root: Path) -> None:
                fd = os.open(root / path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                try:
                    for _ in range(count):
                        os.write(fd, data)
                finally:
                    os.close(fd)

            self.both(call)

        @rule(path=PATHS, size=SIZES)
        def replace_content(self, path: str, size: int) -> None:
            data = self.data(size)

            def call(root: Path) -> None:
                (root / path).write_bytes(data)

            if self.both(call) == ("ok", None):
                self.holes.pop((self.model / path).stat().st_ino, None)

        @rule(path=PATHS)
        def truncate_to_0(self, path: str) -> None:
            if self.both(lambda root: os.truncate(root / path, 0)) == ("ok", None):
                self.holes.pop((self.model / path).stat().st_ino, None)

        @rule(path=PATHS, more=st.integers(1, 200_000))
        def lengthen(self, path: str, more: int) -> None:
            local = self.model / path
            if not local.is_file():
                return
            size = local.stat().st_size
            self.both(lambda root: os.truncate(root / path, size + more))
            self.holes.setdefault(local.stat().st_ino, []).append((size, size + more))

        @rule(path=PATHS, gap=st.integers(0, 100_000), size=st.integers(1, 9000))
        def write_beyond_the_end(self, path: str, gap: int, size: int) -> None:
            local = self.model / path
            if not local.is_file():
                return
            at, data = local.stat().st_size, self.data(size)
            self.pwrite(path, data, at + gap)
            if gap:
                self.holes.setdefault(local.stat().st_ino, []).append((at, at + gap))

        @rule(path=PATHS, fraction=st.floats(0, 1), size=st.integers(1, 50_000), which=st.integers(0, 9))
        def fill_a_hole(self, path: str, fraction: float, size: int, which: int) -> None:
            local = self.model / path
            holes = self.holes.get(local.stat().st_ino, []) if local.is_file() else []
            if not holes:
                return
            start, end = holes.pop(which % len(holes))
            at = start + int(fraction * (end - start - 1))
            size = min(size, end - at)
            self.pwrite(path, self.data(size), at)
            holes.extend(part for part in ((start, at), (at + size, end)) if part[0] < part[1])

        @rule(path=PATHS)
        def write_the_same_again(self, path: str) -> None:
            local = self.model / path
            if local.is_file() and local.stat().st_ino not in self.holes:
                self.pwrite(path, local.read_bytes()[:5000], 0)

        def pwrite(self, path: str, data: bytes, at: int) -> None:
            def call(root: Path) -> int:
                fd = os.open(root / path, os.O_WRONLY)
                try:
                    return os.pwrite(fd, data, at)
                finally:
                    os.close(fd)

            self.both(call)

        @rule(path=PATHS, offset=st.integers(0, 80_000), size=st.integers(0, 80_000))
        def read(self, path: str, offset: int, size: int) -> None:
            def call(root: Path) -> bytes:
                fd = os.open(root / path, os.O_RDONLY)
                try:
                    return os.pread(fd, size, offset)
                finally:
                    os.close(fd)

            self.both(call)

        @rule(source=PATHS, destination=PATHS)
        def rename(self, source: str, destination: str) -> None:
            self.both(lambda root: os.rename(root / source, root / destination))

        @rule(source=PATHS, destination=PATHS)
        def link(self, source: str, destination: str) -> None:
            self.both(lambda root: os.link(root / source, root / destination, follow_symlinks=False))

        @rule(destination=PATHS, text=st.sampled_from(["a", "dir/a", "nowhere", "../x"]))
        def symlink(self, destination: str, text: str) -> None:
            if (self.model / destination).parent.is_symlink():
                return
            self.both(lambda root: os.symlink(text, root / destination))

        @rule(path=PATHS)
        def unlink(self, path: str) -> None:
            local = self.model / path
            ino = local.lstat().st_ino if local.is_file() and local.lstat().st_nlink == 1 else None
            if self.both(lambda root: os.unlink(root / path)) == ("ok", None) and ino is not None:
                self.holes.pop(ino, None)

        @rule(path=PATHS)
        def mkdir(self, path: str) -> None:
            self.both(lambda root: os.mkdir(root / path))

        @rule(path=PATHS)
        def rmdir(self, path: str) -> None:
            self.both(lambda root: os.rmdir(root / path))

        @rule(path=PATHS, mode=st.sampled_from([0o600, 0o644, 0o755, 0o400]))
        def chmod(self, path: str, mode: int) -> None:
            if not (self.model / path).is_dir():
                self.both(lambda root: os.chmod(root / path, mode))

        @precondition(lambda self: len(self.handles) < 4)
        @rule(path=PATHS, direct=st.booleans())
        def open_a_handle(self, path: str, direct: bool) -> None:
            flags = (os.O_RDWR if direct else os.O_WRONLY) | os.O_APPEND
            there = outcome(lambda: os.open(self.mount / path, flags))
            here = outcome(lambda: os.open(self.model / path, flags))
            assert there[0] == here[0] and (there[0] == "ok" or there == here)  # type: ignore[index]
            if here[0] == "ok":  # type: ignore[index]
                self.handles.append((there[1], here[1], self.seed, direct))  # type: ignore[index]

        @precondition(lambda self: self.handles)
        @rule(which=st.integers(0, 9), size=SIZES)
        def write_through_a_handle(self, which: int, size: int) -> None:
            there, here, _, direct = self.handles[which % len(self.handles)]
            data = self.data(size)
            assert outcome(lambda: os.write(there, data)) == outcome(lambda: os.write(here, data))
            assert os.fstat(there).st_size == os.fstat(here).st_size
            if direct:
                assert os.pread(there, 400_000, 0) == os.pread(here, 400_000, 0)

        @precondition(lambda self: self.handles)
        @rule(which=st.integers(0, 9))
        def close_a_handle(self, which: int) -> None:
            there, here, _, _ = self.handles.pop(which % len(self.handles))
            assert os.fstat(there).st_nlink == os.fstat(here).st_nlink
            os.fsync(there)
            os.close(there)
            os.close(here)

        @precondition(lambda self: self.steps_mounted > BETWEEN_REMOUNTS)
        @rule()
        def remount(self) -> None:
            self.steps_mounted = 0
            self.close_all()
            self.remount_now()
            assert tree(self.mount) == tree(self.model)

        @invariant()
        def same_names(self) -> None:
            self.steps_mounted += 1
            assert sorted(os.listdir(self.mount)) == sorted(os.listdir(self.model))

        def close_all(self) -> None:
            for there, here, _, _ in self.handles:
                os.close(there)
                os.close(here)
            self.handles.clear()

        def teardown(self) -> None:
            try:
                assert tree(self.mount) == tree(self.model)
            finally:
                self.close_all()

    return Machine


def run_machine(fresh: Callable[[], tuple[Path, Path, Callable[[], None]]], *, examples: int, steps: int) -> None:
    """Search for a difference."""
    run_state_machine_as_test(
        make_machine(fresh),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
