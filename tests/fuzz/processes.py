"""Targets of what processes tell each other: control socket, mount process, mount table, mount options."""

from __future__ import annotations

import io
import os
import socket
from typing import Any, cast

import msgspec
import trio
import trio.testing

from fusefs.control import ControlServer, MountState
from fusefs.control_client import ControlClient
from fusefs.control_protocol import (
    Answer,
    AnyRequest,
    Conclude,
    ContractAnswer,
    DoneAnswer,
    Drain,
    ErrorAnswer,
    Flush,
    FlushedAnswer,
    GetStatus,
    Progress,
    Renew,
    Stop,
    Worm,
    decode_answer,
    decode_request,
    encode,
    error_of,
)
from fusefs.daemon import Order, Report, decode_report, pack, read_order, unpack
from fusefs.mounts import decode_source, encode_source, parse_mountinfo
from fusefs.options import MountOptions
from storage.errors import BadArgument, FusefsError, Unavailable
from tests.fuzz.target import Target

_REQUESTS = (
    GetStatus(),
    Flush(),
    Drain(),
    Worm(ino=5),
    Conclude(host="dir:/x", seconds=60.0),
    Renew(contract_id="ab" * 16, seconds=1e6),
    Stop(),
)
_ANSWERS = (
    Progress(done=1, total=2),
    FlushedAnswer(degraded_sectors=1, reasons=["host 1 is away"]),
    ContractAnswer(contract_id="ab" * 16),
    DoneAnswer(),
    ErrorAnswer(kind="NotFound", message="there is none"),
    ErrorAnswer(kind="Exception", message="no kind of ours"),
)


def _lines(messages: tuple[Any, ...]) -> list[bytes]:
    return [encode(message) for message in messages]


# --------------------------------------------------------------------------------------------------------------------
# The control socket


def _request(data: bytes) -> None:
    request = decode_request(data)
    if decode_request(encode(request)) != request:
        raise AssertionError("a request that reads otherwise when it is written again")


def _answer(data: bytes) -> None:
    answer = decode_answer(data)
    if decode_answer(encode(answer)) != answer:
        raise AssertionError("an answer that reads otherwise when it is written again")
    if isinstance(answer, ErrorAnswer):
        raise error_of(answer.kind, answer.message)


class _Server(ControlServer):
    """Answers as a mount would, without one."""

    async def _answer(self, stream: trio.SocketStream, request: AnyRequest) -> Answer:
        if isinstance(request, Worm | Conclude | Renew):
            raise BadArgument("no")
        return DoneAnswer()


def _session(data: bytes) -> None:
    """A whole connection: every line is answered by a line, and it ends however the peer behaves."""

    async def converse() -> bytes:
        ours, theirs = trio.testing.memory_stream_pair()
        server = _Server(cast(MountState, None))
        answers = b""
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                with trio.move_on_after(100.0):  # virtual seconds: a drain is held open
                    await server._converse(cast(trio.SocketStream, ours))
                await ours.aclose()

            nursery.start_soon(serve)
            try:
                await theirs.send_all(data)
                await theirs.send_eof()
            except trio.BrokenResourceError:
                pass  # it closed behind an error, as it says
            async for chunk in theirs:
                answers += chunk
        return answers

    answers = trio.run(converse, clock=trio.testing.MockClock(autojump_threshold=0))
    for line in answers.split(b"\n")[:-1]:
        decode_answer(line)
    if answers and not answers.endswith(b"\n"):
        raise AssertionError("half an answer")


def _client(data: bytes) -> None:
    """What a mount (or what has taken its place) says to the command line."""
    ours, theirs = socket.socketpair()
    with theirs, ControlClient(ours) as client:
        theirs.settimeout(5.0)
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        ours.settimeout(5.0)
        client.flush(lambda done, total: None)


# --------------------------------------------------------------------------------------------------------------------
# The mount process


def _order(data: bytes) -> None:
    order = read_order(io.BytesIO(data))
    texts = (
        order.volume,
        order.mountpoint,
        order.passphrase,
        order.volume_id,
        order.phrase,
        *order.options,
        *order.hosts,
        order.log_file or "",
    )
    for text in texts:
        if pack(unpack(text)) != text:
            raise AssertionError(f"{text!r} does not come through")
    MountOptions.parse([unpack(option) for option in order.options])


def _order_seeds() -> list[bytes]:
    odd = pack(b"/odd \xff\xc3\xa9".decode("utf-8", "surrogateescape"))
    orders = (Order("/v", "/m", "secret", [], None, 5), Order(odd, odd, odd, ["ro", "cache=5M"], odd, 9))
    return [msgspec.json.encode(order) for order in orders]


def _report(data: bytes) -> None:
    report = decode_report(data)
    error = error_of(report.kind, report.message)
    if not isinstance(error, FusefsError):
        raise AssertionError(f"{error!r} is no error of ours")


def _report_seeds() -> list[bytes]:
    return [msgspec.json.encode(report) + b"\n" for report in (Report("note", message="x"), Report("ready"), Report("error", "Busy", "m"))]


def _mountinfo(data: bytes) -> None:
    for mount in parse_mountinfo(data):
        if decode_source(encode_source(mount.volume)) != mount.volume:
            raise AssertionError(f"{mount.volume!r} does not come through")
        os.path.realpath(mount.volume)
        os.path.realpath(mount.mountpoint)


_MOUNTINFO = (
    b"36 35 98:0 / /mnt rw,noatime master:1 - ext3 /dev/root rw\n"
    b"40 35 0:55 / /mnt/a\\040b rw - fuse.fusefs /srv/vol%20ume rw,user_id=0\n41 35 0:56 / /m rw shared:5 - fuse.fusefs %ff rw\n"
)


def _options(data: bytes) -> None:
    options = MountOptions.parse([part.decode("utf-8", "surrogateescape") for part in data.split(b"\n")])
    options.text()
    options.kernel_options("source")


TARGETS = (
    Target("control_request", _request, lambda: _lines(_REQUESTS), (BadArgument,), "json"),
    Target("control_answer", _answer, lambda: _lines(_ANSWERS), (FusefsError,), "json"),
    Target("control_session", _session, lambda: [b"".join(_lines(_REQUESTS)), *_lines(_REQUESTS), b"x" * 16000, b"\n\n"], rounds=500),
    Target("control_client", _client, lambda: [b"".join(_lines(_ANSWERS)), *_lines(_ANSWERS)], (FusefsError, EOFError, ConnectionError)),
    Target("daemon_order", _order, _order_seeds, (BadArgument,), "json"),
    Target("daemon_report", _report, _report_seeds, (Unavailable,), "json"),
    Target("mountinfo", _mountinfo, lambda: [_MOUNTINFO]),
    Target(
        "mount_options",
        _options,
        lambda: [b"ro,noatime,cache=512M,commit_interval=2.5", b"link=deny\nfsync=local,allow_other", b"x-y,defaults"],
        (BadArgument,),
    ),
)
