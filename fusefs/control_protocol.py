"""What goes over the control socket: one JSON object per line, both ways.

| line          | fields                                                                                          |
|---------------|-------------------------------------------------------------------------------------------------|
| request       | {"version": 1, "type": NAME, ...}; one per line, at most MAX_REQUEST bytes with its newline       |
| progress      | {"type": "progress", "done": bytes, "total": bytes}; any number before an answer that takes long, |
|               | of a scrub in sectors instead of bytes                                                          |
| answer        | {"type": NAME, ...}: status, flushed, contract, renewed, host, repaired, replication, rewritten, |
|               | scrubbed or done, with its fields                                                               |
| error         | {"type": "error", "kind": name of a class in storage.errors, "message": one line}                 |

Requests are answered in order. After an unreadable request the connection is closed behind the error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from storage import RenewalStatus, RepairStatus, ReplicationStatus, RewriteStatus, ScrubReport, VolumeStatus, errors
from storage.errors import BadArgument, FusefsError

VERSION = 1
SOCKET_NAME = "control.sock"
#: A path has at most 4096 bytes, each at most six characters of JSON.
MAX_REQUEST = 32 * 1024
#: For the client: a status with every refusal and many hosts is far below.
MAX_ANSWER = 16 * 1024 * 1024

Text = Annotated[str, Meta(min_length=1, max_length=4096)]
Duration = Annotated[float, Meta(ge=1.0, le=100 * 366 * 86400.0)]


def socket_address(directory_fd: int) -> str:
    """An address of the socket in an open directory: a socket's own path may have only 107 bytes."""
    return f"/proc/self/fd/{directory_fd}/{SOCKET_NAME}"


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Base of all requests."""

    version: int = VERSION


class GetStatus(Request, frozen=True, tag="status"):
    """-> StatusAnswer"""


class Flush(Request, frozen=True, tag="flush"):
    """Dirty pages, tails, hosts: -> progress..., FlushedAnswer"""


class Drain(Request, frozen=True, tag="drain"):
    """Wait for the process to finish after an unmount: -> progress..., FlushedAnswer; then the connection ends when the volume is free."""


class Worm(Request, frozen=True, tag="worm", kw_only=True):
    """Make a directory worm. Its inode number, as stat shows it. -> DoneAnswer"""

    ino: Annotated[int, Meta(ge=1, le=2**63 - 1)]


class Conclude(Request, frozen=True, tag="conclude", kw_only=True):
    """-> ContractAnswer"""

    host: Text
    seconds: Duration


class Renew(Request, frozen=True, tag="renew", kw_only=True):
    """-> ContractAnswer"""

    contract_id: Text
    seconds: Duration


class RenewAll(Request, frozen=True, tag="renew_all"):
    """Renew every contract that is due: -> RenewedAnswer"""


class Mark(Request, frozen=True, tag="mark", kw_only=True):
    """A host is lost for good, is being left, or is back after all: -> DoneAnswer"""

    host: Text
    state: Literal["lost", "leave", "back"]


class AddHost(Request, frozen=True, tag="add_host", kw_only=True):
    """One host more, with a contract of that length, or the volume's own: -> HostAnswer"""

    url: Text
    seconds: Duration | None = None


class Repair(Request, frozen=True, tag="repair"):
    """Bring every sector to its replication now: -> progress..., RepairedAnswer"""


class GetReplication(Request, frozen=True, tag="replication", kw_only=True):
    """What holds for a directory or file, and how what is below is stored: -> ReplicationAnswer"""

    ino: Annotated[int, Meta(ge=1, le=2**63 - 1)]


class Replicate(Request, frozen=True, tag="replicate", kw_only=True):
    """Set it; "" inherits. `now`: for what is there as well; `wait`: until that is moved. -> progress..., RewrittenAnswer"""

    ino: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    spec: Annotated[str, Meta(max_length=15)]
    now: bool = False
    wait: bool = False


class Scrub(Request, frozen=True, tag="scrub", kw_only=True):
    """Look at every copy (of a share `sample` of the sectors) now, at a block or, with `full`, at the whole; ends with the connection:
    -> progress..., ScrubbedAnswer"""

    full: bool = False
    sample: Annotated[float, Meta(gt=0, le=1)] = 1.0


