"""Where a passphrase comes from: `--passphrase-file`, else the environment, else a question on the terminal without echo.

It never comes from an argument, which every process of the machine could read in the process table.
"""

from __future__ import annotations

import getpass
import os
import stat
from pathlib import Path

from fusefs.cli.output import say
from storage.errors import BadArgument, NotFound

ENVIRONMENT = "FUSEFS_PASSPHRASE"
NEW_ENVIRONMENT = "FUSEFS_NEW_PASSPHRASE"
PHRASE_ENVIRONMENT = "FUSEFS_PHRASE"

#: Longest first line read from a passphrase file; anything longer is some other file.
MAX_LENGTH = 64 * 1024


def passphrase(file: Path | None, *, twice: bool = False) -> str:
    """The volume's passphrase; asked for twice where a typing error would lock the owner out. BadArgument, NotFound."""
    return _obtain(file, "--passphrase-file", ENVIRONMENT, "Passphrase", twice)


def new_passphrase(file: Path | None) -> str:
    """The passphrase that is to replace it."""
    return _obtain(file, "--new-passphrase-file", NEW_ENVIRONMENT, "New passphrase", twice=True)


def recovery_phrase(file: Path | None) -> str:
    """The 24 words, on one line."""
    return _obtain(file, "--phrase-file", PHRASE_ENVIRONMENT, "Recovery phrase (24 words)", twice=False)


def _obtain(file: Path | None, option: str, variable: str, question: str, twice: bool) -> str:
    if file is not None:
        return _checked(_first_line(file), f"first line of {file}")
    # Taken out: no process that this one starts (fusermount3, the mount in the background) inherits it.
    given = os.environ.pop(variable, None)
    if given is not None:
        return _checked(given, variable)
    return _checked(_ask(question, option, variable, twice), "passphrase")


def _checked(text: str, source: str) -> str:
    if not text:
        raise BadArgument(f"{source} is empty: a passphrase needs at least one character")
    return text


def _first_line(file: Path) -> str:
    """The file's first line without its newline. Said aloud, not refused, where others can read the file."""
    try:
        with open(file, "rb") as stream:
            info = os.fstat(stream.fileno())
            line = stream.readline(MAX_LENGTH + 1)
    except FileNotFoundError:
        raise NotFound(f"passphrase file {file} does not exist") from None
    except OSError as error:
        raise BadArgument(f"passphrase file {file} cannot be read: {error.strerror}") from None
    if stat.S_ISREG(info.st_mode) and info.st_mode & stat.S_IROTH:
        say(f"warning: passphrase file {file} can be read by every user: chmod 600 it")
    if len(line) > MAX_LENGTH:
        raise BadArgument(f"passphrase file {file}: its first line is longer than {MAX_LENGTH} bytes")
    # Bytes that are no UTF-8 become what they would be in the environment: the same passphrase, wherever it comes from.
    return line.removesuffix(b"\n").decode("utf-8", "surrogateescape")


def _ask(question: str, option: str, variable: str, twice: bool) -> str:
    # The terminal itself, not standard input: `fusefs put - NAME` reads its data from there. And never getpass's own
    # fallback, which would read an echoed line from whatever standard input is.
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        raise BadArgument(f"no passphrase and no terminal to ask at: give {option} FILE or set {variable}") from None
    try:
        answer = getpass.getpass(f"{question}: ")
        if twice and answer and getpass.getpass(f"{question} again: ") != answer:
            raise BadArgument("the two passphrases differ; nothing was changed")
    except EOFError:
        raise BadArgument("no passphrase was given") from None
    return answer
