"""What can go wrong, by *kind*.

Every error that leaves `storage` is one of these. A kind says what the caller can do about it, the
message names the file, sector, contract or host and the remedy, in one line. `fusefs/` maps kinds to
errno in one table; the command line prints the message and exits with `exit_status`. An exception of
any other type is a bug.
"""

from __future__ import annotations

import re

#: What would break a line, or drive a terminal. Messages name files, and say what hosts and other processes sent.
_CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029]")


class FusefsError(Exception):
    """Base of all errors a user, a program or an untrusted host can cause."""

    #: Exit status of the command line for this kind (1: anything without a status of its own).
    exit_status = 1
    #: True where the same call may succeed later without anybody changing anything.
    retry_helps = False

    def __str__(self) -> str:
        """The message: always one line of text, whatever it names; control characters are escaped."""
        return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), super().__str__())


class NotFound(FusefsError):
    """The named thing does not exist."""

    exit_status = 3


class Exists(FusefsError):
    """The named thing exists already, and must not."""

    exit_status = 4


class NotPermitted(FusefsError):
    """The append-only rules, a worm directory or a mount option forbid it."""

    exit_status = 5


class NoSpace(FusefsError):
    """A host, the journal, the staging area or a budget is full; nothing was stored."""

    exit_status = 6
    retry_helps = True


class Busy(FusefsError):
    """Somebody else holds it: a lock, a mount point, a conditional put that lost."""

    exit_status = 7
    retry_helps = True


class Fenced(FusefsError):
    """A later epoch exists, or the volume failed: this process may read and no longer write."""

    exit_status = 8


class Corrupt(FusefsError):
    """Bytes that do not verify. Never returned as data."""

    exit_status = 9


class Unavailable(FusefsError):
    """A host does not answer, or too few of them do."""

    exit_status = 10
    retry_helps = True


class Expired(FusefsError):
    """The contract named is not in force."""

    exit_status = 11


class BadArgument(FusefsError):
    """The caller asked for something that makes no sense; nothing was changed."""

    exit_status = 2


class WrongPassphrase(FusefsError):
    """No key slot opens with this passphrase."""

    exit_status = 12


class NotEmpty(FusefsError):
    """A directory still has entries."""

    exit_status = 13


class NotADirectory(BadArgument):
    """A directory was needed."""


class IsADirectory(BadArgument):
    """Something other than a directory was needed."""


class NameTooLong(BadArgument):
    """A name is longer than 255 bytes."""


class TooManyLinks(BadArgument):
    """An inode has as many links as the format can count."""


class IOFailure(FusefsError):
    """A local disk answered a read, write or flush with an error other than "full".

    After a failed flush of the journal nothing more is acknowledged: see `Fenced`.
    """

    exit_status = 14
