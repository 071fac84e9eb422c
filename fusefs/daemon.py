"""A mount in the background, and where log lines go.

The process that serves is a new one, `python -m fusefs.daemon VOLUME MOUNTPOINT`, in a session of its own; nothing of a volume is open
across
a fork. The passphrase goes over its standard input, never through arguments or environment. It reports over a pipe: lines of JSON, "note"
any
number of times, then "ready" or "error".
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from fusefs.control_protocol import error_of
from fusefs.options import MountOptions
from storage import ReadOnlySource
from storage.errors import BadArgument, FusefsError, Unavailable

log = logging.getLogger(__name__)

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
SYSLOG_FORMAT = "fusefs[%(process)d]: %(levelname)s %(name)s: %(message)s"
MAX_ORDER = 1 << 20
#: Environment variables that may hold a passphrase or a phrase (fusefs/cli/passphrase.py, fusefs/cli/phrase.py).
SECRETS = ("FUSEFS_PASSPHRASE", "FUSEFS_NEW_PASSPHRASE", "FUSEFS_PHRASE")


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the parent asks for, on the child's standard input.

    Paths and passphrases need not be UTF-8, JSON must be: each string stands for its bytes, one character each (`pack`, `unpack`).
    """

    #: "": none, the mount is made from `hosts`.
    volume: str
    mountpoint: str
    passphrase: str
    options: list[str]
    log_file: str | None
    report_fd: int
    hosts: list[str] = []
    volume_id: str = ""
    phrase: str = ""
    superblock: str = ""

    def __repr__(self) -> str:
        # Never the passphrase, nor the phrase.
        return f"<Order to mount {self.volume!r}>"


def pack(text: str) -> str:
    """For an `Order`: a string as it came from the operating system, its bytes as characters."""
    return text.encode("utf-8", "surrogateescape").decode("latin-1")


def unpack(packed: str) -> str:
    """What was packed; for what is no `Order`'s, BadArgument."""
    try:
        return packed.encode("latin-1").decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise BadArgument("the order for the mount process is not encoded as it should be") from None


class Report(msgspec.Struct, frozen=True):
    """A line from the child."""

    what: str
    kind: str = ""
    message: str = ""


def setup_logging(foreground: bool, log_file: Path | None, debug: bool = False) -> None:
    """To `log_file`, else to standard error in the foreground, else to syslog. BadArgument if the file cannot be written."""
    handler: logging.Handler
    text = FORMAT
    if log_file is not None:
        try:
            handler = logging.handlers.WatchedFileHandler(log_file, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise BadArgument(f"the log file {log_file} cannot be written: {error.strerror}") from None
    elif foreground or not os.path.exists("/dev/log"):
        handler = logging.StreamHandler(sys.stderr)
    else:
        handler = logging.handlers.SysLogHandler("/dev/log", facility=logging.handlers.SysLogHandler.LOG_DAEMON)
        text = SYSLOG_FORMAT
    handler.setFormatter(logging.Formatter(text))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    logging.getLogger("pyfuse3").setLevel(logging.INFO)  # its debug lines are several per request


def start(
    volume: Path, mountpoint: Path, passphrase: str, options: Sequence[str], log_file: Path | None, note: Callable[[str], None]
) -> int:
    """As `start_from`, for a volume's directory."""
    return start_from(ReadOnlySource(volume, passphrase=passphrase), mountpoint, options, log_file, note)


def start_from(source: ReadOnlySource, mountpoint: Path, options: Sequence[str], log_file: Path | None, note: Callable[[str], None]) -> int:
    """Mount in the background; returns the process id once the mount is usable. Raises what the child ran into, and then it is gone."""
    volume = os.path.abspath(source.path) if source.path is not None else ""
    read_fd, write_fd = os.pipe()
    try:
        # By paths, so that neither another working directory nor the mount point as one holds the mount.
        child = subprocess.Popen(
            # -P: modules are never taken from the working directory, which may be anybody's.
            [sys.executable, "-P", "-m", "fusefs.daemon", volume or "hosts", os.path.abspath(mountpoint)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(write_fd,),
            start_new_session=True,
            env=_environment(),
        )
    finally:
        os.close(write_fd)
    order = Order(
        volume=pack(volume),
        mountpoint=pack(os.path.abspath(mountpoint)),
        passphrase=pack(source.passphrase),
        options=[pack(option) for option in options],
        log_file=pack(os.path.abspath(log_file)) if log_file is not None else None,
        report_fd=write_fd,
        hosts=[pack(url) for url in source.hosts],
        volume_id=pack(source.volume_id),
        phrase=pack(source.phrase),
        superblock=pack(source.superblock),
    )
    if child.stdin is None or child.stderr is None:
        raise RuntimeError("no pipe to the child")
    try:
        with child.stdin:
            child.stdin.write(msgspec.json.encode(order))
    except BrokenPipeError:
        pass  # it ended at once; its report or its standard error says why
    with open(read_fd, "rb") as reports, child.stderr as said:
        for line in reports:
            report = decode_report(line)
            if report.what == "note":
                note(report.message)
            elif report.what == "ready":
                return child.pid
            else:
                child.wait()
                raise error_of(report.kind, report.message)
        last = said.read().decode("utf-8", "backslashreplace").strip().splitlines()
    child.wait()
    raise Unavailable(f"the mount process ended at once: {last[-1] if last else f'exit status {child.returncode}'}")


def decode_report(line: bytes) -> Report:
    """A line from the child; Unavailable if it is none (the child is broken, or of another version)."""
    try:
        return msgspec.json.decode(line, type=Report)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unavailable(f"the mount process says what cannot be read ({error}); see its log, and mount again") from None


def _environment() -> dict[str, str]:
    """So that the child imports the same packages, wherever it is started; passphrases, if they came that way, stay behind."""
    root = str(Path(__file__).resolve().parent.parent)
    environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [environment.get("PYTHONPATH")])])
    return environment


