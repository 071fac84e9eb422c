"""The control socket: answers what is asked, survives whatever comes."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusefs.control import ControlServer, MountState, listen, remove_socket
from fusefs.control_client import ControlClient
from fusefs.control_protocol import (
    MAX_REQUEST,
    Conclude,
    Drain,
    ErrorAnswer,
    Flush,
    GetStatus,
    Renew,
    StatusAnswer,
    Stop,
    Worm,
    decode_answer,
    decode_request,
    encode,
    error_answer,
    error_of,
)
from storage import FlushProgress, FlushReport, RepairStatus, RewriteStatus, ScrubStatus, StagingStatus, VolumeStatus
from storage.errors import BadArgument, Busy, Corrupt, FusefsError, NotFound, Unavailable


def volume_status(path: Path) -> VolumeStatus:
    values: dict[str, Any] = {}
    for field in msgspec.structs.fields(VolumeStatus):
        plain = {int: 7, str: "text", bool: False, float: 0.5, RepairStatus: RepairStatus(pending=3, trouble="no room")}
        plain[RewriteStatus] = RewriteStatus(files=2, pending_bytes=100)
        plain[StagingStatus] = StagingStatus(sectors=4, bytes=100, seconds_left=2.5, trouble="no room")
        plain[ScrubStatus] = ScrubStatus(pending=1, trouble="no room")
        plain[dict[str, int]] = {"2": 7}
        values[field.name] = plain.get(field.type, [])
    return VolumeStatus(**{**values, "path": str(path)})


class StandInVolume:
    """What the control socket asks of a volume."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.worms: list[int] = []
        self.contracts: list[tuple[str, float]] = []
        self.report = FlushReport(2, ("host 3 is away",))
        self.flush_error: FusefsError | None = None
        self.namespace = SimpleNamespace(set_worm=self._worm, commit=self._commit)
        self.contractor = SimpleNamespace(conclude_contract=self._conclude, renew_contract=self._conclude)

    def _worm(self, ino: int) -> None:
        if ino == 404:
            raise NotFound("no such inode")
        self.worms.append(ino)

    async def _commit(self, ino: int) -> None:
        pass

    async def _conclude(self, what: str, seconds: float) -> str:
        self.contracts.append((what, seconds))
        return "c" * 32

    async def status(self) -> VolumeStatus:
        return volume_status(self.path)

    async def flush(self, progress: FlushProgress | None = None) -> FlushReport:
        assert progress is not None
        progress.bytes_total = 100
        for done in (10, 60, 100):
            progress.bytes_done = done
            await trio.sleep(0.15)
        if self.flush_error is not None:
            raise self.flush_error
        return self.report


class Served:
    def __init__(self, volume: StandInVolume, state: MountState) -> None:
        self.volume = volume
        self.state = state

    async def ask(self, work: Callable[[ControlClient], Any]) -> Any:
        def call() -> Any:
            with ControlClient.connect(self.volume.path) as client:
                return work(client)

        return await trio.to_thread.run_sync(call)

    async def raw(self, data: bytes, *, half_close: bool = True) -> bytes:
        """What comes back for these bytes."""
        directory = os.open(self.volume.path, os.O_PATH)
        try:
            stream = await trio.open_unix_socket(f"/proc/self/fd/{directory}/control.sock")
        finally:
            os.close(directory)
        async with stream:
            received = b""
            try:
                await stream.send_all(data)
                if half_close:
                    await stream.send_eof()
                async for chunk in stream:
                    received += chunk
                    if not half_close:
                        break
            except trio.BrokenResourceError:
                pass
            return received


@asynccontextmanager
async def served(path: Path) -> AsyncIterator[Served]:
    path.mkdir(parents=True, exist_ok=True)
    volume = StandInVolume(path)
    state = MountState(volume, Path("/mnt/x"), "rw")  # type: ignore[arg-type]
    state.phase = "mounted"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ControlServer(state).run, listen(path))
        try:
            yield Served(volume, state)
        finally:
            remove_socket(path)
            nursery.cancel_scope.cancel()


