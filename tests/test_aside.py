"""A coprocess keeps off the core on which the event loop is at work, and only off that."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from storage.coprocess import aside
from storage.coprocess.aside import LOOK, Aside, EventLoop
from storage.coprocess.serve import Channel
from storage.coprocess.wire import MOST, Done, Ping, decode_answer, encode

ALL = os.sched_getaffinity(0)
several = pytest.mark.skipif(len(ALL) < 2, reason="cannot change: with one core there is nowhere else")


@contextmanager
def process(program: str, core: int) -> Iterator[subprocess.Popen[bytes]]:
    """A Python program on that core."""
    running = subprocess.Popen([sys.executable, "-c", f"import os, time; os.sched_setaffinity(0, {{{core}}}); {program}"])
    try:
        yield running
    finally:
        running.kill()
        running.wait()


def seen(loop: EventLoop, wanted: int | None) -> bool:
    """Is that what it comes to say? A busy machine may keep the other from its core for a while."""
    deadline = time.monotonic() + 20
    while loop.core() != wanted:
        if time.monotonic() > deadline:
            return False
        time.sleep(10 * LOOK)
    return True


def of_a_thread(work: Callable[[], Any]) -> Any:
    """What it returns, in a thread of its own: whose cores change are not the test's."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


class At:
    """An event loop at work where it is said to be."""

    def __init__(self, core: int | None) -> None:
        self.at = core

    def core(self) -> int | None:
        return self.at


@pytest.mark.parametrize("core", [min(ALL), max(ALL)])
def test_where_it_is_at_work_is_seen(core: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Others may want the core as well.
    monkeypatch.setattr(aside, "BUSY", 0.02)
    with process("exec('while True: pass')", core) as busy:
        loop = EventLoop(busy.pid)
        assert seen(loop, core)
        # Stopped, it is at work no longer; and at work again.
        busy.send_signal(signal.SIGSTOP)
        assert seen(loop, None)
        busy.send_signal(signal.SIGCONT)
        assert seen(loop, core)


def test_one_that_waits_or_has_ended_is_in_nobodys_way() -> None:
    with process("time.sleep(600)", min(ALL)) as idle:
        loop = EventLoop(idle.pid)
        time.sleep(0.5)
        for _ in range(5):
            time.sleep(2 * LOOK)
            assert loop.core() is None
    for _ in range(3):
        time.sleep(2 * LOOK)
        assert loop.core() is None
    assert EventLoop(idle.pid).core() is None


@several
def test_all_cores_but_that_one_and_all_again() -> None:
    def work() -> list[set[int]]:
        loop = At(None)
        beside = Aside(loop, os.getpid())
        found = []
        for core in (None, min(ALL), max(ALL), None, 10_000):
            loop.at = core
            beside.step()
            found.append(os.sched_getaffinity(0))
        return found

    assert of_a_thread(work) == [ALL, ALL - {min(ALL)}, ALL - {max(ALL)}, ALL, ALL]


@several
def test_what_others_say_its_process_may_use_holds() -> None:
    """taskset(1), a cpuset: also while it is away, and again when they take it back. `process` stands in for its own."""
    first, last = min(ALL), max(ALL)

    def work(whose: int) -> list[set[int]]:
        loop, found = At(None), []
        beside = Aside(loop, whose)
        for only, core in ((ALL, first), ({last}, None), ({last}, last), (ALL, first), ({first}, None), ({first}, first), (ALL, None)):
            os.sched_setaffinity(whose, only)
            os.sched_setaffinity(0, only)
            loop.at = core
            beside.step()
            found.append(os.sched_getaffinity(0))
        return found

    with process("time.sleep(600)", first) as other:
        found = of_a_thread(lambda: work(other.pid))
    assert found == [ALL - {first}, {last}, {last}, ALL - {first}, {first}, {first}, ALL]


def test_who_has_one_core_keeps_it() -> None:
    def work(whose: int) -> set[int]:
        Aside(At(min(ALL)), whose).step()
        return os.sched_getaffinity(0)

    with process("time.sleep(600)", min(ALL)) as other:
        os.sched_setaffinity(other.pid, {min(ALL)})
        assert of_a_thread(lambda: work(other.pid)) == {min(ALL)}


def test_what_the_kernel_refuses_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container that may not, or has other cores by now."""

    def refuse(*_: object) -> None:
        raise OSError(22, "Invalid argument")

    for what in ("sched_setaffinity", "sched_getaffinity"):
        monkeypatch.setattr(os, what, refuse)
        beside = Aside(At(min(ALL)), os.getpid())
        beside.step()
        beside.step()


@several
def test_requests_are_answered_there() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    loop = At(min(ALL))
    thread = threading.Thread(target=Channel(theirs, memoryview(b""), os.getpid(), loop).serve)
    thread.start()
    with ours:
        ours.settimeout(20)
        for core, wanted in ((min(ALL), ALL - {min(ALL)}), (None, ALL)):
            loop.at = core
            ours.send(encode(Ping()))
            assert isinstance(decode_answer(ours.recv(MOST)), Done)
            assert thread.native_id is not None
            assert os.sched_getaffinity(thread.native_id) == wanted
    thread.join(20)
    assert not thread.is_alive()
