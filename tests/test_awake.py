"""Cores are kept from halting for as long as a program waits for one answer after the other, and not longer (fusefs/awake.py)."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import trio
from trio.testing import MockClock

from fusefs import awake as module
from fusefs import base
from fusefs.awake import ANY, AT_ONCE, GAP, ROW, WATCH, Awake
from fusefs.handles import HandleTable
from fusefs.operations import Operations
from fusefs.options import MountOptions
from fusefs.receiver import Receiver


class Time:
    """Stands for perf_counter."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(module, "perf_counter", time)
    return time


def made(tmp_path: Path, *, driver: str = "haltpoll\n", wanted: bool = True) -> tuple[Awake, Path]:
    """One that writes to a file, and the file."""
    device, idle = tmp_path / "cpu_dma_latency", tmp_path / "current_driver"
    device.touch()
    idle.write_text(driver)
    return Awake(wanted, device, idle), device


def row(awake: Awake, time: Time, count: int = ROW, gap: float = GAP / 2) -> None:
    for _ in range(count):
        time.now += gap
        awake.asked()


def test_a_row_keeps_them_awake_until_it_is_over(tmp_path: Path, time: Time) -> None:
    awake, device = made(tmp_path)
    with awake.opened():
        row(awake, time, ROW - 1)
        assert (awake.held, device.read_bytes()) == (False, b"")
        row(awake, time, 1)
        assert (awake.held, device.read_bytes()) == (True, AT_ONCE)
        # Said once.
        row(awake, time, 100)
        assert device.read_bytes() == AT_ONCE
        awake.release()
        awake.release()
        assert (awake.held, device.read_bytes()) == (False, AT_ONCE + ANY)
        row(awake, time, ROW - 1)
        assert not awake.held
        row(awake, time, 1)
        assert device.read_bytes() == AT_ONCE + ANY + AT_ONCE
    # The kernel takes it back with the file.
    assert not awake.held
    row(awake, time)
    assert not awake.held


def test_what_is_no_row_lets_them_halt(tmp_path: Path, time: Time) -> None:
    """A disk that takes longer than they to wake, or a program with work of its own."""
    awake, device = made(tmp_path)
    with awake.opened():
        row(awake, time, 100, 1.5 * GAP)
        for _ in range(10):
            time.now += 1.5 * GAP
            row(awake, time, ROW - 1)
    assert device.read_bytes() == b""


def test_numbers_are_what_linux_wants() -> None:
    """A signed 32-bit number of microseconds, in memory's order; 2,000 s is its own for "any"."""
    assert [int.from_bytes(number, sys.byteorder, signed=True) for number in (AT_ONCE, ANY)] == [0, 2_000_000_000]
    assert {len(AT_ONCE), len(ANY)} == {4}


@pytest.mark.parametrize("why", ["another driver", "no driver", "not wanted", "no device"])
def test_nothing_is_written_where_it_is_of_no_use_or_not_to_be_had(tmp_path: Path, time: Time, why: str) -> None:
    awake, device = made(tmp_path, driver="intel_idle\n" if why == "another driver" else "haltpoll\n", wanted=why != "not wanted")
    if why == "no driver":
        (tmp_path / "current_driver").unlink()
    if why == "no device":
        device.unlink()
    with awake.opened():
        row(awake, time, 10 * ROW)
        assert not awake.held
    assert not device.exists() or device.read_bytes() == b""


def test_a_device_that_takes_nothing_is_left_alone(tmp_path: Path, time: Time) -> None:
    """No request fails for it."""
    made(tmp_path)
    awake = Awake(True, Path("/dev/full"), tmp_path / "current_driver")
    with awake.opened():
        row(awake, time, 10 * ROW)
        assert not awake.held


async def test_they_halt_again_also_where_the_receiver_never_rests(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "perf_counter", trio.current_time)
    awake, device = made(tmp_path)
    with awake.opened():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(awake.watch)
            for turn in (1, 2):
                for _ in range(ROW + 1):
                    await trio.sleep(GAP / 2)
                    awake.asked()
                # While they are asked for they stay awake.
                for _ in range(200):
                    await trio.sleep(GAP / 2)
                    awake.asked()
                assert awake.held
                await trio.sleep(3 * WATCH)
                assert device.read_bytes() == (AT_ONCE + ANY) * turn
            nursery.cancel_scope.cancel()


async def test_an_fsync_is_what_is_asked_for(tmp_path: Path, time: Time) -> None:
    awake, _ = made(tmp_path)
    operations = object.__new__(Operations)

    async def commit(_: int) -> None:
        time.now += GAP / 2

    handles = HandleTable()
    parts: dict[str, Any] = {
        "handles": handles,
        "namespace": SimpleNamespace(commit=commit),
        "options": MountOptions(),
        "receiver": Receiver(awake),
    }
    for name, part in parts.items():
        setattr(operations, name, part)
    fh = handles.open(2, 1, 0, writing=True, cached=True).fh
    with awake.opened():
        for _ in range(ROW):
            assert not awake.held
            await operations.fsync(fh, False)
        assert awake.held


@pytest.mark.parametrize("option", ["awake", "noawake"])
def test_mounts_may_do_without(tmp_path: Path, time: Time, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    _, device = made(tmp_path)
    monkeypatch.setattr(base, "Awake", lambda wanted: Awake(wanted, device, tmp_path / "current_driver"))
    volume: Any = MagicMock()
    awake = Operations(volume, MountOptions.parse([option]), MagicMock()).receiver.awake
    with awake.opened():
        row(awake, time)
        assert awake.held is (option == "awake")


def test_what_is_in_force_is_told() -> None:
    assert MountOptions().awake
    assert "awake" not in MountOptions().text()
    assert not MountOptions.parse(["noawake"]).awake
    assert "noawake" in MountOptions.parse(["noawake"]).text()