class Stop(Request, frozen=True, tag="stop"):
    """Unmount, as SIGTERM does: -> DoneAnswer once the kernel has unmounted."""


AnyRequest = (
    GetStatus | Flush | Drain | Worm | Conclude | Renew | RenewAll | Mark | AddHost | Repair | GetReplication | Replicate | Scrub | Stop
)


class MountStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A mount and its volume. `phase`: starting, mounted, flushing (unmounted, and on its way to the hosts), closing."""

    pid: int
    mountpoint: str
    phase: str
    options: str
    open_handles: int
    flush_done: int
    flush_total: int
    volume: VolumeStatus


class Answer(msgspec.Struct, frozen=True, tag=True):
    """Base of all answers."""


class Progress(Answer, frozen=True, tag="progress", kw_only=True):
    done: int
    total: int


class StatusAnswer(Answer, frozen=True, tag="status", kw_only=True):
    status: MountStatus


class FlushedAnswer(Answer, frozen=True, tag="flushed", kw_only=True):
    degraded_sectors: int
    reasons: list[str]


class ContractAnswer(Answer, frozen=True, tag="contract", kw_only=True):
    contract_id: str


class RenewedAnswer(Answer, frozen=True, tag="renewed", kw_only=True):
    hosts: list[RenewalStatus]


class HostAnswer(Answer, frozen=True, tag="host", kw_only=True):
    number: int


class RepairedAnswer(Answer, frozen=True, tag="repaired", kw_only=True):
    repair: RepairStatus


class ReplicationAnswer(Answer, frozen=True, tag="replication", kw_only=True):
    replication: ReplicationStatus


class RewrittenAnswer(Answer, frozen=True, tag="rewritten", kw_only=True):
    rewrite: RewriteStatus


class ScrubbedAnswer(Answer, frozen=True, tag="scrubbed", kw_only=True):
    report: ScrubReport


class DoneAnswer(Answer, frozen=True, tag="done"):
    pass


class ErrorAnswer(Answer, frozen=True, tag="error", kw_only=True):
    kind: str
    message: str


AnyAnswer = (
    Progress
    | StatusAnswer
    | FlushedAnswer
    | ContractAnswer
    | RenewedAnswer
    | HostAnswer
    | RepairedAnswer
    | ReplicationAnswer
    | RewrittenAnswer
    | ScrubbedAnswer
    | DoneAnswer
    | ErrorAnswer
)

_requests: msgspec.json.Decoder[AnyRequest] = msgspec.json.Decoder(AnyRequest)
_answers: msgspec.json.Decoder[AnyAnswer] = msgspec.json.Decoder(AnyAnswer)
_encoder = msgspec.json.Encoder()


def encode(message: Request | Answer) -> bytes:
    """One line. What is no text (a path's bytes that are not UTF-8) is escaped."""
    try:
        return _encoder.encode(message) + b"\n"
    except UnicodeEncodeError:
        return _encoder.encode(_escaped(msgspec.to_builtins(message))) + b"\n"


def _escaped(part: Any) -> Any:
    if isinstance(part, str):
        return part.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(part, dict):
        return {key: _escaped(value) for key, value in part.items()}
    return [_escaped(value) for value in part] if isinstance(part, list | tuple) else part


def decode_request(line: bytes) -> AnyRequest:
    """BadArgument for anything that is not a request of this version."""
    try:
        request = _requests.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadArgument(f"not a request: {error}") from None
    if request.version != VERSION:
        raise BadArgument(
            f"request of version {request.version}; this mount speaks version {VERSION}: use the fusefs command it was started with"
        )
    return request


def decode_answer(line: bytes) -> AnyAnswer:
    """BadArgument for anything that is not an answer."""
    try:
        return _answers.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadArgument(f"the mount's answer cannot be read ({error}); is it of another version?") from None


def error_answer(error: FusefsError) -> ErrorAnswer:
    return ErrorAnswer(kind=type(error).__name__, message=str(error))


def error_of(kind: str, message: str) -> FusefsError:
    """The exception that an error answer stands for; FusefsError where the kind is unknown here."""
    message = message or f"{kind or 'an error'}, without a reason"
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, FusefsError):
        return found(message)
    return FusefsError(message)
