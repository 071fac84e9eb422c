"""What a person sees: sizes, times, tables, progress bars, and names that cannot play tricks on a terminal.

Results go to standard output, everything else to standard error. Colours, bars and boxes appear only on a terminal;
anywhere else the same text comes out plain: columns padded with spaces, one record a line, and rich is not even imported.
"""

from __future__ import annotations

import datetime
import errno
import os
import select
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from storage.errors import IOFailure, NoSpace

#: Called with (done, in all or None where nobody knows), in bytes unless the bar says otherwise.
Advance = Callable[[int, int | None], None]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def human_bytes(count: int) -> str:
    """`1536` -> `1.5 KiB`: three or four significant figures in binary units."""
    value = float(count)
    unit = 0
    # 1023.95 would be printed as 1024.0: the next unit is the honest one then.
    while abs(value) >= (1024 if unit == 0 else 1023.95) and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{count} B"


def human_span(seconds: float) -> str:
    """A length of time to one sensible unit: `40 seconds`, `3 hours`, `89 days`."""
    seconds = abs(seconds)
    for limit, divisor, name in ((120, 1, "second"), (7200, 60, "minute"), (172800, 3600, "hour")):
        if seconds < limit:
            count = int(seconds / divisor)
            return f"{count} {name}{'' if count == 1 else 's'}"
    return f"{int(seconds / 86400)} days"


def human_time(ns: int) -> str:
    """Local date and time to the minute."""
    try:
        return datetime.datetime.fromtimestamp(ns / 1e9).astimezone().strftime("%Y-%m-%d %H:%M")
    except (OverflowError, OSError, ValueError):
        return f"{ns / 1e9:.0f}"


def printable(text: str) -> str:
    """The text on one line, with control characters and undecodable bytes as backslash escapes.

    File names are any bytes: printed as they are they could move the cursor, change colours or fake a second line.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(c: str) -> str:
    code = ord(c)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape: a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return c.encode("unicode_escape", "surrogatepass").decode("ascii") if code < 0xD800 or code > 0xDFFF else f"\\u{code:04x}"


def say(message: str) -> None:
    """One line on standard error, for the person; never part of a result."""
    sys.stderr.write(f"fusefs: {printable(message)}\n")
    sys.stderr.flush()


class OutputClosed(Exception):
    """Whoever read standard output has gone (`fusefs cat ... | head`): the command ends, quietly."""


@contextmanager
def standard_output() -> Iterator[None]:
    """Turns what writing to standard output raises into OutputClosed or a kind of `storage.errors`."""
    try:
        yield
    except BrokenPipeError:
        raise OutputClosed from None
    except OSError as error:
        kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else IOFailure
        reason = "it is closed" if error.errno == errno.EBADF else error.strerror
        raise kind(f"standard output cannot be written: {reason}") from error


def write_line(text: str = "") -> None:
    """One line of a result on standard output. OutputClosed, NoSpace, IOFailure."""
    with standard_output():
        sys.stdout.write(text + "\n")


def flush_output() -> None:
    """Everything written so far has left this process. OutputClosed, NoSpace, IOFailure."""
    with standard_output():
        sys.stdout.flush()


def out_is_terminal() -> bool:
    return sys.stdout.isatty()


def write_bytes(data: bytes) -> None:
    """All of `data` to standard output, blocking; also where somebody left it non-blocking. OutputClosed, NoSpace, IOFailure."""
    flush_output()
    rest = memoryview(data)
    with standard_output():
        while rest:
            try:
                rest = rest[os.write(1, rest) :]
            except BlockingIOError:
                select.select([], [1], [])


def style(text: str, how: str) -> str:
    """The text in a rich style such as `bold yellow`, if standard output is a terminal that shows it."""
    if not out_is_terminal():
        return text
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout)
    with console.capture() as capture:
        console.print(Text(text, style=how), end="", soft_wrap=True)
    return capture.get()


def write_record(text: str, name: str) -> None:
    """`text` and a file name on one line: the name as its own bytes for another program, escaped for a terminal."""
    if out_is_terminal():
        write_line(text + printable(name))
        return
    with standard_output():
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode() + os.fsencode(name) + b"\n")


def write_table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """A table on standard output; `right` are the numbers of right-aligned columns. Cells are escaped here, and never broken: where a row
    is wider than the terminal, that breaks the line, and what is copied from there (a URL, a path) is whole."""
    cells = [[printable(cell) for cell in row] for row in rows]
    width_of: Callable[[str], int] = len
    if out_is_terminal():
        from rich.cells import cell_len

        # Of what is read by programs each character counts as one.
        width_of = cell_len
    widths = [max(width_of(line[number]) for line in [list(headers), *cells]) for number in range(len(headers))]
    for at, line in enumerate([list(headers), *cells]):
        padded: list[str] = []
        for number, (cell, width) in enumerate(zip(line, widths, strict=True)):
            space = " " * (width - width_of(cell))
            padded.append(space + cell if number in right else cell + space)
        text = "  ".join(padded).rstrip()
        write_line(style(text, "bold") if at == 0 else text)


def mode_letters(mode: int) -> str:
    """`-rw-r--r--`, as ls(1)."""
    return stat.filemode(mode)


def _no_bar(done: int, total: int | None) -> None:  # noqa: ARG001 - an Advance that shows nothing
    return


@contextmanager
def progress_bar(label: str, total: int | None = None, *, show: bool = True, unit: str = "") -> Iterator[Advance]:
    """A bar on standard error while the body runs, gone when it ends; nothing at all where that is no terminal. `unit`: what it counts,
    if not bytes."""
    if not show or not sys.stderr.isatty():
        yield _no_bar
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counted = (MofNCompleteColumn(), TextColumn(unit)) if unit else (DownloadColumn(binary_units=True), TransferSpeedColumn())
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), *counted, TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(printable(label), total=total)
        yield lambda done, total: bar.update(task, completed=done, total=total)
