"""The control socket of a mount: VOLUME/control.sock, for the volume's owner and root only (R6).

| who may connect   | the socket has mode 0600, and the peer's uid (SO_PEERCRED) must be the process's own or 0 |
| what is limited   | connections, length of a line, time a peer takes to read                                   |
"""

from __future__ import annotations

import logging
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from fusefs.backing import Backing
from fusefs.control_protocol import (
    MAX_REQUEST,
    SOCKET_NAME,
    AddHost,
    Answer,
    AnyRequest,
    Conclude,
    ContractAnswer,
    DoneAnswer,
    Drain,
    Flush,
    FlushedAnswer,
    GetReplication,
    GetStatus,
    HostAnswer,
    Mark,
    MountStatus,
    Progress,
    Renew,
    RenewAll,
    RenewedAnswer,
    Repair,
    RepairedAnswer,
    Replicate,
    ReplicationAnswer,
    RewrittenAnswer,
    Scrub,
    ScrubbedAnswer,
    StatusAnswer,
    Stop,
    Worm,
    decode_request,
    encode,
    error_answer,
    socket_address,
)
from storage import FlushProgress, FlushReport, RepairStatus, RewriteStatus, ScrubReport
from storage.errors import BadArgument, Busy, FusefsError, NotPermitted, Unavailable

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_CONNECTIONS = 32
DAY = 86400.0
#: Seconds a peer may take to read an answer, and to send the rest of a line.
PEER_SECONDS = 30.0
#: Seconds between two lines of progress.
PROGRESS_SECONDS = 0.1


class MountState:
    """What the control socket tells about the mount, and can ask of it. Owned by `mount.serve`."""

    def __init__(self, volume: Backing, mountpoint: Path, options: str) -> None:
        self.volume = volume
        self.mountpoint = mountpoint
        self.options = options
        self.phase = "starting"
        self.open_handles: Callable[[], int] = lambda: 0
        self.write_back: Callable[[], Awaitable[None]] = _nothing
        self.unmount: Callable[[], Awaitable[None]] = _nothing
        #: The last flush, after the unmount.
        self.final_progress = FlushProgress()
        self.final_report: FlushReport | None = None
        self.final_error: FusefsError | None = None
        self.finished = trio.Event()

    async def status(self) -> MountStatus:
        return MountStatus(
            pid=os.getpid(),
            mountpoint=os.fsencode(self.mountpoint).decode("utf-8", "backslashreplace"),
            phase=self.phase,
            options=self.options,
            open_handles=self.open_handles(),
            flush_done=self.final_progress.bytes_done,
            flush_total=self.final_progress.bytes_total,
            volume=await self.volume.status(),
        )


async def _nothing() -> None:
    return None


def listen(volume: Path) -> socket.socket:
    """A listening socket in the volume's directory, replacing one left by a process that is gone: the caller holds the volume's lock."""
    directory = os.open(volume, os.O_PATH | os.O_DIRECTORY)
    try:
        with suppress(FileNotFoundError):
            os.unlink(SOCKET_NAME, dir_fd=directory)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(socket_address(directory))
            # Before `listen`, without which nobody can connect. Not by a umask: that is every thread's, and what another one
            # made meanwhile (a directory on a host) would have the wrong mode for good.
            os.chmod(socket_address(directory), 0o600)
            listener.listen(MAX_CONNECTIONS)
        except BaseException:
            listener.close()
            raise
        return listener
    except OSError as error:
        raise Unavailable(f"the control socket {volume / SOCKET_NAME} cannot be made: {error.strerror}") from error
    finally:
        os.close(directory)


def remove_socket(volume: Path) -> None:
    """Take the socket's name away; nothing else by that name."""
    path = volume / SOCKET_NAME
    with suppress(OSError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)


def peer_uid(stream: socket.socket | trio.socket.SocketType) -> int:
    """User of the process at the other end."""
    credentials = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