async def test_status_is_what_the_volume_says(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        status = await server.ask(lambda client: client.status())
        assert status.volume == volume_status(tmp_path)
        assert (status.pid, status.mountpoint, status.phase) == (os.getpid(), "/mnt/x", "mounted")


async def test_a_flush_shows_progress_and_reports(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    async with served(tmp_path) as server:
        report = await server.ask(lambda client: client.flush(lambda done, total: seen.append((done, total))))
    assert report == FlushReport(2, ("host 3 is away",))
    assert seen == sorted(seen)
    assert seen[-1][1] == 100
    assert len(seen) >= 2


async def test_a_flush_that_fails_raises_the_same_kind(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        server.volume.flush_error = Unavailable("no host answers")
        with pytest.raises(Unavailable, match="no host answers"):
            await server.ask(lambda client: client.flush())
        assert (await server.ask(lambda client: client.status())).phase == "mounted"


async def test_requests_do_what_they_say(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        await server.ask(lambda client: client.worm(17))
        assert server.volume.worms == [17]
        with pytest.raises(NotFound, match="no such inode"):
            await server.ask(lambda client: client.worm(404))
        assert await server.ask(lambda client: client.conclude("2", 86400.0)) == "c" * 32
        assert await server.ask(lambda client: client.renew("d" * 32, 10.0)) == "c" * 32
        assert server.volume.contracts == [("2", 86400.0), ("d" * 32, 10.0)]
        stopped: list[bool] = []

        async def unmount() -> None:
            stopped.append(True)

        server.state.unmount = unmount
        await server.ask(lambda client: client.stop())
        assert stopped == [True]


async def test_drain_waits_for_the_last_flush_and_for_the_end(tmp_path: Path) -> None:
    results: list[FlushReport | None] = []
    #: What a bar makes a rate and the time left of.
    seen: list[tuple[int, int]] = []
    server_scope = trio.CancelScope()

    async with trio.open_nursery() as nursery:
        listening = trio.Event()
        state_box: list[MountState] = []

        async def serve() -> None:
            with server_scope:
                async with served(tmp_path) as server:
                    state_box.append(server.state)
                    listening.set()
                    await trio.sleep_forever()

        nursery.start_soon(serve)
        await listening.wait()

        async def drain() -> None:
            def call() -> FlushReport | None:
                with ControlClient.connect(tmp_path) as client:
                    return client.drain(lambda done, total: seen.append((done, total)))

            results.append(await trio.to_thread.run_sync(call))

        nursery.start_soon(drain)
        state_box[0].final_progress.bytes_total = 100
        for done in (10, 60):
            state_box[0].final_progress.bytes_done = done
            with trio.fail_after(20):
                while (done, 100) not in seen:
                    await trio.sleep(0.02)
        assert not results
        state_box[0].final_report = FlushReport(1, ("x",))
        state_box[0].finished.set()
        await trio.sleep(0.3)
        assert not results  # flushed, but the process still has the volume
        server_scope.cancel()
    assert results == [FlushReport(1, ("x",))]


async def test_only_the_owner_may_connect(tmp_path: Path) -> None:
    async with served(tmp_path):
        assert stat.S_IMODE((tmp_path / "control.sock").stat().st_mode) == 0o600


async def test_a_volume_with_a_long_path_can_be_controlled(tmp_path: Path) -> None:
    path = tmp_path / ("d" * 120) / ("e" * 120)
    async with served(path) as server:
        assert (await server.ask(lambda client: client.status())).phase == "mounted"


async def test_a_socket_left_by_a_killed_process_is_replaced(tmp_path: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "control.sock"))
    left.close()
    with pytest.raises(NotFound):
        ControlClient.connect(tmp_path)
    async with served(tmp_path) as server:
        assert (await server.ask(lambda client: client.status())).phase == "mounted"


def test_no_volume_no_socket(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="not mounted"):
        ControlClient.connect(tmp_path)
    with pytest.raises(NotFound):
        ControlClient.connect(tmp_path / "nowhere")


def test_remove_socket_removes_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "control.sock").write_text("a file")
    remove_socket(tmp_path)
    assert (tmp_path / "control.sock").read_text() == "a file"
    remove_socket(tmp_path / "nowhere")


async def test_one_peer_that_says_nothing_does_not_block_another(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        silent = [socket.socket(socket.AF_UNIX) for _ in range(5)]
        for peer in silent:
            peer.connect(str(tmp_path / "control.sock"))
            peer.send(b'{"type":')
        assert (await server.ask(lambda client: client.status())).phase == "mounted"
        for peer in silent:
            peer.close()


async def test_two_requests_in_one_packet_are_both_answered(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        lines = (await server.raw(encode(GetStatus()) + encode(Worm(ino=3)))).splitlines()
        assert isinstance(decode_answer(lines[0]), StatusAnswer)
        assert len(lines) == 2
        assert server.volume.worms == [3]


BROKEN = [
    b"\n",
    b"hello\n",
    b"{}\n",
    b'{"type":"status","version":2}\n',
    b'{"type":"status","extra":1}\n',
    b'{"type":"nonsense"}\n',
    b'{"type":"worm"}\n',
    b'{"type":"worm","ino":-1}\n',
    b'{"type":"worm","ino":1e400}\n',
    b'{"type":"worm","ino":99999999999999999999999}\n',
    b'{"type":"conclude","host":"","seconds":10}\n',
    b'{"type":"conclude","host":"1","seconds":-5}\n',
    b'{"type":"conclude","host":"' + b"x" * 5000 + b'","seconds":10}\n',
    b"[" * 20000 + b"\n",
    b"x" * (MAX_REQUEST + 5),
    b'{"type":"status"',
    b"\xff\xfe\x00\n",
]


@pytest.mark.parametrize("data", BROKEN, ids=[str(number) for number in range(len(BROKEN))])
async def test_a_broken_request_gets_an_error_and_the_server_goes_on(tmp_path: Path, data: bytes) -> None:
    async with served(tmp_path) as server:
        reply = await server.raw(data)
        assert isinstance(decode_answer(reply.splitlines()[0]), ErrorAnswer), reply
        assert (await server.ask(lambda client: client.status())).phase == "mounted"
        assert server.volume.worms == []


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.lists(
        st.one_of(st.binary(max_size=200), st.sampled_from([b"\n", b'{"type":"status"}\n', b'{"type":"worm","ino":', b"\0" * 70000])),
        max_size=8,
    )
)
def test_the_server_survives_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("fuzz")

    async def work() -> None:
        async with served(path) as server:
            with trio.fail_after(10):
                await server.raw(b"".join(data))
                assert (await server.ask(lambda client: client.status())).phase == "mounted"

    trio.run(work)


@given(st.binary(max_size=400))
def test_any_line_is_a_request_or_bad_argument(line: bytes) -> None:
    try:
        decode_request(line)
    except BadArgument:
        pass


@given(st.binary(max_size=400))
def test_any_line_is_an_answer_or_bad_argument(line: bytes) -> None:
    try:
        decode_answer(line)
    except BadArgument:
        pass


@pytest.mark.parametrize(
    "request_", [GetStatus(), Flush(), Drain(), Worm(ino=5), Conclude(host="h", seconds=5.0), Renew(contract_id="i", seconds=1e6), Stop()]
)
def test_a_request_comes_back_as_it_was(request_: Any) -> None:
    assert decode_request(encode(request_).rstrip(b"\n")) == request_


def test_an_error_keeps_its_kind_and_message() -> None:
    for error in (Busy("b"), Corrupt("c"), FusefsError("f")):
        answer = error_answer(error)
        again = error_of(answer.kind, answer.message)
        assert type(again) is type(error)
        assert str(again) == str(error)
    assert type(error_of("SystemExit", "x")) is FusefsError
    assert type(error_of("annotations", "x")) is FusefsError
