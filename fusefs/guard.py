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
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

import pyfuse3

from fusefs.errno_map import errno_of
from fusefs.ratelimit import RateLimit
from fusefs.receiver import Receiver
from storage import counted
from storage.errors import Corrupt, Expired, Fenced, FusefsError, IOFailure, NoSpace, NotPermitted, Unavailable

log = logging.getLogger(__name__)

Handler = TypeVar("Handler", bound=Callable[..., Coroutine[Any, Any, Any]])

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
                log.warning("%s: %s%s", name, error, f" ({counted(skipped, 'similar message')} left out)" if skipped else "")
        return pyfuse3.FUSEError(errno_of(error))
    log.error("bug in the handler of %s: the program got EIO", name, exc_info=error)
    return pyfuse3.FUSEError(errno.EIO)


@types.coroutine
def _rest(handler: Coroutine[Any, Any, Any], waiting_for: object) -> Generator[Any, Any, Any]:
    """The steps of a handler after its first, which waits for `waiting_for`."""
    while True:
        thrown: BaseException | None = None
        got: object = None
        try:
            got = yield waiting_for
        except BaseException as error:  # noqa: BLE001  what trio throws in (Cancelled) is the handler's
            thrown = error
        try:
            waiting_for = handler.send(got) if thrown is None else handler.throw(thrown)
        except StopIteration as end:
            return end.value


def guarded(handler: Handler) -> Handler:
    """Wrap a handler of `Operations`. NotPermitted is also handed to the instance's `refused(handler name, arguments, error)`.

    Its first step is made here, because most handlers have no other: one that waits has the instance's `receiver` pass the turn on.
    """
    name = handler.__name__

    @functools.wraps(handler)
    async def guard(self: Any, *args: Any) -> Any:
        Receiver.last_handler = name
        try:
            running = handler(self, *args)
            try:
                waiting_for = running.send(None)
            except StopIteration as end:
                return end.value
            self.receiver.pass_on()
            return await _rest(running, waiting_for)
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