class ControlServer:
    """Answers requests until cancelled."""

    def __init__(self, state: MountState) -> None:
        self._state = state
        self._flushing = trio.Lock()
        self._connections = 0

    async def run(self, listener: socket.socket) -> None:
        async with trio.open_nursery() as nursery:
            server = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
            await trio.serve_listeners(self._connection, [server], handler_nursery=nursery)

    async def _connection(self, stream: trio.SocketStream) -> None:
        self._connections += 1
        try:
            async with stream:
                if self._connections > MAX_CONNECTIONS:
                    await self._send(stream, error_answer(Busy("too many commands are talking to this mount; try again")))
                elif peer_uid(stream.socket) not in (0, os.geteuid()):
                    await self._send(stream, error_answer(NotPermitted("only the owner of the volume may control its mount")))
                else:
                    await self._converse(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass  # the peer went away, or does not read: its affair
        except Exception:
            log.exception("bug while answering a request on the control socket")
        finally:
            self._connections -= 1

    async def _converse(self, stream: trio.SocketStream) -> None:
        received = bytearray()
        while True:
            line = await _next_line(stream, received)
            if line is None:
                return
            try:
                request = decode_request(line)
            except BadArgument as error:
                await self._send(stream, error_answer(error))
                return
            try:
                answer = await self._answer(stream, request)
            except FusefsError as error:
                answer = error_answer(error)
            await self._send(stream, answer)
            if isinstance(request, Drain):
                # Held open until the process lets go of the volume and ends its tasks: that end is the news.
                await trio.sleep_forever()

    async def _answer(self, stream: trio.SocketStream, request: AnyRequest) -> Answer:
        state = self._state
        if state.phase == "closing" and not isinstance(request, Drain):
            raise Busy("the volume is being closed; wait for it to end")
        match request:
            case GetStatus():
                return StatusAnswer(status=await state.status())
            case Flush():
                return _flushed(await self._flush(stream))
            case Drain():
                return _flushed(await self._drain(stream))
            case Worm():
                state.volume.namespace.set_worm(request.ino)
                await state.volume.namespace.commit(request.ino)
                return DoneAnswer()
            case Conclude():
                return ContractAnswer(contract_id=await state.volume.contractor.conclude_contract(request.host, request.seconds))
            case Renew():
                return ContractAnswer(contract_id=await state.volume.contractor.renew_contract(request.contract_id, request.seconds))
            case RenewAll():
                return RenewedAnswer(hosts=await state.volume.renew_contracts())
            case Mark():
                if request.state == "leave":
                    await state.volume.leave_host(request.host, leave=True)
                else:
                    await state.volume.mark_host(request.host, lost=request.state == "lost")
                return DoneAnswer()
            case AddHost():
                days = request.seconds / DAY if request.seconds is not None else None
                return HostAnswer(number=await state.volume.add_host(request.url, days))
            case Repair():
                return RepairedAnswer(repair=await self._repair(stream))
            case GetReplication():
                return ReplicationAnswer(replication=await state.volume.namespace.stored(request.ino))
            case Replicate():
                return RewrittenAnswer(rewrite=await self._replicate(stream, request))
            case Scrub():
                return ScrubbedAnswer(report=await self._scrub(stream, request))
            case Stop():
                await state.unmount()
                return DoneAnswer()

    async def _flush(self, stream: trio.SocketStream) -> FlushReport:
        state = self._state
        if state.phase != "mounted":
            raise Busy(f"the mount is {state.phase}; wait for it to end")
        async with self._flushing:
            await state.write_back()
            progress = FlushProgress()
            return await self._shown(stream, partial(state.volume.flush, progress), lambda: (progress.bytes_done, progress.bytes_total))

    async def _repair(self, stream: trio.SocketStream) -> RepairStatus:
        volume = self._state.volume
        return await self._shown(stream, volume.repair, volume.repair_progress)

    async def _replicate(self, stream: trio.SocketStream, request: Replicate) -> RewriteStatus:
        volume = self._state.volume

        async def work() -> RewriteStatus:
            await volume.set_replication(request.ino, request.spec, now=request.now)
            return await volume.rewrite() if request.now and request.wait else volume.rewrite_status()

        def progress() -> tuple[int, int]:
            now = volume.rewrite_status()
            return now.bytes, now.bytes + now.pending_bytes

        return await self._shown(stream, work, progress)

    async def _shown(
        self,
        stream: trio.SocketStream,
        work: Callable[[], Awaitable[T]],
        progress: Callable[[], tuple[int, int]],
        *,
        outlives: bool = True,
    ) -> T:
        """Do it, and send lines of progress meanwhile. Unless it `outlives` the connection it ends with that."""
        outcome: T | FusefsError = Unavailable("whoever asked for it is gone")

        async def show() -> None:
            await self._show(stream, progress)
            if not outlives:
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(show)
            try:
                outcome = await work()
            except FusefsError as error:
                outcome = error  # raised outside of the nursery, which would wrap it
            nursery.cancel_scope.cancel()
        if isinstance(outcome, FusefsError):
            raise outcome
        return outcome

    async def _scrub(self, stream: trio.SocketStream, request: Scrub) -> ScrubReport:
        """Unlike a repair it is of use only to who asked: it ends with the connection."""
        volume = self._state.volume
        work = partial(volume.scrub, full=request.full, sample=request.sample)
        return await self._shown(stream, work, volume.scrub_progress, outlives=False)

    async def _drain(self, stream: trio.SocketStream) -> FlushReport:
        state = self._state
        async with trio.open_nursery() as nursery:
            final = state.final_progress
            nursery.start_soon(self._show, stream, lambda: (final.bytes_done, final.bytes_total))
            await state.finished.wait()
            nursery.cancel_scope.cancel()
        if state.final_error is not None:
            raise state.final_error
        return state.final_report or FlushReport()

    async def _show(self, stream: trio.SocketStream, progress: Callable[[], tuple[int, int]]) -> None:
        """Lines of progress, (bytes done, bytes in all) whenever they moved. A peer that is gone ends this task only."""
        shown = (-1, -1)
        try:
            while True:
                now = progress()
                if now != shown:
                    await self._send(stream, Progress(done=now[0], total=now[1]))
                    shown = now
                await trio.sleep(PROGRESS_SECONDS)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            return

    async def _send(self, stream: trio.SocketStream, answer: Answer) -> None:
        with trio.fail_after(PEER_SECONDS):
            await stream.send_all(encode(answer))


def _flushed(report: FlushReport) -> FlushedAnswer:
    return FlushedAnswer(degraded_sectors=report.degraded_sectors, reasons=list(report.reasons))


async def _next_line(stream: trio.SocketStream, received: bytearray) -> bytes | None:
    """The next line without its newline, None at the end; a line that is too long comes out cut, and does not decode."""
    while (end := received.find(b"\n")) < 0:
        if len(received) > MAX_REQUEST:
            return bytes(received[:MAX_REQUEST])
        if received:
            with trio.fail_after(PEER_SECONDS):
                chunk = await stream.receive_some(65536)
        else:
            chunk = await stream.receive_some(65536)
        if not chunk:
            # Taken out: a peer that ends without a newline must not be answered for ever.
            line = bytes(received)
            received.clear()
            return line or None
        received += chunk
    line = bytes(received[:end])
    del received[: end + 1]
    return line
