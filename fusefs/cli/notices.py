"""Warnings of the layers below, for the person at the terminal.

The layers log what went wrong and was survived: a damaged copy while another was good, a host that did not answer. A command that succeeds
says it, each thing once; one that fails has its one line to say, which names the cause.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from fusefs.cli.output import say

#: More different ones than this are counted, not shown.
SHOWN = 10


class Notices(logging.Handler):
    """Collects warnings while a command runs, in bounded memory."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        #: Message -> who logged it.
        self._messages: dict[str, str] = {}
        self._more = 0

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message in self._messages:
            return
        if len(self._messages) < SHOWN:
            # What is more than a warning is nobody's to take back.
            self._messages[message] = record.name if record.levelno <= logging.WARNING else ""
        else:
            self._more += 1

    def tell(self) -> None:
        """Say what was collected, and forget it."""
        for message in self._messages:
            say(f"warning: {message}")
        if self._more:
            say(f"warning: and {self._more} more")
        self.forget()

    def forget_of(self, *loggers: str) -> None:
        """Warnings of these are not so any more, or are told by the command in its own words."""
        self._messages = {message: name for message, name in self._messages.items() if name not in loggers}

    def forget(self) -> None:
        """For a command that has shown them in another way."""
        self._messages.clear()
        self._more = 0


@contextmanager
def collecting() -> Iterator[Notices]:
    """While the body runs, warnings are collected instead of printed by logging's last resort; FUSEFS_DEBUG=1 logs all at once."""
    handlers: list[logging.Handler] = [notices := Notices()]
    root = logging.getLogger()
    level = root.level
    if os.environ.get("FUSEFS_DEBUG") == "1":
        stream = logging.StreamHandler()
        stream.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handlers.append(stream)
        root.setLevel(logging.DEBUG)
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield notices
    finally:
        for handler in handlers:
            root.removeHandler(handler)
        root.setLevel(level)
