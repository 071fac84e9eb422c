"""A request that a coprocess was sent: its answer is waited for in a thread, or, for as long as that goes well, by the event loop.

A thread for each request would do: but it takes the interpreter's lock from the event loop each time it is woken, and makes it wait for a
core (docs/performance.md). So the event loop sends the request, waits for the channel as for any other descriptor, and takes an answer that
says that all is done. All else, an answer that does not come soon, an error, the end of the process, is for a thread, as it may take long.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import Protocol

import msgspec
import trio

from storage import errors
from storage.abandoned import Abandoned
from storage.coprocess.process import Process
from storage.coprocess.wire import MOST, Answer, Done, Failed, Go, Wanted, decode_answer, encode

#: Seconds after which one that is busy with a disk is asked whether it is well.
LOOK = 10
#: Seconds the event loop waits for an answer, before a thread does. What takes longer than that gains nothing by sparing a thread.
SOON = 1.0


class Gone(Exception):
    """It does not answer: what it was asked for is to be done here."""


class Asker(Protocol):
    """What it needs of who has sent the request (`client.Coprocess`)."""

    def is_well(self, process: Process) -> bool:
        """Does it answer at all? Blocking."""
        ...

    def answered(self, process: Process, channel: socket.socket) -> None:
        """On that channel another may ask."""
        ...

    def give_up(self, process: Process, channel: socket.socket, why: str, held: object) -> None:
        """It has not answered, and may be at work: it ends, before what it works in is used by anybody else. Blocking."""
        ...

    def forsake(self, process: Process, channel: socket.socket, held: object) -> None:
        """As `give_up`, without waiting for its end."""
        ...


class Asked:
    """See the module. Made by `Coprocess.begin`. `answer` is called exactly once, by whoever waits for it last, or `forsake` in its place;
    nobody asks on its channel before that has returned."""

    def __init__(
        self, asker: Asker, process: Process, channel: socket.socket, held: object, limit: int, wanted: Callable[[], None] | None
    ) -> None:
        """`held`: what was lent for it, and is not lent again while this is held. `limit`, `wanted`: see `Coprocess.ask`."""
        self._asker, self._process, self._channel = asker, process, channel
        self._held, self._limit, self._wanted = held, limit, wanted
        #: What was received, and has not been looked at by `answer`.
        self._packet: bytes | None = None
        #: `answer` or `forsake` was called.
        self._heard = False

    async def soon(self) -> bool:
        """For the event loop. True: it has done what it was asked for, and `answer` returns at once. False: not yet, or something went
        wrong: a thread is to call it. Cancelled: a thread is to call it all the same, and nobody needs what it returns."""
        with trio.move_on_after(SOON):
            try:
                await trio.lowlevel.wait_readable(self._channel)
                # No await from here on.
                self._packet = self._channel.recv(MOST, socket.MSG_DONTWAIT)
                return type(decode_answer(self._packet)) is Done
            except (OSError, msgspec.DecodeError):
                # A thread meets it again; or the kernel has no memory to wait for it with.
                return False
        return False

    def answer(self) -> Done:
        """Waits for it, as `Coprocess.ask` does, unless `soon` has."""
        channel, self._heard = self._channel, True
        try:
            answer = self._received()
            while isinstance(answer, Wanted):
                channel.send(encode(Go(self._wanted is None or _is(self._wanted))))
                answer = self._received()
        except (OSError, msgspec.DecodeError) as error:
            self._asker.give_up(self._process, channel, str(error), self._held)
            raise Gone(str(error)) from error
        except BaseException as error:
            self._asker.give_up(self._process, channel, repr(error), self._held)
            raise
        self._asker.answered(self._process, channel)
        if isinstance(answer, Failed):
            raise _error(answer)
        return answer

    def forsake(self) -> None:
        """For the event loop, in place of `answer`, where no thread can be had that waits for it: the process ends, and what it may work in
        is held until it has. Nothing happens where `answer` was called."""
        if not self._heard:
            self._heard = True
            self._asker.forsake(self._process, self._channel, self._held)

    def _received(self) -> Answer:
        """OSError: nothing came, or will come."""
        packet, self._packet = self._packet, None
        if packet is None:
            self._channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", self._limit or LOOK, 0))
        while packet is None:
            try:
                packet = self._channel.recv(MOST)
            except BlockingIOError:
                if self._limit or not self._asker.is_well(self._process):
                    raise OSError(f"no answer within {self._limit or LOOK} s") from None
        if not packet:
            raise OSError("it has ended")
        answer: Answer = decode_answer(packet)
        return answer


def _is(wanted: Callable[[], None]) -> bool:
    try:
        wanted()
    except Abandoned:
        return False
    return True


def _error(answer: Failed) -> Exception:
    if answer.kind == Abandoned.__name__:
        return Abandoned(answer.message)
    if answer.kind == Gone.__name__:
        return Gone(answer.message)
    kind = getattr(errors, answer.kind, None)
    if isinstance(kind, type) and issubclass(kind, errors.FusefsError):
        return kind(answer.message)
    return RuntimeError(answer.message)
