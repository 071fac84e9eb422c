"""A `powerfs` for tests: started over a directory, cut, started again; unmounted and ended whatever happens."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 30.0


class Power:
    """The process, and what it said. `mountpoint` keeps its path over cuts, as a disk does over reboots."""

    def __init__(self, base: Path) -> None:
        self.backing = base / "disk"
        self.mountpoint = base / "power"
        self._log = base / "powerfs.log"
        self.backing.mkdir(exist_ok=True)
        self.mountpoint.mkdir(exist_ok=True)
        self._process: subprocess.Popen[str] | None = None
        self._said: queue.Queue[str] = queue.Queue()

    def start(self) -> None:
        """As after power came back: nothing but what survived, nothing cached."""
        if self._process is not None:
            raise RuntimeError("the power is on")
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.powerfs", self.backing, self.mountpoint],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._said = queue.Queue()
        threading.Thread(target=self._listen, args=(self._process, self._said), daemon=True).start()
        self._expect("ready")

    def cut(self, seed: int | None) -> int:
        """Now: nothing but the durable stays (None), or a random part of the rest too. Returns how many pages and names were volatile."""
        self._tell(f"cut {_how(seed)}")
        return self.wait_cut(SECONDS) or 0

    def arm(self, count: int, seed: int | None) -> None:
        """A cut right before the `count`-th change or sync from now."""
        self._tell(f"arm {count} {_how(seed)}")

    def wait_cut(self, seconds: float) -> int | None:
        """What was volatile at the cut, or None if none came in time."""
        try:
            return int(self._expect("cut", seconds)[1])
        except queue.Empty:
            return None

    def fail(self, what: str, name: str = "") -> None:
        """`sync`, `write` or `read` (or `nothing`) fails with EIO from now on, on files called so or on all."""
        self._tell(f"fail {what} {name}")
        self._expect("failing")

    def full(self, name: str = "") -> None:
        """`write` fails with ENOSPC from now on."""
        self._tell(f"full {name}")
        self._expect("failing")

    def end(self) -> None:
        """Unmounted, and the process gone. Without a cut before, all of it is in `backing`."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        # Lazily: a process that was killed may not have let go of its files yet.
        subprocess.run(["fusermount3", "-u", "-z", self.mountpoint], check=False, capture_output=True)
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"powerfs did not end: {self.logged()}") from None
        if process.returncode:
            raise AssertionError(f"powerfs failed: {self.logged()}")

    def logged(self) -> str:
        return self._log.read_text(errors="replace")

    def _tell(self, line: str) -> None:
        if self._process is None or self._process.stdin is None:
            raise RuntimeError("the power is off")
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _expect(self, word: str, seconds: float = SECONDS) -> list[str]:
        line = self._said.get(timeout=seconds)
        words = line.split()
        if not words or words[0] != word:
            raise AssertionError(f"powerfs said {line!r}, not {word!r}: {self.logged()}")
        return words

    @staticmethod
    def _listen(process: subprocess.Popen[str], said: queue.Queue[str]) -> None:
        if process.stdout is not None:
            for line in process.stdout:
                said.put(line)
        said.put("")


def _how(seed: int | None) -> str:
    return "drop" if seed is None else f"random {seed}"


@contextmanager
def power_in(base: Path) -> Iterator[Power]:
    """Switched on; ended after the body."""
    power = Power(base)
    power.start()
    try:
        yield power
    finally:
        power.end()
