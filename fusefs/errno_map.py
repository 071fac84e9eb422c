"""The one table from kinds of errors to errno."""

from __future__ import annotations

import errno

from storage import errors

ERRNO_OF_KIND: dict[type[errors.FusefsError], int] = {
    errors.FusefsError: errno.EIO,
    errors.NotFound: errno.ENOENT,
    errors.Exists: errno.EEXIST,
    errors.NotPermitted: errno.EPERM,
    errors.NoSpace: errno.ENOSPC,
    errors.Busy: errno.EBUSY,
    errors.Fenced: errno.EROFS,
    errors.Corrupt: errno.EIO,
    errors.Unavailable: errno.EIO,
    errors.Expired: errno.EIO,
    errors.BadArgument: errno.EINVAL,
    errors.WrongPassphrase: errno.EACCES,
    errors.NotEmpty: errno.ENOTEMPTY,
    errors.NotADirectory: errno.ENOTDIR,
    errors.IsADirectory: errno.EISDIR,
    errors.NameTooLong: errno.ENAMETOOLONG,
    errors.TooManyLinks: errno.EMLINK,
    errors.IOFailure: errno.EIO,
}


def errno_of(error: errors.FusefsError) -> int:
    """What a program gets for `error`: the entry of its kind, or of the nearest kind above it."""
    for kind in type(error).__mro__:
        number = ERRNO_OF_KIND.get(kind)
        if number is not None:
            return number
    return errno.EIO
