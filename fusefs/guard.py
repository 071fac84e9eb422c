"""Rule R1: nothing but FUSEError leaves a handler.

pyfuse3 answers a FUSEError with its errno. Any other exception ends its main loop, and every program on the mount gets ECONNABORTED. So
each
handler is wrapped: kinds of `storage.errors` go through the table, and a bug costs one request an EIO and the log a traceback.
`trio.Cancelled` is no `Exception` and passes.
"""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pyfuse3

from fusefs.errno_map import errno_of
from fusefs.ratelimit import RateLimit
from storage.errors import Corrupt, Expired, Fenced, FusefsError, IOFailure, NoSpace, NotPermitted, Unavailable

log = logging.getLogger(__name__)

Handler = TypeVar("Handler", bound=Callable[..., Awaitable[Any]])

#: Kinds that an administrator should hear of, not only the program that ran into them.
WORTH_A_LINE = (NoSpace, Corrupt, Unavailable, Expired, Fenced, IOFailure)

_limit = RateLimit(burst=20, per_second=1.0)


def answer(name: str, error: Exception) -> pyfuse3.FUSEError:
    """The FUSEError that stands for `error` in the handler called `name`; logs what deserves it."""
    if isinstance(error, pyfuse3.FUSEError):
        return error
    if isinstance(error, FusefsError):
        if isinstance(error, WORTH_A_LINE):
            skipped = _limit.admit()
            if skipped is not None:
                log.warning("%s: %s%s", name, error, f" ({skipped} similar messages left out)" if skipped else "")
        return pyfuse3.FUSEError(errno_of(error))
    log.error("bug in the handler of %s: the program got EIO", name, exc_info=error)
    return pyfuse3.FUSEError(errno.EIO)


def guarded(handler: Handler) -> Handler:
    """Wrap a handler of `Operations`. NotPermitted is also handed to the instance's `refused(handler name, arguments, error)`."""
    name = handler.__name__

    @functools.wraps(handler)
    async def guard(self: Any, *args: Any) -> Any:
        try:
            return await handler(self, *args)
        except pyfuse3.FUSEError:
            raise
        except NotPermitted as error:
            try:
                self.refused(name, args, error)
            except Exception:
                log.exception("could not record the refusal of %s", name)
            raise pyfuse3.FUSEError(errno.EPERM) from None
        except Exception as error:  # noqa: BLE001  rule R1
            raise answer(name, error) from None

    return guard  # type: ignore[return-value]
