"""Where a recovery phrase comes from: `--phrase-file`, or with `--phrase` the environment, else a question on the terminal.

Like a passphrase never from an argument, which every process of the machine could read in the process table.
"""

from __future__ import annotations

import getpass
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from fusefs.cli.output import say
from storage.errors import BadArgument, NotFound

F = TypeVar("F", bound=Callable[..., Any])

ENVIRONMENT = "FUSEFS_PHRASE"
#: Bytes of a file with a phrase: far more than any has.
MAX_LENGTH = 10_000


def phrase_options(command: F) -> F:
    """`--phrase` and `--phrase-file FILE`."""
    flag = click.option("--phrase", is_flag=True, help=f"Use the 24 words instead of the passphrase: from {ENVIRONMENT}, else asked for.")
    file = click.option(
        "--phrase-file", type=click.Path(path_type=Path), metavar="FILE", help="Use the 24 words in FILE instead of the passphrase."
    )
    return file(flag(command))


def recovery_phrase(wanted: bool, file: Path | None) -> str:
    """The phrase, unchecked; "" if neither option was given. BadArgument, NotFound."""
    if file is not None:
        text = _contents(file)
    elif wanted:
        # Taken out: no process that this one starts inherits it.
        given = os.environ.pop(ENVIRONMENT, None)
        text = given if given is not None else _ask()
    else:
        return ""
    if not text.strip():
        raise BadArgument("the recovery phrase is empty: give its 24 words")
    return text


def _contents(file: Path) -> str:
    """The whole file, in which the words may stand on several lines. Said aloud, not refused, where others can read it."""
    try:
        with open(file, "rb") as stream:
            info = os.fstat(stream.fileno())
            text = stream.read(MAX_LENGTH + 1)
    except FileNotFoundError:
        raise NotFound(f"phrase file {file} does not exist") from None
    except OSError as error:
        raise BadArgument(f"phrase file {file} cannot be read: {error.strerror}") from None
    if stat.S_ISREG(info.st_mode) and info.st_mode & stat.S_IROTH:
        say(f"warning: phrase file {file} can be read by every user: chmod 600 it")
    if len(text) > MAX_LENGTH:
        raise BadArgument(f"phrase file {file}: it is longer than any phrase")
    return text.decode("utf-8", "surrogateescape")


def _ask() -> str:
    # The terminal itself, as for passphrases.
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        raise BadArgument(f"no phrase and no terminal to ask at: give --phrase-file FILE or set {ENVIRONMENT}") from None
    try:
        return getpass.getpass("Recovery phrase (24 words): ")
    except EOFError:
        raise BadArgument("no recovery phrase was given") from None
