"""Asking a live mount: the client's side of the control socket, blocking, for the command line."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from fusefs.control_protocol import (
    MAX_ANSWER,
    AddHost,
    AnyAnswer,
    Conclude,
    ContractAnswer,
    DoneAnswer,
    Drain,
    ErrorAnswer,
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
    Request,
    RewrittenAnswer,
    Scrub,
    ScrubbedAnswer,
    StatusAnswer,
    Stop,
    Worm,
    decode_answer,
    encode,
    error_of,
    socket_address,
)
from fusefs.dead_mounts import is_dying, peer_pid
from storage import FlushReport
from storage.errors import BadArgument, FusefsError, NotFound, NotPermitted, Unavailable

if TYPE_CHECKING:
    from storage import ContractStatus, HostStatus, RenewalStatus, RepairStatus, ReplicationStatus, RewriteStatus, ScrubReport

#: Seconds between two looks whether the process still lives.
LOOK_SECONDS = 2.0
#: Seconds for an answer that needs no host, or one host at a time.
ANSWER_SECONDS = 120.0

#: (done, in all), in bytes unless it says otherwise
ShowProgress = Callable[[int, int], None]


class ControlClient:
    """A connection to the process that serves a volume. Not for several threads. Raises what the mount raised."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = bytearray()

    @classmethod
    def connect(cls, volume: Path, timeout: float = 5.0) -> ControlClient:
        """NotFound: nobody serves the volume. NotPermitted: somebody else's. Unavailable: no answer within `timeout` seconds."""
        try:
            directory = os.open(volume, os.O_PATH | os.O_DIRECTORY)
        except PermissionError:
            raise NotPermitted(f"{volume} belongs to another user, who alone may control its mount") from None
        except OSError as error:
            raise NotFound(f"{volume} is not a volume: {error.strerror}") from None
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout)
            connection.connect(socket_address(directory))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            raise NotFound(f"{volume} is not mounted") from None
        except PermissionError:
            connection.close()
            raise NotPermitted(f"{volume} is mounted by another user, who alone may control it") from None
        except OSError as error:
            connection.close()
            raise Unavailable(f"the mount of {volume} does not answer: {error}") from None
        finally:
            os.close(directory)
        connection.settimeout(LOOK_SECONDS)
        return cls(connection)

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    # ----------------------------------------------------------------------------------------------------------------

    def status(self) -> MountStatus:
        answer = self._ask(GetStatus())
        if not isinstance(answer, StatusAnswer):
            raise _unexpected(answer)
        return answer.status

    def hosts(self) -> list[HostStatus]:
        return self.status().volume.hosts

    def contracts(self) -> list[ContractStatus]:
        return self.status().volume.contracts

    def flush(self, progress: ShowProgress | None = None) -> FlushReport:
        """Returns when everything written by any program so far is on the hosts, as the report says."""
        answer = self._ask(Flush(), progress)
        if not isinstance(answer, FlushedAnswer):
            raise _unexpected(answer)
        return _report(answer)

    def drain(self, progress: ShowProgress | None = None) -> FlushReport | None:
        """For after an unmount: the report of the process's last flush, once the process has let go of the volume. None if it ended
        without one."""
        failure: FusefsError | None = None
        answer: AnyAnswer | None = None
        try:
            try:
                answer = self._ask(Drain(), progress)
            except FusefsError as error:
                failure = error  # known; the end of the process is still to come
            while self._receive_rest():
                continue
        except (ConnectionError, EOFError):
            pass
        if failure is not None:
            raise failure
        if answer is None:
            return None
        if not isinstance(answer, FlushedAnswer):
            raise _unexpected(answer)
        return _report(answer)

    def _receive_rest(self) -> bool:
        """False at the end of the process."""
        try:
            return bool(self._connection.recv(4096))
        except TimeoutError:
            return not is_dying(peer_pid(self._connection))

    def worm(self, ino: int) -> None:
        """`ino`: the inode number of a directory on the mount."""
        self._done(Worm(ino=ino))

    def conclude(self, host: str, seconds: float) -> str:
        """The new contract's id."""
        return self._contract(Conclude(host=host, seconds=seconds))

    def mark(self, host: str, state: Literal["lost", "leave", "back"]) -> None:
        """Say that a host is lost for good, is being left, or is back after all; durable when it returns. NotFound, BadArgument."""
        self._done(Mark(host=host, state=state))

    def add_host(self, url: str, seconds: float | None = None) -> int:
        """A host more, under a contract of that length, or as long as the volume's are. Its number."""
        answer = self._ask(AddHost(url=url, seconds=seconds))
        if not isinstance(answer, HostAnswer):
            raise _unexpected(answer)
        return answer.number

    def repair(self, progress: ShowProgress | None = None) -> RepairStatus:
        """Every sector that can be is at its replication when it returns."""
        answer = self._ask(Repair(), progress)
        if not isinstance(answer, RepairedAnswer):
            raise _unexpected(answer)
        return answer.repair

    def replication(self, ino: int) -> ReplicationStatus:
        """Of a directory or file on the mount, and how what is below it is stored."""
        answer = self._ask(GetReplication(ino=ino))
        if not isinstance(answer, ReplicationAnswer):
            raise _unexpected(answer)
        return answer.replication

    def replicate(
        self, ino: int, spec: str, *, now: bool = False, wait: bool = False, progress: ShowProgress | None = None
    ) -> RewriteStatus:
        """Set it for what is created below; `now`: also for what is there; `wait`: until that has been moved."""
        answer = self._ask(Replicate(ino=ino, spec=spec, now=now, wait=wait), progress)
        if not isinstance(answer, RewrittenAnswer):
            raise _unexpected(answer)
        return answer.rewrite

    def scrub(self, full: bool, sample: float, progress: ShowProgress | None = None) -> ScrubReport:
        """Every copy was looked at when it returns. `progress` is in sectors. Busy: another scrub is under way."""
        answer = self._ask(Scrub(full=full, sample=sample), progress)
        if not isinstance(answer, ScrubbedAnswer):
            raise _unexpected(answer)
        return answer.report

    def renew(self, contract_id: str, seconds: float) -> str:
        """The new contract's id."""
        return self._contract(Renew(contract_id=contract_id, seconds=seconds))

    def renew_all(self) -> list[RenewalStatus]:
        """Every contract that is due is renewed; what became of each host's."""
        answer = self._ask(RenewAll())
        if not isinstance(answer, RenewedAnswer):
            raise _unexpected(answer)
        return answer.hosts

    def stop(self) -> None:
        """Unmount, as SIGTERM does. Busy where a program uses the mount."""
        self._done(Stop())

    # ----------------------------------------------------------------------------------------------------------------

    def _contract(self, request: Request) -> str:
        answer = self._ask(request)
        if not isinstance(answer, ContractAnswer):
            raise _unexpected(answer)
        return answer.contract_id

    def _done(self, request: Request) -> None:
        answer = self._ask(request)
        if not isinstance(answer, DoneAnswer):
            raise _unexpected(answer)

    def _ask(self, request: Request, progress: ShowProgress | None = None) -> AnyAnswer:
        """EOFError, ConnectionError: the process ended. Unavailable: it does not answer within `ANSWER_SECONDS`.

        What takes as long as hosts take (flush, drain, repair, scrub) or files are many (replication) has no such limit: it is waited
        for as long as the process lives, and whoever waits sees the progress.
        """
        endless = isinstance(request, Flush | Drain | Repair | Scrub | GetReplication | Replicate)
        limit = None if endless else time.monotonic() + ANSWER_SECONDS
        try:
            self._connection.sendall(encode(request))
        except BrokenPipeError:
            pass  # refused before it was asked: the reason can still be read
        while True:
            answer = decode_answer(self._line(limit))
            if isinstance(answer, Progress):
                if progress is not None:
                    progress(answer.done, answer.total)
                continue
            if isinstance(answer, ErrorAnswer):
                raise error_of(answer.kind, answer.message)
            return answer

    def _line(self, limit: float | None) -> bytes:
        while (end := self._received.find(b"\n")) < 0:
            if len(self._received) > MAX_ANSWER:
                raise BadArgument("the mount's answer is too long to be one")
            try:
                chunk = self._connection.recv(65536)
            except TimeoutError:
                if is_dying(peer_pid(self._connection)):
                    # Its socket outlives it as long as one of its threads is stuck in the kernel.
                    raise EOFError("the mount was killed") from None
                if limit is not None and time.monotonic() >= limit:
                    raise Unavailable(
                        f"process {peer_pid(self._connection)}, which serves the mount, has not answered for {ANSWER_SECONDS:.0f} s; "
                        "see its log, and try again"
                    ) from None
                continue
            if not chunk:
                raise EOFError("the mount ended")
            self._received += chunk
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line


def _report(answer: FlushedAnswer) -> FlushReport:
    return FlushReport(answer.degraded_sectors, tuple(answer.reasons))


def _unexpected(answer: AnyAnswer) -> BadArgument:
    return BadArgument(f"the mount answered with {type(answer).__name__}, which was not asked for; is it of another version?")
