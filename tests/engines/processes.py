"""Starting servers, waiting until they answer, and ending them."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

#: Seconds a server may take until it answers, and until it has ended.
STARTING = 60.0
ENDING = 5.0


def program(name: str) -> str:
    """The path of a program that an extra of pyproject.toml brings; FileNotFoundError says which level brings it."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: scripts/bootstrap engines brings it")
    return str(path)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on, all different. Below those that the kernel gives to connections: one of these could
    be taken by a connection of some test before the server that is to have it has begun."""
    found: list[int] = []
    while len(found) < count:
        port = 12000 + secrets.randbelow(20000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def start(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None, *, tied: bool = True) -> subprocess.Popen[bytes]:
    """In a session of its own, so that no terminal ends it; its output goes to `log`. `tied`: the kernel kills it when this process ends,
    however it does."""
    if tied:
        command = ["setpriv", "--pdeathsig", "KILL", "--", *command]
    with open(log, "ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, **(env or {})},
        )


def wait_for(answers: Callable[[], bool], what: str, log: Path, alive: Callable[[], bool] = lambda: True) -> None:
    """Until `answers()`; RuntimeError with the end of the log if it has ended, or takes too long."""
    deadline = time.monotonic() + STARTING
    while not answers():
        if not alive() or time.monotonic() > deadline:
            tail = log.read_text(errors="replace")[-2000:] if log.exists() else ""
            raise RuntimeError(f"{what} {'does not answer' if alive() else 'has ended'}; {log}:\n{tail}")
        time.sleep(0.05)


def listens(port: int) -> bool:
    """Does somebody accept connections there?"""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def is_running(pid: int, mark: str) -> bool:
    """Is that process alive, and one whose command line has `mark`? Numbers of processes are used again."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        # Between exec and its first instruction a process has no command line yet.
        return state != "Z" and (not line or mark.encode() in line)
    except (FileNotFoundError, ProcessLookupError):
        return False


def end(marks: Mapping[int, str], patience: float = ENDING) -> None:
    """Ask processes to end, all together; kill what has not after `patience` seconds. `marks`: process -> as for `is_running`."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid, mark in marks.items():
            if is_running(pid, mark):
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
        deadline = time.monotonic() + patience
        while any(is_running(pid, mark) for pid, mark in marks.items()):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        else:
            return
