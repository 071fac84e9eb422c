"""From the start of the process to the first line of a command: the imports, which take their time.

Imports as little as it can, and the rest inside `main`: until that runs, Ctrl-C is Python's own, with a traceback. A command's own module
is imported once it is known which one it is (`app`), and what only works on a volume that is not mounted (trio, `storage`, the libraries
of hosts) by whoever opens one.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

_INTERRUPTED = 128 + signal.SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command (default: of `sys.argv`); returns its exit status and never raises. Ctrl-C while it starts: status 130."""
    try:
        fill_standard_descriptors()
        with importing():
            from fusefs.cli import app
        return app.main(arguments)
    except KeyboardInterrupt:  # in the moments that neither handler covers
        _say_interrupted()
        return _INTERRUPTED


def fill_standard_descriptors() -> None:
    """Open the null device where the caller closed descriptor 0, 1 or 2 (`fusefs cat ... >&-`).

    Otherwise the next file opened, of the volume even, would get that number, and what is meant for the terminal would be written
    into it. Reading standard input and writing standard output then fail (EBADF), as they must; messages have nobody to reach.
    """
    # In this order, since open(2) gives the lowest free number. The wrong way round on purpose: 0 cannot be read, 1 not be written.
    for descriptor, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, flags)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)
    # None is what Python makes of a descriptor that is closed when it starts.
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - for the life of the process
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


@contextmanager
def importing() -> Iterator[None]:
    """While the body imports, Ctrl-C ends the process at once: there is nothing to close yet. For imports while nothing is open.

    Not by an exception, which importlib's callbacks would print and drop. Where SIGINT is ignored or somebody else's, it stays so: inside
    `session.run` a signal cancels, at the next checkpoint.
    """
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        if ours:
            signal.signal(signal.SIGINT, _end)
    except ValueError:  # not the main thread, which alone gets signals
        ours = False
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a signal handler's signature
    _say_interrupted()
    os._exit(_INTERRUPTED)


def _say_interrupted() -> None:
    try:
        os.write(2, b"fusefs: interrupted\n")
    except OSError:
        return  # nobody is left to tell
