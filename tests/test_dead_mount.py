"""A mount whose process was killed and cannot end, since it waits in the kernel for itself: umount and mount free it, and no other."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fusefs import dead_mounts
from fusefs.control import SOCKET_NAME, listen
from fusefs.control_client import ControlClient
from fusefs.dead_mounts import free_dead, is_dying
from fusefs.mounts import mount_at
from storage.errors import Unavailable
from tests.cli_runner import fusefs
from tests.mounting import Mounted, Mounting, mounting_in, wait_until

#: Appends, says so, and syncs when it is told to.
PROGRAM = "import os, sys; f = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND); os.write(f, b'x'); print(flush=True); input(); os.fsync(f)"


@pytest.fixture
def mounting(tmp_path: Path) -> Iterator[Mounting]:
    (tmp_path / "m").mkdir()
    with mounting_in(tmp_path / "m") as made:
        yield made


@pytest.fixture
def stuck(mounting: Mounting) -> Iterator[tuple[Mounted, subprocess.Popen[bytes]]]:
    """A mount whose own thread waits for a WRITE that will never be answered; then it is killed. And a program in fsync on it."""
    mounted = mounting.mount("commit_interval=1")
    (mounted.path / "log").write_bytes(b"before\n")
    mounted.fault("slow-write", "1000")
    pipe = subprocess.PIPE
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, mounted.path / "log"], stdin=pipe, stdout=pipe, stderr=pipe)
    assert program.stdin is not None
    assert program.stdout is not None
    program.stdout.readline()
    # The loop that commits every second.
    wait_until(lambda: _waits_for_fuse(mounted.process.pid), "waiting for the own mount")
    program.stdin.write(b"\n")
    program.stdin.flush()
    wait_until(lambda: _waits_for_fuse(program.pid), "fsync in the program")
    mounted.process.kill()
    time.sleep(0.2)
    yield mounted, program
    for process in (program, mounted.process):
        if process.poll() is None and mount_at(mounted.path) is not None:
            subprocess.run(["umount", "-f", "-l", mounted.path], check=False)
        with suppress(ProcessLookupError):
            process.kill()
        process.wait(20)
    for stream in (program.stdin, program.stdout, program.stderr):
        if stream is not None:
            stream.close()


def _waits_for_fuse(pid: int) -> bool:
    """Is a thread of the process in the kernel, where no signal reaches it, for a FUSE filesystem? A disk that is slow ends by itself."""
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if "\nState:\tD" in (task / "status").read_text() and " fuse_" in _stack(task):
                return True
    return False


def _stack(task: Path) -> str:
    """Where in the kernel it is."""
    try:
        return (task / "stack").read_text()
    except PermissionError:
        # Only root is told: then whatever waits there counts.
        return " fuse_"


def test_it_cannot_end_by_itself(stuck: tuple[Mounted, subprocess.Popen[bytes]]) -> None:
    """Else the tests below would show nothing."""
    mounted, program = stuck
    with pytest.raises(subprocess.TimeoutExpired):
        mounted.process.wait(1)
    assert program.poll() is None
    assert is_dying(mounted.process.pid)


@pytest.mark.parametrize("command", ["umount", "status", "mount"])
def test_commands_free_it(stuck: tuple[Mounted, subprocess.Popen[bytes]], command: str) -> None:
    mounted, program = stuck
    if command == "mount":
        fusefs("mount", mounted.volume, mounted.path)
        assert set(os.listdir(mounted.path)) <= {"log"}
        fusefs("umount", mounted.path)
    elif command == "umount":
        assert "dead" in fusefs("umount", mounted.path).error_line
    else:
        assert fusefs("status", mounted.volume).status == 0
    assert mounted.process.wait(20) == -signal.SIGKILL
    # Whoever was in fsync on it is told that it failed.
    assert program.wait(20) == 1
    assert program.stderr is not None
    assert b"ConnectionAbortedError" in program.stderr.read()
    if command != "status":
        assert mount_at(mounted.path) is None


def test_the_living_are_left_alone(mounting: Mounting) -> None:
    """However long it takes them: a stopped process is not dead."""
    mounted = mounting.mount()
    assert not is_dying(mounted.process.pid)
    mounted.process.send_signal(signal.SIGSTOP)
    try:
        assert not is_dying(mounted.process.pid)
        assert not free_dead(mounted.volume)
        assert mount_at(mounted.path) is not None
    finally:
        mounted.process.send_signal(signal.SIGCONT)
    assert os.listdir(mounted.path) == []


def test_the_gone_are_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not is_dying(child.pid)
    child.kill()
    wait_until(lambda: is_dying(child.pid), "a zombie")
    child.communicate()
    assert is_dying(child.pid)


def test_a_process_that_does_not_answer_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusefs.control_client.LOOK_SECONDS", 0.05)
    monkeypatch.setattr("fusefs.control_client.ANSWER_SECONDS", 0.2)
    with listen(tmp_path), ControlClient.connect(tmp_path) as client, pytest.raises(Unavailable, match="has not answered"):
        client.status()


def test_a_killed_process_s_socket_is_an_end_not_a_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor of it may live on, in a thread that is stuck."""
    monkeypatch.setattr("fusefs.control_client.LOOK_SECONDS", 0.05)
    with listen(tmp_path), ControlClient.connect(tmp_path) as client:
        monkeypatch.setattr("fusefs.control_client.is_dying", lambda _pid: True)
        with pytest.raises(EOFError):
            client.status()
        assert client.drain() is None


def test_without_fusectl_an_ordinary_user_is_told_what_to_ask_for(
    mounting: Mounting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mounted = mounting.mount()
    mount = mount_at(mounted.path)
    assert mount is not None
    monkeypatch.setattr(dead_mounts, "CONNECTIONS", tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Unavailable, match="umount -f"):
        dead_mounts.abort(mount)


def test_nobody_there_is_nobody_to_free(tmp_path: Path) -> None:
    assert not free_dead(tmp_path)
    assert not free_dead(tmp_path / "missing")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / SOCKET_NAME))
    assert not free_dead(tmp_path)