class Reporter:
    """The child's end of the pipe. Closed behind "ready" or "error"."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def send(self, report: Report) -> None:
        if self._fd < 0:
            return
        try:
            # Messages name paths, which need not be UTF-8.
            message = report.message.encode("utf-8", "backslashreplace").decode("utf-8")
            os.write(self._fd, msgspec.json.encode(Report(report.what, report.kind, message)) + b"\n")
        except BrokenPipeError:
            self._fd = -1  # whoever started us is gone: serve anyway
            return
        if report.what != "note":
            os.close(self._fd)
            self._fd = -1

    def note(self, message: str) -> None:
        log.info("%s", message)
        self.send(Report("note", message=message))

    def ready(self) -> None:
        # From here on nobody reads standard error: it must not fill up.
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 2)
        os.close(null)
        self.send(Report("ready"))

    def error(self, error: FusefsError) -> None:
        self.send(Report("error", kind=type(error).__name__, message=str(error)))


def read_order(stream: Any) -> Order:
    """BadArgument for anything that is not an order."""
    text = stream.read(MAX_ORDER + 1)
    if len(text) > MAX_ORDER:
        raise BadArgument("the order for the mount process is too long")
    try:
        return msgspec.json.decode(text, type=Order)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadArgument(f"fusefs.daemon is started by `fusefs mount`, not by hand ({error})") from None


def main() -> int:
    """The child."""
    # Not for the parent, which only starts it.
    from fusefs.serving import run

    try:
        order = read_order(sys.stdin.buffer)
    except BadArgument as error:
        print(f"fusefs: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_status
    reporter = Reporter(order.report_fd)
    os.set_inheritable(order.report_fd, False)
    try:
        options = MountOptions.parse([unpack(option) for option in order.options])
        setup_logging(False, Path(unpack(order.log_file)) if order.log_file else None, options.debug)
        os.chdir("/")
        if order.volume:
            source = ReadOnlySource(Path(unpack(order.volume)), passphrase=unpack(order.passphrase))
        else:
            hosts = tuple(unpack(url) for url in order.hosts)
            volume_id, passphrase, phrase = unpack(order.volume_id), unpack(order.passphrase), unpack(order.phrase)
            source = ReadOnlySource(None, hosts, volume_id, passphrase, phrase, unpack(order.superblock))
        run(source, Path(unpack(order.mountpoint)), options, reporter.ready, reporter.note)
    except FusefsError as error:
        log.error("%s", error)
        reporter.error(error)
        return error.exit_status
    except Exception as error:
        log.exception("the mount ended by a bug")
        reporter.error(FusefsError(f"the mount process ran into a bug ({type(error).__name__}: {error}); see its log"))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
